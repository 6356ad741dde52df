"""Does the best learning rate of a narrow model serve a wide one? A transformer on real text and an FNO on Navier-Stokes.

Every width is trained under the standard parametrisation and under muP at learning rates a factor of two apart, with
several seeds; `cluster.laws.rates` finds the best rate of each width and judges whether it transfers. Runs are Keel's
own networks, rules, optimisers and schedules in one process each, many after another. A finished run is a line of
OUT/records/cells.jsonl and is not repeated: start the script again to go on.

    keel data make configs/data/stdlib_text.yaml
    keel data make configs/data/navier_stokes_2d.yaml url=runs/data/navier_stokes_2d_32 generator.resolution=32
    python scripts/experiments/lr_transfer.py [--minutes 10] [--workers 2] [--out runs/experiments/lr_transfer]

It exits with 75 while runs are missing; when all are there it writes docs/results/lr_transfer.md, .png and .csv.
"""

import csv
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]  # before what follows

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from _table import machine, parser

from cluster.commands.common import number
from cluster.laws import rates
from cluster.laws.records import load
from trainer import config as configs
from trainer.plain import PlainRun, hold

SEEDS = (0, 1)
MODELS: dict[str, dict[str, Any]] = {
    "transformer": {
        "widths": (16, 32, 64, 128),
        "rates": [2.0**k for k in range(-9, -2)],
        "steps": 150,
        "batch": 16,
        "held": (4096, 256),
        "loss": "validation loss (nats per byte)",
    },
    "fno": {
        "widths": (8, 16, 32, 64),
        "rates": [2.0**k for k in range(-9, -1)],
        "steps": 100,
        "batch": 8,
        "held": (0, 128),
        "loss": "validation relative L2",
    },
}
SCHEMES = {"standard": "standard parametrisation", "mup": "µP"}
DATA = {"transformer": "runs/data/stdlib_text", "fno": "runs/data/navier_stokes_2d_32"}
DOCS = ROOT / "docs" / "results"

_held: dict[str, tuple[Any, Any]] = {}


def raw(model: str, scheme: str, width: int, rate: float, seed: int, data: str) -> dict[str, Any]:
    """Config of one cell. The narrowest width is muP's base, where it is the standard parametrisation."""
    about = MODELS[model]
    base = about["widths"][0]
    common = {
        "name": f"lr_transfer_{model}_{scheme}_{width}",
        "url": "runs/experiments/lr_transfer/unused",
        "seed": seed,
        "optim": {"name": "adamw", "lr": rate, "betas": [0.9, 0.95]},
        "schedule": {"name": "cosine", "warmup_steps": about["steps"] // 10, "min_lr_ratio": 0.1},
        "train": {"max_steps": about["steps"], "global_batch": about["batch"]},
        "resources": {"accelerator": "cpu", "threads": 1},
    }
    if model == "transformer":
        heads = {"heads": base // 16} if scheme == "mup" else {}
        part = {
            "model": {"name": "transformer", "width": width, "heads": width // 16, "depth": 2, "max_seq_len": 64},
            "task": {"name": "next_token", "seq_len": 64},
            "data": {"name": "text", "url": data},
        }
    else:
        heads = {}
        part = {
            "model": {"name": "fno", "width": width, "modes": [8, 8], "depth": 4},
            "task": {"name": "field_rollout", "space": [32, 32], "eval_rollout_steps": 1},
            "data": {"name": "fields", "url": data},
        }
    scaling = {"name": "standard"} if scheme == "standard" else {"name": "mup", "base": {"width": base, **heads}}
    return {**common, **part, "parametrization": scaling}


def cells(names: list[str], data: dict[str, str], count: int) -> list[dict[str, Any]]:
    """All runs of the first `count` widths, cheap ones first. At the base width both parametrisations are one."""
    found = []
    for model in names:
        for place, width in enumerate(MODELS[model]["widths"][:count]):
            for scheme in SCHEMES if place else ("standard",):
                for rate in MODELS[model]["rates"]:
                    for seed in SEEDS:
                        key = f"{model}/{scheme}/{width}/{rate:g}/{seed}"
                        config = raw(model, scheme, width, rate, seed, data[model])
                        about = {"model": model, "scheme": scheme, "width": width, "lr": rate, "seed": seed}
                        found.append({"run_id": key, **about, "place": place, "raw": config})
    return sorted(found, key=lambda cell: cell["place"])


def train(cell: dict[str, Any]) -> dict[str, Any]:
    """One run: a record."""
    torch.set_num_threads(1)
    started = time.monotonic()
    config, about = configs.load(cell["raw"]), MODELS[cell["model"]]
    if cell["model"] not in _held:
        training, validation = about["held"]
        _held[cell["model"]] = (hold(config, "train", training), hold(config, "validation", validation))
    held, validation = _held[cell["model"]]
    run = PlainRun(config)
    key = "tokens" if "tokens" in held else "fields"
    generator = torch.Generator().manual_seed(1000 + cell["seed"])  # the same batches at every width and rate
    order = torch.cat([torch.randperm(len(held[key]), generator=generator) for _ in range(2)])
    initial, losses = run.evaluate(validation), []
    for step in range(config.train.max_steps):
        rows = order[step * about["batch"] : (step + 1) * about["batch"]]
        losses.append(run.step({key: held[key][rows]}))
        if not math.isfinite(losses[-1]):
            break
    loss = run.evaluate(validation) if math.isfinite(losses[-1]) else math.nan
    return {
        **{name: cell[name] for name in ("run_id", "model", "scheme", "width", "lr", "seed")},
        "status": "ok" if math.isfinite(loss) and loss < initial else "diverged",
        "loss": loss if math.isfinite(loss) else None,
        "initial_loss": initial,
        "train_loss": float(np.mean(losses[-10:])) if math.isfinite(losses[-1]) else None,
        "steps": len(losses),
        "parameters": sum(p.numel() for p in run.task.network.parameters()),
        "seconds": time.monotonic() - started,
        "config_hash": configs.config_hash(config),
    }


def done(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by id; the rest of a line that a kill cut off is taken away."""
    if not path.exists():
        return {}
    whole, _, rest = path.read_text().rpartition("\n")
    if rest:
        path.write_text(whole + "\n" if whole else "")
    rows = [json.loads(line) for line in whole.splitlines()]
    return {row["run_id"]: row for row in rows}


def run_missing(missing: list[dict[str, Any]], path: Path, workers: int, minutes: float) -> None:
    """Trains what is missing until the time is up; each record is written as soon as it is there."""
    ends = time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")
    left = iter(missing)

    def until_then() -> Any:
        for cell in left:
            if time.monotonic() > ends:
                return
            yield cell

    with context.Pool(workers) as pool, path.open("a") as file:
        waiting: list[Any] = []
        cells_left = until_then()
        while True:
            while len(waiting) < workers and (cell := next(cells_left, None)) is not None:
                waiting.append(pool.apply_async(train, (cell,)))
            if not waiting:
                return
            ready = [item for item in waiting if item.ready()]
            if not ready:
                waiting[0].wait(0.2)
                continue
            for item in ready:
                record = item.get()
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(
                    f"{record['run_id']}: {record['status']} {record['loss']} ({record['seconds']:.1f} s)", flush=True
                )
            waiting = [item for item in waiting if item not in ready]


def judge(source: str, names: list[str], widest: dict[str, int]) -> dict[tuple[str, str], rates.Transfer]:
    """(model, parametrisation) -> the verdict."""
    found = {}
    for model in names:
        for scheme in SCHEMES:
            base = MODELS[model]["widths"][0]
            runs = load(source, where=[f"model={model}"])
            own = np.array([name.split("/")[1] == scheme for name in runs.text["run_id"]])
            if scheme != "standard":  # at the base width the two are one
                own |= runs["width"] == base
            own = runs.keep(own & (runs["width"] <= widest[model]))
            found[model, scheme] = rates.transfer(rates.cells(own, "width"))
    return found


def draw(found: dict[tuple[str, str], rates.Transfer], path: Path) -> None:
    """Loss against rate, one curve per width; stars: best rates; crosses: diverged, or far above the best."""
    models = list(dict.fromkeys(model for model, _ in found))
    figure, axes = plt.subplots(len(models), 2, figsize=(9, 3.6 * len(models)), sharey="row", squeeze=False)
    for row, model in zip(axes, models, strict=True):
        for ax, scheme in zip(row, SCHEMES, strict=True):
            verdict = found[model, scheme]
            best = min(cell.best for cell in verdict.cells)
            worst = max(float(cell.loss[np.isfinite(cell.loss)].max()) for cell in verdict.cells)
            top = min(worst, 2.2 * best)
            colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.85, len(verdict.cells)))
            for cell, colour in zip(verdict.cells, colours, strict=True):
                good = np.isfinite(cell.loss)
                ax.plot(cell.lr[good], cell.loss[good], "o-", ms=3, lw=1.2, color=colour, label=f"width {cell.size:g}")
                ax.plot(cell.lr[~good], np.full((~good).sum(), top), "x", color=colour)
                ax.plot(cell.optimum, cell.best, "*", ms=12, color=colour, mec="black", mew=0.4)
            slope = "" if verdict.line is None else f", best rate ~ width^{verdict.line.exponent:.2f}"
            ax.set_title(f"{model}, {SCHEMES[scheme]}{slope}", fontsize=9)
            ax.set(xscale="log", xlabel="learning rate", ylim=(0.97 * best, 1.03 * top))
            ax.grid(alpha=0.2)
        row[0].set_ylabel(MODELS[model]["loss"])
        row[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def page(found: dict[tuple[str, str], rates.Transfer], records: list[dict[str, Any]]) -> str:
    """The table and what it was made with, as Markdown."""
    lines = [
        "# Learning-rate transfer across width",
        "",
        "Made by `scripts/experiments/lr_transfer.py`; every run is a line of [lr_transfer.csv](lr_transfer.csv). Best rates "
        "and verdicts are those of `cluster.laws.rates`: it transfers when the best rate moves by less than width^0.1 (or "
        "zero lies in the interval) and by less than two grid steps, keeping the narrowest model's best tried rate costs "
        "the widest at most 0.5 % of its loss, and at rates up to that one wider models are not worse.",
        "",
        "![loss against learning rate](lr_transfer.png)",
        "",
        "Stars: best rates. Crosses: diverged, or far above the best of the width.",
        "",
        "| model | parametrisation | width | parameters | best rate | 95 % interval | loss there | loss at the narrowest model's best rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sizes = {(row["model"], row["width"]): row["parameters"] for row in records}
    for (model, scheme), verdict in found.items():
        kept = float(verdict.cells[0].lr[verdict.cells[0].loss.argmin()])
        for cell in verdict.cells:
            low, high = cell.interval
            at = cell.loss_at(kept)
            lines.append(
                f"| {model} | {SCHEMES[scheme]} | {cell.size:g} | {sizes[model, int(cell.size)]:,} | {number(cell.optimum)}"
                f"{' (edge of the grid)' if cell.edge else ''} | {number(low)} to {number(high)} | {cell.best:.4g} | "
                f"{at:.4g} |"
            )
    lines += [
        "",
        "| model | parametrisation | verdict | best rate ~ width^ | 95 % interval | grid steps moved | regret at the widest | wider is better |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, scheme), verdict in found.items():
        line = verdict.line
        slope, band = ("-", "-") if line is None else (f"{line.exponent:.2f}", f"{line.low:.2f} to {line.high:.2f}")
        text = "transfers" if verdict.ok else "does not transfer: " + "; ".join(verdict.reasons)
        lines.append(
            f"| {model} | {SCHEMES[scheme]} | {text} | {slope} | {band} | {verdict.shift_steps} | {verdict.regret:.2%} | "
            f"{'yes' if verdict.wider_is_better else 'no'} |"
        )
    lines.append("")
    for model in dict.fromkeys(model for model, _ in found):
        about = MODELS[model]
        lines.append(
            f"- {model}: {len(SEEDS)} seeds, {about['steps']} steps of {about['batch']} samples, AdamW, cosine schedule with "
            f"{about['steps'] // 10} steps of warm-up, rates {about['rates'][0]:.2g} to {about['rates'][-1]:.2g} by factors "
            f"of 2; muP's base is width {about['widths'][0]}."
        )
    seconds = sum(row["seconds"] for row in records)
    bad = sum(row["status"] == "diverged" for row in records)
    lines += [f"- {len(records)} runs, {bad} of them diverged, {seconds / 60:.0f} core-minutes.", ""]
    lines += [f"- {name}: {value}" for name, value in machine().items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--out", default="runs/experiments/lr_transfer", help="records go there")
    arguments.add_argument("--docs", default=str(DOCS), help="the page, the figure and the table go there")
    arguments.add_argument("--minutes", type=float, default=math.inf, help="start no run after so long")
    arguments.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments.add_argument("--widths", type=int, default=4, choices=(2, 3, 4), help="how many, from the narrowest on")
    for model, url in DATA.items():
        arguments.add_argument(f"--{model}-data", default=url, help=f"data set of the {model} (default: {url})")
    options = arguments.parse_args()
    path = Path(options.out, "records", "cells.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {model: getattr(options, f"{model}_data") for model in DATA}
    wanted, there = cells(options.models, data, options.widths), done(path)
    missing = [cell for cell in wanted if cell["run_id"] not in there]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done", flush=True)
    if missing:
        run_missing(missing, path, options.workers, options.minutes)
        there = done(path)
        if left := sum(cell["run_id"] not in there for cell in wanted):
            print(f"{left} runs are missing: start again to go on", flush=True)
            raise SystemExit(75)
    records = [there[cell["run_id"]] for cell in wanted]
    widest = {model: MODELS[model]["widths"][options.widths - 1] for model in options.models}
    found = judge(str(Path(options.out).resolve()), options.models, widest)
    docs = Path(options.docs)
    draw(found, docs / "lr_transfer.png")
    with (docs / "lr_transfer.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in records[0] if name != "seconds"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
    (docs / "lr_transfer.md").write_text(page(found, records))
    for (model, scheme), verdict in found.items():
        text = "transfers" if verdict.ok else "does not transfer: " + "; ".join(verdict.reasons)
        print(f"{model}, {scheme}: {text}")


if __name__ == "__main__":
    main()
