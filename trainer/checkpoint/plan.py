"""Who writes what: each distinct piece of each tensor once, evenly over the ranks that hold it, cut into files.

A piece is a box of a tensor. Pieces larger than a file are cut along their leading dimensions, so an object is never
larger than `part_bytes`. The plan depends on names, dtypes, shapes and placements
only; it is made once and kept for as long as these stay.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

_ALIGN = 64  # bytes; a chunk can be viewed as its dtype where it lies


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: `offsets` and `sizes` in elements of the whole tensor of `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        count = getattr(torch, self.dtype).itemsize
        for size in self.sizes:
            count *= size
        return count


@dataclass(frozen=True)
class Placed:
    """A piece, the byte at which it begins in its file, and the box of the holder's memory that it was cut from."""

    piece: Piece
    start: int
    box: Piece

    @property
    def local(self) -> tuple[int, ...]:
        """Where it begins in that box, in elements."""
        return tuple(a - b for a, b in zip(self.piece.offsets, self.box.offsets, strict=True))


@dataclass
class FilePlan:
    """One object of one rank: `size` bytes, beginning at `begin` of the rank's bytes."""

    path: str
    begin: int
    size: int = 0
    chunks: list[Placed] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What this rank writes, and the names, dtypes and shapes of all tensors of all ranks (for the manifest)."""

    files: list[FilePlan]
    tensors: dict[str, tuple[str, tuple[int, ...]]]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


def signature(tensors: Mapping[str, torch.Tensor]) -> list[Any]:
    """All that a plan depends on, cheap to take and to compare."""
    return [(name, tensor.dtype, tensor.shape, _placement(tensor)) for name, tensor in tensors.items()]


def _placement(tensor: torch.Tensor) -> Any:
    if isinstance(tensor, DTensor):
        return tensor.placements
    return _boxes(tensor) if hasattr(tensor, "__create_chunk_list__") else None


def make_plan(tensors: Mapping[str, torch.Tensor], part_bytes: int, group: Any = None) -> Plan:
    """The plan of this rank. Collective over `group` (None where there is only one process)."""
    mine = local_pieces(tensors)
    catalogue = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
    everyone: list[Any] = [(mine, catalogue)]
    if group is not None:
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (mine, catalogue), group=group)
    me = 0 if group is None else dist.get_rank(group)
    owners = assign([pieces for pieces, _ in everyone])
    whole = {name: entry for _, names in everyone for name, entry in names.items()}
    return Plan(cut([piece for piece in mine if owners[piece] == me], me, part_bytes), whole)


def local_pieces(tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
    """The boxes of which this rank holds the content."""
    found = []
    for name, tensor in tensors.items():
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
            continue  # this rank is no part of the tensor's mesh
        boxes = _boxes(tensor) if hasattr(tensor, "__create_chunk_list__") else [((0,) * len(shape), shape)]
        found += [Piece(name, dtype, shape, offsets, sizes) for offsets, sizes in boxes]
    return found


def _boxes(tensor: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of what a rank holds of a sharded tensor, as it tells `torch.distributed.checkpoint`."""
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.__create_chunk_list__()]


def held(tensor: Any, box: Piece) -> torch.Tensor:
    """The content of one of the boxes of a tensor, live."""
    if not hasattr(tensor, "__create_chunk_list__"):
        return tensor.detach()
    return tensor.__get_tensor_shard__(MetadataIndex(box.name, torch.Size(box.offsets))).detach()


def assign(everyone: list[list[Piece]]) -> dict[Piece, int]:
    """Piece -> the rank that writes it: its holder with the fewest bytes so far. The same on all ranks."""
    holders: dict[Piece, list[int]] = {}
    for rank, pieces in enumerate(everyone):
        for piece in pieces:
            holders.setdefault(piece, []).append(rank)
    load = [0] * len(everyone)
    owners = {}
    for piece, ranks in sorted(holders.items(), key=lambda item: len(item[1])):  # those without a choice first
        owner = min(ranks, key=lambda rank: load[rank])
        load[owner] += piece.bytes
        owners[piece] = owner
    return owners


def cut(pieces: Iterable[Piece], rank: int, part_bytes: int) -> list[FilePlan]:
    """The files of a rank; a new one begins where the next chunk would make it larger than `part_bytes`."""
    files: list[FilePlan] = []
    for box in pieces:
        for piece in _split(box, part_bytes):
            size = piece.bytes
            if not size:
                continue
            start = _aligned(files[-1].size) if files else 0
            if not files or start + size > part_bytes:
                begin = files[-1].begin + start if files else 0
                files.append(FilePlan(f"rank-{rank:05d}-{len(files):03d}.bin", begin))
                start = 0
            files[-1].chunks.append(Placed(piece, start, box))
            files[-1].size = start + size
    return files


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _split(piece: Piece, limit: int) -> Iterator[Piece]:
    """Boxes of at most `limit` bytes that make up `piece`."""
    size = piece.bytes
    dim = next((dim for dim, extent in enumerate(piece.sizes) if extent > 1), None)
    if size <= limit or dim is None:
        yield piece
        return
    extent = piece.sizes[dim]
    rows = max(1, limit * extent // size)
    for row in range(0, extent, rows):
        sizes = (*piece.sizes[:dim], min(rows, extent - row), *piece.sizes[dim + 1 :])
        offsets = (*piece.offsets[:dim], piece.offsets[dim] + row, *piece.offsets[dim + 1 :])
        yield from _split(Piece(piece.name, piece.dtype, piece.shape, offsets, sizes), limit)
