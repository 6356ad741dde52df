"""Against an explicit float64 sum over wave numbers: no FFT in the reference."""

import itertools
import math

import pytest
import torch
from torch import nn

from modules.layers.spectral_conv import SpectralConv


def waves(axis_modes, points, samples, last):
    """Kept wave numbers of one axis and the matrices e^{-ikx} (forward, /n) and e^{ikx} (back)."""
    low = min(axis_modes // 2, points // 2, samples // 2)
    high = min((axis_modes - 1) // 2, (points - 1) // 2, (samples - 1) // 2)
    k = torch.arange(0 if last else -low, (low if last else high) + 1, dtype=torch.float64)
    x = torch.arange(points, dtype=torch.float64) / points
    y = torch.arange(samples, dtype=torch.float64) / samples
    forward = torch.exp(-2j * math.pi * k[:, None] * x) / points
    back = torch.exp(2j * math.pi * y[:, None] * k)
    return k.long(), forward, back


def reference(conv, x, shape=None):
    """The definition: coefficients by explicit sums, product with the weight of each wave number, explicit real sum."""
    shape = shape or x.shape[2:]
    d = x.ndim - 2
    spectrum = x.to(torch.complex128)
    axes = [
        waves(m, n, s, last=i == d - 1) for i, (m, n, s) in enumerate(zip(conv.modes, x.shape[2:], shape, strict=True))
    ]
    for i, (_, forward, _) in enumerate(axes):
        spectrum = torch.movedim(torch.tensordot(spectrum, forward, dims=([2 + i], [1])), -1, 2 + i)
    weight = torch.view_as_complex(conv.weight.detach().double().contiguous())
    for i, (k, _, _) in enumerate(axes):
        weight = weight.index_select(2 + i, k if i == d - 1 else k + conv.modes[i] // 2)
    out = torch.zeros(x.shape[0], conv.out_channels, *spectrum.shape[2:], dtype=torch.complex128)
    for index in itertools.product(*(range(n) for n in spectrum.shape[2:])):
        at = (slice(None), slice(None), *index)
        out[at] = spectrum[at] @ weight[at]
    k_last = axes[-1][0]
    twice = torch.where((k_last == 0) | (2 * k_last == shape[-1]), 1.0, 2.0)  # the other half of a real signal
    out = out * twice
    for i, (_, _, back) in enumerate(axes):
        out = torch.movedim(torch.tensordot(out, back, dims=([2 + i], [1])), -1, 2 + i)
    return out.real + conv.bias.detach().double().view(-1, *[1] * d)


GRIDS = [
    ([6], (16,)),
    ([6], (15,)),
    ([5], (9,)),
    ([8], (8,)),
    ([1], (7,)),
    ([6, 4], (12, 10)),
    ([6, 4], (11, 9)),
    ([5, 7], (12, 9)),
    ([6, 6], (6, 6)),
    ([8, 8], (5, 6)),
    ([8, 6], (6, 4)),
    ([4, 4, 4], (8, 7, 6)),
    ([3, 4, 5], (5, 6, 7)),
    ([4, 4, 4], (4, 3, 4)),
]


@pytest.mark.parametrize(("modes", "shape"), GRIDS)
def test_equals_the_explicit_sum(modes, shape):
    torch.manual_seed(0)
    conv = SpectralConv(3, 2, modes).double()
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(conv(x), reference(conv, x), rtol=0, atol=1e-13)
    conv = conv.float()
    error = conv(x.float()).double() - reference(conv, x)
    assert error.norm() / reference(conv, x).norm() < 1e-6


@pytest.mark.parametrize(
    ("modes", "shape", "target"), [([6], (15,), (8,)), ([6, 4], (12, 9), (17, 24)), ([5, 6], (9, 9), (4, 5))]
)
def test_other_output_grids_equal_the_explicit_sum(modes, shape, target):
    torch.manual_seed(0)
    conv = SpectralConv(2, 3, modes).double()
    x = torch.randn(2, 2, *shape, dtype=torch.float64)
    assert conv(x, target).shape == (2, 3, *target)
    torch.testing.assert_close(conv(x, target), reference(conv, x, target), rtol=0, atol=1e-13)


def band_limited(points, dimensions, highest=5, channels=3):
    """The same random trigonometric polynomial with |k_i| <= highest sampled on n^d points, float32."""
    generator = torch.Generator().manual_seed(3)
    axis = torch.arange(points, dtype=torch.float64) / points
    basis = torch.stack(
        [torch.cos(2 * math.pi * k * axis) for k in range(highest + 1)]
        + [torch.sin(2 * math.pi * k * axis) for k in range(1, highest + 1)]
    )
    field = torch.randn(1, channels, *[2 * highest + 1] * dimensions, generator=generator, dtype=torch.float64)
    for i in range(dimensions):
        field = torch.movedim(torch.tensordot(field, basis, dims=([2 + i], [0])), -1, 2 + i)
    return field.float()


@pytest.mark.parametrize("points", [64, 63])
def test_the_same_operator_on_a_finer_grid(points):
    torch.manual_seed(0)
    conv = SpectralConv(3, 3, [12, 12])
    coarse = conv(band_limited(points, 2))
    fine = conv(band_limited(2 * points, 2))[..., ::2, ::2]
    assert (fine - coarse).norm() / coarse.norm() < 1e-6


@pytest.mark.parametrize("points", [32, 33])
def test_up_sampling_keeps_the_values_at_common_points(points):
    torch.manual_seed(0)
    conv = SpectralConv(2, 2, [12, 12])
    x = torch.randn(2, 2, points, points)
    same, finer = conv(x), conv(x, (2 * points, 3 * points))
    assert (finer[..., ::2, ::3] - same).norm() / same.norm() < 1e-6


@pytest.mark.parametrize("shape", [(24, 16), (23, 17)])
def test_commutes_with_shifts(shape):
    torch.manual_seed(0)
    conv = SpectralConv(3, 3, [8, 8])
    x = torch.randn(2, 3, *shape)
    moved = conv(x.roll((5, 3), dims=(2, 3)))
    assert (moved - conv(x).roll((5, 3), dims=(2, 3))).norm() / moved.norm() < 1e-6


def test_channels_can_be_permuted():
    torch.manual_seed(0)
    conv, permuted = SpectralConv(4, 4, [6]), SpectralConv(4, 4, [6])
    order = torch.randperm(4)
    permuted.weight.data = conv.weight.data[order]
    permuted.bias.data = conv.bias.data
    x = torch.randn(2, 4, 16)
    torch.testing.assert_close(permuted(x[:, order]), conv(x), rtol=1e-5, atol=1e-5)


def test_nothing_is_left_beyond_the_kept_modes():
    torch.manual_seed(0)
    conv = SpectralConv(2, 2, [6, 8], bias=False).double()
    spectrum = torch.fft.rfft2(conv(torch.randn(1, 2, 20, 21, dtype=torch.float64)), norm="forward")
    kept = torch.zeros(20, 11, dtype=torch.bool)
    kept[[-3, -2, -1, 0, 1, 2], :5] = True
    kept[3, 0] = True  # real fields carry wave number -3 together with +3 where the last axis has wave number 0
    assert spectrum[..., ~kept].abs().max() < 1e-15
    assert spectrum[..., kept].abs().min() > 1e-4


def test_parameters_are_real_and_sized_by_the_modes():
    conv = SpectralConv(5, 7, [8, 6, 9])
    assert conv.weight.shape == (5, 7, 8, 6, 5, 2)
    assert conv.weight.dtype == conv.bias.dtype == torch.float32


def test_initial_scale():
    torch.manual_seed(0)
    conv = SpectralConv(48, 16, [16, 16])
    power = torch.view_as_complex(conv.weight.detach()).abs().square().mean()
    assert abs(power.item() / (2 / 64) - 1) < 0.02
    for width in (16, 64):  # white noise in: the output does not depend on the width
        out = SpectralConv(width, width, [16, 16], bias=False)(torch.randn(4, width, 64, 64))
        assert 0.23 < out.std().item() < 0.27


def test_gradients_reach_every_parameter_and_match_differences():
    torch.manual_seed(0)
    conv = SpectralConv(2, 2, [4, 4]).double()
    x = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(conv, {"weight": w, "bias": b}, x), (x, conv.weight, conv.bias)
    )
    conv(x).square().sum().backward()
    pairs = conv.weight.grad.flatten(0, 1)
    assert (pairs.abs().sum(0)[..., 0] > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_transforms_in_float32(dtype):
    torch.manual_seed(0)
    conv = SpectralConv(4, 4, [8, 8])
    x = torch.randn(2, 4, 15, 18)
    with torch.autocast("cpu", dtype=dtype):
        wide, half = conv(x), conv(x.to(dtype))
    assert torch.equal(wide, conv(x))
    assert half.dtype == dtype
    assert torch.equal(half, conv(x.to(dtype).float()).to(dtype))


def test_shards_of_float_pairs_reassemble_to_the_same_operator():
    """What a sharded optimiser does: flat real slices, put together again."""
    torch.manual_seed(0)
    conv = SpectralConv(4, 3, [6, 6])
    x = torch.randn(1, 4, 12, 12)
    before = conv(x)
    pieces = conv.weight.detach().flatten().tensor_split(5)
    conv.weight = nn.Parameter(torch.cat(pieces).view_as(conv.weight))
    assert torch.equal(conv(x), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpectralConv(1, 1, []), r"modes=\[\]: give one number per axis"),
        (lambda: SpectralConv(1, 1, [2, 2, 2, 2]), r"for 1 to 3 axes"),
        (lambda: SpectralConv(1, 1, [4, 0]), r"modes=\[4, 0\]: each axis needs at least 1"),
        (lambda: SpectralConv(2, 1, [4])(torch.zeros(1, 3, 8)), r"input of shape \(1, 3, 8\).*takes \(batch, 2, n_1\)"),
        (lambda: SpectralConv(2, 1, [4])(torch.zeros(1, 2, 8), (8, 8)), r"output_shape=\[8, 8\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
