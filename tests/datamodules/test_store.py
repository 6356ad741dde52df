"""The store on disk, in memory and on S3: one contract, the same tests."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import threading
import time
import uuid

import pytest

from datamodules.store import (
    NoBucket,
    NotFound,
    OutOfSpace,
    ShortRead,
    Store,
    StoreError,
    canonical_json,
    join_url,
    local,
    multipart,
)


@pytest.fixture(params=["path", "file", "memory", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "s3":
        return Store(request.getfixturevalue("s3").url("some/prefix"))
    urls = {"path": str(tmp_path / "a"), "file": f"file://{tmp_path}/a", "memory": f"memory://{uuid.uuid4().hex}/a"}
    return Store(urls[request.param])


def test_write_read_list_delete(store):
    assert store.list() == []
    store.write("b/2", b"two")
    store.write("b/1", bytearray(b"one"))
    store.write("top", memoryview(b"0123456789"))
    store.write("b/1", b"one again")
    assert store.list() == ["b/1", "b/2", "top"]
    assert store.list("b") == store.list("b/") == ["b/1", "b/2"]
    assert store.sub("b").list() == ["1", "2"]
    assert store.read("b/1") == b"one again"
    assert store.size("top") == 10
    assert store.exists("top") and not store.exists("b") and not store.exists("bb")
    store.delete("top")
    store.delete("top")
    assert not store.exists("top")
    store.delete_tree("b")
    assert store.list() == []
    store.delete_tree("b")


def test_what_is_written_is_not_copied_on_its_way(monkeypatch):
    """A checkpoint or shard is large; the last object is a part of another, which botocore does not take as it is."""
    whole, given = bytearray(b"0123456789"), []
    store = Store(f"memory://{uuid.uuid4().hex}/a")
    filesystem = store._client().filesystem
    monkeypatch.setattr(filesystem, "pipe_file", lambda key, data, **_: given.append(data))
    for data in (whole, memoryview(whole), bytes(whole), memoryview(whole)[2:5]):
        store.write("x", data)
    store.create("y", whole)
    assert [data is whole for data in given] == [True, True, False, False, True]
    assert given[2:4] == [b"0123456789", b"234"]


def test_listing_a_prefix_is_by_folder_not_by_letters(store):
    store.write("step-1/x", b"")
    store.write("step-10/x", b"")
    assert store.list("step-1") == ["step-1/x"]
    store.delete_tree("step-1")
    assert store.list() == ["step-10/x"]


def test_the_children_of_a_folder_are_told_without_what_lies_deeper(store):
    assert store.children() == store.children("a") == ([], [])
    for path in ("a/1/x/y", "a/1/z", "a/2", "a/10", "ab/3", "top"):
        store.write(path, b"x")
    assert store.children("a") == store.children("a/") == (["1"], ["10", "2"])
    assert store.children() == (["a", "ab"], ["top"])
    assert store.sub("a").children("1") == (["x"], ["z"])


def test_times_are_those_of_the_store(store):
    before = time.time()
    store.write("a", b"x")
    told = store.times("a")
    if "memory" in store.url:
        assert told is None
        return
    written, now = told
    assert before - 1 <= written <= now <= time.time() + 1
    with pytest.raises(NotFound):
        store.times("b")


def test_new_objects_are_seen_at_once(store):
    for i in range(3):
        store.write(f"x/{i}", b"")
        assert len(store.list("x")) == i + 1
        assert store.exists(f"x/{i}")


def test_ranges_are_exact_and_in_order(store):
    data = bytes(range(256)) * 40
    store.write("a", data)
    store.write("b", data[::-1])
    ranges = [("a", 10, 20), ("b", 0, 1), ("a", 5000, 5000), ("a", 0, len(data)), ("b", 10000, 10240)]
    blobs = {"a": data, "b": data[::-1]}
    assert store.read_ranges(ranges) == [blobs[p][i:j] for p, i, j in ranges]
    assert store.read_range("a", 3, 7) == data[3:7]
    assert store.read_ranges([]) == []


def test_empty_object(store):
    store.write("empty", b"")
    assert store.read("empty") == b"" and store.size("empty") == 0 and store.read_range("empty", 0, 0) == b""


@pytest.mark.parametrize("start,end", [(5, 11), (10, 12), (50, 60)])
def test_range_past_the_end_is_a_short_read(store, start, end):
    store.write("ten", b"0123456789")
    with pytest.raises(ShortRead, match=r"ten: truncated, 10 bytes"):
        store.read_ranges([("ten", 0, 4), ("ten", start, end)])


def test_missing_object_is_named(store):
    store.write("other", b"")
    for operation in (
        lambda: store.read("no/such"),
        lambda: store.size("no/such"),
        lambda: store.read_range("no/such", 0, 1),
    ):
        with pytest.raises(NotFound, match="no/such: not found"):
            operation()


def test_of_several_ranges_the_missing_object_is_named(store):
    store.write("there", b"0123456789")
    with pytest.raises(NotFound, match="gone: not found"):
        store.read_ranges([("there", 0, 4), ("gone", 0, 4), ("there", 4, 8)])


def test_create_only_if_absent(store):
    assert store.create("lock", b"mine") is True
    assert store.create("lock", b"yours") is False
    assert store.read("lock") == b"mine"
    store.delete("lock")
    assert store.create("lock", b"yours") is True
    assert store.list() == ["lock"]


def test_of_racing_creators_one_wins_and_content_is_whole(store):
    for round_ in range(3):
        wins: list[int] = []
        barrier = threading.Barrier(6)

        def claim(
            i: int, path: str = f"claim{round_}", wins: list[int] = wins, barrier: threading.Barrier = barrier
        ) -> None:
            barrier.wait()
            if store.create(path, bytes([i]) * 10000):
                wins.append(i)

        threads = [threading.Thread(target=claim, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert store.read(f"claim{round_}") == bytes([wins[0]]) * 10000


def test_json_is_canonical(store):
    store.write_json("x.json", {"b": [1, 2.5], "a": "é"})
    assert store.read("x.json") == canonical_json({"a": "é", "b": [1, 2.5]})
    assert store.read_json("x.json") == {"a": "é", "b": [1, 2.5]}
    store.write("x.json", b"{")
    with pytest.raises(StoreError, match=r"x\.json: not valid JSON"):
        store.read_json("x.json")
    with pytest.raises(ValueError):
        store.write_json("x.json", float("nan"))


def test_pickled_store_works(store):
    store.write("x", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again.url == store.url and again.read("x") == b"1"


@pytest.mark.parametrize("path", ["/etc/passwd", "a/../b", "s3://bucket/key"])
def test_paths_stay_inside(store, path):
    with pytest.raises(ValueError, match="relative"):
        store.write(path, b"")


def test_join():
    assert join_url("s3://b/p/", "/a/", "", "c") == "s3://b/p/a/c"
    assert join_url("memory://", "a") == "memory://a"
    assert join_url("/", "a", "b") == "/a/b"
    assert Store("s3://b/p").join("a", "b") == "s3://b/p/a/b"
    assert Store("s3://b").sub("p/q").url == "s3://b/p/q"


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("runs/one")
    monkeypatch.chdir("/")
    assert store.url == store.local_path() == str(tmp_path / "runs/one")
    assert store.local_path("a/b") == str(tmp_path / "runs/one/a/b")


def test_odd_names(store):
    for name in ("with space", "a+b=c", "percent%20", "star[1]*", "ü"):
        store.write(f"odd/{name}", name.encode())
        assert store.read(f"odd/{name}") == name.encode()
        assert store.list("odd") == [f"odd/{name}"]
        store.delete_tree("odd")
        assert store.list() == []


def test_bad_urls():
    with pytest.raises(StoreError, match="names no bucket"):
        Store("s3://")
    with pytest.raises(StoreError, match="needs a path or a URL"):
        Store("")
    with pytest.raises(StoreError, match="gibberish://x"):
        Store("gibberish://x").read("y")


def test_missing_bucket_is_named(s3):
    store = Store("s3://keel-no-such-bucket/prefix")
    for operation in (
        lambda: store.read("x"),
        lambda: store.write("x", b""),
        lambda: store.create("x", b""),
        lambda: store.list(),
        lambda: store.read_range("x", 0, 1),
    ):
        with pytest.raises(NoBucket, match="no bucket 'keel-no-such-bucket'"):
            operation()


def _read_in_child(store: Store, queue) -> None:
    queue.put(store.read("x"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_client_is_never_shared_with_a_child_process(s3, method):
    store = Store(s3.url("p"))
    store.write("x", b"content")
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(store, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [b"content"] * 2
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert store.read("x") == b"content"


def test_disk_full_leaves_nothing(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write("x", b"old")
    real, budget = os.write, 3000

    def write(handle: int, data) -> int:
        nonlocal budget
        if budget <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(handle, bytes(data[:budget]))
        budget -= done
        return done

    monkeypatch.setattr(local.os, "write", write)
    for operation in (lambda: store.write("x", b"n" * 9999), lambda: store.create("y", b"n" * 9999)):
        with pytest.raises(OutOfSpace, match=r"no space left.*free space"):
            operation()
    assert os.listdir(tmp_path) == ["x"] and store.read("x") == b"old"


def test_an_interrupted_write_is_invisible(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write("x", b"old")
    monkeypatch.setattr(local.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write("x", b"new")
    assert store.read("x") == b"old" and os.listdir(tmp_path) == ["x"]


def test_a_temporary_file_of_a_killed_writer_is_not_listed(tmp_path):
    store = Store(str(tmp_path))
    store.write("a/x", b"1")
    (tmp_path / "a" / f".y.123{local.TEMPORARY}").write_bytes(b"half")
    assert store.list() == ["a/x"]
    store.sweep()
    assert len(os.listdir(tmp_path / "a")) == 2  # its writer may be alive
    store.sweep(age=-1)
    assert os.listdir(tmp_path / "a") == ["x"]
    store.delete_tree("a")
    assert os.listdir(tmp_path) == []


def pieces(*sizes):
    for number, size in enumerate(sizes):
        yield bytes([number + 1]) * size


def test_an_object_of_pieces_is_written_without_being_held_in_memory(store, monkeypatch):
    monkeypatch.setattr(multipart, "PART_BYTES", 5 << 20)
    sizes, sent = (3, 6 << 20, 0, 100_000, 5 << 20, 7), []
    if store.url.startswith("s3"):
        monkeypatch.setattr(Store, "write", None)
        plain = multipart.parts
        monkeypatch.setattr(multipart, "parts", lambda *a: (sent.append(len(part)) or part for part in plain(*a)))
    store.write_pieces("folder/large", pieces(*sizes), sum(sizes))
    assert store.read("folder/large") == b"".join(pieces(*sizes))
    if store.url.startswith("s3"):
        assert sent == [5 << 20, 5 << 20, sum(sizes) - (10 << 20)]
    monkeypatch.undo()
    store.write_pieces("small", pieces(2, 3), 5)
    assert store.read("small") == b"\x01\x01\x02\x02\x02"


def test_pieces_that_end_in_an_error_leave_what_was_there(store, monkeypatch):
    monkeypatch.setattr(multipart, "PART_BYTES", 5 << 20)
    store.write("kept", b"old")

    def broken():
        yield from pieces(6 << 20, 6 << 20)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        store.write_pieces("kept", broken(), 18 << 20)
    assert store.read("kept") == b"old" and store.list("") == ["kept"]
    if store.url.startswith("s3"):
        bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
        begun = store._client().filesystem.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
        assert not [upload for upload in begun if upload["Key"].startswith(prefix)]
