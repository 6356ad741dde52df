"""What this machine's CUDA GPU does with Keel's data: simulators in float64, and batches in pinned memory. Offline.

Simulators: every shipped config of `configs/data` solves its first group of trajectories on the CPU, on the GPU and on the
GPU once more, few frames, without burn-in, so that chaos has no time to make the rounding errors large. Streams: batches of
every kind are compared with those of a process without a GPU, and each entry must be pinned; then a loop that copies each
batch to the GPU is timed with pinned batches, with those of the same stream unpinned, and beside a loop that copies one
batch, always the same.

    python scripts/gpu_data.py [--only WORD] [--jobs N] [--markdown docs/results/gpu_data.md]       (make gpu-check)

exit code: 0 all well, 1 something was not, 2 there is no CUDA GPU.
"""

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/bench")]

import numpy as np
import torch
from gpu_check import said

FRAMES = 6
CLOSE = 1e-10  # relative difference of the second frame (of a steady problem, the first)
CHAOTIC = ("skew_product",)  # chooses its systems by what long chaotic solutions do: others than on the CPU
TIMED = ("fields", "bfloat16", "tokens")
TIMEOUT_SECONDS = 240
BATCHES = 12
# Beyond the shipped configs: enough points for a GPU to be worth it. Name -> (config, overrides).
LARGER = {
    "navier_stokes_2d, 256x256, batch 32": (
        "navier_stokes_2d",
        ["generator.resolution=256", "generator.dt=0.005", "generator.dt_save=0.05", "generator.batch=32", "generator.frames=3"],
    ),
    "lorenz96, batch 16384": ("lorenz96", ["generator.batch=16384", "generator.frames=3"]),
}  # fmt: skip


def simulators() -> dict[str, tuple[str, list[str]]]:
    """Name -> (config, overrides) of everything that a GPU can solve."""
    found: dict[str, tuple[str, list[str]]] = {}
    for path in sorted((ROOT / "configs/data").glob("*.yaml")):
        if path.stem not in ("stdlib_text", "text_files", "dysts"):  # no equations; and dysts solves with scipy
            found[path.stem] = (path.stem, [])
    return found | LARGER


def simulate(name: str, device: str) -> dict[str, Any]:
    """One simulator on the CPU and on the device, in this process."""
    from datamodules.make import generator_of, load

    config, overrides = simulators()[name]

    def group(where: str) -> tuple[np.ndarray, float]:
        words = [*overrides, f"generator.device={where}"]
        made = load(str(ROOT / f"configs/data/{config}.yaml"), words)
        if "frames" in made.generator and not any("frames" in word for word in words):
            made.generator["frames"] = min(FRAMES, made.generator["frames"])
        if "burn_in" in made.generator:
            made.generator["burn_in"] = type(made.generator["burn_in"])(0)
        generator: Any = generator_of(made)[1]
        began = time.perf_counter()
        values = generator.group(0)
        return values, time.perf_counter() - began

    if device != "cpu":
        torch.zeros(1, device=device)  # the time to start CUDA is no simulator's
    cpu, cpu_s = group("cpu")
    first, _ = group(device)
    again, gpu_s = group(device)
    at = min(1, cpu.shape[1] - 1)
    scale = np.abs(cpu).max() or 1.0
    return {
        "name": name,
        "shape": list(cpu.shape),
        "second": float(np.abs(first[:, at] - cpu[:, at]).max() / scale),
        "last": float(np.abs(first[:, -1] - cpu[:, -1]).max() / scale),
        "std": float(first.std() / cpu.std()),
        "same": bool(np.array_equal(first, again)),
        "cpu_s": cpu_s,
        "gpu_s": gpu_s,
    }


def streams(folder: str) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `StreamingDataset` of every kind of batch; writes the data if they are not there."""
    from datamodules.format import ArraySpec, write_dataset

    generator = np.random.default_rng(0)
    values = generator.standard_normal((96, 16, 2, 64, 64), dtype="f4")
    half = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    axes = ("trajectory", "time", "channel", "y", "x")
    numbers = {"viscosity": generator.random(96)}
    about = {"kind": "fields", "array": "fields", "channels": ["u", "v"], "dt": 1.0, "splits": {"train": [0, 96]}}
    tokens = generator.integers(0, 50, 400_000, dtype="u2")
    text = {"kind": "text", "array": "tokens", "vocab_size": 50, "separator": 0, "splits": {"train": [0, tokens.size]}}
    if not Path(folder, "fields").exists():
        extra = {"viscosity": ArraySpec((96,), "float64", ("trajectory",), 96)}
        for name, array, dtype in (("fields", values, "float32"), ("bfloat16", half, "bfloat16")):
            spec = ArraySpec(values.shape, dtype, axes, shard_length=16)
            write_dataset(f"{folder}/{name}", {"fields": spec, **extra}, {"fields": array, **numbers}, about)
        spec = ArraySpec(tokens.shape, "uint16", ("token",), shard_length=1 << 17, chunk_length=1 << 14)
        write_dataset(f"{folder}/text", {"tokens": spec}, {"tokens": tokens}, text)
    common: dict[str, Any] = {"global_batch": 16, "seed": 3}
    fields = {**common, "url": f"{folder}/fields"}
    return {
        "fields": {**fields, "frames": 4},
        "fields, input, target and parameters": {**fields, "input_frames": 1, "output_frames": 3, "parameters": ["viscosity"]},
        "fields, all pairs": {**fields, "frames": 2, "pairs": True},
        "bfloat16": {**common, "url": f"{folder}/bfloat16", "frames": 4},
        "tokens": {**common, "kind": "text", "url": f"{folder}/text", "seq_len": 512},
        "tokens, documents": {**common, "kind": "text", "url": f"{folder}/text", "seq_len": 512, "documents": True},
        "mixture": {
            **common,
            "kind": "mixture",
            "sources": [{"url": f"{folder}/fields", "frames": 4}, {"url": f"{folder}/bfloat16", "frames": 4, "weight": 2.0}],
        },
    }  # fmt: skip


def batches(given: dict[str, Any], count: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first batches of a stream."""
    from datamodules.loader import StreamingDataset

    stream = StreamingDataset(**given)
    yield from itertools.islice(stream, count)
    stream.close()


def digest(batch: dict[str, torch.Tensor]) -> str:
    """Of all entries."""
    found = hashlib.sha256()
    for name in sorted(batch):
        found.update(name.encode() + batch[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def stream(name: str, folder: str, device: str) -> dict[str, Any]:
    """One kind of batches: what they hold and, on a GPU, whether they are pinned and get there as they are."""
    given = streams(folder)[name]
    if device == "cpu":
        return {"digests": [digest(batch) for batch in batches(given, BATCHES)], "loose": []}
    torch.zeros(1, device=device)
    digests, loose = [], set()
    for batch in batches(given, BATCHES):
        digests.append(digest(batch))
        loose |= {entry for entry, value in batch.items() if not value.is_pinned()}
        copy = {entry: value.to(device, non_blocking=True) for entry, value in batch.items()}
        torch.cuda.synchronize()
        if digest({entry: value.cpu() for entry, value in copy.items()}) != digests[-1]:
            loose.add("wrong on the device")
    return {"digests": digests, "loose": sorted(loose)}


def rates(name: str, folder: str, device: str) -> dict[str, float]:
    """Batches/s of a loop that copies each to the GPU: as they come, unpinned, and the same one again and again."""
    given, found = streams(folder)[name], {}
    torch.zeros(1, device=device)
    for how in ("pinned", "unpinned", "the same"):
        source = batches(given, 1 << 30)
        one = next(source)
        found["megabytes"] = sum(value.nbytes for value in one.values()) / 1e6
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < 1.5:
            batch = one if how == "the same" else next(source)
            if how == "unpinned":
                batch = {entry: value.clone() for entry, value in batch.items()}
            for value in batch.values():
                value.to(device, non_blocking=True)
            count += 1
        torch.cuda.synchronize()
        found[how] = count / (time.perf_counter() - began)
    return found


def child(*words: str) -> dict[str, Any]:
    """What a process of its own finds; `error` if it fails."""
    return said([sys.executable, __file__, "--child", *words], TIMEOUT_SECONDS)


def wrong(found: dict[str, Any]) -> str:
    """What is not as it should be, in a few words; empty if all is."""
    if "error" in found:
        return str(found["error"])[:80]
    if "digests" in found:
        told = [f"not pinned: {', '.join(found['loose'])}"] if found["loose"] else []
        return "; ".join(told + (["other values"] if found["digests"] != found["expected"] else []))
    told = [] if found["same"] else ["twice not the same"]
    near = found["second"] <= CLOSE or found["name"] in CHAOTIC
    return "; ".join(told + ([] if near else ["far from the CPU"]))


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        what, *words = sys.argv[2:]
        print(json.dumps({"simulator": simulate, "stream": stream, "rates": rates}[what](*words)))
        return 0
    from _table import parser

    arguments = parser(__doc__)
    arguments.add_argument("--only", metavar="WORD", default="", help="only what has this in its name")
    arguments.add_argument(
        "--jobs", type=int, default=1, help="simulators at a time; their seconds are then of a shared GPU"
    )
    arguments.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # on the CPU: checks this script
    options = arguments.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print("gpu-check: there is no CUDA GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        kinds = [name for name in streams(folder) if options.only in name]
        names = [name for name in simulators() if options.only in name]
        if not names and not kinds:
            print(f"gpu-check: --only {options.only}: fits no simulator and no kind of batches", file=sys.stderr)
            return 2
        return check(options, names, kinds, folder)


def check(options: argparse.Namespace, names: list[str], kinds: list[str], folder: str) -> int:
    """Compares, prints and saves; the exit code."""
    from _table import save, show

    device = "cpu" if options.tiny else "cuda"
    label = "CPU" if options.tiny else torch.cuda.get_device_name()
    shown = 0
    rows: list[list[Any]] = []
    figures: dict[str, Any] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, found in zip(names, pool.map(lambda name: child("simulator", name, device), names), strict=True):
            figures[name] = found
            print(f"{name}: {wrong(found) or 'ok'}", flush=True)
            if "error" in found:
                rows.append([name, found["error"][:80], *["-"] * 6])
                continue
            shape = "x".join(map(str, found["shape"]))
            rest = [f"{found[key]:.1e}" for key in ("second", "last")]
            rows.append(
                [name, wrong(found) or "ok", shape, *rest, f"{found['std']:.6f}", f"{found['cpu_s']:.3g}", f"{found['gpu_s']:.3g}"]
            )  # fmt: skip
    columns = ["simulator", "status", "[B, frames, C, space]", "2nd frame", "last frame", "std ratio", "CPU s", "GPU s"]
    note = f"differences from the CPU over the largest value; at most {CLOSE:g} in the 2nd frame; twice on the GPU the same bits"
    if options.jobs > 1:
        note += f"; {options.jobs} at a time: the seconds are of shared cores and a shared GPU"
    if rows:
        shown += 1
        show(f"Simulators on one {label}", columns, rows, note)
    rows = []
    pairs = [(name, where) for name in kinds for where in (device, "cpu")]
    with ThreadPoolExecutor(options.jobs) as pool:
        here = dict(zip(pairs, pool.map(lambda pair: child("stream", pair[0], folder, pair[1]), pairs), strict=True))
    for name in kinds:
        found = {**here[name, device], "expected": here[name, "cpu"].get("digests")}
        figures[f"batches: {name}"] = found
        told = wrong(found) or "ok"
        print(f"{name}: {told}", flush=True)
        speed = child("rates", name, folder, device) if name in TIMED and not options.tiny else {}
        found["rates"] = speed
        if "pinned" not in speed:
            rows.append([name, told, *["-"] * 4])
            continue
        size, pinned = speed["megabytes"], speed["pinned"]
        rows.append([name, told, size, pinned * size / 1e3, pinned / speed["unpinned"], pinned / speed["the same"]])
    if rows:
        shown += 1
        show(
            f"Batches of a local stream on one {label}",
            ["batches", "status", "MB", "GB/s to the GPU", "over unpinned", "over one batch again and again"],
            rows,
            "values as of a process without a GPU, and on the device; every entry pinned; one consumer, default threads",
        )
    save(options, figures, tables=shown)
    return 1 if any(map(wrong, figures.values())) else 0


if __name__ == "__main__":
    sys.exit(main())
