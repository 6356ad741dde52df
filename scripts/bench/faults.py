"""Injected faults: how many a run survives without a human, what each costs, and whether the result is the same.

Small FNO and transformer runs on 1 to 4 processes, each hit by several faults at random instants (seeded): processes
killed (one rank, the whole tree, in a save, after the last commit), stopped, hung, crashed, preempted; also while they
start; a bit flipped in one replica; the newest commit damaged; a store that is slow, throttles, is down for less or more
than its deadline, or full; a local disk that is full; a clock that jumps; losses that are no numbers or jump. The launcher
is Keel's; after a preemption, or when all of it was killed, it is started again, as a queue would. Most processes are
forked from one that has imported all (see `faults_fork`); those of every fifth run are started as users start them, and
theirs is the time to the next step with imports. Each fault that really struck is a row, written when its run is over; a
second call goes on where the first ended. Exit code 1: some aim, which the table names, is not reached. Needs Linux, for a full disk the right to mount one.

    python scripts/bench/faults.py --faults 200
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, ROOT)

from scripts.bench import _table
from scripts.bench.faults_fork import PRELOAD, launcher
from scripts.bench.faults_inject import OUTSIDE, Injector, Place, events
from scripts.bench.faults_report import cost, report, told
from scripts.services import s3
from tests.helpers.runs import fno_config, lm_config, tiny_fields, tiny_text

STEPS, EVERY, PER_RUN = 144, 5, 8
WORKER = "scripts.bench.faults_worker"
LIMIT_S = 900.0  # for one run with all of its faults
MANY = ("sigstop", "bit_flip")  # what one process cannot be hit by, or cannot notice
EARLY = ("sigterm", "sigusr1", "sigkill", "sigkill_tree")  # what may strike while processes start

# Kinds of runs: where it lies, and what strikes it.
PROCESS = ("sigterm", "sigusr1", "sigkill", "sigkill_tree", "sigkill_in_save", "sigstop", "hang", "crash", "bit_flip")
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "process": ("local", (*PROCESS, "damaged", "clock_jump")),
    "store": (
        "s3",
        ("store_slow", "store_throttled", "store_down", "store_gone", "sigkill", "sigkill_in_save", "sigterm"),
    ),
    "full disk": ("small", ("disk_full", "disk_full", "sigterm", "clock_jump")),
    "full store": ("s3", ("store_full", "store_full", "sigkill_tree", "store_slow")),
    "numbers": ("local", ("nan", "spike", "nan", "spike", "sigkill")),
}
ORDER = ("process", "store", "numbers", "process", "full disk", "process", "store", "numbers", "process", "full store")
KINDS = tuple(dict.fromkeys(kind for _, kinds in GROUPS.values() for kind in kinds))
RESTARTS = {*PROCESS, "damaged", "store_gone", "nan_rollback", "spike_rollback"}  # training goes back to a commit


def main() -> int:
    parser = _table.parser(__doc__)
    parser.add_argument("--faults", type=int, default=200, help="at least so many")
    parser.add_argument("--rows", help="file of rows; what is there is not done again (default: in the folder)")
    parser.add_argument("--folder", default=".keel/faults", help="runs, data and references")
    parser.add_argument("--worlds", default="1,2,3,4", help="numbers of processes, in turn")
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file, worlds = Path(options.rows or folder / "rows.jsonl"), [int(world) for world in options.worlds.split(",")]
    data = {"fno": str(folder / "data/fields"), "lm": str(folder / "data/text")}
    if not (folder / "data/done").exists():
        tiny_fields(data["fno"], trajectories=16)
        tiny_text(data["lm"])
        (folder / "data/done").touch()
    rows = read(file)
    done, lock = {row["case"] for row in rows}, threading.Lock()
    numbers = iter(number for number in range(10**6) if number not in done)

    def lane(_: int) -> None:
        while True:
            with lock:
                if len(rows) >= options.faults:
                    return
                number = next(numbers)
            found = carry_out(plan(number, worlds), data, folder)
            with lock:
                with open(file, "a") as out:
                    out.writelines(json.dumps(row) + "\n" for row in found)
                rows.extend(found)
                survived = sum(row["survived"] for row in rows)
                print(f"{time.strftime('%H:%M:%S')} {survived}/{len(rows)} survived; {told(found)}", flush=True)

    s3.up(folder / "s3")
    try:
        for world in worlds:  # each once, before runs that need them wait for them side by side
            for model in data:
                undisturbed(
                    folder, plan(0, worlds) | {"model": model, "world": world, "strategy": strategy(model, world)}, data
                )
        with ThreadPoolExecutor(options.lanes) as pool:
            list(pool.map(lane, range(options.lanes)))
    finally:
        s3.down(folder / "s3")
    setting = f"of {STEPS} steps, a commit every {EVERY} steps, {options.lanes} runs at a time"
    return 1 if report(options, rows, setting, EVERY) else 0


def strategy(model: str, world: int) -> str:
    return "ddp" if (model == "fno") == (world % 2 == 0) else "fsdp"


def plan(number: int, worlds: list[int]) -> dict[str, Any]:
    """Run `number`: its model, processes, place and faults, a function of the number alone."""
    generator = random.Random(number)
    world, group = worlds[number % len(worlds)], ORDER[number % len(ORDER)]
    model = ("fno", "lm")[number // len(worlds) % 2]
    store, kinds = GROUPS[group]
    policies = {name: generator.choice(["skip", "rollback"]) for name in ("nan", "spike")}
    allowed = [kind for kind in kinds if world > 1 or kind not in MANY]
    # A bit can flip unseen where a parameter lies on one rank only.
    allowed = [kind for kind in allowed if kind != "bit_flip" or strategy(model, world) == "ddp"]
    deck = [kind for _ in range(PER_RUN) for kind in generator.sample(allowed, len(allowed))][:PER_RUN]
    first = 24 if group == "numbers" else 7  # the median needs its window, a damaged commit another one before it
    apart = (STEPS - 4 - first) // PER_RUN
    faults = []
    for i, kind in enumerate(deck):
        again = not faults or faults[-1]["kind"] in RESTARTS  # there is a start for it to strike
        early = kind in EARLY and again and generator.random() < 0.35
        told = kind in ("sigterm", "sigusr1")
        faults.append(
            {
                "id": f"{number}-{i}",
                "kind": f"{kind}_{policies[kind]}" if kind in policies else kind,
                "step": first + i * apart + generator.randrange(max(apart - 6, 1)),
                "rank": generator.randrange(world + told),  # a launcher may be told, too
                "phase": "start" if early else "run",
                "delay": generator.uniform(0, 8.0 if early else 0.15),
            }
        )
    if group == "process" and generator.random() < 0.7:
        last = {"id": f"{number}-end", "kind": "sigkill_at_end", "step": STEPS, "rank": 0, "phase": "run", "delay": 0.0}
        faults.append(last)
    return {
        "number": number,
        "group": group,
        "store": store,
        "model": model,
        "world": world,
        "strategy": strategy(model, world),
        "background": generator.random() < 0.5,
        "forked": number % 5 > 0,
        "policies": policies,
        "faults": faults,
    }


def carry_out(case: dict[str, Any], data: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """The rows of one run's faults."""
    from datamodules.store import Store
    from trainer.checkpoint import latest, verify
    from trainer.records import read_record

    reference = undisturbed(folder, case, data)
    root = folder / f"case-{case['number']:04d}"
    shutil.rmtree(root, ignore_errors=True)
    with Place(root, case["store"]) as place:
        code, struck = run(place, case, data)
        store = Store(place.url)
        record = read_record(store) if code == 0 else {}
        done = record.get("status") == "ok" and record.get("steps") == STEPS
        newest = latest(store.sub("checkpoints")) if done else None
        done = done and newest == STEPS and not verify(store.sub("checkpoints"), STEPS)
        found = losses(place.url) if done else {}
    struck |= {event["id"]: event["time"] for event in events(root) if "id" in event}
    steps = [(float(a), int(b), int(c)) for a, b, c in map(str.split, (root / "steps").read_text().splitlines())]
    faults = sorted((fault for fault in case["faults"] if fault["id"] in struck), key=lambda f: struck[f["id"]])
    rows = []
    for fault, after in zip(faults, [*faults[1:], None], strict=True):
        until = struck[after["id"]] if after else float("inf")
        rows.append(
            {
                "case": case["number"],
                "url": place.url,
                **{key: case[key] for key in ("group", "model", "world", "strategy", "store", "background", "forked")},
                **{key: fault[key] for key in ("kind", "rank", "phase")},
                # Of a run that did not end well the last fault is the cause: after the others it went on.
                "survived": done or after is not None,
                **cost(steps, struck[fault["id"]], until),
                "equal": None if case["group"] == "numbers" or not done else found == reference,
                "ratio": tail(found) / tail(reference) if done else None,
                "code": code,
            }
        )
    if done and not os.environ.get("KEEP"):
        shutil.rmtree(root)
    return rows


def undisturbed(folder: Path, case: dict[str, Any], data: dict[str, str]) -> dict[int, float]:
    """The losses of the same run without a fault."""
    root = folder / "reference" / f"{case['model']}-{case['world']}-{case['strategy']}"
    if not (root / "losses.json").exists():
        shutil.rmtree(root, ignore_errors=True)
        with Place(root, "local") as place:
            plain = {"group": "process", "background": False, "faults": [], "store": "local", "forked": True}
            code, _ = run(place, case | plain, data)
            assert code == 0, f"the undisturbed run failed: {root}/log.txt"
            (root / "losses.json").write_text(json.dumps(losses(place.url)))
    return {int(step): loss for step, loss in json.loads((root / "losses.json").read_text()).items()}


def losses(url: str) -> dict[int, float]:
    from datamodules.store import Store
    from trainer.records import read_metrics

    return {row["step"]: row["loss"] for row in read_metrics(Store(url)) if "loss" in row}


def tail(values: dict[int, float]) -> float:
    """The final loss, whatever bad numbers there were among the last ones."""
    return statistics.median([values[step] for step in sorted(values) if math.isfinite(values[step])][-20:])


def run(place: Place, case: dict[str, Any], data: dict[str, str]) -> tuple[int, dict[str, float]]:
    """Trains to the end, however often the job has to be started; the last exit code, and when which fault struck."""
    from cluster.launch import EXIT_REQUEUE
    from datamodules.store import Store
    from trainer import config as configs

    config = configs.load(described(place, case, data))
    Store(config.url).write("config.yaml", configs.to_yaml(config).encode())
    content = {"faults": case["faults"], "url": config.url, "world": case["world"], "max_restarts": 4}
    (place.folder / "plan.json").write_text(json.dumps(content))
    outside = [fault for fault in case["faults"] if fault["kind"] in OUTSIDE]
    injector = Injector(place, outside, case["world"], str(case["number"]), 2 * EVERY + 1)
    end, extra = time.monotonic() + LIMIT_S, ()
    environment = {**os.environ, **place.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    (place.folder / "log.txt").touch()
    while True:
        injector.tree_killed = False
        wait = started(place.folder, extra, environment, injector, forked=case["forked"])
        if injector.ident is None:  # not begun yet
            injector.start()
        code = wait(max(end - time.monotonic(), 1))
        if (code != EXIT_REQUEUE and not injector.tree_killed) or time.monotonic() > end:
            break
        extra = ("--resume",)
        with open(place.folder / "log.txt", "a") as log:
            log.write(f"--- the launcher ended with {code}: started again\n")
    injector.over.set()
    injector.join()
    return code, injector.struck


def started(
    folder: Path, extra: tuple[str, ...], environment: dict[str, str], injector: Injector, *, forked: bool
) -> Callable[[float], int]:
    """Starts a launcher; returns a function that waits so long for its end, kills it then, and gives its exit code."""
    if forked:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        process = context.Process(target=launcher, args=(str(folder), list(extra), environment))
        process.start()
        injector.launcher = process.pid

        def joined(seconds: float) -> int:
            process.join(seconds)
            if process.exitcode is None:
                process.kill()
                process.join()
            return int(process.exitcode)

        return joined
    with open(folder / "log.txt", "ab") as log:
        words = [sys.executable, "-m", WORKER, "launch", str(folder), *extra]
        child = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
    injector.launcher = child.pid

    def waited(seconds: float) -> int:
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    return waited


def described(place: Place, case: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """The config of a run."""
    make = fno_config if case["model"] == "fno" else lm_config
    raw = make(place.url, data[case["model"]], max_steps=STEPS, global_batch=12)
    raw["diagnostics"] = {}
    full = case["group"].startswith("full")
    raw["checkpoint"] = {
        "every": EVERY,
        "keep_last": 2,
        "tolerate": 50 if full else 0,
        "background": case["background"],
    }
    raw["log"] |= {"every": 4, "trace": False, "flush_seconds": 0.2}
    raw["resources"]["processes_per_node"] = case["world"]
    raw["strategy"] = {"name": case["strategy"]}
    raw["recovery"] = {"init_timeout_seconds": 120, "step_timeout_seconds": 8, "max_events": 100}
    if case["strategy"] == "ddp" and case["world"] > 1:
        raw["recovery"]["parity_every"] = EVERY
    if case["group"] == "numbers":
        policies = {"nonfinite": case["policies"]["nan"], "spike": case["policies"]["spike"]}
        raw["recovery"] |= policies | {"window": 8, "threshold": 1000.0}
    return raw


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
