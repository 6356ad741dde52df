"""Ranks and micro-batches with different numbers of valid elements: every strategy takes the step of the global mean."""

import importlib.util
from typing import Any

import lightning
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from tests.conftest import unavailable
from tests.helpers.distributed import run_distributed
from tests.modules.test_task_base import batch, samples, task
from trainer.distributed import LaunchedEnvironment
from trainer.quiet import quiet
from trainer.strategies import lookup, precision

RATE, CLIP = 0.5, 0.05
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {},
    "fsdp_whole": {"whole_gradients": True},
    "fsdp_hybrid": {"replicate": 2},
    "deepspeed_1": {"stage": 1},
    "deepspeed_2": {"stage": 2},
    "deepspeed_3": {"stage": 3},
    "deepspeed_2_offload": {"stage": 2, "offload_optimizer": True},
    "deepspeed_3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
CASES = [(1, 0.0), (4, 0.0), (4, CLIP)]  # micro-batches per step, clipping
HYBRID = [("fsdp_hybrid", 1, 0.0), ("fsdp_hybrid", 2, CLIP)]  # on four ranks


def reference(clip: float, uneven: bool = True) -> dict[str, torch.Tensor]:
    """One SGD step on the mean over all valid targets (or, wrongly, on the mean of the means of samples)."""
    built = task(RATE)
    parts = [samples(8, True)] if uneven else [[row] for row in samples(8, True)]
    for rows in parts:
        total, count, _ = built.loss_terms(batch(rows))
        (total / count.clamp_min(1) / len(parts)).backward()  # type: ignore[union-attr]
    if clip:
        norm = torch.nn.utils.clip_grad_norm_(built.network.parameters(), clip)
        assert norm > 2 * clip
    return {name: p.detach() - RATE * p.grad for name, p in built.network.named_parameters()}  # type: ignore[operator]


def step(name: str, accumulate: int, clip: float) -> dict[str, list[float]]:
    """The same step under a strategy: this rank has its half of the samples, in micro-batches."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = 8 // world
    config_class, strategy_class = lookup(name.partition("_")[0])
    strategy = strategy_class(config_class(**STRATEGIES[name]), None)
    built = task(RATE)
    built.prepare = strategy.prepare
    fit = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        plugins=[LaunchedEnvironment(), precision.plugin("32-true", "cpu")],
        max_steps=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip or None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    fit.fit(built, DataLoader(samples(8, True)[rank * size : (rank + 1) * size], batch_size=size // accumulate))
    return {key: whole(p).tolist() for key, p in built.network.named_parameters()}


def whole(parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().cpu()
    return parameter.detach()


def steps(cases: list[Any]) -> dict[Any, dict[str, list[float]]]:
    torch.set_num_threads(1)
    quiet()
    return {case: step(*case) for case in cases}


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        unavailable("tests over all strategies need deepspeed: pip install 'keel[test]'")


@pytest.fixture(scope="module")
def found() -> list[dict[Any, dict[str, list[float]]]]:
    return run_distributed(steps, 2, [(name, *case) for name in STRATEGIES for case in CASES if name != "fsdp_hybrid"])


@pytest.mark.parametrize("case", CASES, ids=["whole", "accumulated", "clipped"])
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "fsdp_hybrid"])
def test_the_step_is_that_of_the_mean_over_all_valid_elements(found, name, case):
    for rank in found:
        compare(rank[(name, *case)], case[1])


def test_so_it_is_where_shards_have_replicas():
    for rank in run_distributed(steps, 4, HYBRID):
        for case in HYBRID:
            compare(rank[case], case[2])


def compare(found: dict[str, list[float]], clip: float) -> None:
    for key, value in reference(clip).items():
        torch.testing.assert_close(torch.tensor(found[key]), value, rtol=1e-5, atol=1e-6)


def test_the_difference_would_show():
    wrong, right = reference(0.0, uneven=False), reference(0.0)
    assert max((wrong[key] - right[key]).abs().max() for key in right) > 1e-3
