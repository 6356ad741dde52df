"""The rows of a run for other tools: a CSV file always, TensorBoard, Weights & Biases and MLflow where the config says so.

JSON lines in the run's URL stay the record of truth (`trainer.records`); what is written here is a copy for people.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.util
import io
import logging
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import lightning

from datamodules.store import Store
from trainer.callbacks.metrics import MetricsLog
from trainer.config import ConfigError
from trainer.records import Row, read_metrics
from trainer.schema import LogConfig

CSV = "metrics.csv"
TENSORBOARD = "tensorboard"

# Setting of `log` -> (module it needs, what installs that).
_NEEDS = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}
_NOT_VALUES = ("step", "attempt", "time", "event")
_QUEUE = 10_000  # batches of rows; a logger that falls behind further loses rows rather than hold up training

log = logging.getLogger("keel.run")


class Sink(Protocol):
    """One tool. Called from one background thread."""

    def write(self, step: int, values: Mapping[str, float], time: float) -> None: ...
    def close(self) -> None: ...


class Loggers(lightning.Callback):
    """Hands the rows of `metrics` to sinks from a thread of its own; on rank 0 only. Writes `metrics.csv` at the end.

    A tool that fails is left out with one warning: logging never ends a run.

    Args:
        metrics: whose rows are copied.
        store: the run's URL.
        sinks: name -> function that makes the sink from the step after which training begins (0: a fresh start), called in
            the thread (some of them talk to a network).
        hurried: asked at the end of training: true when the process may be killed soon. Then nothing is waited for, no file
            is written, and whoever asked for the end calls `close` once what matters more is done.
    """

    def __init__(
        self,
        metrics: MetricsLog,
        store: Store,
        sinks: Mapping[str, Callable[[int], Sink]],
        *,
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store, self._makers, self._hurried = store, dict(sinks), hurried
        self._rows: queue.Queue[list[Row] | None] = queue.Queue(maxsize=_QUEUE)
        self._thread: threading.Thread | None = None
        self._lost = 0
        if self._makers:
            metrics.subscribe(self._put)

    # ------------------------------------------------------------------------------------------------------------ hooks
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._makers and self._thread is None:
            self._thread = threading.Thread(
                target=self._work, args=(trainer.global_step,), name="keel-loggers", daemon=True
            )
            self._thread.start()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._hurried():
            return
        self.close()
        try:
            self._store.write(CSV, to_csv(read_metrics(self._store)))
        except OSError as error:
            log.warning("%s was not written: %s", CSV, error)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.close()

    def close(self, seconds: float = 60.0) -> None:
        """Waits, at most so long, until all rows are with the tools. May be called twice."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=seconds)
        thread.join(seconds)
        if thread.is_alive() or self._lost:
            log.warning("loggers could not follow: some rows are missing there; %s/metrics has all", self._store.url)

    # -------------------------------------------------------------------------------------------------------- internals
    def _put(self, rows: list[Row]) -> None:
        try:
            self._rows.put_nowait(rows)
        except queue.Full:
            self._lost += len(rows)

    def _work(self, step: int) -> None:
        sinks: dict[str, Sink] = {}
        for name, make in self._makers.items():
            with self._blamed(name, sinks):
                sinks[name] = make(step)
        while (rows := self._rows.get()) is not None:
            for name in list(sinks):
                with self._blamed(name, sinks):
                    for row in rows:
                        values = numbers(row)
                        if values:
                            sinks[name].write(row["step"], values, row["time"])
        for name in list(sinks):
            with self._blamed(name, sinks):
                sinks[name].close()

    @contextlib.contextmanager
    def _blamed(self, name: str, sinks: dict[str, Sink]) -> Any:
        try:
            yield
        except Exception as error:  # whatever a third-party client raises
            sinks.pop(name, None)
            log.warning("log.%s is off for the rest of the run: %s", name, " ".join(str(error).split()))


def check(config: LogConfig) -> None:
    """Refuses a tool that is not installed, before anything starts.

    Raises:
        ConfigError: names the setting and what to install.
    """
    for setting, (module, package) in _NEEDS.items():
        if getattr(config, setting) and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"log.{setting}={getattr(config, setting)}: {module} is not installed; pip install {package}, "
                f"or leave log.{setting} out"
            )


def sinks(config: LogConfig, store: Store, *, name: str, settings: Mapping[str, Any]) -> Any:
    """What `Loggers` takes: the tools that `config` asks for, for the run `name` with its resolved `settings`."""
    identity = hashlib.sha256(store.url.encode()).hexdigest()[:16]  # the same for all attempts of a run
    found: dict[str, Callable[[int], Sink]] = {}
    if config.tensorboard:
        found["tensorboard"] = lambda step: TensorBoard(store, step)
    if config.wandb:
        found["wandb"] = lambda step: WandB(config.wandb, name, identity, settings, store)
    if config.mlflow:
        found["mlflow"] = lambda step: MLflow(config.mlflow, name, identity, settings)
    return found


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The measured values of a row."""
    return {
        key: float(value)
        for key, value in row.items()
        if key not in _NOT_VALUES and isinstance(value, int | float) and not isinstance(value, bool)
    }


def to_csv(rows: Iterable[Row]) -> bytes:
    """Rows as CSV: one line per step and kind of row, one column per name, `step`, `attempt`, `time` first."""
    rows = list(rows)
    names = dict.fromkeys(("step", "attempt", "time"))
    names.update(dict.fromkeys(sorted({key for row in rows for key in row})))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


class TensorBoard:
    """Event files in `URL/tensorboard`; for a remote URL they are written beside and uploaded at the end.

    What earlier attempts wrote beyond `step`, after which this one begins, is hidden.
    """

    def __init__(self, store: Store, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._store = store
        self._staged = None if store.is_local else tempfile.TemporaryDirectory(prefix="keel-tensorboard-")
        folder = self._staged.name if self._staged is not None else str(store.local_path(TENSORBOARD))
        self._folder = folder
        self._writer: Any = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float], time: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time)

    def close(self) -> None:
        self._writer.close()
        if self._staged is not None:
            for file in os.listdir(self._folder):
                with open(os.path.join(self._folder, file), "rb") as opened:
                    self._store.write(f"{TENSORBOARD}/{file}", opened.read())
            self._staged.cleanup()


class WandB:
    """A run of a Weights & Biases project, continued by every attempt. `WANDB_MODE=offline` keeps it on this machine."""

    def __init__(self, project: str, name: str, identity: str, settings: Mapping[str, Any], store: Store) -> None:
        import wandb

        folder = str(store.local_path("wandb")) if store.is_local else tempfile.mkdtemp(prefix="keel-wandb-")
        os.makedirs(folder, exist_ok=True)
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=identity,
            resume="allow",
            dir=folder,
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment `name` at a tracking URI (a folder or a server), continued by every attempt."""

    def __init__(self, uri: str, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        if "://" not in uri or uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow 3 refuses folders
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        known = self._client.search_runs([number], f"tags.`keel.id` = '{identity}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
        else:
            self._id = self._client.create_run(number, tags={"keel.id": identity}, run_name=name).info.run_id
            for key, value in _flat(settings):
                self._client.log_param(self._id, key, str(value)[:500])

    def write(self, step: int, values: Mapping[str, float], time: float) -> None:
        from mlflow.entities import Metric

        found = [Metric(key.replace("@", "_"), value, int(1000 * time), step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=found)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _flat(settings: Mapping[str, Any], path: str = "") -> Sequence[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        at = f"{path}.{key}" if path else str(key)
        found += _flat(value, at) if isinstance(value, Mapping) else [(at, value)]
    return found
