"""The stream benchmark runs, checks what it reads, and its report follows from its figures."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = [sys.executable, str(ROOT / "scripts/bench/stream.py")]


def test_quick_run_of_keel_alone(tmp_path: Path) -> None:
    figures, report = tmp_path / "figures.json", tmp_path / "report.md"
    some = ["--quick", "--library", "keel", "--source", "local", "--case", "tokens"]
    command = [*BENCH, *some, "--seconds", "0.1", "--folder", str(tmp_path / "data"), "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert [row["case"] for row in found["rows"]] == [row["case"] for row in found["limits"]] == ["tokens"]
    for row in found["rows"]:
        assert row["exact"] and row["cached_epochs"] >= 20 and len(row["resume_s"]) == 2
    again = subprocess.run(
        [*BENCH, "--from-json", str(figures), "--markdown", str(report)], capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert "tokens, local: cached over its limit" in report.read_text()
