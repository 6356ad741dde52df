"""A cluster: which backend, how its nodes are set up, and what a job there gets when nobody says otherwise.

backend: slurm
slurm: {partition: gpu}      # the section of the backend: its class's `Config`
job: {processes: 8, accelerators: 8, time: 4h}
code: {how: snapshot}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.launch import BACKENDS
from cluster.launch.base import backend_class
from cluster.launch.spec import HOW, is_secret

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_CLOCK = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


@dataclass
class JobDefaults:
    """What a job gets unless the command line or the run's config says otherwise. `time`: see `seconds`; "" is the
    backend's default. `nodes` and `processes` of 0 leave it to `resources` of the run's config."""

    nodes: int = 0
    max_nodes: int = 0
    processes: int = 0
    accelerators: int = 0
    cpus: int = 0
    memory_gib: float = 0.0
    time: str = ""
    retries: int = 3
    requeue: bool = True

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name != "time" and value < 0:
                raise ValueError(f"{f.name}={value}: must be at least 0")
        seconds(self.time)


@dataclass
class CodeConfig:
    """How the code reaches the nodes: `snapshot` packs the working tree into the store, below `where` (default: `code/`
    beside the run), `path` is a folder that every node sees, `image` means that it is installed there."""

    how: str = "snapshot"
    where: str = ""

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise ValueError(f"how={self.how}: must be one of {', '.join(HOW)}")
        if self.how == "path" and not self.where:
            raise ValueError("how=path needs where=, a folder that every node sees")
        if self.how == "image" and self.where:
            raise ValueError(f"where={self.where} has no effect with how=image; drop it")


@dataclass
class StoreConfig:
    """How nodes reach an object store, as the AWS variables that they get. Credentials come by `pass_env`, a profile or
    the node's own role."""

    endpoint_url: str = ""
    region: str = ""
    profile: str = ""

    def environment(self) -> dict[str, str]:
        """The variables of the workers."""
        names = {"AWS_ENDPOINT_URL": self.endpoint_url, "AWS_REGION": self.region, "AWS_PROFILE": self.profile}
        return {name: value for name, value in names.items() if value}


@dataclass
class RendezvousConfig:
    """How nodes find each other: the first one listens on `port` (0: the backend picks one per job). A node waits
    `join_timeout_s` for the others, at the start and after a failure; one that is silent for `lost_s` is lost."""

    port: int = 0
    join_timeout_s: float = 600.0
    lost_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port}: must be 0 to 65535")
        for name in ("join_timeout_s", "lost_s"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclass
class ClusterConfig:
    """One cluster, as `--on FILE` names it.

    Attributes:
        backend: one of `BACKENDS`.
        python: interpreter on the nodes; "" is the backend's default (`python`; here, this one).
        setup: shell lines that run before it, such as `source /opt/venv/bin/activate`, where the backend has a shell.
        env, pass_env, image: as in `JobSpec`.
        heartbeat_s: how often a node and a run tell the store that they live.
        grace_s: how long workers may take to save after a signal.
        options: the backend's own section, as its `Config`.
    """

    backend: str
    python: str = ""
    setup: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    pass_env: list[str] = field(default_factory=list)
    image: str = ""
    heartbeat_s: float = 10.0
    grace_s: float = 300.0
    job: JobDefaults = field(default_factory=JobDefaults)
    code: CodeConfig = field(default_factory=CodeConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    rendezvous: RendezvousConfig = field(default_factory=RendezvousConfig)
    options: Any = None


@dataclass
class _Plain:
    """The keys of a cluster that are no sections."""

    backend: str = "???"
    python: str = ""
    setup: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    pass_env: list[str] = field(default_factory=list)
    image: str = ""
    heartbeat_s: float = 10.0
    grace_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("heartbeat_s", "grace_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in self.env:
            if is_secret(name):
                raise ValueError(
                    f"env.{name}: a secret does not belong in a file; name it in pass_env, and its value is taken from "
                    "your environment"
                )


_SECTIONS = {"job": JobDefaults, "code": CodeConfig, "store": StoreConfig, "rendezvous": RendezvousConfig}


def load(source: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> ClusterConfig:
    """Loads a cluster's config from a YAML file (local path or any fsspec URL) or a mapping, with `a.b=value` overrides.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, missing value, or a backend that is not there.
    """
    from trainer.config import ConfigError, merge, read_yaml, structure

    raw = merge(read_yaml(source) if isinstance(source, str) else source, overrides)
    name = raw.get("backend")
    if not isinstance(name, str):
        raise ConfigError(f"backend is required: one of {', '.join(sorted(BACKENDS))}")
    try:
        schema: type = backend_class(name).Config
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for other in BACKENDS.keys() & raw.keys():
        if other != name:
            raise ConfigError(f"section {other} has no effect with backend={name}; drop it, or set backend={other}")
    sections: dict[str, tuple[str, type]] = {key: (key, type_) for key, type_ in _SECTIONS.items()}
    sections[name] = ("options", schema)
    values: dict[str, Any] = {}
    for key, (attribute, type_) in sections.items():
        given = {} if raw.get(key) is None else raw[key]
        if not isinstance(given, Mapping):
            raise ConfigError(f"{key}={given!r}: expected a section (mapping), got {type(given).__name__}")
        values[attribute] = structure(type_, given, key)
    plain = structure(_Plain, {key: value for key, value in raw.items() if key not in sections})
    return ClusterConfig(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}, **values)


def to_dict(cluster: ClusterConfig) -> dict[str, Any]:
    """The config as plain containers that `load` reads back to an equal config. It holds no secret: none may be in it."""
    raw = dataclasses.asdict(cluster)
    raw[cluster.backend] = raw.pop("options")
    return raw


def seconds(text: str) -> float | None:
    """A time limit in seconds: `90s`, `30m`, `4h`, `2d`, `1h30m`, `4:00:00`, `30:00` (minutes) or `1-12:00:00`; None for "".

    Raises:
        ValueError: anything else.
    """
    text = text.strip().lower()
    if not text:
        return None
    if clock := _CLOCK.fullmatch(text):
        days, hours, minutes, rest = (int(part or 0) for part in clock.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"time={text}: must be like 90s, 30m, 4h, 1h30m, 4:00:00 or 1-12:00:00")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def environment(cluster: ClusterConfig) -> dict[str, str]:
    """What every worker finds in its environment, secrets excepted."""
    return {**cluster.store.environment(), **cluster.env}
