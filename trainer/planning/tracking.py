"""What a step allocates and sends, seen from below autograd: every operation's results, every collective.

Works on fake tensors and on real ones alike. Memory is counted by storage: views cost nothing, and a storage counts
until its last tensor dies.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from trainer.flops import FORMULAS

BUILD, BATCH, FORWARD, BACKWARD, STEP = "build", "batch", "forward", "backward", "step"
KEPT = "kept"  # made in a backward pass and still there at the next forward: gradients that accumulate
UNDO = "undo"  # copies from which the guard would put back what a bad step has changed
CATEGORIES = (
    *("parameters", "buffers", "gradients", "optimiser", "averages", "undo copies"),
    *("gathered", "activations", "batch", "temporaries"),
)

# What a category is called when nothing else is known of a storage than when it was made.
_BY_PHASE = {BATCH: "batch", FORWARD: "activations", KEPT: "gradients", UNDO: "undo copies"}


@dataclass
class Block:
    """One live storage. `gathered`: it holds parameters of other ranks for a while."""

    bytes: int
    phase: str
    gathered: bool = False


class Route(NamedTuple):
    """A kind of collective, how many take part, how many of them on one machine; `blocking`: the step waits for it."""

    kind: str
    ranks: int
    per_machine: int
    blocking: bool = False

    @property
    def across(self) -> bool:
        """Whether it leaves the machine."""
        return self.per_machine < self.ranks


@dataclass
class Traffic:
    """Collectives of one route: how often, and bytes of the full (gathered or reduced) tensor."""

    calls: int = 0
    bytes: int = 0


class Work(NamedTuple):
    """What one operation computes and moves: FLOPs, whether in 16 bit, bytes read and written."""

    flops: int
    half: bool
    bytes: int


Counts = tuple[dict[Route, Traffic], "Counter[Work]"]


@dataclass
class Snapshot:
    """The live storages at the highest point of a step."""

    bytes: int = 0
    phase: str = BUILD
    live: dict[int, Block] = field(default_factory=dict)


class Tracker(TorchDispatchMode):
    """Counts live bytes from where it is entered; `phase` says what the loop is doing, `restart()` forgets the peak.

    Args:
        granule: allocations are rounded up to a multiple of this (an allocator's smallest block).
        local: ranks per machine.
    """

    def __init__(self, granule: int = 1, local: int = 1) -> None:
        super().__init__()
        self.granule, self.local, self.phase = granule, local, BUILD
        self.live: dict[int, Block] = {}
        self.total = 0
        self.peak = Snapshot()
        self.traffic: dict[Route, Traffic] = {}
        self.work: Counter[Work] = Counter()
        self._rising = False
        self._patches = contextlib.ExitStack()

    # ------------------------------------------------------------------------------------------------------ for the loop
    def restart(self) -> None:
        """Forget peak and traffic; what lives stays counted."""
        self.peak, self._rising = Snapshot(), False
        self.traffic, self.work = {}, Counter()
        self._grew()

    def forward(self) -> None:
        """A forward pass begins."""
        self.phase = FORWARD
        for block in self.live.values():
            if block.phase == BACKWARD:
                block.phase = KEPT

    def counts(self) -> Counts:
        """Traffic and work so far."""
        return {route: Traffic(t.calls, t.bytes) for route, t in self.traffic.items()}, Counter(self.work)

    def repeat_since(self, before: Counts | None, times: int) -> None:
        """Counts what came since `before` so many times more."""
        assert before is not None
        traffic, work = before
        for route, now in self.traffic.items():
            then = traffic.get(route, Traffic())
            now.calls += times * (now.calls - then.calls)
            now.bytes += times * (now.bytes - then.bytes)
        for key, count in (self.work - work).items():
            self.work[key] += times * count

    def finish(self) -> Snapshot:
        """The highest point since `restart`."""
        self._note_peak()
        return self.peak

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made before the tracker was entered, or out of its sight."""
        for tensor in tensors:
            self._see(tensor)

    def mark(self, phase: str, tensors: Iterable[Tensor]) -> None:
        """Storages count as made in `phase` for as long as they live."""
        for key in self.ids(tensors) & self.live.keys():
            self.live[key].phase = phase

    def ids(self, tensors: Iterable[Tensor]) -> set[int]:
        """The keys in `live` of the storages behind tensors."""
        return {id(storage) for tensor in tensors for storage in storages(tensor)}

    # -------------------------------------------------------------------------------------------------------- what it sees
    def __enter__(self) -> Tracker:
        self._patches.enter_context(_watch_resize(self._resized))
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # it unpacks itself into what really runs, which comes by here again
        found = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(func, args, found)
        elif not func.is_view:
            self._weigh(func, args, kwargs or {}, found)
        gathered = func.namespace == "fsdp" and "all_gather" in func.name()
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._see(leaf, gathered)
        return found

    def _see(self, tensor: Tensor, gathered: bool = False) -> None:
        for storage in storages(tensor):
            key = id(storage)
            if key in self.live:
                continue
            self.live[key] = Block(self._rounded(storage.nbytes()), self.phase, gathered)
            self.total += self.live[key].bytes
            weakref.finalize(storage, self._freed, key).atexit = False
            self._grew()

    def _freed(self, key: int) -> None:
        block = self.live.get(key)
        if block is not None:
            if block.bytes:
                self._note_peak()
            self.total -= block.bytes
            del self.live[key]

    def _resized(self, storage: Any, size: int) -> None:
        # FSDP keeps a block's whole parameters in storages that it empties and fills again.
        key = id(storage)
        if key not in self.live:
            self.live[key] = Block(0, self.phase)
            weakref.finalize(storage, self._freed, key).atexit = False
        block, size = self.live[key], self._rounded(size)
        if size < block.bytes:
            self._note_peak()
        self.total += size - block.bytes
        block.bytes, block.gathered, block.phase = size, True, self.phase
        self._grew()

    def _rounded(self, size: int) -> int:
        return -(-size // self.granule) * self.granule

    def _grew(self) -> None:
        self._rising = self._rising or self.total > self.peak.bytes

    def _note_peak(self) -> None:
        # Only before something is freed: between two frees the total rises only.
        if self._rising and self.total > self.peak.bytes:
            copied = {key: Block(b.bytes, b.phase, b.gathered) for key, b in self.live.items() if b.bytes}
            self.peak = Snapshot(self.total, self.phase, copied)
        self._rising = False

    def _count(self, func: Any, args: Any, found: Any) -> None:
        name = func.name().partition("::")[2].partition(".")[0].strip("_")
        kind = next((known for key, known in _COLLECTIVES.items() if name.startswith(key)), None)
        if kind is None:
            return
        tensors = [leaf for leaf in tree_leaves((args, found)) if isinstance(leaf, Tensor)]
        if not tensors:
            return
        size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
        ranks = _ranks(args)
        per_machine = sum(rank // self.local == ranks[0] // self.local for rank in ranks)
        # FSDP and DDP send beside the computation; a tensor-parallel block goes on only with what it gets.
        blocking = func.namespace != "c10d"
        entry = self.traffic.setdefault(Route(kind, len(ranks), per_machine, blocking), Traffic())
        entry.calls += 1
        entry.bytes += size

    def _weigh(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if not moved:
            return
        packet = func.overloadpacket
        formula = _ATTENTION.get(packet) or FORMULAS.get(packet) or flop_registry.get(packet)
        flops = int(formula(*args, **kwargs, out_val=found)) if formula is not None else 0
        self.work[Work(flops, tensors[0].element_size() == 2, moved)] += 1


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)


# The kernels of this CPU, which torch's own table lacks.
_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}

_COLLECTIVES = {
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall": "all-to-all",
    "all_to_all": "all-to-all",
    "broadcast": "broadcast",
}


def _ranks(args: Any) -> list[int]:
    for leaf in tree_leaves(args):
        group: Any = None
        if isinstance(leaf, dist.ProcessGroup):
            group = leaf
        elif isinstance(leaf, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):
                group = dist.ProcessGroup.unbox(leaf)
        elif isinstance(leaf, str):  # functional collectives name their group
            with contextlib.suppress(Exception):
                group = dist.distributed_c10d._resolve_process_group(leaf)  # type: ignore[arg-type]
        if group is not None:
            return sorted(dist.get_process_group_ranks(group))
    return list(range(dist.get_world_size()))


def storages(tensor: Tensor) -> list[Any]:
    """The storages behind a tensor; a wrapper (DTensor) has those of what it wraps."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        inner = (getattr(tensor, name) for name in names)
        return [storage for value in inner if isinstance(value, Tensor) for storage in storages(value)]
    return [tensor.untyped_storage()]


@contextlib.contextmanager
def _watch_resize(tell: Callable[[Any, int], None]) -> Iterator[None]:
    original = torch.UntypedStorage.resize_

    def resize(storage: Any, size: int) -> Any:
        found = original(storage, size)
        tell(storage, size)
        return found

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]


def categorise(snapshot: Snapshot, known: dict[str, set[int]]) -> dict[str, int]:
    """Bytes of a snapshot by category; `known` gives storages that are known by what they belong to."""
    found: Counter[str] = Counter()
    for key, block in snapshot.live.items():
        category = next((name for name, keys in known.items() if key in keys), None)
        found[category or ("gathered" if block.gathered else _BY_PHASE.get(block.phase, "temporaries"))] += block.bytes
    return {name: found[name] for name in CATEGORIES}
