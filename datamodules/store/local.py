"""Files of the local disk: atomic, durable writes and positional reads, without fsspec in between."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from .errors import ShortRead

PIECE = 1 << 20  # bytes that a sink gets at once: what stays in the processor's cache
TEMPORARY = ".keel-tmp"  # suffix of files in the making; listings hide them


def _fsync_directory(directory: str) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_temporary(path: str, pieces: Iterable[memoryview]) -> str:
    """All of `pieces` in a synced file beside `path`; nothing is left behind on failure."""
    directory, name = os.path.split(path)
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f".{name[:200]}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for data in pieces:
                done = 0
                while done < len(data):
                    done += os.write(handle, data[done : done + (1 << 30)])
            os.fsync(handle)
        finally:
            os.close(handle)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return temporary


def write(path: str, data: memoryview) -> None:
    """Replace `path` as a whole: readers see the old content or the new one, also after a power cut."""
    write_pieces(path, [data])


def write_pieces(path: str, pieces: Iterable[memoryview]) -> None:
    """As `write`, of content that comes in pieces."""
    temporary = _write_temporary(path, pieces)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _fsync_directory(os.path.dirname(path))


def create(path: str, data: memoryview) -> bool:
    """Write `path` unless it exists. A link to a complete file: of racing writers one wins, its content whole."""
    if os.path.lexists(path):
        return False
    temporary = _write_temporary(path, [data])
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    _fsync_directory(os.path.dirname(path))
    return True


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def read_ranges(
    requests: Sequence[tuple[str, int, int]], sinks: Sequence[Callable[[int, memoryview], None]] | None = None
) -> list[bytes]:
    """Bytes [start, end) of each (path, start, end), or these go to its sink in pieces; each file is opened once."""
    out: list[bytes] = [b""] * len(requests)
    by_path: dict[str, list[int]] = {}
    for i, (path, _, _) in enumerate(requests):
        by_path.setdefault(path, []).append(i)
    for path, members in by_path.items():
        handle = os.open(path, os.O_RDONLY)
        try:
            for i in members:
                _, start, end = requests[i]
                if sinks is None:
                    out[i] = _pread(handle, path, start, end)
                else:
                    _pour(handle, path, start, end, sinks[i])
        finally:
            os.close(handle)
    return out


def _pread(handle: int, path: str, start: int, end: int) -> bytes:
    parts, position = [], start
    while position < end:
        part = os.pread(handle, min(end - position, 1 << 30), position)
        if not part:
            raise _short(handle, path, start, end)
        parts.append(part)
        position += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _pour(handle: int, path: str, start: int, end: int, sink: Callable[[int, memoryview], None]) -> None:
    position, piece = start, memoryview(bytearray(min(end - start, PIECE)))
    while position < end:
        count = os.preadv(handle, [piece[: end - position]], position)
        if not count:
            raise _short(handle, path, start, end)
        sink(position - start, piece[:count])
        position += count


def _short(handle: int, path: str, start: int, end: int) -> ShortRead:
    size = os.fstat(handle).st_size
    return ShortRead(f"{path}: truncated, {size} bytes where bytes {start} to {end} were wanted; write it again")


def walk(root: str) -> list[str]:
    """All files below `root`, relative to it with '/', without files in the making. Missing root: none."""
    found: list[str] = []
    for directory, _, names in os.walk(root):
        base = os.path.relpath(directory, root)
        prefix = "" if base == "." else base.replace(os.sep, "/") + "/"
        found.extend(prefix + name for name in names if not name.endswith(TEMPORARY))
    return sorted(found)


def children(root: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files directly in `root`, without files in the making. Missing root: none."""
    try:
        with os.scandir(root) as entries:
            found = [(entry.is_dir(), entry.name) for entry in entries]
    except FileNotFoundError:
        return [], []
    files = [name for folder, name in found if not folder and not name.endswith(TEMPORARY)]
    return sorted(name for folder, name in found if folder), sorted(files)


def sweep(root: str, age: float) -> None:
    """Remove files in the making that nobody has written to for `age` seconds: their writers were killed."""
    for directory, _, names in os.walk(root):
        for name in names:
            if name.endswith(TEMPORARY):
                path = os.path.join(directory, name)
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - os.stat(path).st_mtime > age:
                        os.unlink(path)


def delete_tree(path: str) -> None:
    """Remove a file or a folder with all that is in it; missing is fine."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=False)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
