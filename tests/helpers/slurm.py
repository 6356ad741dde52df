"""A real Slurm of the tests' own, and what tests ask of it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.launch import slurm_client

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/services/slurm.sh"


def slurm_script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `scripts/services/slurm.sh`. The daemons do not hold its output open."""
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **environment},
    )


@dataclass
class SlurmCluster:
    """Nodes n1 (8000 MiB) and n2 (4000 MiB) with 4 CPUs each; partitions main, small and urgent."""

    folder: Path

    @property
    def conf(self) -> str:
        return str(self.folder / "slurm.conf")

    def kill(self, node: str) -> None:
        """Ends a node as a power cut does."""
        done = slurm_script("kill", str(self.folder), node)
        assert done.returncode == 0, done.stderr

    def start(self, node: str) -> None:
        done = slurm_script("start", str(self.folder), node)
        assert done.returncode == 0, done.stderr

    def call(self, *words: str) -> str:
        """Some Slurm command, by hand."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=60, env={**os.environ, "SLURM_CONF": self.conf}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def clear(self) -> None:
        """Ends what a test has left in the queue."""
        if self.call("squeue", "-h", "-o", "%i"):
            user = f"--user={os.getuid()}"
            self.call("scancel", user)
            self.call("scancel", "--full", "--signal=KILL", user)
            wait_until(lambda: not self.call("squeue", "-h", "-o", "%i"), "the queue to be empty")

    def wait(self, job: str, *states: str, seconds: float = 60.0) -> str:
        """Waits until the job is in one of `states`; it must not end in another."""
        ends = ("done", "failed", "cancelled")
        return wait_until(lambda: self._reached(job, states, ends), f"job {job} to be {states}", seconds)

    def _reached(self, job: str, states: tuple[str, ...], ends: tuple[str, ...]) -> str:
        now = slurm_client.state(job)
        if now in states:
            return now
        assert now not in ends, f"job {job} is {now}: {self.call('scontrol', 'show', 'job', '-o', job)}"
        return ""


def wait_until(look: Callable[[], Any], what: str, seconds: float = 60.0, every: float = 0.1) -> Any:
    """The first true value of `look()`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(every)
    return found
