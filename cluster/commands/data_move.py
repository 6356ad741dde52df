"""keel data import, stats and copy: data of other layouts, figures over a split, and another place."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.commands.common import add_command, add_store, print_table, size, store_options

SPLITS = ("train", "validation", "test")


def register(commands: Any) -> None:
    _register_import(commands)
    parser = add_command(
        commands,
        "stats",
        stats,
        help="recompute statistics of a split",
        description=(
            "Reads a split of the data set at URL in blocks and prints mean, standard deviation, minimum and maximum of each\n"
            "channel, and how many values are not finite. For the train split the figures are compared with those stored.\n"
            "exit code: 0 done, 1 the stored figures differ."
        ),
        example="keel data stats runs/data/navier_stokes_2d\nkeel data stats runs/data/navier_stokes_2d --split test",
    )
    parser.add_argument("url", metavar="URL", help="the data set: a local path or any fsspec URL")
    parser.add_argument("--split", default="train", metavar="NAME", help="the split to read (default: train)")
    parser.add_argument("--array", metavar="NAME", help="the array to read (default: the main one)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-6, metavar="X", help="difference allowed, in standard deviations (1e-6)"
    )
    add_store(parser)
    parser = add_command(
        commands,
        "copy",
        copy,
        help="copy a data set to another store",
        description=(
            "Copies the data set at SRC to DST, several objects at a time. Each is compared with the manifest before it is\n"
            "written; the manifest goes last, so that DST is a data set only when it is whole. Interrupted, it goes on where\n"
            "it stopped. The copy has the same fingerprint: a run can go on from it."
        ),
        example="keel data copy runs/data/navier_stokes_2d s3://bucket/data/ns --threads 8",
    )
    parser.add_argument("source", metavar="SRC", help="the data set: a local path or any fsspec URL")
    parser.add_argument("target", metavar="DST", help="where it goes: an empty place on any store")
    parser.add_argument(
        "--threads", type=int, default=4, metavar="N", help="objects copied at a time, each held in memory (default: 4)"
    )
    add_store(parser, "both stores")
    parser.add_argument(
        "--target-store",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of DST alone, which has those of --store too; may be repeated",
    )


def _register_import(commands: Any) -> None:
    parser = add_command(
        commands,
        "import",
        import_,
        help="make a data set of files in other layouts",
        description=(
            "Reads SRC and writes a data set, block by block: no file is loaded whole. Layouts:\n"
            "  well      HDF5 of The Well          pdebench  HDF5 of PDEBench\n"
            "  netcdf    NetCDF-4 and Zarr, through xarray: axes are known by name (or -o axes=...)\n"
            "  npy       plain arrays: name the axes with -o axes=trajectory,time,channel,y,x\n"
            "Time-dependent fields become channels of `fields` [trajectory, time, channel, *space]; parameters, coefficients and\n"
            "masks become arrays of their own. Splits: by --split, by --train, --validation and --test, or by the folders\n"
            "train, valid and test that the files lie in; else all is for training. Interrupted, it goes on where it stopped.\n"
            "Needs: pip install 'keel[import]'."
        ),
        example=(
            "keel data import datasets/active_matter --to s3://bucket/data/active_matter\n"
            "keel data import 1D_Burgers_Sols_Nu*.hdf5 --to runs/data/burgers --split train=0.8,validation=0.1,test=0.1\n"
            "keel data import runs.npy --to runs/data/mine -o axes=time,trajectory,x -o dt=0.1 --zstd 3\n"
            "keel data import --train a.nc --test b.nc --to runs/data/weather -o trajectory=member --units u=m/s"
        ),
    )
    parser.add_argument("sources", nargs="*", metavar="SRC", help="files, folders or quoted patterns, on any store")
    parser.add_argument("--to", required=True, metavar="URL", dest="url", help="where the data set goes")
    parser.add_argument("--layout", default="auto", metavar="NAME", help="well, pdebench, netcdf, npy (default: looks)")
    parser.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the layout; may be repeated",
    )
    parser.add_argument(
        "--split", default="", metavar="SHARES", help="shares of the trajectories: train=0.8,validation=0.1,test=0.1"
    )
    for name in SPLITS:
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="SRC", help=f"sources of the {name} split")
    parser.add_argument(
        "--dtype", default="float32", metavar="TYPE", help="float32 (default), float64, float16, bfloat16 or keep"
    )
    parser.add_argument("--zstd", type=int, metavar="LEVEL", help="compress chunks; 3 is usual (default: not)")
    parser.add_argument(
        "--shard-mib", type=float, default=64, metavar="N", help="about the size of a shard (default: 64)"
    )
    parser.add_argument("--allow-nan", action="store_true", help="take values that are not finite as they are")
    parser.add_argument("--equation", metavar="TEXT", help="the equation, for the attributes")
    parser.add_argument(
        "--units",
        action="append",
        default=[],
        metavar="NAME=UNIT",
        help="unit of a channel or of time, added to those of the files; may be repeated",
    )
    add_store(parser, "all stores")


def _pairs(words: list[str], flag: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for word, (key, equals, value) in zip(words, pairs, strict=True):
        if not key or not equals or not value:
            raise ValueError(f"{flag} {word}: must be of the form KEY=VALUE")
    return {key: value for key, _, value in pairs}


def import_(args: argparse.Namespace) -> int:
    from cluster.commands.data import progress_bar
    from datamodules.importers.run import ImportConfig, import_data

    try:
        fractions = {k: float(v) for k, v in _pairs(args.split.split(","), "--split").items()} if args.split else {}
    except ValueError as error:
        raise ValueError(f"--split {args.split}: must be such as train=0.8,validation=0.1,test=0.1") from error
    attributes: dict[str, Any] = {"equation": args.equation} if args.equation else {}
    if args.units:
        attributes["units"] = _pairs(args.units, "--units")
    config = ImportConfig(
        url=args.url,
        sources=args.sources,
        fractions=fractions,
        splits={name: getattr(args, name) for name in SPLITS if getattr(args, name)},
        layout=args.layout,
        options=dict(_pairs(args.option, "--option")),
        dtype=args.dtype,
        level=args.zstd,
        shard_bytes=int(args.shard_mib * 2**20),
        allow_nan=args.allow_nan,
        attributes=attributes,
        store=store_options(args.store),
    )
    with progress_bar("import") as advance:
        url = import_data(config, advance)
    print(url)
    return 0


def stats(args: argparse.Namespace) -> int:
    from datamodules.format import Dataset, statistics
    from datamodules.store import Store

    dataset = Dataset.open(Store(args.url, **store_options(args.store)))
    name = args.array or str(dataset.attributes["array"])
    if name not in dataset.arrays:
        raise ValueError(f"{dataset.url}: has no array {name!r}; it has {', '.join(sorted(dataset.arrays))}")
    if args.split not in dataset.splits:
        raise ValueError(f"{dataset.url}: has no split {args.split!r}; it has {', '.join(dataset.splits) or 'none'}")
    array = dataset.arrays[name]
    found = statistics.of_split(array, *dataset.splits[args.split])
    channels = dataset.attributes.get("channels", [])
    channels = channels if len(channels) == len(found["bad"]) else [str(c) for c in range(len(found["bad"]))]
    main = name == dataset.attributes["array"]
    stored = dataset.attributes.get("statistics", {}) if args.split == "train" and main else {}
    rows, worst = [], 0.0
    for c, channel in enumerate(channels):
        figures = [found[key][c] for key in ("mean", "std", "min", "max")] if "mean" in found else [None] * 4
        difference: float | None = None
        if stored and "mean" in found:
            scale = max(abs(stored["std"][c]), 1e-300)
            difference = max(abs(found[key][c] - stored[key][c]) for key in ("mean", "std", "min", "max")) / scale
            worst = max(worst, difference)
        rows.append([str(channel), *figures, int(found["bad"][c]), difference])
    print(f"{dataset.url}: {name}, split {args.split}")
    print_table(["channel", "mean", "std", "min", "max", "not finite", "off stored [std]"], rows)
    if worst > args.tolerance:
        print(
            f"the stored statistics differ by up to {worst:.3g} standard deviations; make or import the data set again"
        )
        return 1
    return 0


def copy(args: argparse.Namespace) -> int:
    from cluster.commands.data import progress_bar
    from datamodules.format import Dataset, copy_dataset
    from datamodules.store import Store

    both, own = store_options(args.store), store_options(args.target_store, "--target-store")
    source, target = Store(args.source, **both), Store(args.target, **{**both, **own})
    with progress_bar("copy") as advance:
        fingerprint = copy_dataset(source, target, args.threads, advance)
    dataset = Dataset.open(target)
    total = sum(info.size for info in dataset.objects.values())
    print(f"{dataset.url}: {len(dataset.objects)} objects, {size(total)}, fingerprint {fingerprint}")
    return 0
