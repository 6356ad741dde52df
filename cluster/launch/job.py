"""What the store knows of the job that runs a run: `job.json` below the run's URL."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from cluster.launch import cluster_config
from cluster.launch.base import Backend, open_backend
from cluster.launch.cluster_config import ClusterConfig
from cluster.launch.spec import INDEX, JobSpec, from_dict, to_dict
from datamodules.store import NotFound, Store

FILE = "job.json"


@dataclass(frozen=True)
class JobFile:
    """The last submission of a run.

    Attributes:
        backend, job_id: where it was queued, and its id there.
        index: the task of the array that this run is; None when there is no array.
        spec, cluster: what was submitted.
        submitted: seconds since the epoch.
    """

    backend: str
    job_id: str
    index: int | None
    spec: JobSpec
    cluster: ClusterConfig
    submitted: float

    @property
    def task_id(self) -> str:
        """The id of this run alone: JOB_TASK, where it is a task of an array."""
        return self.job_id if self.index is None else f"{self.job_id}_{self.index}"

    def open(self) -> Backend:
        """The backend that the job was submitted to."""
        return open_backend(self.cluster)

    def state(self) -> str:
        """As the backend tells it (`base.STATES`); unknown where the id is now that of somebody else's job."""
        backend = self.open()
        return backend.state(self.task_id) if backend.owns(self.task_id, self.spec.run_url) else "unknown"

    def cancel(self) -> None:
        """Raises ValueError where the id is now that of somebody else's job; that is left alone."""
        backend = self.open()
        if not backend.owns(self.task_id, self.spec.run_url):
            raise ValueError(
                f"job {self.task_id}, as {self.backend} knows it here, is not of this run; it is left alone"
            )
        backend.cancel(self.task_id)


def write_job(spec: JobSpec, cluster: ClusterConfig, job_id: str) -> None:
    """Writes `job.json` at the run's URL, or at those of all tasks of an array."""
    content: dict[str, Any] = {
        "backend": cluster.backend,
        "job_id": job_id,
        "spec": to_dict(spec),
        "cluster": cluster_config.to_dict(cluster),
        "submitted": time.time(),
    }
    for index, url in enumerate(spec.run_urls):
        Store(url).write_json(FILE, content | {"index": index if spec.array else None})


def read_job(store: Store) -> JobFile | None:
    """The last submission of the run in `store`; None when it was never submitted (but trained by `keel train`).

    Raises:
        StoreError, ConfigError: it cannot be read, or needs another version.
    """
    try:
        raw = store.read_json(FILE)
    except NotFound:
        return None
    return JobFile(
        backend=raw["backend"],
        job_id=raw["job_id"],
        index=raw.get("index"),
        spec=from_dict(raw["spec"]),
        cluster=cluster_config.load(raw["cluster"]),
        submitted=raw["submitted"],
    )


def task_spec(job: JobFile) -> JobSpec:
    """The spec of this run alone: that of its task, when it is one of an array."""
    if job.index is None:
        return job.spec

    def mine(text: str) -> str:
        return text.replace(INDEX, str(job.index))

    return dataclasses.replace(
        job.spec,
        array=0,
        run_url=mine(job.spec.run_url),
        command=tuple(mine(word) for word in job.spec.command),
        env={name: mine(value) for name, value in job.spec.env.items()},
    )
