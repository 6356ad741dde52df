"""How good the predictions were: one entry per scored run, and what they say together."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.laws.records import ALIASES, DataProblem
from datamodules.store import Store

_T = 1.959964


@dataclass
class Coverage:
    """What a calibration log says: how many predictions, what part of the outcomes lay in their 95% intervals, the mean
    of |z|, and the mean of ln(actual/predicted)."""

    count: int
    inside: float
    mean_abs_z: float
    bias: float

    def line(self) -> str:
        """One line for people."""
        if not self.count:
            return "calibration: no prediction has been scored yet"
        return (
            f"calibration: {self.inside:.0%} of {self.count} outcomes in their 95% intervals, mean |z| {self.mean_abs_z:.2f}, "
            f"mean ln(actual/predicted) {self.bias:+.4f}"
        )


def score(record: Mapping[str, Any], prediction: Mapping[str, Any], config_hash: str | None = None) -> dict[str, Any]:
    """Compares the outcome of a run with what was predicted.

    Args:
        record: of the run.
        prediction: as `cluster.laws.plan.registration` made it.
        config_hash: of the run's config, without data; None: not compared.

    Returns:
        An entry of the calibration log: z is ln(actual/predicted) over the standard error that the interval implies.

    Raises:
        DataProblem: the run has not ended, or the prediction is none.
    """
    if prediction.get("kind") != "keel prediction":
        raise DataProblem("that file is no prediction written by keel plan")
    status = str(record.get("status"))
    if status not in ("ok", "diverged"):
        raise DataProblem(f"the run has status '{status}': score it when it is done")
    loss = prediction["loss"]
    value, low, high = (float(loss[key]) for key in ("value", "low", "high"))
    notes = []
    if config_hash is not None and prediction.get("config_hash") not in (None, config_hash):
        notes.append("the run's config is not the one that the prediction was made for")
    entry: dict[str, Any] = {
        "time": time.time(),
        "run_id": record.get("run_id"),
        "run": record.get("url"),
        "status": status,
        "predicted": {"value": value, "low": low, "high": high},
        "predicted_at": prediction.get("time"),
    }
    for axis, names in (("n", ("parameters",)), ("d", ("tokens", "samples"))):
        actual = next((record[name] for name in names if record.get(name)), None)
        if actual is not None:
            entry[axis] = actual
            if abs(math.log(actual / prediction[axis])) > 0.02:
                notes.append(f"the run had {axis}={actual:.4g}, the prediction is for {prediction[axis]:.4g}")
    actual = _loss(record, prediction.get("loss_column"))
    if status == "diverged" or actual is None or not math.isfinite(actual):
        entry |= {"actual": None, "inside": False, "z": None}
        notes.append("the run diverged: a stable one was predicted")
    else:
        spread = max(math.log(high / low) / (2 * _T), 1e-12)
        off = math.log(actual / value)
        entry |= {"actual": actual, "inside": low <= actual <= high, "z": off / spread, "log_ratio": off}
    return entry | {"notes": notes}


def _loss(record: Mapping[str, Any], column: str | None) -> float | None:
    from cluster.laws.records import find

    for name in (column,) if column else ALIASES["loss"]:
        value = find(record, name)
        if value is not None:
            return float(value)
    raise DataProblem(f"the record has no loss '{column or ALIASES['loss'][0]}'")


def append(log: Store, entry: Mapping[str, Any]) -> bool:
    """Adds an entry, one object each, so that several machines may write; False when that run is there already."""
    from cluster.laws.summary import plain
    from datamodules.store import canonical_json

    return log.create(f"{entry['run_id']}.json", canonical_json(plain(dict(entry))))


def coverage(log: Store) -> Coverage:
    """The state of a calibration log."""
    entries = [log.read_json(path) for path in log.list() if path.endswith(".json")]
    ratios = [entry["log_ratio"] for entry in entries if entry.get("log_ratio") is not None]
    zs = [abs(entry["z"]) for entry in entries if entry.get("z") is not None]
    count = len(entries)
    return Coverage(
        count,
        sum(bool(entry["inside"]) for entry in entries) / count if count else math.nan,
        sum(zs) / len(zs) if zs else math.nan,
        sum(ratios) / len(ratios) if ratios else math.nan,
    )
