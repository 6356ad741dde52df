"""Streams over a network that fails: correct data in the end, or one clear line in bounded time."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fsspec.config import conf

from datamodules.data import FieldsConfig, FieldsData
from datamodules.format import DataError
from datamodules.store import Sink, Store, StoreError, Unreachable, multipart, wire
from tests.helpers.faulty_proxy import FAULTS, FaultyProxy

from .samples import field_values, fields_reader, replace_shard, write_fields

READ_TIMEOUT, DEADLINE = 0.4, 6.0


@pytest.fixture(scope="module")
def data(s3, tmp_path_factory) -> tuple[str, str]:
    """The same data set on the local disk and on S3."""
    here, there = str(tmp_path_factory.mktemp("data") / "fields"), s3.url("fields")
    assert write_fields(here) == write_fields(there)
    return here, there


@pytest.fixture
def proxy(s3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """All S3 requests of this process go through it."""
    monkeypatch.setitem(conf, "keel", {"read_timeout": READ_TIMEOUT, "deadline": DEADLINE, "connect_deadline": 2.0})
    with FaultyProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def stream(url: str, count: int, **config: object) -> list[tuple[list[int], bytes]]:
    data = FieldsData(FieldsConfig(url=url, frames=3, window_shards=2, **config), global_batch=4, seed=3)
    try:
        found = itertools.islice(data.train_dataloader(), count)
        return [(batch["index"].tolist(), batch["fields"].numpy().tobytes()) for batch in found]
    finally:
        data.teardown()


def of_shards(method: str, path: str) -> bool:
    return method == "GET" and "/c/" in path


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("cached", [True, False], ids=["shards", "ranges"])
def test_faults_change_nothing_in_the_data(data, proxy, tmp_path: Path, monkeypatch, fault: str, cached: bool) -> None:
    here, there = data
    monkeypatch.setattr(wire, "SLOWEST", 1 << 20)
    count = 4 if fault in ("hang", "trickle") else 10
    expected = stream(here, count)
    seen: dict[str, int] = {}

    def choose(method: str, path: str, _: int) -> str | None:
        if not of_shards(method, path):
            return None
        seen[path] = seen.get(path, 0) + 1
        return fault if seen[path] == 1 else None  # the first request for each shard

    proxy.fault = choose
    config = {"cache": str(tmp_path)} if cached else {"cache_bytes": 0}
    assert stream(there, count, **config) == expected
    assert sum(name == fault for _, _, name in proxy.requests) >= 2


def test_every_third_request_fails_in_turn(data, proxy, tmp_path: Path, monkeypatch) -> None:
    here, there = data
    monkeypatch.setattr(wire, "SLOWEST", 1 << 20)
    turn = itertools.cycle(("slow_down", "reset", "cut", "hang_up"))
    proxy.fault = lambda method, path, n: next(turn) if n % 3 == 0 else None
    assert stream(there, 20, cache=str(tmp_path)) == stream(here, 20)


@pytest.mark.parametrize("fault", ["slow_down", "reset", "hang", "cut"])
def test_a_store_that_dies_under_a_stream_is_told_within_the_deadline(data, proxy, monkeypatch, fault: str) -> None:
    monkeypatch.setitem(conf, "keel", {"read_timeout": READ_TIMEOUT, "deadline": 1.5, "connect_deadline": 1.0})
    module = FieldsData(
        FieldsConfig(url=data[1], frames=3, window_shards=2, cache_bytes=0, read_ahead=2), global_batch=4, seed=3
    )
    batches = iter(module.train_dataloader())
    next(batches)
    proxy.fault = lambda *_: fault
    began = time.monotonic()
    try:
        with pytest.raises(StoreError) as caught:
            for _ in range(50):
                next(batches)
    finally:
        module.teardown()
    assert isinstance(caught.value, Unreachable) and "\n" not in str(caught.value)
    assert data[1] in str(caught.value) and "check AWS_ENDPOINT_URL and the network" in str(caught.value)
    assert time.monotonic() - began < 10


def test_a_stopped_server_is_told_within_the_deadline(data, s3, monkeypatch) -> None:
    monkeypatch.setitem(conf, "keel", {"read_timeout": READ_TIMEOUT, "deadline": 1.5, "connect_deadline": 1.0})
    with FaultyProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = Store(data[1])
        assert store.read_range("zarr.json", 0, 1) == b"{"
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"refused.*check AWS_ENDPOINT_URL"):
        store.read_range("manifest.json", 5, 9)
    assert time.monotonic() - began < 8


def test_bytes_that_stay_wrong_are_an_error_that_names_the_shard(data, proxy, tmp_path: Path) -> None:
    proxy.fault = lambda method, path, _: "flip" if of_shards(method, path) else None
    for config in ({"cache": str(tmp_path)}, {"cache_bytes": 0}):
        with pytest.raises(DataError, match=r"fields/c/\d.*(corrupt|checksum)"):
            stream(data[1], 1, **config)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "s3fs"])
@pytest.mark.parametrize("level", [None, 1], ids=["plain", "zstd"])
def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(s3, monkeypatch, direct: bool, level: int | None) -> None:
    """Its chunks are intact and the manifest is the old one: only the object's ETag tells."""
    monkeypatch.setitem(conf, "keel", {"direct": direct})
    url = s3.url("replaced")
    write_fields(url, level=level)
    reader, values = fields_reader(url), field_values(10, 7)
    for window in (0, 2):
        batch = reader.batch(np.array([window, 9 + window]))
        assert np.array_equal(batch["fields"].numpy(), values[[0, 3], 2 * window : 2 * window + 3])
    # The first byte range of shard 2 comes after its index (if it has one) and after that was replaced.
    reader.windows.array.plan((6,), 0, 3)
    path = replace_shard(url, 0)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{url}/{path}: was replaced by another object while it was read"):
            reader.batch(np.array([1, 10]))
    if level:
        path = replace_shard(url, 2)
        with pytest.raises(DataError, match=rf"{url}/{path}: was replaced"):
            reader.batch(np.array([18]))
    assert np.array_equal(reader.batch(np.array([10]))["fields"].numpy(), values[[3], 2:5])  # the others are read on


def test_an_object_written_again_with_the_same_content_is_read_on(s3) -> None:
    url = s3.url("again")
    write_fields(url)
    reader = fields_reader(url)
    reader.batch(np.array([0]))
    tags = reader.windows.array.tags
    (key,) = tags
    tags[key] = '"of the same bytes in other parts"'
    assert np.array_equal(reader.batch(np.array([1]))["fields"].numpy(), field_values(10, 7)[[0], 2:5])
    assert tags[key] != '"of the same bytes in other parts"'


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "s3fs"])
def test_ranges_are_asked_for_at_once(s3, proxy, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    monkeypatch.setitem(conf["keel"], "direct", direct)
    monkeypatch.setitem(conf["keel"], "read_timeout", 10.0)
    store, together = Store(s3.url("at-once")), threading.Barrier(8)
    content = bytes(range(256)) * 16
    store.write("x", content)

    def gate(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/x"):
            together.wait(5)  # broken unless all eight are on their way

    proxy.arrived = gate
    assert store.read_ranges([("x", i, i + 9) for i in range(0, 80, 10)]) == [
        content[i : i + 9] for i in range(0, 80, 10)
    ]
    assert not together.broken and sum(method == "GET" for method, _, _ in proxy.requests) == 8


def _read_in_child(store: Store, expected: bytes, queue: multiprocessing.Queue) -> None:
    queue.put(all(store.read_range("x", i, i + 1000) == expected[i : i + 1000] for i in range(50)))


def test_connections_are_not_inherited_over_a_fork(s3, proxy) -> None:
    store = Store(s3.url("forked"))
    content = bytes(range(256)) * 16
    store.write("x", content)
    assert store.read_ranges([("x", i, i + 9) for i in range(8)]) == [content[i : i + 9] for i in range(8)]
    before = proxy.connections
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(store, content, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert all(store.read_range("x", i, i + 1000) == content[i : i + 1000] for i in range(50))
    assert [queue.get(timeout=60) for _ in children] == [True, True]
    for child in children:
        child.join()
    assert proxy.connections >= before + 2  # one at least for each child


def test_a_kept_connection_that_the_server_closed_is_no_fault(s3, proxy) -> None:
    store = Store(s3.url("closed"))
    store.write("x", b"0123456789")
    store.retry.deadline = 0.0  # no retries
    proxy.fault = lambda method, *_: "hang_up" if method == "GET" else None
    for i in range(5):
        assert store.read_range("x", i, i + 2) == b"0123456789"[i : i + 2]
        time.sleep(0.02)


def test_a_clock_that_has_jumped_is_waited_for(s3, proxy) -> None:
    store, left = Store(s3.url("skewed")), [0]
    store.write("x", b"0123456789")

    def skewed(*_: object) -> str | None:
        left[0] -= 1
        return "skewed" if left[0] >= 0 else None

    proxy.fault = skewed
    # The answer to a HEAD cannot say why: a GET is told.
    for refused, call in (
        (1, lambda: store.write("y", b"1")),
        (1, lambda: store.read("x") == b"0123456789"),
        (2, lambda: store.read_range("x", 2, 4) == b"23"),
        (2, lambda: store.size("x") == 10),
        (1, lambda: store.children()[1] == ["x", "y"]),
        (2, lambda: not store.create("x", b"2")),
    ):
        left[0] = refused
        assert call() in (None, True) and left[0] < 0
    store.retry.deadline, left[0] = 0.0, 9
    with pytest.raises(Unreachable, match="x: the store refuses this machine's clock"):
        store.size("x")


def test_a_server_that_takes_no_signed_urls_is_read_through_s3fs(s3, proxy, caplog) -> None:
    store = Store(s3.url("unsigned"))
    store.write("x", b"0123456789")
    forward = proxy._forward
    refusal = b"<Error><Code>AuthorizationQueryParametersError</Code></Error>"
    proxy._forward = lambda request, sent: (  # type: ignore[method-assign]
        (400, [], refusal) if "X-Amz-Signature" in request.path else forward(request, sent)
    )
    assert store.read_ranges([("x", 0, 4), ("x", 5, 9)]) == [b"0123", b"5678"]
    assert "through s3fs, which is slower" in caplog.text and "AuthorizationQueryParametersError" in caplog.text
    caplog.clear()
    assert store.read("x") == b"0123456789" and not caplog.text.count("slower")


@pytest.mark.parametrize(
    ("through", "fault"), [("direct", None), ("direct", "cut"), ("direct", "trickle"), ("s3fs", "cut"), ("local", None)]
)
def test_sinks_get_each_range_in_order_and_from_its_start_after_a_fault(
    s3, proxy, tmp_path: Path, monkeypatch, through: str, fault: str | None
) -> None:
    monkeypatch.setattr(wire, "SINK_PIECE", 1000)
    monkeypatch.setattr(wire, "SLOWEST", 1 << 20)
    store = Store(str(tmp_path)) if through == "local" else Store(s3.url("sinks"), direct=through == "direct")
    content = bytes(range(256)) * 40
    store.write("x", content)
    failed: set[str] = set()

    def choose(method: str, path: str, _: int) -> str | None:
        if method != "GET" or path in failed:
            return None
        failed.add(path)
        return fault

    proxy.fault = choose
    ranges = [("x", 0, 4000), ("x", 17, 17), ("x", 3000, 10240)]
    found: list[bytearray] = [bytearray() for _ in ranges]
    lock = threading.Lock()

    def sink(i: int) -> Sink:
        def take(offset: int, piece: memoryview) -> None:
            with lock:
                if not offset:
                    found[i].clear()
                assert offset == len(found[i])
                found[i] += piece

        return take

    assert store.read_ranges(ranges, [sink(i) for i in range(3)]) == [b""] * 3
    assert [bytes(data) for data in found] == [content[start:end] for _, start, end in ranges]


def test_a_part_of_a_buffer_is_written_without_a_copy_of_its_size(s3, monkeypatch) -> None:
    monkeypatch.setattr(multipart, "PART_BYTES", 5 << 20)
    store, data = Store(s3.url("parts")), np.random.default_rng(0).integers(0, 256, 48 << 20, dtype=np.uint8)
    store.write("small", data[1 : 1 << 20].data)
    tracemalloc.start()
    try:
        store.write("x", data[1:].data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(data) * 3 // 4, "a few parts of 5 MiB"
    assert store.read("x") == data[1:].tobytes() and store.size("small") == (1 << 20) - 1
