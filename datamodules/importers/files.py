"""Source files, on any store: found by path, folder or pattern, and read without loading a file whole."""

from __future__ import annotations

import fnmatch
import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datamodules.format import DataError
from datamodules.store import NotFound, Store

SPLIT_FOLDERS = {
    "train": "train", "valid": "validation", "validation": "validation", "val": "validation", "test": "test",
}  # fmt: skip
ZARR = ("zarr.json", ".zgroup", ".zarray")  # of which a Zarr hierarchy has one
BLOCK_BYTES = 4 * 2**20
BLOCKS = 16  # held by one open remote file
EDGE_BYTES = 64 * 2**10
LOOKS = 16  # objects of a Zarr hierarchy of which the ends are read, about


class RangeFile(io.RawIOBase):
    """A remote object as a seekable file: blocks are fetched when they are touched, and at most `BLOCKS` are kept."""

    def __init__(self, store: Store, path: str) -> None:
        self.store, self.path = store, path
        self.size = store.size(path)
        self._at = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        begun = self._at
        while self._at < min(begun + len(view), self.size):
            number, inside = divmod(self._at, BLOCK_BYTES)
            piece = self._block(number)[inside : inside + begun + len(view) - self._at]
            view[self._at - begun : self._at - begun + len(piece)] = piece
            self._at += len(piece)
        return self._at - begun

    def _block(self, number: int) -> bytes:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        start = number * BLOCK_BYTES
        block = self.store.read_range(self.path, start, min(start + BLOCK_BYTES, self.size))
        self._blocks[number] = block
        if len(self._blocks) > BLOCKS:
            self._blocks.popitem(last=False)
        return block


@dataclass(frozen=True)
class SourceFile:
    """One source: `path` in `store`. `split`: the split of the folder it lies in, "" if none is named so.

    group: it is a Zarr hierarchy, whatever its name ends in.
    """

    store: Store = field(compare=False)
    path: str
    split: str = ""
    group: bool = False

    @property
    def suffix(self) -> str:
        """What its name ends in; that of a Zarr hierarchy is .zarr."""
        return ".zarr" if self.group else os.path.splitext(self.path)[1]

    @property
    def url(self) -> str:
        return self.store.join(self.path)

    @property
    def local(self) -> str | None:
        """The file on this machine, if it is there."""
        return self.store.local_path(self.path) if self.store.is_local else None

    def handle(self) -> Any:
        """What libraries open: a path for a local file, a seekable binary file for a remote one."""
        return self.local or io.BufferedReader(RangeFile(self.store, self.path), 64 * 2**10)

    def identity(self) -> dict[str, Any]:
        """What tells the file from another: name, size and a checksum of both ends (reading it whole would cost too much).

        Of a Zarr hierarchy: the number of objects, and a checksum of their names and of the ends of some.
        """
        if self.suffix == ".zarr":
            names = sorted(self.store.list(self.path))
            ends = zlib.crc32("\n".join(names).encode())
            for name in names[:: max(1, len(names) // LOOKS)]:
                ends = self._ends(name, self.store.size(name), ends)
            return {"name": self.path.rsplit("/", 1)[-1], "size": len(names), "ends": f"{ends:08x}"}
        size = self.store.size(self.path)
        return {"name": self.path.rsplit("/", 1)[-1], "size": size, "ends": f"{self._ends(self.path, size):08x}"}

    def _ends(self, path: str, size: int, before: int = 0) -> int:
        edge = min(size, EDGE_BYTES)
        before = zlib.crc32(self.store.read_range(path, 0, edge), before)
        return zlib.crc32(self.store.read_range(path, size - edge, size), before)


def find(source: str, suffixes: Sequence[str], options: dict[str, Any]) -> list[SourceFile]:
    """The files of a path or URL, of a folder (and those below it), or of a pattern with `*`; sorted by path.

    A Zarr hierarchy counts as one file; inside of a folder its name must end in .zarr.

    Raises DataError if there is none.
    """
    parts = source.rstrip("/").split("/")
    wild = next((i for i, part in enumerate(parts) if "*" in part or "?" in part), None)
    if wild is not None:
        store, pattern = Store("/".join(parts[:wild]) or ("/" if wild else "."), **options), "/".join(parts[wild:])
        found = [path for path in _listed(store) if fnmatch.fnmatch(path, pattern)]
    else:
        folder, name = "/".join(parts[:-1]), parts[-1]
        store = Store(folder or ("/" if source.startswith("/") else "."), **options)
        if name.endswith(".zarr") or _is_file(store, name):
            return [_file(store, name)]
        if any(_is_file(store, f"{name}/{document}") for document in ZARR):
            return [_file(store, name, group=True)]
        store = Store(source, **options)
        found = [path for path in _listed(store) if path.endswith(tuple(suffixes))]
    if not found:
        raise DataError(f"{source}: no such file, nor a folder of files that end in {', '.join(suffixes)}")
    return [_file(store, path) for path in sorted(found)]


def _is_file(store: Store, name: str) -> bool:
    try:
        return store.exists(name)
    except NotFound:
        return False


def _listed(store: Store) -> list[str]:
    """Files below a store; a Zarr hierarchy counts as one file."""
    found: dict[str, None] = {}
    for path in store.list():
        cut = path.find(".zarr/")
        found[path if cut < 0 else path[: cut + 5]] = None
    return list(found)


def _file(store: Store, path: str, group: bool = False) -> SourceFile:
    folder = store.join(path).rsplit("/", 2)[-2:-1]
    return SourceFile(store, path, SPLIT_FOLDERS.get(folder[0].lower(), "") if folder else "", group)
