"""What checkpoints cost: the stall of a save, bandwidth beside that of the store, and the time until a resumed run trains again.

- Stall: how long a save in the background holds training up, over the time that a blocking save of the same state does. Aim: at
  most 0.1. Both with what a run does before each save: its parameters must be finite. Once more with what is off by
  default: their hash for `recovery.parity_every` (without the gather of a few numbers between ranks), and the stored sample
  of `checkpoint.self_check`, here one row through the network. On a CPU these count for more than on a GPU, which reads
  its memory so much faster than a disk is written.
- Bandwidth: of blocking saves and of loads, over that of the same bytes through the bare store in the same run: objects of
  the same size, written and read by as many threads as go fastest. Aim: at least 0.7.
- Resume: from `keel resume` to the end of the first step, by part; and the same in one process against the step index,
  which should be flat.

The store is a local folder, and with --s3 also a radosgw on this machine (scripts/services/ceph.sh).

    python scripts/bench/checkpoint.py [--mib 192] [--repeats 5] [--s3] [--only stall|resume|steps] [--json FILE] [--markdown FILE]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TIMES = "KEEL_BENCH_TIMES"  # where the processes of a resume note when they were where

# The step indices from which a run is resumed.
STEPS = (10, 100, 500)
PART = 64 << 20


def note(name: str) -> None:
    with open(os.environ[TIMES], "a") as file:
        file.write(json.dumps([name, time.time()]) + "\n")


# ------------------------------------------------------------------------------------------------- stall and bandwidth
def state(mib: int) -> tuple[Any, Any]:
    """A network and AdamW over it with `mib` MiB of state in about 60 tensors."""
    import torch

    width = int((mib * 2**20 / 12 / 20) ** 0.5)
    net = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(20)))
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def raw_write(store: Any, parts: list[bytes], threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        return timed(lambda: list(pool.map(lambda item: store.write(f"part-{item[0]}", item[1]), enumerate(parts))))


def raw_read(store: Any, parts: list[bytes], threads: int) -> float:
    """Ranges of 8 MiB, as loads ask for; `threads` of them at once where the store does not do that itself."""
    ranges = [
        (f"part-{i}", s, min(s + (8 << 20), len(p))) for i, p in enumerate(parts) for s in range(0, len(p), 8 << 20)
    ]
    with ThreadPoolExecutor(threads) as pool:
        return timed(lambda: list(pool.map(store.read_ranges, [ranges[i::threads] for i in range(threads)])))


def checks(net: Any, optional: bool) -> None:
    """What a run does before a save, on this rank."""
    import torch

    from trainer.callbacks.guard import not_finite
    from trainer.callbacks.parity import fingerprint

    parameters = [parameter.detach() for parameter in net.parameters()]
    assert not bool(not_finite(parameters, parameters[0].device))
    if optional:
        int(fingerprint(parameters))
        with torch.no_grad():
            float(net(torch.ones(1, parameters[0].shape[1])).sum())


def saves(url: str, mib: int, repeats: int) -> dict[str, float]:
    """Seconds, medians over `repeats`; ratios are medians of the ratios of each repeat."""
    import torch

    from datamodules.store import Store
    from trainer.checkpoint import Checkpointer

    net, optimizer = state(mib)
    device, store = torch.device("cpu"), Store(url)
    size = sum(t.numel() * 4 for t in net.parameters()) * 3
    parts = [os.urandom(min(PART, size - start)) for start in range(0, size, PART)]
    blocking = Checkpointer(store.sub("blocking"), part_bytes=PART)
    beside = Checkpointer(store.sub("beside"), part_bytes=PART, background=True)
    rows: list[dict[str, float]] = []

    def save(saver: Checkpointer, step: int) -> float:
        return timed(lambda: saver.save(step, net, [optimizer], {}, device=device))

    for step in range(1, repeats + 2):
        finite, optional = (timed(lambda more=more: checks(net, more)) for more in (False, True))
        row = {"finite": finite, "optional": optional, "blocking": save(blocking, step)}
        row["raw_write"] = min(raw_write(store.sub(f"raw{step}"), parts, threads) for threads in (1, 2, 4))
        row["stall"] = save(beside, step)
        row["upload"] = timed(beside.wait)
        row["raw_read"] = min(raw_read(store.sub(f"raw{step}"), parts, threads) for threads in (1, 2))
        start = time.perf_counter()
        blocking.load(step, net, [optimizer], device=device)
        row["load"] = time.perf_counter() - start
        store.sub(f"raw{step}").delete_tree("")
        for name, before in (("stall_over_blocking", finite), ("stall_over_blocking_all", optional)):
            row[name] = (before + row["stall"]) / (before + row["blocking"])
        row["save_over_raw"], row["load_over_raw"] = row["raw_write"] / row["blocking"], row["raw_read"] / row["load"]
        rows.append(row)
    rows = rows[1:]  # the first one opens connections and makes buffers and the plan
    found = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return found | {"mib": size / 2**20, "mib_per_s_save": size / 2**20 / found["blocking"], "mib_per_s_load": size / 2**20 / found["load"]}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- resuming
def config(url: str, data: str, steps: int) -> dict[str, Any]:
    return {
        "url": url,
        "model": {"name": "fno", "width": 16, "modes": [8, 8], "depth": 2},
        "task": {"name": "field_rollout", "space": [32, 32]},
        "data": {"name": "fields", "url": data},
        "optim": {"name": "adamw", "lr": 1e-3},
        "strategy": {"name": "fsdp"},
        "train": {"max_steps": steps, "global_batch": 2},
        "checkpoint": {"every": 0, "keep_last": 99},
        "log": {"every": 100, "progress": False},
        "resources": {"accelerator": "cpu"},
    }


def dataset(url: str) -> str:
    import numpy as np

    from datamodules.format import ArraySpec, write_dataset

    values = np.random.default_rng(0).standard_normal((32, 4, 1, 32, 32)).astype("f4")
    spec = ArraySpec(
        shape=values.shape, dtype="float32", dimensions=("trajectory", "time", "channel", "x", "y"), shard_length=8
    )
    attributes = {"kind": "fields", "array": "fields", "channels": ["w"], "splits": {"train": [0, 32]}}
    write_dataset(url, {"fields": spec}, {"fields": values}, attributes)
    return url


def train_once(url: str, data: str, at: tuple[int, ...]) -> None:
    """A run that was saved at the steps `at`."""
    from trainer import config as configs
    from trainer.callbacks.checkpoint import Checkpoint
    from trainer.lifecycle import prepare_new
    from trainer.run import fit

    run = configs.load(config(url, data, at[-1]))
    prepare_new(run)
    due = Checkpoint._due
    Checkpoint._due = lambda self, step: step in at  # type: ignore[method-assign]
    try:
        fit(run)
    finally:
        Checkpoint._due = due  # type: ignore[method-assign]


def watch() -> None:
    """Notes the end of each part of a start in this process."""
    import trainer.run
    from trainer.callbacks.stream import StreamPosition
    from trainer.strategies.base import Checkpointed

    def after(owner: Any, name: str, what: str) -> None:
        plain, told = getattr(owner, name), []

        def noted(*arguments: Any, **keywords: Any) -> Any:
            result = plain(*arguments, **keywords)
            if not told:
                told.append(note(what))
            return result

        setattr(owner, name, noted)

    after(trainer.run, "init_process_group", "rendezvous")
    after(trainer.run, "build", "data set, model")
    after(Checkpointed, "load_checkpoint", "sharding, load")
    after(StreamPosition, "on_train_batch_start", "first batch")
    after(StreamPosition, "on_train_batch_end", "first step")


def worker(arguments: list[str]) -> None:
    """What the launcher starts in place of `python -m trainer`."""
    note("launcher: start of the worker")
    import trainer.run  # noqa: F401

    note("imports of the worker")
    watch()
    from trainer.__main__ import main as trainer_main

    code = trainer_main(arguments)
    sys.stdout.flush()
    os._exit(code)


def launcher(arguments: list[str]) -> None:
    """`keel ARGUMENTS`, but for what it starts."""
    note("interpreter")
    from cluster import cli
    from cluster.launch import local

    local._MODULE = (str(Path(__file__)), "--worker")  # type: ignore[assignment]
    sys.exit(cli.main(arguments))


def resume_parts(url: str, steps: int, repeats: int) -> dict[str, float]:
    """Seconds of each part of `keel resume`, medians."""
    found: dict[str, list[float]] = {}
    for repeat in range(repeats):
        times = f"{url}-times-{repeat}"
        environment = {**os.environ, TIMES: times, "OMP_NUM_THREADS": "1"}
        start = time.time()
        command = [
            sys.executable,
            str(Path(__file__)),
            "--launcher",
            "resume",
            url,
            f"train.max_steps={steps + repeat + 1}",
        ]
        subprocess.run(command, check=True, env=environment, timeout=180, stdout=subprocess.DEVNULL)
        last = start
        with open(times) as file:
            for name, when in map(json.loads, file):
                found.setdefault(name, []).append(when - last)
                last = when
        found.setdefault("all", []).append(last - start)
    return {name: statistics.median(values) for name, values in found.items()}


def resume_steps(url: str, folder: str, repeats: int) -> dict[str, float]:
    """Seconds from `fit` to the end of the first step, in one process, by the step resumed from; medians."""
    from datamodules.store import Store
    from trainer.callbacks.stream import StreamPosition
    from trainer.checkpoint import step_name
    from trainer.lifecycle import prepare_resume
    from trainer.run import fit

    found: dict[str, list[float]] = {}
    ended: list[float] = []
    plain = StreamPosition.on_train_batch_end

    def noted(self: StreamPosition, trainer: Any, *arguments: Any) -> None:
        plain(self, trainer, *arguments)
        ended.append(time.perf_counter())

    StreamPosition.on_train_batch_end = noted  # type: ignore[method-assign]
    try:
        for repeat in range(repeats + 1):
            for step in STEPS:
                copy = f"{folder}/copy"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(url, copy)
                text = Path(copy, "config.yaml").read_text()
                Path(copy, "config.yaml").write_text(text.replace(url, copy))
                for later in STEPS:
                    if later > step:
                        Store(copy).sub("checkpoints").delete_tree(step_name(later))
                run = prepare_resume(copy, [f"train.max_steps={step + 1}"])
                ended.clear()
                start = time.perf_counter()
                fit(run, resume=True)
                if repeat:
                    found.setdefault(str(step), []).append(ended[0] - start)
    finally:
        StreamPosition.on_train_batch_end = plain  # type: ignore[method-assign]
    return {step: statistics.median(values) for step, values in found.items()}


# ---------------------------------------------------------------------------------------------------------------- table
def main() -> None:
    from _table import parser, save, show

    from trainer.quiet import quiet

    arguments = parser(__doc__)
    arguments.add_argument("--mib", type=int, default=192, help="MiB of state that are saved")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--s3", action="store_true", help="also on a radosgw of this machine")
    arguments.add_argument("--only", choices=["stall", "resume", "steps"], help="only this part")
    options = arguments.parse_args()
    quiet()
    rows: list[list[Any]] = []
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.only in (None, "stall"):
            measured = {"folder": saves(f"{folder}/saves", options.mib, options.repeats)}
            if options.s3:
                measured["s3"] = on_radosgw(f"{folder}/ceph", options)
            for name, found in measured.items():
                figures[f"saves_{name}"] = found
                rows += [
                    [f"{name}: blocking save of {found['mib']:.0f} MiB, s", found["blocking"], ""],
                    [f"{name}: stall of a save in the background, s", found["stall"], ""],
                    [f"{name}: finite parameters before a save, s", found["finite"], ""],
                    [f"{name}: the same, parity and self-check, s", found["optional"], ""],
                    [f"{name}: stall / blocking save", found["stall_over_blocking"], "at most 0.1"],
                    [f"{name}: the same with parity and self-check", found["stall_over_blocking_all"], ""],
                    [f"{name}: save, MiB/s", found["mib_per_s_save"], ""],
                    [f"{name}: save / bare store", found["save_over_raw"], "at least 0.7"],
                    [f"{name}: load, MiB/s", found["mib_per_s_load"], ""],
                    [f"{name}: load / bare store", found["load_over_raw"], "at least 0.7"],
                ]
        data = dataset(f"{folder}/data") if options.only != "stall" else ""
        if options.only in (None, "resume"):
            train_once(f"{folder}/run", data, (20,))
            figures["resume"] = resume_parts(f"{folder}/run", 20, options.repeats)
            rows += [[f"keel resume: {name}, s", seconds, ""] for name, seconds in figures["resume"].items()]
        if options.only in (None, "steps"):
            train_once(f"{folder}/long", data, STEPS)
            figures["steps"] = resume_steps(f"{folder}/long", folder, options.repeats)
            rows += [[f"resume at step {step}, in one process, s", seconds, "flat"] for step, seconds in figures["steps"].items()]  # fmt: skip
    note_line = f"one process, {options.repeats} repeats (medians; ratios pair by pair), objects of {PART >> 20} MiB"
    show("Checkpoints: stall, bandwidth, resume", ["what", "value", "aim"], rows, note_line)
    save(options, figures)


def on_radosgw(folder: str, options: argparse.Namespace) -> dict[str, float]:
    script = ["bash", str(ROOT / "scripts/services/ceph.sh")]
    environment = {**os.environ, "KEEL_CEPH_BYTES": str(8 << 30)}
    started = subprocess.run([*script, "up", folder], capture_output=True, text=True, timeout=280, env=environment)
    if started.returncode:
        raise SystemExit(f"--s3: {started.stderr.strip()}")
    lines = (line.removeprefix("export ") for line in started.stdout.splitlines())
    os.environ.update(dict(line.split("=", 1) for line in lines if "=" in line))
    try:
        return saves("s3://keel/bench", options.mib, options.repeats)
    finally:
        subprocess.run([*script, "down", folder], capture_output=True, timeout=120, check=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[3:])  # after the module's name
    elif sys.argv[1:2] == ["--launcher"]:
        launcher(sys.argv[2:])
    else:
        main()
