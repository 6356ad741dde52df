"""Time per step of a Keel run over that of a bare torch loop: same network, optimiser, schedule, clipping and batches.

The Keel side streams shards from disk, logs every 10 steps and collects diagnostics every 50, as a real run does; its
time is from the first to the last metrics row. The bare side indexes a tensor in memory. Both run in this process in
turn, several times; the ratio is the median over the pairs. Aim: at most 1.03 where a step takes 50 ms or more.

    python scripts/bench/overhead.py [--steps 60] [--repeats 5] [--json FILE]
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from _table import median_of_ratios, parser, save, show

from datamodules.format import ArraySpec, write_dataset
from datamodules.store import Store
from trainer import config as configs
from trainer import parametrization
from trainer.build import build, optimizer_and_scheduler
from trainer.lifecycle import prepare_new
from trainer.records import read_metrics
from trainer.run import fit


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
        "log": {"every": 10, "progress": False},
        "diagnostics": {"every": 50, "names": diagnostics},
    }


def keel(raw: dict[str, Any], url: str) -> float:
    """Seconds per step of a whole run, between its first and last row."""
    run = configs.load({**raw, "url": url})
    prepare_new(run)
    fit(run)
    rows = [row for row in read_metrics(Store(url)) if "loss" in row]
    return (rows[-1]["time"] - rows[0]["time"]) / (len(rows) - 1)


def bare(raw: dict[str, Any], url: str) -> float:
    """Seconds per step of the plainest loop over the same network and optimiser."""
    run = configs.load({**raw, "url": url})
    task, data = build(run)
    rules = parametrization.lookup("standard")[1](parametrization.lookup("standard")[0]()).rules(task.network)
    optimizer, scheduler = optimizer_and_scheduler(run, task.network, rules)
    parameters = list(task.network.parameters())
    key = "fields" if "fields" in task.example_batch(1) else "tokens"
    held = torch.cat([batch[key] for batch in data.evaluation_loader("train", batch=64)])
    generator = torch.Generator().manual_seed(0)
    start = 0.0
    for step in range(run.train.max_steps):
        batch = {key: held[torch.randint(len(held), (run.train.global_batch,), generator=generator)]}
        loss = task.training_step(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.train.grad_clip)
        optimizer.step()
        scheduler.step()
        if step == 0:
            start = time.perf_counter()
    data.teardown()
    return (time.perf_counter() - start) / (run.train.max_steps - 1)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        data = {"fno": fields(f"{folder}/fields"), "transformer": text(f"{folder}/text")}
        for kind in ("fno", "transformer"):
            for strategy in ("ddp", "fsdp"):
                raw = config(kind, strategy, data[kind], options.steps)
                pairs = []
                for repeat in range(options.repeats):
                    url = f"{folder}/{kind}-{strategy}-{repeat}"
                    both = [keel(raw, url), bare(raw, url)] if repeat % 2 else [bare(raw, url), keel(raw, url)]
                    pairs.append((both[0], both[1]) if repeat % 2 else (both[1], both[0]))
                ratio = median_of_ratios(pairs)
                mean = [1e3 * float(np.median([pair[side] for pair in pairs])) for side in (0, 1)]
                rows.append([f"{kind}, {strategy}", *mean, ratio])
                figures[f"{kind}_{strategy}"] = {"keel_ms": mean[0], "bare_ms": mean[1], "ratio": ratio}
    show(
        "Time per step: Keel over a bare torch loop, one process",
        ["run", "Keel ms", "bare ms", "ratio"],
        rows,
        f"{options.steps} steps, median of {options.repeats} paired repeats, {torch.get_num_threads()} threads; aim 1.03",
    )
    save(options.json, figures)


if __name__ == "__main__":
    main()
