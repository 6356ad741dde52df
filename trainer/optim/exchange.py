"""Whole tensors out of shards and back, one tensor per rank: all-to-all, overlapped with the work on them.

For a group of n ranks the tensors are taken n at a time (a round). In one all-to-all each rank sends its part of the
j-th tensor to rank j, which so holds that tensor whole, works on it alone, and in a second all-to-all sends each rank
its part of the result. While a round is worked on, the parts of the next one are on their way and so are the results of
the one before. Each tensor is worked on once, whatever the number of replicas.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


@dataclass(frozen=True)
class _Item:
    """One tensor: `boxes[r]` is what rank r of the group holds; `senders` hold together all of it, once."""

    index: int
    shape: tuple[int, ...]
    boxes: list[Box]
    owner: int
    senders: frozenset[int]


@dataclass
class _Moving:
    """An all-to-all under way. The buffers live until it is done."""

    round: list[_Item]
    sent: Tensor
    received: Tensor
    sizes: list[int]
    work: Any


class Exchange:
    """The plan for a list of tensors; made once, the same on all ranks, and used in every step.

    Args:
        tensors: DTensors of any placements over meshes that span all ranks or have one dimension; plain ones are
            taken as replicas, the same on all ranks.
        dtype: that of the values that travel.

    Raises:
        ValueError: a mesh with several dimensions over a part of the ranks.
    """

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.dtype, self._alone = dtype, not dist.is_initialized() or dist.get_world_size() == 1
        self._count = len(tensors)
        self._plans: list[tuple[Any, list[list[_Item]]]] = []  # (group, rounds)
        if self._alone or not tensors:
            return
        groups: dict[Any, list[int]] = {}
        for index, tensor in enumerate(tensors):
            groups.setdefault(_group(tensor), []).append(index)
        for group, members in groups.items():
            self._plans.append((group, _rounds(tensors, members, group)))

    def run(
        self,
        part: Callable[[int], Tensor],
        work: Callable[[int, Tensor], Tensor],
        done: Callable[[int, Tensor], None],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """One pass over all tensors. All ranks call it.

        Args:
            part: index -> this rank's local part of what is to be made whole; called once each, on every rank.
            work: (index, whole) -> a result of the same shape; called on one rank per tensor.
            done: (index, local part of the result); called on every rank, also with empty parts.
            meanwhile: other work of this step, done while the first parts travel.
        """
        if self._alone:
            meanwhile()
            for index in range(self._count):
                done(index, work(index, part(index).to(self.dtype)).to(self.dtype))
            return
        for group, rounds in self._plans:
            ahead: _Moving | None = self._gather(group, rounds[0], part)
            meanwhile()
            meanwhile = _nothing
            back: _Moving | None = None
            for position in range(len(rounds)):
                assert ahead is not None
                here, device, whole = ahead.round, ahead.received.device, _whole(ahead, dist.get_rank(group))
                ahead = self._gather(group, rounds[position + 1], part) if position + 1 < len(rounds) else None
                result = None if whole is None else work(here[dist.get_rank(group)].index, whole).to(self.dtype)
                if back is not None:
                    _deliver(back, dist.get_rank(group), done)
                back = self._scatter(group, here, result, device)
            if back is not None:
                _deliver(back, dist.get_rank(group), done)

    def _gather(self, group: Any, items: list[_Item], part: Callable[[int], Tensor]) -> _Moving:
        me, world = dist.get_rank(group), dist.get_world_size(group)
        parts = [part(item.index).to(self.dtype).reshape(-1) for item in items]
        mine = [piece if me in item.senders else piece[:0] for piece, item in zip(parts, items, strict=True)]
        send = [piece.numel() for piece in mine] + [0] * (world - len(items))
        own = items[me] if me < len(items) else None
        receive = [_numel(own.boxes[rank]) if own is not None and rank in own.senders else 0 for rank in range(world)]
        return self._move(group, items, torch.cat(mine), send, receive)

    def _scatter(self, group: Any, items: list[_Item], result: Tensor | None, device: torch.device) -> _Moving:
        me, world = dist.get_rank(group), dist.get_world_size(group)
        send = [0] * world
        if result is not None:
            boxes = items[me].boxes
            send = [_numel(box) for box in boxes]
            sent = torch.cat([_cut(result, box).reshape(-1) for box in boxes])
        else:
            sent = torch.empty(0, dtype=self.dtype, device=device)
        receive = [_numel(item.boxes[me]) for item in items] + [0] * (world - len(items))
        return self._move(group, items, sent, send, receive)

    def _move(self, group: Any, items: list[_Item], sent: Tensor, send: list[int], receive: list[int]) -> _Moving:
        received = torch.empty(sum(receive), dtype=self.dtype, device=sent.device)
        width = self.dtype.itemsize  # as bytes: gloo does not know every dtype
        work = dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [size * width for size in receive],
            [size * width for size in send],
            group=group,
            async_op=True,
        )
        return _Moving(items, sent, received, receive, work)


def _whole(moving: _Moving, me: int) -> Tensor | None:
    """This rank's tensor of the round, put together; None if it has none."""
    moving.work.wait()
    if me >= len(moving.round):
        return None
    item = moving.round[me]
    whole = torch.empty(item.shape, dtype=moving.received.dtype, device=moving.received.device)
    for rank, piece in enumerate(moving.received.split(moving.sizes)):
        if piece.numel():
            box = item.boxes[rank]
            _cut(whole, box).copy_(piece.view(box[1]))
    return whole


def _deliver(moving: _Moving, me: int, done: Callable[[int, Tensor], None]) -> None:
    moving.work.wait()
    parts = moving.received.split(moving.sizes)
    for item, piece in zip(moving.round, parts, strict=False):
        done(item.index, piece.view(item.boxes[me][1]))


def _rounds(tensors: Sequence[Tensor], members: list[int], group: Any) -> list[list[_Item]]:
    """The tensors of one group in rounds of similar size, so that no rank waits long for another."""
    world = dist.get_world_size(group)
    shapes = [tuple(tensors[index].shape) for index in members]
    order = sorted(range(len(members)), key=lambda i: (-_cost(shapes[i]), i))
    rounds = []
    for begin in range(0, len(order), world):
        items = []
        for owner, position in enumerate(order[begin : begin + world]):
            boxes = _boxes(tensors[members[position]], group)
            items.append(_Item(members[position], shapes[position], boxes, owner, _senders(boxes, owner)))
        rounds.append(items)
    return rounds


def _senders(boxes: list[Box], owner: int) -> frozenset[int]:
    """One holder of each distinct box; the owner itself where it holds it."""
    first: dict[Box, int] = {boxes[owner]: owner}
    for rank, box in enumerate(boxes):
        first.setdefault(box, rank)
    return frozenset(rank for box, rank in first.items() if _numel(box))


def _group(tensor: Tensor) -> Any:
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    mesh = tensor.device_mesh
    if mesh.ndim > 1:
        raise ValueError(f"a tensor lies on the mesh {mesh}, which is neither all ranks nor one dimension of them")
    return mesh.get_group()


def _boxes(tensor: Tensor, group: Any) -> list[Box]:
    """What each rank of the group holds, worked out without asking them."""
    ranks = dist.get_process_group_ranks(group)
    if not isinstance(tensor, DTensor):
        return [((0,) * tensor.ndim, tuple(tensor.shape))] * len(ranks)
    mesh = tensor.device_mesh
    places = itertools.product(*(range(extent) for extent in mesh.shape))
    where = dict(zip(mesh.mesh.flatten().tolist(), places, strict=True))
    found = []
    for rank in ranks:
        sizes, offsets = _compute_local_shape_and_global_offset(
            tensor.shape, mesh.shape, list(where[rank]), tensor.placements
        )
        found.append((tuple(offsets), tuple(sizes)))
    return found


def _cut(whole: Tensor, box: Box) -> Tensor:
    for dim, (start, length) in enumerate(zip(*box, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), length)
    return whole


def _numel(box: Box) -> int:
    return math.prod(box[1])


def _cost(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * min(shape)


def _nothing() -> None:
    pass
