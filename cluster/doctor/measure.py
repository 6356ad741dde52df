"""What only a measurement tells: speed of each rank, of the network, of the store; how far clocks are apart.

All functions are collective. Times are the best of several tries: what disturbs one is no property of the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from datamodules.store import Store
from trainer.distributed import local_world_size

_TRIES = 5
_PINGS = 8
_COMPUTE_S = 0.5


def compute(device: torch.device) -> float:
    """FLOP/s of this rank in a product of matrices."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    end, best = time.monotonic() + _COMPUTE_S, float("inf")
    while time.monotonic() < end or best == float("inf"):
        best = min(best, _best(lambda: torch.mm(a, a), device, 10))
    return 2 * size**3 / best


def collectives(device: torch.device, budget_s: float) -> dict[str, float]:
    """Latency (seconds) and bus bandwidth (bytes/s, comparable over world sizes) of all-reduce and all-to-all; with one
    rank nothing."""
    world = dist.get_world_size()
    if world == 1:
        return {}
    most = 1 << (28 if device.type == "cuda" else 25)
    found: dict[str, float] = {}
    for name, share in (("all_reduce", 2 * (world - 1) / world), ("all_to_all", (world - 1) / world)):
        small = torch.zeros(world, device=device)
        found[f"{name}_latency_s"] = _together(lambda x=small, n=name: _collective(n, x), device)  # type: ignore[misc]
        size = 1 << 20
        while True:
            count = size // 4 // world * world
            large = torch.zeros(count, device=device)
            seconds = _together(lambda x=large, n=name: _collective(n, x), device)  # type: ignore[misc]
            found[f"{name}_bytes_per_s"] = share * 4 * count / seconds
            if size >= most or seconds * 8 * (_TRIES + 1) > budget_s:
                break
            size *= 8
    return found


def _collective(name: str, x: torch.Tensor) -> None:
    if name == "all_reduce":
        dist.all_reduce(x)
    else:
        dist.all_to_all_single(torch.empty_like(x), x)


def links(device: torch.device) -> dict[int, float]:
    """Bytes/s between this node and its neighbours, by their numbers; all pairs at once, first those of even nodes with
    the next one, then those of odd nodes. Other ranks than the first of a node have none."""
    rank, local, world = dist.get_rank(), local_world_size(), dist.get_world_size()
    node, nodes = rank // local, world // local
    found: dict[int, float] = {}
    block = torch.zeros(1 << (24 if device.type == "cuda" else 21), device=device)
    for parity in (0, 1):
        dist.barrier()
        other = node + 1 if node % 2 == parity else node - 1
        if rank % local or not 0 <= other < nodes:
            continue

        def swap(peer: int = other * local, first: bool = node % 2 == parity) -> None:
            (dist.send if first else dist.recv)(block, peer)
            (dist.recv if first else dist.send)(block, peer)

        found[other] = 2 * 4 * block.numel() / _best(swap, device, _TRIES)
    return found


def clocks() -> dict[int, float]:
    """On rank 0: by rank, for the first of each node, the seconds by which its clock is ahead of rank 0's. Empty elsewhere."""
    rank, local = dist.get_rank(), local_world_size()
    ahead: dict[int, float] = {}
    stamp = torch.zeros(1, dtype=torch.float64)
    for other in range(local, dist.get_world_size(), local):
        if rank == 0:
            tries = []
            for _ in range(_PINGS):
                sent = time.time()
                dist.send(stamp, other)
                dist.recv(stamp, other)
                received = time.time()
                tries.append((received - sent, float(stamp) - (sent + received) / 2))
            ahead[other] = min(tries)[1]  # that of the quickest answer, whose error is the least
        elif rank == other:
            for _ in range(_PINGS):
                dist.recv(stamp, 0)
                stamp[0] = time.time()
                dist.send(stamp, 0)
    dist.barrier()
    return {0: 0.0} | ahead if rank == 0 else {}


def storage(store: Store, mib: int) -> dict[str, Any]:
    """What the first rank of a node finds of the store, all nodes at once: bytes/s written and read, whether it was the
    one that could create an object which all try to create, seconds by which its clock is ahead of the store's; or `error`."""
    rank, node = dist.get_rank(), dist.get_rank() // local_world_size()
    if rank % local_world_size():
        dist.barrier()
        return {}
    found: dict[str, Any] = {}
    path, data = f"probe/node-{node}.bin", torch.randint(0, 256, (mib << 20,), dtype=torch.uint8).numpy().tobytes()
    try:
        begun = time.monotonic()
        store.write(path, data)
        found["write_bytes_per_s"] = len(data) / (time.monotonic() - begun)
        begun = time.monotonic()
        same = store.read(path) == data
        found["read_bytes_per_s"] = len(data) / (time.monotonic() - begun)
        if not same:
            found["error"] = f"{store.join(path)} came back with other content"
        asked = time.time()
        times = None if store.is_local else store.times(path)
        if times is not None:
            found["ahead_of_store_s"] = (asked + time.time()) / 2 - times[1]
        store.delete(path)
        found["created"] = store.create("probe/first", str(rank).encode())
        found["conditional"] = store.conditional
    except OSError as error:
        found["error"] = " ".join(str(error).split())
    dist.barrier()
    return found


def _together(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a collective call: the median over its tries of what the slowest rank took."""
    call()
    seconds = []
    for _ in range(_TRIES):
        dist.barrier()
        seconds.append(_time(call, device))
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def _best(call: Callable[[], Any], device: torch.device, tries: int) -> float:
    call()
    return min(_time(call, device) for _ in range(tries))


def _time(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return max(time.perf_counter() - begun, 1e-9)
