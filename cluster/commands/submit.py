"""keel submit: a run somewhere else than in this terminal; and keel resume --on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.commands.common import add_command, add_overrides
from cluster.commands.run import clear, outcome

if TYPE_CHECKING:
    from cluster.launch.base import Backend
    from cluster.launch.cluster_config import ClusterConfig
    from cluster.launch.spec import JobSpec
    from trainer.schema import RunConfig

# Settings of the job that a cluster's config does not have; those of its section `job` come on top.
_OWN_KEYS = ("array", "after", "image")


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "submit",
        submit,
        help="start a run on a cluster",
        description=(
            "Starts the run that CONFIG describes on the cluster that FILE describes: this machine, Slurm, Ray or\n"
            "Kubernetes. The job survives preemption and lost nodes as far as the cluster allows; everything about it lies\n"
            "at the run's URL.\n\n"
            "KEY=VALUE changes the run's config, or the job: nodes, max_nodes, processes (per node), accelerators, cpus,\n"
            "memory_gib, time, retries, requeue, image, after (ids of jobs), array (number of tasks, each with {index} in\n"
            "its settings), or FILE, such as slurm.partition or code.how.\n\n"
            "For Kubernetes the manifest is printed, for kubectl apply -f -, unless --apply gives it to kubectl at once."
        ),
        example=(
            "keel submit configs/runs/demo_fno.yaml --on configs/clusters/laptop.yaml url=runs/fno processes=2\n"
            "keel submit configs/runs/demo_fno.yaml --on configs/clusters/slurm.yaml data.url=s3://bucket/ns url=s3://bucket/fno nodes=8\n"
            "keel submit configs/runs/demo_fno.yaml --on configs/clusters/slurm.yaml time=4h array=4 url='s3://bucket/fno-{index}' seed='{index}'\n"
            "keel submit configs/runs/demo_fno.yaml --on configs/clusters/kubernetes.yaml image=IMAGE data.url=s3://bucket/ns url=s3://bucket/fno --apply"
        ),
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a run: a path or any fsspec URL")
    parser.add_argument("--on", metavar="FILE", required=True, help="YAML file of a cluster: a path or any fsspec URL")
    parser.add_argument("--dry-run", action="store_true", help="only print exactly what would be submitted")
    parser.add_argument("--detach", action="store_true", help="on this machine: return at once (clusters always do)")
    parser.add_argument("--apply", action="store_true", help="on Kubernetes: give the manifest to kubectl")
    add_overrides(parser, "the run's config or the job")


def submit(args: argparse.Namespace) -> int:
    from cluster.launch.spec import INDEX
    from trainer import config as configs

    on_run, on_cluster, own = split(args.overrides, args.on)
    cluster = load_cluster(args.on, on_cluster, apply=args.apply)
    raw = configs.read_yaml(args.config)
    array = _array(own)
    url = next((o.partition("=")[2] for o in reversed(on_run) if o.startswith("url=")), str(raw.get("url", "")))
    if array and INDEX not in url:
        raise configs.ConfigError(f"array={array}: each task needs its own url, such as url='{url}-{INDEX}'")
    if array and not any(INDEX in o for o in on_run if not o.startswith("url=")):
        raise configs.ConfigError(
            f"array={array}: all tasks are the same; give a setting {INDEX}, such as seed='{INDEX}'"
        )
    shape = _shape(cluster, raw, on_run)
    tasks = []
    indices: list[int | None] = list(range(array)) if array else [None]
    for index in indices:
        changes = [o if index is None else o.replace(INDEX, str(index)) for o in on_run]
        tasks.append(_checked(raw, changes, shape, cluster))
    url = configs.absolute_url(url) if array else tasks[0].url
    return _send(args, tasks, cluster, url, own, fresh=True)


def resume_on(args: argparse.Namespace) -> int:
    """`keel resume URL --on FILE`."""
    from cluster.watch.ask import ask
    from datamodules.store import Store
    from trainer import config as configs
    from trainer.lifecycle import resumed

    on_run, on_cluster, own = split(args.overrides, args.on)
    if "array" in own:
        raise configs.ConfigError("array has no effect on resume: each task is a run of its own with its own URL")
    cluster = load_cluster(args.on, on_cluster, apply=args.apply)
    store = Store(configs.absolute_url(args.url))
    _, verdict, job = ask(store)
    if job is not None and job["state"] in ("queued", "running"):
        raise ValueError(
            f"job {job['id']} of this run is {job['state']} on {job['backend']}; `keel cancel {args.url}` ends it"
        )
    if job is not None and job["state"] is None and not verdict.over and verdict.state != "queued":
        raise ValueError(
            f"the run is {verdict.state} as job {job['id']} on {job['backend']}, which cannot be asked from here "
            f"({job['error']}); `keel cancel {args.url}` ends it"
        )
    raw = configs.read_yaml(store.join("config.yaml")) if store.exists("config.yaml") else {}
    nodes, processes = _shape(cluster, raw, on_run)
    changes = [*on_run, f"resources.nodes={nodes}", f"resources.processes_per_node={processes}"]
    config = resumed(args.url, changes)
    return _send(
        args, [_checked(configs.to_dict(config), [], (nodes, processes), cluster)], cluster, store.url, own, False
    )


def load_cluster(on: str, overrides: Sequence[str], *, apply: bool) -> ClusterConfig:
    """The cluster's config; `apply`: on Kubernetes the manifest goes to kubectl."""
    from cluster.launch.cluster_config import load
    from trainer.config import ConfigError

    cluster = load(on, overrides)
    if apply:
        if cluster.backend != "kubernetes":
            raise ConfigError(f"--apply has no effect with backend={cluster.backend}; drop it")
        cluster.options.apply = True
    return cluster


def split(overrides: Sequence[str], on: str) -> tuple[list[str], list[str], dict[str, str]]:
    """Overrides of (the run's config, the cluster's config, the job alone)."""
    from cluster.launch import BACKENDS
    from cluster.launch.cluster_config import ClusterConfig, JobDefaults

    defaults = {f.name for f in dataclasses.fields(JobDefaults)}
    sections = {f.name for f in dataclasses.fields(ClusterConfig)} - {"backend", "options"} | BACKENDS.keys()
    run, cluster, own = [], [], {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in _OWN_KEYS:
            own[key] = value
        elif key in defaults:
            cluster.append(f"job.{override}")
        elif key.partition(".")[0] in sections:
            cluster.append(override)
        else:
            run.append(override)
    return run, cluster, own


def _array(own: Mapping[str, str]) -> int:
    from trainer.config import ConfigError

    text = own.get("array", "0")
    if not text.isdigit() or ("array" in own and int(text) < 1):
        raise ConfigError(f"array={text}: must be a number of tasks, at least 1")
    return int(text)


def _shape(cluster: ClusterConfig, raw: Mapping[str, Any], overrides: Sequence[str]) -> tuple[int, int]:
    """(nodes, processes per node): of the command line, else of the cluster, else of the run's config."""
    from trainer.config import merge

    def of(key: str, wanted: int) -> int:
        given = merge({}, [o for o in overrides if o.startswith(f"resources.{key}=")]).get("resources", {}).get(key)
        section = raw.get("resources")
        return given or wanted or (section.get(key) if isinstance(section, Mapping) else 0) or 1

    return of("nodes", cluster.job.nodes), of("processes_per_node", cluster.job.processes)


def _checked(
    raw: Mapping[str, Any], overrides: Sequence[str], shape: tuple[int, int], cluster: ClusterConfig
) -> RunConfig:
    """The run's config on the job's processes; refuses what could not start there, for each number of nodes."""
    from trainer.config import ConfigError, load

    nodes, processes = shape
    most = max(nodes, cluster.job.max_nodes)
    loaded = [
        load(raw, [*overrides, f"resources.nodes={n}", f"resources.processes_per_node={processes}"])
        for n in range(nodes, most + 1)
    ]
    config, accelerators = loaded[0], cluster.job.accelerators
    if config.resources.accelerator == "cuda" and accelerators < processes:
        raise ConfigError(
            f"accelerators={accelerators}: resources.accelerator=cuda needs one for each of {processes} processes"
        )
    if config.resources.accelerator == "cpu" and accelerators:
        raise ConfigError(f"accelerators={accelerators} has no effect with resources.accelerator=cpu; drop one of them")
    return config


def _send(
    args: argparse.Namespace,
    tasks: list[RunConfig],
    cluster: ClusterConfig,
    url: str,
    own: Mapping[str, str],
    fresh: bool,
) -> int:
    from cluster.launch.base import open_backend
    from cluster.launch.cluster_config import environment, seconds
    from cluster.launch.code import code_spec, ship
    from cluster.launch.job import write_job
    from cluster.launch.kubernetes import Kubernetes, name_of
    from cluster.launch.local_backend import Local
    from cluster.launch.spec import JobSpec, passed
    from datamodules.store import NotFound, Store
    from trainer.lifecycle import prepare_new, store_config

    config, job = tasks[0], cluster.job
    code, data = code_spec(cluster, url)
    spec = JobSpec(
        name=job_name(config.name),
        command=("trainer", "fit", url),
        run_url=url,
        nodes=config.resources.nodes,
        max_nodes=job.max_nodes,
        processes=config.resources.processes_per_node,
        accelerators=job.accelerators,
        cpus=job.cpus,
        memory_gib=job.memory_gib,
        time_limit_s=seconds(job.time),
        env=environment(cluster),
        pass_env=tuple(cluster.pass_env),
        image=own.get("image", cluster.image),
        code=code,
        retries=max(job.retries, config.recovery.max_restarts),
        requeue=job.requeue,
        after=tuple(filter(None, own.get("after", "").split(","))),
        array=_array(own),
    )
    backend = open_backend(cluster)
    _heed_places(backend, spec, tasks)
    rendered = backend.render(spec)
    if args.dry_run:
        print(rendered, end="" if rendered.endswith("\n") else "\n")
        return 0
    passed(spec, os.environ)
    by_hand = isinstance(backend, Kubernetes) and not backend.options.apply
    if not by_hand:
        backend.check(spec)
    foreground = isinstance(backend, Local) and not (args.detach or backend.options.detach)
    begun: list[Store] = []
    try:
        for task in tasks:
            if fresh:
                prepare_new(task)
                begun.append(Store(task.url))
            else:
                store_config(url, task)
            clear(task.url)
        ship(code, data)
        if by_hand:
            job_id = name_of(spec)
        else:
            job_id = backend.prepare(spec) if isinstance(backend, Local) and foreground else backend.submit(spec)
    except BaseException:
        for store in begun:  # so that the same command works once the mistake is mended
            store.delete("config.yaml")
        raise
    try:
        write_job(spec, cluster, job_id)
    except BaseException:
        if not by_hand and not foreground:  # nobody would find it
            _give_up(backend, job_id)
        raise
    if by_hand:
        print(rendered, end="")
        print(
            f"keel: job {job_id} is ready but not queued: give what is printed to kubectl apply -f -, or use --apply",
            file=sys.stderr,
        )
        return 0
    size = f"{spec.array} tasks of " if spec.array else ""
    print(f"job {job_id} on {cluster.backend}: {size}{spec.nodes} x {spec.processes} processes, run {url}", flush=True)
    if not (isinstance(backend, Local) and foreground):
        print(f"watch it with: keel status {spec.run_urls[0]}")
        return 0
    ended = backend.run(job_id)
    for task in tasks if ended in (0, 75, 130) else []:
        with contextlib.suppress(NotFound):
            print(outcome(task.url), flush=True)
    return ended


def _heed_places(backend: Backend, spec: JobSpec, tasks: Sequence[RunConfig]) -> None:
    """A folder of this machine is not one of the nodes: refused where that is known, told where it may be shared."""
    from cluster.launch.kubernetes import Kubernetes
    from cluster.launch.local_backend import Local
    from cluster.launch.spec import local_path

    places = {"url": spec.run_url, "data.url": tasks[0].data.url, "weights.url": tasks[0].weights.url}
    if isinstance(backend, Kubernetes):
        backend.refuse_unseen(places)
    elif not isinstance(backend, Local) and max(spec.nodes, spec.max_nodes) > 1:
        found = [f"{key}={url}" for key, url in places.items() if url and local_path(url)]
        if found:
            line = f"{', '.join(found)}: all nodes must see this folder under this path; an object store needs none"
            print(f"keel: warning: {line}", file=sys.stderr, flush=True)


def _give_up(backend: Backend, job_id: str) -> None:
    what = f"job {job_id} is cancelled, since"
    try:
        backend.cancel(job_id)
    except (ValueError, OSError) as error:
        what = f"job {job_id} goes on and must be cancelled by hand ({' '.join(str(error).split())});"
    print(f"keel: warning: {what} its run cannot be told of it", file=sys.stderr, flush=True)


def job_name(name: str) -> str:
    """A run's name as every backend takes it: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].rstrip("-") or "run"
