"""What is seen of a run, as one screen, one line of a table, or JSON."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.commands.common import number
from cluster.watch.seen import Said, Seen
from cluster.watch.units import ago, duration, rate
from cluster.watch.verdict import DONE, GOING, Verdict

_COLOURS = dict.fromkeys((*GOING, *DONE), "green") | {"queued": "cyan", "diverged": "yellow", "pruned": "yellow"}
_RESULTS = (*DONE, "failed", "preempted", "cancelled", "interrupted")


def summary(seen: Seen, verdict: Verdict, *, name: str = "") -> dict[str, Any]:
    """The run in plain data: what `--json` prints, and what screens are made of. Times in seconds, memory in bytes."""
    run: Mapping[str, Any] = seen.run.content if seen.run else {}
    record, row = seen.record or {}, run.get("row") or {}
    step, total = run.get("step", record.get("steps")), run.get("max_steps")
    if total is None and record:
        total = record.get("config", {}).get("train", {}).get("max_steps")
    steps_per_s = None if verdict.over else run.get("steps_per_s")
    eta = (total - step) / steps_per_s if steps_per_s and total and step is not None else None
    tokens = row.get("throughput/tokens_per_s")
    heard = [said for said in (seen.run, *seen.nodes.values()) if said is not None]
    latest = min(heard, key=lambda said: said.age, default=None)
    return {
        "url": seen.url,
        "name": run.get("name") or record.get("name") or name,
        "state": verdict.state,
        "why": verdict.why,
        "phase": run.get("phase"),
        "step": step,
        "max_steps": total,
        "eta_s": eta,
        "steps_per_s": steps_per_s,
        "loss": next((x for x in (run.get("loss"), row.get("loss"), record.get("loss")) if x is not None), None),
        "metrics": {key: value for key, value in row.items() if key.startswith("val/")},
        "throughput": tokens if tokens is not None else row.get("throughput/samples_per_s"),
        "throughput_unit": "tokens/s" if tokens is not None else "samples/s",
        "mfu": row.get("throughput/mfu"),
        "flop_per_s_per_device": _tera(row.get("throughput/tflop_per_s_per_device")),
        "data_wait": row.get("throughput/data_wait"),
        "nodes": run.get("nodes"),
        "processes": run.get("processes"),
        "accelerator": run.get("accelerator"),
        "attempt": run.get("attempt", record.get("attempts")),
        "heartbeat_age_s": latest.age if latest else None,
        "heartbeat_s": latest.period if latest else None,
    }


def _tera(value: Any) -> float | None:
    return None if value is None else float(value) * 1e12


def screen(
    told: Mapping[str, Any],
    seen: Seen,
    *,
    attempts: Sequence[Mapping[str, Any]] = (),
    commit: tuple[int, float] | None = None,
    job: str = "",
) -> RenderableType:
    """One run on one screen. `told`: its `summary`; `job`: what the backend said, in words."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _lines(told, seen, attempts, commit, job):
        if text:
            table.add_row(label, Text(text))
    return Group(heading(told, seen), table)


def heading(told: Mapping[str, Any], seen: Seen) -> Text:
    """Name, state and place of a run, and why it is so."""
    state = str(told["state"])
    colour = f"bold {_COLOURS.get(state, 'red')}"
    head = Text.assemble((str(told["name"]), "bold"), "  ", (state, colour), f"  {seen.url}")
    if told["why"]:
        head.append(f"\n{told['why']}", "" if state in GOING + DONE else "red")
    return head


def _lines(
    told: Mapping[str, Any],
    seen: Seen,
    attempts: Sequence[Mapping[str, Any]],
    commit: tuple[int, float] | None,
    job: str,
) -> Iterable[tuple[str, str]]:
    over = told["state"] in _RESULTS
    yield "step", progress(told) + (f", {told['phase']}" if told["phase"] and not over else "")
    if told["eta_s"] is not None:
        yield "left", f"{duration(told['eta_s'])} at {rate(told['steps_per_s'], 'steps')}"
    losses = {"loss": told["loss"], **dict(list(told["metrics"].items())[:3])}
    yield (
        "loss",
        "   ".join(number(v) if k == "loss" else f"{k} {number(v)}" for k, v in losses.items() if v is not None),
    )
    yield "throughput", _throughput(told)
    yield "where", _where(told, seen)
    if attempts:
        causes = [str(row.get("cause") or row.get("rollback") or "") for row in attempts]
        last = next((cause for cause in reversed(causes) if cause), "")
        yield "attempts", f"{len(attempts)}" + (f"; the last after: {last}" if last else "")
    if commit:
        yield "commit", f"step {commit[0]:,}" + (f", {ago(time.time() - commit[1])}" if commit[1] else "")
    if told["heartbeat_age_s"] is not None:
        due = "" if over else f", due every {duration(told['heartbeat_s'])}"
        yield "ended" if over else "heartbeat", ago(told["heartbeat_age_s"]) + due
    yield (
        "clocks",
        "; ".join(
            f"that of {said.content.get('host')} is {duration(abs(said.skew or 0))} "
            f"{'ahead of' if (said.skew or 0) > 0 else 'behind'} the store's"
            for said in [seen.run, *seen.nodes.values()][1 if seen.nodes else 0 :]
            if said is not None and said.odd_clock
        ),
    )
    yield "job", job


def progress(told: Mapping[str, Any]) -> str:
    """`1,234 of 10,000 (12.3 %)`"""
    step, total = told["step"], told["max_steps"]
    if step is None:
        return ""
    return f"{step:,} of {total:,} ({100 * step / total:.3g} %)" if total else f"{step:,}"


def _throughput(told: Mapping[str, Any]) -> str:
    parts = []
    if told["throughput"] is not None:
        parts.append(rate(told["throughput"], told["throughput_unit"].removesuffix("/s")))
    if told["mfu"] is not None:
        parts.append(f"mfu {100 * told['mfu']:.1f} %")
    if (flops := told["flop_per_s_per_device"]) is not None:
        scale, unit = (1e12, "TFLOP/s") if flops >= 1e11 else (1e9, "GFLOP/s")
        parts.append(f"{flops / scale:.3g} {unit} per process")
    if told["data_wait"] is not None:
        parts.append(f"{100 * told['data_wait']:.2g} % waiting for data")
    return ", ".join(parts)


def _where(told: Mapping[str, Any], seen: Seen) -> str:
    hosts = hosts_of(seen)
    names = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    if not told["nodes"]:
        return names
    kind = str(told["accelerator"] or "").strip()
    return f"{told['nodes']} x {told['processes']} processes on {kind}" + (f": {names}" if names else "")


def hosts_of(seen: Seen) -> list[str]:
    """The machines of the run, in the order of its nodes."""
    said: list[Said] = [seen.nodes[number] for number in sorted(seen.nodes)] or ([seen.run] if seen.run else [])
    return list(dict.fromkeys(str(each.content.get("host")) for each in said))


def runs_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Runs as a table: `rows` are (path, `summary`)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("run", "state"):
        table.add_column(column, overflow="fold")
    for column in ("step", "of", "left", "loss", "throughput", "processes", "attempt", "heard"):
        table.add_column(column, justify="right", no_wrap=True)
    for path, told in rows:
        state = str(told["state"])
        speed = None if told["steps_per_s"] is None else told["throughput"]
        table.add_row(
            Text(path),
            Text(state, style=_COLOURS.get(state, "red")),
            "" if told["step"] is None else f"{told['step']:,}",
            "" if not told["max_steps"] else f"{told['max_steps']:,}",
            "" if told["eta_s"] is None else duration(told["eta_s"]),
            "" if told["loss"] is None else number(float(told["loss"])),
            "" if speed is None else rate(speed, told["throughput_unit"].removesuffix("/s")),
            f"{told['nodes']} x {told['processes']}" if told["nodes"] else "",
            "" if told["attempt"] is None else str(told["attempt"]),
            "" if told["heartbeat_age_s"] is None else ago(told["heartbeat_age_s"]),
        )
    counts = Counter(str(told["state"]) for _, told in rows)
    table.caption = f"{len(rows)} run{'s' * (len(rows) != 1)}: " + ", ".join(
        f"{n} {name}" for name, n in counts.most_common()
    )
    table.caption_justify = "left"
    return table


def console() -> Console:
    """Standard output; wide enough not to cut what a program reads from it."""
    plain = Console(highlight=False, markup=False)
    return plain if plain.is_terminal else Console(highlight=False, markup=False, width=max(plain.width, 140))
