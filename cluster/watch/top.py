"""One frame of `keel top`: how a run goes now, and how each of its ranks fares."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.commands.common import number, size
from cluster.watch.seen import Said, Seen, each
from cluster.watch.units import ago, duration, rate
from datamodules.store import NotFound, Store
from trainer.records import decode

_BLOCKS = "▁▂▃▄▅▆▇█"
_SEGMENTS = 16  # of metrics, looked at at first
_RANKS = 16  # more are shown by node
_LATE = 1.3  # times the median of the others: a straggler


class Losses:
    """The training losses of a run, read piece by piece: what was read once is not read again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: set[str] = set()
        self.rows: dict[int, float] = {}

    def update(self) -> None:
        """Reads what is new; at first only the end of a long run."""
        names = [name for name in self._store.children("metrics")[1] if name not in self._read]
        self._read.update(names)
        for rows in each(self._rows, names[-_SEGMENTS:]):
            for row in rows:
                if isinstance(row.get("loss"), float):
                    self.rows[int(row["step"])] = row["loss"]

    def _rows(self, name: str) -> list[dict[str, Any]]:
        try:
            return decode(self._store.read(f"metrics/{name}"))
        except NotFound:
            return []


def frame(told: Mapping[str, Any], seen: Seen, losses: Mapping[int, float], *, width: int = 100) -> RenderableType:
    """All of it. `told`: the run's `summary`; `losses`: by step."""
    parts: list[RenderableType] = []
    line = [f"{100 * told['mfu']:.1f} % mfu"] if told["mfu"] is not None else []
    if told["throughput"] is not None:
        line.insert(0, rate(told["throughput"], told["throughput_unit"].removesuffix("/s")))
    if told["steps_per_s"]:
        line.insert(0, rate(told["steps_per_s"], "steps"))
    if told["eta_s"] is not None:
        line.append(f"{duration(told['eta_s'])} left")
    if line:
        parts.append(Text("   ".join(line)))
    if losses:
        parts.append(_curve(losses, width))
    nodes = newest(seen.workers)
    ranks = [rank for _, found in sorted(nodes.items()) for rank in found]
    late = stragglers(ranks)
    ages = {rank["rank"]: seen.workers[node].age for node, found in nodes.items() for rank in found}
    if len(ranks) > _RANKS:
        parts.append(_by_node(nodes, late, ages))
        ranks = [rank for rank in ranks if rank["rank"] in late][:_RANKS]
    if ranks:
        parts.append(_by_rank(ranks, late, ages))
    if late:
        shown = ", ".join(f"rank {rank} on {host}" for rank, host in list(late.items())[:8])
        more = f" and {len(late) - 8} more" if len(late) > 8 else ""
        parts.append(
            Text(f"slow: {shown}{more}: more than {_LATE} times the usual time before the others are met", "red")
        )
    if not nodes:
        parts.append(Text("its ranks have said nothing yet", style="dim"))
    return Group(*parts)


def newest(workers: Mapping[int, Said]) -> dict[int, list[Mapping[str, Any]]]:
    """The ranks of the newest attempt by node. What is left of a node that has gone since tells of an earlier one."""
    last = max((rank["attempt"] for said in workers.values() for rank in said.content["ranks"]), default=0)
    found = {n: [rank for rank in said.content["ranks"] if rank["attempt"] == last] for n, said in workers.items()}
    return {node: ranks for node, ranks in found.items() if ranks}


def own(rank: Mapping[str, Any]) -> float:
    """Seconds per step that a rank spends before it meets the others: in a whole step all take as long as the slowest."""
    return float(rank["wait_s"]) + float(rank["forward_s"])


def stragglers(ranks: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """The ranks (and their hosts) that keep the others waiting: those whose own time is well above the usual one, by
    something that counts within a step."""
    moving = [rank for rank in ranks if rank["step_s"] > 0]
    if len(moving) < 2:
        return {}
    usual = statistics.median_low([own(rank) for rank in moving])
    return {
        int(rank["rank"]): str(rank["host"])
        for rank in moving
        if own(rank) > _LATE * usual and own(rank) - usual > 0.05 * rank["step_s"]
    }


def _curve(losses: Mapping[int, float], width: int) -> Text:
    steps = sorted(losses)
    last, least = losses[steps[-1]], min((x for x in losses.values() if math.isfinite(x)), default=math.nan)
    label = f"loss {number(last)}   least {number(least)}   steps {steps[0]:,} to {steps[-1]:,}\n"
    return Text.assemble(label, (spark([losses[step] for step in steps], min(width, 100)), "cyan"))


def spark(values: Sequence[float], width: int) -> str:
    """A curve of one line, of means over equal parts; what is no number is `!`."""
    count = min(width, len(values))
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [statistics.fmean(part) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] if math.isfinite(mean) else "!" for mean in means)


def _by_rank(ranks: Iterable[Mapping[str, Any]], late: Mapping[int, str], ages: Mapping[int, float]) -> Table:
    ranks = list(ranks)
    device = any("device_memory" in rank for rank in ranks)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, right in [
        ("rank", 1),
        ("host", 0),
        ("phase", 0),
        ("step", 1),
        ("per step", 1),
        ("data", 1),
        ("forward", 1),
    ]:
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for column in [*(["device", "peak", "of"] if device else []), "memory", "peak", "heard"]:
        table.add_column(column, justify="right", no_wrap=True)
    for rank in ranks:
        cells = [str(rank["rank"]), str(rank["host"]), str(rank["phase"]), f"{rank['step']:,}"]
        cells += [duration(rank[name]) if rank["step_s"] else "-" for name in ("step_s", "wait_s", "forward_s")]
        if device:
            names = ("device_memory", "device_memory_peak", "device_memory_total")
            cells += [size(rank[name]) if name in rank else "-" for name in names]
        cells += [size(rank["memory"]), size(rank["memory_peak"]), ago(ages[rank["rank"]])]
        table.add_row(*cells, style="red" if rank["rank"] in late else "")
    return table


def _by_node(nodes: Mapping[int, list[Mapping[str, Any]]], late: Mapping[int, str], ages: Mapping[int, float]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, right in [
        ("node", 1),
        ("host", 0),
        ("ranks", 1),
        ("step", 1),
        ("own time", 1),
        ("slowest", 1),
        ("memory", 1),
        ("heard", 1),
    ]:
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    slowest_first = sorted(nodes.items(), key=lambda item: -max(own(rank) for rank in item[1]))
    for node, ranks in slowest_first[:24]:
        most = max(int(rank.get("device_memory_peak", rank["memory_peak"])) for rank in ranks)
        slowest = max(ranks, key=own)
        table.add_row(
            str(node),
            str(ranks[0]["host"]),
            str(len(ranks)),
            f"{min(rank['step'] for rank in ranks):,}",
            duration(statistics.fmean(own(rank) for rank in ranks)),
            f"{duration(own(slowest))} (rank {slowest['rank']})",
            size(most),
            ago(ages[ranks[0]["rank"]]),
            style="red" if any(rank["rank"] in late for rank in ranks) else "",
        )
    if len(nodes) > 24:
        table.caption = f"and {len(nodes) - 24} nodes that are faster"
    return table
