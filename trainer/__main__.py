"""Worker entry: what a launcher starts on every process.

    python -m trainer fit RUN_URL [--resume]
    python -m trainer evaluate RUN_URL [--split test] [--limit N]

Exit codes: 0 done (a diverged run is a result, too), 2 bad input (one line on stderr), 1 any other failure, 75 preempted
by SIGTERM or SIGUSR1 after a save, 76 ended by the watchdog, 130 interrupted by SIGINT or cancelled, after a save.
"""

import argparse
import os
import sys
from typing import Any

from trainer import restarts
from trainer.errors import Defect, is_user_error, one_line, wants_traceback

EXIT_FAILURE, EXIT_USER_ERROR = 1, 2
_EXITS = {"preempted": 75, "interrupted": 130, "cancelled": 130}  # by status of the run


def main(argv: list[str] | None = None) -> int:
    """Runs one worker; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit", help="train the run whose config.yaml lies at RUN_URL")
    fit.add_argument("url")
    fit.add_argument("--resume", action="store_true", help="continue from the last committed checkpoint")
    evaluate = commands.add_parser("evaluate", help="evaluate the last committed checkpoint of RUN_URL")
    evaluate.add_argument("url")
    evaluate.add_argument("--split", default="test")
    evaluate.add_argument("--limit", type=int, default=0, help="at most this many samples (0: all)")
    arguments = parser.parse_args(argv)
    restarts.die_with_parent()
    try:
        if arguments.command == "fit":
            from trainer.run import fit_url

            return exit_code(fit_url(arguments.url, resume=arguments.resume or restarts.count() > 0))
        from trainer.evaluation import evaluate as run_evaluation

        run_evaluation(arguments.url, split=arguments.split, limit=arguments.limit or None)
    except Exception as error:
        from trainer.distributed import posted_error

        if wants_traceback():
            raise
        # Without a tear-down: the other ranks may hang in a collective, and the launcher ends them.
        if is_user_error(error):
            print(one_line(error), file=sys.stderr, flush=True)
            os._exit(EXIT_USER_ERROR)
        if isinstance(error, Defect):
            print(one_line(error), file=sys.stderr, flush=True)
            os._exit(EXIT_FAILURE)
        told = posted_error()
        if told is not None:  # by the rank that failed; this one only lost the connection to it
            if os.environ.get("RANK") == "0":  # whose output the launcher shows
                print(f"keel: error: {told}", file=sys.stderr, flush=True)
            os._exit(EXIT_USER_ERROR)
        raise
    return 0


def exit_code(record: dict[str, Any]) -> int:
    """What a run's end is to its launcher."""
    return _EXITS.get(record["status"], 0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and closed. The interpreter's own tear-down races with gloo's threads and can abort the process.
    os._exit(code)
