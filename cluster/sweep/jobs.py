"""A sweep on a cluster, through the same interface as every job: drivers as the tasks of an array, which share the rows by
their claims, and a job of its own for each row that needs several machines."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.launch.base import Backend, open_backend
from cluster.launch.cluster_config import ClusterConfig, environment, seconds
from cluster.launch.code import code_spec, ship
from cluster.launch.job import read_job, write_job
from cluster.launch.local_backend import Local
from cluster.launch.spec import INDEX, JobSpec, passed
from cluster.sweep.sweep import Sweep
from cluster.sweep.table import Row, Table
from datamodules.store import Store, join_url

MOST_TASKS = 16


@dataclass
class Submission:
    """What would be, or was, submitted.

    Attributes:
        drivers: the array of drivers; None where no row fits one machine.
        large: row and job of those that need several machines.
        rendered: exactly what the backend gets, one text per job.
    """

    drivers: JobSpec | None
    large: list[tuple[Row, JobSpec]] = field(default_factory=list)
    rendered: list[str] = field(default_factory=list)


class Cluster:
    """A sweep's jobs on one cluster.

    Args:
        table: the sweep's.
        cluster: where.
        executor: of the drivers. workers: how many drivers at most (0: one per row, at most 16).
        retry: failed rows are done again, too.
    """

    def __init__(
        self, table: Table, cluster: ClusterConfig, executor: str, workers: int = 0, *, retry: bool = False
    ) -> None:
        self.table, self.cluster, self.executor, self.workers, self.retry = table, cluster, executor, workers, retry
        self.backend: Backend = open_backend(cluster)
        self._code, self._archive = code_spec(cluster, join_url(table.url, "workers/w"))

    def plan(self, rows: Sequence[Row]) -> Submission:
        """The jobs that would do `rows`. Asks nobody.

        Raises:
            ValueError: the backend has no such job.
        """
        small = [row for row in rows if row.nodes == 1]
        made = Submission(self._array(small) if small else None)
        made.large = [(row, self._job(row)) for row in rows if row.nodes > 1]
        specs = ([made.drivers] if made.drivers else []) + [spec for _, spec in made.large]
        made.rendered = [self.backend.render(spec) for spec in specs]
        return made

    def submit(self, made: Submission, *, foreground: bool = True) -> tuple[list[str], int]:
        """Queues the jobs; (their ids, exit code). On this machine, in the foreground, they have ended when it returns.

        Raises:
            ValueError, OSError: refused; nothing was queued that is not in the list of the message.
        """
        specs = ([made.drivers] if made.drivers else []) + [spec for _, spec in made.large]
        for spec in specs:
            passed(spec, os.environ)
            self.backend.check(spec)
        ship(self._code, self._archive)
        ids, code = [], 0
        here = self.backend if isinstance(self.backend, Local) and foreground else None
        if made.large:
            ids += self._submit_large(made.large)
        if made.drivers is not None:
            ids.append(here.prepare(made.drivers) if here else self.backend.submit(made.drivers))
            write_job(made.drivers, self.cluster, ids[-1])
            code = here.run(ids[-1]) if here else 0
        return ids, code

    # ------------------------------------------------------------------------------------------------------- internals
    def _submit_large(self, rows: Sequence[tuple[Row, JobSpec]]) -> list[str]:
        ids = []
        with Sweep(self.table) as sweep:
            for row, spec in rows:
                if not sweep.claim([row]):
                    continue
                job = read_job(Store(spec.run_url))
                if job is not None and job.state() in ("queued", "running"):
                    continue  # of an earlier driver
                sweep.begin(row)
                ids.append(self.backend.submit(spec))
                write_job(spec, self.cluster, ids[-1])
        return ids

    def _array(self, rows: Sequence[Row]) -> JobSpec:
        job, cpus = self.cluster.job, max(row.cpus for row in rows)
        tasks = min(len(rows), self.workers or MOST_TASKS)
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        command: tuple[str, ...] = ("cluster.sweep.drive", self.table.url, "--executor", self.executor)
        command += ("--retry",) if self.retry else ()
        return self._spec(
            name=self.table.name,
            command=(*command, "--workers", str(max(job.cpus, cpus))),
            run_url=join_url(self.table.url, "workers", f"{name}-{INDEX}"),
            nodes=1,
            processes=1,
            cpus=max(job.cpus, cpus),
            array=tasks,
        )

    def _job(self, row: Row) -> JobSpec:
        url = self.table.run_url(row)
        return self._spec(
            name=f"{self.table.name}-{row.id}",
            command=("trainer", "fit", url),
            run_url=url,
            nodes=row.nodes,
            processes=row.processes,
            cpus=max(self.cluster.job.cpus, row.cpus),
            array=0,
        )

    def _spec(
        self, *, name: str, command: tuple[str, ...], run_url: str, nodes: int, processes: int, cpus: int, array: int
    ) -> JobSpec:
        from cluster.commands.submit import job_name

        job = self.cluster.job
        return JobSpec(
            name=job_name(name),
            command=command,
            run_url=run_url,
            nodes=nodes,
            processes=processes,
            accelerators=job.accelerators,
            cpus=cpus,
            memory_gib=job.memory_gib,
            time_limit_s=seconds(job.time),
            env=environment(self.cluster),
            pass_env=tuple(self.cluster.pass_env),
            image=self.cluster.image,
            code=self._code,
            retries=job.retries,
            requeue=job.requeue,
            array=array,
        )
