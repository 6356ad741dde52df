"""keel data: make, check and show data sets; the other commands are in `data_move`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.commands import data_move
from cluster.commands.common import add_command, add_overrides, add_store, number, print_table, size, store_options

LONGEST = 200  # characters of an attribute that are shown


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "data",
        None,
        help="make, import, check, show and copy data sets",
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
    add_store(parser)
    parser = add_command(
        commands,
        "show",
        show,
        help="print what a data set holds",
        description=(
            "Prints arrays with shapes, types and sizes, channels with units and statistics, parameters, splits and attributes\n"
            "of the data set at URL, and its fingerprint. --png draws one trajectory: series of a system without space, an\n"
            "x-t image in one dimension, frames in two, frames of the middle plane in three. Of text it draws how often tokens occur and\n"
            "the first of them, and --png aside the beginning is printed."
        ),
        example=(
            "keel data show runs/data/navier_stokes_2d\n"
            "keel data show s3://bucket/data/ns --png sample.png --trajectory 3"
        ),
    )
    parser.add_argument("url", metavar="URL", help="the data set: a local path or any fsspec URL")
    parser.add_argument("--png", metavar="FILE", help="also draw a trajectory to this file")
    parser.add_argument("--trajectory", type=int, default=0, metavar="N", help="the trajectory drawn (default: 0)")
    add_store(parser)
    data_move.register(commands)


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
    from datamodules.store import Store

    store = Store(args.url, **store_options(args.store))
    dataset = Dataset.open(store)
    problems = verify(store, deep=not args.shallow)
    for problem in problems:
        print(problem)
    total = sum(info.size for info in dataset.objects.values())
    verdict = f"{len(problems)} problems" if problems else "whole"
    print(f"{dataset.url}: {verdict} ({len(dataset.objects)} objects, {size(total)})")
    return 1 if problems else 0


def show(args: argparse.Namespace) -> int:
    from datamodules.format import Dataset
    from datamodules.store import Store

    dataset = Dataset.open(Store(args.url, **store_options(args.store)))
    attributes = dataset.attributes
    total = sum(info.size for info in dataset.objects.values())
    print(f"{dataset.url}\nfingerprint {dataset.fingerprint}\n{len(dataset.objects)} objects, {size(total)}\n")
    rows = []
    for name, array in described(dataset.describe()["arrays"]):
        shape = ", ".join(f"{d}={n}" for d, n in zip(array["dimensions"], array["shape"], strict=True))
        chunk = " x ".join(map(str, array["chunk_shape"])) + (
            "" if array["level"] is None else f" zstd {array['level']}"
        )
        rows.append([name, array["dtype"], shape, size(array["bytes"]), str(array["shards"]), chunk])
    print_table(["array", "type", "shape", "size", "shards", "chunk"], rows)
    print_channels(attributes)
    splits = [[name, str(start), str(stop), str(stop - start)] for name, (start, stop) in dataset.splits.items()]
    print_table(["split", "start", "stop", "length"], splits)
    shown = {
        key: value for key, value in attributes.items() if key not in ("splits", "array", "channels", "statistics")
    }
    print_table(["attribute", "value"], [[key, _text(value)] for key, value in sorted(shown.items())])
    if dataset.kind == "text":
        print_beginning(dataset)
    if args.png:
        from cluster.report.sample import draw_sample

        picture = draw_sample(dataset, args.trajectory)
        with open(args.png, "wb") as file:
            file.write(picture)
        print(args.png)
    return 0


def print_channels(attributes: dict[str, Any]) -> None:
    """Channels with units and statistics, and parameters; nothing for data without them."""
    units, found = attributes.get("units") or {}, attributes.get("statistics", {})
    rows = []
    for c, name in enumerate(attributes.get("channels", [])):
        figures = [number(found[key][c]) if key in found else "-" for key in ("mean", "std", "min", "max")]
        rows.append([str(name), str(units.get(name, "-")), *figures])
    if rows:
        print_table(["channel", "unit", "mean", "std", "min", "max"], rows)
    parameters = attributes.get("parameters") or {}
    if parameters:
        print_table(["parameter", "value"], [[str(key), _text(value)] for key, value in sorted(parameters.items())])


def print_beginning(dataset: Any) -> None:
    """The first tokens of a text as text; nothing if the data set names no tokenizer that is there."""
    from datamodules.format import DataError
    from datamodules.tokenizer import tokenizer_of

    try:
        tokenizer = tokenizer_of(dataset.attributes)
    except DataError:
        return
    text = tokenizer.decode(dataset.main.read((), 0, min(LONGEST, dataset.main.shape[0])).tolist())
    print(f"it begins: {' '.join(text.split())[:LONGEST]}")


def _text(value: Any) -> str:
    """A value in one line, cut where it is long."""
    if isinstance(value, bool | int | float):
        return number(value)
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text):,} characters)"


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
