"""keel data: make, check and show data sets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.commands.common import add_command, add_overrides, print_table, size


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "data",
        None,
        help="make, check and show data sets",
        description="Works with data sets: sharded Zarr v3 groups with a manifest, in any object store.",
        example="keel data show runs/data/navier_stokes_2d",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser = add_command(
        commands,
        "make",
        make,
        help="generate a data set",
        description=(
            "Runs the generator that CONFIG names and writes its shards to the config's `url`. Interrupted, it goes on\n"
            "where it stopped: finished shards are kept."
        ),
        example="keel data make configs/data/navier_stokes_2d.yaml url=s3://bucket/data/ns --workers 8",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a data set: a path or any fsspec URL")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that compute shards (default: the config's)"
    )
    add_overrides(parser)
    parser = add_command(
        commands,
        "check",
        check,
        help="compare a data set with its manifest",
        description=(
            "Reads every object of the data set at URL and compares sizes and checksums with its manifest.\n"
            "exit code: 0 whole, 1 something is missing, truncated or corrupt (each is named), 2 no data set."
        ),
        example="keel data check runs/data/navier_stokes_2d\nkeel data check s3://bucket/data/ns --shallow",
    )
    parser.add_argument("url", metavar="URL", help="the data set: a local path or any fsspec URL")
    parser.add_argument("--shallow", action="store_true", help="existence and sizes only: nothing is read in full")
    parser = add_command(
        commands,
        "show",
        show,
        help="print what a data set holds",
        description="Prints the arrays, splits and attributes of the data set at URL, and its fingerprint.",
        example="keel data show runs/data/navier_stokes_2d",
    )
    parser.add_argument("url", metavar="URL", help="the data set: a local path or any fsspec URL")


def make(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from datamodules.make import load
    from datamodules.make import make as make_data

    config = load(args.config, args.overrides)
    if args.workers is not None:
        config = replace(config, workers=args.workers)
    with progress_bar(str(config.generator.get("name", "data"))) as advance:
        url = make_data(config, advance)
    print(url)
    return 0


def check(args: argparse.Namespace) -> int:
    from datamodules.format import Dataset, verify

    dataset = Dataset.open(args.url)
    problems = verify(args.url, deep=not args.shallow)
    for problem in problems:
        print(problem)
    total = sum(info.size for info in dataset.objects.values())
    verdict = f"{len(problems)} problems" if problems else "whole"
    print(f"{dataset.url}: {verdict} ({len(dataset.objects)} objects, {size(total)})")
    return 1 if problems else 0


def show(args: argparse.Namespace) -> int:
    from datamodules.format import Dataset

    dataset = Dataset.open(args.url)
    print(f"{dataset.url}\nfingerprint {dataset.fingerprint}\n")
    rows = []
    for name, array in described(dataset.describe()["arrays"]):
        shape = ", ".join(f"{d}={n}" for d, n in zip(array["dimensions"], array["shape"], strict=True))
        rows.append([name, array["dtype"], shape, str(array["shards"]), " x ".join(map(str, array["chunk_shape"]))])
    print_table(["array", "type", "shape", "shards", "chunk"], rows)
    splits = [[name, str(start), str(stop), str(stop - start)] for name, (start, stop) in dataset.splits.items()]
    print_table(["split", "start", "stop", "length"], splits)
    shown = {key: value for key, value in dataset.attributes.items() if key not in ("splits", "array")}
    print_table(["attribute", "value"], [[key, str(value)] for key, value in sorted(shown.items())])
    return 0


def described(arrays: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arrays, largest first."""
    return sorted(arrays.items(), key=lambda item: (-_elements(item[1]["shape"]), item[0]))


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callable (done, total) that moves a bar on stderr; the bar appears with its first call."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(label, total=None)

    def advance(done: int, total: int) -> None:
        bar.start()  # does nothing once it is going
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def _elements(shape: list[int]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product
