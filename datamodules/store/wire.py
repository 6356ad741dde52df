"""One GET on a kept HTTP/1.1 connection, as a generator that yields while it waits for the server.

One thread can thus have many answers on their way: where each has a thread of its own, those fight for the interpreter, and
parsing an answer with `http.client` takes longer than reading a small range. Only plain answers of a known length are parsed
here; any other is collected and then left to `http.client`.
"""

from __future__ import annotations

import errno
import http.client
import io
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

SLOWEST = 64 << 10  # bytes/s; a body that comes slower than this and `read_timeout` allow is given up
PIECE = 1 << 20  # bytes asked of the socket at once ...
# ... and where a sink takes them: what is still in the processor's cache when it does. All but the last piece of a part have
# this size, and begin at multiples of it: files that are written in other pieces are read slower from the page cache.
SINK_PIECE = 256 << 10
HEAD = 16 << 10  # bytes asked of the socket at once before the body ...
MAX_HEAD = 64 << 10  # ... and at most
ERROR_BYTES = 64 << 10  # of an error's answer

# Called with the bytes of a part as they come, and their offset in it; from offset 0 again if the part is read again. The
# memory is used again after the call.
Sink = Callable[[int, memoryview], None]
Body = bytes | bytearray | int
Steps = Generator[None, None, tuple[Body, bool]]
_STATUS = re.compile(rb"HTTP/1\.(\d) (\d{3})[ \r]")


class HttpError(OSError):
    """An answer other than the bytes asked for; `response` has the form of botocore's, see `retry.response_of`."""

    def __init__(self, status: int, body: bytes, host: str) -> None:
        code, message = (_field(body, name) for name in (b"Code", b"Message"))
        super().__init__(": ".join(part for part in (f"HTTP {status} of {host}", code, message) if part))
        self.status = status
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}


class NoAnswer(http.client.RemoteDisconnected):
    """The connection ended before an answer."""


def _field(body: bytes, name: bytes) -> str:
    found = re.search(rb"<%s>([^<]*)</%s>" % (name, name), body)
    return found.group(1).decode(errors="replace").strip() if found else ""


def exchange(
    sock: socket.socket,
    request: bytes,
    host: str,
    wanted: int | None,
    sink: Sink | None,
    seen: Callable[[str | None], None],
    free: list[memoryview],
    read_timeout: float,
) -> Steps:
    """Sends ``request`` and returns the whole body, or its length once a sink has it, and whether ``sock`` may be kept.

    Yields whenever it needs the socket, which must not block, to be readable. ``wanted``: bytes that the body must have
    (``None``: any). ``seen`` is told the ETag before the body. ``free``: memory that exchanges leave to each other.

    Raises for any other answer (`FileNotFoundError`, `HttpError`), too slow a body, one that is too short or too long
    (`TimeoutError`, `http.client.IncompleteRead`), and `NoAnswer`.
    """
    with _borrowed(free) as scratch:
        head = yield from _head(sock, request, scratch[:HEAD])
        end = head.index(b"\r\n\r\n")
        match = _STATUS.match(head)
        fields = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head[:end].split(b"\r\n")[1:])
        }
        told = fields.get(b"content-length", b"")
        if match is None:
            return _parsed(head, host, wanted, sink, seen)
        status, good = int(match[2]), int(match[2]) in (200, 206)
        if status == 200 and wanted is not None:
            raise HttpError(status, b"<Code>RangeIgnored</Code>", host)
        chunked = b"transfer-encoding" in fields
        if not good or chunked or not told.isdigit():
            most = ERROR_BYTES if not good else sys.maxsize if wanted is None else 2 * wanted + ERROR_BYTES
            enough = min(most, end + 4 + int(told) if told.isdigit() and not chunked else most)
            data = yield from _collected(sock, head, enough, chunked, scratch, host, read_timeout)
            return _parsed(data, host, wanted, sink, seen)
        length, rest = int(told), memoryview(head)[end + 4 :]
        tag = fields.get(b"etag")
        seen(None if tag is None else tag.decode("latin-1"))
        if wanted is not None and length != wanted:
            raise TimeoutError(f"{host} answered {length} bytes where {wanted} were asked for")
        keep = match[1] != b"0" and fields.get(b"connection", b"").lower() != b"close" and len(rest) <= length
        seconds = read_timeout + length / SLOWEST
        limit, done = time.monotonic() + seconds, 0
        whole = bytearray(length if sink is None else 0)
        view, filled = memoryview(whole), len(rest)
        while done < length:
            room = min(PIECE if sink is None else SINK_PIECE, length - done)
            into = view[done : done + room] if sink is None else scratch[:room]
            if rest:
                filled = min(len(rest), room)
                into[:filled], rest = rest[:filled], rest[filled:]
            while filled < room:
                count = yield from _receive(sock, into[filled:])
                if not count:
                    raise http.client.IncompleteRead(b"", length - done - filled)
                filled += count
                if done + filled < length and time.monotonic() > limit:
                    raise TimeoutError(f"{host}: {done + filled} of {length} bytes came in {seconds:.0f} s")
            if sink is not None:
                sink(done, into)
            done, filled = done + room, 0
        if isinstance(sock, ssl.SSLSocket) and sock.pending():  # more than was asked for
            keep = False
        return (whole if sink is None else done), keep


@contextmanager
def _borrowed(free: list[memoryview]) -> Iterator[memoryview]:
    """Memory from what is left, or new."""
    try:
        memory = free.pop()
    except IndexError:
        memory = memoryview(bytearray(SINK_PIECE))
    try:
        yield memory
    finally:
        free.append(memory)


def _head(sock: socket.socket, request: bytes, scratch: memoryview) -> Generator[None, None, bytes]:
    """Sends the request; what has come once all headers have."""
    head = b""
    try:
        sock.sendall(request)
        while b"\r\n\r\n" not in head:
            if len(head) > MAX_HEAD:
                raise http.client.LineTooLong("headers")
            count = yield from _receive(sock, scratch)
            if not count:
                raise ConnectionError("the server closed the connection without an answer")
            head += scratch[:count]
    except ConnectionError as error:
        raise NoAnswer(str(error)) from error
    return head


def _receive(sock: socket.socket, memory: memoryview) -> Generator[None, None, int]:
    """Some bytes, as soon as there are any; 0 at the end."""
    while True:
        if not (isinstance(sock, ssl.SSLSocket) and sock.pending()):
            yield
        try:
            return sock.recv_into(memory)
        except (BlockingIOError, ssl.SSLWantReadError):
            continue
        except ssl.SSLWantWriteError:
            raise ConnectionError("the server asked for new keys in the middle of an answer") from None


class _Replay:
    """Bytes of an answer for `http.client.HTTPResponse`, which wants a socket."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _collected(
    sock: socket.socket,
    head: bytes,
    enough: int,
    chunked: bool,
    scratch: memoryview,
    host: str,
    read_timeout: float,
) -> Generator[None, None, bytes]:
    """Of an answer that began with ``head``: ``enough`` bytes, or fewer to the last of its chunks or to the end."""
    data, began = bytearray(head), time.monotonic()
    while len(data) < enough and not (chunked and _ended(data)):
        count = yield from _receive(sock, scratch)
        if not count:
            break
        data += scratch[:count]
        seconds = time.monotonic() - began
        if seconds > read_timeout + len(data) / SLOWEST:
            raise TimeoutError(f"{host}: only {len(data)} bytes came in {seconds:.0f} s")
    return bytes(data)


def _ended(data: bytearray) -> bool:
    """Whether an answer in chunks is all there: looked at where its bytes could be the end."""
    if not data.endswith(b"\r\n\r\n"):
        return False
    try:
        with http.client.HTTPResponse(_Replay(data), method="GET") as response:  # type: ignore[arg-type]
            response.begin()
            response.read()
    except http.client.IncompleteRead:
        return False
    return True


def _parsed(
    data: bytes, host: str, wanted: int | None, sink: Sink | None, seen: Callable[[str | None], None]
) -> tuple[Body, bool]:
    """What a whole answer says that is an error, or a body of unknown length, which no store sends for an object."""
    with http.client.HTTPResponse(_Replay(data), method="GET") as response:  # type: ignore[arg-type]  # needs makefile only
        response.begin()
        try:
            body = response.read()
        except http.client.IncompleteRead as error:
            if response.status in (200, 206):
                raise
            body = error.partial  # that it is an error is told all the same
        if response.status == 404:
            raise FileNotFoundError(errno.ENOENT, _field(body, b"Code") or "Not Found", host)
        if response.status not in (200, 206):
            raise HttpError(response.status, body, host)
        seen(response.getheader("ETag"))
        if wanted is not None and len(body) != wanted:
            raise TimeoutError(f"{host} answered {len(body)} bytes where {wanted} were asked for")
        if sink is None:
            return body, False
        sink(0, memoryview(body))
        return len(body), False
