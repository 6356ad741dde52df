"""A job as every backend understands it: what to run, on how much, and what happens when it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

INDEX = "{index}"  # in a command, a URL or a value: the number of an array's task
HOW = ("snapshot", "path", "image")

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SECRET = re.compile(r"SECRET|(^|_)TOKEN(_|$)|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE_KEY", re.IGNORECASE)


@dataclass(frozen=True)
class CodeSpec:
    """Where the nodes find the code.

    Attributes:
        how: `snapshot` (an archive of the working tree in the store), `path` (a folder that every node sees), or `image`
            (it is installed where the job runs).
        where: URL of the archive, or the folder; empty for an image.
        digest: SHA-256 of the archive, in hexadecimal; empty otherwise.
    """

    how: str = "image"
    where: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise ValueError(f"code.how={self.how}: must be one of {', '.join(HOW)}")
        if (self.how == "image") != (not self.where):
            raise ValueError(f"code.how={self.how}, code.where={self.where!r}: only an image needs no place")


@dataclass(frozen=True)
class JobSpec:
    """One job.

    Attributes:
        name: of the job: small letters, digits and hyphens, at most 63.
        command: after `python -m`, such as ("trainer", "fit", URL). `{index}` stands for the task of an array.
        run_url: the run that the job belongs to; status, logs and `job.json` go below it. May hold `{index}`.
        nodes, max_nodes: machines, and how many at most (0: as many as `nodes`; more needs an elastic backend).
        processes: workers per node.
        accelerators, cpus: per node; cpus=0 means one for each process.
        memory_gib: per node; 0 means the backend's default.
        time_limit_s: seconds until the job is told to save and end; None means the backend's default.
        env: variables for the workers. No secrets: it is printed and stored.
        pass_env: names of variables whose values come from the submitter's environment; a trailing `*` matches a prefix.
        image: container image, where the backend uses one.
        code: where the nodes find the code.
        retries: how often the workers are started again after a failure, inside the job.
        requeue: whether the job is queued again when it was preempted (exit code 75) or lost a node.
        after: ids of jobs that must end well before this one starts.
        array: number of tasks, told apart by KEEL_ARRAY_INDEX; 0 means no array.
    """

    name: str
    command: tuple[str, ...]
    run_url: str
    nodes: int = 1
    max_nodes: int = 0
    processes: int = 1
    accelerators: int = 0
    cpus: int = 0
    memory_gib: float = 0.0
    time_limit_s: float | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    pass_env: tuple[str, ...] = ()
    image: str = ""
    code: CodeSpec = field(default_factory=CodeSpec)
    retries: int = 0
    requeue: bool = True
    after: tuple[str, ...] = ()
    array: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name={self.name!r}: must be 1 to 63 small letters, digits and hyphens")
        if not self.command:
            raise ValueError("command=(): a job needs a command, such as ('trainer', 'fit', url)")
        for name in ("nodes", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("max_nodes", "accelerators", "cpus", "memory_gib", "retries", "array"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")
        if self.max_nodes and self.max_nodes < self.nodes:
            raise ValueError(f"max_nodes={self.max_nodes}: less than nodes={self.nodes}")
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            raise ValueError(f"time_limit_s={self.time_limit_s}: must be positive")
        if self.array and INDEX not in self.run_url:
            raise ValueError(f"array={self.array}: each task needs its own url, such as url={self.run_url}-{INDEX}")
        if not self.array and any(INDEX in word for word in (self.run_url, *self.command)):
            raise ValueError(f"{INDEX} in {self.run_url} has no meaning without array=N")
        for name in self.env:
            if is_secret(name):
                raise ValueError(
                    f"env.{name}: looks like a secret, and env is printed and stored; name it in pass_env instead"
                )

    @property
    def cpus_per_node(self) -> int:
        """CPUs of each node, resolved."""
        return self.cpus or self.processes

    @property
    def world_size(self) -> int:
        """Workers of the whole job (of the smallest one, when it is elastic)."""
        return self.nodes * self.processes

    @property
    def run_urls(self) -> list[str]:
        """The URL of the run, or those of all tasks of the array."""
        return [self.run_url.replace(INDEX, str(i)) for i in range(self.array)] if self.array else [self.run_url]


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is nobody's business."""
    return bool(_SECRET.search(name))


def local_path(url: str) -> str | None:
    """The path of a URL that is a folder of some machine; None for one in an object store."""
    scheme, _, path = url.rpartition("://")
    return path if scheme in ("", "file", "local") else None


def passed(spec: JobSpec, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that `spec.pass_env` names, secrets and all: never print or store the result.

    Raises:
        ValueError: a name without `*` that is not set.
    """
    found: dict[str, str] = {}
    for pattern in spec.pass_env:
        if pattern.endswith("*"):
            found |= {name: value for name, value in environment.items() if name.startswith(pattern[:-1])}
        elif pattern in environment:
            found[pattern] = environment[pattern]
        else:
            raise ValueError(f"pass_env: {pattern} is not set here; set it, or remove it from the cluster's config")
    return found


def to_dict(spec: JobSpec) -> dict[str, Any]:
    """The spec as JSON takes it."""
    return asdict(spec) | {name: list(getattr(spec, name)) for name in ("command", "pass_env", "after")}


def from_dict(raw: Mapping[str, Any]) -> JobSpec:
    """The spec that `to_dict` made; keys that this version does not know are left out."""
    known = {f.name for f in fields(JobSpec)}
    values = {name: value for name, value in raw.items() if name in known}
    for name in ("command", "pass_env", "after"):
        values[name] = tuple(values.get(name, ()))
    return JobSpec(**values | {"code": CodeSpec(**values.get("code", {}))})
