"""Creating on servers that check conditions, and on those that ignore them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from datamodules.store import Store, conditional
from tests.helpers.faulty_proxy import FaultyProxy

from .test_store_faults import needs_s3fs


class Objects:
    """Enough of S3 for whole objects in memory; heeds If-None-Match or not."""

    def __init__(self, heeds: bool) -> None:
        self.content: dict[str, bytes] = {}
        self.puts, lock, objects = 0, threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def _answer(self, status: int, body: bytes = b"", length: int | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.send_header("ETag", '"0"')
                self.end_headers()
                self.wfile.write(body)

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    objects.puts += 1
                    name = self.path.split("?")[0]
                    if heeds and self.headers.get("If-None-Match") == "*" and name in objects.content:
                        self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                        return
                    objects.content[name] = body
                self._answer(200)

            def do_GET(self) -> None:
                body = objects.content.get(self.path.split("?")[0])
                self._answer(404 if body is None else 200, body or b"<Error><Code>NoSuchKey</Code></Error>")

            def do_HEAD(self) -> None:
                body = objects.content.get(self.path.split("?")[0])
                self._answer(404 if body is None else 200, length=len(body or b""))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def store(self, **options: object) -> Store:
        return Store("s3://bucket/p", endpoint_url=self.endpoint, key="k", secret="s", deadline=5.0, **options)


@pytest.fixture(params=[True, False], ids=["heeds", "ignores"])
def objects(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Objects]:
    needs_s3fs()
    monkeypatch.setattr(conditional, "SETTLE_SECONDS", 0.3)
    served = Objects(request.param)
    served.heeds = request.param  # type: ignore[attr-defined]
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_the_server_is_asked_once_and_the_user_is_told(objects: Objects, caplog: pytest.LogCaptureFixture) -> None:
    heeds = objects.heeds  # type: ignore[attr-defined]
    store = objects.store()
    assert store.create("a", b"first") and objects.puts == 2
    assert store.create("b", b"second") and objects.puts == 3
    assert not store.create("a", b"late") and store.read("a") == b"first"
    assert caplog.text.count("ignores conditional writes") == (0 if heeds else 1)
    assert heeds or "s3://bucket" in caplog.text


def test_of_racing_writers_one_wins_even_where_conditions_are_ignored(objects: Objects) -> None:
    stores = [objects.store(concurrency=8 + i) for i in range(6)]
    barrier, wins = threading.Barrier(6), []

    def claim(i: int) -> None:
        barrier.wait()
        if stores[i].create("claim", f"writer {i}".encode()):
            wins.append(i)

    threads = [threading.Thread(target=claim, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert stores[0].read("claim") == f"writer {wins[0]}".encode()


def test_a_lost_answer_still_means_created(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(s3.endpoint) as proxy:
        url = s3.url("lost")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = Store(url, deadline=5.0)
        lost = iter(["cut_off"])
        forward = proxy._forward

        def forget(request: BaseHTTPRequestHandler, sent: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            answer = forward(request, sent)
            if request.command == "PUT" and next(lost, None):
                request.connection.close()  # carried out, but nobody hears of it
            return answer

        monkeypatch.setattr(proxy, "_forward", forget)
        assert store.create("x", b"by me") is True
        assert store.create("x", b"by another") is False
        assert store.read("x") == b"by me"
