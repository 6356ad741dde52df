"""Concurrent range GETs over plain HTTP: the fast way to read from S3-compatible stores.

s3fs signs, parses and schedules each request in Python's event loop, which limits small ranges long before the network
does (`scripts/bench/stream_clients.py` prints both). Here a URL is signed once per object for some minutes (see `sign.py`);
then the thread that asks for ranges of it reads them over kept connections, as many at once as there may be (see `wire.py`),
with the help of a few others where they are large. Nothing here retries, but for a kept connection that the server had
closed meanwhile.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import selectors
import socket
import ssl
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import SplitResult, urlsplit

from .errors import Changed
from .sign import Signer, host_of
from .wire import Sink, Steps, exchange

SIGNED_SECONDS = 3600  # for so long a signed URL is good ...
RESIGN_SECONDS = 600.0  # ... and for so long it is used: credentials may change
MAX_URLS = 65536
LANE_BYTES = 64 << 20  # of one call, that one thread reads alone
LANES = max(1, min(8, (os.cpu_count() or 1) // 2))  # threads that read for one call

Part = tuple[str, int, int | None]  # key, start, end (None: to the end of the object)
Result = bytes | bytearray | int | BaseException
Tags = dict[str, str]  # object key -> the ETag that it had when it was first read


class ConnectTimeoutError(TimeoutError):
    """No connection within `connect_timeout`."""


class _Flight:
    """The request of part ``number`` that is under way on ``sock``, which had served another before if it was ``kept``."""

    def __init__(
        self, number: int, url: SplitResult, request: bytes, sock: socket.socket, kept: bool, steps: Steps
    ) -> None:
        self.number, self.url, self.request = number, url, request
        self.sock, self.kept, self.steps = sock, kept, steps
        self.due = 0.0  # when it will have waited too long


class _Turns:
    """Requests that may be in flight. Who has some takes no more while another waits, and who waits longest is next."""

    def __init__(self, count: int) -> None:
        self.free, self._queue, self._changed = count, deque[object](), threading.Condition()

    def take(self, wait: bool) -> bool:
        """Whether there is one; if not and there is nothing else to do, ``wait`` for it."""
        with self._changed:
            if not wait and (self._queue or not self.free):
                return False
            own = object()
            self._queue.append(own)
            try:
                self._changed.wait_for(lambda: self.free and self._queue[0] is own)
                self.free -= 1
            finally:
                self._queue.remove(own)
                self._changed.notify_all()
            return True

    def give(self, count: int = 1) -> None:
        with self._changed:
            self.free += count
            self._changed.notify_all()


class DirectReads:
    """Reads of one process; safe to use from several threads.

    Args:
        sign: object key -> URL that may be read for SIGNED_SECONDS.
        concurrency: requests in flight, of all threads together, and connections.
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
        self._idle: dict[tuple[str, str], list[socket.socket]] = {}
        self.turns = _Turns(concurrency)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="keel-connect")
        self._tls: ssl.SSLContext | None = None
        self.memory: list[memoryview] = []  # for bytes on their way to sinks, as far as it is not in use

    def get(self, parts: Sequence[Part], sinks: Sequence[Sink] | None = None, tags: Tags | None = None) -> list[Result]:
        """The bytes of each part (with sinks: their number), or what went wrong with it.

        A body that ends early is an error, never shorter bytes. With ``tags`` an object of another ETag than there is
        `Changed`; new ones are noted.
        """
        sizes = sum((end or start) - start for _, start, end in parts)
        lanes = max(1, min(LANES, len(parts), sizes // LANE_BYTES))
        if lanes == 1:
            return _Call(self, parts, sinks, tags).run()
        calls = [_Call(self, parts[i::lanes], sinks and sinks[i::lanes], tags) for i in range(lanes)]
        _together(calls)
        results: list[Result] = [0] * len(parts)
        for i, call in enumerate(calls):
            results[i::lanes] = call.results
        return results

    def forget(self, key: str) -> None:
        """Sign `key` anew when it is next read."""
        with self._lock:
            self._urls.pop(key, None)
        self._sign.forget(key)

    def url(self, key: str) -> SplitResult:
        """A signed URL of an object."""
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

    def kept(self, url: SplitResult) -> socket.socket | None:
        """A connection that another request has left, if there is one and the server has not closed it."""
        while True:
            with self._lock:
                idle = self._idle.setdefault((url.scheme, url.netloc), [])
                if not idle:
                    return None
                sock = idle.pop()
            look = select.poll()
            look.register(sock, select.POLLIN)
            if not look.poll(0):  # a server that has nothing to answer sends nothing but its end
                return sock
            sock.close()

    def keep(self, url: SplitResult, sock: socket.socket) -> None:
        """Leave a connection to the next request."""
        with self._lock:
            self._idle.setdefault((url.scheme, url.netloc), []).append(sock)

    def connect(self, urls: Sequence[SplitResult]) -> list[socket.socket | BaseException]:
        """New connections, made at the same time, which do not block; or why there is none."""
        if len(urls) == 1:
            return [self._connect(urls[0])]
        return list(self._pool.map(self._connect, urls))

    def _connect(self, url: SplitResult) -> socket.socket | BaseException:
        try:
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
            sock: socket.socket = connection.sock
            sock.setblocking(False)
            return sock
        except Exception as error:
            return error

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            trusted = self._verify if isinstance(self._verify, str) else os.environ.get("AWS_CA_BUNDLE")
            context = ssl.create_default_context(cafile=trusted)
            if self._verify is False:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self._tls = context
        return self._tls


class _Call:
    """One call of ``DirectReads.get``: its thread steps through its requests in flight as their answers come."""

    def __init__(
        self, reads: DirectReads, parts: Sequence[Part], sinks: Sequence[Sink] | None, tags: Tags | None
    ) -> None:
        self.reads, self.parts, self.tags = reads, parts, tags
        self.sinks: Sequence[Sink | None] = sinks or [None] * len(parts)
        self.results: list[Result] = [0] * len(parts)
        self.left = deque(range(len(parts)))
        self.turns = 0  # of those that all threads share
        self.flights: set[_Flight] = set()
        self.selector = selectors.DefaultSelector()
        self.stopped = False  # by another thread

    def run(self) -> list[Result]:
        try:
            while (self.left or self.flights) and not self.stopped:
                self.begin()
                ready = self.selector.select(self.reads.read_timeout / 8 if self.flights else 0)
                now = time.monotonic()  # what comes while the others are seen to is not late
                for key, _ in ready:
                    self.step(key.data)
                for flight in [flight for flight in self.flights if flight.due < now]:
                    self.end(flight, TimeoutError("timed out"))
        finally:
            for flight in self.flights:
                flight.sock.close()
            self.selector.close()
            if self.turns:
                self.reads.turns.give(self.turns)
        return self.results

    def begin(self) -> None:
        """Send as many requests as there may be; wait for a turn only where there is nothing else to do."""
        new: list[tuple[int, SplitResult, bytes]] = []
        while self.left and self.reads.turns.take(wait=not self.flights and not new):
            self.turns += 1
            number = self.left.popleft()
            try:
                url = self.reads.url(self.parts[number][0])
                request = self.request(number, url)
            except Exception as error:
                self.finish(number, error)
                continue
            sock = self.reads.kept(url)
            if sock is None:
                new.append((number, url, request))
            else:
                self.send(number, url, request, sock, True)
        self.connect(new)

    def connect(self, new: Sequence[tuple[int, SplitResult, bytes]]) -> None:
        made = deque(self.reads.connect([url for _, url, _ in new]))
        try:
            for number, url, request in new:
                sock = made.popleft()
                if isinstance(sock, BaseException):
                    self.finish(number, sock)
                else:
                    self.send(number, url, request, sock, False)
        finally:
            for sock in made:
                if not isinstance(sock, BaseException):
                    sock.close()

    def request(self, number: int, url: SplitResult) -> bytes:
        _, start, end = self.parts[number]
        target = f"{url.path or '/'}?{url.query}".rstrip("?")
        lines = [f"GET {target} HTTP/1.1", f"Host: {host_of(url)}", "Accept-Encoding: identity"]
        if start or end is not None:
            lines.append(f"Range: bytes={start}-{'' if end is None else end - 1}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    def send(self, number: int, url: SplitResult, request: bytes, sock: socket.socket, kept: bool) -> None:
        key, start, end = self.parts[number]

        def seen(tag: str | None) -> None:
            if self.tags is not None:
                compare_tag(self.tags, key, tag)

        wanted = None if end is None else end - start
        steps = exchange(
            sock, request, host_of(url), wanted, self.sinks[number], seen, self.reads.memory, self.reads.read_timeout
        )
        flight = _Flight(number, url, request, sock, kept, steps)
        self.flights.add(flight)
        self.selector.register(sock, selectors.EVENT_READ, flight)
        self.step(flight)

    def step(self, flight: _Flight) -> None:
        """Go on with what has come."""
        try:
            next(flight.steps)
            flight.due = time.monotonic() + self.reads.read_timeout
        except StopIteration as ended:
            body, keep = ended.value
            self.end(flight, body, keep)
        except http.client.BadStatusLine as error:  # or no answer at all
            if flight.kept:  # the server closed it while it was idle, or had not said all: no fault
                self.drop(flight)
                self.connect([(flight.number, flight.url, flight.request)])
            else:
                self.end(flight, error)
        except Exception as error:
            self.end(flight, error)

    def drop(self, flight: _Flight, keep: bool = False) -> None:
        """Let go of its connection."""
        self.flights.discard(flight)
        self.selector.unregister(flight.sock)
        if keep:
            self.reads.keep(flight.url, flight.sock)
        else:
            flight.sock.close()

    def end(self, flight: _Flight, result: Result, keep: bool = False) -> None:
        self.drop(flight, keep)
        self.finish(flight.number, result)

    def finish(self, number: int, result: Result) -> None:
        self.results[number] = result
        self.turns -= 1
        self.reads.turns.give()


def _together(calls: Sequence[_Call]) -> None:
    """The first in this thread, the others beside it. If one fails as a whole all are over when this raises why."""
    faults: list[BaseException] = []

    def lane(call: _Call) -> None:
        try:
            call.run()
        except BaseException as error:
            faults.append(error)
            for other in calls:
                other.stopped = True

    threads = [threading.Thread(target=lane, args=(call,), name="keel-store", daemon=True) for call in calls[1:]]
    try:
        for thread in threads:
            thread.start()
        calls[0].run()
        for thread in threads:
            thread.join()
    except BaseException:
        for call in calls:
            call.stopped = True
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if faults:
        raise faults[0]


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
