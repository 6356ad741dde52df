import itertools
import math

import pytest
import torch
from torch import nn

from modules.language.transformer import Transformer, TransformerConfig
from modules.tasks.next_token import NextToken, NextTokenConfig

SPEC = {"kind": "text", "vocab_size": 6, "seq_len": 5}


class Table(nn.Module):
    """Logits from the present token alone."""

    vocab_size, max_seq_len = 6, 5

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Parameter(torch.randn(6, 6))

    def forward(self, tokens):
        return self.logits[tokens]


def task(network=None, **changes):
    return NextToken(network or Table(), NextTokenConfig(**{"seq_len": 5, "vocab_size": 6} | changes))


def tokens(samples=3):
    return torch.randint(6, (samples, 6), generator=torch.Generator().manual_seed(1))


def by_hand(logits, rows, mask=None, z_loss=0.0):
    total, count = 0.0, 0
    for b, row in enumerate(rows.tolist()):
        for i, (a, target) in enumerate(itertools.pairwise(row)):
            if mask is None or mask[b][i]:
                log_z = math.log(sum(math.exp(v) for v in logits[a].tolist()))
                total += log_z - logits[a][target].item() + z_loss * log_z**2
                count += 1
    return total, count


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_by_hand(z_loss, masked):
    built, rows = task(z_loss=z_loss), tokens()
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) < 0.5 if masked else None
    total, count, extras = built.loss_terms({"tokens": rows} | ({"mask": mask} if masked else {}))
    expected, n = by_hand(built.network.logits, rows, mask, z_loss)
    assert int(count) == n and isinstance(count, torch.Tensor) is masked
    assert total.item() == pytest.approx(expected, rel=1e-5)
    plain, _ = by_hand(built.network.logits, rows, mask)
    assert extras["cross_entropy"].item() == pytest.approx(plain / n, rel=1e-5)
    assert extras["logit_max"].item() == pytest.approx(built.network.logits[rows[:, :-1]].abs().max().item())
    assert not any(value.requires_grad for value in extras.values())


def test_gradient_of_the_z_loss():
    """d(c ln²Z)/dlogits = 2 c ln Z softmax."""
    rows = torch.tensor([[2, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[True, False, False, False, False]])
    gradients = []
    for z_loss in (0.0, 1e-2):
        built = task(z_loss=z_loss)
        built.loss_terms({"tokens": rows, "mask": mask})[0].backward()
        gradients.append(built.network.logits.grad[2])
    row = Table().logits.detach()[2]
    torch.testing.assert_close(
        gradients[1] - gradients[0], 2e-2 * row.logsumexp(0) * row.softmax(0), rtol=1e-4, atol=1e-6
    )


def test_evaluation():
    built, rows = task(), tokens()
    built.bind(SPEC | {"bytes_per_token": 2.5})
    found = {
        name: float(total.detach()) / count for name, (total, count) in built.evaluation_step({"tokens": rows}).items()
    }
    nats, count = by_hand(built.network.logits, rows)
    best = built.network.logits.argmax(-1)
    right = sum(int(best[a] == b) for row in rows.tolist() for a, b in itertools.pairwise(row))
    assert found == {
        "loss": pytest.approx(nats / count, rel=1e-5),
        "bits_per_byte": pytest.approx(nats / count / math.log(2) / 2.5, rel=1e-5),
        "accuracy": pytest.approx(right / count),
    }


def test_masked_targets_do_not_count_in_evaluation():
    built, rows = task(), tokens()
    mask = torch.zeros(3, 5, dtype=torch.int64)
    mask[1, 2:] = 1
    masked = built.evaluation_step({"tokens": rows, "mask": mask})
    kept = built.evaluation_step({"tokens": rows[1:2, 2:]})
    for name, (total, count) in kept.items():
        assert int(masked[name][1]) == count == 3
        torch.testing.assert_close(masked[name][0], total)


def test_example_and_shapes():
    built, rows = task(), tokens()
    found = built.evaluation_example({"tokens": rows})
    assert torch.equal(found["tokens"], rows[0, 1:])
    assert torch.equal(found["prediction"], built.network.logits.argmax(-1)[rows[0, :-1]])
    assert found["nats"].sum().item() == pytest.approx(by_hand(built.network.logits, rows[:1])[0], rel=1e-5)
    assert built.tokens_per_sample() == 5 and built.evaluation_window() == {}


def test_an_example_batch_runs_on_the_meta_device():
    with torch.device("meta"):
        network = Transformer(TransformerConfig(vocab_size=6, width=16, depth=1, heads=2, max_seq_len=5))
    built = task(network)
    batch = built.example_batch(4)
    assert batch["tokens"].shape == (4, 6) and batch["tokens"].dtype == torch.int64 and batch["tokens"].is_meta
    assert built.loss_terms(batch)[0].is_meta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "fields"}, "takes text, but the data set holds fields"),
        ({"vocab_size": 7}, "task.vocab_size=6: the data set's tokens go up to 6; set it .* to at least 7"),
        ({"seq_len": 4}, "task.seq_len=5: the data stream gives seq_len=4"),
    ],
)
def test_data_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        task().bind(SPEC | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 7}, "task.vocab_size=7: the network has vocab_size=6"),
        ({"seq_len": 6}, "task.seq_len=6: longer than the network's max_seq_len=5"),
        ({"z_loss": -1.0}, "z_loss=-1.0: must not be negative"),
        ({"seq_len": 0}, "seq_len=0: must be at least 1"),
        ({"network": nn.Identity()}, "is no token network"),
    ],
)
def test_what_does_not_fit_the_network(changes, message):
    with pytest.raises(ValueError, match=message):
        task(**changes)


def test_a_mask_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"mask of shape \(3, 6\): one entry per target, \(3, 5\)"):
        task().loss_terms({"tokens": tokens(), "mask": torch.ones(3, 6)})
