"""The page itself: sections of HTML around the figures. Everything from a run is escaped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cluster.commands.common import number
from cluster.report import plots
from cluster.report.style import CSS
from cluster.report.view import RunView, curves, families, flatten

# Metrics of an evaluation that a reader looks for first, in this order, where a run has them.
_HEADLINES = ("relative_l2", "rollout_relative_l2", "bits_per_byte", "baseline.bigram_bits_per_byte")
# Of the record; the whole of it stands at the end of the page.
_OUTCOME = (
    "status",
    "error",
    "diverged_step",
    "steps",
    "samples",
    "tokens",
    "parameters",
    "flops",
    "loss",
    "attempts",
    "attempt_seconds",
    "throughput.samples_per_s",
    "throughput.tokens_per_s",
    "throughput.data_wait",
    "throughput.mfu",
)
_SPEED = ("lr", "throughput/")
_STATUS = {"ok": "good", "diverged": "bad", "failed": "bad", "preempted": "warn", "cancelled": "warn"}


def render(view: RunView) -> str:
    """The whole page; sections without content are left out."""
    sections = [
        ("results", "Results", _results(view)),
        ("loss", "Loss", figure(plots.loss_curve(view), _loss_caption(view))),
        ("evaluation", "Evaluation", _evaluation(view)),
        ("throughput", "Throughput and schedule", _multiples(view, _SPEED)),
        ("diagnostics", "Diagnostics", _multiples(view, ("diag/",))),
        ("validation", "Validation", _multiples(view, ("val/",))),
        ("metrics", "Other series", _multiples(view, None)),
        ("attempts", "Attempts", _attempts(view)),
        ("events", "Events", _events(view)),
        ("config", "Config", pre(view.config_text)),
        ("environment", "Environment", _environment(view)),
        ("record", "Record", pre(json.dumps(view.record, indent=2)) if view.record else ""),
    ]
    badge = f' <span class="badge {_STATUS.get(view.status, "warn")}">{escape(view.status)}</span>'
    return document(view.name, badge, view.url, headline(view), sections, "keel report")


def document(
    title: str,
    badge: str,
    address: str,
    headlines: Sequence[tuple[str, str]],
    sections: Sequence[tuple[str, str, str]],
    maker: str,
) -> str:
    """A page of sections (id, title, HTML); those without content are left out. `badge` is HTML, the rest text."""
    shown = [(key, name, body) for key, name, body in sections if body]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in shown)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{text}</section>' for key, name, text in shown)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - Keel</title><style>{CSS}</style></head><body>"
        f"<header><h1>{escape(title)}{badge}</h1>"
        f'<p class="url">{escape(address)}</p>{cards(headlines)}<nav>{links}</nav></header>'
        f"<main>{body}</main><footer>{maker}, {made}</footer></body></html>"
    )


def headline(view: RunView) -> list[tuple[str, str]]:
    """(label, figure) of the few numbers that a reader looks for first."""
    cards: list[tuple[str, str]] = []
    steps, losses = view.series("loss")
    target = (view.config.get("train") or {}).get("max_steps")
    if steps:
        cards.append(("steps", f"{int(steps[-1]):,}" + (f" of {target:,}" if isinstance(target, int) else "")))
        cards.append(("training loss", number(losses[-1])))
    key = plots.validation_key(view)
    if key:
        values = [v for v in view.series(key)[1] if math.isfinite(v)]
        if values:
            cards.append((f"best {key}", number(min(values))))
    record = view.record or {}
    cards += [(name, number(record[name])) for name in ("parameters",) if name in record]
    measured, split = view.measured, (view.evaluation or {}).get("split", "held out")
    cards += [(f"{name} ({split})", number(measured[name])) for name in _HEADLINES if name in measured]
    if measured.get("relative_l2") and "persistence_relative_l2" in measured:
        ratio = measured["persistence_relative_l2"] / measured["relative_l2"]
        cards.append(("times below persistence, one step", f"{ratio:.1f}"))
    return cards


def cards(headlines: Sequence[tuple[str, str]]) -> str:
    """The few numbers that a reader looks for first."""
    found = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in headlines
    )
    return f'<div class="cards">{found}</div>' if found else ""


def _results(view: RunView) -> str:
    outcome = flatten(view.record or {})
    tables = (
        table(["evaluation", ""], [[key, number(v)] for key, v in _scalars(view.measured).items()], figures=True),
        table(
            ["run", ""], [[key, number(outcome[key])] for key in _OUTCOME if outcome.get(key) is not None], figures=True
        ),
    )
    return f'<div class="columns">{"".join(tables)}</div>' if any(tables) else ""


def _evaluation(view: RunView) -> str:
    errors = figure(plots.rollout_error(curves(view.measured)), "Error of a rollout against its lead time.")
    example = figure(plots.fields(view.arrays), "One held-out trajectory: truth, prediction and their difference.")
    return errors + example


def _multiples(view: RunView, prefixes: tuple[str, ...] | None) -> str:
    """Small multiples of the series whose names start so; None: of those that no other section shows."""
    if prefixes is None:
        shown = (*_SPEED, "diag/", "val/")
        keys = [key for key in view.keys if not key.startswith(shown) and key != "loss"]
    else:
        keys = [key for key in view.keys if key.startswith(prefixes)]
    panels = plots.small_multiples(view, families(keys))
    cells = "".join(
        f"<figure><figcaption>{escape(title.removeprefix('diag/'))}</figcaption>{svg}</figure>" for title, svg in panels
    )
    return f'<div class="multiples">{cells}</div>' if cells else ""


def _loss_caption(view: RunView) -> str:
    text = "Training loss (light: as logged; dark: smoothed) and validation."
    if view.resumes:
        text += " Dotted lines: the run was resumed there; what an interrupted attempt had done beyond is not shown."
    return text


def _attempts(view: RunView) -> str:
    columns = ["attempt", "started", "host", "processes", "resumed from step"]
    rows = []
    for attempt in view.attempts:
        started = attempt.get("time")
        rows.append(
            [
                str(attempt.get("attempt", "-")),
                time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(started)) if isinstance(started, int | float) else "-",
                str(attempt.get("host", "-")),
                str(attempt.get("world_size", "-")),
                str(attempt.get("resumed_from") or "start"),
            ]
        )
    return table(columns, rows)


def _events(view: RunView) -> str:
    rows = []
    for event in view.events:
        rest = {key: value for key, value in event.items() if key not in ("step", "event", "attempt", "time")}
        details = ", ".join(f"{key}={number(value)}" for key, value in rest.items())
        rows.append([str(event["step"]), str(event["event"]), details])
    return table(["step", "event", "details"], rows)


def _environment(view: RunView) -> str:
    if not view.attempts:
        return ""
    values = _scalars(view.attempts[-1])
    return table(["of the last attempt", ""], [[key, str(value)] for key, value in values.items() if key != "time"])


def _scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a table shows; curves have a plot of their own."""
    return {key: value for key, value in flatten(values).items() if "@" not in key}


def figure(picture: str, caption: str) -> str:
    """A picture with its caption; nothing without a picture."""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>" if picture else ""


def pre(text: str) -> str:
    """Text as it is, folded."""
    return f"<details open><summary>show</summary><pre>{escape(text)}</pre></details>" if text.strip() else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], figures: bool = False) -> str:
    """A table of text; `figures`: the last column holds numbers."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="figures"' if figures else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
