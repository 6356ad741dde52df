"""Memory that `keel dryrun` plans against the peak that a real run of the same config reaches, per rank.

The plan is made in this process, on fake tensors. The real run is Keel's own training in fresh processes; its peak is what
torch's allocator reports to `torch.profiler` during the last step, everything that lives then included. Aim: within 10 %.

    python scripts/bench/memory.py [--only WORD] [--json FILE] [--markdown FILE]
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning.pytorch as pl
import torch
from _table import parser, save, show

from trainer import config as configs
from trainer import run as runs
from trainer.lifecycle import prepare_new
from trainer.planning.simulate import trace
from trainer.quiet import quiet

STEPS = 3
MARK = "keel: the measured step"

# Name -> (kind, processes, overrides).
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fno, ddp, 1 process": ("fno", 1, {}),
    "fno, fsdp, 2 processes": ("fno", 2, {"strategy.name": "fsdp"}),
    "transformer, ddp, 2 processes, micro-batches": ("transformer", 2, {"train.micro_batch": 2}),
    "transformer, fsdp, 2 processes": ("transformer", 2, {"strategy.name": "fsdp"}),
    "transformer, fsdp, 2 processes, blocks recomputed": (
        "transformer",
        2,
        {"strategy.name": "fsdp", "train.activation_checkpointing": "block"},
    ),
    "transformer, fsdp, 2 processes, bf16-mixed": (
        "transformer",
        2,
        {"strategy.name": "fsdp", "train.precision": "bf16-mixed"},
    ),
    "transformer, fsdp, 2 processes, averaged, bad steps undone": (
        "transformer",
        2,
        {"strategy.name": "fsdp", "train.ema_decay": 0.9, "recovery.nonfinite": "skip", "recovery.spike": "skip"},
    ),
}


class Mark(pl.Callback):
    """Names the last step in the profile; must be the first callback when it starts and the last when it ends."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step == STEPS - 1 and index % trainer.accumulate_grad_batches == 0:
            self.range = torch.profiler.record_function(MARK)
            self.range.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS:
            self.range.__exit__(None, None, None)


def measure(url: str) -> int:
    """Trains the run at `url` in this process; the peak of its last step in bytes."""
    assemble = runs.assemble

    def marked(parts: Any) -> Any:
        watch = assemble(parts)
        watch.callbacks.insert(0, Mark())
        return watch

    runs.assemble = marked
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        runs.fit(configs.load(f"{url}/config.yaml"))
    events = profile.profiler.kineto_results.events()
    (step,) = [event for event in events if event.name() == MARK]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for at, change in changes:
        live += change
        if step.start_ns() <= at <= step.start_ns() + step.duration_ns():
            peak = max(peak, live)
    return peak


def measured(url: str, processes: int) -> list[int]:
    """Peaks by rank of a run in fresh processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, __file__, "--child", url]
    workers = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [int(output.splitlines()[-1]) for output in outputs]


def case(kind: str, processes: int, overrides: dict[str, Any], data: str, url: str, sizes: dict[str, Any]) -> Any:
    """The config of one case."""
    from overhead import config

    raw = config(kind, "ddp", data, STEPS)
    raw |= {"url": url, "diagnostics": {}, "resources": {"accelerator": "cpu", "processes_per_node": processes}}
    changes = {**sizes.get(kind, {}), **overrides}
    return configs.load(raw, [f"{key}={value}" for key, value in changes.items()])


def compare(names: list[str], folder: str, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Plan and measurement of the named cases; `sizes`: overrides by kind."""
    from overhead import fields, text

    data = {"fno": fields(f"{folder}/fields"), "transformer": text(f"{folder}/text")}
    rows = []
    for number, name in enumerate(names):
        kind, processes, overrides = CASES[name]
        run = case(kind, processes, overrides, data[kind], f"{folder}/{number}", sizes)
        planned = trace(run)
        prepare_new(run)
        peak = max(measured(run.url, processes))
        rows.append({"name": name, "planned": planned.peak, "measured": peak, "memory": planned.memory})
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        quiet()
        print(measure(sys.argv[2]))
        return
    arguments = parser(__doc__)
    arguments.add_argument("--only", metavar="WORD", default="", help="only the cases whose name holds this")
    arguments.add_argument("--width", type=int, default=256, help="of the transformer (default: 256)")
    options = arguments.parse_args()
    quiet()
    sizes = {"transformer": {"model.width": options.width}, "fno": {"model.width": 32}}
    names = [name for name in CASES if options.only in name]
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(names, folder, sizes)
    table = []
    for row in rows:
        top = sorted(row["memory"].items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{name} {size / row['planned']:.0%}" for name, size in top)
        ratio = row["planned"] / row["measured"]
        table.append([row["name"], row["planned"] / 2**20, row["measured"] / 2**20, ratio, parts])
    show(
        "Planned peak memory of a step over the measured one, per rank",
        ["run", "planned MiB", "measured MiB", "ratio", "largest parts of the plan"],
        table,
        "CPU allocations by torch.profiler in the last of 3 steps; aim: ratio between 0.9 and 1.1",
    )
    save(options, {row["name"]: row for row in rows})


if __name__ == "__main__":
    main()
