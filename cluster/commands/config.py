"""keel config: what a config resolves to."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.commands.common import add_command, add_overrides


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "config",
        None,
        help="look at configs",
        description="Looks at configs without running anything.",
        example="keel config show configs/runs/demo_fno.yaml",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser = add_command(
        commands,
        "show",
        show,
        help="print a resolved config",
        description=(
            "Prints the config that a run would get, all defaults filled in, as YAML; the first line is its hash\n"
            "(what decides the numbers of the run). An invalid config is an error, so this is also the check."
        ),
        example="keel config show configs/runs/demo_fno.yaml model.width=64 train.max_steps=200",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a run: a path or any fsspec URL")
    add_overrides(parser)


def show(args: argparse.Namespace) -> int:
    from trainer.config import config_hash, load, to_yaml

    config = load(args.config, args.overrides)
    print(f"# hash: {config_hash(config)}")
    print(to_yaml(config), end="")
    return 0
