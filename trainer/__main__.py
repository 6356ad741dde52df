"""Worker entry: what a launcher starts on every process.

    python -m trainer fit RUN_URL [--resume]
    python -m trainer evaluate RUN_URL [--split test] [--limit N]

Exit codes: 0 done (a diverged run is a result, too), 2 bad input (one line on stderr), 1 any other failure,
75 preempted and safe to start again.
"""

import argparse
import ctypes
import os
import signal
import sys

from trainer.errors import USER_ERRORS, one_line

EXIT_USER_ERROR = 2
_PR_SET_PDEATHSIG = 1


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
    _die_with_parent()
    try:
        if arguments.command == "fit":
            from trainer.run import fit_url

            fit_url(arguments.url, resume=arguments.resume)
        else:
            from trainer.evaluation import evaluate as run_evaluation

            run_evaluation(arguments.url, split=arguments.split, limit=arguments.limit or None)
    except USER_ERRORS as error:
        if os.environ.get("KEEL_TRACEBACK") == "1":
            raise
        print(one_line(error), file=sys.stderr, flush=True)
        # Without a tear-down: the other ranks may hang in a collective, and the launcher ends them.
        os._exit(EXIT_USER_ERROR)
    return 0


def _die_with_parent() -> None:
    """Asks Linux to kill this process when its launcher is killed, so that no worker is left over."""
    parent = os.environ.get("KEEL_PARENT_PID")
    if not parent or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
