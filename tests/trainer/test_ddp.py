"""Data parallel on more than two ranks, where the order of additions matters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.distributed import run_distributed
from trainer.strategies.ddp import settle_buckets

STEPS = 3


def gradients(settled: bool) -> list[bool]:
    """Worker function: per parameter, whether the last step of a run equals that of one which begins with that step."""
    torch.manual_seed(0)
    network = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(37, 37), nn.GELU())])
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = [torch.randn(8, 37, generator=generator) for _ in range(STEPS)]

    def last(first: int) -> list[torch.Tensor]:
        model: Any = DistributedDataParallel(network, gradient_as_bucket_view=True)
        if settled:
            settle_buckets(model)
            assert all(p.grad is None for p in network.parameters())
        for batch in batches[first:]:
            network.zero_grad()
            model(batch).square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    return [torch.equal(a, b) for a, b in zip(last(0), last(STEPS - 1), strict=True)]


def test_the_first_step_after_a_resume_adds_in_the_same_order() -> None:
    found = run_distributed(both, 3)
    assert all(all(equal) for _, equal in found)
    assert not all(all(equal) for equal, _ in found), (
        "torch lays out gradients alike by itself now: settle_buckets can go"
    )


def both() -> tuple[list[bool], list[bool]]:
    """Worker function."""
    return gradients(False), gradients(True)
