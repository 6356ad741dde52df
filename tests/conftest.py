"""Fixtures for all tests: a real S3-compatible server on loopback."""

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
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

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
