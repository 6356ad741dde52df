"""Claims: of drivers that want the same rows each row goes to one; those of a driver that is gone are free again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.launch.local_backend import started_at
from cluster.sweep.claims import Claims, Lost, running
from datamodules.store import Store
from tests.conftest import S3Server
from tests.helpers.slurm import wait_until


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: object) -> Store:
    if request.param == "disk":
        return Store(f"{tmp_path}/sweep")
    s3: S3Server = request.getfixturevalue("s3")
    return Store(s3.url("sweep"))


def test_each_row_goes_to_one_driver(store: Store) -> None:
    rows = [f"r{i}" for i in range(12)]
    barrier = threading.Barrier(4)
    granted: list[str] = []

    def work(number: int) -> None:
        claims = Claims(store, 60.0)
        claims.open()
        barrier.wait()
        for first in range(0, 12, 3):
            granted.extend(claims.claim(rows[first : first + 3] if number % 2 else rows[first : first + 2]))
        granted.extend(claims.claim(rows))
        barrier.wait()  # whoever closes frees its rows
        claims.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(granted) == sorted(rows)


def test_rows_given_back_and_rows_of_a_closed_driver_are_free(store: Store) -> None:
    first, second = Claims(store, 60.0), Claims(store, 60.0)
    first.open()
    second.open()
    assert first.claim(["a", "b", "c"]) == {"a", "b", "c"}
    assert second.claim(["a", "b", "d"]) == {"d"}
    assert first.held() == second.held() == {"a", "b", "c", "d"}
    first.release(["a"])
    assert second.claim(["a", "b"]) == {"a"}
    assert second.deaths("a") == (0, 0)
    first.close()
    assert second.claim(["b"]) == {"b"} and running(store) == {"a": True, "b": True, "c": False, "d": True}
    second.close()
    assert not any(running(store).values())


def test_a_driver_that_was_killed_is_given_up_at_once(store: Store) -> None:
    code = f"""
import time
from cluster.sweep.claims import Claims
from datamodules.store import Store
claims = Claims(Store({store.url!r}), 60.0)
claims.open()
print(claims.claim(["a", "b"]), claims.claim(["c"]), flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    claims = Claims(store, 60.0)
    claims.open()
    assert claims.claim(["a", "c"]) == set()
    process.kill()
    process.wait()
    assert claims.claim(["a", "c", "d"]) == {"a", "c", "d"}
    assert claims.deaths("a") == (1, 0) and claims.deaths("c") == (1, 1) and claims.deaths("d") == (0, 0)
    claims.close()


def test_a_driver_that_is_silent_is_given_up_and_stops(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"{tmp_path}/sweep")
    stopped, other = Claims(store, 1.0), Claims(store, 1.0)
    stopped._beat()  # once, and then no thread sends any
    other.open()
    assert stopped.claim(["a", "b"]) == {"a", "b"}
    assert other.claim(["a"]) == set()
    wait_until(lambda: other.claim(["a"]), "the silent driver to be given up")
    with pytest.raises(Lost, match="was given up; start it again"):
        stopped.claim(["c"])
    with pytest.raises(Lost):
        stopped.check()
    assert other.claim(["b", "c"]) == {"b", "c"}
    other.close()


def test_a_clock_that_runs_behind_gives_nobody_up(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"{tmp_path}/sweep")
    behind, other = Claims(store, 2.0), Claims(store, 2.0)
    real = time.time
    monkeypatch.setattr("cluster.sweep.claims._machine", lambda: threading.current_thread().name)
    monkeypatch.setattr(
        "cluster.sweep.claims.time.time", lambda: real() - 3600 * ("beat" in threading.current_thread().name)
    )
    behind.open()
    assert behind.claim(["a"]) == {"a"}
    wait_until(lambda: store.read_json(f"owners/{behind.owner}.json")["time"] < real() - 1000, "a heartbeat")
    assert other.claim(["a"]) == set()
    behind.close()


def test_this_process_is_told_from_another_of_its_id() -> None:
    assert started_at(os.getpid()) is not None
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert started_at(process.pid) not in (None, started_at(os.getpid()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert started_at(process.pid) is None
