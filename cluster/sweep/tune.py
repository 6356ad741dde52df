"""Rows as trials of Ray Tune: it places and supervises them, and its schedulers and searchers decide; the state is ours.

Ray knows nothing that cannot be lost. Each driver starts a fresh Tuner, which asks for a row when it has room for one: the
row is claimed then, so that drivers share, and a rerun does only what is missing. A trial reserves all that its row needs
in one placement group, or nothing, so rows of any sizes cannot block each other while they wait. A scheduler's decision to
stop reaches the worker, which ends itself with the status `pruned`; no trial is stopped from outside, so nothing is left
behind. A sweep of many tiny cells (`packed`) has one actor for many of them.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.launch import available_cores
from cluster.sweep import tune_trial
from cluster.sweep.packed import share
from cluster.sweep.stopping import prune
from cluster.sweep.suggest import Source, Suggested, TableRows
from cluster.sweep.sweep import Sweep
from cluster.sweep.table import Row
from cluster.sweep.tune_packs import packs
from datamodules.store import Store

SCHEDULERS = {
    "asha": "ray.tune.schedulers:AsyncHyperBandScheduler",
    "hyperband": "ray.tune.schedulers:AsyncHyperBandScheduler",  # with several brackets
    "median": "ray.tune.schedulers:MedianStoppingRule",
}
_DEFAULTS: dict[str, dict[str, Any]] = {"hyperband": {"brackets": 3}}


class Tune:
    """See `cluster.sweep.executor.Executor`. The Ray cluster is the one of RAY_ADDRESS, else one on this machine.

    Args:
        workers: trials at once; 0 for as many as there is room for. On this machine without RAY_ADDRESS: its cores.
    """

    def __init__(self, workers: int = 0) -> None:
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise ValueError("executor=ray needs Ray: pip install 'keel[ray]'") from error
        self.workers = workers

    def check(self, sweep: Sweep, rows: Sequence[Row]) -> None:
        scheduler(sweep.options)
        self._connect()
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for row in rows:
            needs = bundles(sweep, row)
            fitting = [n for n in nodes if all(n.get(name, 0) >= amount for name, amount in needs[0].items())]
            if len(fitting) < len(needs):
                told = ", ".join(f"{amount:g} {name}" for name, amount in needs[0].items())
                have = "; ".join(", ".join(f"{n.get(k, 0):g} {k}" for k in needs[0]) for n in nodes)
                raise ValueError(
                    f"row {row.id} ({row.label}) needs {len(needs)} nodes with {told} each; the Ray cluster has {have}"
                )

    def run(self, sweep: Sweep, rows: Sequence[Row]) -> None:
        source: Source = Suggested(sweep) if sweep.options["tune"]["search"] else TableRows(sweep, rows)
        if isinstance(source, Suggested) and source.over:
            return
        self._connect()
        if sweep.options["executor"] == "packed":
            share(sweep, self._slots(), lambda count: packs(sweep, count))
            return
        from ray import tune

        name = f"keel-{uuid.uuid4().hex[:12]}"  # unique: two drivers in one Ray must not take each other's trials
        board = _board(name)
        inside = scheduler(sweep.options)
        with tempfile.TemporaryDirectory(prefix="keel-tune-", ignore_cleanup_errors=True) as folder:
            tuner = tune.Tuner(
                tune.with_resources(_named(name), resources=placement),
                tune_config=tune.TuneConfig(
                    metric=sweep.options["objective"],
                    mode="min",
                    search_alg=_searcher(sweep, source, name),
                    scheduler=inside,
                    num_samples=-1,
                    max_concurrent_trials=self.workers or None,
                    reuse_actors=False,
                ),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=folder,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=sweep.options["retries"]),
                    callbacks=[_watch(sweep, board)],
                ),
            )
            tuner.fit()

    def _slots(self) -> int:
        import ray

        return self.workers or int(ray.cluster_resources().get("CPU", 1))

    def _connect(self) -> None:
        import ray

        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # signals are the driver's
        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # how a node ended is no metric
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # which prints whatever the verbosity
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS")
        runtime = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [_root(), os.environ.get("PYTHONPATH")]))}}
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "runtime_env": runtime}
        try:
            if address:
                ray.init(address=address, **options)
            else:
                ray.init(num_cpus=self.workers or available_cores(), include_dashboard=False, **options)
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            raise ValueError(
                f"no Ray answers at {address or 'this machine'}: {' '.join(str(error).split())}"
            ) from error


def bundles(sweep: Sweep, row: Row) -> list[dict[str, float]]:
    """What a row needs, one bundle per node."""
    accelerator = row.values.get("resources.accelerator", sweep.table.start.resources.accelerator)
    if accelerator == "auto":
        import ray

        accelerator = "cuda" if ray.cluster_resources().get("GPU", 0) >= row.processes * row.nodes else "cpu"
    needs = {"CPU": float(row.cpus)}
    if accelerator == "cuda":
        needs["GPU"] = float(row.processes)
    return [dict(needs) for _ in range(row.nodes)]


def scheduler(options: Mapping[str, Any]) -> Any:
    """The Tune scheduler that a sweep's config names, with its decisions to stop carried out by the worker.

    Raises:
        ValueError: unknown, options that it does not take, or one that pauses trials or copies their weights.
    """
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    name = options["tune"]["scheduler"]
    if not name:
        return FIFOScheduler()
    given = {**_DEFAULTS.get(name, {}), **options["tune"]["scheduler_options"]}
    if "." not in name and name not in SCHEDULERS:
        raise ValueError(f"tune.scheduler={name}: choose one of {', '.join(SCHEDULERS)}, or a class as module:Class")
    cls = named(SCHEDULERS.get(name, name), "tune.scheduler", TrialScheduler)
    if "time_attr" in inspect.signature(cls).parameters:
        given = {"time_attr": "step", **given}
    try:
        return _inside_worker(cls(**given))
    except TypeError as error:
        raise ValueError(f"tune.scheduler_options: {error}") from error


def named(text: str, key: str, kind: type) -> Any:
    """A class of that kind written as module:Class.

    Raises:
        ValueError: there is none, or it is of another kind, such as a Trainer of Ray Train, which no Tuner takes any more.
    """
    module, _, attribute = text.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}={text}: no such class ({error}); write it as module:Class") from error
    if not (inspect.isclass(cls) and issubclass(cls, kind)):
        raise ValueError(
            f"{key}={text} is no {kind.__name__} of Ray Tune; what trains a row is Keel's own, by the row's config"
        )
    return cls


def _forgotten(self: Any) -> tuple[Any, ...]:
    """What Tune pickles, to restore itself from: nothing, as all state is in the store."""
    return dict, ()


def _inside_worker(inner: Any) -> Any:
    from ray.tune.schedulers import TrialScheduler

    class InsideWorker(TrialScheduler):
        """Asks another scheduler. Where that would stop a trial, its worker is told to end by itself."""

        def __init__(self) -> None:
            self.pruned: set[str] = set()

        __reduce__ = _forgotten

        def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
            self._metric, self._mode = metric, mode
            return bool(inner.set_search_properties(metric, mode, **spec))

        @property
        def metric(self) -> Any:
            return inner.metric

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            inner.on_trial_add(controller, trial)

        def on_trial_error(self, controller: Any, trial: Any) -> None:
            inner.on_trial_error(controller, trial)

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if tune_trial.CODE in result or trial.trial_id in self.pruned:
                return self.CONTINUE
            decision = inner.on_trial_result(controller, trial, result)
            if decision == self.PAUSE:
                raise ValueError(
                    f"tune.scheduler={type(inner).__name__} pauses trials; population: trains in generations"
                )
            if decision == self.STOP:
                self.pruned.add(trial.trial_id)
                value = result.get(inner.metric)
                why = f"{type(inner).__name__}: {inner.metric}={value} at step {result.get('step')}"
                prune(Store(trial.config["run"]), why)
            return self.CONTINUE

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            inner.on_trial_complete(controller, trial, result)

        def on_trial_remove(self, controller: Any, trial: Any) -> None:
            inner.on_trial_remove(controller, trial)

        def choose_trial_to_run(self, controller: Any) -> Any:
            return inner.choose_trial_to_run(controller)

        def debug_string(self) -> str:
            return str(inner.debug_string())

        def save(self, checkpoint_path: str) -> None:
            """State is in the store, not here."""

        def restore(self, checkpoint_path: str) -> None:
            """See `save`."""

    return InsideWorker()


def _searcher(sweep: Sweep, source: Source, board: str) -> Any:
    from ray.tune.search import Searcher

    class Rows(Searcher):
        """Hands out rows, each claimed when Tune has room for it, and tells their ends."""

        def __init__(self) -> None:
            super().__init__(metric=sweep.options["objective"], mode="min")
            self.rows: dict[str, Row] = {}

        __reduce__ = _forgotten

        def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            row = None if sweep.over else source.next(trial_id)
            if row is None:
                return Searcher.FINISHED
            self.rows[trial_id] = row
            sweep.begin(row)
            return {
                "run": sweep.table.run_url(row),
                "command": sweep.job(row),
                "environment": environment(sweep, row),
                "nodes": row.nodes,
                "bundles": bundles(sweep, row),
                "board": board,
            }

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            source.seen(trial_id, result)

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            row = self.rows.pop(trial_id)
            code = (result or {}).get(tune_trial.CODE)
            if sweep.claims.lost.is_set():
                return
            if sweep.over and code not in (0, 2):
                sweep.release([row])
                return
            if code is None:
                code, said = 1, "its node was lost, and again after each retry"
            else:
                said = str((result or {}).get(tune_trial.SAID, ""))
            source.ended(trial_id, row, sweep.end(row, int(code), said))

        def save(self, checkpoint_path: str) -> None:
            """State is in the store, not here."""

        def restore(self, checkpoint_path: str) -> None:
            """See `save`."""

    return Rows()


def environment(sweep: Sweep, row: Row) -> dict[str, str]:
    """What the workers of a row find in their environment. Where Tune is to hear of each validation, its judge asks that of
    the sweep's `stop` section in turn."""
    found = {**sweep.environment(row), **({} if row.threads else {"OMP_NUM_THREADS": "1"})}
    if sweep.options["tune"]["scheduler"] or sweep.options["tune"]["search"]:
        found |= tune_trial.JUDGED
    return found


def placement(config: dict[str, Any]) -> Any:
    """What Tune reserves for a row before its trial starts: all that it needs, or nothing."""
    from ray.tune import PlacementGroupFactory

    return PlacementGroupFactory(config["bundles"], strategy="STRICT_SPREAD" if config["nodes"] > 1 else "PACK")


def _watch(sweep: Sweep, board: Any) -> Any:
    from ray.tune import Callback

    class Watch(Callback):
        """Tells the trials once the driver is to end."""

        told = False
        __reduce__ = _forgotten

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if sweep.over and not self.told:
                self.told = True
                board.end.remote()

    return Watch()


def _named(name: str) -> Any:
    def trial(config: dict[str, Any]) -> None:
        tune_trial.trial(config)

    trial.__name__ = name
    return trial


def _board(name: str) -> Any:
    import ray

    class Board:
        """Whether the driver has been told to end. It lives as long as the driver does."""

        told = False

        def end(self) -> None:
            self.told = True

        def over(self) -> bool:
            return self.told

    return ray.remote(Board).options(num_cpus=0, name=name).remote()


def _root() -> str:
    from cluster.launch.local import _ROOT

    return _ROOT
