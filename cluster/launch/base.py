"""What a backend is: it renders a job, submits it, and tells how it fares."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cluster.launch import BACKENDS
from cluster.launch.spec import JobSpec

if TYPE_CHECKING:
    from cluster.launch.cluster_config import ClusterConfig

STATES = ("queued", "running", "done", "failed", "cancelled", "unknown")


class Backend(Protocol):
    """Where jobs run. One file per backend; `BACKENDS` of `cluster.launch` names its class.

    Attributes:
        Config: the dataclass of the backend's section in a cluster's config (see `cluster_config`); the loaded section is
            `cluster.options`.
    """

    Config: ClassVar[type]

    def __init__(self, cluster: ClusterConfig) -> None: ...

    def render(self, spec: JobSpec) -> str:
        """Exactly what would be submitted, as text. Pure: asks nobody, writes nothing, holds no secret.

        Raises:
            ValueError: the backend has no such job (elastic, array, no image ...).
        """
        ...

    def check(self, spec: JobSpec) -> None:
        """Asks the cluster whether it would take the job, before anything is queued.

        Raises:
            ValueError, OSError: it would not (unknown partition, too many nodes) or cannot be reached; one clear line.
        """
        ...

    def submit(self, spec: JobSpec) -> str:
        """Queues a job that `check` has let pass, and returns its id, as the cluster's own tools know it.

        Raises:
            ValueError, OSError: it was refused; one clear line.
        """
        ...

    def state(self, job_id: str) -> str:
        """One of `STATES`; a job that the cluster no longer knows is `unknown`. Here and below the id may be that of one
        task of an array: JOB_TASK."""
        ...

    def owns(self, job_id: str, run_url: str) -> bool:
        """Whether the job of this id is that of the run at `run_url` (of an array, with its `{index}`): some clusters give
        a number to another job later, and every cluster of a kind has its own."""
        ...

    def cancel(self, job_id: str) -> None:
        """Tells the job to save and end, for good. A job that has ended is left alone."""
        ...

    def logs(self, job_id: str, node: int) -> Iterator[str]:
        """The lines that node `node` of the job printed so far (without newline); none if there is nothing yet."""
        ...


def backend_class(name: str) -> Any:
    """The class of a backend.

    Raises:
        ValueError: unknown, or one that needs a package that is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name}: unknown; one of {', '.join(sorted(BACKENDS))}")
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def open_backend(cluster: ClusterConfig) -> Backend:
    """The backend that a cluster's config names."""
    backend: Backend = backend_class(cluster.backend)(cluster)
    return backend
