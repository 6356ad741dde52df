"""Jobs on this machine, in the foreground or detached: the same nodes as on a cluster, started by a supervisor.

A job has a folder, `<folder>/<job id>/`: what was submitted, the supervisor's process id, the nodes' output, the outcome.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cluster.launch import available_cores, cluster_config
from cluster.launch.cluster_config import ClusterConfig
from cluster.launch.entry import ARRAY_INDEX, NODE, RENDEZVOUS, node_command, node_environment
from cluster.launch.spec import JobSpec, to_dict

JOB, PID, OUTCOME, CANCEL, STARTED = "job.json", "pid.json", "outcome.json", "cancel", "started"
_DEVICES, _THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass
class LocalConfig:
    """`folder`: where jobs are kept (default: keel/jobs in the user's folder for state). `parallel`: tasks of an array that
    run at once. `detach`: return as soon as the job is started; it goes on when you log out."""

    folder: str = ""
    parallel: int = 1
    detach: bool = False

    def __post_init__(self) -> None:
        if self.parallel < 1:
            raise ValueError(f"parallel={self.parallel}: must be at least 1")

    @property
    def path(self) -> Path:
        """The folder of all jobs."""
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return Path(self.folder or f"{state}/keel/jobs").expanduser().resolve()


class Local:
    """Jobs on this machine."""

    Config: ClassVar[type] = LocalConfig

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.options: LocalConfig = cluster.options

    def command(self, spec: JobSpec) -> list[str]:
        """One node's command line."""
        return node_command(spec, self.cluster, python=sys.executable, time_limit_s=spec.time_limit_s)

    def environment(
        self, spec: JobSpec, node: int, port: int | str, task: int | str | None, place: int = 0
    ) -> dict[str, str]:
        """What one node finds in its environment, beside this process's own. `place`: of the tasks that run at once, 0 to
        `parallel` - 1."""
        env = node_environment(spec)
        if spec.code.how == "image":  # what is installed here is what runs here
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
        env[NODE] = str(node)
        if spec.nodes > 1:
            env[RENDEZVOUS] = f"127.0.0.1:{port}"
        if task is not None:
            env[ARRAY_INDEX] = str(task)
        if spec.cpus and _THREADS not in spec.env and not os.environ.get(_THREADS):
            env[_THREADS] = str(max(1, spec.cpus // spec.processes))
        if spec.accelerators:
            env[_DEVICES] = self._devices(spec, place * spec.nodes + node)
        return env

    def _devices(self, spec: JobSpec, node: int) -> str:
        """The accelerators of the `node`-th node that runs at once, out of those that are to be used here."""
        first, last = node * spec.accelerators, (node + 1) * spec.accelerators
        given = spec.env.get(_DEVICES) or os.environ.get(_DEVICES)
        return ",".join(given.split(",")[first:last] if given else map(str, range(first, last)))

    def _at_once(self, spec: JobSpec) -> int:
        """Nodes that run at once."""
        return spec.nodes * max(1, min(spec.array, self.options.parallel))

    def render(self, spec: JobSpec) -> str:
        """The shell lines that start the job's nodes."""
        if spec.max_nodes > spec.nodes:
            raise ValueError(f"max_nodes={spec.max_nodes}: one machine is not elastic; set nodes=")
        lines = [f"# job {spec.name} on this machine: {spec.nodes} x {spec.processes} processes"]
        lines += [f"# after {', '.join(spec.after)}"] if spec.after else []
        lines += [*self.cluster.setup]
        task = None
        if spec.array:
            lines.append(f"# tasks TASK=0 to {spec.array - 1}, {self.options.parallel} at once")
            task = "$TASK"
        for node in range(spec.nodes):
            env = self.environment(spec, node, self.cluster.rendezvous.port or "$FREE_PORT", task)
            if _DEVICES in env and self._at_once(spec) > spec.nodes:
                env[_DEVICES] = "$DEVICES"  # of whatever task has ended
            words = [f"{name}={_quoted(value)}" for name, value in env.items()]
            words += [shlex.quote(word) for word in self.command(spec)]
            lines.append(" ".join(words) + (" &" if node < spec.nodes - 1 else ""))
        return "\n".join(lines) + "\n"

    def check(self, spec: JobSpec) -> None:
        """Whether this machine has what the job wants."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        nodes = self._at_once(spec)
        if spec.cpus > (cores := available_cores()):
            raise ValueError(f"cpus={spec.cpus}: this machine has {cores}")
        if spec.memory_gib * nodes > memory:
            raise ValueError(f"memory_gib={spec.memory_gib:g}: this machine has {memory:.1f} GiB")
        if spec.accelerators:
            import torch

            if (have := torch.cuda.device_count()) < spec.accelerators * nodes:
                many = f" for each of {nodes} nodes at once" if nodes > 1 else ""
                raise ValueError(f"accelerators={spec.accelerators}{many}: this machine has {have}")
        if spec.image:
            raise ValueError(f"image={spec.image} has no effect with backend=local; drop it")
        for job in spec.after:
            if self.state(job) == "unknown":
                raise ValueError(f"after={job}: there is no such job on this machine")

    def submit(self, spec: JobSpec) -> str:
        """Starts the job's supervisor, which outlives this process."""
        job_id = self.prepare(spec)
        folder = self.folder(job_id)
        with open(folder / "supervisor.log", "wb") as log:
            subprocess.Popen(
                [sys.executable, "-P", "-m", "cluster.launch.supervisor", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))},
            )
        deadline = time.monotonic() + 60
        while not (folder / PID).exists() and not (folder / OUTCOME).exists():
            if time.monotonic() > deadline:
                raise ValueError(f"the supervisor of {job_id} did not start; see {folder}/supervisor.log")
            time.sleep(0.05)
        return job_id

    def prepare(self, spec: JobSpec) -> str:
        """Writes down a new job and returns its id."""
        job_id = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        folder = self.options.path / job_id
        folder.mkdir(parents=True, mode=0o700)
        content = {"spec": to_dict(spec), "cluster": cluster_config.to_dict(self.cluster)}
        (folder / JOB).write_text(json.dumps(content, indent=1))
        return job_id

    def run(self, job_id: str) -> int:
        """Runs a prepared job in this process, to its end; returns its exit code."""
        from cluster.launch.supervisor import supervise

        return supervise(self.folder(job_id), foreground=True)

    def folder(self, job_id: str) -> Path:
        """The folder of a job (which may not be there)."""
        if "/" in job_id or job_id.startswith("."):
            raise ValueError(f"{job_id!r} is no job of this machine")
        return self.options.path / job_id

    def state(self, job_id: str) -> str:
        """See `Backend.state`. A job of another machine is unknown here."""
        job_id, task = _task(job_id)
        folder = self.folder(job_id)
        if not (folder / JOB).exists():
            return "unknown"
        for name in (of_task(OUTCOME, task), OUTCOME):
            if (folder / name).exists():
                return str(json.loads((folder / name).read_text())["state"])
        if not (folder / PID).exists():
            return "queued"
        if not alive(**json.loads((folder / PID).read_text())):
            return "failed"  # its supervisor was killed
        return "running" if (folder / of_task(STARTED, task)).exists() else "queued"

    def owns(self, job_id: str, run_url: str) -> bool:
        return True  # an id is used once

    def cancel(self, job_id: str) -> None:
        """SIGTERM to the supervisor: the nodes save and end, and nothing is started again. One task of an array: the
        supervisor finds its mark, and does so with the nodes of this task."""
        job_id, task = _task(job_id)
        folder = self.folder(job_id)
        if self.state(job_id) not in ("queued", "running"):
            return
        if task is not None:
            (folder / f"{CANCEL}-{task}").touch()
            return
        (folder / CANCEL).touch()
        if (folder / PID).exists():
            os.kill(json.loads((folder / PID).read_text())["pid"], signal.SIGTERM)

    def logs(self, job_id: str, node: int) -> Iterator[str]:
        """What the node printed, of all tasks in turn."""
        job_id, task = _task(job_id)
        name = "*" if task is None else f"{task:05d}"
        for log in sorted(self.folder(job_id).glob(f"task-{name}-node-{node}.log")):
            with log.open(errors="replace") as lines:
                yield from (line.rstrip("\n") for line in lines)


def _task(job_id: str) -> tuple[str, int | None]:
    """(job, task) of JOB_TASK; None for a whole job."""
    job, _, task = job_id.rpartition("_")
    return (job, int(task)) if job and task.isdigit() else (job_id, None)


def of_task(name: str, task: int | None) -> str:
    """What one task of an array has in place of the job's file `name`."""
    return name if task is None else f"task-{task:05d}-{name}"


def alive(pid: int, ticks: int) -> bool:
    """Whether the process that had this id, and started at this time, still runs."""
    return started_at(pid) == ticks


def started_at(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def outcome(folder: Path, state: str, code: int, reason: str, task: int | None = None) -> None:
    """Writes how a job, or a task of one, ended."""
    name = of_task(OUTCOME, task)
    part = folder / f"{name}.part"
    part.write_text(json.dumps({"state": state, "code": code, "reason": reason, "time": time.time()}))
    part.rename(folder / name)


def _quoted(value: str) -> str:
    return f'"{value}"' if "$" in value else shlex.quote(value)
