"""Copies of a run's rows for other tools: the real tool where it is installed, else a stand-in that notes the calls."""

from __future__ import annotations

import csv
import importlib.util
import io
import logging
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from datamodules.store import Store
from tests.conftest import unavailable
from trainer.callbacks import loggers
from trainer.callbacks.loggers import CSV, Loggers, check, numbers, sinks, to_csv
from trainer.callbacks.metrics import MetricsLog
from trainer.config import ConfigError
from trainer.records import MetricsWriter
from trainer.schema import LogConfig

ROWS: list[dict[str, Any]] = [
    {"step": 1, "time": 10.0, "loss": 0.5, "lr": 1e-3},
    {"step": 2, "time": 11.0, "loss": 0.25, "lr": 1e-3},
    {"step": 2, "time": 11.5, "val/rollout@2": 0.75},
    {"step": 2, "time": 11.6, "event": "skip", "why": "a spike"},
]


def _run(store: Store, config: LogConfig, step: int = 0) -> MetricsLog:
    metrics = MetricsLog(MetricsWriter(store, 1), every=1)
    kinds = sinks(config, store, name="tiny", settings={"train": {"max_steps": 2}})
    callback = Loggers(metrics, store, kinds)
    callback.on_train_start(SimpleNamespace(global_step=step), None)  # type: ignore[arg-type]
    metrics._hand_out(ROWS)
    metrics.writer.flush()
    callback.on_train_end(None, None)  # type: ignore[arg-type]
    return metrics


def test_csv_holds_every_row_and_value(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    _run(store, LogConfig())
    rows = list(csv.DictReader(io.StringIO(store.read(CSV).decode())))
    assert list(rows[0])[:3] == ["step", "attempt", "time"]
    assert [(row["step"], row["loss"], row["val/rollout@2"], row["event"]) for row in rows] == [
        ("1", "0.5", "", ""),
        ("2", "0.25", "", ""),
        ("2", "", "0.75", ""),
        ("2", "", "", "skip"),
    ]
    assert to_csv([]) == b"step,attempt,time\n"
    assert numbers({"step": 1, "time": 2.0, "loss": 0.5, "event": "x", "why": "y", "ok": True}) == {"loss": 0.5}


@pytest.mark.parametrize("remote", [False, True])
def test_tensorboard_reads_back_what_was_logged(tmp_path: Path, remote: bool) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        unavailable("TensorBoard tests need tensorboard: pip install 'keel[test]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store = Store(f"memory://loggers/{tmp_path.name}" if remote else str(tmp_path))
    _run(store, LogConfig(tensorboard=True))
    folder = tmp_path / "tensorboard"
    if remote:
        folder.mkdir()
        for path in store.list("tensorboard"):
            (folder / path.rsplit("/", 1)[-1]).write_bytes(store.read(path))
    found = EventAccumulator(str(folder))
    found.Reload()
    assert [(event.step, event.value, event.wall_time) for event in found.Scalars("loss")] == [
        (1, 0.5, 10.0),
        (2, 0.25, 11.0),
    ]
    assert [event.value for event in found.Scalars("val/rollout@2")] == [0.75]


def _stand_in_wandb(noted: list[Any]) -> ModuleType:
    module: Any = ModuleType("wandb")
    run = SimpleNamespace(
        log=lambda values, step: noted.append((step, values)), finish=lambda: noted.append(("finish", None))
    )
    module.Settings = lambda **kwargs: kwargs
    module.init = lambda **kwargs: noted.append(("init", kwargs)) or run
    return module


def test_what_lies_beyond_the_step_that_was_really_loaded_is_hidden(tmp_path: Path) -> None:
    """The step of the trainer counts, not the newest checkpoint, which may have been fallen back from."""
    found: list[int] = []
    callback = Loggers(MetricsLog(MetricsWriter(Store(str(tmp_path)), 1), every=1), Store(str(tmp_path)), {})
    callback._makers = {"tensorboard": found.append}  # type: ignore[dict-item]
    callback.on_train_start(SimpleNamespace(global_step=4), None)  # type: ignore[arg-type]
    callback.close()
    assert found == [4]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    store, noted = Store(str(tmp_path)), []  # type: ignore[var-annotated]
    real = importlib.util.find_spec("wandb") is not None
    if not real:
        monkeypatch.setitem(sys.modules, "wandb", _stand_in_wandb(noted))
    for step in (0, 1):
        _run(store, LogConfig(wandb="project"), step)
    assert not caplog.records
    if real:
        assert len(list((tmp_path / "wandb").rglob("run-*.wandb"))) == 2
        return
    kinds = [kind for kind, _ in noted]
    assert kinds == ["init", 1, 2, 2, "finish"] * 2
    starts = [value for kind, value in noted if kind == "init"]
    assert starts[0]["id"] == starts[1]["id"] and starts[0]["resume"] == "allow"
    assert starts[0]["project"] == "project" and starts[0]["config"] == {"train": {"max_steps": 2}}
    assert noted[1] == (1, {"loss": 0.5, "lr": 1e-3})


class _Client:
    """The part of MLflow's client that is used, over a dictionary."""

    runs: dict[str, dict[str, Any]]

    def __init__(self, tracking_uri: str) -> None:
        self.uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="7")

    def search_runs(self, numbers: list[str], query: str, max_results: int) -> list[Any]:
        found = [key for key, run in self.runs.items() if f"'{run['tags']['keel.id']}'" in query]
        return [SimpleNamespace(info=SimpleNamespace(run_id=key)) for key in found]

    def create_run(self, number: str, tags: dict[str, str], run_name: str) -> Any:
        key = str(len(self.runs))
        self.runs[key] = {"tags": tags, "params": {}, "metrics": []}
        return SimpleNamespace(info=SimpleNamespace(run_id=key))

    def log_param(self, run: str, key: str, value: str) -> None:
        self.runs[run]["params"][key] = value

    def log_batch(self, run: str, metrics: list[Any]) -> None:
        self.runs[run]["metrics"] += metrics

    def set_terminated(self, run: str) -> None:
        self.runs[run]["ended"] = True


def test_mlflow_continues_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, uri = Store(str(tmp_path)), (tmp_path / "mlruns").as_uri()
    if importlib.util.find_spec("mlflow") is None:
        tracking: Any = ModuleType("mlflow.tracking")
        entities: Any = ModuleType("mlflow.entities")
        _Client.runs = {}
        tracking.MlflowClient, entities.Metric = _Client, lambda *values: values
        for name, module in (("mlflow", ModuleType("mlflow")), ("mlflow.tracking", tracking)):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for step in (0, 1):
        _run(store, LogConfig(mlflow=uri), step)
    assert not caplog.records
    from mlflow.tracking import MlflowClient

    if MlflowClient is _Client:
        (run,) = _Client.runs.values()
        assert run["params"] == {"train.max_steps": "2"} and run["ended"]
        assert ("loss", 0.5, 10_000, 1) in run["metrics"] and ("val/rollout_2", 0.75, 11_500, 2) in run["metrics"]
        return
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny")
    (found,) = client.search_runs([experiment.experiment_id])
    assert [m.value for m in client.get_metric_history(found.info.run_id, "val/rollout_2")] == [0.75, 0.75]
    assert found.data.params == {"train.max_steps": "2"}


def test_a_tool_that_is_not_installed_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log.wandb=p: wandb is not installed; pip install wandb, or leave"):
        check(LogConfig(wandb="p"))
    check(LogConfig())


def test_a_tool_that_fails_is_left_out_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, seen, held = Store(str(tmp_path)), [], threading.Event()  # type: ignore[var-annotated]

    def broken(step: int) -> Any:
        raise OSError("no route\nto host")

    def slow(step: int, values: Any, time: float) -> None:
        held.wait(10)
        seen.append(step)

    metrics = MetricsLog(MetricsWriter(store, 1), every=1)
    makers = {"wandb": broken, "mlflow": lambda step: SimpleNamespace(write=slow, close=lambda: seen.append("closed"))}
    callback = Loggers(metrics, store, makers)
    callback.on_train_start(SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "keel.run"):
        metrics._hand_out(ROWS)  # returns though the tool holds the thread
        assert seen == []
        held.set()
        callback.on_exception(None, None, KeyboardInterrupt())  # type: ignore[arg-type]
        callback.close()  # once more does nothing
    assert seen == [1, 2, 2, "closed"]
    assert [record.message for record in caplog.records] == [
        "log.wandb is off for the rest of the run: no route to host"
    ]
