"""A real Ray of the tests' own, and what tests ask of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.slurm import wait_until

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/services/ray.py"
CPUS = 4  # of each node


def ray_script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `scripts/services/ray.py`. Ray's processes do not hold its output open."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )


@dataclass
class RayCluster:
    """Nodes n1 and n2 with `CPUS` CPUs each, and a head that has none. `environment` lets Ray's clients in: `ray.init()`
    and everything above it, Ray Jobs, the `ray` commands."""

    folder: Path
    environment: dict[str, str]
    _killed: set[str] = field(default_factory=set)

    @property
    def address(self) -> str:
        """Of the dashboard, which Ray Jobs and the State API talk to."""
        return self.environment["RAY_API_SERVER_ADDRESS"]

    def kill(self, node: str) -> None:
        """Ends a node as a power cut does."""
        self._killed.add(node)
        done = ray_script("kill", str(self.folder), node)
        assert done.returncode == 0, done.stderr

    def start(self, node: str) -> None:
        """Starts a node; it joins the cluster soon after."""
        done = ray_script("start", str(self.folder), node)
        assert done.returncode == 0, done.stderr
        self._killed.discard(node)

    def ask(self, path: str, method: str = "GET") -> Any:
        """One request to the dashboard, by hand."""
        token = (self.folder / "token").read_text()
        url = f"{self.address}{path}"
        request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return json.load(response)

    def nodes(self) -> list[str]:
        """Addresses of the nodes that are alive and have CPUs."""
        rows = self.ask("/api/v0/nodes?detail=1&limit=1000")["data"]["result"]["result"]
        return sorted(r["node_ip"] for r in rows if r["state"] == "ALIVE" and "CPU" in r["resources_total"])

    def address_of(self, node: str) -> str:
        """The address of a node, which no other has."""
        state = json.loads((self.folder / "state.json").read_text())
        return f"{state['network']}.{state['addresses'][node]}"

    def processes(self) -> list[str]:
        """Command lines of what works in the cluster's folder, as all of Ray's own processes do."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if os.readlink(path / "cwd") == str(self.folder):
                    found.append((path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip())
        return [command for command in found if command]

    def clear(self) -> None:
        """Ends the jobs that a test has left, and starts the nodes that it has killed."""

        def left() -> list[str]:
            return [j["submission_id"] for j in self.ask("/api/jobs/") if j["status"] in ("PENDING", "RUNNING")]

        for job in left():
            self.ask(f"/api/jobs/{job}/stop", "POST")
        wait_until(lambda: not left(), "the jobs to end")
        for node in list(self._killed):
            self.start(node)
        wait_until(lambda: len(self.nodes()) == 2, "both nodes to be alive")
