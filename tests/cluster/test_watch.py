"""keel status, ls, logs and top on made-up stores with frozen time: how a run fares, and how it is shown."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import cli
from cluster.launch.job import JobFile
from cluster.watch import ask as asking
from cluster.watch import logs as log_reader
from cluster.watch import top
from cluster.watch.seen import Said, Seen, find, glance, look
from cluster.watch.show import screen, summary
from cluster.watch.units import ago, duration, rate
from cluster.watch.verdict import judge
from datamodules.store import Store
from tests.conftest import S3Server
from trainer.records import MetricsWriter

NOW = 1_000_000.0


def run(age: float = 1.0, **changes: Any) -> Said:
    content: dict[str, Any] = {
        "name": "fno",
        "attempt": 1,
        "time": NOW - age,
        "heartbeat_s": 10.0,
        "status": None,
        "reason": None,
        "phase": "forward",
        "step": 1200,
        "max_steps": 10_000,
        "step_time": NOW - age - 0.1,
        "steps_per_s": 4.0,
        "host": "h0",
        "nodes": 2,
        "processes": 8,
        "accelerator": "cuda",
        "row": {"loss": 0.25, "val/loss": 0.3, "throughput/tokens_per_s": 1.25e6, "throughput/mfu": 0.412},
    }
    return Said(content | changes, age)


def node(age: float = 1.0, **changes: Any) -> Said:
    content = {"phase": "running", "attempt": 1, "heartbeat_s": 10.0, "host": "h0", "time": NOW - age, "cause": None}
    return Said(content | changes, age)


def ended(code: int, reason: str = "", age: float = 500.0) -> Said:
    return node(age, phase="ended", exit_code=code, reason=reason)


def seen(run: Said | None = None, *nodes: Said, **more: Any) -> Seen:
    return Seen("s3://b/run", run, dict(enumerate(nodes)), **more)


JOB = {"job_id": "7", "backend": "slurm"}
OLD: dict[str, Any] = {"record": {"status": "cancelled"}, "earlier": True}
STANDS = {"step_time": NOW - 900, "phase": "backward"}


@pytest.mark.parametrize(
    ("what", "job", "state", "why"),
    [
        (seen(), None, "unknown", "never said"),
        (seen(job=JOB), None, "queued", ""),
        (seen(job=JOB), "running", "starting", "not said a word"),
        (seen(job=JOB), "cancelled", "cancelled", "before it began"),
        (seen(record={"status": "ok"}), None, "done", ""),
        # submitted again: the record is that of the job before, and its job is asked
        (seen(job=JOB, **OLD), None, "queued", ""),
        (seen(job=JOB, **OLD), "queued", "queued", ""),
        (seen(job=JOB, **OLD), "running", "starting", "not said a word"),
        (seen(job=JOB, **OLD), "failed", "failed", "its job ended (failed) before it began"),
        (seen(job=JOB, **OLD), "cancelled", "cancelled", "before it began"),
        (seen(job=JOB, record={"status": "ok"}), None, "done", ""),
        (seen(job=JOB, record={"status": "ok"}), "done", "done", ""),
        (seen(job=JOB, record={"status": "preempted"}), "queued", "queued", ""),
        (seen(job=JOB, record={"status": "preempted"}), "running", "starting", "not said a word"),
        (seen(None, node(phase="waiting", attempt=None)), None, "waiting", "1 node so far"),
        (seen(None, node()), None, "starting", ""),
        (seen(run(), node()), None, "running", ""),
        (seen(run()), None, "running", ""),  # under torchrun there is no launcher of ours
        (seen(run(steps_per_s=None, step_time=NOW - 900), node()), None, "running", "first steps"),
        # slow: it is heard, and moves or does what takes its time
        (seen(run(**STANDS | {"phase": "save"}), node()), None, "running", ""),
        (seen(run(**STANDS | {"steps_per_s": 0.01}), node()), None, "running", ""),
        (seen(run(34), node(34)), None, "running", ""),
        # stuck: it is heard, and does not move
        (seen(run(**STANDS), node()), None, "stalled", "no step for 15 min, where one takes 250 ms: in backward"),
        (seen(run(80), node(2)), None, "stalled", "rank 0 on h0 is silent: no heartbeat for 1 min 20 s"),
        (seen(run(), node(), node(90, host="h1")), None, "stalled", "node 1 (h1): no heartbeat for 1 min 30 s"),
        # dead: nothing is heard
        (seen(run(90), node(80)), None, "dead", "no heartbeat for 1 min 20 s, where one is due every 10 s"),
        (seen(run(90)), None, "dead", "no heartbeat"),
        (seen(run(90), node(80)), "running", "stalled", "although its job runs"),
        (seen(run(90), node(80)), "queued", "queued", "again; before, it was dead"),
        (seen(run(90), node(80)), "failed", "failed", "its job ended (failed)"),
        # started again: what the first attempt said last is no news
        (seen(run(90), node(phase="restarting", cause="rank 1 hung")), None, "restarting", "rank 1 hung"),
        (seen(run(90), node(attempt=2, cause="rank 1 hung")), None, "starting", "again: rank 1 hung"),
        (seen(run(1, status="preempted"), node(attempt=2)), None, "starting", ""),
        (
            seen(run(1, attempt=2), node(attempt=2), node(90, attempt=1)),
            None,
            "running",
            "",
        ),  # went on with fewer nodes
        # ended
        (seen(run(90, status="ok"), ended(0)), None, "done", ""),
        (seen(run(1, status="ok"), node()), None, "done", ""),  # its launcher is about to end
        (seen(run(90, status="diverged"), ended(0)), None, "diverged", ""),
        (seen(run(9, status="failed", reason="no space"), ended(1)), None, "failed", "no space"),
        (seen(run(9), ended(137, "the worker was killed by SIGKILL")), None, "failed", "killed by SIGKILL"),
        (seen(None, ended(0), ended(74, "lost node 0")), None, "failed", "lost node 0"),
        (seen(run(90, status="preempted"), ended(75)), None, "preempted", ""),
        (seen(run(90, status="preempted"), ended(75)), "queued", "queued", "again; before, it was preempted"),
        (seen(run(90, status="preempted"), ended(75)), "cancelled", "cancelled", ""),
        (seen(run(90, status="preempted"), ended(75)), "running", "restarting", ""),
        (seen(None, ended(75, "preempted after a save")), "running", "restarting", "preempted after a save"),
        (seen(None, ended(130, "cancelled"), cancelled=True), None, "cancelled", ""),
        (seen(None, ended(130, "interrupted after a save")), None, "interrupted", ""),
    ],
)
def test_how_a_run_fares(what: Seen, job: str | None, state: str, why: str) -> None:
    verdict = judge(what, job)
    assert (verdict.state, why in verdict.why) == (state, True), verdict
    fine = ("queued", "waiting", "starting", "restarting", "running", "done", "diverged")
    assert verdict.exit_code == (0 if state in fine else 1)
    assert "\n" not in verdict.why


def test_a_run_that_was_submitted_again_is_asked_for_and_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = put(Store(str(tmp_path)), "run")
    store.write("record.jsonl", b'{"status": "cancelled", "steps": 8}\n')
    assert judge(look(store)).state == "cancelled"
    store.write_json("job.json", JOB)
    assert look(store).earlier and judge(glance(store)).state == "queued"
    told: list[str] = []

    def tell(store: Store, call: Any) -> tuple[Any, str | None]:
        told.append(call.__name__)
        return "queued" if call is JobFile.state else None, None

    monkeypatch.setattr("cluster.watch.ask.tell", tell)
    assert cli.main(["status", store.url]) == 0
    shown = capsys.readouterr().out
    assert "run  queued  " in shown and "7 on slurm: queued" in shown
    assert cli.main(["cancel", store.url]) == 0 and told[-1] == "cancel"
    assert "job 7 on slurm is asked to save and end" in capsys.readouterr().out
    store.write("record.jsonl", b'{"status": "ok", "steps": 8}\n')  # by the new job
    assert not look(store).earlier


def test_to_wait_is_to_wait_for_the_job_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = put(Store(str(tmp_path)), "run", run(1, status="cancelled"), ended(130), job=JOB)
    said = ["running", "queued", "running", "cancelled"]
    monkeypatch.setattr(asking, "_job_state", lambda store: (said.pop(0), None))
    monkeypatch.setattr(asking.time, "sleep", lambda seconds: None)
    _, verdict, job = asking.wait(store)
    assert verdict.state == "cancelled" and not said and job is not None and job["state"] == "cancelled"


def test_who_follows_asks_once_per_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = put(Store(str(tmp_path)), "run", run(), node(), job=JOB)
    now, asked = [0], []
    monkeypatch.setattr(asking, "_job_state", lambda store: (asked.append(now[0]), ("running", None))[1])
    over = asking.watched(store, lambda: now[0])
    for now[0] in range(0, 50, 2):
        assert not over()
    assert asked == [0, 10, 20, 30, 40]


def test_units() -> None:
    shown = [duration(s) for s in (0, 0.0214, 0.9996, 7.46, 42.4, 59.7, 200, 3600, 7500, 86400 * 3 + 4 * 3600)]
    assert shown == ["0 ms", "21 ms", "1 s", "7.5 s", "42 s", "1 min", "3 min 20 s", "1 h", "2 h 5 min", "3 d 4 h"]
    assert [ago(0.4), ago(75)] == ["now", "1 min 15 s ago"]
    shown = [
        rate(13.33, "steps"),
        rate(0.2, "steps"),
        rate(1.25e6, "tokens"),
        rate(43210, "tokens"),
        rate(1234, "samples"),
    ]
    assert shown == ["13.3 steps/s", "5 s/step", "1.25 M tokens/s", "43.2 k tokens/s", "1,234 samples/s"]


def text(what: Any, width: int = 100) -> str:
    out = Console(width=width, highlight=False, color_system=None)
    with out.capture() as captured:
        out.print(what)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def test_one_screen() -> None:
    what = seen(run(2), node(3), Said({**node().content, "host": "h1"}, 4, skew=-42.0), job=JOB)
    told = summary(what, judge(what))
    job = "7 on slurm: running"
    attempts = [{"attempt": 1}, {"attempt": 2, "cause": "rank 3 was killed by SIGKILL"}]
    assert text(screen(told, what, attempts=attempts, commit=(1000, 0.0), job=job)) == (
        "fno  running  s3://b/run\n"
        "step        1,200 of 10,000 (12 %), forward\n"
        "left        36 min 40 s at 4 steps/s\n"
        "loss        0.25   val/loss 0.3\n"
        "throughput  1.25 M tokens/s, mfu 41.2 %\n"
        "where       2 x 8 processes on cuda: h0, h1\n"
        "attempts    2; the last after: rank 3 was killed by SIGKILL\n"
        "commit      step 1,000\n"
        "heartbeat   2 s ago, due every 10 s\n"
        "clocks      that of h1 is 42 s behind the store's\n"
        "job         7 on slurm: running"
    )
    dead = seen(run(90), node(80))
    assert text(screen(summary(dead, judge(dead)), dead)).startswith(
        "fno  dead  s3://b/run\nno heartbeat for 1 min 20 s, where one is due every 10 s\nstep"
    )


# ---------------------------------------------------------------------------------------------------------- the store
def put(root: Store, path: str, said: Said | None = None, launcher: Said | None = None, **objects: Any) -> Store:
    store = root.sub(path)
    store.write("config.yaml", b"name: x\n")
    for name, content in (("status/run.json", said), ("status/node-0.json", launcher)):
        if content is not None:
            moved = time.time() - NOW
            times = {key: content.content[key] + moved for key in ("time", "step_time") if key in content.content}
            store.write_json(name, {**content.content, **times})
    for name, value in objects.items():
        store.write_json(f"{name}.json", value)
    return store


def test_runs_below_a_url_are_found_and_read_with_few_requests(
    s3: S3Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Store(s3.url("all"))
    put(root, "a/b/slow", run(1, steps_per_s=0.5), node())
    put(root, "a/b/dead", run(500), node(500))
    put(root, "z", run(500, status="ok", loss=0.125), ended(0))
    put(root, "q", job={**JOB, "spec": {"name": "waiting-one"}})
    root.write("a/b/slow/inner/config.yaml", b"")  # below a run
    root.write("data/zarr.json", b"{}")
    root.write("data/c/config.yaml", b"")  # below a data set
    root.write("1/2/3/4/config.yaml", b"")  # too deep
    assert find(root) == ["a/b/dead", "a/b/slow", "q", "z"]
    reads: list[str] = []
    real = Store.read
    monkeypatch.setattr(Store, "read", lambda self, path: (reads.append(path), real(self, path))[1])
    # All were written now: the store's clock says that none is late, whatever their own clocks said.
    states = [judge(glance(root.sub(path))).state for path in find(root)]
    assert states == ["running", "running", "queued", "done"]
    assert len(reads) <= 3 * 4
    assert cli.main(["ls", root.url, "--sort", "loss"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert " ".join(lines.pop()) == "4 runs: 2 running, 1 done, 1 queued"
    assert [line[0] for line in lines[2:]] == ["z", "a/b/dead", "a/b/slow", "q"]
    assert lines[2][1:5] == ["done", "1,200", "10,000", "0.125"]
    assert cli.main(["ls", root.url, "--json", "--state", "queued,done"]) == 0
    assert [told["name"] for told in json.loads(capsys.readouterr().out)] == ["waiting-one", "fno"]
    assert cli.main(["ls", root.url, "--state", "lost"]) == 2
    assert "--state lost: must be among" in capsys.readouterr().err
    assert cli.main(["ls", f"{root.url}/data"]) == 0
    assert capsys.readouterr().out == f"no runs below {root.url}/data\n"


def test_the_stores_clock_counts_and_a_wrong_clock_is_told(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    days = 60.5 * 3600
    store = put(Store(s3.url("x")), "run", run(-days), node(days))
    what = look(store)
    assert what.run is not None and 0 <= what.run.age < 30 and abs((what.run.skew or 0) - days) < 30
    assert judge(what).state == "running"
    assert cli.main(["status", store.url]) == 0
    assert "is 2 d 12 h behind the store's" in capsys.readouterr().out


def test_logs_are_followed_from_where_they_were_cut(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert log_reader.choose(store) == []

    def put(attempt: int, rank: int, data: bytes) -> None:
        store.write(f"logs/attempt-{attempt}/node-{rank // 2}/rank-{rank}.log", data)

    for rank in range(4):
        put(1, rank, b"old\n")
    put(2, 10, b"ten\n")
    put(2, 2, b"one\ntwo\nthr")
    assert [log.rank for log in log_reader.choose(store)] == [2]
    assert [log.rank for log in log_reader.choose(store, node=1, attempt=1)] == [2, 3]
    assert list(log_reader.lines(store, log_reader.choose(store, attempt=1, node=0), 1)) == [
        "[rank 0] old",
        "[rank 1] old",
    ]

    later = [
        b"one\ntwo\nthree\nfour\n",
        b"[8 bytes before this are left out]\nthree\nfour\nfi",
        b"[14 bytes before this are left out]\nfour\nfive",
    ]

    def sleep(_: float) -> None:
        put(2, 2, later.pop(0))

    told = log_reader.follow(store, lambda: log_reader.choose(store), lambda: not later, tail=1, sleep=sleep)
    assert list(told) == ["two", "three", "four", "five"]


def test_the_last_lines_of_a_crashed_attempt_are_followed_too(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def put(attempt: int, data: bytes, rank: int = 0) -> None:
        store.write(f"logs/attempt-{attempt}/node-0/rank-{rank}.log", data)

    def crash() -> None:
        put(9, b"step 1\nTraceback\nValueError: x")
        put(9, b"of rank 1\n", rank=1)
        put(10, b"again\n")

    for rank in (0, 1):
        put(9, b"step 1\n", rank)
    put(8, b"long ago\n")
    later = [crash, lambda: put(10, b"again\ndone\n")]
    told = log_reader.follow(
        store, lambda: log_reader.choose(store), lambda: not later, sleep=lambda _: later.pop(0)(), tail=1
    )
    assert list(told) == ["step 1", "Traceback", "ValueError: x", "again", "done"]


def test_top_names_who_keeps_the_others_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rank(number: int, **changes: Any) -> dict[str, Any]:
        times = {"step_s": 1.0, "wait_s": 0.01, "forward_s": 0.3}
        memory = {"memory": 3 << 30, "memory_peak": 4 << 30}
        place = {"rank": number, "attempt": 1, "host": f"h{number // 8}", "phase": "backward", "step": 1201}
        return place | times | memory | changes

    assert top.stragglers([rank(0), rank(1, forward_s=0.38), rank(2)]) == {}
    assert top.stragglers([rank(0), rank(1, wait_s=0.2), rank(2)]) == {1: "h0"}
    assert top.stragglers([rank(0, step_s=0), rank(1, forward_s=9)]) == {}
    assert top.spark([1.0, 2.0, math.nan, 3.0], 10) == "▁▅!█" and top.spark([5.0], 10) == "▁"

    store = put(Store(str(tmp_path)), "run", run(), node())
    with_late = [rank(0), rank(1, forward_s=0.7)]
    store.write_json("status/workers-0.json", {"time": time.time(), "heartbeat_s": 10.0, "node": 0, "ranks": with_late})
    writer = MetricsWriter(store, 1)
    writer.extend([{"step": step, "loss": 1.0 / step} for step in range(1, 41)])
    writer.close()
    assert cli.main(["top", store.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "4 steps/s" in shown and "loss 0.025   least 0.025   steps 1 to 40" in shown and "█▄" in shown
    assert "rank 1 on h0: more than 1.3 times" in shown and "3.0 GiB" in shown

    many: Mapping[int, Said] = {
        n: Said({"ranks": [rank(8 * n + i, forward_s=0.9 if 8 * n + i == 77 else 0.3) for i in range(8)]}, 1)
        for n in range(125)
    }
    what = Seen(store.url, run(), {0: node()}, many)
    frame = text(top.frame(summary(what, judge(what)), what, {}))
    fewer = {n: Said({"ranks": [rank(n, attempt=2 - (n == 1), host=f"host-{n}")]}, 70.0 * n) for n in range(3)}
    what = Seen(store.url, run(attempt=2), {0: node()}, fewer)
    shown = text(top.frame(summary(what, judge(what)), what, {}))
    assert "host-0" in shown and "host-1" not in shown and re.search(r"host-2 .* 2 min 20 s ago$", shown, re.M)
    assert frame.count("\n") < 45 and "and 101 nodes that are faster" in frame and "slow: rank 77 on h9:" in frame


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "top"])
def test_where_there_is_no_run_one_line_says_so(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, f"{tmp_path}/nothing"]) == 2
    assert capsys.readouterr().err.startswith("keel: error: no run at ")


def test_logs_say_why_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = put(Store(str(tmp_path)), "run", run())
    assert cli.main(["logs", store.url]) == 2
    assert "`keel train` leaves its output to the terminal" in capsys.readouterr().err
    store.write("logs/attempt-1/node-0/rank-0.log", b"a\n")
    assert cli.main(["logs", store.url, "--rank", "5"]) == 2
    assert "there are attempt-1/node-0/rank-0.log" in capsys.readouterr().err
