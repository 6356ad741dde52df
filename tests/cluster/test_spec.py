"""A job before it is anywhere: its spec, the config of its cluster, the command of its nodes, the code that they get."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import cluster_config
from cluster.launch.base import open_backend
from cluster.launch.code import pack
from cluster.launch.entry import BOOTSTRAP, node_command, node_environment
from cluster.launch.job import write_job
from cluster.launch.spec import CodeSpec, JobSpec, from_dict, passed, to_dict
from trainer.config import ConfigError


def test_a_spec_survives_json_and_refuses_what_cannot_be() -> None:
    code = CodeSpec("snapshot", "s3://b/code/x.tar.gz", "ab" * 32)
    spec = JobSpec("a-b", ("trainer", "fit", "s3://b/r"), "s3://b/r", nodes=2, env={"X": "1"}, code=code, after=("7",))
    assert from_dict(json.loads(json.dumps(to_dict(spec)))) == spec
    good: dict[str, Any] = {"name": "x", "command": ("a",), "run_url": "u"}
    for bad, message in [
        ({"name": "A b"}, "name="),
        ({"nodes": 0}, "nodes=0"),
        ({"nodes": 3, "max_nodes": 2}, "max_nodes=2"),
        ({"array": 2}, "own url"),
        ({"run_url": "u-{index}"}, "no meaning without array"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "looks like a secret"),
        ({"time_limit_s": 0}, "time_limit_s=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            JobSpec(**(good | bad))
    for name in ("HF_TOKEN", "TOKEN", "TOKEN_FILE", "hub_token", "DB_PASSWORD"):
        with pytest.raises(ValueError, match="looks like a secret"):
            JobSpec(**good, env={name: "x"})
    JobSpec(**good, env={"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "1"})
    spec = JobSpec(**good, pass_env=("AWS_*", "HOME"))
    assert passed(spec, {"AWS_A": "1", "HOME": "/", "X": "y"}) == {"AWS_A": "1", "HOME": "/"}
    with pytest.raises(ValueError, match="HOME is not set here"):
        passed(spec, {})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("1h30m", 5400),
        ("2d", 172800),
        ("4:00:00", 14400),
        ("1-12:00:00", 129600),
        ("", None),
    ],
)
def test_time_limits(text: str, seconds: float | None) -> None:
    assert cluster_config.seconds(text) == seconds


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "backend is required"),
        ({"backend": "moon"}, "backend=moon: unknown; one of"),
        ({"backend": "local", "slrum": {}}, "unknown key 'slrum'"),
        ({"backend": "local", "local": {"paralel": 2}}, "did you mean 'local.parallel'"),
        ({"backend": "local", "job": {"time": "soon"}}, "job: time=soon: must be like"),
        ({"backend": "local", "code": {"how": "path"}}, "code: how=path needs where="),
        ({"backend": "local", "env": {"API_TOKEN": "x"}}, "a secret does not belong in a file"),
        ({"backend": "local", "heartbeat_s": 0}, "heartbeat_s=0"),
        ({"backend": "local", "rendezvous": {"port": 70000}}, "port=70000"),
    ],
)
def test_a_wrong_cluster_is_refused_in_one_line(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        cluster_config.load(raw)
    assert "\n" not in str(refused.value)


def test_a_cluster_survives_the_store() -> None:
    cluster = cluster_config.load({"backend": "local", "env": {"A": "b"}, "local": {"parallel": 3}}, ["job.nodes=2"])
    again = cluster_config.load(json.loads(json.dumps(cluster_config.to_dict(cluster))))
    assert cluster_config.to_dict(again) == cluster_config.to_dict(cluster)
    assert again.options.parallel == 3 and again.job.nodes == 2


@pytest.mark.parametrize("backend", ["local", "ray", "slurm"])
def test_no_value_that_is_passed_is_shown_or_stored(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    cluster = cluster_config.load({"backend": backend, "pass_env": ["AWS_*"]})
    spec = JobSpec("x", ("trainer", "fit", "u"), str(tmp_path), pass_env=("AWS_*",))
    assert passed(spec, os.environ)["AWS_SECRET_ACCESS_KEY"] == "hush-hush"
    assert "hush-hush" not in open_backend(cluster).render(spec)
    write_job(spec, cluster, "7")
    assert "hush-hush" not in (tmp_path / "job.json").read_text()


def test_the_node_command_is_the_same_on_all_nodes_and_finds_the_code() -> None:
    cluster = cluster_config.load({"backend": "local", "rendezvous": {"lost_s": 9}, "python": "/opt/python"})
    base: dict[str, Any] = {"name": "x", "command": ("trainer", "fit", "u"), "run_url": "u", "nodes": 2, "max_nodes": 4}
    words = node_command(JobSpec(**base), cluster)
    assert words[:4] == ["/opt/python", "-P", "-m", "cluster.launch.node"] and words[-4:] == [
        "--",
        "trainer",
        "fit",
        "u",
    ]
    assert words[words.index("--nodes") + 1] == "2:4" and words[words.index("--lost") + 1] == "9"
    shared = JobSpec(**base, code=CodeSpec("path", "/shared/keel"), env={"A": "b"})
    assert node_command(shared, cluster) == words
    assert node_environment(shared) == {"PYTHONPATH": "/shared/keel", "A": "b"}
    shipped = JobSpec(**base, code=CodeSpec("snapshot", "s3://b/c.tar.gz", "ab"))
    assert node_command(shipped, cluster)[:6] == ["/opt/python", "-P", "-c", BOOTSTRAP, "s3://b/c.tar.gz", "ab"]
    assert node_command(shipped, cluster)[6:] == words[4:]


def test_a_snapshot_holds_what_git_does_not_ignore_and_is_named_after_it(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "kept.py").write_text("a = 1\n")
    git("add", "kept.py")
    (tmp_path / "new.py").write_text("b = 2\n")
    (tmp_path / "big.log").write_text("x")
    first = pack(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert set(tar.getnames()) == {".gitignore", "kept.py", "new.py", ".keel-snapshot.json"}
    (tmp_path / "kept.py").touch()
    assert pack(tmp_path) == first
    (tmp_path / "kept.py").write_text("a = 3\n")
    assert pack(tmp_path) != first
    (tmp_path / "link.py").symlink_to("kept.py")
    pack(tmp_path)
    (tmp_path / "data").symlink_to("/nfs/data")
    with pytest.raises(ValueError, match=r"data is a link to /nfs/data, which no node has: add it to \.gitignore"):
        pack(tmp_path)
    with pytest.raises(ValueError, match="how=snapshot packs a git checkout"):
        pack(Path("/"))


def test_the_bootstrap_refuses_a_damaged_archive(tmp_path: Path) -> None:
    (tmp_path / "code.tar.gz").write_bytes(b"no archive")
    words = [sys.executable, "-P", "-c", BOOTSTRAP.replace("attempt == 4", "True"), str(tmp_path / "code.tar.gz")]
    done = subprocess.run([*words, "0" * 64], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the code cannot be fetched (OSError: its checksum is wrong)" in done.stderr


def test_a_node_that_is_told_to_end_while_it_fetches_the_code_is_started_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "code.tar.gz")
    words = [sys.executable, "-P", "-c", BOOTSTRAP, str(tmp_path / "code.tar.gz"), "0" * 64]
    node = subprocess.Popen(words)
    with open(tmp_path / "code.tar.gz", "wb"):  # waits for it to read
        node.send_signal(signal.SIGTERM)
        assert node.wait(60) == 75
