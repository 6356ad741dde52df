"""What this machine's CUDA GPU does with Keel: one table, offline, in some minutes.

Every strategy on one GPU, every precision, compilation and recomputation on a small transformer; saves beside training,
the guard that undoes bad steps, Muon and averaged weights, each run of these also continued from its last commit in
another process; then the speed of a 350M transformer and of an FNO. Each row is a real run of Keel in a process of its
own; its peak memory stands beside what `keel dryrun` plans for it, and its MFU refers to the peak of the device's data
sheet.

    make gpu-check              (or: python scripts/gpu_check.py [--only WORD] [--jobs N] [--markdown docs/results/gpu.md])

`--tiny` walks through the same runs with tiny networks on the CPU: it checks this script, not a GPU.

exit code: 0 all runs ended well, 1 some did not, 2 there is no CUDA GPU.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/bench")]

import torch

SMALL = {"model.width": 512, "model.depth": 8, "model.heads": 8, "train.global_batch": 16}
LARGE = {
    "model.width": 1024,
    "model.depth": 24,
    "model.heads": 16,
    "model.vocab_size": 32768,
    "task.vocab_size": 32768,
    "model.max_seq_len": 1024,
    "task.seq_len": 1024,
    "train.global_batch": 16,
    "train.precision": "bf16-mixed",
}
BESIDE = {
    "checkpoint.background": True,
    "checkpoint.every": 10,
    "checkpoint.self_check": True,
    "checkpoint.part_mib": 16,
}
UNDOES = {"recovery.nonfinite": "skip", "recovery.spike": "skip", "recovery.window": 8}
FNO = {"model.width": 128, "model.modes": "[32,32]", "train.global_batch": 16}
TINY = {"model.width": 16, "model.depth": 2, "train.global_batch": 2, "train.max_steps": 3, "checkpoint.every": 2}
MORE_STEPS = 5  # of a run that is continued

# Name -> (kind, overrides).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("transformer", SMALL),
    "fsdp": ("transformer", {**SMALL, "strategy.name": "fsdp"}),
    "deepspeed stage 2": ("transformer", {**SMALL, "strategy.name": "deepspeed", "strategy.stage": 2}),
    "deepspeed stage 3, offload": (
        "transformer",
        {
            **SMALL,
            "strategy.name": "deepspeed",
            "strategy.stage": 3,
            "strategy.offload_optimizer": True,
            "strategy.offload_parameters": True,
        },
    ),
    "fsdp, bf16-mixed": ("transformer", {**SMALL, "strategy.name": "fsdp", "train.precision": "bf16-mixed"}),
    "fsdp, bf16-true": ("transformer", {**SMALL, "strategy.name": "fsdp", "train.precision": "bf16-true"}),
    "fsdp, 16-mixed": ("transformer", {**SMALL, "strategy.name": "fsdp", "train.precision": "16-mixed"}),
    "fsdp, blocks recomputed": (
        "transformer",
        {**SMALL, "strategy.name": "fsdp", "train.activation_checkpointing": "block"},
    ),
    "fsdp, bf16-mixed, compiled": (
        "transformer",
        {**SMALL, "strategy.name": "fsdp", "train.precision": "bf16-mixed", "train.compile": True},
    ),
    "fsdp, saved beside training, continued": ("transformer", {**SMALL, **BESIDE, "strategy.name": "fsdp"}),
    "fsdp, 16-mixed, averaged, continued": (
        "transformer",
        {**SMALL, **BESIDE, "strategy.name": "fsdp", "train.precision": "16-mixed", "train.ema_decay": 0.99},
    ),
    "fsdp, bad steps undone, continued without": (
        "transformer",
        {**SMALL, **BESIDE, **UNDOES, "strategy.name": "fsdp"},
    ),
    "fsdp, continued with bad steps undone": ("transformer", {**SMALL, **BESIDE, "strategy.name": "fsdp"}),
    "fsdp, muon, bad steps undone, continued": (
        "transformer",
        {**SMALL, **BESIDE, **UNDOES, "strategy.name": "fsdp", "optim.name": "muon"},
    ),
    "350M transformer, bf16-mixed": ("transformer", {**LARGE, "strategy.name": "fsdp"}),
    "350M transformer, bf16-mixed, compiled": (
        "transformer",
        {**LARGE, "strategy.name": "fsdp", "train.compile": True},
    ),
    "fno 64x64": ("fno", FNO),
    "fno 64x64, bf16-mixed": ("fno", {**FNO, "train.precision": "bf16-mixed"}),
}
# Name -> what is changed when the run is continued.
CONTINUED: dict[str, dict[str, Any]] = {name: {} for name in CASES if name.endswith(", continued")} | {
    "fsdp, bad steps undone, continued without": {"recovery.nonfinite": "stop", "recovery.spike": "ignore"},
    "fsdp, continued with bad steps undone": UNDOES,
}
STEPS = 30
TIMEOUT_SECONDS = 600


def load(name: str, data: str, url: str, tiny: bool) -> Any:
    """The resolved config of a case."""
    from overhead import config

    from trainer import config as configs

    kind, overrides = CASES[name]
    raw = config(kind, "ddp", data, STEPS) | {"url": url, "diagnostics": {}, "name": name}
    raw["resources"] = {"accelerator": "cpu" if tiny else "cuda"}
    changes = {**overrides, **TINY} if tiny else overrides
    if tiny:
        changes = {key: value for key, value in changes.items() if key not in ("model.heads", "model.modes")}
    return configs.load(raw, [f"{key}={value}" for key, value in changes.items()])


def child(url: str, words: list[str]) -> dict[str, Any]:
    """Trains, or continues, the run at `url` in this process."""
    import lightning.pytorch as pl

    from trainer import config as configs
    from trainer import run

    class Steady(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2 and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    assemble = run.assemble

    def with_mark(parts: Any) -> Any:
        watch = assemble(parts)
        watch.callbacks.insert(0, Steady())
        return watch

    run.assemble = with_mark
    record = run.fit(configs.load(f"{url}/config.yaml"), resume="--resume" in words)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    names = ("throughput", "status", "loss", "steps", "attempts")
    return {"peak": peak, **{name: record[name] for name in names}}


def plan(url: str, tiny: bool) -> dict[str, Any]:
    """What `keel dryrun` says of the run at `url`."""
    from trainer import config as configs
    from trainer.planning.simulate import trace

    return {"planned": trace(configs.load(f"{url}/config.yaml"), accelerator=not tiny).peak}


def run_case(name: str, url: str) -> dict[str, Any]:
    """The run at `url`; `error` says in a line why there is none, or that it could not be continued."""
    from trainer import config as configs
    from trainer.lifecycle import prepare_resume

    found: dict[str, Any] = {"name": name, **start(url)}
    if name not in CONTINUED or "error" in found:
        return found
    steps = configs.load(f"{url}/config.yaml").train.max_steps + MORE_STEPS
    changes = {"train.max_steps": steps, **CONTINUED[name]}
    try:
        prepare_resume(url, [f"{key}={value}" for key, value in changes.items()])
    except (ValueError, RuntimeError) as error:
        return found | {"error": " ".join(f"continued: {error}".split())}
    again = start(url, "--resume")
    ended = again.get("status"), again.get("steps"), again.get("attempts")
    if ended != ("ok", steps, 2):
        return found | {"error": "continued: " + again.get("error", f"status, steps, attempts are {ended}")}
    return found | {"continued": again}


def measure(urls: dict[str, str], jobs: int, tiny: bool, tell: Callable[[dict[str, Any]], None]) -> None:
    """Plans and runs all of `urls` (case -> prepared run): small networks `jobs` at a time, then the others one by one,
    for their speed. `tell` gets what is found as it comes."""
    words = ["--plan", *(["--tiny"] if tiny else [])]
    small = [name for name in urls if not for_speed(name)]
    with ThreadPoolExecutor(jobs) as pool:
        plans = {name: pool.submit(start, url, *words) for name, url in urls.items()}
        runs = {pool.submit(run_case, name, urls[name]): name for name in small}
        for done in as_completed(runs):
            tell({**plans[runs[done]].result(), **done.result(), "shared": jobs > 1})
        wait(plans.values())
    for name in filter(for_speed, urls):
        tell({**plans[name].result(), **run_case(name, urls[name]), "shared": False})


def for_speed(name: str) -> bool:
    """Whether the case is one of the larger networks, whose speed is read."""
    return name.startswith(("350M", "fno"))


def start(url: str, *words: str) -> dict[str, Any]:
    """What `child` returns, in a process of its own; `error` if it failed."""
    return said([sys.executable, __file__, "--child", url, *words], TIMEOUT_SECONDS)


def said(command: list[str], seconds: float) -> dict[str, Any]:
    """The JSON in the last line that a command prints; `error` if it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {seconds} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"said no result: {done.stdout[-200:]!r}"}


def line(found: dict[str, Any]) -> list[Any]:
    """The row of the table."""
    if "error" in found:
        return [found["name"], found["error"][:60], *["-"] * 6]
    speed, peak, planned = found["throughput"], found["peak"], found["planned"]
    rate = (
        f"{speed['tokens_per_s']:,.4g} tokens" if "tokens_per_s" in speed else f"{speed['samples_per_s']:,.4g} samples"
    )
    mfu = f"{speed['mfu']:.1%}" if "mfu" in speed else "-"
    times = ["-", "-", "-"] if found["shared"] else [1e3 / speed["steps_per_s"], rate, mfu]
    measured, ratio = (f"{peak / 2**30:.3g}", f"{planned / peak:.3f}") if peak else ("-", "-")
    return [
        found["name"],
        found["status"] + (", continued" if "continued" in found else ""),
        *times,
        measured,
        f"{planned / 2**30:.3g}",
        ratio,
    ]


def table(known: list[dict[str, Any]], device: str, note: str = "", quietly: bool = False) -> None:
    """Shows what is known of the runs."""
    from _table import show

    sources = [row["throughput"]["peak_source"] for row in known if "peak_source" in row.get("throughput", {})]
    columns = ["run", "status", "ms per step", "per second", "MFU", "peak GiB", "planned GiB", "ratio"]
    peaks = ", ".join(dict.fromkeys(sources)) or "no known peak"
    told = f"{STEPS} steps each; MFU of: {peaks}; aim of the ratio: 0.9 to 1.1"
    if any(row.get("shared") for row in known):
        told += "; several of the small runs at a time: no times of these"
    show(f"Keel on one {device}", columns, [line(row) for row in known], told + note, quietly=quietly)


def joined(options: argparse.Namespace) -> int:
    """The table of saved figures: of each run those of the last file that has it."""
    from _table import save

    files = [json.loads(Path(name).read_text()) for name in options.from_json]
    runs: dict[str, dict[str, Any]] = {}
    told: list[str] = []
    for found in files:
        here = {name: row for name, row in found.items() if name in CASES}
        told.append(f"{', '.join(here)} in another run, at {found['machine']['commit']}")
        runs |= here
    device = next((found["device"] for found in files if "device" in found), "GPU")
    note = "".join(f"; {again}" for again in told[1:])
    table([runs[name] for name in CASES if name in runs], device, note)
    save(options, {"device": device, **runs}, measured_on=files[0]["machine"])
    return 0


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        words = sys.argv[3:]
        print(json.dumps(plan(sys.argv[2], "--tiny" in words) if "--plan" in words else child(sys.argv[2], words)))
        return 0
    from _table import parser, save

    arguments = parser(__doc__)
    arguments.add_argument("--only", metavar="WORD", default="", help="only the runs whose name holds this")
    arguments.add_argument("--jobs", type=int, default=1, help="small runs at a time, then without their times")
    arguments.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # on the CPU: checks this script
    arguments.add_argument(
        "--from-json",
        metavar="FILE",
        action="append",
        help="only the table of saved figures; the last that has a run counts",
    )
    options = arguments.parse_args()
    if options.from_json:
        return joined(options)
    if not torch.cuda.is_available() and not options.tiny:
        print("gpu-check: there is no CUDA GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 2
    from overhead import fields, text

    from trainer.lifecycle import prepare_new
    from trainer.quiet import quiet

    quiet()
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    names = [name for name in CASES if options.only in name]
    if importlib.util.find_spec("deepspeed") is None:
        names = [name for name in names if not name.startswith("deepspeed")]
    began = time.monotonic()
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"

    def tell(found: dict[str, Any]) -> None:
        # Written as they come: a machine that is lent may be taken back.
        rows[found["name"]] = found
        print(
            f"{time.monotonic() - began:4.0f} s  {found['name']}: {found.get('error') or found['status']}", flush=True
        )
        known = [row for row in rows.values() if row]
        table(known, device, quietly=len(known) < len(names))
        save(options, {"device": device, **{row["name"]: row for row in known}})

    with tempfile.TemporaryDirectory() as folder:
        data = {"fno": fields(f"{folder}/fields"), "transformer": text(f"{folder}/text")}
        urls = {}
        for number, name in enumerate(names):
            try:
                prepare_new(load(name, data[CASES[name][0]], url := f"{folder}/{number}", options.tiny))
                urls[name] = url
            except (ValueError, RuntimeError) as error:
                tell({"name": name, "error": " ".join(str(error).split())})
        measure(urls, options.jobs, options.tiny, tell)
    # A run whose continuation failed has its own good status, too.
    return 0 if all("error" not in row and row["status"] == "ok" for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
