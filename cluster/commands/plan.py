"""keel plan, keel score: the next run with the prediction that it is held to, and how such predictions came out."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.commands.common import add_command, add_overrides, add_url, number, open_run, print_table
from cluster.commands.fit import add_source_options, columns_of, options, read

if TYPE_CHECKING:
    from cluster.laws.records import Runs

CALIBRATION = ".keel/calibration"
PREDICTION = "prediction.json"


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "plan",
        plan,
        help="choose the next run for a budget, and predict it",
        description=(
            "Fits the runs at SOURCE and chooses parameters, data, batch and learning rate for a budget, with intervals,\n"
            "the price of choosing otherwise, time and cost. With --config, or when the records hold configs, writes a\n"
            "runnable OUT/run.yaml; always OUT/prediction.json, which is never overwritten and which `keel score` reads."
        ),
        example=(
            "keel plan runs/sweep --budget 1e17 --out runs/plans/next\n"
            "keel plan table.csv --budget 1e21 --device h100 --gpus 64 --price 2.5 --config configs/runs/demo_lm.yaml"
        ),
    )
    parser.add_argument("source", metavar="SOURCE", help="records or a table: a path or any fsspec URL")
    parser.add_argument("--budget", type=float, required=True, metavar="FLOPS", help="FLOPs to spend on training")
    add_source_options(parser)
    parser.add_argument("--config", metavar="YAML", help="config to scale (default: that of the largest run)")
    parser.add_argument(
        "--out", metavar="URL", help="where run.yaml and prediction.json go (default: .keel/plans/BUDGET)"
    )
    parser.add_argument("--serve", type=float, default=0.0, metavar="D", help="tokens or samples to serve once trained")
    parser.add_argument("--device", metavar="NAME", help="h100, h200, a100, ...: for time and cost")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many of them (default: 1)")
    parser.add_argument("--mfu", type=float, default=0.4, metavar="F", help="part of their peak reached (default: 0.4)")
    parser.add_argument("--price", type=float, metavar="P", help="of one device for one hour")
    parser.add_argument("--batch", type=float, metavar="B", help="samples per step (default: from the records)")
    parser.add_argument("--lr", type=float, metavar="LR", help="learning rate (default: from the records)")
    parser.add_argument("--lr-horizon", type=float, metavar="P", help="rate ~ data^P (default: -0.32)")
    parser.add_argument("--lr-batch", type=float, metavar="P", help="rate ~ batch^P (default: 0.5)")
    parser.add_argument("--batch-data", type=float, metavar="P", help="batch ~ data^P (default: 0.47)")
    add_log(parser)
    add_overrides(parser)

    parser = add_command(
        commands,
        "score",
        score,
        help="compare a finished run with its prediction",
        description=(
            "Compares the run at URL with the prediction that `keel plan` registered for it, and adds the outcome to the\n"
            "calibration log, whose coverage `keel plan` shows.\n"
            "exit code: 0 inside the interval, 1 outside, 2 your error."
        ),
        example="keel score runs/plans/next/run",
    )
    add_url(parser)
    parser.add_argument("--prediction", metavar="FILE", help="default: prediction.json beside the run's folder")
    add_log(parser)


def add_log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log", default=CALIBRATION, metavar="URL", help=f"the calibration log (default: {CALIBRATION})"
    )


def plan(args: argparse.Namespace) -> int:
    import time

    from cluster.laws.analysis import analyse
    from cluster.laws.plan import Asked, configured, registration
    from cluster.laws.plan import plan as choose
    from cluster.laws.records import base_config, fingerprint, loss_column
    from cluster.laws.score import coverage
    from datamodules.store import Store
    from trainer.config import absolute_url, config_hash, read_yaml, to_yaml
    from trainer.environment import revision

    args.target = args.target or args.budget
    runs = read(args)
    made = analyse(runs, options(args))
    names = ("budget", "device", "gpus", "mfu", "price", "lr_horizon", "lr_batch", "batch_data", "batch", "lr")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    base = read_yaml(args.config) if args.config else base_config(args.source, args.where)
    asked = Asked(served=args.serve, law_in_config=_has_law(base, args), **given)
    store = Store(absolute_url(args.out or f".keel/plans/{args.budget:g}"))
    about: dict[str, Any] = {
        "time": time.time(),
        "code": revision(),
        "source": absolute_url(args.source),
        "source_hash": fingerprint(runs),
        "loss_column": loss_column(args.source, columns_of(args.column)),
    }
    written = None
    if base is not None:
        base = {**base, "url": store.join("run"), "name": store.url.rstrip("/").rpartition("/")[2]}
        more = [*([] if args.config else _depth(runs, base)), *args.overrides]
        made, chosen, config = configured(made, asked, base, more)
        about["config_hash"] = config_hash(config)
        written = to_yaml(config)
    elif args.overrides:
        raise ValueError("overrides need a config to change: give --config")
    else:
        chosen = choose(made, asked)
    refusal = (
        f"{store.join(PREDICTION)} is there already, and a registered prediction is not changed: choose another --out"
    )
    if store.exists(PREDICTION):
        raise ValueError(refusal)
    if written is not None:  # first: a prediction without its run could not be made good
        store.write("run.yaml", written.encode())
    if not store.create(PREDICTION, _json(registration(made, chosen, about))):
        raise ValueError(refusal)
    _show(chosen)
    for text in (*chosen.notes, *(f"warning: {warning}" for warning in made.warnings)):
        print(text)
    print(coverage(Store(absolute_url(args.log))).line())
    print(store.join(PREDICTION))
    if written is not None:
        print(f"start it with: keel train {store.join('run.yaml')}, then: keel score {store.join('run')}")
    return 0


def _depth(runs: Runs, base: Mapping[str, Any]) -> list[str]:
    """The depth of the planned run where all that were fitted have the same: a law over widths says nothing of others."""
    depths = set(runs["depth"]) if "depth" in runs else set()
    if len(depths) != 1 or not math.isfinite(depth := depths.pop()) or "depth" not in (base.get("model") or {}):
        return []
    return [f"model.depth={depth:.0f}"]


def _has_law(base: dict[str, Any] | None, args: argparse.Namespace) -> bool:
    """Whether the config to be scaled moves its rate by itself."""
    from trainer.config import merge

    section = merge(base or {}, args.overrides).get("parametrization") or {}
    found = "horizon" in str(section.get("name", "")).split("+")
    for name in ("lr_horizon", "lr_batch"):
        if found and getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect on a config whose parametrization.name={section['name']} has the "
                f"law; set parametrization.{name}"
            )
    return found


def _json(value: dict[str, Any]) -> bytes:
    import json

    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _show(chosen: Any) -> None:
    value, low, high = chosen.loss
    bands = chosen.intervals
    rows = [
        ("parameters", chosen.n, *bands["n"]),
        ("tokens or samples", chosen.d, *bands["d"]),
        ("FLOPs", chosen.flops, None, None),
        ("batch (samples)", chosen.batch, *bands.get("batch", (None, None))),
        ("learning rate", chosen.lr, *bands.get("lr", (None, None))),
        ("loss", value, low, high),
    ]
    print_table(["", "choice", "low", "high"], rows, f"budget {chosen.budget:.3g} FLOPs")
    print_table(["times the best size", "loss added"], list(chosen.regret.items()))
    if chosen.hours is not None:
        cost = "" if chosen.cost is None else f", cost {number(chosen.cost)}"
        print(f"{chosen.hours:.3g} hours, {chosen.gpu_hours:.4g} device-hours{cost}")


def score(args: argparse.Namespace) -> int:
    from cluster.laws.score import append, coverage
    from cluster.laws.score import score as compare
    from datamodules.store import NotFound, Store
    from trainer.config import absolute_url, config_hash, load
    from trainer.records import read_record

    run = open_run(args.url)
    try:
        record = read_record(run)
    except NotFound as error:
        raise ValueError(f"the run at {args.url} has no record yet: it is still going, or was killed") from error
    home, _, name = absolute_url(
        args.prediction or run.url.rstrip("/").rpartition("/")[0] + f"/{PREDICTION}"
    ).rpartition("/")
    try:
        prediction = Store(home).read_json(name)
    except NotFound as error:
        raise ValueError(f"no prediction at {home}/{name}: name it with --prediction") from error
    entry = compare(record, prediction, config_hash(load(run.join("config.yaml"))))
    log = Store(absolute_url(args.log))
    added = append(log, entry)
    band = entry["predicted"]
    print_table(
        ["", "loss", "low", "high"],
        [("predicted", band["value"], band["low"], band["high"]), ("actual", entry["actual"], None, None)],
        f"run {entry['run_id']}: {entry['status']}",
    )
    if entry["z"] is not None:
        print(f"z = {entry['z']:+.2f}, {'inside' if entry['inside'] else 'outside'} the 95% interval")
    for text in entry["notes"]:
        print(f"warning: {text}")
    if not added:
        print(f"that run was scored before: {log.url} is unchanged")
    print(coverage(log).line())
    return 0 if entry["inside"] else 1
