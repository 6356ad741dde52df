"""Does a law that was fitted to small transformers foretell a larger one? Sweep, fit, plan, train, score, as a user would.

Twenty-five small transformers on real text (configs/sweeps/language_ladder.yaml) are trained by `keel sweep run` on a Ray
cluster of this machine; `keel fit` gives approaches 2 and 3; `keel plan` registers the prediction of a run of four times
the largest budget; that run is trained and `keel score` compares. Start again after a kill: what is done stays done.

    python scripts/experiments/language_ladder.py [--folder runs/experiments/language_ladder] [--workers 2]

Writes docs/results/language_ladder.md, .csv and .png.
"""

import argparse
import csv
import math
import time
from pathlib import Path
from typing import Any

import matplotlib
from _ladder import DOCS, ROOT, keel, laws, read, table, write

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from cluster.sweep.results import read_results
from datamodules.store import Store
from trainer.records import read_record

NAME = "language_ladder"
CONFIG = f"configs/sweeps/{NAME}.yaml"
TIMES = 4.2  # the predicted run's budget over the largest of the fit: at least 4 after rounding to whole sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=f"runs/experiments/{NAME}")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    folder = Path(ROOT, options.folder).resolve()
    data, sweep, plan = folder / "data", folder / "sweep", folder / "plan"
    started = time.monotonic()
    keel("data", "make", "configs/data/stdlib_text.yaml", f"url={data}")
    changes = [f"url={sweep}", f"base.data.url={data}"]
    keel("sweep", "run", CONFIG, "--executor", "ray", "--workers", str(options.workers), *changes)
    rows = read_results(Store(str(sweep)))
    target = TIMES * max(row["budget"] for row in rows)
    keel("fit", str(sweep), "--out", str(folder / "fit"), "--target", f"{target:g}")
    if not (plan / "prediction.json").exists():
        rate = rows[0]["lr"]  # muP: one base rate at all widths
        keel("plan", str(sweep), "--budget", f"{target:g}", "--out", str(plan), "--lr", str(rate), "--batch", "4")
    run = Store(str(plan / "run"))
    if not run.exists("record.jsonl") or read_record(run)["status"] != "ok":
        begun = run.exists("config.yaml")
        keel(*(("resume", run.url) if begun else ("train", str(plan / "run.yaml"))))
    keel("score", run.url, "--log", str(folder / "calibration"), codes=(0, 1))
    document(folder, rows, time.monotonic() - started)


def document(folder: Path, rows: list[dict[str, Any]], seconds: float) -> None:
    """The page, its table and its figure."""
    fit, prediction = read(folder / "fit" / "fit.json"), read(folder / "plan" / "prediction.json")
    record = read_record(Store(str(folder / "plan" / "run")))
    entry = max((read(path) for path in (folder / "calibration").glob("*.json")), key=lambda entry: entry["time"])
    if entry.get("actual") is None:
        raise SystemExit(
            f"the predicted run ended as {record['status']}: there is nothing to score, see {record['url']}"
        )
    columns = [
        "row",
        "budget",
        "width",
        "depth",
        "parameters",
        "tokens",
        "flops",
        "lr",
        "batch",
        "loss",
        "status",
        "seconds",
    ]
    with (DOCS / f"{NAME}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    draw(fit, prediction, entry, record, rows)
    two, methods = fit.get("approach_2") or {}, fit.get("methods") or {}
    loss = prediction["loss"]
    flops, largest = record["flops"], max(row["flops"] for row in rows)
    inside = "inside" if entry["inside"] else "outside"
    lines = [
        "# A ladder of small transformers, and a prediction made before its run",
        "",
        f"Made by `scripts/experiments/{NAME}.py` from `{CONFIG}`: {len(rows)} transformers on the text of Python's standard "
        f"library (validation loss in nats per byte), trained by `keel sweep run` on a local Ray cluster, under muP at one "
        f"base rate; every run is a line of [{NAME}.csv]({NAME}.csv).",
        "",
        f"![losses, fits and the prediction]({NAME}.png)",
        "",
        f"**Prediction**, registered before the run: {loss['value']:.4f} ({loss['low']:.4f} to {loss['high']:.4f}) for "
        f"{prediction['n']:,} parameters and {prediction['d']:,.0f} tokens, {flops / largest:.1f} times the largest budget "
        f"of the fit. **Outcome**: {entry['actual']:.4f}, {inside} the 95% interval, z = {entry['z']:+.2f}, "
        f"{math.expm1(entry['log_ratio']):+.2%} off.",
        "",
        *laws(fit),
    ]
    if two:
        lines += [
            f"Approach 2: best N ~ C^{two['exponent']:.3f} (95% {two['interval'][0]:.3f} to {two['interval'][1]:.3f}).",
            "",
            *table(
                ["budget", "best N", "error of ln N", "left out because"],
                [(b["flops"], b["n"], b["std"], b["excluded"] or "") for b in two["budgets"]],
            ),
        ]
    if methods:
        estimates = [(name, e["n"], *(e["interval"] or (None, None))) for name, e in methods["estimates"].items()]
        lines += table([f"best N at C={fit['target_flops']:.3g}, by", "N", "95% from", "to"], estimates)
    lines += ["What `keel fit` and `keel plan` warned of:", ""]
    lines += [f"- {text}" for text in dict.fromkeys([*fit["warnings"], *prediction["warnings"], *entry["notes"]])] or [
        "- nothing"
    ]
    work = sum(row["seconds"] or 0 for row in rows)
    lines += ["", f"- {work / 60:.0f} minutes of training in the sweep, {seconds / 60:.0f} minutes in this start"]
    write(NAME, lines)


def draw(
    fit: dict[str, Any],
    prediction: dict[str, Any],
    entry: dict[str, Any],
    record: dict[str, Any],
    rows: list[dict[str, Any]],
) -> None:
    """Left: loss against size by budget. Right: the envelope of losses over compute, and what was predicted."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    budgets = sorted({row["budget"] for row in rows})
    for budget, colour in zip(budgets, plt.get_cmap("viridis")(np.linspace(0.05, 0.85, len(budgets))), strict=True):
        own = sorted((r["parameters"], r["loss"]) for r in rows if r["budget"] == budget and r["loss"] is not None)
        left.plot(*zip(*own, strict=True), "o-", color=colour, ms=4, lw=1, label=f"C={budget:.2g}")
        right.plot([budget] * len(own), [loss for _, loss in own], "o", color=colour, ms=4, alpha=0.6)
    for found in (fit.get("approach_2") or {}).get("budgets", []):
        if not found["excluded"]:
            left.plot(found["n"], found["loss"], "*", ms=12, color="black")
    loss = prediction["loss"]
    error = [[loss["value"] - loss["low"]], [loss["high"] - loss["value"]]]
    right.errorbar(
        [record["flops"]], [loss["value"]], yerr=error, fmt="s", color="tab:red", capsize=4, label="predicted"
    )
    right.plot(record["flops"], entry["actual"], "*", ms=13, color="black", label="came out")
    left.set(xscale="log", xlabel="parameters", ylabel="validation loss (nats per byte)")
    right.set(xscale="log", xlabel="compute (FLOPs)")
    for ax in (left, right):
        ax.legend(fontsize=8)
        ax.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(DOCS / f"{NAME}.png", dpi=130)


if __name__ == "__main__":
    main()
