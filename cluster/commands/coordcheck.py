"""keel coordcheck: does a parametrisation keep activations, and what steps change of them, at one size?"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cluster.commands.common import add_command, add_overrides, print_table


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "coordcheck",
        coordcheck,
        help="check that activations keep their size as a model grows",
        description=(
            "Trains the model of CONFIG at several widths (depths, modes, resolutions) and seeds for a few steps on the first\n"
            "batch of its data, at its peak rate, in this process. The sizes of all activations, and of their changes, are\n"
            "fitted by powers of the width: near zero where the parametrisation is right, 1/2 or 1 where it is not. Writes\n"
            "OUT/coordcheck.json and OUT/coordcheck.html.\n"
            "exit code: 0 all exponents are in their ranges, 1 some are not, 2 your error."
        ),
        example=(
            "keel coordcheck configs/runs/demo_lm.yaml parametrization.name=mup parametrization.base.width=64\n"
            "keel coordcheck configs/runs/demo_lm.yaml --widths 64,128,256 --with model.heads=2,4,8\n"
            "keel coordcheck configs/runs/demo_fno.yaml --widths 16,32,64 --modes 4,8,12 --resolutions 16,32,64 --seeds 2"
        ),
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a run: a path or any fsspec URL")
    for name, what in (
        ("widths", "default: those of the base model, times 1, 2, 4 and 8"),
        ("depths", "default, with a rule for depth: the base model's times 1, 2 and 4"),
        ("modes", "Fourier modes per axis; default: half, once and twice the config's"),
        ("resolutions", "grid points; default: all, half and a quarter of the data's"),
    ):
        parser.add_argument(f"--{name}", metavar="A,B,..", help=what + "; naming one axis leaves out those not named")
    parser.add_argument(
        "--with", dest="along", action="append", default=[], metavar="KEY=A,B,..", help="values of KEY at the widths"
    )
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="optimiser steps (default: 4)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="models at each size (default: 3)")
    parser.add_argument(
        "--tolerance", type=float, metavar="P", help="largest exponent that counts as none (default: 0.2)"
    )
    parser.add_argument("--out", metavar="URL", help="where the report goes (default: .keel/coordcheck/NAME)")
    add_overrides(parser)


def coordcheck(args: argparse.Namespace) -> int:

    from cluster.coordinates import TOLERANCE, check, default_axes, to_json
    from cluster.report.coordinates import render
    from datamodules.store import Store
    from trainer.config import absolute_url, load

    for name, least in (("steps", 1), ("seeds", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least {least}")
    tolerance = TOLERANCE if args.tolerance is None else args.tolerance
    if not 0 < tolerance < 1:
        raise ValueError(f"--tolerance {tolerance:g}: must lie between 0 and 1")
    config = load(args.config, args.overrides)
    named = {"width": args.widths, "depth": args.depths, "modes": args.modes, "resolution": args.resolutions}
    axes = {name: _sizes(name, words) for name, words in named.items() if words} or default_axes(config)
    found = check(
        config,
        axes,
        steps=args.steps,
        seeds=args.seeds,
        along=_along(args.along),
        tolerance=tolerance,
        progress=lambda line: print(line, file=sys.stderr),
    )
    store = Store(absolute_url(args.out or f".keel/coordcheck/{config.name}"))
    store.write_json("coordcheck.json", to_json(found))
    store.write("coordcheck.html", render(found, args.config).encode())
    for axis in found:
        sizes = ", ".join(str(size) for size in axis.sizes)
        print(f"{axis.name} {sizes}: {'pass' if axis.ok else 'FAIL'}, {len(axis.failed)} of {len(axis.slopes)} outside")
        if axis.failed:
            rows = [(s.site, s.quantity, s.step, s.exponent, s.error, f"{s.low:g} to {s.high:g}") for s in axis.failed]
            print_table(["site", "of its", "after steps", f"exponent of {axis.name}", "error", "range"], rows[:12])
    print(store.join("coordcheck.json"))
    print(store.join("coordcheck.html"))
    return 0 if all(axis.ok for axis in found) else 1


def _sizes(name: str, words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} {words}: give whole numbers with commas between, such as 32,64,128") from error


def _along(words: list[str]) -> dict[str, list[str]]:
    found = {}
    for word in words:
        key, separator, values = word.partition("=")
        if not separator:
            raise ValueError(f"--with {word}: write it as --with model.heads=2,4,8")
        found[key] = values.split(",")
    return found
