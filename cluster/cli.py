"""The console command `keel`.

Exit codes: 0 done; 1 a check found problems; 2 the user's error, told in one line; 75 preempted after a save, start
again; 130 interrupted. `KEEL_TRACEBACK=1` shows where an error came from.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from cluster.commands import checkpoint, config, coordcheck, data, doctor, dryrun, fit, plan, run, submit, sweep, watch

DESCRIPTION = """\
Trains neural operators and language models, on one process or many, from any object store.

A run is a config plus a data set; everything that it writes lies under its URL. Data, runs and configs may be local
paths or any fsspec URL (s3://, file://, memory://).
"""
EPILOG = """\
example:
  keel data make configs/data/navier_stokes_2d.yaml
  keel train configs/runs/demo_fno.yaml
  keel resume runs/demo_fno
  keel report runs/demo_fno

`keel COMMAND --help` explains each command. KEEL_TRACEBACK=1 shows the traceback of an error.
"""


class Version(argparse.Action):
    """Prints the installed version; looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"keel {version('keel')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. Importing what a command needs is left to the command."""
    parser = argparse.ArgumentParser(
        prog="keel", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for family in (run, submit, watch, doctor, data, config, checkpoint, dryrun, coordcheck, sweep, fit, plan):
        family.register(commands)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line; overrides may come before or after options. Exits with 2 on a mistake."""
    parser = build_parser()
    # argparse gives the optional positionals up once an option stands between them: `keel evaluate URL --split val a=b`.
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    args = parse(argv)
    try:
        return int(args.handler(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left: not an error. Nothing more can be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("KEEL_TRACEBACK", "") not in ("", "0") or not is_user_error(error):
            raise
        print(f"keel: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        from cluster.launch import EXIT_UNAVAILABLE, EXIT_USER_ERROR
        from datamodules.store import Unreachable

        return EXIT_UNAVAILABLE if isinstance(error, Unreachable) else EXIT_USER_ERROR


def is_user_error(error: Exception) -> bool:
    """Whether one line says it all: bad input (ValueError and what subsystems derive from it), a store or a file that
    cannot be used (OSError), a checkpoint that cannot be loaded. Anything else is a defect and keeps its traceback."""
    if isinstance(error, ValueError | OSError):
        return True
    checkpoints = sys.modules.get("trainer.checkpoint")
    kind = getattr(checkpoints, "CheckpointError", None)
    return kind is not None and isinstance(error, kind)


if __name__ == "__main__":
    sys.exit(main())
