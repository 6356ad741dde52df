"""Diagnostics against closed forms, and sharded against unsharded."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modules.operators.fno import FNO, FNOConfig
from modules.roles import declare
from modules.tasks.field_rollout import FieldRollout, FieldRolloutConfig
from tests.helpers.distributed import run_distributed
from trainer.diagnostics import DIAGNOSTICS, build
from trainer.diagnostics.activations import outlier_percent
from trainer.diagnostics.base import Context, Diagnostic
from trainer.diagnostics.spectrum import energies


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        self.bias = nn.Parameter(torch.randn(width))
        declare(self, weight="hidden", bias="vector")

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight + self.bias)


class Net(nn.Module):
    """Width 5 and 3 outputs: no dimension divides evenly over two ranks."""

    def __init__(self, width: int = 5, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.out = nn.Parameter(torch.randn(width, 3))
        declare(self, out="readout")

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x @ self.out


def measure(
    diagnostic: Diagnostic, network: Any, batches: list[Tensor], optimizer: Any, task: Any = None
) -> dict[str, float]:
    diagnostic.start(Context(task, network, {"x": batches[0]}))
    for x in batches:
        (network(x).square().mean() / len(batches)).backward()
    diagnostic.before_step()
    optimizer.step()
    found = {name: float(value) for name, value in diagnostic.collect().items()}
    diagnostic.stop()
    optimizer.zero_grad()
    return found


Found = dict[str, dict[str, float]]


def _sharded() -> list[tuple[Found, Found]]:
    """(sharded, whole) measurements of the same step, for sharding over both ranks and for two replicas."""
    rank = dist.get_rank()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    pairs = []
    for shape in ((2,), (1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        torch.manual_seed(0)
        whole, sharded = Net(), Net()
        sharded.load_state_dict(whole.state_dict())
        for block in sharded.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        found: list[Found] = []
        for network, part in ((sharded, x.chunk(2)[rank]), (whole, x)):
            optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
            both = ("gradients", "updates")
            found.append({name: measure(build([name])[name], network, [part], optimizer) for name in both})
        pairs.append((found[0], found[1]))
    return pairs


def test_norms_of_a_sharded_network_are_those_of_the_whole() -> None:
    for pairs in run_distributed(_sharded, 2):
        assert len(pairs) == 3
        for sharded, whole in pairs:
            assert sharded.keys() == whole.keys()
            for name in whole:
                assert sharded[name] == pytest.approx(whole[name], rel=1e-5), name


def test_gradient_norms_are_sums_over_blocks_and_over_roles() -> None:
    torch.manual_seed(0)
    network, x = Net(), torch.randn(6, 5)
    found = measure(build(["gradients"])["gradients"], network, [x], torch.optim.SGD(network.parameters(), lr=0.0))
    network(x).square().mean().backward()
    expected = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm().item()
    blocks = [found["block_00"], found["block_01"], found["outside"]]
    kinds = [found["role_hidden"], found["role_vector"], found["role_readout"]]
    assert found["norm"] == pytest.approx(expected, rel=1e-6)
    assert math.hypot(*blocks) == pytest.approx(expected, rel=1e-6)
    assert math.hypot(*kinds) == pytest.approx(expected, rel=1e-6)
    assert found["outside"] == pytest.approx(network.out.grad.norm().item(), rel=1e-6)  # type: ignore[union-attr]


def test_sgd_moves_by_learning_rate_times_gradient() -> None:
    torch.manual_seed(0)
    network, x, lr = Net(), torch.randn(6, 5), 0.01
    network(x).square().mean().backward()
    weights = torch.cat([p.detach().flatten() for p in network.parameters()])
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    out, slope = network.out.detach().clone(), network.out.grad.clone()  # type: ignore[union-attr]
    network.zero_grad()
    found = measure(build(["updates"])["updates"], network, [x], torch.optim.SGD(network.parameters(), lr=lr))
    assert found["relative"] == pytest.approx((lr * gradient.norm() / weights.norm()).item(), rel=1e-4)
    assert found["role_readout"] == pytest.approx((lr * slope.norm() / out.norm()).item(), rel=1e-4)


def test_outliers() -> None:
    hidden = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(0))
    assert outlier_percent(hidden, -1).item() == pytest.approx(100 * math.erfc(5 / math.sqrt(2)), abs=2e-4)  # 5.7e-5 %
    hidden[:, 7] = 100.0
    assert outlier_percent(hidden, -1).item() == pytest.approx(0.1, abs=2e-4)
    assert outlier_percent(hidden.T, 0).item() == pytest.approx(0.1, abs=2e-4)
    assert outlier_percent(hidden.T, -1).item() == pytest.approx(0.0, abs=2e-4)  # constant along that axis


@pytest.mark.parametrize("compiled", [False, True])
def test_activations_over_micro_batches(compiled: bool) -> None:
    torch.manual_seed(0)
    network = Net()
    batches = [torch.randn(4, 5), torch.randn(4, 5)]
    hidden = [torch.cat([network.layers[0](x) for x in batches])]
    hidden.append(network.layers[1](hidden[0]))
    if compiled:
        for block in network.blocks():
            block.compile(backend="eager")
            block(batches[0])
    found = measure(
        build(["activations"])["activations"], network, batches, torch.optim.SGD(network.parameters(), lr=0.0)
    )
    for number, h in enumerate(hidden):
        assert found[f"rms_block_{number:02d}"] == pytest.approx(h.square().mean().sqrt().item(), rel=1e-5)
        assert found[f"max_abs_block_{number:02d}"] == pytest.approx(h.abs().max().item(), rel=1e-6)
    assert found["max_abs"] == pytest.approx(max(h.abs().max().item() for h in hidden), rel=1e-6)
    assert found["outliers"] == 0.0


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_stays_attached(compiled: bool) -> None:
    network = Net()
    if compiled:
        for block in network.blocks():
            block.compile(backend="eager")
    before = [block.__dict__.get("_compiled_call_impl") for block in network.blocks()]
    diagnostic = build(["activations"])["activations"]
    diagnostic.start(Context(None, network, {}))
    diagnostic.stop()
    diagnostic.stop()
    assert not any(module._forward_hooks for module in network.modules())
    assert [block.__dict__.get("_compiled_call_impl") for block in network.blocks()] == before


def test_a_silent_block_is_an_error() -> None:
    diagnostic = build(["activations"])["activations"]
    diagnostic.start(Context(None, Net(), {}))
    with pytest.raises(RuntimeError, match="no output seen of block 0, 1"):
        diagnostic.collect()


class Constant(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=logits.shape[-1])
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 2, -1)


def test_logits() -> None:
    for shift in (0.0, -3.0):
        network = Constant(torch.full((7,), shift))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        found = measure(build(["logits"])["logits"], network, [torch.zeros(3), torch.zeros(3)], optimizer)
        assert found["max_abs"] == abs(shift)
        assert found["z"] == pytest.approx((math.log(7) + shift) ** 2, rel=1e-6)


def test_what_cannot_be_measured_is_refused() -> None:
    fields, text = SimpleNamespace(network=Net()), SimpleNamespace(network=Constant(torch.zeros(3)))
    with pytest.raises(ValueError, match="'logits' needs a language model"):
        build(["logits"])["logits"].check(fields)
    with pytest.raises(ValueError, match="'spectrum' needs a task on fields"):
        build(["spectrum"])["spectrum"].check(text)
    with pytest.raises(ValueError, match="'gradient' is unknown; did you mean gradients"):
        build(["gradient"])
    assert list(build(list(DIAGNOSTICS))) == list(DIAGNOSTICS)


def test_spectral_energies() -> None:
    x = torch.arange(32) * 2 * math.pi / 32
    low, high = 2.0 * torch.cos(3 * x), 0.5 * torch.sin(11 * x)
    fields = (1.0 + low[:, None] + high[None, :]).expand(2, 3, 32, 32)
    total, upper = energies(fields)
    frames = 2 * 3
    assert upper.item() == pytest.approx(frames * 32 * 32 * 0.5**2 / 2, rel=1e-5)
    assert total.item() == pytest.approx(frames * 32 * 32 * (0.5**2 / 2 + 2.0**2 / 2), rel=1e-5)


def test_spectrum_of_a_prediction() -> None:
    """A network that returns zero increments predicts the frame before: known here, mode by mode."""
    network = FNO(FNOConfig(in_channels=1, out_channels=1, width=4, depth=1, modes=[4]))
    task = FieldRollout(network, FieldRolloutConfig(space=[32], residual=True))
    for parameter in network.projection.parameters():
        nn.init.zeros_(parameter)
    x = torch.arange(32) * 2 * math.pi / 32
    first, second = torch.cos(2 * x) + torch.cos(12 * x), torch.cos(2 * x) + 0.1 * torch.cos(12 * x)
    diagnostic = build(["spectrum"])["spectrum"]
    task.train()
    diagnostic.start(Context(task, network, {"fields": torch.stack([first, second])[None, :, None]}))
    found = diagnostic.collect()
    assert found["high_log10"].item() == pytest.approx(2.0, rel=1e-4)
    assert found["total_log10"].item() == pytest.approx(math.log10(2 / 1.01), rel=1e-4)
    assert task.training and network.training
