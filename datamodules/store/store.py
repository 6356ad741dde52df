"""`Store`: a prefix in object storage or on disk. The one place where Keel reads and writes bytes.

Paths are strings relative to the prefix, with '/' as separator. Nothing here knows about listing caches, retries of the
libraries below or `pathlib` (which would turn `s3://b/k` into `s3:/b/k`).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from . import local, looks, multipart
from .client import CONCURRENCY, S3_PROTOCOLS, Client, client, configured
from .conditional import create
from .direct import Tags
from .errors import Changed, NoBucket, NotFound, ShortRead, StoreError
from .names import canonical_json, checked, join_url
from .retry import Retry, is_connect_fault, is_transient, response_of
from .translate import translate
from .wire import Sink

T = TypeVar("T")
Range = tuple[str, int, int]
RETRY_OPTIONS = ("deadline", "connect_deadline")


class Store:
    """A URL prefix: a plain path, `file://`, `s3://bucket/prefix`, `memory://` or any other fsspec URL.

    Picklable and safe to use from several threads; the client is made per process on first use.

    Args:
        url: the prefix. A relative path is made absolute.
        options: `deadline` (60 s) ends retries; `connect_deadline` (10 s) ends them for an endpoint that never answered;
            `connect_timeout` (5 s), `read_timeout` (30 s) and `concurrency` (32) bound single S3 requests; `direct=False`
            reads through s3fs even where plain range GETs, which are faster, would do (see `direct.py`); all others
            go to the fsspec filesystem (`key`, `secret`, `endpoint_url`, `anon`, ... for S3). The usual environment
            (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_REGION) holds otherwise, and so
            does fsspec's configuration, for instance ``FSSPEC_S3='{"anon": true}'`` for options of the filesystem and
            ``FSSPEC_KEEL='{"deadline": 300}'`` for the ones named here.

    Raises (all methods): `NotFound`, `Unreachable`, `AccessDenied`, `OutOfSpace`, `ShortRead` or another `StoreError`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        if not isinstance(url, str) or not url.strip():
            raise StoreError(f"url={url!r}: a store needs a path or a URL such as s3://bucket/prefix")
        scheme, separator, rest = url.partition("://")
        self._protocol = scheme if separator else "file"
        self.is_local = self._protocol in ("file", "local")
        if self.is_local:
            self._root = os.path.abspath(os.path.expanduser(rest if separator else url))
            self.url = f"{scheme}://{self._root}" if separator else self._root
        else:
            self._root = rest.rstrip("/")
            if not self._root.strip("/") and self._protocol != "memory":
                raise StoreError(f"{url}: names no bucket; use {scheme}://bucket/prefix")
            self.url = f"{scheme}://{self._root}"
        self.options = dict(options) if self.is_local else {**configured(self._protocol), **options}
        self.retry = Retry(
            deadline=float(self.options.get("deadline", Retry.deadline)),
            connect_deadline=float(self.options.get("connect_deadline", Retry.connect_deadline)),
        )

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    # Names

    def join(self, *parts: str) -> str:
        """The URL of an object of this store."""
        return join_url(self.url, *(checked(part) for part in parts))

    def sub(self, prefix: str) -> Store:
        """The store below `prefix`, with the same options."""
        return Store(self.join(prefix), **self.options)

    def local_path(self, path: str = "") -> str:
        """The file of an object; only for local stores."""
        if not self.is_local:
            raise ValueError(f"{self.url}: not a local store")
        return os.path.join(self._root, *checked(path).split("/")) if path else self._root

    # Reading

    def read(self, path: str) -> bytes:
        """The whole object."""
        if self.is_local:
            return self._local(path, lambda: local.read(self.local_path(path)))

        def attempt(held: Client, key: str, _n: int) -> bytes:
            (result,) = held.read_parts([(key, 0, None)], 1)
            if isinstance(result, BaseException):
                raise result
            return bytes(result)

        return self._remote(path, attempt)

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of an object, exactly; `ShortRead` if it ends before."""
        return self.read_ranges([(path, start, end)])[0]

    def read_ranges(
        self, requests: Sequence[Range], sinks: Sequence[Sink] | None = None, tags: Tags | None = None
    ) -> list[bytes]:
        """Bytes [start, end) of each (path, start, end), fetched concurrently; an empty range costs no request.

        With ``sinks``, one for each range, the bytes go to these instead, piece by piece as they come, in order within a
        range, from several threads: ``sink(offset, piece)``. A range that is tried again begins at offset 0 again.

        With ``tags``, a dictionary that the caller keeps, bytes of different calls are of the same objects: `Changed` if one
        was replaced meanwhile, as its ETag tells, where the store gives one.
        """
        for path, start, end in requests:
            if not 0 <= start <= end:
                raise ValueError(f"{path}: range [{start}, {end}) is not a range")
        todo = [i for i, (_, start, end) in enumerate(requests) if end > start]
        out = [b""] * len(requests)
        if not todo:
            return out
        if self.is_local:
            wanted = [(self.local_path(requests[i][0]), *requests[i][1:]) for i in todo]
            names = {file: requests[i][0] for i, (file, _, _) in zip(todo, wanted, strict=True)}
            own = None if sinks is None else [sinks[i] for i in todo]
            blocks = self._local(requests[todo[0]][0], lambda: local.read_ranges(wanted, own), names)
            for i, block in zip(todo, blocks, strict=True):
                out[i] = block
            return out

        def attempt(held: Client, _key: str, _n: int) -> None:
            """Fetch what is still missing; the first fault is raised after all that arrived is kept."""
            fault: tuple[int, BaseException] | None = None
            parts = [(self._key(requests[i][0]), *requests[i][1:]) for i in todo]
            theirs = None if sinks is None else [sinks[i] for i in todo]
            results = held.read_parts(parts, int(self.options.get("concurrency", CONCURRENCY)), theirs, tags)
            missing = []
            for i, result in zip(todo, results, strict=True):
                path, start, end = requests[i]
                if isinstance(result, bytes | bytearray) and len(result) == end - start:
                    out[i] = result
                    continue
                if result == end - start:
                    continue  # a sink has them
                missing.append(i)
                error = result if isinstance(result, BaseException) else TimeoutError("body cut short")
                if fault is None or (is_transient(fault[1]) and not is_transient(error)):
                    fault = (i, error)
            todo[:] = missing
            if fault is not None:
                path, start, end = requests[fault[0]]
                blamed[0] = path
                if isinstance(fault[1], Changed):
                    told = "was replaced by another object while it was read; put the old one back"
                    raise Changed(f"{self.join(path)}: {told}", path, self._key(path)) from None
                self._check_length(held.filesystem, path, start, end, fault[1])
                raise fault[1]

        blamed = [requests[todo[0]][0]]
        self._remote(blamed[0], attempt, blamed)
        return out

    def read_json(self, path: str) -> Any:
        """A JSON object; `StoreError` if it is not JSON."""
        data = self.read(path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise StoreError(f"{self.join(path)}: not valid JSON ({error}); the object is damaged") from error

    def exists(self, path: str) -> bool:
        """Whether the object (not a prefix of objects) exists."""
        try:
            self.size(path)
        except NotFound:
            return False
        return True

    def size(self, path: str) -> int:
        """Bytes of an object."""
        if self.is_local:
            if os.path.isdir(self.local_path(path)):
                raise NotFound(f"{self.join(path)}: is a folder, not an object")
            return self._local(path, lambda: os.stat(self.local_path(path)).st_size)
        return self._remote(path, lambda held, key, _: self._remote_size(held.filesystem, key))

    def children(self, prefix: str = "") -> tuple[list[str], list[str]]:
        """(folders, objects) directly below the folder `prefix`: their last names, sorted. None is no error."""
        checked(prefix)
        if self.is_local:
            return self._local(prefix, lambda: local.children(self.local_path(prefix)))

        def attempt(held: Client, key: str, _n: int) -> tuple[list[str], list[str]]:
            found = looks.children(held.filesystem, key)
            if not any(found):
                self._check_bucket(held.filesystem)
            return found

        return self._remote(prefix, attempt)

    def list(self, prefix: str = "") -> list[str]:
        """All objects below the folder `prefix`, recursively, sorted, relative to this store. None is no error."""
        checked(prefix)
        prefix = prefix.rstrip("/")
        lead = f"{prefix}/" if prefix else ""
        if self.is_local:
            return self._local(prefix, lambda: [lead + name for name in local.walk(self.local_path(prefix))])

        def attempt(held: Client, key: str, _n: int) -> list[str]:
            names = looks.objects(held.filesystem, key)
            if not names:
                self._check_bucket(held.filesystem)
            return [lead + name for name in names]

        return self._remote(prefix, attempt)

    def times(self, path: str) -> tuple[float, float] | None:
        """When an object was last written and what time it is, in seconds since the epoch, both by the store's own clock
        (S3: whole seconds; a local disk: this machine's); None where a store does not tell."""
        if self.is_local:
            return self._local(path, lambda: (os.stat(self.local_path(path)).st_mtime, time.time()))
        if self._protocol not in S3_PROTOCOLS:
            return None

        return self._remote(path, lambda held, key, _: looks.times(held.filesystem, key))

    # Writing

    def write(self, path: str, data: bytes | bytearray | memoryview) -> None:
        """Write or replace an object as a whole: what cannot be finished is never seen."""
        if self.is_local:
            self._local(path, lambda: local.write(self.local_path(path), memoryview(data).cast("B")))
        elif isinstance(data, memoryview) and data.nbytes > multipart.PART_BYTES and self._protocol in S3_PROTOCOLS:
            self.write_pieces(path, [data], data.nbytes)  # botocore takes no memoryview: a copy of a part, not of all
        else:
            body = _body(data)
            self._remote(path, lambda held, key, _: held.filesystem.pipe_file(key, body))

    def write_pieces(self, path: str, pieces: Iterable[Any], size: int) -> None:
        """As `write`, of `size` bytes that come in pieces (anything with the buffer protocol). Files and S3 objects are
        written as the pieces come; other stores get them in one."""
        flat = (memoryview(piece).cast("B") for piece in pieces)
        if self.is_local:
            self._local(path, lambda: local.write_pieces(self.local_path(path), flat))
        elif self._protocol in S3_PROTOCOLS and size > multipart.PART_BYTES:
            bucket, _, key = self._key(path).partition("/")
            multipart.upload(
                lambda call: self._remote(path, lambda held, *_: call(held.filesystem)), bucket, key, flat, size
            )
        else:
            self.write(path, b"".join(flat))

    def create(self, path: str, data: bytes | bytearray | memoryview) -> bool:
        """Write an object only if there is none; False if there is one. Of racing writers exactly one gets True.

        Local: a hard link to a complete file. S3: PUT with If-None-Match. The first one of a process in a bucket is asked
        for twice: a server that does not refuse the second ignores conditions. There a warning tells so, and a writer
        waits a second and has won if its content is still there: safe but for writers that are slower than that.
        The content should name its writer: when an answer is lost, a retry finds its own object and returns True.
        """
        if self.is_local:
            return self._local(path, lambda: local.create(self.local_path(path), memoryview(data).cast("B")))
        body = _body(data)
        return self._remote(path, lambda held, key, n: create(held, self._protocol, key, body, n, self.retry.sleep))

    @property
    def conditional(self) -> bool | None:
        """Whether the server was found to check conditions, by `create`; None where that is not yet, or never, asked."""
        return None if self.is_local else self._client().conditional.get(self._root.split("/")[0])

    def write_json(self, path: str, value: Any) -> None:
        """`value` as canonical JSON: sorted keys, no spaces, so that equal values are equal bytes."""
        self.write(path, canonical_json(value))

    def delete(self, path: str) -> None:
        """Remove an object; missing is fine."""
        if self.is_local:
            self._local(path, lambda: self._unlink(self.local_path(path)))
            return
        self._remote(path, lambda held, key, _: self._remote_delete(held.filesystem, key))

    def delete_tree(self, prefix: str = "") -> None:
        """Remove all objects below the folder `prefix` (and an object of that very name)."""
        if self.is_local:
            self._local(prefix, lambda: local.delete_tree(self.local_path(prefix)))
            return
        for path in self.list(prefix):
            self.delete(path)
        if prefix:
            self.delete(prefix)

    def sweep(self, age: float = 3600.0) -> None:
        """Remove what writers that were killed left behind on a local disk, untouched for `age` seconds."""
        if self.is_local:
            self._local("", lambda: local.sweep(self._root, age))

    # Plumbing

    def _url(self, path: str) -> str:
        return self.join(path) if path else self.url

    def _key(self, path: str) -> str:
        checked(path)
        return f"{self._root}/{path}" if path else self._root

    def _client(self) -> Client:
        options = {name: value for name, value in self.options.items() if name not in RETRY_OPTIONS}
        return client(self._protocol, options, self.url)

    @staticmethod
    def _unlink(path: str) -> None:
        if os.path.lexists(path):
            os.unlink(path)

    @staticmethod
    def _remote_size(fs: Any, key: str) -> int:
        info = fs.info(key)
        if info["type"] != "file":
            raise FileNotFoundError(key)
        return int(info["size"])

    @staticmethod
    def _remote_delete(fs: Any, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(key)

    def _check_bucket(self, fs: Any) -> None:
        if self._protocol in S3_PROTOCOLS:
            bucket = self._root.split("/")[0]
            try:
                fs.call_s3("head_bucket", Bucket=bucket)
            except Exception as error:
                if not isinstance(error, FileNotFoundError):
                    return  # not allowed to ask, or a passing fault: no verdict
                raise NoBucket(f"{self.url}: there is no bucket {bucket!r}; create it or correct the URL") from error

    def _check_length(self, fs: Any, path: str, start: int, end: int, error: BaseException) -> None:
        """Tell a truncated object (for good) from a body cut short on the way (worth another try)."""
        if not isinstance(error, TimeoutError) and response_of(error)[0] != 416:
            return
        size = self._remote_size(fs, self._key(path))
        if size < end:
            raise ShortRead(
                f"{self.join(path)}: truncated, {size} bytes where bytes {start} to {end} were wanted; write it again"
            ) from error

    def _local(self, path: str, operation: Callable[[], T], names: Mapping[str, str] | None = None) -> T:
        """Run on the disk; `names` maps the files that an error may name to paths of this store."""
        try:
            return operation()
        except StoreError:
            raise
        except OSError as error:
            raise translate(error, self._url((names or {}).get(error.filename, path)), self.is_local) from error

    def _remote(self, path: str, operation: Callable[[Client, str, int], T], blamed: Sequence[str] = ()) -> T:
        held = self._client()
        key = self._key(path)

        def attempt(n: int) -> T:
            try:
                result = operation(held, key, n)
            except Exception as error:
                if not is_connect_fault(error) and response_of(error)[0]:
                    held.reached = True
                if self._protocol in S3_PROTOCOLS and response_of(error) == (403, "403"):
                    looks.refused(held.filesystem, key)
                raise
            held.reached = True
            return result

        try:
            return self.retry.run(attempt, lambda: held.reached)
        except StoreError:
            raise
        except Exception as error:
            where = blamed[0] if blamed else path
            if isinstance(error, FileNotFoundError):
                self._check_bucket(held.filesystem)
            raise translate(error, self._url(where), self.is_local) from error


def _body(data: bytes | bytearray | memoryview) -> bytes | bytearray:
    """What filesystems write, botocore among them, which takes no memoryview: copied only if it is a part of something."""
    if not isinstance(data, memoryview):
        return data
    whole = data.obj
    return whole if isinstance(whole, (bytes, bytearray)) and len(whole) == data.nbytes else bytes(data)
