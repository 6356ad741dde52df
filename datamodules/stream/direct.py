"""The hot path: from sample ids to a batch by positional reads of local files, without an object per frame in between.

For arrays whose chunks lie at a fixed stride: offsets of a whole batch come from arithmetic, and each run of chunks is read
by one `preadv` that scatters the values into the batch and the checksums beside it. Checksums are compared right after a
run was read, while it is in the processor's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import repeat

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from datamodules.format import Array
from datamodules.format.codecs import CHECKSUM_BYTES

from .buffers import Rows, Slab
from .files import File
from .windows import Located

RUN_BYTES = 1 << 20  # of one read: what still lies in the cache when its checksums are computed
RUN_CHUNKS = 500  # two pieces of memory each; the kernel takes 1024
Open = Callable[[int], File | None]  # file of a shard
Identity = tuple[int, ...]


class Direct:
    """Reads windows of ``entries`` entries of ``array``; thread-safe. For arrays with ``suits(array)``.

    ``always``: compare the checksum of every chunk that is read. Otherwise each chunk of a file is verified when this
    process reads it for the first time: later reads mostly come from the page cache, where nothing rots.
    """

    def __init__(self, array: Array, entries: int, always: bool = False) -> None:
        spec = array.spec
        self.array, self.entries, self.always = array, entries, always
        self.length, self.size = spec.chunk_length, spec.chunk_bytes
        self.payload = self.size - CHECKSUM_BYTES
        self.entry = self.payload // self.length
        self.shard_length = spec.shard_length
        self.row = spec.chunks[-1] if spec.window_axis else 1  # chunks of an entry of axis 0, or the unit of text
        self.in_shard = self.shard_length // self.length if not spec.window_axis else self.shard_length * self.row
        self.longest = max(1, min(RUN_BYTES // self.size, RUN_CHUNKS))
        self._verified: dict[int, tuple[Identity, bytearray]] = {}

    @staticmethod
    def suits(array: Array) -> bool:
        """Whether byte ranges of this array follow from arithmetic."""
        return array.contiguous and array.spec.fixed and array.window_axis <= 1

    def whole(self, at: Located) -> bool:
        """Whether these windows consist of whole chunks."""
        if self.length == 1:
            return True
        return not self.entries % self.length and not (at.start % self.length).any() and bool((at.step == 1).all())

    @property
    def chunks(self) -> int:
        """Chunks of a window that consists of whole ones."""
        return self.entries // self.length

    def read_whole(self, at: Located, place: Callable[[], Slab | Rows], file: Open) -> bool:
        """Fill ``place()``, asked for once all files are there, with windows of whole chunks; ``False`` if any byte is missing
        or wrong."""
        first, step, count = at.start // self.length, at.step, self.chunks
        if self.array.window_axis:
            first = first + at.lead * self.row  # chunks of the whole array, in the order of the files
        if (step == 1).all():
            last = first + (count - 1)
            if (first // self.in_shard == last // self.in_shard).all():
                runs = zip(range(0, len(first) * count, count), first.tolist(), repeat(count))
                return self._read_runs(runs, place, file)
        chunk = (first[:, None] + np.arange(count) * step[:, None]).reshape(-1)
        breaks = np.flatnonzero((np.diff(chunk) != 1) | (np.diff(chunk // self.in_shard) != 0)) + 1
        slots = np.concatenate([[0], breaks])
        counts = np.diff(np.append(slots, len(chunk)))
        return self._read_runs(zip(slots.tolist(), chunk[slots].tolist(), counts.tolist(), strict=True), place, file)

    def _read_runs(self, runs: Iterable[tuple[int, int, int]], place: Callable[[], Slab | Rows], file: Open) -> bool:
        """Read runs (slot of the slab, chunk, how many), none of which crosses a shard."""
        files: dict[int, tuple[File, bytearray]] = {}
        found = []
        for slot, chunk, count in runs:
            k, chunk = divmod(chunk, self.in_shard)
            if k not in files:
                opened = file(k)
                if opened is None:
                    return False
                files[k] = (opened, self._known(k, opened))
            found.append((slot, chunk, count, *files[k]))
        slab = place()
        parts, payloads, preadv, size, longest = slab.parts, slab.payloads, os.preadv, self.size, self.longest
        for slot, chunk, count, opened, known in found:
            descriptor = opened.descriptor
            while count > 0:
                some = min(count, longest)
                try:
                    if preadv(descriptor, parts[2 * slot : 2 * (slot + some)], chunk * size) != some * size:
                        return False
                except OSError:
                    return False
                if self.always or known.find(0, chunk, chunk + some) >= 0:
                    sums = [int.from_bytes(tail, "little") for tail in parts[2 * slot + 1 : 2 * (slot + some) : 2]]
                    if list(map(crc32c, payloads[slot : slot + some])) != sums:
                        return False
                    known[chunk : chunk + some] = bytes([1]) * some
                slot, chunk, count = slot + some, chunk + some, count - some
        return True

    def _known(self, k: int, held: File) -> bytearray:
        """Of each chunk of shard k, whether this file was found to hold what the checksum says."""
        known = self._verified.get(k)
        if known is None or known[0] != held.identity:
            count = self.array.spec.chunk_count
            known = self._verified[k] = (held.identity, bytearray(b"\1" * count if held.verified else count))
        return known[1]

    def read_parts(self, at: Located, out: NDArray[np.uint8], file: Open) -> bool:
        """Fill ``out``, uint8 [B, entries, bytes of an entry], with windows that begin or end inside chunks.

        A chunk that must be verified is read as a whole before; otherwise only the bytes that are wanted are read.
        """
        if (at.step != 1).any():
            return False
        begin = at.start + (at.lead * self.row * self.length if self.array.window_axis else 0)
        # Windows mostly lie within one chunk: where to read them is worked out for all of them at once.
        chunk = begin // self.length
        within = chunk == (begin + self.entries - 1) // self.length
        shard, number = np.divmod(chunk, self.in_shard)
        position = number * self.size + begin % self.length * self.entry
        wanted = self.entries * self.entry
        memory, end = out.reshape(-1).data, 0
        files: dict[int, tuple[File, bytearray]] = {}
        columns = (shard.tolist(), number.tolist(), position.tolist(), within.tolist(), begin.tolist())
        preadv, always = os.preadv, self.always
        for k, n, where, simple, start in zip(*columns, strict=True):
            place, end = memory[end : end + wanted], end + wanted
            held = files.get(k)
            if held is None:
                opened = file(k)
                if opened is None:
                    return False
                held = files[k] = (opened, self._known(k, opened))
            if not simple:
                if not self._read_across(start, place, files, file):
                    return False
                continue
            if (always or not held[1][n]) and not self._verify(held[1], held[0], n, n):
                return False
            try:
                if preadv(held[0].descriptor, (place,), where) != wanted:
                    return False
            except OSError:
                return False
        return True

    def _read_across(self, start: int, out: memoryview, files: dict[int, tuple[File, bytearray]], file: Open) -> bool:
        """One window that begins at entry ``start`` of the array and runs over the ends of chunks, perhaps of shards."""
        per_shard = self.in_shard * self.length  # entries of a shard, in order
        done = 0
        while done < self.entries:
            k, first = divmod(start + done, per_shard)
            count = min(self.entries - done, per_shard - first)
            if k not in files:
                opened = file(k)
                if opened is None:
                    return False
                files[k] = (opened, self._known(k, opened))
            held, known = files[k]
            if not self._verify(known, held, first // self.length, (first + count - 1) // self.length):
                return False
            if not self._read_run(held, first, count, out[done * self.entry : (done + count) * self.entry]):
                return False
            done += count
        return True

    def _read_run(self, held: File, first: int, count: int, out: memoryview) -> bool:
        """Entries [first, first + count) of a shard, past the checksums between chunks."""
        chunk, offset = divmod(first, self.length)
        position, done, total = chunk * self.size + offset * self.entry, 0, count * self.entry
        room, skipped = (self.length - offset) * self.entry, bytearray(CHECKSUM_BYTES)
        while done < total:
            parts: list[memoryview | bytearray] = []
            wanted = 0
            while done < total and len(parts) < 2 * RUN_CHUNKS:
                size = min(room, total - done)
                parts.append(out[done : done + size])
                done, wanted, room = done + size, wanted + size, self.payload
                if done < total:
                    parts.append(skipped)
                    wanted += CHECKSUM_BYTES
            try:
                if os.preadv(held.descriptor, parts, position) != wanted:
                    return False
            except OSError:
                return False
            position += wanted
        return True

    def _verify(self, known: bytearray, held: File, first: int, last: int) -> bool:
        """Whether chunks [first, last] of a shard hold what their checksums say."""
        for chunk in range(first, last + 1):
            if known[chunk] and not self.always:
                continue
            data = np.empty(self.size, np.uint8)
            try:
                if os.preadv(held.descriptor, [data.data], chunk * self.size) != self.size:
                    return False
            except OSError:
                return False
            if crc32c(data[: self.payload]) != int.from_bytes(data[self.payload :].tobytes(), "little"):
                return False
            known[chunk] = 1
        return True
