"""The stream benchmark runs, checks what it reads, and its report follows from its figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = [sys.executable, str(ROOT / "scripts/bench/stream.py")]


def test_quick_run_of_keel_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, report = tmp_path / "figures.json", tmp_path / "report.md"
    some = ["--quick", "--library", "keel", "--source", "local", "--case", "tokens"]
    command = [*BENCH, *some, "--seconds", "0.1", "--folder", str(tmp_path / "data"), "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert [row["case"] for row in found["rows"]] == [row["case"] for row in found["limits"]] == ["tokens"]
    for row in found["rows"]:
        assert row["exact"] and row["cached_epochs"] >= 20 and len(row["resume_s"]) == 2
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    monkeypatch.setattr(sys, "argv", ["stream.py", "--from-json", str(figures), "--markdown", str(report)])
    import stream

    stream.main()
    assert "tokens, local: cached over its limit" in report.read_text()


def figures(keel: float) -> dict[str, Any]:
    """Windows from S3 in two repeats: Keel reads `keel` and half as many samples a second, its peer 10 and 10."""

    def row(library: str, repeat: int, speed: float) -> dict[str, Any]:
        cold = {"cold_samples": 160, "cold_s": 160 / speed, "first_batch_s": 80 / speed}
        return {
            "case": "windows", "source": "s3", "library": library, "repeat": repeat, "rss": [0] * 20, "memory": 1,
            "cached_samples": 160, "cached_s": 160 / speed, "cached_epochs": 20, "fetched_per_used": 1.0, **cold,
        }  # fmt: skip

    rows = [row("keel", i, keel / (i + 1)) for i in (0, 1)] + [row("litdata", i, 10.0) for i in (0, 1)]
    rows += [row("keel (shards)", i, 30.0) for i in (0, 1)]
    limits = [{"case": "windows", "source": "s3", "repeat": i, "cold": 40.0, "cached": 40.0} for i in (0, 1)]
    return {
        "rows": rows, "limits": limits, "quick": True, "workers": 2, "repeats": 2, "minutes": 1.0, "versions": {},
        "date": "2026-01-01", "hardware": "a machine", "load": 0.0, "commit": "abc",
    }  # fmt: skip


def test_the_report_says_what_each_aim_is_held_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    import stream_report

    shown = figures(80.0)
    found = {row[0]: row[1:] for row in stream_report.verdicts(shown, stream_report.summary(shown))}
    assert found["windows, s3: cached over the best peer"] == [">= 10", "6", "4 to 8", "no"]
    assert found["windows, s3: cached over its limit"] == [">= 0.5", "1.5", "1 to 2", "yes; above the measured limit"]
    assert found["windows, s3: cold, the whole epoch, over its limit"][1:3] == ["1.5", "1 to 2"]
    assert found["windows, s3: cold after the first batch over its limit"][1:3] == ["2.7", "1.8 to 3.6"]
    assert found["windows, s3, keel (shards): cached over the best peer"] == [">= 10", "3", "3 to 3", "not judged (no)"]
    assert found["windows, s3, keel (shards): cached over its limit"][3] == "not judged (yes)"
    page = stream_report.markdown(shown)
    assert "## What limits it" in page and "| 6 | 4 to 8 | no |" in page


def test_a_case_that_was_measured_again_takes_the_place_of_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    import stream

    def figures(commit: str, *places: tuple[str, str]) -> dict[str, Any]:
        rows = [{"case": case, "source": source, "commit": commit} for case, source in places]
        return {"rows": rows, "limits": list(rows), "note": "", "commit": commit, "load": 1.0}

    old = figures("old", ("fields", "s3"), ("windows", "s3"), ("tokens", "s3"))
    found = stream.joined([old, figures("new", ("windows", "s3"), ("windows", "local"))])
    for kind in ("rows", "limits"):
        told = [(row["case"], row["source"], row["commit"]) for row in found[kind]]
        assert told == [
            ("fields", "s3", "old"),
            ("windows", "s3", "new"),
            ("tokens", "s3", "old"),
            ("windows", "local", "new"),
        ]
    assert found["note"] == "Of these, windows from s3 and windows from local: measured again at new, load 1.0."
