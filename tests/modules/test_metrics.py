import math

import numpy as np
import pytest
import torch

from modules.metrics.bigram import Bigram
from modules.metrics.fields import relative_l2, vrmse
from modules.metrics.text import bits_per_byte


def test_relative_l2_is_over_all_channels_of_a_sample():
    target = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    prediction = target.clone()
    prediction[0, 0, 1] += 2.0
    prediction[1] *= 1.5
    torch.testing.assert_close(relative_l2(prediction, target), torch.tensor([2.0 / 5.0, 0.5]))


def test_relative_l2_does_not_depend_on_units_or_resolution():
    torch.manual_seed(0)
    target, error = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8)
    before = relative_l2(target + error, target)
    torch.testing.assert_close(relative_l2(7 * (target + error), 7 * target), before)
    finer = [x.repeat_interleave(2, -1).repeat_interleave(2, -2) for x in (target + error, target)]
    torch.testing.assert_close(relative_l2(*finer), before)


def test_relative_l2_of_a_zero_target():
    values = relative_l2(torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1))
    assert values[0] == torch.inf and values[1].isnan()


@pytest.mark.parametrize("points", [4, 64])
def test_vrmse_of_the_spatial_mean(points):
    torch.manual_seed(0)
    target = 3.0 + 2.0 * torch.randn(5, 2, points, points, dtype=torch.float64)
    mean = target.mean(dim=(-2, -1), keepdim=True).expand_as(target)
    n = points * points
    torch.testing.assert_close(
        vrmse(mean, target), torch.full((5,), math.sqrt((n - 1) / n), dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_vrmse_closed_form():
    """A sine of amplitude a off by a constant c, per channel: c / (a / sqrt 2), with the unbiased variance."""
    n = 32
    wave = torch.sin(2 * math.pi * torch.arange(n, dtype=torch.float64) / n)
    target = torch.stack([2.0 * wave, 5.0 * wave])[None]
    offset = torch.tensor([0.3, 1.0], dtype=torch.float64)[None, :, None]
    variances = [amplitude**2 / 2 * n / (n - 1) for amplitude in (2.0, 5.0)]
    expected = np.mean([c / math.sqrt(v + 1e-7) for c, v in zip((0.3, 1.0), variances, strict=True)])
    assert vrmse(target + offset, target).item() == pytest.approx(expected, rel=1e-12)


def test_half_precision_is_measured_in_float32():
    target = torch.ones(1, 1, 4096, dtype=torch.float16) * 100  # its sum of squares overflows in float16
    assert relative_l2(target * 0.5, target).item() == pytest.approx(0.5)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"prediction of shape \(2, 1, 4\): the target has \(2, 1, 5\)"):
        relative_l2(torch.zeros(2, 1, 4), torch.zeros(2, 1, 5))


def test_bits_per_byte():
    assert bits_per_byte(math.log(256)) == pytest.approx(8.0)
    assert bits_per_byte(math.log(2.0**12), bytes_per_token=4.0) == pytest.approx(3.0)
    torch.testing.assert_close(bits_per_byte(torch.tensor(math.log(2.0))), torch.tensor(1.0))


def test_bigram_by_hand():
    model = Bigram(vocab_size=3, smoothing=0.5)
    model.update(np.array([0, 1, 0, 1, 0, 2], dtype=np.uint8))
    # after 0: 1 twice, 2 once; after 1: 0 twice; after 2: nothing
    nats, count = model.nats([0, 1, 0, 2, 2])
    expected = -sum(math.log(p) for p in (2.5 / 4.5, 2.5 / 3.5, 1.5 / 4.5, 0.5 / 1.5))
    assert count == 4 and nats == pytest.approx(expected, rel=1e-12)
    assert model.bits_per_byte([0, 1, 0, 2, 2]) == pytest.approx(expected / 4 / math.log(2))


def test_bigram_reaches_the_entropy_rate_of_a_markov_chain():
    rng = np.random.default_rng(0)
    matrix = rng.dirichlet(np.full(8, 0.5), size=8)
    edges = matrix.cumsum(1)
    draws, state, chain = rng.random(120_000), 0, []
    for u in draws:
        state = min(int(np.searchsorted(edges[state], u)), 7)
        chain.append(state)
    values, vectors = np.linalg.eig(matrix.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    entropy = -(stationary[:, None] * matrix * np.log2(np.maximum(matrix, 1e-300))).sum()
    model = Bigram(vocab_size=8, smoothing=0.1)
    model.update(chain[:100_000])
    assert model.bits_per_byte(chain[100_000:]) == pytest.approx(entropy, rel=0.02)


def test_bigram_without_text_is_uniform_and_rows_are_separate():
    model = Bigram()
    assert model.bits_per_byte(np.arange(256)) == pytest.approx(8.0)
    model.update([[1, 2], [3, 4]])
    assert model.counts.sum() == 2 and model.counts[1, 2] == model.counts[3, 4] == 1 and model.counts[2, 3] == 0
    assert model.nats([[1, 2, 3], [4, 5, 6]])[1] == 4


def test_bigram_refuses():
    with pytest.raises(ValueError, match=r"smoothing=0: must be positive"):
        Bigram(smoothing=0)
    with pytest.raises(ValueError, match="token 7: outside the vocabulary of 4"):
        Bigram(vocab_size=4).update([1, 7])
    with pytest.raises(ValueError, match="at least two"):
        Bigram().bits_per_byte([1])
