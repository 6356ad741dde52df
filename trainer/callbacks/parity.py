"""Replicas that have drifted apart are found before they are saved."""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.errors import Defect

# Words that are hashed at once, by whether they lie in the host's memory: there in its cache, else in few kernels.
_AT_ONCE = {True: 1 << 17, False: 1 << 24}


class DivergedReplicas(Defect):
    """Ranks that should hold the same parameters do not."""


class Parity(pl.Callback):
    """Compares the parameters of replicas every `every` steps, before they are saved. Raises DivergedReplicas on all ranks.

    Ranks hold the same where a parameter is replicated: all of it under ddp, each shard within its replica group under
    HSDP. A rank's bytes become 64-bit numbers on the device; one wait for it and one gather of a few numbers per check. Catches bit flips, a rank that missed an update, and wrong communication.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every == 0:
            check(pl_module, self._step)


@torch.no_grad()
def check(module: nn.Module, step: int) -> None:
    """Raises DivergedReplicas unless the parameters of `module` are the same on all ranks that share them. Collective."""
    world = dist.get_world_size()
    if world == 1:
        return
    groups: dict[str, list[Tensor]] = {}
    for parameter in module.parameters():
        groups.setdefault(_holders(parameter), []).append(_local(parameter))
    hosts: list[Any] = [None] * world
    mine = {holders: int(fingerprint(tensors)) for holders, tensors in groups.items()}
    dist.all_gather_object(hosts, (socket.gethostname(), mine))
    wrong: list[str] = []
    for holders in sorted({name for _, values in hosts for name in values}):
        values = {rank: found[holders] for rank, (_, found) in enumerate(hosts) if holders in found}
        if len(set(values.values())) < 2:
            continue
        usual, votes = Counter(values.values()).most_common(1)[0]
        if votes * 2 > len(values):
            odd = [rank for rank, value in values.items() if value != usual]
            wrong.append(f"rank {_names(odd, hosts)} of ranks {', '.join(map(str, values))}")
        else:
            wrong.append(f"ranks {_names(list(values), hosts)}, of which none is in the majority,")
    if wrong:
        raise DivergedReplicas(
            f"step {step}: {'; '.join(wrong)} holds other parameters than its replicas: faulty memory or a lost update; "
            "check that machine; the last commit is good"
        )


@torch.no_grad()
def fingerprint(tensors: list[Tensor]) -> Tensor:
    """One int64 on the device, of the bytes of `tensors` and their places; any single changed bit changes it."""
    total = torch.zeros((), dtype=torch.int64)
    weights = torch.empty(0, dtype=torch.int64)
    for number, tensor in enumerate(tensors):
        words = _words(tensor)
        if weights.device != words.device or weights.numel() < min(words.numel(), _AT_ONCE[words.is_cpu]):
            places = torch.arange(min(words.numel(), _AT_ONCE[words.is_cpu]), device=words.device, dtype=torch.int64)
            # Odd, as the factors below: they have inverses modulo 2^64, so that no change of one word can cancel.
            weights = (places * 0x2545F4914F6CDD1D).bitwise_or_(1)
            total = total.to(words.device)
        for piece in words.split(_AT_ONCE[words.is_cpu]):
            total = total * 0x5851F42D4C957F2D + (piece.to(torch.int64) * weights[: len(piece)]).sum()
        total = total + 2 * number + 1
    return total


def _words(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().contiguous().reshape(-1).view(kinds[tensor.element_size()])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _holders(tensor: Tensor) -> str:
    """Which ranks hold the same part of `tensor` as this one; the same text on all of them."""
    if not isinstance(tensor, DTensor):
        return "all"
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    picked = tuple(
        slice(None) if placement.is_replicate() else where
        for placement, where in zip(placements, coordinate, strict=True)
    )
    return ",".join(str(rank) for rank in sorted(mesh.mesh[picked].flatten().tolist()))


def _names(ranks: list[int], hosts: list[Any]) -> str:
    return ", ".join(f"{rank} ({hosts[rank][0]})" for rank in ranks)
