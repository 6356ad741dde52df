"""The commands on a real, tiny run: train on two processes, resume on one, evaluate, verify, report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from datamodules.store import Store
from trainer.records import read_record

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = [
    "task.space=[16,16]", "model.modes=[8,8]", "model.width=8", "model.depth=2", "task.eval_rollout_steps=6",
    "train.max_steps=6", "train.val_every=0", "checkpoint.every=3", "schedule.warmup_steps=2", "diagnostics.every=2",
    "log.every=1", "resources.threads=1", "log.progress=false", "data.window_shards=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("data") / "tiny")
    assert (
        cli.main(
            ["data", "make", str(ROOT / "configs/data/tiny_navier_stokes_2d.yaml"), f"url={url}", "--workers", "0"]
        )
        == 0
    )
    return url


def keel(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *words], cwd=ROOT, capture_output=True, text=True, timeout=200
    )


def test_train_resume_evaluate_report(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.records import read_attempts, read_metrics, read_record, read_trace

    url = str(tmp_path / "run")
    done = keel("train", "configs/runs/demo_fno.yaml", f"url={url}", f"data.url={data}", *SMALL)
    assert done.returncode == 0, done.stderr
    done = keel("resume", url, "resources.processes_per_node=1", "train.max_steps=8")
    assert done.returncode == 0, done.stderr
    store = Store(url)
    assert [(a["world_size"], a["resumed_from"]) for a in read_attempts(store)] == [(2, 0), (1, 6)]
    assert [row["step"] for row in read_metrics(store) if "loss" in row] == list(range(1, 9))
    assert {row["step"] for row in read_trace(store)} == set(range(1, 9))
    assert read_record(store)["status"] == "ok"

    # What reads a run needs no processes of its own.
    assert cli.main(["evaluate", url]) == 0
    printed = capsys.readouterr().out
    assert "relative_l2" in printed and "persistence_relative_l2" in printed
    assert "rollout/relative_l2@1" in store.read_json("evaluation.json")["metrics"]
    assert cli.main(["checkpoint", "verify", url]) == 0
    assert cli.main(["checkpoint", "ls", url]) == 0
    assert "step-00000008" in capsys.readouterr().out
    assert cli.main(["report", url]) == 0
    assert "resumed (attempt 2)" in store.read("report.html").decode()


def test_the_language_config_runs(tmp_path: Path) -> None:
    data, url = str(tmp_path / "text"), str(tmp_path / "run")
    assert (
        cli.main(
            ["data", "make", str(ROOT / "configs/data/stdlib_text.yaml"), f"url={data}", "generator.max_bytes=200000"]
        )
        == 0
    )
    quick = [
        "train.max_steps=2",
        "train.val_every=2",
        "data.val_samples=4",
        "schedule.warmup_steps=1",
        "train.global_batch=2",
    ]
    done = keel(
        "train", "configs/runs/demo_lm.yaml", f"url={url}", f"data.url={data}", "resources.processes_per_node=1", *quick
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{url}: ok after 2 steps, loss ")


@pytest.fixture
def launched() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes, and leaves none."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*words: str, **options: Any) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([sys.executable, "-m", "cluster.cli", *words], cwd=ROOT, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.timeout(900)
def test_a_dead_run_is_told_from_a_slow_one_and_ends_when_asked(
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launched: Callable[..., subprocess.Popen[bytes]],
) -> None:
    """A run under `keel train`: stopped, it is stalled; its launcher killed, no worker is left over, and it is dead; resumed,
    it ends by a request in the store, which is the only way to it."""
    monkeypatch.setenv("KEEL_HEARTBEAT_S", "0.3")
    url = str(tmp_path / "run")
    words = ("train", "configs/runs/demo_fno.yaml", f"url={url}", f"data.url={data}")
    launcher = launched(*words, *SMALL, "train.max_steps=100000", "checkpoint.every=3")
    deadline = time.monotonic() + 240
    while not Store(url).exists("checkpoints/step-00000003/COMMITTED"):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)

    def told(state: str) -> dict[str, Any]:
        """What `keel status` says once the run is in that state."""
        deadline = time.monotonic() + 240
        while True:
            capsys.readouterr()
            code = cli.main(["status", url, "--json"])
            said = json.loads(capsys.readouterr().out)
            assert code == int(said["state"] not in ("starting", "running")) and time.monotonic() < deadline, said
            if said["state"] == state:
                return dict(said)
            time.sleep(0.1)

    workers = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    assert len(workers) == 2
    said = told("running")
    assert said["processes"] == 2 and said["attempts"] == 1 and said["commit"]["step"] >= 3 and said["hosts"]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    assert "its launcher lives" in told("stalled")["why"]
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    step = told("running")["step"]
    assert cli.main(["top", url, "--once"]) == 0
    assert "rank" in capsys.readouterr().out
    launcher.kill()
    launcher.wait(30)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/stat").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its launcher"
        time.sleep(0.05)
    assert told("dead")["why"].startswith("no heartbeat for ")
    assert cli.main(["cancel", url]) == 0
    assert "for the case that the run lives" in capsys.readouterr().out

    # The old request is not for the new start.
    again = launched("resume", url, "train.max_steps=200000", stderr=subprocess.PIPE)
    assert told("running")["attempts"] == 2
    assert cli.main(["cancel", url, "--wait"]) == 0
    assert "cancelled" in capsys.readouterr().out.splitlines()[-1]
    _, err = again.communicate(timeout=60)
    assert again.returncode == 130 and err == b""
    record = read_record(Store(url))
    assert record["status"] == "cancelled" and record["steps"] >= step // 3 * 3
    assert Store(url).exists(f"checkpoints/step-{record['steps']:08d}/COMMITTED")
    assert told("cancelled")["step"] == record["steps"]
    assert cli.main(["cancel", url]) == 0 and "has ended before: cancelled" in capsys.readouterr().out


def test_missing_data_is_one_line_and_the_url_can_be_used_again(data: str, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    one = ["train.max_steps=2", "resources.processes_per_node=1", "diagnostics.every=0", "diagnostics.names=[]"]
    train = ["train", "configs/runs/demo_fno.yaml", f"url={url}", *SMALL, *one]
    done = keel(*train, f"data.url={tmp_path}/nowhere")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("keel: error: ")
    assert f"{tmp_path}/nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert keel(*train, f"data.url={data}").returncode == 0


def test_inside_torchrun_the_command_is_the_worker(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    url = str(tmp_path / "run")
    one = ["train.max_steps=2", "resources.processes_per_node=1"]
    done = keel("train", "configs/runs/demo_fno.yaml", f"url={url}", f"data.url={data}", *SMALL, *one)
    assert done.returncode == 0, done.stderr
    assert Store(url).exists("record.jsonl")
