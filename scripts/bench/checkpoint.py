"""What checkpoints cost: the stall of a save, and bandwidth beside that of the store. (`resume.py`: the way back.)

- Stall: how long a save in the background holds training up, over the time that a blocking save of the same state does. Aim: at
  most 0.1. Both with what a run does before each save: its parameters must be finite. Once more with what is off by
  default: their hash for `recovery.parity_every` (without the gather of a few numbers between ranks), and the stored sample
  of `checkpoint.self_check`, here one row through the network. On a CPU these count for more than on a GPU, which reads
  its memory so much faster than a disk is written.
- Bandwidth: of blocking saves and of loads, over that of the same bytes through the bare store in the same run: objects of
  the same size, written and read by as many threads as go fastest. Aim: at least 0.7.

The store is a local folder, and with --s3 also a radosgw on this machine (scripts/services/ceph.sh).

    python scripts/bench/checkpoint.py [--mib 192] [--repeats 5] [--s3] [--json FILE] [--markdown FILE]
"""

import argparse
import os
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
PART = 64 << 20


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


# ---------------------------------------------------------------------------------------------------------------- table
def main() -> None:
    from _table import parser, save, show

    from trainer.quiet import quiet

    arguments = parser(__doc__)
    arguments.add_argument("--mib", type=int, default=192, help="MiB of state that are saved")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--s3", action="store_true", help="also on a radosgw of this machine")
    options = arguments.parse_args()
    quiet()
    rows: list[list[Any]] = []
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
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
    note_line = f"one process, {options.repeats} repeats (medians; ratios pair by pair), objects of {PART >> 20} MiB"
    show("Checkpoints: stall and bandwidth", ["what", "value", "aim"], rows, note_line)
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
    main()
