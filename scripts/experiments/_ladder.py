"""What the ladders share: keel commands as a user types them, and the page that they end in."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]  # before what follows

from _table import machine

DOCS = ROOT / "docs" / "results"


def keel(*words: str, codes: Sequence[int] = (0,)) -> int:
    """Runs one keel command, echoed; ends the script where it ends in none of `codes`."""
    print(f"\n$ keel {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "cluster.cli", *words], cwd=ROOT, check=False).returncode
    if code not in codes:
        raise SystemExit(f"`keel {words[0]}` ended with exit code {code}; start again to go on")
    return code


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table in Markdown; floats with four significant digits."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*head, *("| " + " | ".join(map(cell, row)) + " |" for row in rows), ""]


def laws(fit: Mapping[str, Any]) -> list[str]:
    """The fitted laws of `fit.json` and the intervals of the first one."""
    rows = [
        (name, ", ".join(f"{key} {value:.4g}" for key, value in found["parameters"].items()), found["status"])
        for name, found in fit["fits"].items()
    ]
    lines = table(["law", "parameters", "status"], rows)
    bands = (fit.get("intervals") or {}).get("pairs", {})
    if bands:
        rows_of = [(name, b["value"], b["se"], *b["interval"]) for name, b in bands.items()]
        lines += table(["parameter of the first law", "value", "standard error", "95% from", "to"], rows_of)
    return lines


def write(name: str, lines: Sequence[str]) -> None:
    """Writes docs/results/NAME.md, with what it was made on."""
    (DOCS / f"{name}.md").write_text("\n".join([*lines, *(f"- {k}: {v}" for k, v in machine().items()), ""]))
    print(DOCS / f"{name}.md")
