"""keel checkpoint: what a run can be resumed from, and its weights."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from typing import TYPE_CHECKING, Any

from cluster.commands.common import add_command, add_url, number, open_run, print_table, size

if TYPE_CHECKING:
    from datamodules.store import Store

_SHOWN = 40  # rows of tensors, unless --all


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "checkpoint",
        None,
        help="list, show, verify, export, prune and compare a run's checkpoints",
        description="Looks at the checkpoints of a run. Only `prune` changes anything there.",
        example="keel checkpoint ls runs/demo_fno",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser = add_command(
        commands,
        "ls",
        ls,
        help="list checkpoints",
        description="Lists the checkpoints at URL: step, processes that saved it, files, size, and the validation metric that\n"
        "was kept with it. Only a committed one counts.",
        example="keel checkpoint ls runs/demo_fno",
    )
    add_url(parser)
    parser = add_command(
        commands,
        "show",
        show,
        help="show what a checkpoint holds",
        description="Prints when, where and from which config a checkpoint was saved, and the tensors in it.",
        example="keel checkpoint show runs/demo_fno\nkeel checkpoint show runs/demo_fno --step 200 --all",
    )
    add_url(parser)
    _add_step(parser)
    parser.add_argument("--all", action="store_true", help="all tensors, also those of the optimiser")
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
    parser = add_command(
        commands,
        "export",
        export,
        help="write a checkpoint's weights as one safetensors file",
        description=(
            "Writes the network's parameters and buffers to FILE, under the network's own names, for any program that\n"
            "reads safetensors: `network.load_state_dict(safetensors.torch.load_file(FILE))`. `weights.url=FILE` starts a\n"
            "run from it."
        ),
        example="keel checkpoint export runs/demo_fno fno.safetensors\n"
        "keel checkpoint export s3://bucket/run fno.safetensors --ema --dtype bfloat16",
    )
    add_url(parser)
    parser.add_argument("file", metavar="FILE", help="a local path or any fsspec URL, ending in .safetensors")
    _add_step(parser)
    parser.add_argument("--ema", action="store_true", help="the averaged weights (of a run with train.ema_decay)")
    parser.add_argument(
        "--task", action="store_true", help="also what lies beside the network, such as data statistics"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="convert floating-point tensors")
    parser = add_command(
        commands,
        "prune",
        prune,
        help="remove checkpoints that a policy does not keep",
        description=(
            "Removes the committed checkpoints at URL that no rule keeps, and what uncommitted saves before the newest\n"
            "commit left behind. Rules that are not given are those of the run's config."
        ),
        example="keel checkpoint prune runs/demo_fno --dry-run\nkeel checkpoint prune runs/demo_fno --keep-last 2 --keep-every 1000",
    )
    add_url(parser)
    parser.add_argument("--keep-last", type=int, metavar="N", help="the newest N (at least 2)")
    parser.add_argument("--keep-every", type=int, metavar="N", help="steps divisible by N (0: none)")
    parser.add_argument("--keep-minutes", type=float, metavar="M", help="one per M minutes of wall time (0: none)")
    parser.add_argument("--best", metavar="METRIC", help="those with the best value of this metric, such as val/loss")
    parser.add_argument("--best-mode", choices=["min", "max"], help="which value is best")
    parser.add_argument("--keep-best", type=int, metavar="N", help="how many of the best")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser = add_command(
        commands,
        "diff",
        diff,
        help="compare two checkpoints",
        description=(
            "Compares the checkpoint of URL with another one, of the same run (default: the one before) or of OTHER:\n"
            "config keys, tensors that only one has or whose shape differs, and how far the others lie apart.\n"
            "exit code: 0 the same, 1 different."
        ),
        example="keel checkpoint diff runs/demo_fno --step 200 --other-step 100\nkeel checkpoint diff runs/a runs/b",
    )
    add_url(parser)
    parser.add_argument("other", metavar="OTHER", nargs="?", help="another run (default: the same)")
    _add_step(parser)
    parser.add_argument(
        "--other-step", type=int, metavar="N", help="step of the other (default: its last, or the one before)"
    )
    parser.add_argument("--all", action="store_true", help="all tensors, also those of the optimiser")


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="N", help="a committed step (default: the last whole one)")


def ls(args: argparse.Namespace) -> int:
    from trainer.checkpoint import CheckpointError, committed_steps, read_manifest, step_name
    from trainer.checkpoint.retention import Ledger

    store = open_run(args.url).sub("checkpoints")
    paths = (path.partition("/") for path in store.list(""))
    folders = sorted({folder for folder, separator, _ in paths if separator and folder.startswith("step-")})
    committed = {step_name(step): step for step in committed_steps(store)}
    metrics = {step_name(entry.step): entry.metrics or {} for entry in Ledger(store).entries()}
    rows: list[list[object]] = []
    for folder in folders:
        if folder not in committed:
            rows.append([folder, "not committed", "-", "-", "-", "-", "-"])
            continue
        try:
            manifest = read_manifest(store, committed[folder])
        except CheckpointError:
            rows.append([folder, "damaged", "-", "-", "-", "-", "-"])
            continue
        total = sum(file["size"] for file in manifest["files"])
        tensors, world = len(manifest["tensors"]), manifest["world_size"]
        kept = ", ".join(f"{name} {number(value)}" for name, value in metrics[folder].items()) or "-"
        rows.append([folder, "committed", str(world), str(len(manifest["files"])), str(tensors), size(total), kept])
    if not rows:
        print(f"no checkpoints at {store.url}")
        return 0
    print_table(["checkpoint", "state", "processes", "files", "tensors", "size", "metric"], rows)
    return 0


def show(args: argparse.Namespace) -> int:
    from trainer.checkpoint import read_manifest, step_name

    store = open_run(args.url).sub("checkpoints")
    step = _step(store, args.step)
    manifest = read_manifest(store, step)
    tensors = manifest["tensors"]
    config, code, stream = (manifest.get(key) or {} for key in ("config", "code", "stream"))
    when = datetime.datetime.fromtimestamp(manifest["created"]).astimezone().isoformat(" ", "seconds")
    rows = [
        ["checkpoint", store.join(step_name(step))],
        ["committed", f"{when} by {manifest['world_size']} processes, strategy {_name(config.get('strategy'))}"],
        ["run", f"{config.get('name', '-')}: {_name(config.get('model'))} on {_name(config.get('data'))}"],
        [
            "code",
            f"{code.get('revision') or '-'}{' (changed)' if code.get('dirty') else ''}, torch {code.get('torch', '-')}",
        ],
        ["data", f"sample {number(stream.get('position'))} of epoch {number(stream.get('epoch'))}"],
        ["files", f"{len(manifest['files'])}, {size(sum(file['size'] for file in manifest['files']))}"],
    ]
    for prefix, members in _families(tensors).items():
        rows.append([prefix, f"{len(members)} tensors, {size(sum(_bytes(tensors[name]) for name in members))}"])
    print_table(["part", "value"], rows)
    shown = sorted(tensors if args.all else (name for name in tensors if name.startswith("model.")))
    cut = shown if args.all else shown[:_SHOWN]
    listed = [[n, tensors[n]["dtype"], str(tensors[n]["shape"]), len(tensors[n]["chunks"]), size(_bytes(tensors[n]))] for n in cut]  # fmt: skip
    print_table(["tensor", "dtype", "shape", "chunks", "size"], listed)
    if len(cut) < len(tensors):
        print(f"{len(tensors) - len(cut)} more: --all")
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


def export(args: argparse.Namespace) -> int:
    from trainer.checkpoint.weights import export as write
    from trainer.config import absolute_url

    if not args.file.endswith(".safetensors"):
        raise ValueError(f"{args.file}: the file's name must end in .safetensors")
    store = open_run(args.url).sub("checkpoints")
    step = _step(store, args.step)
    target = absolute_url(args.file)
    count, total = write(store, step, target, ema=args.ema, everything=args.task, dtype=args.dtype or "")
    print(f"{target}: {count} tensors of step {step}, {size(total)}")
    return 0


def prune(args: argparse.Namespace) -> int:
    from trainer import config as configs
    from trainer.checkpoint import step_name, verify
    from trainer.checkpoint.retention import Ledger

    run = open_run(args.url)
    store = run.sub("checkpoints")
    names = ("keep_last", "keep_every", "keep_minutes", "best", "best_mode", "keep_best")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    policy = dataclasses.replace(configs.load(run.join("config.yaml")).checkpoint.retention(), **given)
    ledger = Ledger(store)
    entries = ledger.entries()
    kept = policy.kept(entries, lambda step: not verify(store, step, deep=False))
    rows = [[step_name(e.step), f"kept: {kept[e.step]}" if e.step in kept else "removed"] for e in entries]
    newest = step_name(entries[-1].step) if entries else ""
    committed = {step_name(entry.step) for entry in entries}
    folders = {path.partition("/")[0] for path in store.list("")}
    left = sorted(f for f in folders if f.startswith("step-") and f not in committed and f < newest)
    rows += [[folder, "removed: never committed"] for folder in left]
    if not args.dry_run:
        for entry in entries:
            if entry.step not in kept:
                ledger.remove(entry.step)
        for folder in left:
            store.delete_tree(folder)
    gone = len(entries) - len(kept) + len(left)
    if rows:
        print_table(["checkpoint", "dry run" if args.dry_run else "result"], sorted(rows))
    print(f"{gone} of {len(rows)} {'would be removed' if args.dry_run else 'removed'}")
    return 0


def diff(args: argparse.Namespace) -> int:
    from cluster.report.view import flatten
    from trainer.checkpoint import committed_steps, read_manifest, step_name
    from trainer.checkpoint.weights import difference

    first = open_run(args.url).sub("checkpoints")
    second = open_run(args.other).sub("checkpoints") if args.other else first
    step = _step(first, args.step)
    other_step = args.other_step
    if other_step is None and not args.other:
        other_step = next((s for s in reversed(committed_steps(first)) if s < step), None)
        if other_step is None:
            raise ValueError(f"{first.url} has no checkpoint before step {step}; name one with --other-step or OTHER")
    other_step = _step(second, other_step)
    a, b = read_manifest(first, step), read_manifest(second, other_step)
    print(f"{first.join(step_name(step))} against {second.join(step_name(other_step))}")
    settings = [flatten(manifest.get("config") or {}) for manifest in (a, b)]
    changed = [
        [key, str(settings[0].get(key, "-")), str(settings[1].get(key, "-"))]
        for key in sorted(settings[0].keys() | settings[1].keys())
        if settings[0].get(key, "-") != settings[1].get(key, "-")
    ]
    if changed:
        print_table(["config", "first", "second"], changed)
    wanted = sorted(n for n in a["tensors"].keys() | b["tensors"].keys() if args.all or n.startswith("model."))
    unlike, common = [], []
    for name in wanted:
        shapes = [str(m["tensors"][name]["shape"]) if name in m["tensors"] else "-" for m in (a, b)]
        if shapes[0] == shapes[1]:
            common.append(name)
        else:
            unlike.append([name, *shapes])
    if unlike:
        print_table(["tensor", "shape in first", "in second"], unlike)
    sides = [
        (store.sub(step_name(s)), manifest["tensors"])
        for store, s, manifest in ((first, step, a), (second, other_step, b))
    ]
    found = [difference(name, sides[0], sides[1]) for name in common]
    apart = sorted((d for d in found if d.distance != 0), key=lambda d: -d.relative)
    rows = [[d.name, d.norm, d.other_norm, d.relative, d.largest] for d in apart]
    if rows:
        columns = ["tensor", "norm of first", "of second", "distance / norm", "largest difference"]
        print_table(columns, rows if args.all else rows[:_SHOWN])
    print(
        f"{len(found) - len(apart)} of {len(wanted)} tensors are the same, {len(apart)} differ, {len(unlike)} have no equal"
    )
    return 1 if changed or unlike or apart else 0


def _step(store: Store, step: int | None) -> int:
    """The step that is asked for, else the last whole one."""
    from trainer.checkpoint import latest

    found = latest(store) if step is None else step
    if found is None:
        raise ValueError(f"no committed checkpoint at {store.url}")
    return found


def _families(tensors: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in tensors:
        found.setdefault(name.partition(".")[0], []).append(name)
    return found


def _bytes(entry: dict[str, Any]) -> int:
    return sum(chunk["bytes"] for chunk in entry["chunks"])


def _name(section: Any) -> str:
    return str((section or {}).get("name", "-"))
