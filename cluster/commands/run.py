"""keel train, resume, evaluate, report: one run from its config to its page."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, cast

from cluster.commands.common import add_command, add_overrides, add_url, open_run, print_table

if TYPE_CHECKING:
    from trainer.schema import RunConfig
    from trainer.stored import Stored


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        train,
        help="start a run",
        description=(
            "Starts the run that CONFIG describes, at the config's `url`, on resources.processes_per_node workers.\n"
            "Refused when that URL already holds a run, unless that one failed before its first checkpoint. Inside torchrun (WORLD_SIZE is\n"
            "set) this process is the worker itself.\n"
            "exit code: 0 done (also when the run diverged: see its record), 2 your error, 69 the store is away,\n"
            "75 preempted after a save."
        ),
        example="keel train configs/runs/demo_fno.yaml url=runs/demo_fno train.max_steps=200",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a run: a path or any fsspec URL")
    add_overrides(parser)

    parser = add_command(
        commands,
        "resume",
        resume,
        help="continue a run from its last committed checkpoint",
        description=(
            "Continues the run at URL from its last committed checkpoint, in the exact order of its data, on any\n"
            "number of processes. Overrides are kept in the run's config.yaml."
        ),
        example=(
            "keel resume runs/demo_fno resources.processes_per_node=1\nkeel resume runs/demo_fno train.max_steps=400\n"
            "keel resume s3://bucket/fno --on configs/clusters/slurm.yaml nodes=2"
        ),
    )
    add_url(parser)
    parser.add_argument(
        "--on", metavar="FILE", help="as a job on this cluster (see `keel submit`), not in this terminal"
    )
    parser.add_argument("--dry-run", action="store_true", help="with --on: only print what would be submitted")
    parser.add_argument("--detach", action="store_true", help="with --on: on this machine, return at once")
    parser.add_argument("--apply", action="store_true", help="with --on: on Kubernetes, give the manifest to kubectl")
    add_overrides(parser, "the run's config")

    parser = add_command(
        commands,
        "evaluate",
        evaluate,
        help="evaluate a run's last checkpoint on held-out data",
        description=(
            "Evaluates the run's last committed checkpoint; prints the metrics and writes evaluation.json. With changes to\n"
            "data.* or task.*, such as another data set or a finer grid, or with --ema, the result is a file of its own beside it."
        ),
        example=(
            "keel evaluate runs/demo_fno --split test\n"
            "keel evaluate runs/demo_fno data.url=runs/data/ns_128 task.space=[128,128]\n"
            "keel evaluate runs/demo_fno --ema"
        ),
    )
    add_url(parser)
    parser.add_argument("--split", default="test", help="split of the data set (default: test)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N samples (default: all)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="samples at once (default: 8)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (default: the last whole one)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (of a run with train.ema_decay > 0)")
    add_overrides(parser, "the data and the task")

    parser = add_command(
        commands,
        "report",
        report,
        help="write one HTML page about a run",
        description=(
            "Writes URL/report.html: curves, diagnostics, fields, config, environment. The page is one file that needs\n"
            "no network. It works while the run is going, too. Prints where the page is."
        ),
        example="keel report runs/demo_fno\nkeel report s3://bucket/runs/fno --out fno.html",
    )
    add_url(parser)
    parser.add_argument("--out", metavar="FILE", help="also write the page to this local file")


def train(args: argparse.Namespace) -> int:
    from trainer.config import load
    from trainer.lifecycle import prepare_new

    _heed_signals()
    config = load(args.config, args.overrides)
    refuse_many_machines(config)
    if not _is_worker():
        prepare_new(config)
        clear(config.url)
        return start(config, resume=False)
    # torchrun has already started one process per rank, and this is one of them: all learn of what only one can do.
    from trainer.build import accelerator_name
    from trainer.distributed import init_process_group, on_rank_zero
    from trainer.restarts import count

    if count():  # by torchrun, after a failure: the run is there
        return start(config, resume=True)
    init_process_group(accelerator_name(config.resources.accelerator), config.strategy.timeout_seconds)
    on_rank_zero(lambda: prepare_new(config))
    on_rank_zero(lambda: clear(config.url))
    return start(config, resume=False)


def resume(args: argparse.Namespace) -> int:
    from trainer import stored
    from trainer.restarts import count

    if args.on:
        from cluster.commands.submit import resume_on

        return resume_on(args)
    if args.dry_run or args.detach or args.apply:
        raise ValueError("--dry-run, --detach and --apply need --on, which says where the job would run")
    _heed_signals()
    # To check the config once more takes as long as the worker, which does it, takes to start.
    config: Any = None if args.overrides or _is_worker() else stored.read(args.url)
    if config is None:
        from trainer.lifecycle import prepare_resume

        config = prepare_resume(args.url, args.overrides)
    refuse_many_machines(config)
    if not _is_worker() or (os.environ.get("RANK") == "0" and not count()):
        clear(config.url)
    return start(config, resume=True)


def evaluate(args: argparse.Namespace) -> int:
    from cluster.report.view import flatten
    from trainer.evaluation import evaluate as run_evaluation

    store = open_run(args.url)

    result = run_evaluation(
        store.url, args.overrides, split=args.split, limit=args.limit, batch=args.batch, step=args.step, ema=args.ema
    )
    scalars = {key: value for key, value in flatten(result["metrics"]).items() if "@" not in key}
    print(f"step {result['step']}, {result['samples']} samples of split {args.split}")
    print_table(["metric", args.split], list(scalars.items()))
    return 0


def report(args: argparse.Namespace) -> int:
    from cluster.report import PAGE
    from cluster.report import report as write_report

    store = open_run(args.url)
    local = write_report(store.url, out=args.out)
    for place in dict.fromkeys([store.local_path(PAGE) if store.is_local else store.join(PAGE), local]):
        print(place)
    return 0


def refuse_many_machines(config: RunConfig | Stored) -> None:
    """Raises ConfigError when one machine is not enough and nobody else has started the workers."""
    if config.resources.nodes > 1 and not _is_worker():
        from trainer.config import ConfigError

        raise ConfigError(
            f"resources.nodes={config.resources.nodes}: this command starts the processes of one machine; for more, "
            f"`keel submit --on` starts them on a cluster, torchrun by hand"
        )


def clear(url: str) -> None:
    """Removes what an earlier start of the run said of itself, and a request to end it."""
    from datamodules.store import Store

    Store(url).delete_tree("status")


def start(config: RunConfig | Stored, *, resume: bool) -> int:
    """Runs the workers of `config` to their end and says how the run ended; returns the job's exit code."""
    if _is_worker():
        from trainer.__main__ import exit_code
        from trainer.run import fit

        return exit_code(fit(cast("RunConfig", config), resume=resume))
    from cluster.launch import EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEUE, Job, launch
    from cluster.launch.budget import newest_commit
    from cluster.launch.node_watch import NodeWatch
    from datamodules.store import Store
    from trainer.status import period

    watch = NodeWatch(Store(config.url), 0, None, period(), together=False)
    resources = config.resources
    arguments = ("trainer", "fit", config.url, *(("--resume",) if resume else ()))
    job = Job(
        arguments,
        processes=resources.processes_per_node,
        threads=resources.threads,
        max_restarts=config.recovery.max_restarts,
        progress=lambda: newest_commit(config.url),
        observer=watch,
    )
    watch.open()
    code, reason = 1, "the launcher failed"
    try:
        code = launch(job)
        reason = watch.reason(code)
    except SystemExit as ended:  # by a signal while no worker ran
        code = int(str(ended.code))
        reason = watch.reason(code)
        raise
    finally:
        watch.close(code, reason)
    if code in (EXIT_OK, EXIT_REQUEUE, EXIT_INTERRUPTED):
        print(outcome(config.url), flush=True)
    return code


def outcome(url: str) -> str:
    """The end of a run in one line, from its record."""
    from datamodules.store import NotFound, Store
    from trainer.records import read_record

    try:
        record = read_record(Store(url))
    except NotFound:
        record = {}
    if "steps" not in record:
        return f"{url}: ended before its first step, continue with: keel resume {url}"
    parts = [f"{record['status']} after {record['steps']} steps"]
    if record["loss"] is not None:
        parts.append(f"loss {record['loss']:.4g}")
    speed = record.get("throughput") or {}
    if "mfu" in speed:
        parts.append(
            f"mfu {speed['mfu']:.1%} of {speed['peak_flop_per_s'] / 1e12:.4g} TFLOP/s ({speed['peak_source']})"
        )
    if record["status"] == "diverged":
        parts.append(f"diverged at step {record['diverged_step']}")
    if record["status"] in ("preempted", "interrupted", "cancelled"):
        parts.append(f"continue with: keel resume {url}")
    return f"{url}: {', '.join(parts)}"


def _heed_signals() -> None:
    """Signals that come before there is anything to be saved."""
    if _is_worker():
        from trainer import signals

        signals.leave_at_once()
    else:
        from cluster.launch import requeue_on_signal

        requeue_on_signal()


def _is_worker() -> bool:
    return "WORLD_SIZE" in os.environ
