"""Tensors of which this rank holds stretches of the flattened elements: how ZeRO and its like cut a model."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements `start` to `stop` of a flattened tensor as boxes of the tensor: at most 2 n - 1 for n axes, in order."""
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        return _in_row(shape, last, start - last * row, stop - last * row)
    head = _in_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    body = [((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))] if first < last else []
    return head + body + _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in boxes(shape[1:], start, stop)]


class Pieces(torch.Tensor):
    """The boxes that this rank holds of a tensor of `shape`; a name and a shape for checkpoints, not for arithmetic.

    Saved and loaded like any sharded tensor (it follows the protocol by which `torch.distributed.checkpoint` asks a
    tensor for its chunks), so what was cut in this way is read into any other layout, and the reverse.
    """

    pieces: list[tuple[tuple[int, ...], torch.Tensor]]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[tuple[tuple[int, ...], torch.Tensor]]
    ) -> "Pieces":
        # Where its pieces lie, so that a copy of them to the host goes into pinned memory and is waited for.
        device = pieces[0][1].device if pieces else torch.device("cpu")
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        self.pieces = list(pieces)
        return self

    @classmethod
    def cut(cls, shape: Sequence[int], start: int, flat: torch.Tensor) -> "Pieces":
        """`flat` [k] holds the elements `start` ... `start + k` of the flattened tensor; the pieces are views of it."""
        pieces, position = [], 0
        for offsets, sizes in boxes(shape, start, start + flat.numel()):
            size = math.prod(sizes)
            pieces.append((offsets, flat.narrow(0, position, size).view(sizes)))
            position += size
        return cls(shape, flat.dtype, pieces)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func}: this tensor is cut into pieces for a checkpoint; use its `pieces`")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pieces({list(self.shape)}, {self.dtype}, {[(o, list(p.shape)) for o, p in self.pieces]})"

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(chunk.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), piece.shape) for offsets, piece in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        wanted = tuple(index.offset or ())
        return next(piece for offsets, piece in self.pieces if tuple(offsets) == wanted)
