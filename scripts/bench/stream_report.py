"""Tables of the stream benchmark, on the terminal and as Markdown, with each aim beside what was reached."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from _table import show
from stream_cases import BATCH, Case, cases

AIMS = """Aims: cached and local at least 10 times the best peer and half of the `preadv` limit; cold from S3 at least twice \
the best peer (with start-up) and 80 % of the GET limit (which has no start-up: once after the first batch, once for the whole \
epoch); windows cold from S3 at least 5 times the best peer with at most 1.2 bytes fetched per byte used; first batch before the \
best peer's; resume independent of the position; memory flat over 20 epochs. The best peer is the one of the best median. \
A ratio is that of the medians; beside it the least and the largest of those of the repeats, taken within each."""
COLUMNS_OF_AIMS = ("aim", "asked", "reached", "least to largest", "met")

Row = dict[str, Any]
Value = Callable[[Row], float | None]


def environment(pythons: dict[str, str]) -> Row:
    """When, on what and with which versions this was measured."""
    versions = {}
    for library, interpreter in pythons.items():
        name = "keel" if library == "keel" else library
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True)
        versions[library] = done.stdout.strip() or "?"
    model = next(
        (l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in l), ""
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"), "versions": versions, "commit": commit, "load": os.getloadavg()[1],
        "hardware": f"{os.cpu_count()} cores ({model or platform.machine()}), {memory} GiB",
    }  # fmt: skip


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def _median(rows: list[Row], value: Value) -> float | None:
    return median(map(value, rows))


def _cold(row: Row) -> float | None:
    return row["cold_samples"] / row["cold_s"] if "cold_s" in row else None


def _steady(row: Row) -> float | None:
    """Samples/s of a cold epoch after its first batch: without the time to open data and connections."""
    if "cold_s" not in row:
        return None
    return (row["cold_samples"] - BATCH) / (row["cold_s"] - row["first_batch_s"])


def _first(row: Row) -> float | None:
    return row.get("first_batch_s")


def _growth(rss: list[int]) -> float:
    """Bytes that a process gained from the first half of its cached epochs to the second; the first four warm it up."""
    settled = rss[4:]
    middle = len(settled) // 2
    return statistics.median(settled[middle:]) - statistics.median(settled[:middle])


def _cached(row: Row) -> float | None:
    return row["cached_samples"] / row["cached_s"] if "cached_s" in row else None


def summary(figures: Row) -> list[Row]:
    """One entry for each case, source and library: medians over the repeats."""
    out = []
    keys = dict.fromkeys((r["case"], r["source"], r["library"]) for r in figures["rows"])
    for name, source, library in keys:
        rows = [r for r in figures["rows"] if (r["case"], r["source"], r["library"]) == (name, source, library)]
        resume = next((r["resume_s"] for r in rows if r.get("resume_s")), [None, None])
        out.append(
            {
                "case": name, "source": source, "library": library,
                "cold": _median(rows, _cold), "steady": _median(rows, _steady), "cached": _median(rows, _cached),
                "first": _median(rows, _first), "resume": resume,
                "ratio": _median(rows, lambda r: r.get("fetched_per_used")),
                "requests": _median(rows, lambda r: r.get("requests")),
                "memory": _median(rows, lambda r: r.get("memory")),
                "epochs": _median(rows, lambda r: r.get("cached_epochs")), "cpu": _median(rows, lambda r: r.get("cpu_s")),
                "exact": all(r.get("exact", True) for r in rows), "errors": [r["error"] for r in rows if "error" in r],
            }
        )  # fmt: skip
    return out


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


COLUMNS = (
    "library", "cold samples/s", "cold MB/s", "after 1st batch", "cached samples/s", "cached MB/s", "first batch s", "resume s at 1/4, 3/4",
    "bytes fetched / used", "GETs", "CPU s of the cold epoch", "peak memory MB",
)  # fmt: skip


def table(figures: Row, entries: list[Row], case: Case, source: str) -> list[list[str]]:
    """Rows of one case and source, the limits last."""
    out = []
    mb = case.sample_bytes / 1e6
    for e in entries:
        if e["cold"] is None:
            out.append([e["library"], *["-"] * 10, (e["errors"] or ["?"])[0]])
            continue
        resume = ", ".join(_number(v, 2) for v in e["resume"])
        name = e["library"] + ("" if e["exact"] else " (samples lost or repeated!)")
        if e["errors"]:
            name += f" ({len(e['errors'])} of {figures['repeats']} runs failed)"
        out.append([
            name, _number(e["cold"]), _number(e["cold"] * mb), _number(e["steady"]), _number(e["cached"]), _number(e["cached"] * mb),
            _number(e["first"], 2), resume, _number(e["ratio"]), _number(e["requests"]), _number(e["cpu"], 2),
            _number(e["memory"] / 1e6),
        ])  # fmt: skip
    for what, label in (("cold", "cold"), ("cached", "cached")):
        limit = _limit(figures, case.name, source, what)
        if limit is not None:
            kind = "16 range GETs" if (source, what) == ("s3", "cold") else "preadv"
            cpu = _limit(figures, case.name, source, "cpu_s") if what == "cold" else None
            blank = ["-"] * 4 + [_number(cpu, 2), "-"]
            values = [_number(limit), _number(limit * mb)]
            row = [*values, "-", "-", "-"] if what == "cold" else ["-", "-", "-", *values]
            out.append([f"limit, {label}: {kind}", *row, *blank])
    return out


def _limit(figures: Row, case: str, source: str, what: str) -> float | None:
    rows = [r for r in figures["limits"] if (r["case"], r["source"]) == (case, source)]
    return _median(rows, lambda r: r.get(what))


class Ratio(NamedTuple):
    """Of the medians, and of the figures of each repeat: load that hits both sides of a pair cancels."""

    reached: float | None
    each: list[float]


def _ratio(rows: list[Row], over: list[Row], value: Value, other: Value) -> Ratio:
    """Of the repeats in which both were measured."""
    below = {r["repeat"]: other(r) for r in over}
    pairs = [(a, b) for r in rows if (a := value(r)) is not None and (b := below.get(r["repeat"]))]
    if not pairs:
        return Ratio(None, [])
    above, under = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Ratio(above / under, [a / b for a, b in pairs])


def _of(values: list[float]) -> Ratio:
    """A figure that is none of two."""
    return Ratio(median(values), values)


def verdicts(figures: Row, entries: list[Row]) -> list[list[str]]:
    """Each aim: what was asked, what was reached, the least and the largest of the repeats, whether that is enough.

    Settings other than Keel's own choice are shown, with their names, and not judged.
    """
    out: list[list[str]] = []
    groups = dict.fromkeys((e["case"], e["source"]) for e in entries)

    def add(
        what: str, ratio: Ratio, aim: float, at_least: bool = True, limit: bool = False, judged: bool = True
    ) -> None:
        reached, found = ratio
        if reached is not None:
            met = "yes" if (reached >= aim if at_least else reached <= aim) else "no"
            above = "; above the measured limit" if limit and reached > 1 else ""
            span = f"{_number(min(found))} to {_number(max(found))}" if len(found) > 1 else "-"
            asked = f"{'>=' if at_least else '<='} {aim:g}"
            out.append([what, asked, _number(reached), span, (met if judged else f"not judged ({met})") + above])

    for case, source in groups:
        here = [e for e in entries if (e["case"], e["source"]) == (case, source)]
        rows: dict[str, list[Row]] = {}
        for row in figures["rows"]:
            if (row["case"], row["source"]) == (case, source):
                rows.setdefault(row["library"], []).append(row)
        limits = [r for r in figures["limits"] if (r["case"], r["source"]) == (case, source)]
        keel = next((e for e in here if e["library"] == "keel"), None)
        peers = [e for e in here if not e["library"].startswith("keel") and e["cold"] is not None]
        if keel is None or keel["cold"] is None:
            continue
        name = f"{case}, {source}"
        other = 5.0 if case == "windows" else 2.0
        for setting in (library for library in rows if library.startswith("keel")):
            own, label, judged = rows[setting], "" if setting == "keel" else f", {setting}", setting == "keel"
            best = max((e for e in peers if e["cached"]), key=lambda e: e["cached"], default=None)
            if best is not None:
                ratio = _ratio(own, rows[best["library"]], _cached, _cached)
                add(f"{name}{label}: cached over the best peer", ratio, 10.0, judged=judged)
            ratio = _ratio(own, limits, _cached, lambda r: r.get("cached"))
            add(f"{name}{label}: cached over its limit", ratio, 0.5, limit=True, judged=judged)
            if source == "local":
                continue  # no aims for cold reads
            if peers:
                best = max(peers, key=lambda e: e["cold"])
                ratio = _ratio(own, rows[best["library"]], _cold, _cold)
                add(f"{name}{label}: cold over the best peer", ratio, other, judged=judged)
            for what, speed in (("cold after the first batch", _steady), ("cold, the whole epoch,", _cold)):
                ratio = _ratio(own, limits, speed, lambda r: r.get("cold"))
                add(f"{name}{label}: {what} over its limit", ratio, 0.8, limit=True, judged=judged)
        own = rows["keel"]
        if case == "windows" and source == "s3":
            used = [r["fetched_per_used"] for r in own if "fetched_per_used" in r]
            add(f"{name}: bytes fetched per byte used", _of(used), 1.2, at_least=False)
        if peers:
            best = min(peers, key=lambda e: e["first"])
            ratio = _ratio(own, rows[best["library"]], _first, _first)
            add(f"{name}: first batch over the best peer's", ratio, 1.0, at_least=False)
        if all(keel["resume"]):
            early, late = keel["resume"]
            add(f"{name}: resume at 3/4 over resume at 1/4", _of([late / early]), 1.5, at_least=False)
        gained = [_growth(r["rss"]) / 1e6 for r in own if len(r.get("rss", ())) >= 20]
        epochs = keel["epochs"] or 0
        add(f"{name}: MB of memory gained over {epochs:.0f} epochs", _of(gained), 16.0, at_least=False)
    return out


def markdown(figures: Row) -> str:
    """The whole report."""
    entries = summary(figures)
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [
        "# Streaming: Keel and its peers",
        "",
        f"{figures['date']}, {figures['hardware']}, load average {figures['load']:.1f} at the end; Python "
        f"{figures.get('machine', {}).get('python', platform.python_version())}; {versions}; commit {figures['commit']}. {figures['repeats']} paired repeats, medians, "
        f"{figures['workers']} workers (Keel: threads), {figures['minutes']:.0f} minutes"
        + ("; small data (`--quick`)." if figures["quick"] else ".")
        + (f" {figures['note']}" if figures.get("note") else ""),
        "",
        "Made by `python scripts/bench/stream.py --markdown docs/results/stream.md`; how it measures is said there. Server: "
        "Ceph's radosgw on the same machine, so server and readers share the cores.",
        "",
        AIMS,
        "",
        *_markdown_table(COLUMNS_OF_AIMS, verdicts(figures, entries)),
    ]
    for case in cases(figures["quick"]).values():
        for source in ("local", "s3"):
            here = [e for e in entries if (e["case"], e["source"]) == (case.name, source)]
            if here:
                shape = f"{case.items:,} x {case.dtype}{list(case.shape)}"
                part = f", {case.window} frames of each" if case.window else ""
                lines += ["", f"## {case.name} from {source}: {shape}{part}", ""]
                lines += _markdown_table(COLUMNS, table(figures, here, case, source))
    notes = Path(__file__).with_name("stream_notes.md")
    if notes.exists():
        lines += ["", notes.read_text().strip()]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    bars = ["---"] + ["---:"] * (len(columns) - 1)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (columns, bars, *rows)]


def show_all(figures: Row, path: str | None) -> None:
    """Print all tables; write them to `path` if given."""
    entries = summary(figures)
    for case in cases(figures["quick"]).values():
        for source in ("local", "s3"):
            here = [e for e in entries if (e["case"], e["source"]) == (case.name, source)]
            if here:
                show(f"{case.name} from {source}", COLUMNS, table(figures, here, case, source))
    show("aims", COLUMNS_OF_AIMS, verdicts(figures, entries))
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(markdown(figures))
