"""The main job of Keel, as a newcomer would type it: simulate, train, lose the machine, resume, evaluate, report.

    python scripts/demo.py --store file      # or: make demo
    python scripts/demo.py --store s3        # or: make demo STORE=s3, everything in a local S3-compatible server

Every step is a real `keel` command, echoed before it runs. It ends with a table of what was promised and what came out,
and exits with 1 if any promise was broken.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "services"))

KILL_AFTER = 0.4  # share of the steps that must be committed before the run is killed
LOST_SECONDS = 1.0  # how long it then trains on: work that the kill destroys and the resume must do again
TEXT_SAMPLES = 512  # of held-out text, on which network and bigram model are compared
CLEARLY_BELOW = 0.95
TIMES_BELOW_PERSISTENCE = 10.0
SAME_LOSS = 1e-4  # relative; two processes and one differ by the order of their sums only
SAME_RESULT = 0.05  # relative; what that order has grown to at the end of training


@dataclass
class Demo:
    """Where the demo works, and what it has found so far."""

    base: str
    env: Mapping[str, str]
    overrides: list[str] = field(default_factory=list)
    findings: list[tuple[str, str, str, bool]] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def url(self, path: str) -> str:
        return f"{self.base}/{path}"

    def promise(self, what: str, found: str, promised: str, kept: bool) -> None:
        self.findings.append((what, found, promised, kept))

    def keel(self, *arguments: str) -> None:
        """Runs one keel command to its end; its output goes to this terminal."""
        code = self.start(*arguments).wait()
        if code:
            raise SystemExit(f"demo: `keel {' '.join(arguments)}` ended with exit code {code}")

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        print(f"\n$ keel {' '.join(arguments)}", flush=True)
        return subprocess.Popen([sys.executable, "-m", "cluster.cli", *arguments], cwd=ROOT, env=dict(self.env))

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        from rich.console import Console

        Console().rule(f"[bold]{title}", align="left")
        started = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["file", "s3"], default="file", help="where data, checkpoints, records go")
    parser.add_argument("--dir", default=None, help="working folder, emptied first (default: .keel/demo-<store>)")
    parser.add_argument("--lm-steps", type=int, default=0, help="steps of the language run (default: its config's)")
    parser.add_argument("--fno-steps", type=int, default=0, help="steps of the operator run (default: its config's)")
    args = parser.parse_args()
    folder = Path(args.dir or ROOT / ".keel" / f"demo-{args.store}").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with storage(args.store, folder) as (base, env):
        os.environ.update(env)  # this process reads the store, too
        demo = Demo(base, {**os.environ, "KEEL_CACHE": str(folder / "cache")})
        operators(demo, [f"train.max_steps={args.fno_steps}"] if args.fno_steps else [])
        language(demo, [f"train.max_steps={args.lm_steps}"] if args.lm_steps else [])
        with demo.step("7. Report"):
            for run in ("fno", "fno_uninterrupted", "lm"):
                page = folder / "reports" / f"{run}.html"
                demo.keel("report", demo.url(f"runs/{run}"), "--out", str(page))
                demo.reports.append(str(page))
    return conclude(demo)


def operators(demo: Demo, overrides: list[str]) -> None:
    """Steps 1 to 5: an FNO on simulated flow, killed and resumed, against the same run undisturbed."""
    from datamodules.store import Store
    from trainer.checkpoint import committed_steps
    from trainer.config import load
    from trainer.records import read_evaluation

    config, data = "configs/runs/demo_fno.yaml", demo.url("data/navier_stokes_2d")
    settings = [f"data.url={data}", *overrides]
    run, reference = demo.url("runs/fno"), demo.url("runs/fno_uninterrupted")
    with demo.step("1. Simulate"):
        demo.keel("data", "make", "configs/data/navier_stokes_2d.yaml", f"url={data}")
        demo.keel("data", "check", data)
    with demo.step("2. Train on two processes, 3. lose it"):
        target = int(KILL_AFTER * load(str(ROOT / config), [*settings, f"url={run}"]).train.max_steps)
        training = demo.start("train", config, f"url={run}", *settings)
        committed = wait_for_commit(training, Store(run).sub("checkpoints"), target)
        time.sleep(LOST_SECONDS)
        killed = kill_tree(training)
        print(f"demo: step {committed} is committed; killed {killed} processes of the run with SIGKILL", flush=True)
        steps = committed_steps(Store(run).sub("checkpoints"))
    with demo.step("4. Resume on one process"):
        demo.keel("resume", run, "resources.processes_per_node=1")
    with demo.step("The same run, undisturbed, for comparison"):
        demo.keel("train", config, f"url={reference}", *settings)
    compare(demo, run, reference, resumed_from=steps[-1])
    with demo.step("5. Evaluate"):
        demo.keel("evaluate", run, "--split", "test")
    metrics = read_evaluation(Store(run))["metrics"]
    one, held = metrics["relative_l2"], metrics["persistence_relative_l2"]
    demo.promise(
        "one-step error, relative L2",
        f"{one:.4f}, persistence {held:.4f}: {held / one:.1f} times below",
        f"at least {TIMES_BELOW_PERSISTENCE:.0f} times below",
        one * TIMES_BELOW_PERSISTENCE <= held,
    )
    rollout, still = metrics["rollout_relative_l2"], metrics["persistence_rollout_relative_l2"]
    demo.promise(
        "20-step rollout error, relative L2",
        f"{rollout:.4f}, persistence {still:.4f}",
        "below persistence",
        rollout < still,
    )


def compare(demo: Demo, run: str, reference: str, resumed_from: int) -> None:
    """The killed and resumed run against the undisturbed one: samples, losses."""
    from datamodules.store import Store
    from trainer.records import read_metrics, read_trace

    ours, theirs = (samples_by_step(read_trace(Store(url))) for url in (run, reference))
    lost = sum((Counter(flat(theirs)) - Counter(flat(ours))).values())
    repeated = sum((Counter(flat(ours)) - Counter(flat(theirs))).values())
    demo.promise(
        f"samples of {len(ours)} steps, in order",
        f"{lost} lost, {repeated} repeated, order {'equal' if ours == theirs else 'DIFFERENT'}",
        "0 lost, 0 repeated, equal",
        bool(theirs) and ours == theirs,
    )
    mine, whole = ({r["step"]: r["loss"] for r in read_metrics(Store(url)) if "loss" in r} for url in (run, reference))
    before = [step for step in whole if step <= resumed_from]
    demo.promise(
        f"losses up to step {resumed_from} (same world)",
        "equal bit by bit" if all(mine.get(s) == whole[s] for s in before) else "DIFFERENT",
        "equal bit by bit",
        bool(before) and all(mine.get(step) == whole[step] for step in before),
    )
    first = min((step for step in whole if step > resumed_from), default=None)
    if first is None or first not in mine:
        demo.promise("loss after the resume", "missing", "there", False)
        return
    gap = abs(mine[first] - whole[first]) / abs(whole[first])
    what = f"loss at step {first}, first after the resume (2 processes -> 1)"
    demo.promise(what, f"{gap:.1e} relative difference", f"at most {SAME_LOSS:.0e}", gap <= SAME_LOSS)
    last = max(whole)
    end = abs(mine.get(last, float("inf")) - whole[last]) / abs(whole[last])
    demo.promise("loss at the end", f"{end:.1e} relative difference", f"at most {SAME_RESULT:g}", end <= SAME_RESULT)


def language(demo: Demo, overrides: list[str]) -> None:
    """Step 6: a language model on real text, against a bigram model fitted on the same text."""
    from datamodules.store import Store
    from trainer.records import encode, read_evaluation

    data, run = demo.url("data/stdlib_text"), demo.url("runs/lm")
    with demo.step("6. The other half: a language model"):
        demo.keel("data", "make", "configs/data/stdlib_text.yaml", f"url={data}")
        demo.keel("train", "configs/runs/demo_lm.yaml", f"url={run}", f"data.url={data}", *overrides)
        demo.keel("evaluate", run, "--split", "test", "--limit", str(TEXT_SAMPLES), "--batch", "32")
        baseline = bigram_bits_per_byte(run, data)
        store = Store(run)
        evaluation = read_evaluation(store)
        evaluation["baseline"] = {"bigram_bits_per_byte": baseline}
        store.write("evaluation.json", encode(evaluation))
    found = evaluation["metrics"]["bits_per_byte"]
    demo.promise(
        "language model, bits per byte",
        f"{found:.3f}, bigram {baseline:.3f}",
        f"below {CLEARLY_BELOW:g} x bigram",
        found < CLEARLY_BELOW * baseline,
    )


def bigram_bits_per_byte(run: str, data: str) -> float:
    """A bigram model fitted on the whole training text, on exactly the samples that the network was evaluated on."""
    from datamodules.format import Dataset
    from modules.metrics.bigram import Bigram
    from trainer.build import build
    from trainer.config import load

    dataset = Dataset.open(data)
    bigram = Bigram()
    bigram.update(dataset.main.read((), *dataset.splits["train"]))
    _, stream = build(load(f"{run}/config.yaml"))
    nats, count = 0.0, 0
    for batch in stream.evaluation_loader("test", {}, batch=32, limit=TEXT_SAMPLES):
        more, tokens = bigram.nats(batch["tokens"].numpy())
        nats, count = nats + more, count + tokens
    return nats / count / math.log(2)


def conclude(demo: Demo) -> int:
    """The tables; 1 if a promise was broken."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    times = ", ".join(f"{title.split(' ')[0].rstrip('.')} {seconds:.0f} s" for title, seconds in demo.seconds.items())
    table = Table(title="Keel demo", title_justify="left", box=box.SIMPLE_HEAD, caption=f"steps: {times}")
    for column in ("result", "found", "promised", ""):
        table.add_column(column, overflow="fold")
    for what, found, promised, kept in demo.findings:
        table.add_row(what, found, promised, "[green]kept[/]" if kept else "[bold red]BROKEN[/]")
    console.print()
    console.print(table)
    console.print(f"total {sum(demo.seconds.values()):.0f} s; reports, one page each:")
    for path in demo.reports:
        console.print(f"  {path}", soft_wrap=True)
    return 0 if demo.findings and all(kept for *_, kept in demo.findings) else 1


@contextmanager
def storage(kind: str, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(base URL, environment) of the demo's store; a server lives as long as the block."""
    if kind == "file":
        yield str(folder), {}
        return
    import s3

    try:
        yield f"s3://{s3.BUCKET}/demo", s3.up(folder / "s3")
    finally:
        s3.down(folder / "s3")


def wait_for_commit(training: subprocess.Popen[bytes], checkpoints: Any, target: int) -> int:
    """Waits until a step at or above `target` is committed while the run is going; returns that step."""
    from trainer.checkpoint import committed_steps

    while training.poll() is None:
        steps = committed_steps(checkpoints)
        if steps and steps[-1] >= target:
            return steps[-1]
        time.sleep(0.2)
    raise SystemExit(f"demo: training ended (exit code {training.returncode}) before it could be killed")


def kill_tree(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL to a process and all its descendants at once; returns how many, when all are gone."""
    pids = [process.pid, *descendants(process.pid)]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise SystemExit("demo: a killed process is still there after 30 s")
        time.sleep(0.05)
    return len(pids)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def samples_by_step(trace: list[dict[str, Any]]) -> dict[int, list[int]]:
    """Step -> ids of its global batch, the ranks' parts in order."""
    steps: dict[int, list[int]] = {}
    for row in trace:
        steps.setdefault(row["step"], []).extend(row["index"])
    return steps


def flat(steps: Mapping[int, list[int]]) -> Iterator[tuple[int, int]]:
    """(step, id) of every sample used."""
    return ((step, index) for step, batch in steps.items() for index in batch)


if __name__ == "__main__":
    sys.exit(main())
