"""A scaling table of a neural operator: FNOs on forced Navier-Stokes over size, unique trajectories, samples and resolution.

The same trajectories are simulated on grids of 16, 32 and 64 points a side. `keel sweep run` trains the rows of
configs/sweeps/operator_ladder.yaml; each operator is then evaluated where it was trained and, without training, on the
finest grid, which shows what a coarse grid leaves. `keel fit --form operator` fits the law with the floor K h^order. Start
again after a kill: what is done stays done.

    python scripts/experiments/operator_ladder.py [--folder runs/experiments/operator_ladder] [--workers 2]

Writes docs/results/operator_ladder.csv (the table), .md and .png.
"""

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import matplotlib
from _ladder import DOCS, ROOT, keel, laws, read, write

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from cluster.sweep.results import read_results
from datamodules.store import Store
from trainer.evaluation import evaluate

NAME = "operator_ladder"
CONFIG = f"configs/sweeps/{NAME}.yaml"
GRIDS = (16, 32, 64)
SAMPLES = 48  # of the test split: rollouts of ten steps
MEASURED = ("relative_l2", "rollout_relative_l2", "rollout_vrmse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=f"runs/experiments/{NAME}")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    folder = Path(ROOT, options.folder).resolve()
    started = time.monotonic()
    for grid in GRIDS:
        keel(
            "data",
            "make",
            "configs/data/navier_stokes_2d.yaml",
            f"url={folder}/data_{grid}",
            f"generator.resolution={grid}",
        )
    places = ", ".join(f"{folder}/data_{grid}" for grid in GRIDS)
    spaces = ", ".join(f"[{grid}, {grid}]" for grid in GRIDS)
    changes = [
        f"url={folder}/sweep",
        f"base.data.url={folder}/data_64",
        f"zip=[{{data.url: [{places}], task.space: [{spaces}]}}]",
    ]
    keel("sweep", "run", CONFIG, "--workers", str(options.workers), *changes)
    torch.set_num_threads(options.workers)
    results = read_results(Store(str(folder / "sweep")))
    rows = [measured(row, folder) for row in results if row["status"] == "ok"]
    source = DOCS / f"{NAME}.csv"
    with source.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    keel("fit", str(source), "--form", "operator", "--column", "loss=finest_relative_l2", "--out", str(folder / "fit"))
    draw(rows)
    document(folder, rows, len(results), time.monotonic() - started)


def measured(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A line of the table: what was trained, and its errors on held-out trajectories."""
    kept = folder / "measured" / f"{row['row']}.json"
    if not kept.exists():
        own = evaluate(row["url"], split="test", limit=SAMPLES)["metrics"]
        fine = own
        if list(row["axes"]["task.space"]) != [64, 64]:
            changes = [f"data.url={folder}/data_64", "task.space=[64,64]"]
            fine = evaluate(row["url"], changes, split="test", limit=SAMPLES)["metrics"]
        kept.parent.mkdir(parents=True, exist_ok=True)
        errors = {name: own[name] for name in MEASURED} | {f"finest_{name}": fine[name] for name in MEASURED}
        kept.write_text(json.dumps({"persistence": fine["persistence_relative_l2"], **errors}))
    axes = row["axes"]
    trajectories = int(str(axes["data.train"]).rpartition(":")[2])
    grid = int(axes["task.space"][0])
    return {
        "row": row["row"],
        "n": row["parameters"],
        "width": row["width"],
        "unique": trajectories,
        "samples": row["samples"],
        "resolution": grid,
        "h": 1.0 / grid,
        "flops": row["flops"],
        "flops_convention": row["flops_convention"],
        "lr": row["lr"],
        "seed": row["seed"],
        "status": row["status"],
        "train_loss": row["train_loss"],
        "val_relative_l2": row["loss"],
        **read(kept),
        "seconds": row["seconds"],
    }


def coarse_over_fine(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Least, median and largest ratio of errors on the finest grid: trained on the coarsest over trained on the finest."""
    cell = {(r["n"], r["unique"], r["samples"], r["resolution"]): r["finest_relative_l2"] for r in rows}
    pairs = [(cell[(*key, GRIDS[0])], cell[(*key, GRIDS[-1])]) for *key, grid in cell if grid == GRIDS[0]]
    ratios = [coarse / fine for coarse, fine in pairs]
    return min(ratios), float(np.median(ratios)), max(ratios)


def draw(rows: list[dict[str, Any]]) -> None:
    """One panel per number of unique trajectories: the error on the finest grid over parameters, by training grid."""
    most = max(row["samples"] for row in rows)
    counts = sorted({row["unique"] for row in rows})
    figure, axes = plt.subplots(1, len(counts), figsize=(11, 3.8), sharey=True)
    for ax, unique in zip(axes, counts, strict=True):
        for grid, colour in zip(GRIDS, plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(GRIDS))), strict=True):
            own = [r for r in rows if r["unique"] == unique and r["resolution"] == grid and r["samples"] == most]
            own.sort(key=lambda row: row["n"])
            sizes = [row["n"] for row in own]
            ax.plot(sizes, [row["finest_relative_l2"] for row in own], "o-", color=colour, label=f"trained on {grid}²")
            ax.plot(sizes, [row["relative_l2"] for row in own], "o:", color=colour, ms=3, alpha=0.6)
        ax.set(xscale="log", yscale="log", xlabel="parameters", title=f"{unique} unique trajectories")
        ax.grid(alpha=0.2, which="both")
    axes[0].set_ylabel("one-step relative L2 error")
    axes[0].legend(fontsize=8, title="solid: on 64², dotted: on its own grid", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / f"{NAME}.png", dpi=130)


def document(folder: Path, rows: list[dict[str, Any]], trained: int, seconds: float) -> None:
    """The page."""
    fit = read(folder / "fit" / "fit.json")
    best = min(rows, key=lambda row: row["finest_relative_l2"])
    left_out = "" if len(rows) == trained else f" (of {trained}; the others diverged)"
    least, median, most = coarse_over_fine(rows)
    lines = [
        "# A scaling table of a neural operator",
        "",
        f"Made by `scripts/experiments/{NAME}.py` from `{CONFIG}`: {len(rows)} FNOs{left_out}, one step of forced 2D Navier-Stokes in "
        f"vorticity form (viscosity 1e-3, one time unit), under muP at one base rate. The table is [{NAME}.csv]({NAME}.csv): "
        "n parameters, unique trajectories (20 pairs of frames each; a short run sees a part of the pairs), samples seen, resolution and h of the training grid, "
        f"FLOPs, errors on {SAMPLES} windows of held-out trajectories on the training grid, and on 64 x 64 (`finest_...`) "
        "without training there.",
        "",
        f"![errors over size, data and resolution]({NAME}.png)",
        "",
        f"The best one on the finest grid ({best['n']:,} parameters, {best['unique']} trajectories, trained on "
        f"{best['resolution']}²) has a one-step error of {best['finest_relative_l2']:.4f}; nothing changing would be "
        f"{best['persistence']:.4f}.",
        "",
        f"Trained on {GRIDS[0]}² in place of {GRIDS[-1]}², everything else the same, an operator has {median - 1:+.1%} of error "
        f"on {GRIDS[-1]}² (median; {least - 1:+.1%} to {most - 1:+.1%}). Where that is about nothing, so smooth a flow does not "
        "determine K and the order of the floor K h^order, and their intervals below say so.",
        "",
        "The law, fitted to the errors on the finest grid:",
        "",
        *laws(fit),
        "What `keel fit` warned of:",
        "",
        *([f"- {text}" for text in fit["warnings"]] or ["- nothing"]),
        "",
        f"- {sum(row['seconds'] or 0 for row in rows) / 60:.0f} minutes of training, {seconds / 60:.0f} minutes in this start",
    ]
    write(NAME, lines)


if __name__ == "__main__":
    main()
