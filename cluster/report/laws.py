"""One HTML page about the fits of `keel fit`: self-contained, no network needed to view it."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from cluster.commands.common import number
from cluster.laws.analysis import Analysis
from cluster.laws.summary import to_json
from cluster.report import law_plots
from cluster.report.page import document, figure, pre, table


def render(made: Analysis, source: str) -> str:
    """The page of an analysis; what the runs could not give is left out."""
    summary = to_json(made)
    sections = [
        ("warnings", "Warnings", _warnings(made.warnings)),
        ("fit", "Fit", figure(law_plots.fit_with_bands(made), "Runs, the primary law, and its 95% bootstrap band.")),
        ("laws", "Laws", _laws(made) + _intervals(summary)),
        (
            "isoflop",
            "IsoFLOP parabolas",
            figure(law_plots.isoflop_curves(made), "Stars: optima. Faint: budgets that were left out.")
            + _budgets(made),
        ),
        (
            "optimum",
            "Best size against compute",
            figure(law_plots.optima(made), f"Dotted: the target, C={made.target:.3g}.") + _methods(summary),
        ),
        ("residuals", "Residuals", figure(law_plots.residuals(made), "Structure here means that the law is wrong.")),
        ("influence", "Influence", figure(law_plots.influence(made), "Refits without one run.")),
        ("rates", "Learning rates", _rates(made)),
        ("json", "All figures", pre(json.dumps(summary, indent=1))),
    ]
    verdict = "good" if not made.warnings else "warn"
    text = "no warnings" if not made.warnings else f"{len(made.warnings)} warnings"
    badge = f' <span class="badge {verdict}">{text}</span>'
    return document("Scaling laws", badge, source, _headline(made, summary), sections, "keel fit")


def _headline(made: Analysis, summary: dict[str, Any]) -> list[tuple[str, str]]:
    cards = [("runs", f"{len(made.points):,} of {len(made.runs):,}")]
    if made.primary is not None:
        cards.append(("law", made.primary.form))
    best = summary.get("optimum")
    if best:
        cards.append((f"best N at C={made.target:.3g}", number(best["n"]["value"])))
        cards.append((f"best D at C={made.target:.3g}", number(best["d"]["value"])))
        loss = best["loss"]
        cards.append(("predicted loss there", f"{loss['value']:.4g} ({loss['low']:.4g} to {loss['high']:.4g})"))
    cards += [(f"rate transfers over {axis}", "yes" if found.ok else "no") for axis, found in made.transfers.items()]
    return cards


def _warnings(warnings: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in warnings) + "</ul>" if warnings else ""


def _laws(made: Analysis) -> str:
    rows = [
        [
            name,
            found.law.title,
            ", ".join(f"{key} {number(value)}" for key, value in found.values.items()),
            f"{found.objective:.4g}",
            found.status,
            f"{found.reached:.0%} of {found.starts}",
            number(found.condition),
        ]
        for name, found in made.fits.items()
    ]
    return table(["law", "form", "parameters", "objective", "status", "starts at optimum", "condition"], rows)


def _intervals(summary: dict[str, Any]) -> str:
    rows = [
        [f"{name} ({kind})", number(item["value"]), number(item["se"]), _band(item["interval"])]
        for kind, bands in summary.get("intervals", {}).items()
        for name, item in bands.items()
    ]
    return table(["parameter (bootstrap over)", "value", "standard error", "95% interval"], rows)


def _budgets(made: Analysis) -> str:
    if made.iso is None:
        return ""
    rows = [
        [
            number(b.flops),
            str(len(b.n)),
            *(("-", "-") if b.excluded else (number(b.optimum), f"{b.std:.3f}")),
            b.excluded,
        ]
        for b in made.iso.budgets
    ]
    return table(["C", "sizes", "best N", "error of ln N", "left out because"], rows)


def _methods(summary: dict[str, Any]) -> str:
    methods = summary.get("methods")
    if not methods:
        return ""
    rows = [[name, number(item["n"]), _band(item["interval"])] for name, item in methods["estimates"].items()]
    rows.append(["union", "", _band(methods["union"])])
    return table(["method", "best N at the target", "95% interval"], rows)


def _rates(made: Analysis) -> str:
    parts: list[str] = []
    for axis, verdict in made.transfers.items():
        for group, found in verdict.groups.items():
            at = f" at {group}" if group else ""
            said = "transfers" if found.ok else "does not transfer: " + "; ".join(found.reasons)
            name = f"{axis}-{len(parts)}" if group else axis
            parts.append(figure(law_plots.transfer_curves(axis, found, name), f"Over {axis}{at} the rate {said}."))
            rows = [
                [c.name, number(c.optimum), _band(c.interval), number(c.stable), number(c.unstable), c.edge]
                for c in found.cells
            ]
            heads = ["cell", "best rate", "interval", "largest stable", "smallest unstable", "edge of the grid"]
            parts.append(table(heads, rows))
        rows = [
            [
                f"largest stable rate ~ {axis}^{bound.line.exponent:.3f}" + (f" at {group}" if group else ""),
                _band((bound.line.low, bound.line.high)),
            ]
            for group, bound in made.boundaries.get(axis, {}).items()
        ]
        if rows:
            parts.append(table(["stability boundary", "95% interval of the exponent"], rows))
    rows = [
        [name, f"{item['S']:.4g}", number(item["usable_decades"]), ", ".join(f"{lr:.2g}" for lr in item["grid"])]
        for name, item in made.sensitivity.items()
    ]
    return "".join(parts) + table(["cell", "sensitivity S", "usable decades", "grid that S is of"], rows)


def _band(band: Any) -> str:
    return " to ".join("-" if end is None else number(float(end)) for end in band) if band else "-"
