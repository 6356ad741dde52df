"""The local S3 server of the demo: comes up on a free port, is found again, goes away."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "scripts/services/s3.py"


@pytest.fixture(scope="module")
def s3() -> ModuleType:
    spec = importlib.util.spec_from_file_location("keel_s3_service", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_up_store_down(s3: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datamodules.store import Store, StoreError

    try:
        environment = s3.up(tmp_path)
        assert s3.up(tmp_path) == environment  # the same server, found again
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        store = Store("s3://keel/some/prefix", deadline=5, connect_deadline=5)
        store.write("a/b", b"content")
        assert store.read("a/b") == b"content"
        assert not store.create("a/b", b"other")
        assert store.list("") == ["a/b"]
    finally:
        assert s3.down(tmp_path)
    assert not s3.down(tmp_path)
    with pytest.raises(StoreError):
        Store("s3://keel/some/prefix", deadline=2, connect_deadline=2).read("a/b")


def test_prints_what_a_shell_can_eval(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, str(SCRIPT), *words, "--dir", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout

    try:
        lines = run("up", "--port", "0").splitlines()
        assert all(line.startswith("export ") for line in lines)
        assert any(line.startswith("export AWS_ENDPOINT_URL=http://127.0.0.1:") for line in lines)
    finally:
        assert run("down") == "stopped\n"
