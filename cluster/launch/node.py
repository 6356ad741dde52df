"""What every backend starts once per node: the workers of this node, until the run ends.

    python -m cluster.launch.node --run URL --nodes 2 --processes 8 -- trainer fit URL

The environment says which node this is (see `cluster.launch.entry`). A run that has a commit is continued. Exit codes: 0
done (also when the run diverged), 2 bad input (one line on stderr), 69 the store did not answer in time, 74 the nodes did
not meet or lost each other, 75 preempted after a save (start the job again), 76 hung, 130 interrupted or
cancelled, any other failure; after each but 0, 2 and 130 starting the job again may help.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from typing import TYPE_CHECKING

from cluster.launch import (
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_OK,
    EXIT_REQUEUE,
    EXIT_UNAVAILABLE,
    EXIT_USER_ERROR,
    Group,
    Job,
    launch,
    requeue_on_signal,
)
from cluster.launch.budget import newest_commit
from cluster.launch.entry import ARRAY_INDEX, NODE, PROGRESS_CODE, RENDEZVOUS
from cluster.launch.spec import INDEX
from trainer.restarts import HEARTBEAT

if TYPE_CHECKING:
    from cluster.launch.node_watch import NodeWatch
    from datamodules.store import Store

_ENDS = (EXIT_OK, EXIT_REQUEUE, EXIT_INTERRUPTED, EXIT_USER_ERROR)  # which the workers tell in the record, if at all


def main(argv: list[str] | None = None) -> int:
    """Runs this node's part of the job; returns its exit code."""
    from trainer import restarts

    requeue_on_signal()
    restarts.die_with_parent()
    args = _parse(argv)
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        from datamodules.store import Unreachable

        print(f"keel: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return EXIT_UNAVAILABLE if isinstance(error, Unreachable) else EXIT_USER_ERROR


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster.launch.node", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True, metavar="URL", help="the run; {index} is the task of an array")
    parser.add_argument("--nodes", default="1", metavar="N[:MAX]", help="how many are needed, and how many may join")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="workers on this node")
    parser.add_argument("--node", type=int, default=int(os.environ.get(NODE) or 0), help=f"default: ${NODE}")
    parser.add_argument("--rendezvous", default=os.environ.get(RENDEZVOUS, ""), metavar="HOST:PORT", help="of node 0")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="without a new commit in between")
    parser.add_argument("--resume", choices=["auto", "never"], default="auto", help="auto: when there is a commit")
    parser.add_argument("--heartbeat", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--grace", type=float, default=300.0, metavar="SECONDS", help="to save after a signal")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="then save and end")
    parser.add_argument("--join-timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--lost", type=float, default=30.0, metavar="SECONDS", help="a silent node is lost after this")
    parser.add_argument("command", nargs="+", help="after --: what each worker runs, after `python -m`")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> int:
    from cluster.launch.node_watch import NodeWatch
    from datamodules.store import Store

    index = os.environ.get(ARRAY_INDEX)
    if index is None and INDEX in args.run:
        raise ValueError(f"{args.run}: ${ARRAY_INDEX} is not set, so the task of the array is not known")
    url, *command = (word.replace(INDEX, index or "") for word in (args.run, *args.command))
    if args.resume == "auto" and command[:2] == ["trainer", "fit"] and "--resume" not in command:
        command.append("--resume")  # which starts afresh when nothing is committed
    group = _group(args)
    if group is not None:  # torch warns, at each connection, of every address that has no name
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    folder = tempfile.mkdtemp(prefix="keel-node-")
    watch = NodeWatch(Store(url), args.node, folder, args.heartbeat, together=group is not None)
    env = {name: value.replace(INDEX, index) for name, value in os.environ.items() if INDEX in value and index}
    job = Job(
        tuple(command),
        processes=args.processes,
        env={**env, NODE: str(args.node), HEARTBEAT: f"{args.heartbeat:g}"},
        timeout_s=args.time_limit,
        grace_s=args.grace,
        max_restarts=args.restarts,
        progress=lambda: newest_commit(url),
        group=group,
        observer=watch,
    )
    watch.open()
    before, reached = _record(watch.store), _reached(url)
    code, reason = 1, "the launcher failed"
    try:
        code, reason = _launch(job, watch)
        return _told(code, url, reached)
    finally:
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)  # little is left to do, and it matters
        watch.close(code, reason)
        if args.node == 0 and code not in _ENDS:
            with contextlib.suppress(OSError, ValueError):
                _record_failure(watch.store, before, reason)
        shutil.rmtree(folder, ignore_errors=True)


def _reached(url: str) -> int | None:
    """The step of the newest commit, where the exit code is to tell of progress; None if it is not known."""
    with contextlib.suppress(OSError):
        return newest_commit(url) if os.environ.get(PROGRESS_CODE) else None
    return None


def _told(code: int, url: str, reached: int | None) -> int:
    """What the backend is told in place of `code`."""
    if code not in (EXIT_LOST, EXIT_UNAVAILABLE) or reached is None:
        return code
    newest = _reached(url)
    return int(os.environ[PROGRESS_CODE]) if newest is not None and newest > reached else code


def _launch(job: Job, watch: NodeWatch) -> tuple[int, str]:
    """(exit code, reason)"""
    try:
        code = launch(job)
    except SystemExit as ended:  # by a signal while no worker ran
        code = EXIT_INTERRUPTED if watch.cancelled else int(str(ended.code))
    except ValueError as error:
        print(f"keel: error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR, str(error)
    except Exception as error:
        from cluster.launch.meet import Lost

        if not isinstance(error, Lost):
            raise
        print(f"keel: error: {error}", file=sys.stderr, flush=True)
        return EXIT_LOST, str(error)
    return code, watch.reason(code)


def _group(args: argparse.Namespace) -> Group | None:
    least, _, most = args.nodes.partition(":")
    nodes, max_nodes = int(least), int(most or least)
    if not 1 <= nodes <= max_nodes:
        raise ValueError(f"--nodes {args.nodes}: must be N or MIN:MAX with 1 <= MIN <= MAX")
    if max_nodes == 1:
        return None
    if not 0 <= args.node < max_nodes:
        raise ValueError(f"--node {args.node}: must be 0 to {max_nodes - 1}; the backend sets ${NODE}")
    host, _, port = args.rendezvous.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"--rendezvous {args.rendezvous!r}: must be HOST:PORT of node 0; the backend sets ${RENDEZVOUS}"
        )
    return Group(args.rendezvous, args.node, nodes, max_nodes, args.join_timeout, args.lost)


def _record(store: Store) -> bytes | None:
    from datamodules.store import NotFound

    try:
        return store.read("record.jsonl")
    except NotFound:
        return None


def _record_failure(store: Store, before: bytes | None, reason: str) -> None:
    """A worker that was killed writes no record; then this is the record of the run's end."""
    from trainer.records import decode, read_attempts, write_record

    if _record(store) != before:
        return
    known = decode(before)[-1] if before else {"url": store.url}
    write_record(store, {**known, "status": "failed", "error": reason, "attempts": len(read_attempts(store))})


if __name__ == "__main__":
    sys.exit(main())
