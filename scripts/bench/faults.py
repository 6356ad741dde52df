"""Injected faults: how many a run survives without a human, what each costs, and whether the result is the same.

Small FNO and transformer runs on 1 to 4 processes, each hit by several faults at random steps (seeded): processes killed,
killed during a save, stopped, hung, crashed, preempted; a bit flipped in one replica; a store that is away, slow or full;
a clock that jumps; losses that are no numbers or jump. The launcher is Keel's; after a preemption the job is started again,
as a queue would. Each fault is one row; rows are written as they come, and a second call goes on where the first ended.

    python scripts/bench/faults.py --faults 200
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import _table
from scripts.bench.faults_worker import KINDS, NUMERIC
from tests.helpers.runs import fno_config, lm_config, tiny_fields, tiny_text

STEPS, EVERY, PER_RUN = 150, 5, 6
WORKER = "scripts.bench.faults_worker"
ALONE = tuple(kind for kind in KINDS if kind not in ("sigstop", "bit_flip"))  # what one process can be hit by


def main() -> None:
    parser = _table.parser(__doc__)
    parser.add_argument("--faults", type=int, default=200, help="at least so many")
    parser.add_argument("--folder", default=".keel/faults", help="runs and rows; what is there is not done again")
    parser.add_argument("--worlds", default="1,2,3,4", help="numbers of processes, in turn")
    parser.add_argument("--kinds", default="", help="only these, separated by commas")
    options = parser.parse_args()
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = read(folder / "rows.jsonl")
    data = {"fno": str(folder / "data/fields"), "lm": str(folder / "data/text")}
    if not (folder / "data").exists():
        tiny_fields(data["fno"], trajectories=16)
        tiny_text(data["lm"])
    worlds = [int(world) for world in options.worlds.split(",")]
    number = 0
    while len(rows) < options.faults:
        case = plan(number, worlds, options.kinds.split(",") if options.kinds else list(KINDS))
        number += 1
        if not case["faults"] or any(row["case"] == case["number"] for row in rows):
            continue
        found = carry_out(case, data, folder)
        with open(folder / "rows.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        rows += found
        survived = sum(row["survived"] for row in rows)
        print(f"{survived}/{len(rows)} survived; run {case['number']}: {case['model']} on {case['world']}", flush=True)
    report(options, rows)


def plan(number: int, worlds: list[int], kinds: list[str]) -> dict[str, Any]:
    """Run `number`: its model, processes, strategy and faults, a function of the number alone."""
    generator = random.Random(number)
    world = worlds[number % len(worlds)]
    numeric = number % 5 == 4  # of their own: the result is not that of an undisturbed run
    policy = generator.choice(["nan_rollback", "nan_skip"])
    allowed = [kind for kind in kinds if world > 1 or kind in ALONE]
    if numeric and set(allowed) & set(NUMERIC):
        allowed = [kind for kind in allowed if kind in (policy, "spike_skip") or kind in ("sigkill", "store_down")]
    else:
        allowed = [kind for kind in allowed if kind not in NUMERIC]
    # A bit can flip unseen where a parameter lies on one rank only.
    strategy = generator.choice(["ddp", "fsdp"])
    allowed = [kind for kind in allowed if kind != "bit_flip" or strategy == "ddp"]
    # Far enough from each other that what each costs can be told apart, but at any place within an interval.
    first = 20 if numeric else 5  # the median needs its window
    apart = (STEPS - first) // PER_RUN
    steps = [first + i * apart + generator.randrange(apart // 2) for i in range(PER_RUN)]
    faults = [
        {"id": f"{number}-{i}", "kind": generator.choice(allowed), "step": step, "rank": generator.randrange(world)}
        for i, step in enumerate(steps)
        if allowed
    ]
    return {
        "number": number,
        "model": ("fno", "lm")[number // len(worlds) % 2],
        "world": world,
        "strategy": strategy,
        "numeric": numeric,
        "policy": policy.removeprefix("nan_"),
        "faults": faults,
    }


def carry_out(case: dict[str, Any], data: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """The rows of one run's faults."""
    from datamodules.store import Store
    from trainer.records import read_metrics, read_record

    name = f"{case['model']}-{case['world']}-{case['strategy']}"
    reference = folder / "reference" / name
    if not (reference / "run/record.jsonl").exists():
        shutil.rmtree(reference, ignore_errors=True)
        assert run(reference, case | {"faults": [], "policy": "skip"}, data) == 0, f"the undisturbed run {name} failed"
    place = folder / f"case-{case['number']:04d}"
    shutil.rmtree(place, ignore_errors=True)
    start = time.monotonic()
    code = run(place, case, data)
    store = Store(str(place / "run"))
    record = read_record(store) if code == 0 else {}
    done = record.get("status") == "ok"

    def losses(url: str) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in read_metrics(Store(url)) if "loss" in row}

    exact = done and losses(str(place / "run")) == losses(str(reference / "run"))
    firsts = sorted(json.loads(path.read_text())["time"] for path in (place / "first").iterdir())
    fired = {path.name: json.loads(path.read_text()) for path in (place / "fired").iterdir()}
    starts = sorted((row["time"], row["resumed_from"]) for row in attempts(place))
    rows = []
    for fault in case["faults"]:
        hit = fired.get(fault["id"])
        if hit is None:  # a run that was over, or a kind that found no occasion (no save after it)
            continue
        after = next((back for when, back in starts if when > hit["time"]), None)
        resumed = next((when for when in firsts if when > hit["time"]), None)
        # Only these end the process: what follows another kind is not its doing.
        restarted = KINDS[fault["kind"]] or fault["kind"] == "nan_rollback"
        rows.append(
            {
                "case": case["number"],
                **{key: case[key] for key in ("model", "world", "strategy")},
                **{key: fault[key] for key in ("kind", "rank")},
                "step": hit["step"],
                "survived": done,
                "steps_lost": max(hit["step"] - 1 - after, 0) if restarted and after is not None else 0,
                "seconds": resumed - hit["time"] if restarted and resumed is not None else None,
                "equal": None if case["numeric"] else exact,
                "code": code,
                "run_seconds": time.monotonic() - start,
            }
        )
    if done and not os.environ.get("KEEP"):
        shutil.rmtree(place)
    return rows


def attempts(place: Path) -> list[dict[str, Any]]:
    from datamodules.store import Store
    from trainer.records import read_attempts

    return read_attempts(Store(str(place / "run")))


def run(place: Path, case: dict[str, Any], data: dict[str, str]) -> int:
    """Trains to the end, however often the job has to be started; the last exit code."""
    from cluster.launch import EXIT_REQUEUE, Job, launch
    from trainer import config as configs
    from trainer.lifecycle import prepare_new

    for part in ("fired", "first"):
        (place / part).mkdir(parents=True)
    (place / "plan.json").write_text(json.dumps(case["faults"]))
    url = str(place / "run")
    raw = (fno_config if case["model"] == "fno" else lm_config)(
        url, data[case["model"]], max_steps=STEPS, global_batch=12
    )
    raw["diagnostics"] = {}
    raw["checkpoint"] = {"every": EVERY, "keep_last": 2, "tolerate": 20}
    raw["log"] |= {"every": 4, "trace": False, "flush_seconds": 0.2}
    raw["resources"]["processes_per_node"] = case["world"]
    raw["strategy"] = {"name": case["strategy"]}
    raw["recovery"] = {
        "max_restarts": 50,
        "init_timeout_seconds": 60,
        "step_timeout_seconds": 5,
        "parity_every": EVERY,
        "max_events": 100,
    }
    if case["numeric"]:
        raw["recovery"] |= {"nonfinite": case["policy"], "spike": "skip", "window": 8, "threshold": 1000.0}
    config = configs.load(raw)
    prepare_new(config)
    processes, extra = case["world"], ()
    while True:
        job = Job(
            (WORKER, "fit", url, *extra),
            processes=processes,
            threads=1,
            max_restarts=config.recovery.max_restarts,
            restart_wait_s=0.01,
            timeout_s=600,
            grace_s=20,
        )
        with open(place / "log.txt", "a") as log, quietly(log):
            code = launch(job)
        if code != EXIT_REQUEUE:
            return code
        extra = ("--resume",)


@contextlib.contextmanager
def quietly(log: Any) -> Any:
    """What processes say goes to a file."""
    kept = os.dup(1), os.dup(2)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
        by_kind["all"].append(row)
    table, figures = [], {}
    for kind in [*(kind for kind in KINDS if kind in by_kind), "all"]:
        found = by_kind[kind]
        seconds = [row["seconds"] for row in found if row["seconds"] is not None]
        compared = [row["equal"] for row in found if row["equal"] is not None]
        figures[kind] = {
            "faults": len(found),
            "survived": sum(row["survived"] for row in found),
            "steps_lost_mean": statistics.mean(row["steps_lost"] for row in found),
            "steps_lost_max": max(row["steps_lost"] for row in found),
            "seconds_median": statistics.median(seconds) if seconds else None,
            "seconds_max": max(seconds) if seconds else None,
            "equal": sum(compared),
            "compared": len(compared),
        }
        each = figures[kind]
        table.append(
            [
                kind,
                f"{each['survived']}/{each['faults']}",
                each["steps_lost_mean"],
                each["steps_lost_max"],
                "-" if not seconds else each["seconds_median"],
                "-" if not seconds else each["seconds_max"],
                f"{each['equal']}/{each['compared']}" if compared else "-",
            ]
        )
    columns = ["fault", "survived", "steps lost, mean", "max", "s to next step, median", "max", "losses bitwise equal"]
    runs, worlds = {row["case"] for row in rows}, sorted({row["world"] for row in rows})
    note = f"{len(runs)} runs of {STEPS} steps on {worlds} processes, a commit every {EVERY} steps"
    _table.show("Injected faults", columns, table, note)
    _table.save(options, {"kinds": figures, "runs": len(runs)})


if __name__ == "__main__":
    main()
