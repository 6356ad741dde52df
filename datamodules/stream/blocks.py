"""Byte ranges of objects: those that lie close together are read in one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from datamodules.format import Piece
from datamodules.store import Sink

from .files import Scratch

REMOTE_GAP = 256 << 10  # bytes that cost less to read and drop than a second request does
WASTE = 8  # but at most one byte in so many is read to be dropped
MAX_BLOCK = 16 << 20  # bytes of one coalesced request
ARRIVED = Scratch(16 << 20)  # for bytes from the store, of all readers


class Block(NamedTuple):
    """One byte range ``[start, stop)`` of an object, and the pieces of it with the rows of the batch they go to."""

    path: str
    start: int
    stop: int
    members: list[tuple[Piece, int]]


def coalesce(pieces: Sequence[tuple[Piece, int]], gap: int) -> list[Block]:
    """Ranges that cover all (piece, row), merging those of one object that are at most ``gap`` bytes apart.

    Blocks grow to ``MAX_BLOCK`` bytes at most, unless a single piece is larger or pieces overlap, and gaps make up at most
    an eighth of a block.
    """
    blocks: list[Block] = []
    dropped = 0  # bytes of the last block that nobody wants
    for piece, row in sorted(pieces, key=lambda p: (p[0].path, p[0].start, p[0].stop)):
        last = blocks[-1] if blocks else None
        if last is not None and last.path == piece.path and piece.start <= last.stop + gap:
            stop = max(last.stop, piece.stop)
            unused = dropped + max(0, piece.start - last.stop)
            small = stop - last.start <= MAX_BLOCK and unused * WASTE <= stop - last.start
            if piece.start < last.stop or small:
                last.members.append((piece, row))
                blocks[-1], dropped = last._replace(stop=stop), unused
                continue
        blocks.append(Block(piece.path, piece.start, piece.stop, [(piece, row)]))
        dropped = 0
    return blocks


def places(blocks: Sequence[Block], scratch: Scratch) -> list[memoryview]:
    """Memory for the bytes of each block, valid until the thread's next use of ``scratch``."""
    memory, end = scratch.view(sum(block.stop - block.start for block in blocks)), 0
    found = []
    for block in blocks:
        begin, end = end, end + block.stop - block.start
        found.append(memory[begin:end])
    return found


def into(memory: memoryview) -> Sink:
    """Puts what comes there."""

    def take(offset: int, piece: memoryview) -> None:
        memory[offset : offset + len(piece)] = piece

    return take
