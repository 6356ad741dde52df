"""Fixtures for all tests: real servers on this machine; and how tests are spread over processes."""

from __future__ import annotations

import importlib.util
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.laws import reference
from tests.helpers.ray import CPUS, RayCluster, ray_script
from tests.helpers.slurm import SlurmCluster, slurm_script

CEPH_SCRIPT = Path(__file__).resolve().parent.parent / "scripts/services/ceph.sh"

SERVERS = ("ray_server", "slurm_server", "ceph_server")

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def unavailable(reason: str) -> None:
    """Skip for want of a test dependency; under KEEL_REQUIRE=all that is a failure."""
    if os.environ.get("KEEL_REQUIRE") == "all":
        pytest.fail(f"KEEL_REQUIRE=all: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under KEEL_REQUIRE=all every skip is a failure, however it came about."""
    report = yield
    if report.skipped and os.environ.get("KEEL_REQUIRE") == "all":
        report.outcome = "failed"
        report.longrepr = f"KEEL_REQUIRE=all: {item.nodeid} was skipped: {call.excinfo.value if call.excinfo else ''}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Tests that were left out of the collection are no skips, and would go unnoticed."""
    if text := reference.missing(config.args):
        terminalreporter.write_line(text, yellow=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests need a server come first: they take the longest, and several processes share files, not tests."""
    served = {item.path for item in items if set(SERVERS) & set(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: item.path not in served)


@dataclass
class S3Server:
    """An S3 server of this test session; the AWS_* environment points to it."""

    endpoint: str
    _buckets: Iterator[int] = field(default_factory=itertools.count)

    def url(self, prefix: str = "") -> str:
        """A URL below a fresh bucket."""
        bucket = f"keel-{os.getpid()}-{next(self._buckets)}"
        request = urllib.request.Request(f"{self.endpoint}/{bucket}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        return f"s3://{bucket}/{prefix}".rstrip("/")


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(endpoint: str, server: subprocess.Popen[bytes], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
            return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.05)
    return False


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A moto server in its own process (so that tests may fork), and AWS_* set for this session."""
    missing = [name for name in ("moto", "s3fs", "flask") if importlib.util.find_spec(name) is None]
    if missing:
        unavailable(f"S3 tests need {', '.join(missing)}: pip install 'keel[test]'")
    for _ in range(3):  # another process may take the port first
        port = free_port()
        endpoint = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if _wait(endpoint, server):
            break
        server.kill()
        server.wait()
    else:
        unavailable("S3 tests need a moto server, which did not start")
    settings = {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}
    before = {name: os.environ.get(name) for name in (*settings, "AWS_PROFILE")}
    os.environ.update(settings)
    os.environ.pop("AWS_PROFILE", None)
    try:
        yield S3Server(endpoint)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@dataclass
class CephServer:
    """A radosgw of this test session, with real credentials. `ceph` sets the environment for it."""

    folder: Path
    environment: dict[str, str]
    _serial: Iterator[int] = field(default_factory=itertools.count)

    @property
    def endpoint(self) -> str:
        return self.environment["AWS_ENDPOINT_URL"]

    def url(self, prefix: str = "") -> str:
        """A fresh URL in its bucket."""
        return f"s3://keel/{os.getpid()}-{next(self._serial)}/{prefix}".rstrip("/")

    def options(self) -> dict[str, str]:
        """What a `Store` takes in place of the environment."""
        names = {"endpoint_url": "AWS_ENDPOINT_URL", "key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY"}
        return {option: self.environment[name] for option, name in names.items()}


def ceph_script(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `scripts/services/ceph.sh`."""
    return subprocess.run(["bash", str(CEPH_SCRIPT), *words], capture_output=True, text=True, timeout=280)


def exported(lines: str) -> dict[str, str]:
    """The variables of lines such as `export NAME=value`."""
    return dict(line.removeprefix("export ").split("=", 1) for line in lines.splitlines())


@pytest.fixture(scope="session")
def ceph_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephServer]:
    """Ceph on this machine, for the tests that need a store as it is in production."""
    if importlib.util.find_spec("s3fs") is None:
        unavailable("tests on Ceph need s3fs: pip install 'keel[test]'")
    folder = tmp_path_factory.mktemp("ceph")
    try:
        done = ceph_script("up", str(folder))
        if done.returncode == 3:  # not installed, and it cannot be installed here
            unavailable(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        yield CephServer(folder, exported(done.stdout))
    finally:
        ceph_script("down", str(folder))


@pytest.fixture
def ceph(ceph_server: CephServer, monkeypatch: pytest.MonkeyPatch) -> CephServer:
    """`ceph_server`, with the AWS_* environment pointing to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**ceph_server.environment, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    return ceph_server


@pytest.fixture(scope="session")
def slurm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Slurm on this machine, with two nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    try:
        done = slurm_script("up", str(folder), "2", KEEL_SLURM_CPUS="4", KEEL_SLURM_MEMORY="8000 4000")
        if done.returncode == 3:  # not installed, and it cannot be installed here
            unavailable(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        yield SlurmCluster(folder)
    finally:
        slurm_script("down", str(folder))


@pytest.fixture
def slurm(slurm_server: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """`slurm_server`, with SLURM_CONF naming it, and no job left to the next test."""
    monkeypatch.setenv("SLURM_CONF", slurm_server.conf)
    yield slurm_server
    slurm_server.clear()


@pytest.fixture(scope="session")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Ray on this machine, with a head and two nodes. Its clients find it when they ask for `ray_cluster`."""
    folder = tmp_path_factory.mktemp("ray")
    try:
        done = ray_script("up", str(folder), "2", KEEL_RAY_CPUS=str(CPUS))
        if done.returncode == 3:
            unavailable(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        yield (cluster := RayCluster(folder, exported(done.stdout)))
        assert len(cluster.processes()) > 6
        ray_script("down", str(folder))
        assert cluster.processes() == []
    finally:
        ray_script("down", str(folder))


@pytest.fixture
def ray_cluster(ray_server: RayCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    """`ray_server`, with the environment of its clients, and neither jobs nor dead nodes left to the next test."""
    from ray._private.authentication_test_utils import reset_auth_token_state

    with monkeypatch.context() as patch:
        for name, value in ray_server.environment.items():
            patch.setenv(name, value)
        reset_auth_token_state()  # Ray reads these settings once in a process
        yield ray_server
        ray_server.clear()
    reset_auth_token_state()
