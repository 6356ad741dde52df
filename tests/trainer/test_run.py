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

from datamodules.store import Store
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import fno_config, lm_config, tiny_fields, tiny_text
from trainer import config as configs
from trainer.callbacks.stream import StreamPosition
from trainer.checkpoint import committed_steps, read_manifest
from trainer.evaluation import evaluate
from trainer.lifecycle import prepare_new, prepare_resume
from trainer.records import read_attempts, read_metrics, read_record, read_trace
from trainer.run import fit


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"fno": tiny_fields(str(folder / "fields")), "lm": tiny_text(str(folder / "text"))}


CONFIG = {"fno": fno_config, "lm": lm_config}


def make(kind: str, url: str, data: dict[str, str], *overrides: str, **train: Any) -> configs.RunConfig:
    config = configs.load(CONFIG[kind](url, data[kind], **train), overrides)
    prepare_new(config)
    return config


def train(config: configs.RunConfig, resume: bool = False, fail_at: int = 0) -> dict[str, Any] | str:
    """Worker function; `fail_at`: raise in the middle of that step, as a crash would."""
    torch.set_num_threads(1)
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


def losses(url: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(Store(url)) if "loss" in row}


def samples(url: str) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row in read_trace(Store(url)):
        found.setdefault(row["step"], []).extend(row["index"])
    return found


@pytest.mark.parametrize(("kind", "strategy", "micro"), [("fno", "fsdp", 0), ("lm", "fsdp", 1), ("lm", "ddp", 0)])
def test_two_processes_equal_one(tmp_path, data, kind, strategy, micro):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    for url, world in ((one, 1), (two, 2)):
        overrides = [f"strategy.name={strategy}", f"resources.processes_per_node={world}"]
        config = make(kind, url, data, *overrides, max_steps=20, micro_batch=micro)
        run_distributed(train, world, config)
    a, b = losses(one), losses(two)
    assert list(a) == list(range(1, 21))
    np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=0, atol=1e-5)
    assert samples(one) == samples(two)
    np.testing.assert_allclose(
        [r["diag/gradients/norm"] for r in read_metrics(Store(two)) if "diag/gradients/norm" in r],
        [r["diag/gradients/norm"] for r in read_metrics(Store(one)) if "diag/gradients/norm" in r],
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [("fno", (2, "fsdp"), (2, "fsdp")), ("fno", (2, "fsdp"), (1, "ddp")), ("lm", (1, "ddp"), (2, "fsdp"))],
)
def test_a_crashed_run_continues_without_losing_or_repeating_a_sample(tmp_path, data, kind, first, second):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    overrides = [f"strategy.name={first[1]}", f"resources.processes_per_node={first[0]}"]
    run_distributed(train, first[0], make(kind, whole, data, *overrides, max_steps=10, val_every=5))
    config = make(kind, broken, data, *overrides, max_steps=10, val_every=5)
    assert run_distributed(train, first[0], config, False, 7) == ["crash"] * first[0]
    assert read_record(Store(broken))["status"] == "failed"
    assert committed_steps(Store(broken).sub("checkpoints")) == [4]
    config = prepare_resume(broken, [f"strategy.name={second[1]}", f"resources.processes_per_node={second[0]}"])
    run_distributed(train, second[0], config, True)
    assert read_record(Store(broken))["status"] == "ok"
    assert [row["resumed_from"] for row in read_attempts(Store(broken))] == [0, 4]
    assert samples(broken) == samples(whole)
    a, b = losses(whole), losses(broken)
    assert list(b) == list(range(1, 11))
    np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=0, atol=0 if first == second else 1e-5)
    rates = [[r["lr"] for r in read_metrics(Store(url)) if "lr" in r] for url in (whole, broken)]
    assert rates[0] == rates[1]
    held_out = [[r for r in read_metrics(Store(url)) if "val/loss" in r] for url in (whole, broken)]
    assert [r["step"] for r in held_out[1]] == [5, 10]
    for x, y in zip(*held_out, strict=True):
        assert x["val/loss"] == pytest.approx(y["val/loss"], abs=0 if first == second else 1e-5)


def test_a_checkpoint_corrupt_inside_is_fallen_back_from(tmp_path, data):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    run_distributed(train, 1, make("fno", whole, data, max_steps=12))
    run_distributed(train, 2, make("fno", broken, data, "resources.processes_per_node=2", max_steps=12), False, 10)
    assert committed_steps(Store(broken).sub("checkpoints")) == [4, 8]
    path = tmp_path / "broken" / "checkpoints" / "step-00000008" / "rank-00001-000.bin"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    run_distributed(train, 2, configs.load(broken + "/config.yaml"), True)
    assert [row["resumed_from"] for row in read_attempts(Store(broken))] == [0, 4]
    assert samples(broken) == samples(whole)
    np.testing.assert_allclose(list(losses(broken).values()), list(losses(whole).values()), rtol=0, atol=1e-5)


def test_resume_with_another_micro_batch_keeps_the_steps(tmp_path, data):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    run_distributed(train, 1, make("lm", whole, data, max_steps=9))
    run_distributed(train, 1, make("lm", broken, data, max_steps=9), False, 6)
    run_distributed(train, 1, prepare_resume(broken, ["train.micro_batch=1"]), True)
    assert samples(broken) == samples(whole)
    np.testing.assert_allclose(list(losses(broken).values()), list(losses(whole).values()), rtol=0, atol=1e-5)


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
    assert manifest["config_hash"] == record["run_id"] and manifest["code"]["torch"] == torch.__version__
    result = evaluate(url)
    assert result["samples"] == 4 and result["step"] == 8
    assert math.isfinite(result["metrics"]["rollout_relative_l2"])
    with np.load(tmp_path / "run" / "evaluation.npz") as arrays:
        assert arrays["prediction"].shape == arrays["truth"].shape == (4, 1, 16, 16)
        np.testing.assert_allclose(arrays["error"], arrays["prediction"] - arrays["truth"], atol=1e-6)


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
    prepare_new(config)  # no worker ever began
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
