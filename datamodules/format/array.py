"""Reading one array: from a window to byte ranges, from bytes to values, every checksum verified."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from datamodules.store import Changed, NotFound, ShortRead, Store, Tags

from .codecs import BadChunk
from .dtypes import BFLOAT16, from_bfloat16
from .errors import DataError
from .grid import Box, cells
from .layout import ABSENT, CHECKSUM_BYTES, ArraySpec
from .shard import bad_chunk, decode_chunk, decode_index

INDEX_CACHE_BYTES = 256 * 2**20  # of shard indices held per array; 16 bytes a chunk
INDEX_THREADS = 16
Held = Callable[[str, int, int], "memoryview | None"]


class Piece(NamedTuple):
    """A run of inner chunks that lie back to back in one object, and where their values go in a window.

    path: the object, relative to the data set. start, stop: its byte range; equal for absent chunks (no request).
    chunks: how many. skip: leading entries of the first chunk that are not wanted. entries: how many are wanted.
    offset: where they begin in the window.
    lengths: stored bytes of each chunk, where they differ (compressed). boxes: for an array that another writer cut, the
    wanted part of the one chunk and its place in the window.
    """

    path: str
    start: int
    stop: int
    chunks: int
    skip: int
    entries: int
    offset: int
    lengths: tuple[int, ...] = ()
    boxes: tuple[Box, Box] | None = None


class Array:
    """An array of a data set. Thread-safe.

    `contiguous` promises the layout that Keel writes without compression (chunks of one size in C order, back to back),
    so that byte ranges follow from arithmetic; otherwise each shard's index is read once and checked. `sizes`: bytes of
    the shards by path, where a manifest tells them.
    """

    def __init__(
        self, store: Store, name: str, spec: ArraySpec, contiguous: bool, sizes: Mapping[str, int] | None = None
    ) -> None:
        self.store, self.name, self.spec, self.contiguous = store, name, spec, contiguous and spec.fixed
        self.shape, self.dimensions, self.attributes = spec.shape, spec.dimensions, spec.attributes
        self.dtype: np.dtype[Any] = spec.value_dtype
        self.window_axis, self.frame_shape = spec.window_axis, spec.frame_shape
        self.shard_length, self.shards = spec.shard_length, spec.shards
        self._indices: dict[str, np.ndarray] = {}
        self.tags: Tags = {}  # of all shards read so far, as their indices and chunks must be those of one object
        self._sizes = sizes
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

    def shard_path(self, k: int, *others: int) -> str:
        """Object of shard k (and its place on the other axes), relative to the data set."""
        key = self.spec.shard_key(k, *others)
        return f"{self.name}/{key}" if self.name else key

    def damaged(self, path: str, why: str) -> DataError:
        """The error for a damaged object."""
        return DataError(f"{self.store.join(path)}: {why}; delete this object and run `keel data make` again")

    # From a window to byte ranges

    def plan(self, index: tuple[int, ...], start: int, stop: int) -> list[Piece]:
        """Byte ranges that hold entries [start, stop) of the window axis at `index` on the axes before it.

        Fields: `plan((trajectory,), a, b)`; text: `plan((), a, b)`. Pieces cover whole chunks, as checksums do.
        Without `contiguous` the first plan in a shard reads its index; see `prepare`.
        """
        spec, axis = self.spec, self.window_axis
        if len(index) != axis or any(not 0 <= i < n for i, n in zip(index, self.shape, strict=False)):
            raise IndexError(f"{self.name}{list(index)}: out of range for axes {self.shape[:axis]}")
        if not 0 <= start < stop <= self.shape[axis]:
            raise IndexError(f"{self.name}: window [{start}, {stop}) is not within [0, {self.shape[axis]})")
        if spec.foreign is not None:
            return self._grid(index, start, stop)
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
        pieces: list[Piece] = []
        for j, (begin, stored) in enumerate(self._index(path)[first + c0 : first + c1].tolist()):
            lo, hi = max(a, (c0 + j) * length), min(b, (c0 + j + 1) * length)
            absent = begin == ABSENT
            at, end = (0, 0) if absent else (begin, begin + stored)
            lengths = () if self.spec.fixed or absent else (stored,)
            last = pieces[-1] if pieces else None
            if last and ((absent and last.start == last.stop) or (not absent and last.stop == at > last.start)):
                joined = (*last.lengths, *lengths)
                more = last.entries + hi - lo
                pieces[-1] = last._replace(stop=end, chunks=last.chunks + 1, entries=more, lengths=joined)
            else:
                pieces.append(Piece(path, at, end, 1, lo - (c0 + j) * length, hi - lo, offset + lo - a, lengths))
        return pieces

    def _grid(self, index: tuple[int, ...], start: int, stop: int) -> list[Piece]:
        """One piece for each chunk of an array that another writer cut."""
        pieces = []
        for cell in cells(self.spec, index, start, stop):
            path = self.shard_path(*cell.shard)
            begin, stored = self._index(path)[cell.number].tolist()
            at, end = (0, 0) if begin == ABSENT else (begin, begin + stored)
            rows = cell.target[0]
            boxes = (cell.source, cell.target)
            skip = cell.source[self.window_axis].start
            pieces.append(Piece(path, at, end, 1, skip, rows.stop - rows.start, rows.start, (stored,), boxes))
        return pieces

    # Shard indices

    def prepare(self, shards: Iterable[int], held: Held | None = None) -> int:
        """Read the indices of these shards concurrently, so that `plan` need not wait for them one by one.

        `held(path, start, stop)` gives these bytes of an object, or None if only the store has them. Returns the bytes that
        came from the store.
        """
        if self.contiguous or self.spec.foreign is not None:
            return 0
        with self._lock:
            paths = [path for path in {self.shard_path(k) for k in shards} if path not in self._indices]
        if held is not None:
            paths = [path for path in paths if not self._take_index(path, held)]
        if len(paths) > 1:
            with ThreadPoolExecutor(min(INDEX_THREADS, len(paths))) as pool:
                list(pool.map(self._index, paths))
        elif paths:
            self._index(paths[0])
        return len(paths) * self.spec.index_bytes

    def _take_index(self, path: str, held: Held) -> bool:
        """Keep the index of an object of which there are intact bytes elsewhere than in the store."""
        at, size = self._index_place(path)
        data = held(path, at, at + self.spec.index_bytes)
        try:
            found = None if data is None else decode_index(self.spec, bytes(data), self.store.join(path), size)
        except DataError:  # a rotten copy
            found = None
        if found is not None:
            self._keep_index(path, found)
        return found is not None

    def _index(self, path: str) -> np.ndarray:
        """Index of the shard in this object, read once; a shard that was never written is all absent."""
        with self._lock:
            found = self._indices.get(path)
        if found is None:
            found = self._read_index(path)
            self._keep_index(path, found)
        return found

    def _keep_index(self, path: str, found: np.ndarray) -> None:
        with self._lock:
            while len(self._indices) * found.nbytes >= max(INDEX_CACHE_BYTES, found.nbytes):
                self._indices.pop(next(iter(self._indices)))
            self._indices[path] = found

    def _index_place(self, path: str) -> tuple[int, int]:
        """Where the index of a shard begins in its object, and the size of that; NotFound if there is none."""
        spec = self.spec
        try:
            size = self._sizes[path] if self._sizes is not None else self.store.size(path)
        except KeyError:
            raise self.damaged(path, "not in the manifest") from None
        if size < spec.index_bytes:
            raise self.damaged(path, f"truncated, {size} bytes are less than the shard's index")
        first = spec.foreign is not None and spec.foreign.index_first
        return (0 if first else size - spec.index_bytes), size

    def _read_index(self, path: str) -> np.ndarray:
        spec = self.spec
        try:
            at, size = self._index_place(path)
        except NotFound:
            return np.full((spec.chunk_count, 2), ABSENT, np.uint64)
        try:
            (data,) = self.store.read_ranges([(path, at, at + spec.index_bytes)], tags=self.tags)
        except Changed as error:
            raise DataError(str(error)) from error
        except (ShortRead, NotFound) as error:
            raise self.damaged(path, "truncated" if isinstance(error, ShortRead) else "missing") from error
        return decode_index(spec, data, self.store.join(path), size)

    # From bytes to values

    def decode(self, piece: Piece, data: bytes | memoryview, out: np.ndarray) -> None:
        """Check the bytes of a piece and copy its values into `out[piece.offset : piece.offset + piece.entries]`.

        `out` has shape [stop - start, *frame_shape]; its dtype may differ (values are cast). It can be the `numpy()` view
        of a pinned tensor. bfloat16 becomes float32, but goes as it is into uint16: `tensor.view(torch.uint16).numpy()`.
        DataError, naming object and chunk, if a checksum is wrong.
        """
        target = out[piece.offset : piece.offset + piece.entries]
        if piece.start == piece.stop:
            where = target if piece.boxes is None else out[piece.boxes[1]]
            where[...] = self.spec.fill
            return
        if len(data) != piece.stop - piece.start:
            raise self.damaged(
                piece.path, f"truncated, {len(data)} bytes of {piece.stop - piece.start} at {piece.start}"
            )
        if piece.lengths:
            self._decode_each(piece, memoryview(data), out)
            return
        size = self.spec.chunk_bytes
        wrong = bad_chunk(self.spec, data)
        if wrong is not None:
            raise self.damaged(piece.path, f"corrupt chunk at byte {piece.start + wrong * size} (crc32c)")
        chunks = np.frombuffer(data, np.uint8).reshape(piece.chunks, size)[:, : size - CHECKSUM_BYTES]
        whole = not piece.skip and piece.entries == piece.chunks * self.spec.chunk_length
        if whole and target.dtype == self.spec.numpy_dtype and target.flags.c_contiguous:
            target.reshape(piece.chunks, -1).view(np.uint8)[...] = chunks
            return
        stored = np.ascontiguousarray(chunks).reshape(-1).view(self.spec.numpy_dtype).reshape(-1, *self.frame_shape)
        target[...] = self._values(stored[piece.skip : piece.skip + piece.entries], out)

    def _decode_each(self, piece: Piece, data: memoryview, out: np.ndarray) -> None:
        """Chunks one by one: compressed ones, and those of other writers."""
        at, row, skip, left = 0, piece.offset, piece.skip, piece.entries
        for length in piece.lengths:
            try:
                chunk = decode_chunk(self.spec, data[at : at + length])
            except BadChunk as error:
                raise self.damaged(piece.path, f"corrupt chunk at byte {piece.start + at} ({error})") from error
            at += length
            if piece.boxes is not None:
                source, target = piece.boxes
                place = out[target]
                place[...] = self._values(chunk[source].reshape(place.shape), out)
                return
            entries = min(self.spec.chunk_length - skip, left)
            wanted = chunk.reshape(-1, *self.frame_shape)[skip : skip + entries]
            out[row : row + entries] = self._values(wanted, out)
            row, skip, left = row + entries, 0, left - entries

    def _values(self, stored: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Stored elements as those that go into `out`."""
        return from_bfloat16(stored) if self.spec.dtype == BFLOAT16 and out.dtype != np.uint16 else stored

    def read(self, index: tuple[int, ...], start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Entries [start, stop) of the window axis, [stop - start, *frame_shape]; every checksum is verified."""
        pieces = self.plan(index, start, stop)
        try:
            blocks = self.store.read_ranges([(p.path, p.start, p.stop) for p in pieces], tags=self.tags)
        except Changed as error:
            raise DataError(str(error)) from error
        except (ShortRead, NotFound) as error:
            why = "truncated" if isinstance(error, ShortRead) else "missing"
            names = {p.path for p in pieces}
            raise self.damaged(next(iter(names)), why) if len(names) == 1 else DataError(str(error)) from error
        if out is None:
            out = np.empty((stop - start, *self.frame_shape), self.dtype)
        for piece, block in zip(pieces, blocks, strict=True):
            self.decode(piece, block, out)
        return out
