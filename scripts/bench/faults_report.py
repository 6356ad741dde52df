"""What one run's faults cost, and the table over all rows of `faults.py`."""

from __future__ import annotations

import argparse
import bisect
import statistics
from collections import defaultdict
from typing import Any

from scripts.bench import _table

COLUMNS = [
    "fault",
    "survived (aim: all)",
    "went back",
    "steps lost, mean",
    "max",
    "within the aim",
    "s to next step, median",
    "max",
    "with imports, median",
    "losses bitwise equal (aim: all)",
]


def cost(steps: list[tuple[float, int, int]], struck: float, until: float) -> dict[str, Any]:
    """What a fault cost that struck between two times, by the steps (when, number, process of rank 0) of its run.

    `steps_lost`: done and done again; `seconds`: to the first step after training went on from a commit (`restarted`),
    else the longest time between two steps; None where the next fault struck first.
    """
    at = bisect.bisect(steps, (struck,))
    done, seconds = steps[at - 1][1] if at else 0, 0.0
    for index in range(at, len(steps)):
        when, number, process = steps[index]
        before = steps[index - 1] if index else (struck, 0, 0)
        if when > until:
            break
        if (number, process) != (before[1] + 1, before[2]):
            return {"steps_lost": before[1] - (number - 1), "seconds": when - struck, "restarted": True, "step": done}
        seconds = max(seconds, when - max(before[0], struck))
    return {"steps_lost": 0, "seconds": seconds or None, "restarted": False, "step": done}


def allowed(row: dict[str, Any], every: int) -> int:
    """Steps that a fault may cost: those since the last commit, of which a save in the background may still be on its way,
    and of which `damaged` takes one away."""
    return every * (1 + row["background"] + (row["kind"] == "damaged"))


def unmet(rows: list[dict[str, Any]], every: int) -> list[str]:
    """The aims that these rows do not reach, a line each."""
    dead = [row for row in rows if not row["survived"]]
    late = [row for row in rows if row["steps_lost"] > allowed(row, every)]
    other = [row for row in rows if row["equal"] is False]
    found = {"not survived": dead, "more steps lost than allowed": late, "losses not equal": other}
    return [
        f"{len(bad)} of {len(rows)} faults: {what} ({', '.join(sorted({row['kind'] for row in bad}))}; "
        f"runs {', '.join(map(str, sorted({row['case'] for row in bad})))})"
        for what, bad in found.items()
        if bad
    ]


def told(rows: list[dict[str, Any]]) -> str:
    """One line about the rows of one run."""
    if not rows:
        return "a run without a fault"
    row, bad = rows[0], [row["kind"] for row in rows if not row["survived"]]
    end = {True: "equal", False: "NOT EQUAL", None: "survived"}[row["equal"]]
    end = f"NOT SURVIVED: {', '.join(bad)}" if bad else end
    return f"run {row['case']}: {row['model']} on {row['world']} ({row['group']}), {len(rows)} faults, {end}"


def report(options: argparse.Namespace, rows: list[dict[str, Any]], setting: str, every: int) -> list[str]:
    """Prints and saves the table; returns the aims that are not reached.

    Args:
        options: where to save.
        rows: of all faults.
        setting: what all runs have in common.
        every: steps between commits.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        name = f"{row['kind']}, while starting" if row["phase"] == "start" else row["kind"]
        where = ["saved in the background"] if row["background"] else []
        for key in (name, "all", f"on {row['world']}", row["model"], *where):
            groups[key].append(row)
    kinds = sorted({name for name in groups if name.split(",")[0] in {row["kind"] for row in rows}})
    totals = ["all", *sorted(name for name in groups if name.startswith("on ")), "fno", "lm", "saved in the background"]
    figures = {name: _figures(groups[name], every) for name in [*kinds, *totals] if name in groups}
    table = []
    for name, each in figures.items():
        times = [each["seconds_median"], each["seconds_max"], each["seconds_with_imports_median"]]
        table.append(
            [
                name,
                f"{each['survived']}/{each['faults']}",
                each["restarted"],
                each["steps_lost_mean"],
                each["steps_lost_max"],
                f"{each['within']}/{each['faults']}",
                *("-" if value is None else value for value in times),
                f"{each['equal']}/{each['compared']}" if each["compared"] else "-",
            ]
        )
    ratios = [row["ratio"] for row in rows if row["group"] == "numbers" and row["ratio"] is not None]
    if ratios:
        setting += f"; final loss of runs with bad numbers {min(ratios):.3f} to {max(ratios):.3f} of the undisturbed"
    runs, missed = len({row["case"] for row in rows}), unmet(rows, every)
    aim = (
        f"aims: every fault is survived; it costs at most the {every} steps between two commits, twice as many where saves "
        "go on in the background, and as many more where the newest commit was damaged; the losses are those of the "
        f"undisturbed run; {'not reached: ' + '; '.join(missed) if missed else 'reached'}"
    )
    _table.show("Injected faults", COLUMNS, table, f"{runs} runs {setting}; {aim}")
    _table.save(options, {"kinds": figures, "runs": runs, "unmet": missed})
    return missed


def _figures(rows: list[dict[str, Any]], every: int) -> dict[str, Any]:
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None and row["forked"]]
    whole = [row["seconds"] for row in rows if row["seconds"] is not None and not row["forked"]]
    compared = [row["equal"] for row in rows if row["equal"] is not None]
    return {
        "faults": len(rows),
        "survived": sum(row["survived"] for row in rows),
        "restarted": sum(row["restarted"] for row in rows),
        "steps_lost_mean": statistics.mean(row["steps_lost"] for row in rows),
        "steps_lost_max": max(row["steps_lost"] for row in rows),
        "within": sum(row["steps_lost"] <= allowed(row, every) for row in rows),
        "seconds_median": statistics.median(seconds) if seconds else None,
        "seconds_max": max(seconds) if seconds else None,
        "seconds_with_imports_median": statistics.median(whole) if whole else None,
        "equal": sum(compared),
        "compared": len(compared),
    }
