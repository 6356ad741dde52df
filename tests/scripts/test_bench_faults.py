"""The table of injected faults says whether its aims are reached."""

import argparse
from pathlib import Path
from typing import Any

from scripts.bench import faults_report


def row(kind: str = "sigkill", **other: Any) -> dict[str, Any]:
    common = {"case": 3, "phase": "run", "background": False, "world": 2, "model": "fno", "group": "process"}
    found = {"survived": True, "restarted": True, "steps_lost": 4, "seconds": 2.0, "forked": True, "equal": True}
    return {"kind": kind, **common, **found, "ratio": None, **other}


def test_aims() -> None:
    good = [
        row(),
        row(steps_lost=5),
        row(background=True, steps_lost=10),
        row("damaged", steps_lost=9),
        row(equal=None),
    ]
    assert faults_report.unmet(good, 5) == []
    bad = [row("hang", survived=False), row("crash", steps_lost=6), row("nan_skip", equal=False, case=7)]
    assert faults_report.unmet([*good, *bad], 5) == [
        "1 of 8 faults: not survived (hang; runs 3)",
        "1 of 8 faults: more steps lost than allowed (crash; runs 3)",
        "1 of 8 faults: losses not equal (nan_skip; runs 7)",
    ]


def test_the_table_says_what_was_aimed_at(tmp_path: Path) -> None:
    options = argparse.Namespace(json=None, markdown=str(tmp_path / "faults.md"))
    assert faults_report.report(options, [row(), row()], "of 9 steps", 5) == []
    assert "aims: every fault is survived" in (tmp_path / "faults.md").read_text()
    (missed,) = faults_report.report(options, [row(), row(steps_lost=6)], "of 9 steps", 5)
    text = (tmp_path / "faults.md").read_text()
    assert missed in text and "| sigkill | 2/2 | 2 | 5 | 6 | 1/2 |" in text
