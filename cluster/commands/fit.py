"""keel fit: scaling laws from records or any table."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.commands.common import add_command, number, print_table

if TYPE_CHECKING:
    from cluster.laws.analysis import Analysis
    from cluster.laws.records import Runs


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "fit",
        fit,
        help="fit scaling laws to runs",
        description=(
            "Fits laws to the runs at SOURCE: a sweep's or a run's records (any fsspec URL), or a .csv, .jsonl, .json or\n"
            ".parquet file with columns such as n (parameters), d (tokens or samples), c (FLOPs), loss, lr, width. Prints\n"
            "the laws with their intervals and all that there is to doubt; writes OUT/fit.json and OUT/fit.html.\n"
            "exit code: 0 done, 1 the self-test failed, 2 your error."
        ),
        example=(
            "keel fit runs/sweep\n"
            "keel fit table.csv --form chinchilla,tied,vpnls --target 1e22 --out runs/fits/table\n"
            "keel fit table.csv --column n=non_embedding_params --where schedule=cosine\n"
            "keel fit --selftest"
        ),
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="records or a table: a path or any fsspec URL")
    add_source_options(parser)
    parser.add_argument("--out", metavar="URL", help="where fit.json and fit.html go (default: .keel/fits/NAME)")
    parser.add_argument("--delta", type=float, default=1e-3, help="Huber's threshold in log loss (default: 1e-3)")
    parser.add_argument("--initial-loss", type=float, metavar="L", help="loss before training: above it a run diverged")
    parser.add_argument("--curves", action="store_true", help="rows are points of training curves: approach 1")
    parser.add_argument(
        "--critical-batch",
        action="store_true",
        help="rows are batch and steps to one loss; or |gradient|^2 of one step at two batch sizes (grad_sq_small, "
        "grad_sq_large, batch_small, batch_large)",
    )
    parser.add_argument("--last", type=float, default=0.25, metavar="F", help="part of each curve used (default: 0.25)")
    parser.add_argument("--selftest", action="store_true", help="fit laws with known answers, in under a minute")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """How runs are read and which laws are fitted; the same for `keel fit` and `keel plan`."""
    parser.add_argument("--form", metavar="A,B", help="laws, the primary one first (default: what the columns allow)")
    parser.add_argument(
        "--target", type=float, metavar="FLOPS", help="where to extrapolate to (default: 10x the largest)"
    )
    parser.add_argument("--column", action="append", default=[], metavar="A=B", help="column A is called B there")
    parser.add_argument("--where", action="append", default=[], metavar="A=B", help="only rows whose A is B")
    parser.add_argument("--convention", metavar="NAME", help="only rows that count FLOPs so")
    parser.add_argument(
        "--per-pair", type=float, metavar="K", help="FLOPs per parameter and sample (default: records, 6)"
    )
    parser.add_argument("--draws", type=int, default=1000, metavar="N", help="bootstrap refits (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")


def fit(args: argparse.Namespace) -> int:
    if args.selftest:
        return selftest()
    if args.source is None:
        raise ValueError("keel fit needs a SOURCE (records or a table), or --selftest")
    if args.curves:
        return approach_one(args)
    if args.critical_batch:
        return critical_batch(args)
    from cluster.laws.analysis import analyse
    from cluster.laws.summary import to_json
    from cluster.report.laws import render

    made = analyse(read(args), options(args, delta=args.delta, initial_loss=args.initial_loss))
    show(made)
    write(args, to_json(made), render(made, args.source))
    return 0


def read(args: argparse.Namespace) -> Runs:
    """The runs that the options name."""
    from cluster.laws.records import load

    return load(args.source, columns_of(args.column), args.where, args.convention)


def columns_of(words: Sequence[str]) -> dict[str, str]:
    """`--column A=B` options as a mapping. Raises ValueError for one of another form."""
    for word in words:
        if "=" not in word:
            raise ValueError(f"--column {word}: write it as --column NAME=NAME_IN_THE_SOURCE")
    return dict(word.split("=", 1) for word in words)


def options(args: argparse.Namespace, **more: Any) -> Any:
    """The analysis that the options ask for."""
    from cluster.laws.analysis import Options
    from cluster.laws.forms import FORMS

    forms = tuple(args.form.split(",")) if args.form else ()
    for form in forms:
        if form not in (*FORMS, "vpnls", "broken"):
            raise ValueError(f"--form {form}: choose from {', '.join((*FORMS, 'vpnls', 'broken'))}")
    for name, least in (("draws", 10), ("target", 0), ("per_pair", 0)):
        value = getattr(args, name)
        if value is not None and not least < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: must be greater than {least}")
    return Options(forms=forms, target=args.target, per_pair=args.per_pair, draws=args.draws, seed=args.seed, **more)


def show(made: Analysis) -> None:
    """The laws, their intervals, the optimum and the warnings, as tables."""
    from cluster.laws.summary import to_json

    summary = to_json(made)
    if made.fits:
        rows = [
            (
                name,
                ", ".join(f"{key}={number(value)}" for key, value in found.values.items()),
                found.objective,
                found.status,
                f"{found.reached:.0%} of {found.starts}",
            )
            for name, found in made.fits.items()
        ]
        print_table(["law", "parameters", "objective", "status", "starts at optimum"], rows, f"{len(made.points)} runs")
    bands = summary.get("intervals", {})
    rows_of = [
        (name, item["value"], item["se"], *item["interval"], kind)
        for kind, b in bands.items()
        for name, item in b.items()
    ]
    if rows_of:
        title = f"{made.primary.form if made.primary else ''}: 95% intervals"
        print_table(["parameter", "value", "se", "low", "high", "bootstrap over"], rows_of, title)
    methods: Mapping[str, Any] = summary.get("methods", {})
    if methods:
        rows_of = [
            (name, item["n"], *(item["interval"] or (None, None))) for name, item in methods["estimates"].items()
        ]
        rows_of.append(("union", None, *methods["union"]))
        print_table(["method", "best N", "low", "high"], rows_of, f"best N at C={made.target:.3g}")
    for axis, found in made.transfers.items():
        verdict = "transfers" if found.ok else "does not transfer: " + "; ".join(found.reasons)
        print(f"learning rate over {axis}: {verdict}")
    if made.influence is not None:
        name, shift = made.influence.most
        what = "ln N*" if made.best is not None else "the first exponent"
        print(f"most influential run: {name} ({what} changes by {shift:+.3g} without it)")
    for text in made.warnings:
        print(f"warning: {text}")


def write(args: argparse.Namespace, summary: dict[str, Any], page: str | None) -> None:
    """Writes the report and says where it is."""
    from datamodules.store import Store
    from trainer.config import absolute_url

    name = args.source.rstrip("/").rpartition("/")[2].rpartition(".")[0] or args.source.rstrip("/").rpartition("/")[2]
    store = Store(absolute_url(args.out or f".keel/fits/{name}"))
    store.write_json("fit.json", summary)
    print(store.join("fit.json"))
    if page is not None:
        store.write("fit.html", page.encode())
        print(store.join("fit.html"))


def approach_one(args: argparse.Namespace) -> int:
    """Approach 1 from training curves."""
    from cluster.laws.curves import read_curves
    from cluster.laws.envelope import envelope
    from cluster.laws.summary import plain

    found = envelope(read_curves(args.source, columns_of(args.column), args.where), last=args.last)
    rows = [
        (name, line.exponent, line.low, line.high, line.coefficient)
        for name, line in (("N", found.line_n), ("D", found.line_d))
    ]
    print_table(["best", "exponent of C", "low", "high", "coefficient"], rows, "approach 1")
    for text in found.warnings:
        print(f"warning: {text}")
    lines = {
        key: {"exponent": line.exponent, "interval": (line.low, line.high), "coefficient": line.coefficient}
        for key, line in (("n", found.line_n), ("d", found.line_d))
    }
    write(args, plain({"approach_1": lines, "last": args.last, "warnings": found.warnings}), None)
    return 0


def critical_batch(args: argparse.Namespace) -> int:
    """The critical batch size from steps to one loss at several batch sizes, or from the noise of gradients."""
    from cluster.laws.batch import from_steps
    from cluster.laws.records import read_points
    from cluster.laws.summary import plain

    runs = read_points(args.source, columns_of(args.column), args.where)
    if "grad_sq_small" in runs:
        return _noise_scale(args, runs)
    found = from_steps(runs["batch"], runs["steps"])
    rows = [("critical batch", found.critical, *found.interval), ("steps with a huge batch", found.steps, None, None)]
    print_table(["", "value", "low", "high"], rows, f"{len(runs)} batch sizes")
    for text in found.warnings:
        print(f"warning: {text}")
    figures = {"critical": found.critical, "interval": found.interval, "steps": found.steps, "samples": found.samples}
    write(args, plain({"critical_batch": figures, "warnings": found.warnings}), None)
    return 0


def _noise_scale(args: argparse.Namespace, runs: Runs) -> int:
    """The simple noise scale, which a critical batch is near to (arXiv:1812.06162)."""
    import numpy as np

    from cluster.laws.batch import from_gradients
    from cluster.laws.summary import plain

    sizes = [np.unique(runs[name]) for name in ("batch_small", "batch_large")]
    if any(len(size) != 1 for size in sizes):
        raise ValueError("the rows have several values of batch_small or batch_large: choose one of each with --where")
    batches = (float(sizes[0][0]), float(sizes[1][0]))
    value, interval = from_gradients(batches, runs["grad_sq_small"], runs["grad_sq_large"], args.draws, args.seed)
    title = f"{len(runs)} steps, gradients of {batches[0]:g} and of {batches[1]:g} samples"
    print_table(["", "value", "low", "high"], [("simple noise scale", value, *interval)], title)
    figures = {"noise_scale": value, "interval": interval, "batches": batches, "steps": len(runs)}
    write(args, plain({"critical_batch": figures, "warnings": runs.warnings}), None)
    return 0


def selftest() -> int:
    """Runs every check that needs no data, and prints what came out."""
    import time

    from cluster.laws.selftest import run

    started, rows, failed = time.monotonic(), [], 0
    for check in run():
        rows.append(
            ("ok" if check.ok else "FAILED", check.name, f"{check.value:.10g}", f"{check.low:.6g}", f"{check.high:.6g}")
        )
        failed += not check.ok
    print_table(["", "check", "value", "at least", "at most"], rows)
    print(f"{len(rows) - failed} of {len(rows)} checks passed in {time.monotonic() - started:.0f} s")
    return 1 if failed else 0
