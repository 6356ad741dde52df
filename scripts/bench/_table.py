"""What every benchmark shares: one table on the terminal, the same figures by name in a JSON file."""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_shown: list[tuple[str, list[str], list[list[str]], str]] = []


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", metavar="FILE", help="write the figures there, by name")
    made.add_argument("--markdown", metavar="FILE", help="write the table there, with date, machine and command")
    return made


def show(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "", quietly: bool = False
) -> None:
    """Prints one table, floats with four significant digits; `quietly` only keeps it for `save`."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    _shown.append((title, list(columns), cells, note))
    if quietly:
        return
    table = Table(title=title, caption=note or None, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in cells:
        table.add_row(*row)
    Console(width=140).print(table)


def machine() -> dict[str, Any]:
    """What figures were measured on, when, and by which command."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": f"{os.getloadavg()[1]:.1f} in the last 5 minutes",  # well above the cores in use: read ratios with care
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *_without_paths(sys.argv[1:])]),
    }


def save(
    options: argparse.Namespace, figures: dict[str, Any], tables: int = 1, measured_on: dict[str, Any] | None = None
) -> None:
    """Writes the figures, and the tables shown last, with what they were measured on (now, here), where the options say."""
    measured_on = measured_on or machine()
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": measured_on, **figures}, file, indent=1, sort_keys=True)
            file.write("\n")
    if options.markdown:
        lines = []
        for title, columns, rows, note in _shown[len(_shown) - tables :]:
            lines += [
                f"# {title}",
                "",
                f"{note}.",
                "",
                "| " + " | ".join(columns) + " |",
                "|" + " --- |" * len(columns),
            ]
            lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
        lines += [*(f"- {name}: {value}" for name, value in measured_on.items()), ""]
        os.makedirs(os.path.dirname(options.markdown) or ".", exist_ok=True)
        with open(options.markdown, "w") as file:
            file.write("\n".join(lines))


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
        check=False,
    )
    return found.stdout.strip() or "unknown"


def _without_paths(arguments: list[str]) -> list[str]:
    kept = list(arguments)
    for option in (
        "--json",
        "--markdown",
        "--folder",
        "--data",
        "--rows",
        "--out",
        "--docs",
        "--transformer-data",
        "--fno-data",
    ):
        if option in kept:
            at = kept.index(option)
            del kept[at : at + 2]
    return kept


def median_of_ratios(pairs: Sequence[tuple[float, float]]) -> float:
    """Median over paired repeats of a / b: load that hits both sides of a pair cancels."""
    return statistics.median(a / b for a, b in pairs)
