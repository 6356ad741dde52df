"""Time per step of a Keel run over that of a bare torch loop: same network, optimiser, schedule, clipping and batches.

The Keel side streams shards from disk, logs every 10 steps and collects diagnostics every 50, as a real run does; the
bare side indexes a tensor in memory and, for FSDP2, is a loop over the same `fully_shard`. Both run in this process in
turn, several times. Three ratios are printed: the median over the pairs, that of the fastest 50 steps in a row on either
side, which neighbours on the machine disturb less (50 steps hold every periodic cost), and the median of the ratios of
the CPU time that all threads of the process took, which they disturb least. Aim: at most 1.03 where a step takes 50 ms or
more.

    python scripts/bench/overhead.py [--steps 101] [--repeats 5] [--only WORD] [--json FILE] [--markdown FILE]
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning.pytorch as pl
import numpy as np
import torch
from _table import median_of_ratios, parser, save, show
from torch.distributed.device_mesh import init_device_mesh

from datamodules.format import ArraySpec, write_dataset
from datamodules.store import Store
from trainer import config as configs
from trainer import run as runs
from trainer.build import build, optimizer_and_scheduler, rules
from trainer.distributed import init_process_group
from trainer.lifecycle import prepare_new
from trainer.quiet import quiet
from trainer.records import read_metrics
from trainer.strategies.fsdp import shard

WINDOW = 50


def fields(url: str) -> str:
    """64 trajectories of 8 frames of smooth noise, 64 x 64."""
    generator = np.random.default_rng(0)
    values = np.cumsum(generator.standard_normal((64, 8, 1, 64, 64)), axis=1).astype("f4")
    dimensions = ("trajectory", "time", "channel", "x", "y")
    spec = ArraySpec(shape=values.shape, dtype="float32", dimensions=dimensions, shard_length=8)
    attributes = {"kind": "fields", "array": "fields", "channels": ["w"], "splits": {"train": [0, 64]}}
    write_dataset(url, {"fields": spec}, {"fields": values}, attributes)
    return url


def text(url: str) -> str:
    """A million random bytes."""
    values = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype="u1")
    spec = ArraySpec(
        shape=values.shape, dtype="uint8", dimensions=("token",), shard_length=1 << 18, chunk_length=1 << 16
    )
    attributes = {"kind": "text", "array": "tokens", "vocab_size": 256, "splits": {"train": [0, 1 << 20]}}
    write_dataset(url, {"tokens": spec}, {"tokens": values}, attributes)
    return url


def config(kind: str, strategy: str, data: str, steps: int) -> dict[str, Any]:
    if kind == "fno":
        model: dict[str, Any] = {"name": "fno", "width": 24, "modes": [12, 12], "depth": 4}
        task: dict[str, Any] = {"name": "field_rollout", "space": [64, 64]}
        diagnostics = ["gradients", "activations"]
    else:
        model = {"name": "transformer", "width": 128, "depth": 4, "heads": 4, "max_seq_len": 256}
        task = {"name": "next_token", "seq_len": 256}
        diagnostics = ["gradients", "logits"]
    return {
        "model": model,
        "task": task,
        "data": {"name": "fields" if kind == "fno" else "text", "url": data, "window_shards": 4},
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01},
        "strategy": {"name": strategy},
        "train": {"max_steps": steps, "global_batch": 8, "grad_clip": 1.0},
        "checkpoint": {"every": 0},
        "resources": {"accelerator": "cpu"},
        "log": {"every": 10, "progress": False},
        "diagnostics": {"every": WINDOW, "names": diagnostics},
    }


class Clock(pl.Callback):
    """The CPU seconds of this process at the end of each step; the last callback."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time())


Times = tuple[list[float], list[float]]  # at which steps ended: seconds since the epoch, CPU seconds of the process


def keel(raw: dict[str, Any], url: str) -> Times:
    """When the steps of a whole run ended."""
    run, clock, assemble = configs.load({**raw, "url": url}), Clock(), runs.assemble
    prepare_new(run)

    def with_clock(parts: Any) -> Any:
        watch = assemble(parts)
        watch.callbacks.append(clock)
        return watch

    runs.assemble = with_clock
    try:
        runs.fit(run)
    finally:
        runs.assemble = assemble
    return [row["time"] for row in read_metrics(Store(url)) if "loss" in row], clock.seconds


def bare(raw: dict[str, Any], url: str) -> Times:
    """The same of the plainest loop over the same network and optimiser."""
    run = configs.load({**raw, "url": url})
    task, data = build(run)
    by_name = rules(run, task)
    if run.strategy.name == "fsdp":
        init_process_group("cpu", 60)
        shard(task.network, init_device_mesh("cpu", (1,)))
    optimizer, scheduler = optimizer_and_scheduler(run, task.network, by_name)
    parameters = list(task.network.parameters())
    key = "fields" if "fields" in task.example_batch(1) else "tokens"
    held = torch.cat([batch[key] for batch in data.evaluation_loader("train", batch=64)])
    data.teardown()
    generator = torch.Generator().manual_seed(0)
    times: Times = ([], [])
    for step in range(run.train.max_steps):
        batch = {key: held[torch.randint(len(held), (run.train.global_batch,), generator=generator)]}
        loss = task.training_step(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.train.grad_clip)
        optimizer.step()
        scheduler.step()
        times[0].append(time.time())
        times[1].append(time.process_time())
    return times


def mean_step(times: list[float]) -> float:
    """Seconds per step over a whole run; the first step, which warms up, left out."""
    return (times[-1] - times[0]) / (len(times) - 1)


def fastest(runs: list[list[float]]) -> float:
    """Seconds per step of the fastest `WINDOW` steps in a row of any run."""
    return min((times[i + WINDOW] - times[i]) / WINDOW for times in runs for i in range(len(times) - WINDOW))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=101)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--only", metavar="WORD", default="", help="only the runs whose name holds this")
    options = arguments.parse_args()
    quiet()
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        data = {"fno": fields(f"{folder}/fields"), "transformer": text(f"{folder}/text")}
        for kind in ("fno", "transformer"):
            for strategy in ("ddp", "fsdp"):
                if options.only not in f"{kind}, {strategy}":
                    continue
                raw = config(kind, strategy, data[kind], options.steps)
                ours: list[Times] = []
                theirs: list[Times] = []
                for repeat in range(options.repeats):
                    url = f"{folder}/{kind}-{strategy}-{repeat}"
                    sides = [(ours, keel), (theirs, bare)]
                    for runs, side in sides if repeat % 2 else reversed(sides):
                        runs.append(side(raw, url))
                wall, cpu = (
                    [(mean_step(a[kind_of]), mean_step(b[kind_of])) for a, b in zip(ours, theirs, strict=True)]
                    for kind_of in (0, 1)
                )
                best = [fastest([walls for walls, _ in side]) for side in (ours, theirs)]
                row = {
                    "keel_ms": 1e3 * best[0],
                    "bare_ms": 1e3 * best[1],
                    "ratio_fastest": best[0] / best[1],
                    "ratio_median": median_of_ratios(wall),
                    "ratio_cpu": median_of_ratios(cpu),
                }
                rows.append([f"{kind}, {strategy}", *row.values()])
                figures[f"{kind}_{strategy}"] = row
    show(
        "Time per step: Keel over a bare torch loop, one process",
        ["run", "Keel ms (fastest)", "bare ms (fastest)", "ratio of these", "median ratio of pairs", "of CPU time"],
        rows,
        f"{options.steps} steps, {options.repeats} paired repeats, {torch.get_num_threads()} threads; aim 1.03",
    )
    save(options, figures)


if __name__ == "__main__":
    main()
