"""The store when things go wrong: transient faults are ridden out, lasting ones end in one clear line in bounded time."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from datamodules.store import AccessDenied, Retry, ShortRead, Store, Unreachable
from datamodules.store.retry import is_connect_fault, is_transient
from tests.conftest import unavailable


def needs_s3fs() -> None:
    if importlib.util.find_spec("s3fs") is None:
        unavailable("tests of S3 faults need s3fs: pip install 'keel[test]'")


BODY = bytes(range(256)) * 64
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class FlakyFileSystem(MemoryFileSystem):
    """memory:// that fails as often as it is told to, and can cut ranges short."""

    protocol = "flaky"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[list[BaseException]] = []
    cuts: ClassVar[int] = 0

    def _maybe_fail(self) -> None:
        if type(self).faults:
            raise type(self).faults.pop(0)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._maybe_fail()
        data = super().cat_file(path, start, end, **kwargs)
        if type(self).cuts and end is not None:
            type(self).cuts -= 1
            return data[: len(data) // 2]
        return data

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value, mode, **kwargs)
        self._maybe_fail()  # after the write: the answer was lost


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@pytest.fixture
def flaky() -> Iterator[Store]:
    FlakyFileSystem.store.clear()
    store = Store("flaky://bucket/p", deadline=5.0)
    store.retry.base = 0.001
    yield store
    FlakyFileSystem.faults, FlakyFileSystem.cuts = [], 0


TRANSIENT = [TimeoutError("slow"), ConnectionResetError("reset"), BrokenPipeError(), OSError(16, "busy: SlowDown")]


@pytest.mark.parametrize("fault", TRANSIENT, ids=repr)
def test_transient_faults_are_retried(flaky, fault):
    flaky.write("x", BODY)
    FlakyFileSystem.faults = [fault] * 3
    assert flaky.read("x") == BODY
    FlakyFileSystem.faults = [fault] * 3
    flaky.write("y", b"1")
    FlakyFileSystem.faults = [fault] * 2
    assert flaky.read_ranges([("x", i, i + 100) for i in range(5)]) == [BODY[i : i + 100] for i in range(5)]
    assert FlakyFileSystem.faults == []


def test_only_the_failed_ranges_are_fetched_again(flaky, monkeypatch):
    flaky.write("x", BODY)
    asked: list[int] = []
    real = FlakyFileSystem.cat_file

    def cat_file(self, path, start=None, end=None, **kwargs):
        asked.append(start)
        return real(self, path, start, end, **kwargs)

    monkeypatch.setattr(FlakyFileSystem, "cat_file", cat_file)
    FlakyFileSystem.faults = [TimeoutError()]
    flaky.read_ranges([("x", 0, 10), ("x", 20, 30), ("x", 40, 50)])
    assert sorted(asked) == [0, 0, 20, 40]


def test_a_body_cut_short_is_fetched_again_but_a_short_object_is_not(flaky):
    flaky.write("x", BODY)
    FlakyFileSystem.cuts = 2
    assert flaky.read_range("x", 0, 1000) == BODY[:1000]
    with pytest.raises(ShortRead, match="truncated"):
        flaky.read_range("x", 0, len(BODY) + 1)


def test_a_body_that_is_too_long_reaches_no_sink(flaky, monkeypatch):
    """A server that ignores ranges sends the whole object."""
    flaky.write("x", BODY)
    monkeypatch.setattr(FlakyFileSystem, "cat_ranges", lambda self, keys, *a, **k: [BODY for _ in keys])
    flaky.retry.deadline = 0.1
    found = []
    with pytest.raises(Unreachable, match=r"x: .*body cut short"):
        flaky.read_ranges([("x", 3, 9), ("x", 0, len(BODY))], [lambda *got: found.append(got)] * 2)
    assert [(offset, len(piece)) for offset, piece in found] == [(0, len(BODY))]


def test_lasting_faults_are_not_retried(flaky):
    flaky.write("x", BODY)
    FlakyFileSystem.faults = [PermissionError("no"), PermissionError("no")]
    with pytest.raises(AccessDenied, match="flaky://bucket/p/x: access denied"):
        flaky.read("x")
    assert len(FlakyFileSystem.faults) == 1


def test_a_lost_answer_to_create_still_means_created(flaky):
    FlakyFileSystem.faults = [ConnectionResetError()]
    assert flaky.create("lock", b"by me") is True
    FlakyFileSystem.faults = []
    assert flaky.create("lock", b"by me") is False


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def _retry(clock: Clock, **fields: float) -> Retry:
    return Retry(sleep=clock.sleep, clock=lambda: clock.now, uniform=lambda low, high: high, **fields)


def test_back_off_doubles_to_a_cap_and_stops_before_the_deadline():
    clock, tried = Clock(), []

    def attempt(n: int) -> None:
        tried.append(n)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        _retry(clock, deadline=30.0, base=1.0, cap=8.0).run(attempt, lambda: True)
    assert clock.pauses == [1.0, 2.0, 4.0, 8.0, 8.0] and tried == list(range(6))


def test_an_endpoint_that_never_answered_gets_the_short_deadline():
    for reached, expected in ((False, 7.0), (True, 63.0)):
        clock = Clock()

        def refuse(n: int) -> None:
            raise ConnectionRefusedError

        with pytest.raises(ConnectionRefusedError):
            _retry(clock, deadline=100.0, connect_deadline=10.0, base=1.0, cap=64.0).run(refuse, lambda r=reached: r)
        assert clock.now == expected


def test_classification():
    assert all(is_transient(fault) for fault in TRANSIENT)
    assert is_transient(ConnectionRefusedError()) and is_connect_fault(ConnectionRefusedError())
    assert not any(is_transient(e) for e in (FileNotFoundError(), PermissionError(), ValueError(), OSError(28, "full")))
    assert not is_connect_fault(ConnectionResetError())


class FaultServer(BaseHTTPRequestHandler):
    """Enough of S3 to serve one object, after the faults in `script`."""

    script: ClassVar[list[str]] = []
    requests: ClassVar[int] = 0

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def do_GET(self) -> None:
        type(self).requests += 1
        fault = type(self).script.pop(0) if type(self).script else "ok"
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault.isdigit():
            self.send_response(int(fault))
            answer = DENIED if fault == "403" else SLOW_DOWN
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        if fault == "hang":
            time.sleep(1.5)
        start, _, end = (self.headers.get("Range") or f"bytes=0-{len(BODY) - 1}")[6:].partition("-")
        block = BODY[int(start) : int(end) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(block)))
        self.end_headers()
        self.wfile.write(block[: len(block) // 2] if fault == "cut" else block)
        self.close_connection = fault == "cut"


@pytest.fixture
def faulty() -> Iterator[Store]:
    needs_s3fs()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FaultServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    FaultServer.script, FaultServer.requests = [], 0
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    yield Store("s3://bucket/p", endpoint_url=endpoint, key="k", secret="s", read_timeout=1.0, deadline=8.0)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", ["503", "500", "429", "reset", "cut", "hang"])
def test_faults_on_the_wire_are_ridden_out(faulty, fault):
    FaultServer.script = [fault] * (1 if fault == "hang" else 2)
    assert faulty.read_range("x", 100, 5000) == BODY[100:5000]
    assert FaultServer.requests == (2 if fault == "hang" else 3)


def test_a_server_that_stays_overloaded_ends_in_one_line(faulty):
    faulty.read_range("x", 0, 10)
    faulty.retry.deadline, FaultServer.requests = 1.0, 0
    FaultServer.script = ["503"] * 1000
    with pytest.raises(Unreachable, match=r"s3://bucket/p/x: the store did not answer in time \(.*reduce") as caught:
        faulty.read_range("x", 0, 10)
    assert "\n" not in str(caught.value)
    assert 1 < FaultServer.requests < 30


def test_forbidden_is_told_at_once(faulty):
    FaultServer.script = ["403"] * 5
    with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
        faulty.read_range("x", 0, 10)
    assert FaultServer.requests == 2  # s3fs has the last word; no retries


def test_closed_port_is_unreachable_in_bounded_time():
    needs_s3fs()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = Store("s3://b/p", endpoint_url=f"http://127.0.0.1:{port}", key="k", secret="s", connect_deadline=1.0)
    began = time.monotonic()
    with pytest.raises(Unreachable, match=f"s3://b/p/x: the store did not answer.*127.0.0.1:{port}.*AWS_ENDPOINT_URL"):
        store.read("x")
    assert time.monotonic() - began < 10


def test_missing_credentials_are_named_as_such(monkeypatch, tmp_path):
    needs_s3fs()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    store = Store("s3://b/p", endpoint_url="http://127.0.0.1:9", connect_deadline=1.01)
    with pytest.raises(AccessDenied, match=r"no credentials.*AWS_ACCESS_KEY_ID.*AWS_PROFILE"):
        store.read("x")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessDenied, match="nobody"):
        store.read("x")


def test_without_s3fs_the_error_says_what_to_install():
    program = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from datamodules.store import Store, StoreError\n"
        "try: Store('s3://b/p').read('x')\n"
        "except StoreError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "s3://b/p: no client for s3:// is installed; pip install 'keel[s3]'"
