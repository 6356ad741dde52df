"""A whole run: parity over world sizes and strategies, resume after a fault, divergence, and what it leaves behind."""

import math
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.position import StreamPosition
from datamodules.store import Store
from modules.tasks.base import Task
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import fno_config, lm_config, tiny_fields, tiny_text
from trainer import config as configs
from trainer.callbacks.loggers import Loggers
from trainer.checkpoint import CheckpointError, committed_steps, read_manifest, verify
from trainer.evaluation import evaluate
from trainer.lifecycle import prepare_new, prepare_resume
from trainer.records import read_attempts, read_metrics, read_record, read_trace
from trainer.run import fit


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"fno": tiny_fields(str(folder / "fields")), "lm": tiny_text(str(folder / "text"))}


CONFIG = {"fno": fno_config, "lm": lm_config}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """URL of an undisturbed run of 20 steps, one for each kind, world size and strategy that a test asks for."""
    done: dict[tuple[str, int, str], str] = {}

    def run(kind: str, world: int = 1, strategy: str = "fsdp") -> str:
        key = (kind, world, strategy)
        if key not in done:
            done[key] = str(tmp_path_factory.mktemp("whole") / "run")
            run_distributed(train, world, make(kind, done[key], data, *resources(world, strategy), **RUN))
        return done[key]

    return run


# Validation and saves coincide on steps 4, 8, ...
RUN = {"max_steps": 20, "val_every": 4}


def resources(world: int, strategy: str) -> list[str]:
    return [f"strategy.name={strategy}", f"resources.processes_per_node={world}"]


def make(kind: str, url: str, data: dict[str, str], *overrides: str, **train: Any) -> configs.RunConfig:
    config = configs.load(CONFIG[kind](url, data[kind], **train), overrides)
    prepare_new(config)
    return config


def train(
    config: configs.RunConfig, resume: bool = False, fail_at: int = 0, in_validation: bool = False
) -> dict[str, Any] | str:
    """Worker function; `fail_at`: raise in the middle of that step, or of the validation after it, as a crash would."""
    torch.set_num_threads(1)
    if in_validation:
        Task.on_validation_epoch_start = killed  # type: ignore[method-assign]
        try:
            return fit(config, resume=resume)
        except RuntimeError as error:
            return str(error)
    if fail_at:
        advance = StreamPosition.on_train_batch_end

        def crash(self: StreamPosition, trainer: Any, *arguments: Any) -> None:
            advance(self, trainer, *arguments)
            if trainer.global_step >= fail_at:
                raise RuntimeError("crash")

        StreamPosition.on_train_batch_end = crash  # type: ignore[method-assign]
        try:
            fit(config, resume=resume)
        except RuntimeError as error:
            return str(error)
        finally:
            StreamPosition.on_train_batch_end = advance  # type: ignore[method-assign]
    return fit(config, resume=resume)


def killed(self: Task) -> None:
    raise RuntimeError("killed")


def losses(url: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(Store(url)) if "loss" in row}


def samples(url: str) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row in read_trace(Store(url)):
        found.setdefault(row["step"], []).extend(row["index"])
    return found


@pytest.mark.parametrize(("kind", "strategy", "micro"), [("fno", "fsdp", 0), ("lm", "fsdp", 1), ("lm", "ddp", 0)])
def test_two_processes_equal_one(tmp_path, data, whole, kind, strategy, micro):
    one, two = whole(kind), str(tmp_path / "two")
    config = make(kind, two, data, *resources(2, strategy), **RUN, micro_batch=micro)
    run_distributed(train, 2, config)
    a, b = losses(one), losses(two)
    assert list(a) == list(range(1, 21))
    np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=0, atol=1e-5)
    assert samples(one) == samples(two)
    norms = [
        [r["diag/gradients/norm"] for r in read_metrics(Store(url)) if "diag/gradients/norm" in r] for url in (one, two)
    ]
    assert len(norms[0]) == 5
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [("fno", (2, "fsdp"), (2, "fsdp")), ("fno", (2, "fsdp"), (1, "ddp")), ("lm", (1, "ddp"), (2, "fsdp"))],
)
def test_a_crashed_run_continues_without_losing_or_repeating_a_sample(tmp_path, data, whole, kind, first, second):
    undisturbed, broken = whole(kind, *first), str(tmp_path / "broken")
    config = make(kind, broken, data, *resources(*first), **RUN)
    assert run_distributed(train, first[0], config, False, 11) == ["crash"] * first[0]
    assert read_record(Store(broken))["status"] == "failed"
    assert committed_steps(Store(broken).sub("checkpoints")) == [4, 8]
    run_distributed(train, second[0], prepare_resume(broken, resources(*second)), True)
    assert read_record(Store(broken))["status"] == "ok"
    assert [row["resumed_from"] for row in read_attempts(Store(broken))] == [0, 8]
    assert samples(broken) == samples(undisturbed)
    a, b = losses(undisturbed), losses(broken)
    assert list(b) == list(range(1, 21))
    np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=0, atol=0 if first == second else 1e-5)
    rates = [[r["lr"] for r in read_metrics(Store(url)) if "lr" in r] for url in (undisturbed, broken)]
    assert rates[0] == rates[1]
    held_out = [[r for r in read_metrics(Store(url)) if "val/loss" in r] for url in (undisturbed, broken)]
    assert [r["step"] for r in held_out[1]] == [4, 8, 12, 16, 20]
    for x, y in zip(*held_out, strict=True):
        assert x["val/loss"] == pytest.approx(y["val/loss"], abs=0 if first == second else 1e-5)


def test_a_validation_that_was_killed_is_made_up_for(tmp_path, data, whole):
    broken = str(tmp_path / "broken")
    config = make("fno", broken, data, **RUN)
    assert run_distributed(train, 1, config, False, 4, True) == ["killed"]
    assert committed_steps(Store(broken).sub("checkpoints")) == [4]
    run_distributed(train, 1, config, True)
    rows = [[r for r in read_metrics(Store(url)) if "val/loss" in r] for url in (whole("fno"), broken)]
    assert [r["step"] for r in rows[1]] == [4, 8, 12, 16, 20]
    assert [r["val/loss"] for r in rows[0]] == [r["val/loss"] for r in rows[1]]
    assert losses(whole("fno")) == losses(broken) and samples(whole("fno")) == samples(broken)


def test_a_signal_lets_no_validation_come_before_the_save(tmp_path, data, whole):
    url = str(tmp_path / "run")
    ((first, second),) = run_distributed(told, 1, make("fno", url, data, **RUN), 8)
    assert (first["status"], first["steps"], first["validated"]) == ("preempted", 8, [4])
    assert first["metrics"] and second["status"] == "ok"
    assert first["closed_after"] == {"record.jsonl": True, "metrics.csv": False}, "what matters comes first"
    rows = [[r for r in read_metrics(Store(url)) if "val/loss" in r] for url in (whole("fno"), url)]
    assert [r["step"] for r in rows[1]] == [4, 8, 12, 16, 20]  # made up for
    assert [r["val/loss"] for r in rows[0]] == [r["val/loss"] for r in rows[1]]
    assert losses(whole("fno")) == losses(url) and samples(whole("fno")) == samples(url)
    assert second["metrics"] == read_record(Store(whole("fno")))["metrics"]


def test_the_metrics_of_a_run_are_those_of_its_last_validation(tmp_path, data):
    """Also where an attempt that has died made it."""
    url = str(tmp_path / "run")
    config = make("fno", url, data, "checkpoint.every=5", max_steps=6, val_every=4)
    ((first, second),) = run_distributed(told, 1, config, 5)
    assert (first["status"], second["status"], second["steps"]) == ("preempted", "ok", 6)
    assert second["metrics"] == first["metrics"] and "val/loss" in first["metrics"]


def told(config: configs.RunConfig, step: int) -> list[dict[str, Any]]:
    """Worker function: a signal comes in that step, after which a validation is due; then the run goes on."""
    advance = StreamPosition.on_train_batch_end

    def tells(self: StreamPosition, trainer: Any, *arguments: Any) -> None:
        advance(self, trainer, *arguments)
        if trainer.global_step == step:
            signal.raise_signal(signal.SIGTERM)

    StreamPosition.on_train_batch_end = tells  # type: ignore[method-assign]
    closed_after, close = {}, Loggers.close

    def noted(self: Loggers, seconds: float = 60.0) -> None:
        closed_after.update({name: Store(config.url).exists(name) for name in ("record.jsonl", "metrics.csv")})
        close(self, seconds)

    Loggers.close = noted  # type: ignore[method-assign]
    first = fit(config)
    Loggers.close = close  # type: ignore[method-assign]
    first["closed_after"] = closed_after
    first["validated"] = [row["step"] for row in read_metrics(Store(config.url)) if "val/loss" in row]
    StreamPosition.on_train_batch_end = advance  # type: ignore[method-assign]
    return [first, fit(config, resume=True)]


def test_damaged_checkpoints_are_fallen_back_from_and_written_again(tmp_path, data, whole):
    broken = str(tmp_path / "broken")
    config = make("fno", broken, data, *resources(2, "fsdp"), "checkpoint.keep_last=3", **RUN)
    assert run_distributed(train, 2, config, False, 14) == ["crash", "crash"]
    checkpoints = Store(broken).sub("checkpoints")
    assert committed_steps(checkpoints) == [4, 8, 12]
    os.truncate(tmp_path / "broken" / "checkpoints" / "step-00000012" / "writer-0001-rank-00000-000.bin", 100)
    path = tmp_path / "broken" / "checkpoints" / "step-00000008" / "writer-0001-rank-00001-000.bin"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1  # found only when it is read
    path.write_bytes(raw)
    run_distributed(train, 2, prepare_resume(broken, ["checkpoint.keep_last=4"]), True)
    assert [row["resumed_from"] for row in read_attempts(Store(broken))] == [0, 4]
    assert committed_steps(checkpoints) == [8, 12, 16, 20]
    assert not any(verify(checkpoints, step) for step in (8, 12, 16, 20))
    reference = whole("fno", 2, "fsdp")
    assert samples(broken) == samples(reference) and losses(broken) == losses(reference)


def test_a_finished_run_keeps_its_record(tmp_path, data):
    url = str(tmp_path / "run")
    (record,) = run_distributed(train, 1, make("fno", url, data))
    assert run_distributed(train, 1, prepare_resume(url, []), True) == [record]
    assert read_record(Store(url)) == record and len(read_attempts(Store(url))) == 1


@pytest.mark.parametrize(
    ("signum", "code", "status"),
    [("SIGTERM", 75, "preempted"), ("SIGUSR1", 75, "preempted"), ("SIGINT", 130, "interrupted")],
)
def test_a_signal_to_one_of_two_ranks_ends_all_with_a_save(tmp_path, data, signum, code, status):
    """Real workers under the real launcher; then the run continues bitwise."""
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    two = "resources.processes_per_node=2"
    for url in (whole, stopped):
        make("lm", url, data, two, "checkpoint.every=25", max_steps=150, val_every=60)
    command = [sys.executable, "-m", "cluster.cli", "resume", stopped]
    launcher = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoints = Store(stopped).sub("checkpoints")
    deadline = time.monotonic() + 90
    while not committed_steps(checkpoints) and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    (worker,) = [pid for pid in children(launcher.pid) if "RANK=1" in environ(pid)]
    os.kill(worker, getattr(signal, signum))
    assert launcher.wait(90) == code
    record = read_record(Store(stopped))
    assert record["status"] == status and 25 <= record["steps"] < 150
    assert committed_steps(checkpoints)[-1] == record["steps"]
    validated = [row["step"] for row in read_metrics(Store(stopped)) if "val/loss" in row]
    assert record["steps"] not in validated and all(step % 60 == 0 for step in validated)
    if signum == "SIGTERM":
        for url in (whole, stopped):
            run_distributed(train, 2, prepare_resume(url, []), True)
        assert losses(stopped) == losses(whole) and samples(stopped) == samples(whole)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def environ(pid: int) -> list[str]:
    with open(f"/proc/{pid}/environ") as file:
        return file.read().split("\0")


def test_resume_with_another_micro_batch_keeps_the_steps(tmp_path, data, whole):
    broken = str(tmp_path / "broken")
    run_distributed(train, 1, make("lm", broken, data, **RUN), False, 6)
    run_distributed(train, 1, prepare_resume(broken, ["train.micro_batch=1"]), True)
    assert samples(broken) == samples(whole("lm"))
    np.testing.assert_allclose(list(losses(broken).values()), list(losses(whole("lm")).values()), rtol=0, atol=1e-5)


def test_a_diverged_run_is_a_result(tmp_path, data):
    url = str(tmp_path / "run")
    config = make("lm", url, data, "optim.lr=1e30", "train.grad_clip=0", "schedule.warmup_steps=0", max_steps=40)
    (record,) = run_distributed(train, 1, config)
    assert record["status"] == "diverged" and record["diverged_step"] <= 12 and record["steps"] < 40
    assert any(row.get("event") == "diverged" for row in read_metrics(Store(url)))
    for step in committed_steps(Store(url).sub("checkpoints")):
        assert step < record["diverged_step"]


def test_a_run_leaves_a_record_a_manifest_and_an_evaluation(tmp_path, data):
    url = str(tmp_path / "run")
    (record,) = run_distributed(train, 1, make("fno", url, data, val_every=4))
    assert record == read_record(Store(url))
    assert record["status"] == "ok" and record["steps"] == 8 and record["samples"] == 32 and record["flops"] > 0
    assert record["config"]["model"]["name"] == "fno" and record["metrics"]["val/relative_l2"] > 0
    manifest = read_manifest(Store(url).sub("checkpoints"), 8)
    assert manifest["stream"]["position"] == 32 and manifest["stream"]["fingerprint"] == record["dataset"]
    assert manifest["config"] == record["config"] and manifest["code"]["torch"] == torch.__version__
    result = evaluate(url)
    assert result["samples"] == 4 and result["step"] == 8
    assert math.isfinite(result["metrics"]["rollout_relative_l2"])
    with np.load(tmp_path / "run" / "evaluation.npz") as arrays:
        assert arrays["prediction"].shape == arrays["truth"].shape == (4, 1, 16, 16)
        np.testing.assert_allclose(arrays["error"], arrays["prediction"] - arrays["truth"], atol=1e-6)
    before = (tmp_path / "run" / "evaluation.json").read_bytes()
    finer = tiny_fields(str(tmp_path / "finer"), size=32, frames=11)
    changes = [
        f"data.url={finer}",
        "task.space=[32,32]",
        "data.dt_stride=2",
        "data.stride=2",
    ]  # they drift a point per frame
    zero_shot = evaluate(url, changes)
    assert zero_shot["overrides"] == changes and zero_shot["samples"] == 4
    # The waves hold three wave numbers: an operator sees the same fields on both grids.
    assert math.isclose(zero_shot["metrics"]["relative_l2"], result["metrics"]["relative_l2"], rel_tol=0.02)
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == before
    assert len(list((tmp_path / "run").glob("evaluation-*.json"))) == 1
    with pytest.raises(configs.ConfigError, match=r"model\.width=8: an evaluation may change data\.\* and task\.\*"):
        evaluate(url, ["model.width=8"])
    with pytest.raises(CheckpointError, match=r"step-00000008 has no averaged weights: its run had train.ema_decay=0"):
        evaluate(url, ema=True)


def test_a_killed_process_resumes_bitwise(tmp_path, data):
    """A real SIGKILL of a real worker process, at whatever it is doing after its first commit."""
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for url in (whole, killed):
        make("fno", url, data, max_steps=60)
    command = [sys.executable, "-m", "trainer", "fit"]
    subprocess.run([*command, whole], check=True, env=environment, timeout=120)
    worker = subprocess.Popen([*command, killed], env=environment)
    checkpoints = Store(killed).sub("checkpoints")
    deadline = time.monotonic() + 90
    while not committed_steps(checkpoints) and worker.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    subprocess.run([*command, killed, "--resume"], check=True, env=environment, timeout=120)
    assert losses(killed) == losses(whole)
    assert samples(killed) == samples(whole)


def test_new_and_resume_refuse_what_would_mix_runs(tmp_path, data):
    url = str(tmp_path / "run")
    config = make("fno", url, data)
    run_distributed(train, 1, config)
    with pytest.raises(configs.ConfigError, match=r"a run exists at .*keel resume"):
        prepare_new(config)
    with pytest.raises(configs.ConfigError, match=r"optim\.lr cannot change on resume"):
        prepare_resume(url, ["optim.lr=1"])
    with pytest.raises(configs.ConfigError, match="no run at"):
        prepare_resume(str(tmp_path / "other"), [])
    assert prepare_resume(url, ["train.max_steps=9"]).train.max_steps == 9
    assert configs.load(url + "/config.yaml").train.max_steps == 9


def test_a_run_that_failed_before_its_first_commit_may_be_started_again(tmp_path, data):
    url = str(tmp_path / "run")
    config = make("fno", url, data)
    assert run_distributed(train, 1, config, False, 2) == ["crash"]
    prepare_new(config)
    assert run_distributed(train, 1, config, False, 6) == ["crash"]
    with pytest.raises(configs.ConfigError, match="a run exists"):
        prepare_new(config)
    url = str(tmp_path / "live")
    config = make("fno", url, data)
    Store(url).write("attempts/0001.json", b'{"attempt": 1, "resumed_from": 0}')
    with pytest.raises(configs.ConfigError, match="a run exists"):
        prepare_new(config)
