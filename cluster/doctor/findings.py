"""Judges what the ranks have found: which node is odd, slow, or wrong."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.commands.common import size
from cluster.watch.units import duration

_FILES = 1024  # open files: connections, shards, logs
_SHARED = 32 << 20  # bytes of shared memory per process, for what NCCL and data loaders put there
_DISK = 1 << 30  # bytes for the cache of data
_USED = 0.1  # share of a device's memory that somebody else may hold
_APART_S, _STORE_APART_S = 1.0, 5.0  # clocks; a store tells whole seconds
_SLOW_DEVICE, _SLOW_CPU, _SLOW_LINK, _SLOW_STORE = 0.8, 0.5, 0.5, 0.25  # of what is usual

Ranks = Sequence[Mapping[str, Any]]


@dataclass
class Finding:
    """One check. `problems`: one line each, naming node and host; `notes`: what is no problem, but should be known."""

    name: str
    found: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "problem" if self.problems else "note" if self.notes else "ok"


def judge(report: Mapping[str, Any]) -> list[Finding]:
    """All checks, in the order in which they are shown."""
    # By node: which of them has rank 0 is up to chance, and of equals the first is taken for the usual one.
    ranks: Ranks = sorted(report["ranks"], key=lambda rank: (rank["node"], rank["rank"]))
    nodes = [rank for rank in ranks if rank["rank"] % report["processes_per_node"] == 0]
    return [
        _versions(ranks),
        _environment(ranks),
        _accelerators(ranks),
        _speed(ranks, nodes),
        _limits(ranks),
        _shared_memory(nodes, report["processes_per_node"]),
        _disk(nodes),
        *_network(report, nodes),
        *_clocks(nodes),
        *_store(nodes),
    ]


def who(rank: Mapping[str, Any], whole: bool = False) -> str:
    """`node 1 (host)`, or with its rank."""
    return f"node {rank['node']} ({rank['host']})" + ("" if whole else f", rank {rank['rank']}")


def odd(
    ranks: Ranks, value: Callable[[Mapping[str, Any]], Any], what: str, shown: Callable[[Any], str] = str
) -> list[str]:
    """Those whose value is not that of most (of equals: of the first), in one line per node and value."""
    values = [value(rank) for rank in ranks]
    usual = Counter(map(repr, values)).most_common(1)[0][0]
    common = next(each for each in values if repr(each) == usual)
    lines: dict[tuple[int, str], tuple[Mapping[str, Any], Any, int]] = {}
    for rank, each in zip(ranks, values, strict=True):
        if repr(each) != usual:
            key = (rank["node"], repr(each))
            lines[key] = (rank, each, lines[key][2] + 1 if key in lines else 1)
    return [
        f"{who(rank, count > 1 or _alone(rank, ranks))}: {what} {shown(each)}, where the others have {shown(common)}"
        for rank, each, count in lines.values()
    ]


def _alone(rank: Mapping[str, Any], ranks: Ranks) -> bool:
    return sum(other["node"] == rank["node"] for other in ranks) == 1


def _versions(ranks: Ranks) -> Finding:
    names = sorted({name for rank in ranks for name in rank["versions"]})
    problems = [line for name in names for line in odd(ranks, lambda r, n=name: r["versions"].get(n), name)]  # type: ignore[misc]
    shown = ("python", "torch", "cuda", "nccl", "keel code")
    first = ranks[0]["versions"]
    return Finding("versions", ", ".join(f"{name} {first[name]}" for name in shown if name in first), problems)


def _environment(ranks: Ranks) -> Finding:
    names = sorted({name for rank in ranks for name in rank["environment"]})
    problems = [
        line
        for name in names
        for line in odd(ranks, lambda r, n=name: r["environment"].get(n), f"variable {name}", _value)  # type: ignore[misc]
    ]
    return Finding(
        "environment", f"{len(names)} variables of NCCL, gloo and torch" if names else "nothing set", problems
    )


def _value(value: Any) -> str:
    return "nothing" if value is None else f"{value!r}"


def _accelerators(ranks: Ranks) -> Finding:
    devices = [rank["devices"][0] for rank in ranks if rank["devices"]]
    problems = odd(ranks, lambda r: [device["name"] for device in r["devices"]], "accelerator", _names)
    problems += odd(ranks, lambda r: [device["memory"] for device in r["devices"]], "accelerator memory", _names)
    for rank in ranks:
        for device in rank["devices"]:
            if device["free"] < (1 - _USED) * device["memory"]:
                used = device["memory"] - device["free"]
                problems.append(f"{who(rank)}: {size(used)} of its accelerator's memory are taken before it starts")
    if not devices:
        cpus = sorted({rank["cpus"] for rank in ranks})
        return Finding("accelerators", f"none; {' or '.join(map(str, cpus))} CPUs for each process", problems)
    return Finding("accelerators", f"{len(devices)} x {devices[0]['name']}, {size(devices[0]['memory'])}", problems)


def _names(values: Any) -> str:
    return ", ".join(size(v) if isinstance(v, int) else str(v) for v in values) or "none"


def _speed(ranks: Ranks, nodes: Ranks) -> Finding:
    """Devices are compared one by one; on CPUs, which processes share, only nodes by their best rank."""
    speeds = [rank["flop_per_s"] for rank in ranks]
    if ranks[0]["devices"]:
        lines = _slow(ranks, lambda r: r["flop_per_s"], _SLOW_DEVICE, _flops, "computes at", whole=False)
    else:
        best = {n["node"]: max(r["flop_per_s"] for r in ranks if r["node"] == n["node"]) for n in nodes}
        lines = _slow(nodes, lambda r: best[r["node"]], _SLOW_CPU, _flops, "computes at")
    return Finding("matrix products", _span([_flops(min(speeds)), _flops(max(speeds))]) + " per process", lines)


def _limits(ranks: Ranks) -> Finding:
    problems: list[str] = []
    for name in ranks[0]["limits"]:
        problems += odd(ranks, lambda r, n=name: r["limits"][n], f"limit of {name}", lambda v, n=name: _limit(n, v))  # type: ignore[misc]
    for rank in ranks:
        if 0 <= rank["limits"]["open files"] < _FILES:
            problems.append(
                f"{who(rank, _alone(rank, ranks))}: limit of open files {rank['limits']['open files']}, at least {_FILES} are needed"
            )
        if rank["infiniband"] and rank["limits"]["locked memory"] >= 0:
            problems.append(
                f"{who(rank)}: locked memory is limited, which InfiniBand does not take; set it to unlimited"
            )
    first = ranks[0]["limits"]
    return Finding("limits", ", ".join(f"{_limit(name, value)} {name}" for name, value in first.items()), problems)


def _limit(name: str, value: int) -> str:
    if value < 0:
        return "unlimited"
    return size(value) if name == "locked memory" else f"{value:,}"


def _shared_memory(nodes: Ranks, processes: int) -> Finding:
    have = [node["shared_memory"] for node in nodes if node["shared_memory"] is not None]
    problems = [
        f"{who(node, True)}: {size(node['shared_memory'] or 0)} of shared memory are free in /dev/shm, {size(_SHARED * processes)} "
        f"are needed for {processes} processes (containers: --shm-size)"
        for node in nodes
        if (node["shared_memory"] or 0) < _SHARED * processes
    ]
    return Finding("shared memory", _span([size(min(have)), size(max(have))]) + " free" if have else "none", problems)


def _disk(nodes: Ranks) -> Finding:
    have = [node["temporary"] for node in nodes]
    problems = [
        f"{who(node, True)}: {size(node['temporary'])} are free in the folder for temporary files, where data are cached"
        for node in nodes
        if node["temporary"] < _DISK
    ]
    memory = [node["memory"] for node in nodes]
    found = (
        f"{_span([size(min(memory)), size(max(memory))])} memory, {_span([size(min(have)), size(max(have))])} free disk"
    )
    return Finding("memory and disk", found, problems)


def _network(report: Mapping[str, Any], nodes: Ranks) -> list[Finding]:
    group = report["group"]
    found = [
        Finding(
            label, f"{_bytes(group[f'{name}_bytes_per_s'])}, {duration_us(group[f'{name}_latency_s'])} for the smallest"
        )
        for name, label in (("all_reduce", "all-reduce"), ("all_to_all", "all-to-all"))
        if f"{name}_bytes_per_s" in group
    ]
    best = {node["node"]: max(node["links"].values()) for node in nodes if node["links"]}
    if best:
        every = [speed for node in nodes for speed in node["links"].values()]
        linked = [node for node in nodes if node["node"] in best]
        slow = (
            _slow(linked, lambda n: best[n["node"]], _SLOW_LINK, _bytes, "its network gives") if len(best) > 2 else []
        )
        found.append(Finding("between nodes", _span([_bytes(min(every)), _bytes(max(every))]), slow))
    return found


def _clocks(nodes: Ranks) -> list[Finding]:
    ahead = [(node, node.get("ahead_s", 0.0)) for node in nodes]
    usual = statistics.median_low([skew for _, skew in ahead])
    problems = [
        f"{who(node, True)}: its clock is {duration(abs(skew - usual))} {'ahead of' if skew > usual else 'behind'} the others'"
        for node, skew in ahead
        if abs(skew - usual) > _APART_S
    ]
    apart = max(skew for _, skew in ahead) - min(skew for _, skew in ahead)
    text = "" if len(nodes) == 1 else f"{duration(apart)} apart"
    off = [(node, node["store"]["ahead_of_store_s"]) for node in nodes if "ahead_of_store_s" in node["store"]]
    problems += [
        f"{who(node, True)}: its clock is {duration(abs(skew))} {'ahead of' if skew > 0 else 'behind'} the store's"
        for node, skew in off
        if abs(skew) > _STORE_APART_S
    ]
    if off:
        # The store tells whole seconds.
        most = max(abs(skew) for _, skew in off)
        text = ", ".join(filter(None, [text, f"at most {duration(max(most, 1.0))} from the store's"]))
    return [Finding("clocks", text, problems)] if text else []


def _store(nodes: Ranks) -> list[Finding]:
    problems = [f"{who(node, True)}: {node['store']['error']}" for node in nodes if "error" in node["store"]]
    good = [node for node in nodes if "error" not in node["store"]]
    if not good:
        return [Finding("store", "cannot be used", problems)]
    texts = []
    for name in ("write", "read"):
        speeds = [node["store"][f"{name}_bytes_per_s"] for node in good]
        texts.append(f"{name}s {_span([_bytes(min(speeds)), _bytes(max(speeds))])} per node")
        problems += _slow(good, lambda n, k=name: n["store"][f"{k}_bytes_per_s"], _SLOW_STORE, _bytes, f"{name}s at")  # type: ignore[misc]
    winners = [node for node in good if node["store"]["created"]]
    conditional = Finding("conditional PUT", "held: of all nodes one could create an object")
    if len(winners) != 1 and len(good) == len(nodes):
        conditional.found = "broken"
        conditional.problems.append(
            f"{len(winners)} of {len(nodes)} nodes could create the same object: runs may overwrite each other"
        )
    elif any(node["store"]["conditional"] is False for node in good):
        conditional.found = "ignored by this server"
        conditional.notes.append(
            "starts and commits wait a second instead; two runs that start at one URL at once may clash"
        )
    return [Finding("store", ", ".join(texts), problems), conditional]


def _slow(
    ranks: Ranks,
    value: Callable[[Mapping[str, Any]], float],
    share: float,
    shown: Callable[[float], str],
    what: str,
    whole: bool = True,
) -> list[str]:
    usual = statistics.median_high([value(rank) for rank in ranks])
    return [
        f"{who(rank, whole)}: {what} {shown(value(rank))}, where {shown(usual)} are usual"
        for rank in ranks
        if value(rank) < share * usual
    ]


def _span(ends: Sequence[str]) -> str:
    if ends[0] == ends[-1]:
        return ends[0]
    (low, _, unit), last = ends[0].partition(" "), ends[-1]
    return f"{low if last.endswith(f' {unit}') else ends[0]} to {last}"


def _bytes(per_second: float) -> str:
    return f"{size(per_second)}/s"


def _flops(per_second: float) -> str:
    return f"{per_second / 1e12:.3g} TFLOP/s" if per_second >= 1e12 else f"{per_second / 1e9:.3g} GFLOP/s"


def duration_us(seconds: float) -> str:
    """As `duration`, but for what takes microseconds."""
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else duration(seconds)
