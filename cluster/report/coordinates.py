"""One HTML page about a coordinate check: self-contained, no network needed to view it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from cluster.coordinates import Axis, to_json
from cluster.report.page import document, figure, pre, table
from cluster.report.plots import GREY, PALETTE, drawing

_GOOD, _BAD = PALETTE[2], PALETTE[4]
_MOST_ROWS = 60


def render(found: Sequence[Axis], source: str) -> str:
    """The page of a check: per axis its sizes against size, its exponents, and those that failed."""
    sections = []
    for axis in found:
        caption = "Mean over seeds; green: the exponent is within its range, red: outside, with the site's name."
        sections.append((axis.name, axis.name.capitalize(), figure(_curves(axis), caption) + _exponents(axis)))
    sections.append(("json", "All figures", pre(json.dumps(to_json(found), indent=1))))
    ok = all(axis.ok for axis in found)
    badge = f' <span class="badge {"good" if ok else "bad"}">{"pass" if ok else "fail"}</span>'
    cards = [
        (axis.name, f"{'pass' if axis.ok else 'fail'}, {len(axis.failed)} of {len(axis.slopes)} outside")
        for axis in found
    ]
    return document("Coordinate check", badge, source, cards, sections, "keel coordcheck")


def _curves(axis: Axis) -> str:
    """Size at the end, change after the first and the last step, of each site against the axis."""
    last = max(slope.step for slope in axis.slopes)
    panels = [("size", last), ("change", 1), ("change", last)]
    with drawing(f"coordinates-{axis.name}", 8.6, 3.4, whole=False) as (picture, svg):
        axes = picture.subplots(1, len(panels), squeeze=False)[0]
        for ax, (quantity, step) in zip(axes, panels, strict=True):
            for slope in sorted(axis.slopes, key=lambda s: not s.ok):
                if (slope.quantity, slope.step) != (quantity, step):
                    continue
                values = [np.mean(axis.values(slope, size)) for size in axis.sizes]
                if not np.isfinite(values).all():
                    continue
                style = {"color": _GOOD, "alpha": 0.5} if slope.ok else {"color": _BAD}
                ax.plot(axis.sizes, values, "o-", markersize=2.5, linewidth=1, **style)
                if not slope.ok:
                    ax.annotate(
                        f"{slope.site} {slope.exponent:+.2f}", (axis.sizes[-1], values[-1]), fontsize=5, color=_BAD
                    )
            ax.set(xscale="log", yscale="log", xlabel=axis.name)
            ax.set_title(f"mean |x| after {step} steps" if quantity == "size" else f"mean |change| after {step} steps")
            ax.set_xticks(axis.sizes, [str(size) for size in axis.sizes])
            ax.minorticks_off()
            ax.axhline(1, color=GREY, linewidth=0.5, linestyle=":")
    return svg[0]


def _exponents(axis: Axis) -> str:
    worst = sorted(axis.slopes, key=lambda s: (s.ok, -abs(s.exponent)))[:_MOST_ROWS]
    rows = [
        [
            s.site,
            s.quantity,
            str(s.step),
            f"{s.exponent:+.2f}",
            f"{s.error:.2f}",
            f"{s.low:+.2f} to {s.high:+.2f}",
            "yes" if s.ok else "no",
        ]
        for s in worst
    ]
    return table(["site", "quantity", "step", f"exponent of {axis.name}", "error", "range", "within"], rows)
