"""keel doctor: is this machine, or this allocation, fit to train?"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.commands.common import add_command, add_overrides

if TYPE_CHECKING:
    from cluster.launch.base import Backend
    from cluster.launch.cluster_config import ClusterConfig
    from cluster.launch.spec import JobSpec
    from datamodules.store import Store

_POLL_S = 1.0


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "doctor",
        doctor,
        help="check machines, network and store before training",
        description=(
            "Measures what training will depend on: versions and settings equal on all nodes, accelerators, speed of each\n"
            "rank, all-reduce and all-to-all, the links between nodes, reading and writing the store at URL, conditional\n"
            "PUT, clocks, shared memory, limits. Names the node that is slow or odd.\n"
            "Without --on it runs here: in processes of this machine, or, started by torchrun or srun with WORLD_SIZE set,\n"
            "as one rank. With --on it is a job on that cluster (on Kubernetes through kubectl); KEY=VALUE changes the job,\n"
            "as for `keel submit`.\n"
            "exit code, for a prolog: 0 all is well, 1 problems were found, 2 it could not be checked, or your error."
        ),
        example="keel doctor\nkeel doctor s3://bucket/doctor --processes 8\n"
        "keel doctor s3://bucket/doctor --on configs/clusters/slurm.yaml nodes=8",
    )
    parser.add_argument(
        "url", metavar="URL", nargs="?", help="a prefix in the store to be checked (default: this machine's disk)"
    )
    parser.add_argument("--on", metavar="FILE", help="as a job on this cluster: a YAML file, path or any fsspec URL")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="without --on: so many (default: accelerators, or 2)"
    )
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    parser.add_argument("--mib", type=int, default=16, metavar="N", help="object that each node writes and reads (16)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for one collective, about (2)")
    parser.add_argument(
        "--timeout", type=float, default=900.0, metavar="S", help="with --on: wait so long for it (900)"
    )
    parser.add_argument("--json", action="store_true", help="all that was measured and found, as JSON")
    add_overrides(parser, "the job, with --on")


def doctor(args: argparse.Namespace) -> int:
    from cluster.doctor.worker import examine
    from datamodules.store import Store
    from trainer.config import absolute_url

    _check(args)
    if args.on:
        url = f"{absolute_url(args.url).rstrip('/')}/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        return _show(_submitted(args, url), args.json)
    if "WORLD_SIZE" in os.environ:  # this is one rank of an allocation
        report = examine(absolute_url(args.url), args.accelerator, args.mib, args.seconds)
        # Rank 0 speaks for all: a launcher ends the others as soon as one fails.
        code = _show(report, args.json) if os.environ.get("RANK") == "0" else 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # as `cluster.doctor.worker`: the tear-down races with gloo's threads
    folder = None if args.url else tempfile.mkdtemp(prefix="keel-doctor-")
    try:
        return _show(_here(args, Store(absolute_url(args.url or str(folder)))), args.json)
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _check(args: argparse.Namespace) -> None:
    if args.url and "=" in args.url.partition("/")[0]:  # an override, with no URL before it
        args.url, args.overrides = None, [args.url, *args.overrides]
    if args.overrides and not args.on:
        raise ValueError(f"{args.overrides[0]} has no effect without --on; drop it")
    if args.processes is not None and (args.on or args.processes < 1):
        raise ValueError(f"--processes {args.processes}: must be at least 1; with --on, set processes=")
    if not args.url and (args.on or "WORLD_SIZE" in os.environ):
        raise ValueError("URL is required here: a prefix in a store that all nodes reach")
    if args.mib < 1 or not args.seconds > 0:
        raise ValueError(f"--mib {args.mib}, --seconds {args.seconds:g}: must be positive")


def _here(args: argparse.Namespace, store: Store) -> Mapping[str, Any]:
    """The report of processes of this machine."""
    from cluster.doctor import REPORT
    from cluster.launch import Job, launch

    processes = args.processes
    if processes is None:
        import torch

        processes = (torch.cuda.device_count() if args.accelerator != "cpu" else 0) or 2
    store.delete(REPORT)  # of an earlier time
    code = launch(Job(_words(args, store.url), processes=processes))
    if code:
        raise ValueError(f"it could not be checked: the processes ended with exit code {code}")
    return dict(store.read_json(REPORT))


def _words(args: argparse.Namespace, url: str) -> tuple[str, ...]:
    options = ("--accelerator", args.accelerator, "--mib", str(args.mib), "--seconds", f"{args.seconds:g}")
    return ("cluster.doctor.worker", url, *options)


def _submitted(args: argparse.Namespace, url: str) -> Mapping[str, Any]:
    """The report of a job."""
    from cluster.commands.submit import split
    from cluster.launch.base import open_backend
    from cluster.launch.cluster_config import load
    from cluster.launch.code import code_spec, ship
    from cluster.launch.spec import passed

    on_run, on_cluster, own = split(args.overrides, args.on)
    wrong = [*on_run, *(f"{key}={value}" for key, value in own.items() if key != "image")]
    if wrong:
        raise ValueError(f"{wrong[0]} has no effect on keel doctor; drop it")
    cluster = load(args.on, on_cluster)
    if cluster.backend == "kubernetes":
        cluster.options.apply = True  # it waits for the report, which nobody would write
    code, data = code_spec(cluster, url)
    spec = _spec(args, url, cluster, code, own.get("image", cluster.image))
    backend = open_backend(cluster)
    passed(spec, os.environ)
    backend.check(spec)
    ship(code, data)
    job = backend.submit(spec)
    print(f"job {job} on {cluster.backend}: {spec.nodes} x {spec.processes} processes, report {url}", file=sys.stderr)
    try:
        return _awaited(backend, job, url, args.timeout)
    except BaseException:
        backend.cancel(job)
        raise


def _spec(args: argparse.Namespace, url: str, cluster: ClusterConfig, code: Any, image: str) -> JobSpec:
    from cluster.launch.cluster_config import environment, seconds
    from cluster.launch.spec import JobSpec

    job = cluster.job
    return JobSpec(
        name="keel-doctor",
        command=_words(args, url),
        run_url=url,
        nodes=job.nodes or 1,
        processes=job.processes or job.accelerators or 1,
        accelerators=job.accelerators,
        cpus=job.cpus,
        memory_gib=job.memory_gib,
        time_limit_s=seconds(job.time),
        env=environment(cluster),
        pass_env=tuple(cluster.pass_env),
        image=image,
        code=code,
        requeue=False,
    )


def _awaited(backend: Backend, job: str, url: str, timeout: float) -> Mapping[str, Any]:
    from cluster.doctor import REPORT
    from datamodules.store import NotFound, Store

    store, deadline = Store(url), time.monotonic() + timeout
    while True:
        state = backend.state(job)  # asked before the look: a report written at the very end is found
        try:
            return dict(store.read_json(REPORT))
        except NotFound:
            pass
        if state not in ("queued", "running"):
            raise ValueError(f"it could not be checked: job {job} is {state}; {_cause(store, backend, job)}")
        if time.monotonic() > deadline:
            raise ValueError(
                f"it could not be checked: job {job} is {state} after {timeout:g} s; --timeout waits longer"
            )
        time.sleep(_POLL_S)


def _cause(store: Store, backend: Backend, job: str) -> str:
    from cluster.watch.seen import look

    for node, said in sorted(look(store).nodes.items()):
        if said.content.get("reason") and said.content.get("exit_code"):
            return f"node {node} ({said.content.get('host')}): {said.content['reason']}"
    last = next(reversed([line for line in backend.logs(job, 0) if line.strip()]), "")
    return last.removeprefix("keel: error: ") or "its nodes left no word"


def _show(report: Mapping[str, Any], as_json: bool) -> int:
    from cluster.doctor.findings import judge

    findings = judge(report)
    bad = any(finding.problems for finding in findings)
    out: Callable[..., None] = _json if as_json else _table
    out(report, findings)
    return int(bad)


def _json(report: Mapping[str, Any], findings: Sequence[Any]) -> None:
    checks = [
        {"check": f.name, "found": f.found, "verdict": f.verdict, "problems": f.problems, "notes": f.notes}
        for f in findings
    ]
    print(json.dumps({**report, "checks": checks}, indent=1))


def _table(report: Mapping[str, Any], findings: Sequence[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from cluster.watch.show import console

    out = console()
    ranks, local = len(report["ranks"]), report["processes_per_node"]
    hosts = list(dict.fromkeys(rank["host"] for rank in report["ranks"]))
    names = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    out.print(f"{ranks // local} x {local} processes on {names}, {report['accelerator']}, {report['seconds']:.0f} s")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        table.add_row(Text(finding.verdict, style=colours[finding.verdict]), finding.name, Text(finding.found))
    out.print(table)
    for finding in findings:
        for line in finding.problems:
            out.print(f"problem  {line}", style="red")
        for line in finding.notes:
            out.print(f"note     {line}", style="yellow")
