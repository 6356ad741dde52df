"""Where a tiny transformer trains and where it does not: 64 learning rates by 64 initial scales, one run each.

4,096 runs of `configs/sweeps/trainability.yaml` through `keel sweep run`, packed into stacks of 256. May be killed and
started again: done runs are not repeated. Writes the page, the picture and the table that it shows.

    python scripts/experiments/trainability.py [--folder runs/trainability] [--size 64] [--out docs/results]
"""

import csv
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]  # before what follows

import matplotlib

matplotlib.use("Agg")
import numpy as np
from _table import parser, save, show
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

from cluster.sweep.results import read_results
from datamodules.store import Store

CONFIG = "configs/sweeps/trainability.yaml"
RATE, SCALE = "optim.lr", "model.init_std"
RATES, SCALES = (0.1, 10.0), (0.003, 10.0)
CHANCE = math.log(256)  # loss of a network that knows nothing of the next byte
KINDS = ("trained", "learned nothing", "exploded", "not a number")


def keel(*words: str) -> None:
    """Runs one keel command in the checkout."""
    done = subprocess.run([sys.executable, "-m", "cluster.cli", *words], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def sweep(folder: str, size: int) -> str:
    """Makes the data and does what is missing of the sweep; returns its URL."""
    text, url = f"{folder}/text", f"{folder}/sweep"
    if not Store(text).exists("manifest.json"):
        keel("data", "make", "configs/data/stdlib_text.yaml", f"url={text}", "generator.max_bytes=1000000")
    axes = [
        f"grid.{name}={{from: {low}, to: {high}, steps: {size}}}"
        for name, (low, high) in ((RATE, RATES), (SCALE, SCALES))
    ]
    keel("sweep", "run", CONFIG, f"url={url}", f"base.data.url={text}", *axes)
    return url


def kind(result: dict) -> str:
    """What became of a run: the loss of its last 20 steps, against chance."""
    if result["status"] == "diverged":
        return "not a number"
    if result["loss"] < 0.98 * CHANCE:
        return "trained"
    return "learned nothing" if result["loss"] < 1.02 * CHANCE else "exploded"


def boundary(trained: np.ndarray) -> np.ndarray:
    """The cells that trained and have a neighbour that did not."""
    padded = np.pad(trained, 1, mode="edge")
    neighbours = [padded[1:-1, 2:], padded[1:-1, :-2], padded[2:, 1:-1], padded[:-2, 1:-1]]
    return trained & ~np.logical_and.reduce(neighbours)


def boxes(cells: np.ndarray, side: int) -> int:
    """How many boxes of `side` by `side` cells hold one of `cells`."""
    size = len(cells) // side * side
    return int(cells[:size, :size].reshape(size // side, side, size // side, side).any(axis=(1, 3)).sum())


def draw(rates: list[float], scales: list[float], loss: np.ndarray, kinds: np.ndarray, path: Path) -> None:
    """The picture: loss where runs trained, what became of the others elsewhere; rate upwards, scale to the right."""
    figure, axis = plt.subplots(figsize=(8.2, 6.4), constrained_layout=True)
    edges = [np.log10([v[0], v[-1]]) + np.array([-0.5, 0.5]) * np.log10(v[1] / v[0]) for v in (scales, rates)]
    extent = (*edges[0], *edges[1])
    colours = ("#2563eb", "#d6d3d1", "#f59e0b", "#7f1d1d")
    axis.imshow(kinds, cmap=ListedColormap(colours), vmin=-0.5, vmax=3.5, extent=extent, origin="lower", aspect="auto")
    shown = np.ma.masked_where(kinds != 0, loss)
    image = axis.imshow(shown, cmap="viridis", extent=extent, origin="lower", aspect="auto", vmax=CHANCE)
    figure.colorbar(image, label="training loss at the end (nats), where it trained", pad=0.02)
    for index, name in enumerate(KINDS[1:], 1):
        axis.scatter([], [], marker="s", s=60, color=colours[index], label=name)
    axis.legend(loc="upper right", framealpha=0.95)
    for set_ticks, set_labels, span in (
        (axis.set_xticks, axis.set_xticklabels, edges[0]),
        (axis.set_yticks, axis.set_yticklabels, edges[1]),
    ):
        ticks = [t for t in np.arange(-4, 5) if span[0] <= t <= span[1]]
        set_ticks(ticks)
        set_labels([f"{10.0**t:g}" for t in ticks])
    axis.set_xlabel("initial standard deviation of the token table")
    axis.set_ylabel("learning rate (SGD)")
    axis.set_title(f"A tiny transformer: {kinds.size:,} runs of 100 steps")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--folder", default="runs/trainability", help="where data and runs go")
    arguments.add_argument("--size", type=int, default=64, help="values of each axis")
    arguments.add_argument("--out", default="docs/results", help="where the page, the picture and the table go")
    options = arguments.parse_args()
    started = time.monotonic()
    results = read_results(Store(sweep(options.folder, options.size)))
    minutes = (time.monotonic() - started) / 60
    rates, scales = (sorted({result["axes"][name] for result in results}) for name in (RATE, SCALE))
    if len(results) != len(rates) * len(scales):
        raise SystemExit(f"{len(results)} results for {len(rates)} x {len(scales)} cells: start it again")
    loss, kinds = (np.full((len(rates), len(scales)), np.nan), np.zeros((len(rates), len(scales)), dtype=int))
    for result in results:
        at = rates.index(result["axes"][RATE]), scales.index(result["axes"][SCALE])
        loss[at], kinds[at] = result["loss"], KINDS.index(kind(result))
    out = Path(options.out)
    draw(rates, scales, loss, kinds, out / "trainability.png")
    with open(out / "trainability.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "lr", "init_std", "outcome", "loss", "diverged_step"])
        for result in results:
            axes = result["axes"]
            writer.writerow(
                [
                    result["row"],
                    axes[RATE],
                    axes[SCALE],
                    kind(result),
                    f"{result['loss']:.6g}",
                    result["diverged_step"] or "",
                ]
            )
    edge = boundary(kinds == 0)
    sides = [side for side in (1, 2, 4, 8) if side < len(rates)]
    counts = [boxes(edge, side) for side in sides]
    slope = -float(np.polyfit(np.log(sides), np.log(counts), 1)[0]) if len(sides) > 1 and min(counts) else math.nan
    seconds = sum(result["device_seconds"] for result in results)
    number = Counter(KINDS[k] for k in kinds.ravel())
    note = (
        f"{len(results):,} runs of {results[0]['parameters']:,} parameters, {seconds / 60:.1f} core-minutes of training "
        f"({1e3 * seconds / len(results):.0f} ms a run); the boundary of what trained has {int(edge.sum())} cells and a "
        f"box-counting slope of {slope:.2f} (boxes of {', '.join(map(str, sides))} cells)"
    )
    show(
        "The trainability boundary of a tiny transformer",
        ["outcome", "runs", "part", "largest rate"],
        [
            [
                name,
                number[name],
                f"{number[name] / len(results):.1%}",
                float(max((r["axes"][RATE] for r in results if kind(r) == name), default=math.nan)),
            ]
            for name in KINDS
        ],
        note,
    )
    options.markdown = str(out / "trainability.md")
    save(options, {"outcomes": dict(number), "boundary": int(edge.sum()), "slope": slope, "minutes": minutes})
    with open(options.markdown, "a") as file:
        file.write(
            "\n![Loss over learning rate and initial scale](trainability.png)\n\n"
            "Plain SGD, 100 steps of 4 sequences of 16 bytes of Python's standard library; one block of width 8 with one\n"
            "head, token table tied to the readout. Trained: the mean loss of the last 20 steps is at least 2 % below\n"
            f"ln 256 = {CHANCE:.3f}, that of a guess; learned nothing: within 2 % of it. Data: [trainability.csv](trainability.csv).\n"
        )


if __name__ == "__main__":
    main()
