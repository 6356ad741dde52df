"""A driver: does what is missing of a sweep, here or as a task of a job.

    python -m cluster.sweep.drive SWEEP_URL [--executor NAME] [--workers N]

Exit codes: 0 nothing is left for this driver (rows may have diverged or failed, or belong to others), 2 bad input, 74 given
up by another driver, 75 told to end (start it again and it goes on), 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys

from cluster.launch import EXIT_LOST, EXIT_REQUEUE, EXIT_USER_ERROR
from cluster.sweep.claims import Lost
from cluster.sweep.executor import open_executor
from cluster.sweep.suggest import to_suggest
from cluster.sweep.sweep import Sweep
from cluster.sweep.table import Row, Table, read_table
from datamodules.store import Store
from trainer import restarts


def drive(table: Table, executor: str, workers: int = 0, *, retry: bool = False) -> int:
    """Does the rows of a table that have no result and are no other driver's; returns the exit code.

    Raises:
        ValueError: a row that can never run here.
        Lost: this driver was silent for so long that another one gave it up.
    """
    if table.sweep["tune"]["search"] and executor != "ray":
        raise ValueError(f"tune.search needs the executor ray, not {executor}; add --executor ray")
    made = open_executor(executor, workers)
    sweep = Sweep(table, retry=retry)
    rows = sweep.missing()
    if rows or to_suggest(table):
        made.check(sweep, rows)
        with sweep, sweep.listening():
            made.run(sweep, rows)
            # Rows of a driver that has died since.
            while not sweep.over and (left := _free(sweep)) and left != rows:
                rows = left
                made.run(sweep, rows)
            sweep.claims.check()
    return {0: 0, signal.SIGINT: 130}.get(sweep.signal, EXIT_REQUEUE)


def _free(sweep: Sweep) -> list[Row]:
    held = sweep.claims.held()
    return [row for row in sweep.missing() if row.id not in held]


def main(argv: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m cluster.sweep.drive", description=__doc__, allow_abbrev=False)
    parser.add_argument("url")
    parser.add_argument("--executor", default="", help="default: the sweep's own")
    parser.add_argument("--workers", type=int, default=0, help="rows, cores or processes at once (0: what there is)")
    parser.add_argument("--retry", action="store_true", help="do failed rows again")
    args = parser.parse_args(argv)
    restarts.die_with_parent()
    try:
        table = read_table(Store(args.url))
        return drive(table, args.executor or table.sweep["executor"], args.workers, retry=args.retry)
    except (ValueError, OSError) as error:
        print(f"keel: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except Lost as error:
        print(f"keel: error: {error}", file=sys.stderr, flush=True)
        return EXIT_LOST


if __name__ == "__main__":
    sys.exit(main())
