"""Muon on whole and on sharded matrices: the same numbers, bit for bit, one matrix per rank at a time."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from datamodules.store import Store
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import lm_config, tiny_text
from trainer import config as configs
from trainer.checkpoint import committed_steps, read_manifest, step_name
from trainer.optim import exchange, lookup
from trainer.optim.muon import Muon, MuonConfig, orthogonalize
from trainer.records import read_metrics
from trainer.run import fit

# Rows that do not divide over three or four ranks, one matrix with fewer rows than ranks, several rounds.
HIDDEN = [(8, 6), (5, 9), (3, 4), (12, 12), (2, 16), (7, 7), (16, 4)]
OTHERS = {"embedding": (10, 6), "vector": (6,), "spectral": (2, 3, 4, 2), "readout": (5, 6)}
STEPS = 3


def values(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def groups_of(hidden: list[nn.Parameter], others: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"params": hidden, "lr": 0.02, "weight_decay": 0.1, "role": "hidden"}]
    return found + [
        {"params": [p], "lr": 0.02, "weight_decay": 0.1 * (role != "vector"), "role": role}
        for role, p in others.items()
    ]


def make(place: Any) -> tuple[list[nn.Parameter], dict[str, nn.Parameter]]:
    hidden = [nn.Parameter(place(values(i, shape))) for i, shape in enumerate(HIDDEN)]
    return hidden, {role: nn.Parameter(place(values(50 + i, s))) for i, (role, s) in enumerate(OTHERS.items())}


def gradients(parameters: list[nn.Parameter], step: int, place: Any) -> None:
    for i, parameter in enumerate(parameters):
        parameter.grad = place(values(1000 * (step + 1) + i, tuple(parameter.shape)))


def train(config: MuonConfig, place: Any) -> tuple[list[torch.Tensor], Muon]:
    hidden, others = make(place)
    optimizer = lookup("muon")[1](config, groups_of(hidden, others))
    everything = [*hidden, *others.values()]
    for step in range(STEPS):
        gradients(everything, step, place)
        optimizer.step()
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in everything], optimizer


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_steps_are_those_of_torch(adjust, nesterov):
    found, optimizer = train(MuonConfig(lr=0.02, adjust=adjust, nesterov=nesterov, adamw_lr_ratio=0.5), lambda t: t)
    hidden, others = make(lambda t: t)
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust, nesterov=nesterov)
    rest = [{"params": [p], "weight_decay": 0.1 * (role != "vector")} for role, p in others.items()]
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=True)
    everything = [*hidden, *others.values()]
    for step in range(STEPS):
        gradients(everything, step, lambda t: t)
        muon.step()
        adamw.step()
    for mine, theirs in zip(found, everything, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(found[0], values(0, HIDDEN[0]))
    assert {len(state) for state in optimizer.state.values()} == {1, 3}


def test_orthogonalize_brings_all_singular_values_near_one():
    for shape in ((20, 8), (8, 20)):
        size = torch.linalg.svdvals(orthogonalize(values(3, shape), 10).float())
        assert size.min() > 0.6 and size.max() < 1.3


LAYOUTS = {  # name -> (mesh shape, placements)
    "fsdp": ((4,), [Shard(0)]),
    "hsdp": ((2, 2), [Replicate(), Shard(0)]),
    "tensor_parallel": ((2, 2), [Shard(0), Shard(1)]),
    "replicated": (None, None),
}


def sharded(config: MuonConfig) -> dict[str, Any]:
    """Worker: the same training in every layout; the parameters, and what was computed where and when."""
    found: dict[str, Any] = {}
    direction, collective = Muon.direction, dist.all_to_all_single
    for name, (shape, placements) in LAYOUTS.items():
        events: list[str] = []

        def seen(self: Muon, matrix: torch.Tensor, group: Any, events: list[str] = events) -> torch.Tensor:
            events.append("work")
            return direction(self, matrix, group)

        def sent(*arguments: Any, events: list[str] = events, **other: Any) -> Any:
            assert other["async_op"]
            events.append("move")
            return collective(*arguments, **other)

        Muon.direction, exchange.dist.all_to_all_single = seen, sent  # type: ignore[method-assign]
        if shape is None:
            place = lambda tensor: tensor  # noqa: E731
        else:
            mesh = init_device_mesh("cpu", shape)

            def place(tensor: torch.Tensor, mesh: Any = mesh, placements: Any = placements) -> torch.Tensor:
                cut = [p if not isinstance(p, Shard) or p.dim < tensor.ndim else Replicate() for p in placements]
                return distribute_tensor(tensor, mesh, cut)

        parameters, optimizer = train(config, place)
        kinds = {type(state[key]) for state in optimizer.state.values() for key in state if key != "step"}
        found[name] = [p.numpy() for p in parameters], events, sorted(kind.__name__ for kind in kinds)
    Muon.direction, exchange.dist.all_to_all_single = direction, collective  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def on_four() -> list[dict[str, Any]]:
    return run_distributed(sharded, 4, MuonConfig(lr=0.02))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_steps_equal_unsharded_ones_bit_for_bit(on_four, layout):
    torch.set_num_threads(1)
    whole, _ = train(MuonConfig(lr=0.02), lambda t: t)
    for found in on_four:
        for mine, reference in zip(found[layout][0], whole, strict=True):
            assert np.array_equal(mine, reference.numpy())
        assert found[layout][2] == (["Tensor"] if layout == "replicated" else ["DTensor"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_matrix_is_worked_on_once_while_the_next_one_travels(on_four, layout):
    """Seven matrices on four ranks are two rounds: the second is on its way before the first is worked on."""
    logs = [found[layout][1] for found in on_four]
    assert sum(log.count("work") for log in logs) == len(HIDDEN) * STEPS
    for log in logs[:3]:  # gather 1, gather 2, work 1, scatter 1, work 2, scatter 2
        assert log == ["move", "move", "work", "move", "work", "move"] * STEPS
    assert logs[3] == ["move", "move", "work", "move", "move"] * STEPS


def test_a_hidden_parameter_that_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"a hidden parameter has the shape \[2, 3, 4\]: Muon takes matrices"):
        Muon(MuonConfig(), [{"params": [nn.Parameter(torch.zeros(2, 3, 4))], "lr": 0.1, "role": "hidden"}])


@pytest.mark.parametrize("field", [{"momentum": 1.0}, {"steps": 0}, {"adjust": "none"}, {"betas": [0.9]}, {"lr": 0.0}])
def test_a_config_that_cannot_work_is_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        MuonConfig(**field)


def runs(jobs: list[tuple[configs.RunConfig, bool]]) -> list[str]:
    torch.set_num_threads(1)
    return [fit(config, resume=resume)["status"] for config, resume in jobs]


def settings(url: str, data: str, strategy: str, world: int) -> configs.RunConfig:
    raw = lm_config(url, data, max_steps=8, global_batch=6)
    raw |= {"strategy": {"name": strategy}, "optim": {"name": "muon", "lr": 3e-3}, "checkpoint": {"every": 4}}
    raw["resources"] = {**raw["resources"], "processes_per_node": world}
    return configs.load(raw)


def losses(url: str) -> list[float]:
    return [row["loss"] for row in read_metrics(Store(url)) if "loss" in row]


def test_a_run_with_muon_continues_at_another_world_size_and_strategy(tmp_path):
    data, whole = tiny_text(str(tmp_path / "text")), str(tmp_path / "whole")
    run_distributed(runs, 2, [(settings(whole, data, "fsdp", 2), False)])
    assert losses(whole)[-1] < losses(whole)[0]
    tensors = read_manifest(Store(whole).sub("checkpoints"), 8)["tensors"]
    matrices = [name for name in tensors if name.endswith(".momentum_buffer")]
    assert matrices and all(len(tensors[name]["chunks"]) == 2 for name in matrices)
    jobs = []
    for strategy in ("ddp", "fsdp"):
        url = str(tmp_path / strategy)
        shutil.copytree(whole, url)
        shutil.rmtree(f"{url}/checkpoints/{step_name(8)}")
        assert committed_steps(Store(url).sub("checkpoints")) == [4]
        jobs.append((settings(url, data, strategy, 1), True))
    run_distributed(runs, 1, jobs)
    for config, _ in jobs:
        np.testing.assert_allclose(losses(config.url), losses(whole), rtol=0, atol=1e-3)  # bfloat16 iteration
