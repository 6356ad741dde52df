"""The benchmarks of checkpoints and of resuming run and tell what they promise, on small states."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "scripts/bench"


def figures(tmp_path: Path, script: str, *words: str) -> dict[str, dict[str, float]]:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / script), *words, "--repeats", "1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_stall_and_bandwidth(tmp_path: Path) -> None:
    found = figures(tmp_path, "checkpoint.py", "--mib", "3")["saves_folder"]
    assert found["mib"] > 2 and min(found.values()) > 0
    assert {"finite", "optional", "stall_over_blocking", "stall_over_blocking_all"} <= found.keys()
    assert {"save_over_raw", "load_over_raw"} <= found.keys()


def test_the_parts_of_a_resume(tmp_path: Path) -> None:
    parts = figures(tmp_path, "resume.py", "--only", "parts")["parts"]
    names = ["interpreter", "launcher: start of the worker", "imports of the worker", "rendezvous", "data set, model"]
    assert sorted(parts) == sorted([*names, "sharding, load", "first batch", "first step", "all"])
    assert abs(sum(value for name, value in parts.items() if name != "all") - parts["all"]) < 1e-3
