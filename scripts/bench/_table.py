"""What every benchmark shares: one table on the terminal, the same figures by name in a JSON file."""

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", metavar="FILE", help="write the figures there, by name")
    return made


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
    """Prints one table; floats with four significant digits."""
    table = Table(title=title, caption=note or None, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=140).print(table)


def save(path: str | None, figures: dict[str, Any]) -> None:
    """Writes the figures with what they were measured on."""
    if path:
        import torch

        machine = {"platform": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
        with open(path, "w") as file:
            json.dump({"machine": machine, **figures}, file, indent=1, sort_keys=True)
            file.write("\n")


def median_of_ratios(pairs: Sequence[tuple[float, float]]) -> float:
    """Median over paired repeats of a / b: load that hits both sides of a pair cancels."""
    return statistics.median(a / b for a, b in pairs)
