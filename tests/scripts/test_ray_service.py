"""scripts/services/ray.py: a cluster that only its token opens. Tests of jobs see its nodes come and go, and the fixture
sees that nothing is left of it."""

from __future__ import annotations

import stat
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.ray import RayCluster, ray_script


def test_the_cluster_is_whole_and_opens_to_its_token_alone(ray_cluster: RayCluster) -> None:
    assert ray_cluster.nodes() == [ray_cluster.address_of("n1"), ray_cluster.address_of("n2")]
    token = ray_cluster.folder / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{ray_cluster.address}/api/jobs/", timeout=60)
    assert refused.value.code == 401
    again = ray_script("up", str(ray_cluster.folder))
    assert f"export RAY_ADDRESS={ray_cluster.environment['RAY_ADDRESS']}\n" in again.stdout


def test_what_cannot_be_done_is_one_line(ray_cluster: RayCluster, tmp_path: Path) -> None:
    assert ray_script("kill", str(ray_cluster.folder), "n9").stderr == "ray.py: error: node n9 does not run\n"
    assert ray_script("start", str(tmp_path), "n1").stderr == f"ray.py: error: no cluster runs in {tmp_path}\n"
    assert ray_script("down", str(tmp_path)).stdout == "no cluster was running\n"
