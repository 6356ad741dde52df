"""From sample ids to a batch: plan the byte ranges, read them together, verify and decode them into one tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.format import DataError, Dataset, Piece
from datamodules.store import Changed, NoBucket, NotFound, ShortRead, Sink

from .blocks import ARRIVED, REMOTE_GAP, Block, coalesce, into, places
from .buffers import Pool, Rows, Slab
from .cache import ShardCache, never
from .direct import Direct
from .files import File, Files, Scratch
from .metrics import Metrics
from .ranges import RangeCache
from .watch import Watch
from .windows import Ids, Located, Windows


class Target(NamedTuple):
    """Where a batch goes: the tensor [B, *shape], and the slab that it views, if any."""

    data: Tensor
    slab: Slab | None


class Reader:
    """Reads batches of ``windows`` of ``dataset``; safe to use from several threads; a copy by pickle is independent.

    Local data sets, and remote ones with a ``cache``, are read as files; remote ones without, by ranges, which a
    ``RangeCache`` keeps. ``always``: verify checksums at every read of a file, not only at the first of this process, and
    those of whole local shards once.

    ``batch`` raises ``DataError`` for bytes that do not match their checksum (after reading them once more, unless the
    data set is local), for missing or truncated objects and for a data set that changed meanwhile, and ``StoreError``
    where the store fails.
    """

    def __init__(
        self, dataset: Dataset, windows: Windows, cache: ShardCache | None, metrics: Metrics, always: bool = False
    ) -> None:
        self.dataset, self.windows, self.metrics, self.always = dataset, windows, metrics, always
        local, spec = dataset.store.is_local, windows.array.spec
        by_range = isinstance(cache, RangeCache)
        self.cache = None if local or by_range else cache
        keeps = not local and "crc32c" in spec.stages and not (spec.fixed and not RangeCache.suits(spec.payload_bytes))
        self.ranges = cache if keeps and isinstance(cache, RangeCache) else None
        self.gap = 0 if local or self.cache else REMOTE_GAP
        self._files, self._pool, self._watch = Files(), Pool(), Watch(dataset)
        self._scratch = Scratch()
        self._identities: dict[str, tuple[int, ...]] = {}  # of local shards when they were last opened
        self._paths: dict[int, str] = {}  # of shards; making one takes longer than reading a small sample
        suits = (local or self.cache is not None or self.ranges is not None) and Direct.suits(windows.array)
        self._direct = Direct(windows.array, windows.entries, always) if suits else None
        self._same = spec.value_dtype == torch.empty(0, dtype=windows.dtype).numpy().dtype
        self._same &= spec.value_dtype == spec.numpy_dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, (self.dataset, self.windows, self.cache or self.ranges, self.metrics, self.always)

    @cached_property
    def sample_bytes(self) -> int:
        """Bytes of one sample in a batch."""
        return int(np.prod(self.windows.shape)) * self.windows.dtype.itemsize

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of one sample as they are stored, before compression."""
        return int(np.prod(self.windows.shape)) * self.windows.array.spec.numpy_dtype.itemsize

    @property
    def caches(self) -> int:
        """Bytes of the cache of shards that it reads through; 0 for none."""
        return self.cache.capacity if self.cache is not None else 0

    @property
    def joins(self) -> bool:
        """Whether the samples of two batches may be asked for as one batch."""
        return True

    def batch(self, samples: Ids, wait: bool = True) -> dict[str, Tensor]:
        """The windows' entries and ``index``, int64 [B], in this order of samples; pinned once CUDA is in use.

        With ``wait=False`` shards that are not in the cache are not downloaded but read by ranges: slower in the long run,
        sooner for a first batch.
        """
        target = functools.cache(lambda: self.target(len(samples)))
        self.fill(samples, target, wait=wait)
        ids = np.array(samples, np.int64)
        return self.finish(
            {**self.windows.views(target().data), **self.windows.labels(ids), "index": torch.from_numpy(ids)}
        )

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pin what is not (views of pinned memory are) once CUDA is in use."""
        if not torch.cuda.is_initialized():
            return batch
        return {name: value if value.is_pinned() else value.pin_memory() for name, value in batch.items()}

    def target(self, rows: int) -> Target:
        """Memory of a batch. Pinned memory is torch's own, which knows when copies to a device have ended."""
        shape, dtype, pinned = (rows, *self.windows.shape), self.windows.dtype, torch.cuda.is_initialized()
        direct = self._direct
        if direct is None or not self._same or self.windows.entries % direct.length or not rows:
            return Target(torch.empty(shape, dtype=dtype, pin_memory=pinned), None)
        if pinned:
            data = torch.empty(shape, dtype=dtype, pin_memory=True)
            return Target(data, Slab(data.view(-1).view(torch.uint8).numpy(), rows, direct.chunks, direct.payload))
        slab, lent = self._pool.take(rows, direct.chunks, direct.payload)
        return Target(torch.from_numpy(lent).view(dtype).view(shape), slab)

    def fill(self, samples: Ids, target: Callable[[], Target], rows: Ids | None = None, wait: bool = True) -> None:
        """Read ``samples`` into the ``rows`` of a target (all of them, in order, if not given).

        Where shards are read as files the target is asked for once they are open, so that its memory waits for no download.
        """
        self._check()
        at = self.windows.locate(samples)
        if self._direct is None or not self._fill_direct(self._direct, at, target, rows, wait):
            self._fill_ranges(at, target().data.numpy(), rows, wait)
        self.metrics.add(samples=len(samples), used=len(samples) * self.stored_bytes)

    def _fill_direct(
        self, direct: Direct, at: Located, target: Callable[[], Target], rows: Ids | None, wait: bool
    ) -> bool:
        """From files, if all of them are there and intact."""
        array, count = self.windows.array, len(at.start)
        raw: NDArray[np.uint8] | None = None

        def file(k: int) -> File | None:
            path = self._paths.get(k) or self._paths.setdefault(k, array.shard_path(k))
            return self._file(path, wait)

        def place() -> Slab | Rows:
            nonlocal raw
            slab = target().slab
            # A mixture's target belongs to another source, whose bytes may mean something else.
            if self._same and slab is not None and slab.fits(direct.chunks, direct.payload):
                return slab if rows is None else slab.select(rows)
            lent, raw = self._pool.take(count, direct.chunks, direct.payload)
            return lent

        if direct.whole(at):
            if not direct.read_whole(at, place, file):
                return False
            fetched = count * direct.chunks * direct.size
        else:
            raw = np.empty(count * direct.entries * direct.entry, np.uint8)
            if not direct.read_parts(at, raw.reshape(count, direct.entries, direct.entry), file):
                return False
            fetched = raw.nbytes
        if raw is not None:
            self._convert(raw, target().data, rows)
        if self.dataset.store.is_local:
            self.metrics.add(fetched=fetched)
        return True

    def _convert(self, raw: NDArray[np.uint8], out: Tensor, rows: Ids | None) -> None:
        """Stored bytes to values of the batch."""
        spec, shape = self.windows.array.spec, (-1, *self.windows.shape)
        if spec.value_dtype != spec.numpy_dtype:  # bits of bfloat16
            values = torch.from_numpy(raw).view(torch.bfloat16).view(shape).to(out.dtype).numpy()
        else:
            values = raw.view(spec.numpy_dtype).reshape(shape)
        out.numpy()[slice(None) if rows is None else rows] = values

    def _fill_ranges(self, at: Located, out: NDArray[np.generic], rows: Ids | None, wait: bool) -> None:
        pieces = self._pieces(at, rows, wait)
        if self.ranges is not None:
            pieces = [(piece, row) for piece, row in pieces if not self._kept(piece, out[row])]
        blocks = coalesce(pieces, self.gap)
        for block, content in self._contents(blocks, ARRIVED, wait):
            right = content
            try:
                self._decode(block, content, out)
            except DataError:
                self._check(now=True)
                if self.dataset.store.is_local:
                    raise  # the file is what it is
                right = self._again(block)
                self._decode(block, right, out)
            if self.ranges is not None:
                self._keep(block, right)
        if self.dataset.store.is_local:
            self.metrics.add(fetched=sum(block.stop - block.start for block in blocks))

    def _kept(self, piece: Piece, out: NDArray[Any]) -> bool:
        """Fill in a piece from the chunks that were kept, if all of its own are there."""
        file = self._file(piece.path) if piece.start < piece.stop else None
        if file is None or (file.mark and file.empty(piece.start, piece.stop)):
            return False
        content = file.read(piece.start, piece.stop, self._scratch)
        try:
            if content is not None:
                self.windows.array.decode(piece, content, out)
                return True
        except DataError:
            pass
        if not file.mark and self.ranges is not None:  # a whole copy, which rots
            self.ranges.drop(self.dataset.fingerprint, piece.path)
            self._files.forget(piece.path)
        return False

    def _keep(self, block: Block, content: memoryview) -> None:
        """Of a block that was decoded: without what lies between its pieces, which nobody has verified."""
        file = self._file(block.path)
        if self.ranges is not None and file is not None and file.mark:
            for piece, _ in block.members:
                data = content[piece.start - block.start : piece.stop - block.start]
                self.ranges.keep(file.descriptor, piece.start, data)

    def _check(self, now: bool = False) -> None:
        """``DataError`` if the data set was replaced; what was kept of it may then be of the other."""
        try:
            self._watch.check(now)
        except DataError:
            if self.ranges is not None:
                self.ranges.forget(self.dataset.fingerprint)
            raise

    def _held(self, path: str, start: int, stop: int, wait: bool) -> memoryview | None:
        """Bytes of a shard that is a file here, valid until the thread's next read."""
        file = self._file(path, wait)
        content = file.read(start, stop, self._scratch) if file else None
        if content is not None and self.dataset.store.is_local:
            self.metrics.add(fetched=stop - start)
        return content

    def _pieces(self, at: Located, rows: Ids | None, wait: bool) -> list[tuple[Piece, int]]:
        """The pieces of each window with the row that they go to."""
        array, entries, found = self.windows.array, self.windows.entries, []
        plan = array.plan
        # Where chunks are compressed their places stand in an index in each shard: fetch those that are not known together.
        read = array.prepare(self._shards(at), lambda path, start, stop: self._held(path, start, stop, wait))
        if read:
            self.metrics.add(fetched=read)
        where = range(len(at.start)) if rows is None else rows.tolist()
        for row, lead, start, step in zip(where, at.lead.tolist(), at.start.tolist(), at.step.tolist(), strict=True):
            index = (lead,) if array.window_axis else ()
            if step == 1:
                found += [(piece, row) for piece in plan(index, start, start + entries)]
                continue
            for i in range(entries):
                begin = start + i * step
                found += [(piece._replace(offset=i), row) for piece in plan(index, begin, begin + 1)]
        return found

    def _decode(self, block: Block, content: memoryview, rows: NDArray[np.generic]) -> None:
        for piece, row in block.members:
            self.windows.array.decode(piece, content[piece.start - block.start : piece.stop - block.start], rows[row])

    def _contents(
        self, blocks: Sequence[Block], scratch: Scratch, wait: bool = True
    ) -> Iterator[tuple[Block, memoryview]]:
        """Each block with its bytes, valid until the next: from files where there are any, the others in one request."""
        remote: list[Block] = []
        for path, group in groupby(blocks, key=lambda block: block.path):
            members = list(group)
            file = self._file(path, wait) if self.ranges is None else None
            for block in members:
                content = file.read(block.start, block.stop, self._scratch) if file else None
                if content is None:
                    remote.append(block)
                    continue
                yield block, content
        if not remote:
            return
        contents = places(remote, scratch)
        with self._listed():
            self._read_ranges([(block.path, block.start, block.stop) for block in remote], [*map(into, contents)])
        self.metrics.add(fetched=sum(map(len, contents)))
        yield from zip(remote, contents, strict=True)

    @contextmanager
    def _listed(self) -> Iterator[None]:
        """Reading objects that the manifest lists: one that is not there is no wrong URL but damage."""
        try:
            yield
        except NoBucket:
            raise
        except (ShortRead, NotFound) as error:
            self._check(now=True)
            what, url = str(error).partition("; ")[0], self.dataset.url
            raise DataError(
                f"{what}, but the manifest lists it; see `keel data check {url}`, then make or copy it again"
            ) from error

    def _read_ranges(self, ranges: list[tuple[str, int, int]], sinks: list[Sink]) -> None:
        """From the store. An object that was replaced meanwhile must hold what the manifest says, as a whole."""
        store, tags = self.dataset.store, self.windows.array.tags
        try:
            store.read_ranges(ranges, sinks, tags)
        except Changed as error:
            if self.ranges is not None:  # what was kept may be of either
                self.ranges.drop(self.dataset.fingerprint, error.path)
                self._files.forget(error.path)
            self._check(now=True)
            info = self.dataset.objects.get(error.path)
            if info is None or not info.at(store):
                raise DataError(str(error)) from error
            tags.pop(error.key, None)
            self._read_ranges(ranges, sinks)

    def _again(self, block: Block) -> memoryview:
        """The bytes of a block from the store once more, past a cached copy, which is dropped."""
        if self.cache is not None:
            self.cache.drop(self.dataset.fingerprint, block.path)
            self._files.forget(block.path)
        return next(self._contents([block], Scratch()))[1]

    def shard_sizes(self, samples: Ids) -> dict[str, int]:
        """Paths and bytes of the shards that samples lie in."""
        array = self.windows.array
        paths = [array.shard_path(k) for k in self._shards(self.windows.locate(samples))]
        return {path: self.dataset.objects[path].size for path in paths if path in self.dataset.objects}

    def _shards(self, at: Located) -> list[int]:
        """Numbers of the shards that windows touch."""
        array, end = self.windows.array, at.start + (self.windows.entries - 1) * at.step
        first, last = (x // array.shard_length for x in ((at.lead, at.lead) if array.window_axis else (at.start, end)))
        span = np.arange(1 + int((last - first).max(initial=0)))
        return np.unique(np.minimum(first[:, None] + span, last[:, None])).tolist()

    def cached(self, path: str, stop: Callable[[], bool] = never) -> bool:
        """Whether a shard is a file here now; downloads it if not and if there is room. ``Stopped`` once ``stop`` says so."""
        return self._file(path, stop=stop) is not None

    def _file(self, path: str, wait: bool = True, stop: Callable[[], bool] = never) -> File | None:
        """The shard as a file: the data set's own or the cached copy, which may lack bytes where ranges are kept.
        ``None``: ask the store, which also tells what is wrong."""
        store, cache, ranges = self.dataset.store, self.cache, self.ranges
        if store.is_local:
            return self._files.get(path, lambda: self._own(path))
        info = self.dataset.objects.get(path)
        if info is None or (cache is None and ranges is None):
            return None
        if ranges is not None:
            partial, size = ranges.partial, info.size

            def some() -> File | None:
                found = partial(self.dataset.fingerprint, path, size)
                return None if found is None else File(found[0], mark=found[1])

            return self._files.get(path, some)
        assert cache is not None

        def fetch() -> File | None:
            fingerprint, fetched = self.dataset.fingerprint, 0
            if wait:
                with self._listed():
                    descriptor, fetched = cache.open(store, fingerprint, path, info.size, info.crc32, stop)
            else:
                descriptor = cache.held(fingerprint, path, info.size)
            self.metrics.add(
                fetched=fetched, misses=int(fetched > 0), hits=int(fetched == 0 and descriptor is not None)
            )
            return None if descriptor is None else File(descriptor, verified=fetched > 0)

        return self._files.get(path, fetch)

    def _own(self, path: str) -> File | None:
        """A shard of a local data set, if it is the one that the manifest lists.

        Chunks carry checksums of their own, so that those of another shard are intact as well. All its bytes are compared
        with the manifest's checksum if it was written to since this reader began, and with ``always`` before the first read.
        """
        file, info = File.open(self.dataset.store.local_path(path)), self.dataset.objects.get(path)
        if file is None or info is None:
            return file
        why, seen = "", self._identities.get(path)
        if file.size != info.size:
            why = f"{'truncated' if file.size < info.size else 'too long'}, {file.size} bytes instead of {info.size}"
        elif seen != file.identity and (self.always or seen is not None) and file.crc32() != info.crc32:
            why = "corrupt, or of another data set: its checksum differs from the manifest's"
        if why:
            self._check(now=True)
            raise self.windows.array.damaged(path, why)
        self._identities[path] = file.identity
        return file
