"""keel status, logs, cancel, ls, top: runs seen from any machine that reaches their store."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cluster.commands.common import add_command, add_url, open_run

if TYPE_CHECKING:
    from cluster.watch.seen import Seen
    from cluster.watch.verdict import Verdict
    from datamodules.store import Store

_CODES = (
    "exit code: 0 it goes on or has its result (queued, waiting, starting, restarting, running, done, diverged, pruned);\n"
    "1 somebody should look (stalled, dead, failed, preempted, cancelled, interrupted, unknown); 2 your error."
)


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "status",
        status,
        help="how a run fares",
        description=(
            "Tells from the store how the run at URL fares, where it stands, and how long it will take. A run whose\n"
            "heartbeats stop is dead; one that is heard but makes no step is stalled. Where the backend of its job can be\n"
            "asked from here, it is asked, too.\n" + _CODES
        ),
        example="keel status runs/demo_fno\nkeel status s3://bucket/fno --json\nkeel status s3://bucket/fno --wait",
    )
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="as JSON; times in seconds, memory in bytes")
    parser.add_argument("--wait", action="store_true", help="return only when the run has ended or is dead")

    parser = add_command(
        commands,
        "logs",
        logs,
        help="what a run's workers print",
        description=(
            "Prints the output of the run's workers in its last attempt, from the store: by default that of rank 0. Where\n"
            "the store has none, the backend is asked for what it has. While a run goes on the store holds the last MiB of\n"
            "each log."
        ),
        example="keel logs s3://bucket/fno --tail 50\nkeel logs s3://bucket/fno --node 3 --follow\n"
        "keel logs s3://bucket/fno --rank 17 --attempt 2",
    )
    add_url(parser)
    parser.add_argument("--node", type=int, metavar="N", help="all ranks of this node")
    parser.add_argument("--rank", type=int, metavar="R", help="this rank")
    parser.add_argument("--attempt", type=int, metavar="A", help="an earlier attempt (default: the last)")
    parser.add_argument("--tail", type=int, metavar="N", help="the last N lines (default: all)")
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended")

    parser = add_command(
        commands,
        "cancel",
        cancel,
        help="make a run save and end, for good",
        description=(
            "Asks the run at URL to save, commit and end; nothing starts it again but `keel resume`. The request lies in\n"
            "the store, where the run looks with every heartbeat; where the backend of its job can be reached from here, it\n"
            "is told as well, which also takes a job out of the queue.\n"
            "exit code: 0 asked, or it had ended before; with --wait as `keel status`, but 0 once it is cancelled; 2 your error."
        ),
        example="keel cancel s3://bucket/fno\nkeel cancel runs/demo_fno --wait",
    )
    add_url(parser)
    parser.add_argument("--wait", action="store_true", help="return only when the run has ended or is dead")

    parser = add_command(
        commands,
        "ls",
        ls,
        help="list the runs below a URL",
        description=(
            "Lists the runs below URL, up to three folders deep, with what their last heartbeat said: state, step, time\n"
            "left, loss, throughput. Only the store is asked; a run costs two or three small reads, many at once."
        ),
        example="keel ls runs\nkeel ls s3://bucket/sweeps --state running,dead --sort left\nkeel ls s3://bucket/runs --watch",
    )
    add_url(parser, "a prefix: a local path or any fsspec URL")
    parser.add_argument("--json", action="store_true", help="as JSON, one list")
    parser.add_argument("--watch", action="store_true", help="go on, and refresh the table")
    parser.add_argument("--sort", choices=sorted(_SORTS), default="run", help="order (default: run)")
    parser.add_argument("--state", metavar="STATE,...", help="only runs in these states")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks (default: 5)")

    parser = add_command(
        commands,
        "top",
        top,
        help="watch a run live: losses, throughput, memory, stragglers",
        description=(
            "Shows how the run at URL goes now: its losses, its throughput, and for each rank phase, step, time per step,\n"
            "memory. `data` and `forward` are what a rank does before it meets the others: one that takes longer there\n"
            "than the others keeps them waiting, and is shown in red. With more than 16 ranks nodes are shown, slowest first."
        ),
        example="keel top runs/demo_fno\nkeel top s3://bucket/fno --once",
    )
    add_url(parser)
    parser.add_argument("--once", action="store_true", help="print one frame and return")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")


# -------------------------------------------------------------------------------------------------------------- status
def status(args: argparse.Namespace) -> int:
    from cluster.watch.ask import ask, wait
    from cluster.watch.seen import last_commit
    from cluster.watch.show import console, hosts_of, screen, summary
    from trainer.records import read_attempts

    store = open_run(args.url)
    seen, verdict, said = (wait if args.wait else ask)(store)
    told = summary(seen, verdict, name=_name(seen))
    commit, attempts = last_commit(store), read_attempts(store)
    if args.json:
        whole = {
            **told,
            "hosts": hosts_of(seen),
            "attempts": len(attempts),
            "commit": None if commit is None else {"step": commit[0], "time": commit[1] or None},
            "job": said,
        }
        print(json.dumps(whole, indent=1))
    else:
        console().print(screen(told, seen, attempts=attempts, commit=commit, job=_job_line(said)))
    return verdict.exit_code


def _job_line(said: Mapping[str, Any] | None) -> str:
    if said is None:
        return ""
    line = f"{said['id']} on {said['backend']}"
    if said["state"]:
        return f"{line}: {said['state']}"
    return f"{line} (cannot be asked from here: {said['error']})" if said.get("error") else line


def _name(seen: Seen) -> str:
    return str((seen.job or {}).get("spec", {}).get("name") or seen.url.rstrip("/").rpartition("/")[2])


# ---------------------------------------------------------------------------------------------------------------- logs
def logs(args: argparse.Namespace) -> int:
    from cluster.watch.ask import tell, watched
    from cluster.watch.logs import Log, choose, follow, lines

    store = open_run(args.url)
    if args.tail is not None and args.tail < 0:
        raise ValueError(f"--tail {args.tail}: must be at least 0")

    def find() -> list[Log]:
        return choose(store, attempt=args.attempt, node=args.node, rank=args.rank)

    found = find()
    if args.follow:
        for line in follow(store, find, watched(store), tail=args.tail):
            print(line, flush=True)
        return 0
    if found:
        for line in lines(store, found, args.tail):
            print(line)
        return 0
    if args.rank is None and args.attempt is None:
        node = args.node or 0
        told, error = tell(store, lambda job: list(job.open().logs(job.task_id, node)))
        if told:
            for line in told if args.tail is None else told[max(0, len(told) - args.tail) :]:
                print(line)
            return 0
        if error:
            raise ValueError(f"no logs of {args.url} in its store, and its backend cannot be asked from here: {error}")
    raise ValueError(f"no such logs of {args.url} in its store{_why_none(store)}")


def _why_none(store: Store) -> str:
    from cluster.launch.job import FILE

    there = store.list("logs")
    if there:
        names = sorted({"/".join(path.split("/")[1:]) for path in there})
        return f"; there are {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if not store.exists(FILE):
        return ": `keel train` leaves its output to the terminal; `keel submit --on` keeps it"
    return " yet"


# -------------------------------------------------------------------------------------------------------------- cancel
def cancel(args: argparse.Namespace) -> int:
    from cluster.launch.job import JobFile
    from cluster.watch.ask import ask, tell, wait
    from trainer.status import CANCEL

    store = open_run(args.url)
    _, verdict, said = ask(store)
    if verdict.over and verdict.state != "dead":
        print(f"{store.url} has ended before: {verdict.state}")
        return 0
    store.write_json(CANCEL, {"time": time.time(), "host": socket.gethostname(), "user": _user()})
    error: str | None = None
    if said is not None:
        _, error = tell(store, JobFile.cancel)
        if said["state"] is None:
            error = error or said.get("error")
    where = f"job {said['id']} on {said['backend']} is" if said and not error else "it is"
    print(f"{where} asked to save and end; a request lies in the store, too" if said and not error else _left(verdict))
    if error:
        print(f"keel: warning: its backend cannot be told from here: {error}", file=sys.stderr)
    if not args.wait:
        return 0
    _, verdict, _ = wait(store)
    print(f"{store.url}: {verdict.state}" + (f", {verdict.why}" if verdict.why else ""))
    return 0 if verdict.state == "cancelled" else verdict.exit_code


def _left(verdict: Verdict) -> str:
    if verdict.state == "dead":
        return f"a request lies in the store, for the case that the run lives: {verdict.why}"
    return "a request lies in the store; the run saves and ends with one of its next heartbeats"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user has no name
        return str(os.getuid())


# ------------------------------------------------------------------------------------------------------------ ls, top
_LAST = float("inf")
_SORTS: dict[str, Callable[[tuple[str, Mapping[str, Any]]], Any]] = {
    "run": lambda row: row[0],
    "state": lambda row: (row[1]["state"], row[0]),
    "step": lambda row: (-(row[1]["step"] or 0), row[0]),
    "left": lambda row: (_LAST if row[1]["eta_s"] is None else row[1]["eta_s"], row[0]),
    "loss": lambda row: (_LAST if row[1]["loss"] is None else row[1]["loss"], row[0]),
    "heard": lambda row: (_LAST if row[1]["heartbeat_age_s"] is None else row[1]["heartbeat_age_s"], row[0]),
}


def ls(args: argparse.Namespace) -> int:
    from rich.text import Text

    from cluster.watch.seen import each, find, glance
    from cluster.watch.show import console, runs_table, summary
    from cluster.watch.verdict import DONE, GOING, TROUBLE, judge
    from datamodules.store import Store
    from trainer.config import absolute_url

    root = Store(absolute_url(args.url))
    states = [state for state in (args.state or "").split(",") if state]
    for state in states:
        if state not in GOING + DONE + TROUBLE:
            raise ValueError(f"--state {state}: must be among {', '.join(sorted(GOING + DONE + TROUBLE))}")
    if args.json and args.watch:
        raise ValueError("--json has no effect with --watch; drop one of them")

    def row(path: str) -> tuple[str, Mapping[str, Any]]:
        seen = glance(root.sub(path) if path else root)
        return path or ".", summary(seen, judge(seen), name=_name(seen))

    def rows() -> list[tuple[str, Mapping[str, Any]]]:
        found = [found for found in each(row, find(root)) if not states or found[1]["state"] in states]
        return sorted(found, key=_SORTS[args.sort])

    def table() -> Any:
        found = rows()
        return (
            runs_table(found)
            if found
            else Text(f"no such runs below {root.url}" if states else f"no runs below {root.url}")
        )

    if args.json:
        print(json.dumps([told for _, told in rows()], indent=1))
    elif args.watch:
        _live(table, args.every)
    else:
        console().print(table())
    return 0


def top(args: argparse.Namespace) -> int:
    from rich.console import Group

    from cluster.watch.seen import look
    from cluster.watch.show import console, heading, summary
    from cluster.watch.top import Losses, frame
    from cluster.watch.verdict import judge

    store = open_run(args.url)
    losses, out = Losses(store), console()

    def view() -> Any:
        seen = look(store, workers=True)
        losses.update()
        verdict = judge(seen)
        told = summary(seen, verdict, name=_name(seen))
        return Group(heading(told, seen), frame(told, seen, losses.rows, width=out.width))

    if args.once:
        out.print(view())
    else:
        _live(view, args.every)
    return 0


def _live(view: Callable[[], Any], every: float) -> None:
    """Shows `view()` again and again, until interrupted. A store that is away for a moment is told, and waited for."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from cluster.watch.show import console
    from datamodules.store import StoreError

    if not every > 0:
        raise ValueError(f"--every {every:g}: must be positive")
    last = view()
    with Live(last, console=console(), screen=sys.stdout.isatty(), auto_refresh=False) as live:
        try:
            while True:
                live.refresh()
                time.sleep(every)
                try:
                    last = view()
                    live.update(last)
                except StoreError as error:
                    live.update(Group(last, Text(str(error), style="red")))
        except KeyboardInterrupt:
            return
