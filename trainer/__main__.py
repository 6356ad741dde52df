"""Worker entry: what a launcher starts on every process.

    python -m trainer fit RUN_URL [--resume]
    python -m trainer evaluate RUN_URL [--split test] [--limit N]

Exit codes: 0 done (a diverged run is a result, too), 2 bad input (one line on stderr), 69 the store did not answer in time
(one line; a later start may succeed), 75 preempted by SIGTERM or SIGUSR1 after a save or before there was anything to
save, 76 ended by the watchdog, 130 interrupted by SIGINT likewise, or cancelled, 1 any other failure.
"""

import argparse
import os
import sys
from typing import Any

from trainer import restarts, signals

# by status of the run
_EXITS = {"preempted": signals.EXIT_PREEMPTED} | dict.fromkeys(("interrupted", "cancelled"), signals.EXIT_INTERRUPTED)


def main(argv: list[str] | None = None) -> int:
    """Runs one worker; returns its exit code."""
    signals.leave_at_once()  # before the heavy imports
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
    restarts.be_patient()
    try:
        if arguments.command == "fit":
            from trainer.run import fit_url

            return exit_code(fit_url(arguments.url, resume=arguments.resume or restarts.count() > 0))
        from trainer.evaluation import evaluate as run_evaluation

        run_evaluation(arguments.url, split=arguments.split, limit=arguments.limit or None)
    except Exception as error:
        from trainer import errors
        from trainer.distributed import posted_error

        if errors.wants_traceback():
            raise
        # Without a tear-down: the other ranks may hang in a collective, and the launcher ends them.
        if errors.is_user_error(error) or isinstance(error, errors.Defect):
            print(errors.one_line(error), file=sys.stderr, flush=True)
            os._exit(errors.exit_code(error))
        told = posted_error()
        if told is not None:  # by the rank that failed; this one only lost the connection to it
            code, line = told
            if os.environ.get("RANK") == "0":  # whose output the launcher shows
                print(f"keel: error: {line}", file=sys.stderr, flush=True)
            os._exit(code)
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
