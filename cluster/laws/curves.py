"""Training curves for approach 1, from a table of points or from runs that Keel wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.laws import records
from cluster.laws.envelope import Curve
from cluster.laws.records import DataProblem
from datamodules.store import NotFound, Store


def read_curves(source: str, columns: Mapping[str, str] | None = None, where: Sequence[str] = ()) -> list[Curve]:
    """Curves from a table whose rows are points (run_id or n, c, loss; d, else c/(6n)), or from a folder of runs, of which
    those count that ended well.

    Raises:
        DataProblem: nothing there, a missing column, or `columns` or `where` for a folder, which has no columns.
    """
    if source.rpartition(".")[2].lower() in ("csv", "json", "jsonl", "parquet"):
        return _from_table(source, dict(columns or {}), where)
    if columns or where:
        raise DataProblem(
            "--curves: --column and --where choose from a table; for a folder of runs they have no effect"
        )
    return _from_runs(source)


def _from_table(source: str, columns: dict[str, str], where: Sequence[str]) -> list[Curve]:
    runs = records.read_points(source, columns, where)
    labels = runs.text.get("run_id") or [f"n={n:g}" for n in runs["n"]]
    d = runs["d"] if "d" in runs else runs["c"] / (6 * runs["n"])
    found = []
    for label in dict.fromkeys(labels):
        rows = np.array([one == label for one in labels])
        order = np.flatnonzero(rows)[np.argsort(runs["c"][rows])]
        found.append(Curve(label, float(runs["n"][order[0]]), runs["c"][order], d[order], runs["loss"][order]))
    return found


def _from_runs(source: str) -> list[Curve]:
    from trainer.records import read_metrics, read_record

    store = Store(source)
    homes = sorted({path.rpartition("/")[0] for path in store.list() if path.rpartition("/")[2] == "record.jsonl"})
    found = []
    for home in homes:
        run = store.sub(home) if home else store
        try:
            record: Mapping[str, Any] = read_record(run)
        except NotFound:
            continue
        if record.get("status") != "ok":
            continue
        steps, flops = record.get("steps"), record.get("flops")
        seen = record.get("tokens") or record.get("samples")
        if not (steps and flops and seen and record.get("parameters")):
            continue
        rows = [row for row in read_metrics(run) if isinstance(row.get("loss"), float) and "event" not in row]
        part = np.array([row["step"] for row in rows], dtype=float) / steps
        loss = np.array([row["loss"] for row in rows])
        found.append(Curve(home or source, float(record["parameters"]), flops * part, seen * part, loss))
    if not found:
        raise DataProblem(f"no runs that ended well with FLOPs and a loss curve below {source}")
    return found
