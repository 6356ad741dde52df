"""keel checkpoint: what a run can be resumed from."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.commands.common import add_command, add_url, open_run, print_table, size


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "checkpoint",
        None,
        help="list and verify a run's checkpoints",
        description="Looks at the checkpoints of a run; changes nothing.",
        example="keel checkpoint ls runs/demo_fno",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser = add_command(
        commands,
        "ls",
        ls,
        help="list checkpoints",
        description="Lists the checkpoints at URL: step, processes that saved it, files, size. Only a committed one counts.",
        example="keel checkpoint ls runs/demo_fno",
    )
    add_url(parser)
    parser = add_command(
        commands,
        "verify",
        verify,
        help="read checkpoints back and compare checksums",
        description=(
            "Reads every file of the committed checkpoints at URL and compares sizes and checksums with the manifest.\n"
            "exit code: 0 all whole, 1 something is damaged or nothing is committed."
        ),
        example="keel checkpoint verify runs/demo_fno\nkeel checkpoint verify runs/demo_fno --step 200 --shallow",
    )
    add_url(parser)
    parser.add_argument("--step", type=int, help="only this step (default: all)")
    parser.add_argument("--shallow", action="store_true", help="existence and sizes only: nothing is read in full")


def ls(args: argparse.Namespace) -> int:
    from trainer.checkpoint import CheckpointError, committed_steps, read_manifest, step_name

    store = open_run(args.url).sub("checkpoints")
    folders = sorted({path.partition("/")[0] for path in store.list("") if "/" in path})
    committed = {step_name(step): step for step in committed_steps(store)}
    rows: list[list[object]] = []
    for folder in folders:
        if folder not in committed:
            rows.append([folder, "not committed", "-", "-", "-", "-"])
            continue
        try:
            manifest = read_manifest(store, committed[folder])
        except CheckpointError:
            rows.append([folder, "damaged", "-", "-", "-", "-"])
            continue
        total = sum(file["size"] for file in manifest["files"])
        tensors, world = len(manifest["tensors"]), manifest["world_size"]
        rows.append([folder, "committed", str(world), str(len(manifest["files"])), str(tensors), size(total)])
    if not rows:
        print(f"no checkpoints at {store.url}")
        return 0
    print_table(["checkpoint", "state", "processes", "files", "tensors", "size"], rows)
    return 0


def verify(args: argparse.Namespace) -> int:
    from trainer.checkpoint import committed_steps, step_name
    from trainer.checkpoint import verify as problems_of

    store = open_run(args.url).sub("checkpoints")
    steps = committed_steps(store) if args.step is None else [args.step]
    if not steps:
        print(f"no committed checkpoint at {store.url}")
        return 1
    damaged = 0
    for step in steps:
        problems = problems_of(store, step, deep=not args.shallow)
        damaged += bool(problems)
        print(f"{step_name(step)}: {'whole' if not problems else 'DAMAGED'}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if damaged else 0
