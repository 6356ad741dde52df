"""The store on Ceph's radosgw: the whole contract with real authentication, real conditions and real ranges."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from datamodules.store import AccessDenied, NoBucket, NotFound, ShortRead, Store, StoreError
from datamodules.store.client import Client
from tests.conftest import CephServer


def held(store: Store) -> Client:
    return store._client()


@pytest.fixture
def store(ceph: CephServer) -> Store:
    return Store(ceph.url("some/prefix"))


def test_write_read_list_delete(store: Store) -> None:
    assert store.list() == []
    for path, content in (("b/2", b"two"), ("b/1", b"one"), ("top", b"0123456789"), ("odd/ü a+b=c%20[1]*", b"odd")):
        store.write(path, content)
    store.write("b/1", b"one again")
    assert store.list() == ["b/1", "b/2", "odd/ü a+b=c%20[1]*", "top"]
    assert store.read("b/1") == b"one again" and store.read("odd/ü a+b=c%20[1]*") == b"odd"
    assert store.size("top") == 10 and store.exists("top") and not store.exists("b")
    with pytest.raises(NotFound, match="no/such: not found"):
        store.read("no/such")
    store.delete("top")
    store.delete_tree("b")
    assert store.list() == ["odd/ü a+b=c%20[1]*"]
    assert held(store).direct is not None  # the fast reads were used and not refused


@pytest.mark.parametrize("direct", [True, False])
def test_ranges(ceph: CephServer, direct: bool) -> None:
    store = Store(ceph.url("ranges"), direct=direct)
    data = bytes(range(256)) * 20000  # more than one piece of an answer
    store.write("a", data)
    store.write("b", data[::-1])
    store.write("empty", b"")
    wanted = [("a", i * 70000, i * 70000 + 66000) for i in range(70)]
    wanted += [("b", 0, 1), ("a", 5, 5), ("b", 0, len(data)), ("a", 1 << 20, 1 << 21)]
    blobs = {"a": data, "b": data[::-1]}
    assert store.read_ranges(wanted) == [blobs[path][start:end] for path, start, end in wanted]
    assert store.read("a") == data and store.read("empty") == b""
    for start, end in ((len(data) - 1, len(data) + 1), (len(data) + 5, len(data) + 9)):
        with pytest.raises(ShortRead, match=f"a: truncated, {len(data)} bytes"):
            store.read_range("a", start, end)
    with pytest.raises(NotFound, match="gone: not found"):
        store.read_ranges([("a", 0, 4), ("gone", 0, 4)])
    assert (held(store).direct is not None) is direct


def test_an_object_of_several_parts(ceph: CephServer) -> None:
    """s3fs uploads large objects in parts."""
    store = Store(ceph.url("parts"))
    data = bytes(1 << 20) * 51
    store.write("large", data)
    assert store.size("large") == len(data) and store.read("large") == data


def test_of_eight_racing_writers_one_wins(ceph: CephServer) -> None:
    url = ceph.url("race")
    # Options differ, so that each writer has a client of its own.
    stores = [Store(url, concurrency=10 + i) for i in range(8)]
    for round_ in range(5):
        wins: list[int] = []
        barrier = threading.Barrier(8)

        def claim(i: int, path: str, wins: list[int], barrier: threading.Barrier) -> None:
            barrier.wait()
            if stores[i].create(path, f"writer {i}".encode() * 1000):
                wins.append(i)

        threads = [threading.Thread(target=claim, args=(i, f"claim{round_}", wins, barrier)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert stores[0].read(f"claim{round_}") == f"writer {wins[0]}".encode() * 1000
    assert not stores[0].create("claim0", b"late")
    assert any(held(store).conditional.get("keel") for store in stores)


def one_line(error: pytest.ExceptionInfo[StoreError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


OPERATIONS: list[tuple[str, Any]] = [
    ("read", lambda store: store.read("x")),
    ("range", lambda store: store.read_range("x", 0, 1)),
    ("write", lambda store: store.write("x", b"")),
    ("create", lambda store: store.create("x", b"")),
    ("list", lambda store: store.list()),
]


@pytest.mark.parametrize("operation", [run for _, run in OPERATIONS], ids=[name for name, _ in OPERATIONS])
def test_wrong_secret_and_missing_bucket_are_told(ceph: CephServer, operation: Any) -> None:
    url = ceph.url("denied")
    Store(url).write("x", b"1")
    with pytest.raises(AccessDenied, match="access denied") as error:
        operation(Store(url, **{**ceph.options(), "secret": "wrong"}))
    assert url in one_line(error) and "AWS_SECRET_ACCESS_KEY" in one_line(error)
    with pytest.raises(NoBucket, match="no bucket 'keel-no-such-bucket'") as missing:
        operation(Store("s3://keel-no-such-bucket/p"))
    one_line(missing)


def test_an_anonymous_bucket(ceph: CephServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = ceph.url("public")
    store = Store(url)
    store.write("x", b"for all")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    anonymous = Store(url, anon=True)
    with pytest.raises(AccessDenied, match="access denied"):
        anonymous.read("x")
    statement = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": ["arn:aws:s3:::keel", "arn:aws:s3:::keel/*"],
    }
    owner = Store(url, **ceph.options())
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    held(owner).filesystem.call_s3("put_bucket_policy", Bucket="keel", Policy=policy)
    try:
        assert anonymous.read("x") == b"for all" and anonymous.read_range("x", 4, 7) == b"all"
        assert anonymous.list() == ["x"]
        with pytest.raises(AccessDenied):
            anonymous.write("y", b"")
    finally:
        held(owner).filesystem.call_s3("delete_bucket_policy", Bucket="keel")


def test_path_style_and_options_in_place_of_the_environment(ceph: CephServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = ceph.url("styled")
    for name in ceph.environment:
        monkeypatch.delenv(name, raising=False)
    store = Store(url, **ceph.options())
    store.write("x", b"1")
    assert store.read("x") == b"1"
    signed = held(store).filesystem.url(f"{url.removeprefix('s3://')}/x")
    assert signed.startswith(f"{ceph.endpoint}/keel/")  # 127.0.0.1 has no names of buckets below it


def test_a_url_signed_with_old_credentials_is_signed_again(ceph: CephServer) -> None:
    store = Store(ceph.url("resigned"), concurrency=3)
    store.write("x", b"content")
    assert store.read("x") == b"content"
    direct = held(store).direct
    assert direct is not None
    with direct._lock:
        for key, (made, url) in direct._urls.items():
            direct._urls[key] = made, url._replace(query=url.query.replace("X-Amz-Signature=", "X-Amz-Signature=0"))
    assert store.read("x") == b"content"  # through s3fs ...
    assert held(store).direct is direct and store.read("x") == b"content"  # ... and then directly again
