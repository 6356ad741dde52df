"""`scripts/services/ceph.sh`: found again, side by side, restarted with its data, gone when told."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from datamodules.store import Store
from tests.conftest import CephServer, ceph_script, exported


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("*.pid"))]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_running_server_is_found_again(ceph: CephServer) -> None:
    before = pids(ceph.folder)
    again = ceph_script("up", str(ceph.folder))
    assert again.returncode == 0 and exported(again.stdout) == ceph.environment
    assert pids(ceph.folder) == before and len(before) == 3


def test_a_second_server_beside_the_first_keeps_its_data_over_a_restart(ceph: CephServer, tmp_path: Path) -> None:
    folder = str(tmp_path / "second")
    try:
        environment = exported(ceph_script("up", folder).stdout)
        assert environment["AWS_ENDPOINT_URL"] != ceph.endpoint
        options = {**ceph.options(), "endpoint_url": environment["AWS_ENDPOINT_URL"], "connect_deadline": 1.0}
        store = Store("s3://keel/kept", **options)
        store.write("x", b"content")
        with pytest.raises(urllib.error.HTTPError, match=r"404|403"):
            urllib.request.urlopen(f"{ceph.endpoint}/keel/kept/x", timeout=10)
        first = pids(tmp_path / "second")
        assert ceph_script("down", folder).returncode == 0
        assert not any(map(alive, first)) and pids(tmp_path / "second") == []
        assert all(map(alive, pids(ceph.folder)))
        assert exported(ceph_script("up", folder).stdout) == environment
        assert store.read("x") == b"content"
    finally:
        ceph_script("down", folder)
    assert ceph_script("down", folder).returncode == 0  # nothing to stop is fine


def test_a_pid_that_went_to_another_program_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "osd.pid").write_text(str(os.getpid()))
    assert ceph_script("down", str(tmp_path)).returncode == 0
    assert not (tmp_path / "osd.pid").exists()


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    for words in (["up"], ["sideways", str(tmp_path)], ["up", str(tmp_path), "port"]):
        done = ceph_script(*words)
        assert done.returncode == 2 and done.stderr.startswith("ceph.sh: error: usage") and done.stderr.count("\n") == 1


def test_the_disk_is_bounded(ceph: CephServer) -> None:
    configured = (ceph.folder / "ceph.conf").read_text()
    size = int(next(line for line in configured.splitlines() if line.startswith("bluestore block size")).split("=")[1])
    used = sum(path.stat().st_blocks * 512 for path in ceph.folder.rglob("*") if path.is_file())
    assert (ceph.folder / "osd/block").stat().st_size == size <= 2**31
    assert used < size + 2**29, json.dumps({"used": used})
