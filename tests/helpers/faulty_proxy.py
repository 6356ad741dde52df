"""A proxy between a client and an S3 server that fails as it is told to."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("slow_down", "skewed", "reset", "hang", "cut", "trickle", "flip", "hang_up", "late", "full")
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
SKEWED = b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>"
FULL = b"<Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its minimum free drive.</Message></Error>"
DROPPED = ("connection", "keep-alive", "transfer-encoding", "content-length", "server", "date")


class FaultyProxy:
    """Forwards to `upstream` ("http://host:port") from `endpoint`, which may be used as a context.

    `fault(method, path, n)` names what goes wrong with the n-th request (from 0), or is None: slow_down (503),
    skewed (403: the client's clock is wrong), reset (while the answer is awaited), hang (no answer), cut (half the body,
    then the end), trickle (a byte at a time), flip (a wrong bit in the body), hang_up (the connection is closed after a good answer, against what the answer says), late (a good
    answer after 0.3 s), full (507).
    `arrived(method, path)` is called with each request before it is answered. `requests` lists (method, path, fault) so far. `stop_listening` and `listen` are a server that is down and up again.
    """

    def __init__(self, upstream: str, fault: Callable[[str, str, int], str | None] = lambda *_: None) -> None:
        self.fault = fault
        self.arrived: Callable[[str, str], object] = lambda *_: None
        self.requests: list[tuple[str, str, str | None]] = []
        self._accepted: list[socket.socket] = []
        self._upstream = urlsplit(upstream).netloc
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._over = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def setup(self) -> None:
                super().setup()
                proxy._accepted.append(self.connection)

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    proxy._handle(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None: ...  # a client that has gone

        self._make, self._port = (lambda port: Server(("127.0.0.1", port), Handler)), 0
        self.listen()
        self.endpoint = f"http://127.0.0.1:{self._port}"

    @property
    def connections(self) -> int:
        """Connections accepted so far."""
        return len(self._accepted)

    def listen(self) -> None:
        """Connections are accepted, on the same port as before."""
        self._server = self._make(self._port)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop_listening(self) -> None:
        """Connections are refused, and those that there were are cut."""
        self._server.shutdown()
        self._server.server_close()
        self._cut()

    def close(self) -> None:
        self._over.set()
        self.stop_listening()

    def _cut(self) -> None:
        for connection in self._accepted:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        sent = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        with self._lock:
            fault = self.fault(request.command, path, next(self._numbers))
            self.requests.append((request.command, path, fault))
        self.arrived(request.command, path)
        if fault == "reset":
            # Closing with pending data discarded sends a reset and not an orderly end.
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True
            return
        if fault == "hang":
            self._over.wait(60)
            request.close_connection = True
            return
        if fault == "slow_down":
            self._answer(request, 503, [("Content-Type", "application/xml")], SLOW_DOWN, len(SLOW_DOWN))
            return
        if fault == "skewed":
            self._answer(request, 403, [("Content-Type", "application/xml")], SKEWED, len(SKEWED))
            return
        if fault == "full":
            self._answer(request, 507, [("Content-Type", "application/xml")], FULL, len(FULL))
            return
        if fault == "late":
            self._over.wait(0.3)
        status, headers, body = self._forward(request, sent)
        if fault == "flip" and body:
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        if fault == "cut":
            self._answer(request, status, headers, body[: len(body) // 2], len(body))
            request.close_connection = True
        elif fault == "trickle":
            self._answer(request, status, headers, b"", len(body))
            for byte in body:
                if self._over.wait(0.01):
                    break
                request.wfile.write(bytes([byte]))
            request.close_connection = True
        else:
            self._answer(request, status, headers, body, len(body))
            request.close_connection = fault == "hang_up"

    def _forward(self, request: BaseHTTPRequestHandler, sent: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(sent or None)
            answer = connection.getresponse()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in DROPPED]
            if request.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return answer.status, headers, answer.read()
        finally:
            connection.close()

    @staticmethod
    def _answer(
        request: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], body: bytes, length: int
    ) -> None:
        request.send_response(status)
        for name, value in headers:
            request.send_header(name, value)
        if request.command != "HEAD" and status != 204:
            request.send_header("Content-Length", str(length))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
