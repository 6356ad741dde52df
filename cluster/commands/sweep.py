"""keel sweep: many runs from one config, each done once."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from cluster.commands.common import add_command, add_overrides, number, print_table

if TYPE_CHECKING:
    from cluster.sweep.config import SweepConfig
    from cluster.sweep.status import Status
    from cluster.sweep.table import Table

_SHOWN = 20


def register(commands: Any) -> None:
    family = commands.add_parser(
        "sweep",
        help="many runs from one config: ladders, grids, random search",
        description="Many runs from one config. Each is done once, whoever does it: see `keel sweep run --help`.",
    )
    nested = family.add_subparsers(title="commands", metavar="COMMAND", required=True)
    overrides = "the sweep's config: url=... cap.runs=100 settings.train.max_steps=50 grid.optim.lr=[0.1,0.2]"

    parser = add_command(
        nested,
        "plan",
        plan,
        help="what a sweep would run, and what that costs",
        description=(
            "Expands the sweep that CONFIG describes and prints its runs, their parameters and FLOPs, what is done already,\n"
            "and the hours and the price of the rest: measured on the runs that are done, else from a device's peak.\n"
            "Writes nothing, reads no data.\n"
            "exit code: 0 within the cap, 2 above it, or your error."
        ),
        example="keel sweep plan configs/sweeps/demo_lm.yaml\nkeel sweep plan configs/sweeps/demo_lm.yaml cap.hours=1 --json",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a sweep: a path or any fsspec URL")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    add_overrides(parser, overrides)

    parser = add_command(
        nested,
        "run",
        run,
        help="do what is missing of a sweep, and only that",
        description=(
            "Does the rows of the sweep that CONFIG describes which have no result yet. Run it again after a kill, with rows\n"
            "added, or beside itself on another machine: no row is repeated and none is lost, for all state lies at the\n"
            "sweep's URL. A diverged run is a result. A failed one was tried `retries` times, from its own checkpoint.\n"
            "exit code: 0 done, 1 some rows failed, 2 your error, 75 told to end after a save (run it again)."
        ),
        example=(
            "keel sweep run configs/sweeps/demo_lm.yaml\n"
            "keel sweep run configs/sweeps/demo_lm.yaml --on configs/clusters/slurm.yaml --workers 8 url=s3://bucket/sweep"
        ),
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a sweep: a path or any fsspec URL")
    parser.add_argument("--on", metavar="FILE", help="on this cluster, as an array of drivers, not in this terminal")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="cores, or processes, or with --on drivers (0: what there is)",
    )
    parser.add_argument("--executor", default="", metavar="NAME", help="in place of the config's own")
    parser.add_argument("--retry", action="store_true", help="do failed rows again, too")
    parser.add_argument("--dry-run", action="store_true", help="with --on: only print exactly what would be submitted")
    parser.add_argument("--detach", action="store_true", help="with --on: on this machine, return at once")
    add_overrides(parser, overrides)

    parser = add_command(
        nested,
        "status",
        status,
        help="how a sweep stands",
        description=(
            "Counts the rows that are done, diverged, pruned, failed, running and missing, and names the optima that are at\n"
            "the edge of what was tried. Writes nothing; cheap for thousands of rows."
        ),
        example="keel sweep status configs/sweeps/demo_lm.yaml\nkeel sweep status s3://bucket/sweep --json",
    )
    parser.add_argument("source", metavar="CONFIG|URL", help="the sweep's YAML file, or where it lies")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    add_overrides(parser, overrides)


def plan(args: argparse.Namespace) -> int:
    from cluster.sweep.config import load
    from cluster.sweep.cost import Rates, cap_of, refuse_above
    from cluster.sweep.expand import expand
    from cluster.sweep.status import status as look

    table = expand(load(args.config, args.overrides))
    found = look(table)
    cap, machine = cap_of(table.sweep)
    rates = Rates(found.results, machine)
    parts = {
        "done": rates.of([row for row in table.rows if row.id in found.results]),
        "left": rates.of([row for row in table.rows if row.id not in found.results]),
    }
    parts["all"] = parts["done"] + parts["left"]
    if args.json:
        rows = [
            {
                "row": row.id,
                "axes": dict(row.axes),
                "status": found.rows[row.id],
                "parameters": row.parameters,
                "samples": row.samples,
                "flops": row.flops,
                "hours": rates.seconds(row) / 3600,
                "url": table.run_url(row),
            }
            for row in table.rows
        ]
        print(
            json.dumps({"cost": {k: vars(v) for k, v in parts.items()}, "source": rates.source, "rows": rows}, indent=1)
        )
    else:
        _show_plan(table, found, rates)
        print_table(
            ["", "runs", "FLOPs", "device-hours", "price"],
            [(name, part.runs, part.flops, part.hours, part.price or None) for name, part in parts.items()],
        )
        print(f"hours: {rates.source}")
    refuse_above(cap, parts["all"], table.rows)
    return 0


def _show_plan(table: Table, found: Status, rates: Any) -> None:
    axes = list(dict.fromkeys(name for row in table.rows for name in row.axes))
    rows = [
        (
            row.id[:8],
            *(
                row.axes.get(name) if isinstance(row.axes.get(name), int | float) else str(row.axes.get(name, ""))
                for name in axes
            ),
            row.parameters,
            row.samples,
            row.flops,
            rates.seconds(row) / 3600,
            found.rows[row.id],
        )
        for row in table.rows[:_SHOWN]
    ]
    print_table(["row", *axes, "parameters", "samples", "FLOPs", "hours", "status"], rows, f"{table.name}: {table.url}")
    if len(table.rows) > _SHOWN:
        print(f"and {len(table.rows) - _SHOWN:,} rows more; --json lists all\n")


def run(args: argparse.Namespace) -> int:
    from cluster.sweep.config import load
    from cluster.sweep.cost import Rates, cap_of, refuse_above
    from cluster.sweep.drive import drive
    from cluster.sweep.expand import expand
    from cluster.sweep.status import status as look

    if not args.on and (args.dry_run or args.detach):
        raise ValueError("--dry-run and --detach need --on, which says where the rows would run")
    config = load(args.config, args.overrides)
    table = expand(config)
    cap, machine = cap_of(table.sweep)
    executor = args.executor or config.executor
    refuse_above(cap, Rates(look(table).results, machine).of(table.rows), table.rows)
    if args.on and args.dry_run:
        return _run_on(args, table, executor)
    while True:
        table = _extended(config, table)
        code = _run_on(args, table, executor) if args.on else drive(table, executor, args.workers, retry=args.retry)
        if (
            code
            or not config.grows
            or look(table).counts["missing"]
            or len(_extended(config, table).rows) == len(table.rows)
        ):
            return code or _ended(table)


def _extended(config: SweepConfig, table: Table) -> Table:
    """The table with what the sweep has added to itself, and adds now that all its rows are done; saved."""
    from cluster.sweep.adaptive import Adaptive, kept
    from cluster.sweep.results import is_sweep
    from cluster.sweep.status import status as look
    from cluster.sweep.table import read_table
    from datamodules.store import Store

    store = Store(table.url)
    if config.grows:
        if is_sweep(store):
            table = table.with_rows(kept(table, read_table(store)))
        table.save(store)
        adaptive = Adaptive(config)
        table = table.with_rows(adaptive.additions(table, look(table).results))
        for note in adaptive.notes:
            print(note, flush=True)
    table.save(store)
    return table


def _run_on(args: argparse.Namespace, table: Table, executor: str) -> int:
    from cluster.launch.cluster_config import load as load_cluster
    from cluster.sweep.jobs import Cluster
    from cluster.sweep.status import status as look

    cluster = Cluster(table, load_cluster(args.on), executor, args.workers, retry=args.retry)
    again = ("missing", "failed") if args.retry else ("missing",)
    states = look(table).rows
    made = cluster.plan([row for row in table.rows if states[row.id] in again])
    if args.dry_run:
        print("\n".join(made.rendered))
        return 0
    ids, code = cluster.submit(made, foreground=not args.detach)
    if ids:
        print(f"jobs {', '.join(ids)} on {cluster.cluster.backend}; watch them with: keel sweep status {table.url}")
    return code


def _ended(table: Table) -> int:
    """Says how the sweep stands; 1 where rows failed."""
    from cluster.sweep.status import status as look

    found = look(table)
    _summary(found)
    return 1 if found.counts["failed"] else 0


def status(args: argparse.Namespace) -> int:
    from cluster.sweep.status import status as look

    found = look(_table(args))
    if args.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        _summary(found)
    return 0


def _table(args: argparse.Namespace) -> Table:
    """The present table of the sweep at a URL, or of a config; that which the config would give where there is none."""
    from cluster.sweep.config import load
    from cluster.sweep.expand import expand
    from cluster.sweep.results import is_sweep
    from cluster.sweep.table import read_table
    from datamodules.store import Store
    from trainer.config import absolute_url

    if not args.source.endswith((".yaml", ".yml")):
        return read_table(Store(absolute_url(args.source)))
    config = load(args.source, args.overrides)
    return read_table(Store(config.url)) if is_sweep(Store(config.url)) else expand(config)


def _summary(found: Status) -> None:
    table = found.table
    print(f"{table.name}: {table.url}")
    print(
        ", ".join(f"{count:,} {'done' if state == 'ok' else state}" for state, count in found.counts.items() if count)
    )
    if found.best is not None:
        axes = ", ".join(f"{name}={number(value)}" for name, value in found.best["axes"].items())
        print(f"best {table.sweep['objective']}: {found.best['loss']:.6g} ({axes})")
    for edge in found.edges[:_SHOWN]:
        print(f"at the edge: {edge.label}")
    if len(found.edges) > _SHOWN:
        print(f"and {len(found.edges) - _SHOWN:,} more optima at an edge; --json lists all")
    failed = [result for result in found.results.values() if result["status"] == "failed"]
    for result in failed[:_SHOWN]:
        print(f"failed: {result['row']} ({table.by_id[result['row']].label}): {result['error']}")
