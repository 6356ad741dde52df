"""keel dryrun: what a run would need on machines that are not there."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cluster.commands.common import add_command, add_overrides, print_table, size

if TYPE_CHECKING:
    from trainer.planning.devices import Device
    from trainer.planning.estimate import Plan


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "dryrun",
        dryrun,
        help="plan a run on machines that are not there",
        description=(
            "Builds and shards the model of CONFIG on a process group that sends nothing, traces one step on tensors that\n"
            "hold nothing, and prints what each rank needs: memory, communication, checkpoints, time. No data are read.\n"
            "exit code: 0 the run fits, 2 it does not (and what would), or your error."
        ),
        example="keel dryrun configs/runs/demo_lm.yaml --world 1024 --device h100 train.global_batch=4096 model.width=4096",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a run: a path or any fsspec URL")
    parser.add_argument("--world", type=int, metavar="N", help="processes, one per device (default: the config's)")
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="machines (default: as few as devices per machine allow)"
    )
    parser.add_argument("--device", default="h100", metavar="NAME", help="h100, h200, a100, b200, mi300x, cpu ...")
    parser.add_argument(
        "--bandwidth", type=float, default=5.0, metavar="GB/S", help="of the store, all ranks together (default: 5)"
    )
    parser.add_argument(
        "--host-memory",
        type=float,
        default=0.0,
        metavar="GIB",
        help="of a machine, for offloading and saves (0: not held to)",
    )
    add_overrides(parser)


def dryrun(args: argparse.Namespace) -> int:
    from trainer import config as configs
    from trainer.config import ConfigError
    from trainer.planning.advice import changes_numbers, what_fits
    from trainer.planning.devices import find
    from trainer.planning.estimate import plan

    device = find(args.device)
    if not args.bandwidth > 0:
        raise ConfigError(f"--bandwidth {args.bandwidth}: must be greater than 0")
    config = configs.load(args.config, [*args.overrides, *_resources(args, device)])
    if not args.host_memory >= 0:
        raise ConfigError(f"--host-memory {args.host_memory}: must be at least 0")
    made = plan(config, device, args.host_memory * 2**30)
    show(made, args.bandwidth * 1e9)
    if made.fits:
        return 0
    found = what_fits(config, device, host_memory=made.host_memory)
    ways = "; ".join(
        f"{' '.join(overrides)} ({size(other.trace.peak)}{', with other numbers' if changes_numbers(overrides) else ''})"
        for overrides, other in found
    )
    what = f"a rank needs {size(made.trace.peak)}, {device.name} has {size(made.usable)} for tensors"
    if not made.host_fits:
        what = f"a machine needs {size(made.host_bytes)} of its own memory, it has {size(made.host_memory)}"
    raise ConfigError(
        f"does not fit: {what}. "
        + (f"What fits: {ways}" if ways else "No sharding, recomputation or micro-batch is enough: take more devices")
    )


def _resources(args: argparse.Namespace, device: Device) -> list[str]:
    from trainer.config import ConfigError

    if args.world is None and args.nodes is None:
        return ["resources.accelerator=cpu"]
    world = args.world if args.world is not None else args.nodes * device.per_node
    per_node = min(world, device.per_node if device.per_node > 1 else world)
    nodes = args.nodes if args.nodes is not None else -(-world // per_node)
    if world < 1 or nodes < 1 or world % nodes:
        raise ConfigError(f"--world {world}: does not divide over {nodes} machines; choose a multiple")
    return [
        "resources.accelerator=cpu",
        f"resources.nodes={nodes}",
        f"resources.processes_per_node={world // nodes}",
    ]


def show(made: Plan, bandwidth: float) -> None:
    """Prints a plan; `bandwidth` in bytes/s."""
    from trainer.planning.estimate import ATTAINABLE, sent_bytes

    config, found, device = made.config, made.trace, made.device
    resources = config.resources
    print(
        f"{config.name}: {found.parameters:,} parameters, {config.strategy.name} on {resources.world_size} x {device.name} "
        f"({resources.nodes} x {resources.processes_per_node}), {config.train.precision}; "
        f"{found.accumulation} x {found.micro_batch} samples per rank and step"
    )
    rows = [[name, size(count), f"{count / found.peak:.0%}"] for name, count in found.memory.items() if count]
    rows.append(["peak", size(found.peak), f"{found.peak / made.usable:.0%} of {size(made.usable)} usable"])
    if made.host_bytes:
        rows.append(["in the memory of a machine", size(made.host_bytes), ""])
    print_table([f"memory per rank, at the peak ({found.phase})", "size", "share"], rows)
    if found.by_arithmetic:
        print("Shares of ZeRO are calculated, activations traced.\n")
    if made.route_seconds:
        columns = ["communication per step", "calls", "tensors", "sent per rank", "seconds"]
        routes = [
            [
                f"{route.kind}, {route.ranks} ranks{'' if route.across else ', one machine'}",
                found.traffic[route].calls,
                size(found.traffic[route].bytes),
                size(sent_bytes(route, found.traffic[route])),
                seconds,
            ]
            for route, seconds in sorted(made.route_seconds.items(), key=lambda item: -item[1])
        ]
        print_table(columns, routes)
    print_table(["estimate", "value"], [list(row) for row in _estimate(made, bandwidth)])
    print(
        f"peak: {device.source}; {made.peak_flops / 1e12:,.4g} TFLOP/s. Times assume {ATTAINABLE:.0%} of each peak and "
        "data-parallel traffic hidden behind computation: lower bounds."
    )


def _estimate(made: Plan, bandwidth: float) -> list[tuple[str, str]]:
    found, flops, mfu = made.trace, made.step_flops, made.mfu
    samples = made.config.train.global_batch / made.step_seconds
    rows = [
        ("step", f"{made.step_seconds:.4g} s"),
        ("  computation", f"{made.compute_seconds:.4g} s"),
        ("  communication in its way", f"{made.blocking_seconds:.4g} s"),
        ("  communication beside it", f"{made.overlapped_seconds:.4g} s"),
    ]
    if flops is not None and mfu is not None:
        rows += [("FLOPs of a step, all ranks", f"{flops:.4g}"), ("MFU", f"{mfu:.1%}")]
    rows.append(("samples/s", f"{samples:,.4g}"))
    if found.tokens_per_sample > 1:
        rows.append(("tokens/s", f"{samples * found.tokens_per_sample:,.4g}"))
    rows += [
        ("checkpoint", size(found.checkpoint_bytes)),
        (f"  at {bandwidth / 1e9:,.4g} GB/s", f"{made.checkpoint_seconds(bandwidth):.4g} s"),
    ]
    return rows
