"""Kills a run with SIGKILL at random instants, resumes it each time, and compares it with a run left alone.

The whole process tree of `keel train` or `keel resume` dies each time, at any moment: start-up, a step, a save, a commit.
At the end the losses must be bitwise those of the uninterrupted run, and every step must have seen the same samples.

    python scripts/experiments/kill_resume.py [--kills 10] [--seed 0] [--model fno|lm] [--processes 2] [--json FILE]
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts" / "bench")]  # before what follows

import yaml
from _table import parser, save, show
from demo import kill_tree

from datamodules.store import Store
from tests.helpers.runs import fno_config, lm_config, tiny_fields, tiny_text
from trainer.checkpoint import latest
from trainer.records import read_metrics, read_record, read_trace


def run(command: list[str], kill_after: float | None) -> bool:
    """Runs a keel command; True when it ended by itself, False when it was killed."""
    process = subprocess.Popen([sys.executable, "-m", "cluster.cli", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        code = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        return False
    if code:
        raise SystemExit(f"keel {' '.join(command)} failed with exit code {code}")
    return True


def history(url: str) -> tuple[dict[int, float], dict[int, list[int]]]:
    """(loss by step, sample ids by step) of what counts of a run."""
    losses = {row["step"]: row["loss"] for row in read_metrics(Store(url)) if "loss" in row}
    samples: dict[int, list[int]] = {}
    for row in read_trace(Store(url)):
        samples.setdefault(row["step"], []).extend(row["index"])
    return losses, samples


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--model", choices=("fno", "lm"), default="fno")
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=600)
    options = arguments.parse_args()
    generator = random.Random(options.seed)
    rows, figures = [], []
    with tempfile.TemporaryDirectory() as folder:
        make, config = (tiny_fields, fno_config) if options.model == "fno" else (tiny_text, lm_config)
        data = make(f"{folder}/data")
        for name in ("whole", "killed"):
            raw = config(f"{folder}/{name}", data, max_steps=options.steps)
            raw["checkpoint"] = {"every": 20}
            raw["resources"] = {"processes_per_node": options.processes, "threads": 1}
            Path(folder, f"{name}.yaml").write_text(yaml.safe_dump(raw))
        start = time.monotonic()
        run(["train", f"{folder}/whole.yaml"], None)
        duration = time.monotonic() - start
        times = [row["time"] for row in read_metrics(Store(f"{folder}/whole")) if "loss" in row]
        training = times[-1] - times[0]
        startup = duration - training
        url, done, kills = f"{folder}/killed", False, 0
        while not done:
            begun = Path(url, "config.yaml").exists()
            command = ["resume", url] if begun else ["train", f"{folder}/killed.yaml"]
            # From the middle of the start-up on, and so early that training does not end before the last kill.
            latest_instant = startup + 1.5 * training / options.kills
            wait = generator.uniform(0.6 * startup, latest_instant) if kills < options.kills else None
            done = run(command, wait)
            if not done:
                kills += 1
                step = latest(Store(url).sub("checkpoints")) if begun or Path(url, "config.yaml").exists() else None
                rows.append([kills, f"{wait:.2f}", "none" if step is None else step])
                figures.append({"seconds": wait, "committed_step": step})
        (losses, samples), (expected, order) = history(url), history(f"{folder}/whole")
        equal, same = losses == expected, samples == order
        attempts = read_record(Store(url))["attempts"]
    show(
        f"SIGKILL of the whole tree, {options.model}, {options.processes} processes, {options.steps} steps",
        ["kill", "after s", "last committed step"],
        rows,
        f"{attempts} attempts that began; losses bitwise equal: {equal}; samples of each step equal: {same}",
    )
    save(options, {"kills": figures, "losses_bitwise_equal": equal, "samples_equal": same, "attempts": attempts})
    if not (equal and same and kills >= options.kills):
        raise SystemExit(json.dumps({"equal": equal, "same": same, "kills": kills}))


if __name__ == "__main__":
    main()
