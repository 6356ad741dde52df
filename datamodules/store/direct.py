"""Concurrent range GETs over plain HTTP: the fast way to read from S3-compatible stores.

s3fs signs, parses and schedules each request in Python's event loop, which limits small ranges long before the network
does (`scripts/bench/stream.py` prints both). Here a URL is signed once per object for some minutes, by the very client that
s3fs made, so that all its settings hold; then threads with kept connections fetch ranges of it straight into their
buffers. Nothing here retries, but for a kept connection that the server had closed meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import os
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import SplitResult, urlsplit

SIGNED_SECONDS = 3600  # for so long a signed URL is good ...
RESIGN_SECONDS = 600.0  # ... and for so long it is used: credentials may change
MAX_URLS = 65536
SLOWEST = 64 << 10  # bytes/s; a body that comes slower than this and `read_timeout` allow is given up
PIECE = 1 << 20  # bytes asked of the socket at once
ERROR_BYTES = 64 << 10  # of an error's body

Part = tuple[str, int, int | None]  # key, start, end (None: to the end of the object)


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
        sign: object key -> URL that may be read for SIGNED_SECONDS. Called from several threads.
        concurrency: connections and threads.
        connect_timeout, read_timeout: seconds for a connection, and for each piece of an answer.
        verify: False, or a file of certificates to trust in place of the system's, for https.
    """

    def __init__(
        self,
        sign: Callable[[str], str],
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

    def get(self, parts: Sequence[Part]) -> list[bytes | bytearray | BaseException]:
        """The bytes of each part, or what went wrong with it. A body that ends early is an error, never shorter bytes."""
        if len(parts) == 1:
            return [self._one(parts[0])]
        return list(self._pool.map(self._one, parts))

    def forget(self, key: str) -> None:
        """Sign `key` anew when it is next read."""
        with self._lock:
            self._urls.pop(key, None)

    def _one(self, part: Part) -> bytes | bytearray | BaseException:
        try:
            return self._read(*part)
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

    def _read(self, key: str, start: int, end: int | None) -> bytes | bytearray:
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
                body = self._body(response, end - start if end is not None else None, url.netloc)
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
        return connection

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            trusted = self._verify if isinstance(self._verify, str) else os.environ.get("AWS_CA_BUNDLE")
            context = ssl.create_default_context(cafile=trusted)
            if self._verify is False:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self._tls = context
        return self._tls

    def _body(self, response: http.client.HTTPResponse, wanted: int | None, host: str) -> bytes | bytearray:
        """The whole body; raises for any other answer, too slow a body, and one that is too short or too long."""
        if response.status == 404:
            body = response.read(ERROR_BYTES)
            raise FileNotFoundError(errno.ENOENT, _field(body, b"Code") or "Not Found", host)
        if response.status not in (200, 206):
            raise HttpError(response.status, response.read(ERROR_BYTES), host)
        if response.status == 200 and wanted is not None:
            raise HttpError(response.status, b"<Code>RangeIgnored</Code>", host)
        length = response.length
        if length is None:
            return response.read()  # chunked, which no store does for an object
        if wanted is not None and length != wanted:
            raise TimeoutError(f"{host} answered {length} bytes where {wanted} were asked for")
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        limit = time.monotonic() + self.read_timeout + length / SLOWEST
        source: io.BufferedReader = response.fp
        while done < length:
            # Not readinto: that waits for the whole piece, however slowly its bytes come.
            count = source.readinto1(view[done : done + PIECE])
            if not count:
                raise http.client.IncompleteRead(b"", length - done)
            done += count
            if time.monotonic() > limit:
                raise TimeoutError(
                    f"{host}: {done} of {length} bytes came in {self.read_timeout + length / SLOWEST:.0f} s"
                )
        return buffer


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
