"""The local launcher, with small workers in place of the trainer: exit codes, environment, signals, no orphans."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cluster.launch import Job, available_cores, launch
from cluster.launch.budget import Budget
from cluster.launch.local import first_failure

# Stands in for `python -m trainer`: writes its environment, then does what its argument says.
WORKER = """
import json, os, signal, sys, time
out, action = sys.argv[1], sys.argv[2]
rank = int(os.environ["RANK"])
if action == "guarded":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
keys = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "KEEL_PARENT_PID", "MASTER_PORT", "EXTRA"]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
with open(f"{out}/{rank}.json.tmp", "w") as file:
    json.dump({**{key: os.environ.get(key) for key in keys}, "pid": os.getpid(), "ppid": os.getppid()}, file)
os.rename(f"{out}/{rank}.json.tmp", f"{out}/{rank}.json")
print(f"hello from {rank}")
if action == "user" and rank == 1:
    print("keel: error: model.width=0: must be positive", file=sys.stderr)
    sys.exit(2)
if action == "crash" and rank == 1:
    raise RuntimeError("boom")
if action == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if action in ("wait", "guarded"):
    while not stopped:
        time.sleep(0.02)
    sys.exit(75)
if action in ("user", "crash", "killed"):
    while not stopped:
        time.sleep(0.02)
    sys.exit(1)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "keel_test_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # The logs of ranks that failed are kept; here, where pytest removes them.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return "keel_test_worker"


def environments(folder: Path, count: int) -> list[dict]:
    import json

    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def wait_for(folder: Path, count: int, timeout: float = 60.0) -> list[dict]:
    deadline = time.monotonic() + timeout
    while len(list(folder.glob("*.json"))) < count:
        assert time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.05)
    return environments(folder, count)


@pytest.mark.parametrize("processes", [1, 2])
def test_workers_get_ranks_threads_and_their_parent(processes: int, worker: str, tmp_path: Path, capfd) -> None:
    job = Job((worker, str(tmp_path), "ok"), processes=processes, env={"EXTRA": "yes"})
    assert launch(job) == 0
    seen = environments(tmp_path, processes)
    assert [env["RANK"] for env in seen] == [str(rank) for rank in range(processes)]
    for env in seen:
        assert env["WORLD_SIZE"] == str(processes)
        assert env["EXTRA"] == "yes"
        assert env["OMP_NUM_THREADS"] == str(max(1, available_cores() // processes))
        assert int(env["KEEL_PARENT_PID"]) == env["ppid"] == os.getpid()
    assert "KEEL_PARENT_PID" not in os.environ
    printed = capfd.readouterr()
    assert printed.out == "hello from 0\n"
    assert printed.err == ""


@pytest.mark.parametrize(
    ("action", "code", "message"),
    [
        ("user", 2, "keel: error: model.width=0: must be positive\n"),
        ("crash", 1, "keel: error: rank 1 failed with exit code 1: RuntimeError: boom (log: "),
        ("killed", 137, "keel: error: rank 1 was killed by SIGKILL"),
    ],
)
def test_a_failing_rank_ends_the_job_in_one_line(
    action: str, code: int, message: str, worker: str, tmp_path: Path, capfd
) -> None:
    assert launch(Job((worker, str(tmp_path), action), processes=2, threads=1)) == code
    error = capfd.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_reaches_the_workers_and_their_exit_code_comes_back(
    processes: int, worker: str, tmp_path: Path
) -> None:
    launcher = _launch_in_background(worker, tmp_path, "wait", processes)
    wait_for(tmp_path, processes)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 75


def test_no_worker_outlives_a_killed_launcher(worker: str, tmp_path: Path) -> None:
    launcher = _launch_in_background(worker, tmp_path, "guarded", 2)
    pids = [env["pid"] for env in wait_for(tmp_path, 2)]
    launcher.kill()
    launcher.wait(60)
    deadline = time.monotonic() + 20
    while any(_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its launcher"
        time.sleep(0.05)


def test_time_limit_stops_the_workers_like_a_preemption(worker: str, tmp_path: Path) -> None:
    # Long enough for the worker to have set its handler.
    assert launch(Job((worker, str(tmp_path), "wait"), timeout_s=2.0)) == 75


def test_the_cause_is_told_from_its_consequences() -> None:
    assert first_failure({0: (1, 10), 1: (-9, 10)}) == (1, -9)  # rank 0 lost its peer
    assert first_failure({0: (-15, 11), 1: (1, 10)}) == (1, 1)  # rank 0 was stopped by the agent
    assert first_failure({0: (1, 10), 1: (-9, 40)}) == (0, 1)  # rank 1 hung and was killed much later
    assert first_failure({1: (1, 10), 0: (1, 10)}) == (1, 1)  # rank 1 was noticed first
    assert first_failure({0: (75, 10), 1: (75, 10)}) == (0, 75)
    assert first_failure({0: (1, 10), 1: (75, 10)}) == (1, 75)  # rank 0 lost one that was told to end as it started
    assert first_failure({0: (1, 10), 1: (69, 10)}) == (1, 69)  # rank 0 lost one whose store was away
    assert first_failure({0: (69, 10), 1: (2, 10)}) == (1, 2)
    assert first_failure({0: (2, 10), 1: (1, 10)}) == (0, 2)
    assert first_failure({1: (-9, 11), 0: (76, 10)}) == (0, 76)  # rank 1 was stopped, and killed after the others hung


@pytest.mark.parametrize("arguments", [{"args": ()}, {"args": ("a",), "processes": 0}, {"args": ("a",), "threads": -1}])
def test_impossible_jobs_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"args|processes|threads"):
        Job(**arguments)


def _launch_in_background(worker: str, folder: Path, action: str, processes: int) -> subprocess.Popen:
    job = f"Job(({worker!r}, {str(folder)!r}, {action!r}), processes={processes})"
    code = f"import sys; from cluster.launch import Job, launch; sys.exit(launch({job}))"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# Does what its second argument says on the first start, and nothing but note each start.
RESTARTED = """
import json, os, signal, sys, time
out, action, rank = sys.argv[1], sys.argv[2], int(os.environ["RANK"])
start = int(os.environ["KEEL_RESTARTS"])
ends = {"hung": 76, "away": 69}
with open(f"{out}/start-{start}-{rank}.json", "w") as file:
    json.dump([start, os.environ["KEEL_RESTART_CAUSE"], os.environ.get("TORCHELASTIC_RESTART_COUNT", str(start))], file)
if start < 2 or action == "always":
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        time.sleep(0.2)
        os._exit(ends[action]) if action in ends else os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank that waits for the dead one
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("processes", "action", "cause"),
    [
        (1, "killed", "the worker was killed by SIGKILL"),
        (1, "hung", "the worker hung"),
        (1, "away", "the worker could not reach its store"),
        (2, "killed", "rank 1 was kil"),
    ],
)
def test_killed_and_hung_workers_are_started_again(
    processes: int, action: str, cause: str, worker: str, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keel_restarted.py").write_text(RESTARTED)
    monkeypatch.setattr("cluster.launch.agent._STOP_S", 0.5)
    job = Job(("keel_restarted", str(tmp_path), action), processes=processes, max_restarts=3, restart_wait_s=0.01)
    assert launch(job) == 0
    import json

    for rank in range(processes):
        starts = [json.loads((tmp_path / f"start-{n}-{rank}.json").read_text()) for n in range(3)]
        assert [start[0] for start in starts] == [0, 1, 2] and not (tmp_path / f"start-3-{rank}.json").exists()
        assert starts[0][1] == "" and starts[1][1].startswith(cause)
        assert [start[2] for start in starts] == ["0", "1", "2"]
    assert "KEEL_RESTARTS" not in os.environ
    error = capfd.readouterr().err
    assert error.count("starting again from the last commit") == 2 and error.count("\n") == 2


def test_restarts_end_after_their_number_and_bad_input_is_not_tried_again(
    worker: str, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keel_restarted.py").write_text(RESTARTED)
    job = Job(("keel_restarted", str(tmp_path), "always"), max_restarts=2, restart_wait_s=0.01)
    assert launch(job) == 137
    assert sorted(path.name for path in tmp_path.glob("start-*")) == [f"start-{n}-0.json" for n in range(3)]
    assert "restart 2 of 2 without a new commit" in capfd.readouterr().err
    assert launch(Job((worker, str(tmp_path), "user"), processes=2, threads=1, max_restarts=2)) == 2
    assert "starting again" not in capfd.readouterr().err
    with pytest.raises(ValueError, match="max_restarts=-1"):
        Job(("x",), max_restarts=-1)


def test_progress_gives_the_restarts_back(worker: str, tmp_path: Path) -> None:
    """Three failures with a commit before each are survived with one restart; the next one has none before it."""
    (tmp_path / "keel_restarted.py").write_text(RESTARTED)
    asked = itertools.count(1)
    job = Job(
        ("keel_restarted", str(tmp_path), "always"),
        max_restarts=1,
        restart_wait_s=0.01,
        progress=lambda: min(next(asked), 3),
    )
    assert launch(job) == 137
    assert sorted(path.name for path in tmp_path.glob("start-*")) == [f"start-{n}-0.json" for n in range(4)]


def test_a_store_that_is_away_gives_no_restart_back() -> None:
    commits = iter([5, ConnectionError("away"), 5, 4, 6])  # 4: the run went back

    def newest() -> int:
        found = next(commits)
        if isinstance(found, Exception):
            raise found
        return found

    budget = Budget(3, newest)
    assert [budget.used(count) for count in range(2, 7)] == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(("processes", "name"), [(1, "SIGTERM"), (2, "SIGUSR1")])
def test_a_worker_told_to_end_before_it_could_take_note_is_a_requeue(
    processes: int, name: str, worker: str, tmp_path: Path, capfd
) -> None:
    (tmp_path / "keel_early.py").write_text(
        "import os, signal, time\n"
        f"os.kill(os.getpid(), signal.{name}) if os.environ['RANK'] == '0' else time.sleep(60)\n"
    )
    assert launch(Job(("keel_early",), processes=processes, max_restarts=3)) == 75
    assert capfd.readouterr().err == ""


def test_a_job_told_to_end_between_two_starts_is_a_requeue(worker: str, tmp_path: Path) -> None:
    (tmp_path / "keel_restarted.py").write_text(RESTARTED)
    job = f"Job(('keel_restarted', {str(tmp_path)!r}, 'always'), max_restarts=3, restart_wait_s=50)"
    code = f"import sys; from cluster.launch import Job, launch; sys.exit(launch({job}))"
    launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert launcher.stderr is not None and "starting again" in launcher.stderr.readline()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 75
    assert [path.name for path in tmp_path.glob("start-*")] == ["start-0-0.json"]
