"""How long a resumed run takes until it trains again.

- By part: from `keel resume` to the end of the first step, in two processes after another (launcher and worker).
- Against the step index: in one process, from `fit` to the end of the first step; should be flat.

    python scripts/bench/resume.py [--repeats 5] [--only parts|steps] [--json FILE] [--markdown FILE]
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TIMES = "KEEL_BENCH_TIMES"  # where the processes of a resume note when they were where

# The step indices from which a run is resumed.
STEPS = (5, 50, 150)


def note(name: str) -> None:
    with open(os.environ[TIMES], "a") as file:
        file.write(json.dumps([name, time.time()]) + "\n")


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
        if fit(run)["status"] != "ok":
            raise SystemExit("resume: the run to be resumed was interrupted")
    finally:
        Checkpoint._due = due  # type: ignore[method-assign]


def watch() -> None:
    """Notes the end of each part of a start in this process."""
    import trainer.run
    from datamodules.position import StreamPosition
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
        config_file = Path(url, "config.yaml")  # one more step, as if the run had been stopped before it
        longer = re.sub(r"max_steps: \d+", f"max_steps: {steps + repeat + 1}", config_file.read_text())
        config_file.write_text(longer)
        start = time.time()
        command = [sys.executable, str(Path(__file__)), "--launcher", "resume", url]
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
    from datamodules.position import StreamPosition
    from datamodules.store import Store
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


def main() -> None:
    from _table import parser, save, show

    from trainer.quiet import quiet

    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--only", choices=["parts", "steps"], help="only this part")
    options = arguments.parse_args()
    quiet()
    rows: list[list[Any]] = []
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(f"{folder}/data")
        if options.only != "steps":
            train_once(f"{folder}/run", data, (20,))
            figures["parts"] = resume_parts(f"{folder}/run", 20, options.repeats)
            rows += [[f"keel resume: {name}, s", seconds, ""] for name, seconds in figures["parts"].items()]
        if options.only != "parts":
            train_once(f"{folder}/long", data, STEPS)
            figures["steps"] = resume_steps(f"{folder}/long", folder, options.repeats)
            rows += [[f"resumed at step {step}, in one process, s", seconds, "flat"] for step, seconds in figures["steps"].items()]  # fmt: skip
    show("Time until a resumed run trains again", ["what", "value", "aim"], rows, f"{options.repeats} repeats, medians")
    save(options, figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[3:])  # after the module's name
    elif sys.argv[1:2] == ["--launcher"]:
        launcher(sys.argv[2:])
    else:
        main()
