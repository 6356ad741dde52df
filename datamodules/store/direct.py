"""Concurrent range GETs over plain HTTP: the fast way to read from S3-compatible stores.

s3fs signs, parses and schedules each request in Python's event loop, which limits small ranges long before the network
does (`scripts/bench/stream.py` prints both). Here a URL is signed once per object for some minutes, after one that the very
client signed that s3fs made, so that all its settings hold; then threads with kept connections fetch ranges of it straight
into their buffers. Nothing here retries, but for a kept connection that the server had closed meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import os
import re
import socket
import ssl
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any
from urllib.parse import SplitResult, urlsplit

from .errors import Changed
from .sign import Signer

SIGNED_SECONDS = 3600  # for so long a signed URL is good ...
RESIGN_SECONDS = 600.0  # ... and for so long it is used: credentials may change
MAX_URLS = 65536
SLOWEST = 64 << 10  # bytes/s; a body that comes slower than this and `read_timeout` allow is given up
PIECE = 1 << 20  # bytes asked of the socket at once ...
SINK_PIECE = 256 << 10  # ... and where a sink takes them: what is still in the processor's cache when it does
ERROR_BYTES = 64 << 10  # of an error's body

Part = tuple[str, int, int | None]  # key, start, end (None: to the end of the object)
# Called with the bytes of a part as they come, and their offset in it; from offset 0 again if the part is read again. The
# memory is used again after the call.
Sink = Callable[[int, memoryview], None]
Tags = dict[str, str]  # object key -> the ETag that it had when it was first read


class HttpError(OSError):
    """An answer other than the bytes asked for; `response` has the form of botocore's, see `retry.response_of`."""

    def __init__(self, status: int, body: bytes, host: str) -> None:
        code, message = (_field(body, name) for name in (b"Code", b"Message"))
        super().__init__(": ".join(part for part in (f"HTTP {status} of {host}", code, message) if part))
        self.status = status
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}


class ConnectTimeoutError(TimeoutError):
    """No connection within `connect_timeout`."""


def _field(body: bytes, name: bytes) -> str:
    found = re.search(rb"<%s>([^<]*)</%s>" % (name, name), body)
    return found.group(1).decode(errors="replace").strip() if found else ""


class DirectReads:
    """Reads of one process.

    Args:
        sign: object key -> URL that may be read for SIGNED_SECONDS.
        concurrency: connections and threads.
        connect_timeout, read_timeout: seconds for a connection, and for each piece of an answer.
        verify: False, or a file of certificates to trust in place of the system's, for https.
    """

    def __init__(
        self,
        sign: Signer,
        concurrency: int = 32,
        connect_timeout: float = 5.0,
        read_timeout: float = 30.0,
        verify: bool | str = True,
    ) -> None:
        self._sign = sign
        self.concurrency, self.connect_timeout, self.read_timeout = concurrency, connect_timeout, read_timeout
        self._verify = verify
        self._lock = threading.Lock()
        self._urls: dict[str, tuple[float, SplitResult]] = {}
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="keel-store")
        self._tls: ssl.SSLContext | None = None
        self._scratch = threading.local()

    def get(
        self, parts: Sequence[Part], sinks: Sequence[Sink] | None = None, tags: Tags | None = None
    ) -> list[bytes | bytearray | int | BaseException]:
        """The bytes of each part (with sinks: their number), or what went wrong with it.

        A body that ends early is an error, never shorter bytes. With ``tags`` an object of another ETag than there is
        `Changed`; new ones are noted.
        """
        each: Sequence[Sink | None] = sinks or [None] * len(parts)
        if len(parts) == 1:
            return [self._one(parts[0], each[0], tags)]
        return list(self._pool.map(self._one, parts, each, repeat(tags)))

    def forget(self, key: str) -> None:
        """Sign `key` anew when it is next read."""
        with self._lock:
            self._urls.pop(key, None)
        self._sign.forget(key)

    def _one(self, part: Part, sink: Sink | None, tags: Tags | None) -> bytes | bytearray | int | BaseException:
        try:
            return self._read(*part, sink, tags)
        except Exception as error:
            return error

    def _url(self, key: str) -> SplitResult:
        now = time.monotonic()
        with self._lock:
            made, url = self._urls.get(key, (-RESIGN_SECONDS, None))
        if url is None or now - made >= RESIGN_SECONDS:
            url = urlsplit(self._sign(key))
            with self._lock:
                if len(self._urls) >= MAX_URLS:
                    self._urls.clear()
                self._urls[key] = now, url
        return url

    def _read(
        self, key: str, start: int, end: int | None, sink: Sink | None, tags: Tags | None
    ) -> bytes | bytearray | int:
        url = self._url(key)
        place = (url.scheme, url.netloc)
        headers = {"Accept-Encoding": "identity"}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        while True:
            with self._lock:
                kept = self._idle.setdefault(place, [])
                connection = kept.pop() if kept else None
            reused = connection is not None
            if connection is None:
                connection = self._connect(url)
            try:
                try:
                    connection.request("GET", f"{url.path or '/'}?{url.query}".rstrip("?"), headers=headers)
                    response = connection.getresponse()
                except (ConnectionError, http.client.BadStatusLine):
                    if not reused:
                        raise
                    connection.close()
                    continue  # the server closed it while it was idle: no fault
                if tags is not None and response.status in (200, 206):
                    compare_tag(tags, key, response.getheader("ETag"))
                wanted = end - start if end is not None else None
                body = self._body(response, wanted, url.netloc, connection.sock, sink)
            except BaseException:
                connection.close()
                raise
            if response.will_close:
                connection.close()
            else:
                response.close()
                with self._lock:
                    kept.append(connection)
            return body

    def _connect(self, url: SplitResult) -> http.client.HTTPConnection:
        if not url.hostname:
            raise ValueError(f"{url.netloc}: names no host")
        connection: http.client.HTTPConnection
        if url.scheme == "https":
            connection = http.client.HTTPSConnection(
                url.hostname, url.port, timeout=self.connect_timeout, context=self._context()
            )
        else:
            connection = http.client.HTTPConnection(url.hostname, url.port, timeout=self.connect_timeout)
        try:
            connection.connect()
        except TimeoutError as error:
            raise ConnectTimeoutError(f"no connection to {url.netloc} in {self.connect_timeout} s") from error
        except OSError as error:
            raise type(error)(error.errno, f"{error.strerror or error}, connecting to {url.netloc}") from error
        connection.sock.settimeout(self.read_timeout)
        seconds = int(self.read_timeout)
        within = struct.pack("ll", seconds, int((self.read_timeout - seconds) * 1e6))
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, within)  # for reads that block in the kernel
        return connection

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            trusted = self._verify if isinstance(self._verify, str) else os.environ.get("AWS_CA_BUNDLE")
            context = ssl.create_default_context(cafile=trusted)
            if self._verify is False:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self._tls = context
        return self._tls

    def _body(
        self,
        response: http.client.HTTPResponse,
        wanted: int | None,
        host: str,
        sock: socket.socket | None,
        sink: Sink | None,
    ) -> bytes | bytearray | int:
        """The whole body, or its length once a sink has it; raises for any other answer, too slow a body, and one that is
        too short or too long."""
        if response.status == 404:
            code = _field(response.read(ERROR_BYTES), b"Code")
            raise FileNotFoundError(errno.ENOENT, code or "Not Found", host)
        if response.status not in (200, 206):
            raise HttpError(response.status, response.read(ERROR_BYTES), host)
        if response.status == 200 and wanted is not None:
            raise HttpError(response.status, b"<Code>RangeIgnored</Code>", host)
        length = response.length
        if length is None:  # chunked, which no store does for an object
            unsized = response.read()
            if sink is None:
                return unsized
            sink(0, memoryview(unsized))
            return len(unsized)
        if wanted is not None and length != wanted:
            raise TimeoutError(f"{host} answered {length} bytes where {wanted} were asked for")
        limit = time.monotonic() + self.read_timeout + length / SLOWEST
        whole, done = bytearray(length if sink is None else 0), 0
        memory, piece = (whole, PIECE) if sink is None else (self._buffer(), SINK_PIECE)
        body = _Body(response.fp, sock)
        while done < length:
            room = min(piece, length - done)
            view = memoryview(memory)[done : done + room] if sink is None else memoryview(memory)[:room]
            filled = 0
            while filled < room:
                filled += body.receive(view[filled:])
                if done + filled < length and time.monotonic() > limit:
                    took = self.read_timeout + length / SLOWEST
                    raise TimeoutError(f"{host}: {done + filled} of {length} bytes came in {took:.0f} s")
            if sink is not None:
                sink(done, view)
            done += room
        if sock is not None:
            sock.settimeout(self.read_timeout)
        return whole if sink is None else done

    def _buffer(self) -> bytearray:
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = bytearray(SINK_PIECE)
        return self._scratch.buffer


class _Body:
    """The body of an answer, piece by piece, past Python's own reading, which wakes up for each packet.

    A plain socket is made blocking: one call of the kernel then fills the memory, or ends after the socket's own time-out.
    """

    def __init__(self, source: io.BufferedReader, sock: socket.socket | None) -> None:
        self._source = source
        self._socket = None if isinstance(sock, ssl.SSLSocket) else sock  # none either if the server closes after this
        self._ahead = -1  # bytes that were read with the headers; -1: not known yet

    def receive(self, memory: memoryview) -> int:
        """Fill ``memory`` if it comes in time, else a part of it. IncompleteRead at the end, TimeoutError if nothing comes."""
        if self._socket is None:
            # Not readinto: that waits for all of it, however slowly its bytes come.
            count = self._source.readinto1(memory)
        else:
            if self._ahead < 0:
                self._ahead = len(self._source.peek())  # waits for one packet at most
                self._socket.settimeout(None)
            if self._ahead:
                count = self._source.readinto1(memory[: self._ahead])
                self._ahead -= count
            else:
                try:
                    count = self._socket.recv_into(memory, 0, socket.MSG_WAITALL)
                except BlockingIOError:
                    raise TimeoutError("timed out") from None
        if not count:
            raise http.client.IncompleteRead(b"", len(memory))
        return count


def compare_tag(tags: Tags, key: str, tag: str | None) -> None:
    """Note the ETag of an object, where the server gives one; `Changed` if it had another before."""
    if tag and tags.setdefault(key, tag) != tag:
        raise Changed(key)


def unsupported(options: dict[str, Any], endpoint: str) -> str:
    """Why these s3fs options and this environment need s3fs itself for reading; empty if they do not."""
    if options.get("requester_pays"):
        return "requester_pays"
    if options.get("s3_additional_kwargs"):
        return "s3_additional_kwargs"
    if options.get("version_aware"):
        return "version_aware"
    if options.get("session") is not None:
        return "a session of its own"
    if (options.get("config_kwargs") or {}).get("proxies"):
        return "proxies"
    client_keywords = options.get("client_kwargs") or {}
    if not isinstance(client_keywords.get("verify", True), (bool, str)):
        return "client_kwargs.verify"
    host = urlsplit(endpoint or "https://s3.amazonaws.com")
    proxies = urllib.request.getproxies()
    with contextlib.suppress(OSError):
        if host.scheme in proxies and not urllib.request.proxy_bypass(host.hostname or ""):
            return f"the proxy {proxies[host.scheme]}"
    return ""
