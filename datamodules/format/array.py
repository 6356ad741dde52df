"""Reading one array: from a window to byte ranges, from bytes to values, every checksum verified."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from datamodules.store import NotFound, ShortRead, Store

from .errors import DataError
from .layout import ABSENT, CHECKSUM_BYTES, ArraySpec
from .shard import bad_chunk, decode_index


class Piece(NamedTuple):
    """A run of inner chunks that lie back to back in one object, and where their values go in a window.

    path: the object, relative to the data set. start, stop: its byte range; equal for absent chunks (no request).
    chunks: how many. skip: leading entries of the first chunk that are not wanted. entries: how many are wanted.
    offset: where they begin in the window.
    """

    path: str
    start: int
    stop: int
    chunks: int
    skip: int
    entries: int
    offset: int


class Array:
    """An array of a data set. Thread-safe.

    `contiguous` promises the layout that Keel writes (chunks in C order, back to back), so that byte ranges follow from
    arithmetic; otherwise each shard's index is read once and checked.
    """

    def __init__(self, store: Store, name: str, spec: ArraySpec, contiguous: bool) -> None:
        self.store, self.name, self.spec, self.contiguous = store, name, spec, contiguous
        self.shape, self.dimensions, self.attributes = spec.shape, spec.dimensions, spec.attributes
        self.dtype: np.dtype[Any] = spec.numpy_dtype
        self.window_axis, self.frame_shape = spec.window_axis, spec.frame_shape
        self.shard_length, self.shards = spec.shard_length, spec.shards
        self._indices: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, store: Store, name: str) -> Array:
        """An array by its own `zarr.json`, with or without a manifest: also one that zarr-python wrote."""
        path = f"{name}/zarr.json" if name else "zarr.json"
        return cls(store, name, ArraySpec.from_json(store.read_json(path), store.join(path)), contiguous=False)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def shard_path(self, k: int) -> str:
        """Object of shard k, relative to the data set."""
        return f"{self.name}/{self.spec.shard_key(k)}" if self.name else self.spec.shard_key(k)

    def damaged(self, path: str, why: str) -> DataError:
        """The error for a damaged object."""
        return DataError(f"{self.store.join(path)}: {why}; delete this object and run `keel data make` again")

    def plan(self, index: tuple[int, ...], start: int, stop: int) -> list[Piece]:
        """Byte ranges that hold entries [start, stop) of the window axis at `index` on the axes before it.

        Fields: `plan((trajectory,), a, b)`; text: `plan((), a, b)`. Pieces cover whole chunks, as checksums do.
        """
        spec, axis = self.spec, self.window_axis
        if len(index) != axis or any(not 0 <= i < n for i, n in zip(index, self.shape, strict=False)):
            raise IndexError(f"{self.name}{list(index)}: out of range for axes {self.shape[:axis]}")
        if not 0 <= start < stop <= self.shape[axis]:
            raise IndexError(f"{self.name}: window [{start}, {stop}) is not within [0, {self.shape[axis]})")
        if axis == 0:
            pieces = []
            for k in range(start // spec.shard_length, (stop - 1) // spec.shard_length + 1):
                base = k * spec.shard_length
                a, b = max(start, base), min(stop, base + spec.shard_length)
                pieces += self._run(k, 0, a - base, b - base, a - start)
            return pieces
        k, row = divmod(index[0], spec.shard_length)
        for i, extent in zip(index[1:], spec.chunks[1:-1], strict=True):
            row = row * extent + i
        return self._run(k, row * spec.chunks[-1], start, stop, 0)

    def _run(self, k: int, first: int, a: int, b: int, offset: int) -> list[Piece]:
        """Entries [a, b) of the row of chunks that begins with chunk number `first` of shard k."""
        length, size, path = self.spec.chunk_length, self.spec.chunk_bytes, self.shard_path(k)
        c0, c1 = a // length, (b - 1) // length + 1
        if self.contiguous:
            return [Piece(path, (first + c0) * size, (first + c1) * size, c1 - c0, a - c0 * length, b - a, offset)]
        starts = self._index(k)[first + c0 : first + c1, 0]
        pieces: list[Piece] = []
        for j, begin in enumerate(starts):
            lo, hi = max(a, (c0 + j) * length), min(b, (c0 + j + 1) * length)
            absent = int(begin) == ABSENT
            at, end = (0, 0) if absent else (int(begin), int(begin) + size)
            last = pieces[-1] if pieces else None
            if last and ((absent and last.start == last.stop) or (not absent and last.stop == at > last.start)):
                pieces[-1] = last._replace(stop=end, chunks=last.chunks + 1, entries=last.entries + hi - lo)
            else:
                pieces.append(Piece(path, at, end, 1, lo - (c0 + j) * length, hi - lo, offset + lo - a))
        return pieces

    def _index(self, k: int) -> np.ndarray:
        """Index of shard k, read once; a shard that was never written is all absent."""
        with self._lock:
            found = self._indices.get(k)
        if found is None:
            path, spec = self.shard_path(k), self.spec
            try:
                size = self.store.size(path)
            except NotFound:
                found = np.full((spec.chunk_count, 2), ABSENT, np.uint64)
            else:
                if size < spec.index_bytes:
                    raise self.damaged(path, f"truncated, {size} bytes are less than the shard's index")
                data = self.store.read_range(path, size - spec.index_bytes, size)
                found = decode_index(spec, data, self.store.join(path))
            with self._lock:
                self._indices[k] = found
        return found

    def decode(self, piece: Piece, data: bytes | memoryview, out: np.ndarray) -> None:
        """Check the bytes of a piece and copy its values into `out[piece.offset : piece.offset + piece.entries]`.

        `out` has shape [stop - start, *frame_shape]; its dtype may differ (values are cast). It can be the `numpy()` view
        of a pinned tensor. DataError, naming object and chunk, if a checksum is wrong.
        """
        target = out[piece.offset : piece.offset + piece.entries]
        if piece.start == piece.stop:
            target[...] = 0
            return
        size = self.spec.chunk_bytes
        if len(data) != piece.stop - piece.start:
            raise self.damaged(
                piece.path, f"truncated, {len(data)} bytes of {piece.stop - piece.start} at {piece.start}"
            )
        wrong = bad_chunk(self.spec, data)
        if wrong is not None:
            at = piece.start + wrong * size
            raise self.damaged(piece.path, f"corrupt chunk at byte {at} (crc32c)")
        chunks = np.frombuffer(data, np.uint8).reshape(piece.chunks, size)[:, : size - CHECKSUM_BYTES]
        whole = not piece.skip and piece.entries == piece.chunks * self.spec.chunk_length
        if whole and target.dtype == self.dtype and target.flags.c_contiguous:
            target.reshape(piece.chunks, -1).view(np.uint8)[...] = chunks
            return
        values = np.ascontiguousarray(chunks).reshape(-1).view(self.dtype).reshape(-1, *self.frame_shape)
        target[...] = values[piece.skip : piece.skip + piece.entries]

    def read(self, index: tuple[int, ...], start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Entries [start, stop) of the window axis, [stop - start, *frame_shape]; every checksum is verified."""
        pieces = self.plan(index, start, stop)
        try:
            blocks = self.store.read_ranges([(p.path, p.start, p.stop) for p in pieces])
        except (ShortRead, NotFound) as error:
            why = "truncated" if isinstance(error, ShortRead) else "missing"
            names = {p.path for p in pieces}
            raise self.damaged(next(iter(names)), why) if len(names) == 1 else DataError(str(error)) from error
        if out is None:
            out = np.empty((stop - start, *self.frame_shape), self.dtype)
        for piece, block in zip(pieces, blocks, strict=True):
            self.decode(piece, block, out)
        return out
