"""Direct reads against a server that answers in every way that HTTP allows, and in some that it does not."""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from datamodules.store import direct as direct_reads
from datamodules.store import wire
from datamodules.store.direct import DirectReads, _Turns
from datamodules.store.errors import Changed
from datamodules.store.wire import HttpError, Sink

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None: ...

    def setup(self) -> None:
        super().setup()
        self.count = 0

    def do_GET(self) -> None:
        self.count += 1
        server, how = self.server, unquote(self.path.split("?")[0].strip("/"))
        with server.lock:
            server.seen.append((self.headers["Host"], self.path, id(self.connection)))
            server.flying += 1
            server.most = max(server.most, server.flying)
        server.gate.wait(10)
        try:
            self.answer(how)
        finally:
            with server.lock:
                server.flying -= 1

    def answer(self, how: str) -> None:
        first, _, last = (self.headers["Range"] or f"bytes=0-{len(CONTENT) - 1}").removeprefix("bytes=").partition("-")
        body = CONTENT[int(first) : int(last) + 1 if last else None]
        status = "206 Partial Content" if self.headers["Range"] else "200 OK"
        head = f'HTTP/1.1 {status}\r\nETag: "1"\r\ncontent-LENGTH:{len(body)}\r\n'
        raw = head.encode() + b"\r\n" + body
        if how == "bytes":  # the headers come one by one
            for i in range(len(head) + 2):
                self.wfile.write(raw[i : i + 1])
                time.sleep(0.001)
            raw = raw[len(head) + 2 :]
        elif how == "close":
            raw = head.encode() + b"Connection: close\r\n\r\n" + body
            self.close_connection = True
        elif how == "old":
            raw = raw.replace(b"HTTP/1.1", b"HTTP/1.0", 1)
            self.close_connection = True
        elif how == "chunks":
            some = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:]))
            raw = f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + some + b"0\r\n\r\n"
        elif how == "unsized":
            raw = f"HTTP/1.1 {status}\r\n\r\n".encode() + body
            self.close_connection = True
        elif how == "longer":
            raw += b"HTTP/1.1 500 of nobody\r\n\r\n"
            self.close_connection = True
        elif how == "whole":
            raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT
        elif how == "endless":  # ignores the range, and says no length
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while not self.server.over.wait(0.001):
                self.wfile.write(CONTENT)
        elif how == "flood":
            self.wfile.write(b"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n\r\n")
            while not self.server.over.wait(0.001):
                self.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")
        elif how == "nothing more":
            raw = b"HTTP/1.1 404 Not Found\r\nContent-Length: 99\r\n\r\n<Code>NoSuchKey</Code>"
            self.close_connection = True
        elif how == "short":
            raw = raw.replace(b"LENGTH:%d" % len(body), b"LENGTH:%d" % (len(body) - 1))[:-1]
        elif how == "cut":
            raw = raw[:-1]
            self.close_connection = True
        elif how == "none":
            raw = b""
            self.close_connection = True
        elif how == "nothing":
            raw = b"HTTP/1.1 404 Not Found\r\nContent-Length: 24\r\n\r\n<Code>NoSuchKey</Code>..\n"[:-1]
        elif how == "busy":
            raw = b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\n\r\n<Error><Code>SlowDown</Code></Error>"
            self.close_connection = True
        elif how == "nonsense":
            raw = b"SSH-2.0-OpenSSH_9.2\r\n\r\n"
            self.close_connection = True
        elif how == "headers":
            raw = b"HTTP/1.1 200 OK\r\n" + b"X-A: %s\r\n" % (b"a" * 1000) * 100
        elif how == "hang":
            self.server.over.wait(10)
        elif how == "drips":
            self.wfile.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 999\r\n\r\n")
            while not self.server.over.wait(0.05):
                self.wfile.write(b".")
        elif how == "moody" and self.count > 1:  # not the first of its connection
            raw = b""
            self.close_connection = True
        elif how == "other":
            raw = raw.replace(b'"1"', b'"2"')
        self.wfile.write(raw)
        if how == "leaves":
            self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.gate, self.over = threading.Lock(), threading.Event(), threading.Event()
        self.seen: list[tuple[str, str, int]] = []
        self.flying = self.most = 0
        self.gate.set()

    def handle_error(self, *_: Any) -> None: ...


class Sign:
    """Signs nothing."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def __call__(self, key: str) -> str:
        if key == "unsigned":
            raise PermissionError("no credentials")
        return f"{self.origin}/{quote(key)}?signed=1"

    def forget(self, key: str) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.over.set()
        server.gate.set()
        server.shutdown()


def reads(server: Server, **options: Any) -> DirectReads:
    origin = f"http://127.0.0.1:{server.server_port}"
    return DirectReads(Sign(origin), **{"read_timeout": 5.0, **options})  # type: ignore[arg-type]


def into(found: bytearray) -> Sink:
    return lambda offset, piece: found.__setitem__(slice(offset, None), piece)


@pytest.mark.parametrize("how", ["plain", "bytes", "close", "old", "chunks", "unsized", "longer", "leaves"])
def test_every_good_answer_is_read(server: Server, how: str) -> None:
    direct, tags = reads(server), dict[str, str]()
    for _ in range(2):
        (whole,) = direct.get([(how, 0, None)], tags=tags)
        assert whole == CONTENT
        spans = [(how, 0, 1), (how, 5, 300_000), (how, len(CONTENT) - 9, len(CONTENT))]
        assert direct.get(spans) == [CONTENT[start:end] for _, start, end in spans]
        found = [bytearray() for _ in spans]
        assert direct.get(spans, [*map(into, found)]) == [end - start for _, start, end in spans]
        assert found == [CONTENT[start:end] for _, start, end in spans]
    assert {host for host, _, _ in server.seen} == {f"127.0.0.1:{server.server_port}"}
    assert tags == ({how: '"1"'} if how not in ("chunks", "unsized") else {})
    connections = len({connection for _, _, connection in server.seen})
    if how in ("plain", "bytes"):
        assert connections <= 3  # as many as there were requests at once


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        ("whole", HttpError, "RangeIgnored"),
        ("endless", HttpError, "RangeIgnored"),
        ("flood", http.client.IncompleteRead, "IncompleteRead"),
        ("nothing more", FileNotFoundError, "NoSuchKey"),
        ("short", TimeoutError, "answered 99 bytes where 100 were asked for"),
        ("cut", http.client.IncompleteRead, "1 more expected"),
        ("none", ConnectionError, "without an answer"),
        ("nothing", FileNotFoundError, "NoSuchKey"),
        ("busy", HttpError, "HTTP 503 .*SlowDown"),
        ("nonsense", http.client.BadStatusLine, "SSH"),
        ("headers", http.client.LineTooLong, "headers"),
        ("hang", TimeoutError, "timed out"),
        ("drips", TimeoutError, "only [0-9]+ bytes came in"),
        ("other", Changed, "other"),
        ("unsigned", PermissionError, "no credentials"),
    ],
)
def test_every_bad_answer_is_told_and_harms_no_other(
    server: Server, monkeypatch: pytest.MonkeyPatch, how: str, error: type, told: str
) -> None:
    monkeypatch.setattr(wire, "SLOWEST", 1 << 20)
    direct, tags = reads(server, concurrency=3, read_timeout=0.5), {how: '"1"'}
    for _ in range(3):
        good, bad, later = direct.get([("plain", 0, 100), (how, 0, 100), ("plain", 7, 99)], tags=tags)
        assert (good, later) == (CONTENT[:100], CONTENT[7:99])
        with pytest.raises(error, match=told):
            assert isinstance(bad, BaseException)
            raise bad
    assert direct.turns.free == 3


def test_no_more_requests_than_allowed_are_in_flight_and_all_are_answered(server: Server) -> None:
    direct, found = reads(server, concurrency=4), {}
    server.gate.clear()
    parts = [(f"plain/{i}" if i % 5 else "none", i, i + 1000 * i) for i in range(1, 41)]

    def call(name: int) -> None:
        found[name] = direct.get(parts[name::3])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while server.flying < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert server.flying == 4
    server.gate.set()
    for thread in threads:
        thread.join(20)
    for name in range(3):
        for (key, start, end), result in zip(parts[name::3], found[name], strict=True):
            assert isinstance(result, ConnectionError) if key == "none" else result == CONTENT[start:end]
    assert server.most == 4 and direct.turns.free == 4


def test_what_a_sink_raises_is_the_result_and_an_interrupt_gives_all_back(server: Server) -> None:
    direct = reads(server, concurrency=4)

    def full(_offset: int, _piece: memoryview) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(_offset: int, _piece: memoryview) -> None:
        raise KeyboardInterrupt

    failed, good = direct.get([("plain", 0, 100_000), ("plain", 0, 10)], [full, lambda *_: None])
    assert isinstance(failed, OSError) and failed.errno == 28 and good == 10
    with pytest.raises(KeyboardInterrupt):
        direct.get([("plain", 0, 100_000)] * 9, [interrupted] * 9)
    assert direct.turns.free == 4
    assert direct.get([("plain", 0, 10)] * 9) == [CONTENT[:10]] * 9


def test_connections_that_the_server_closed_meanwhile_are_not_used(server: Server) -> None:
    direct = reads(server)
    assert direct.get([("leaves", 0, 9)] * 4) == [CONTENT[:9]] * 4
    time.sleep(0.1)
    before = len(server.seen)
    assert direct.get([("plain", 0, 9)] * 4) == [CONTENT[:9]] * 4
    assert len(server.seen) == before + 4


def test_a_connection_that_ends_with_a_request_on_its_way_is_made_anew(server: Server) -> None:
    direct = reads(server)
    for i in range(4):
        assert direct.get([("moody", i, i + 9)]) == [CONTENT[i : i + 9]]
    assert len(server.seen) == 4 + 3  # all but the first were sent twice


def test_a_sink_that_takes_long_makes_no_other_answer_late(server: Server) -> None:
    direct, slow, got = reads(server, read_timeout=0.3), [0.5], []

    def stalls(offset: int, piece: memoryview) -> None:
        got.append((offset, len(piece)))
        time.sleep(slow.pop() if slow else 0)

    assert direct.get([("plain", 0, 500_000)] * 6, [stalls] * 6) == [500_000] * 6
    assert not slow
    # However the network cuts them: a file that is written in other pieces is read slower later.
    assert sorted(got) == [(0, wire.SINK_PIECE)] * 6 + [(wire.SINK_PIECE, 500_000 - wire.SINK_PIECE)] * 6


def test_large_parts_are_read_by_several_threads(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_reads, "LANE_BYTES", 1000)
    monkeypatch.setattr(direct_reads, "LANES", 3)
    spans = [("plain", i, i + 5000 * i) for i in range(1, 9)]
    found, threads = [bytearray() for _ in spans], set()

    def sink(own: bytearray) -> Sink:
        def take(offset: int, piece: memoryview) -> None:
            threads.add(threading.current_thread().name)
            into(own)(offset, piece)

        return take

    direct = reads(server, concurrency=4)
    assert direct.get(spans) == [CONTENT[start:end] for _, start, end in spans]
    assert direct.get(spans, [*map(sink, found)]) == [end - start for _, start, end in spans]
    assert found == [CONTENT[start:end] for _, start, end in spans]
    assert threads == {"MainThread", "keel-store"}
    assert server.most <= 4


def test_nothing_is_written_once_a_read_by_several_threads_has_failed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_reads, "LANE_BYTES", 1000)
    monkeypatch.setattr(direct_reads, "LANES", 3)
    direct, got, ended = reads(server), list[bool](), list[bool]()

    def sink(offset: int, piece: memoryview) -> None:
        got.append(bool(ended))
        time.sleep(0.01)
        if threading.current_thread() is threading.main_thread() and len(got) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        direct.get([("plain", 0, len(CONTENT))] * 30, [sink] * 30)
    ended.append(True)
    time.sleep(0.1)
    assert not any(got) and len(got) < 120 and direct.turns.free == direct.concurrency

    fails = iter([False, True])
    monkeypatch.setattr(
        direct, "connect", lambda urls: 1 / 0 if next(fails, True) else [direct._connect(u) for u in urls]
    )
    with pytest.raises(ZeroDivisionError):
        direct.get([("close", 0, 100_000)] * 6)
    assert direct.turns.free == direct.concurrency


def test_who_waits_longest_for_a_turn_is_next() -> None:
    turns, order = _Turns(1), []
    assert turns.take(wait=False) and not turns.take(wait=False)

    def wait(name: int) -> None:
        for _ in range(2):
            assert turns.take(wait=True)
            order.append(name)
            time.sleep(0.01)
            turns.give()

    threads = []
    for name in range(3):
        threads.append(threading.Thread(target=wait, args=(name,)))
        threads[-1].start()
        while len(turns._queue) <= name:
            time.sleep(0.001)
    turns.give()
    assert not turns.take(wait=False)  # it is the first one's, who has not woken up yet
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 0, 1, 2] and turns.free == 1


def self_signed() -> bytes:
    """A key and a certificate of 127.0.0.1."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")]),
    )
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private + certificate.public_bytes(pem)


def test_over_tls(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = tmp_path / "server.pem"
    pem.write_bytes(self_signed())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    sign, spans = Sign(f"https://127.0.0.1:{server.server_port}"), [("plain", i, i + 200_000) for i in range(8)]
    monkeypatch.setattr(wire, "SINK_PIECE", 1000)  # less than TLS decrypts at once
    for trusted in (str(pem), False):
        direct = DirectReads(sign, read_timeout=5.0, verify=trusted)  # type: ignore[arg-type]
        for _ in range(2):
            assert direct.get([*spans, ("plain", 0, None)]) == [*(CONTENT[a:b] for _, a, b in spans), CONTENT]
            found = bytearray()
            direct.get([("plain", 0, None)], [into(found)])
            assert found == CONTENT
        assert isinstance(direct.get([("busy", 0, 9)])[0], HttpError)
    (refused,) = DirectReads(sign).get([("plain", 0, 9)])  # type: ignore[arg-type]
    assert isinstance(refused, OSError) and "CERTIFICATE_VERIFY_FAILED" in str(refused)
