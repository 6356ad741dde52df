"""An analysis as plain containers: what `fit.json` holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cluster.laws import uncertainty
from cluster.laws.allocation import allocate, interval
from cluster.laws.analysis import Analysis, loss_interval
from cluster.laws.rates import Transfer


def to_json(made: Analysis) -> dict[str, Any]:
    """The analysis as plain containers; numbers that are not finite become None."""
    found = made.primary
    out: dict[str, Any] = {
        "runs": len(made.runs),
        "points": len(made.points),
        "target_flops": made.target,
        "flops_per_pair": made.per_pair,
        "fits": {name: item.summary() for name, item in made.fits.items()},
        "failed": made.failed,
        "warnings": made.warnings,
        "seed_noise": made.seed_noise,
    }
    if found is not None and made.thetas is not None:
        out["intervals"] = {"pairs": uncertainty.bands(found, made.thetas)}
        if made.block_thetas is not None:
            out["intervals"]["budgets"] = uncertainty.bands(found, made.block_thetas)
        if made.noise_thetas is not None:
            out["intervals"]["seeds"] = uncertainty.bands(found, made.noise_thetas)
    if made.best is not None and found is not None and made.thetas is not None:
        samples = allocate(found.law.natural(made.thetas), made.target, made.per_pair)
        out["optimum"] = {
            "n": {"value": made.best.n, "interval": interval(np.asarray(samples.n))},
            "d": {"value": made.best.d, "interval": interval(np.asarray(samples.d))},
            "loss": dict(zip(("value", "low", "high"), loss_interval(made, made.best.n, made.best.d), strict=True)),
        }
    if made.spread is not None:
        out["methods"] = {
            "estimates": {k: {"n": v, "interval": band} for k, (v, band) in made.spread.estimates.items()},
            "union": made.spread.union,
            "alarm": made.spread.alarm,
            "failed": made.spread.failed,
        }
    if made.influence is not None:
        order = np.argsort(-np.abs(made.influence.shift))
        out["influence"] = [{"run": made.influence.names[i], "shift": float(made.influence.shift[i])} for i in order]
    if made.iso is not None:
        line = made.iso.line
        out["approach_2"] = {
            "exponent": line.exponent,
            "interval": (line.low, line.high),
            "unweighted_exponent": made.iso.plain.exponent,
            "coefficient": line.coefficient,
            "sigma": made.iso.sigma,
            "budgets": [
                {"flops": b.flops, "n": b.optimum, "loss": b.best, "std": b.std, "excluded": b.excluded}
                for b in made.iso.budgets
            ],
        }
    out |= {"floor": made.floor, "tail_errors": made.tails, "learning_rate": _rates_json(made)}
    cleaned: dict[str, Any] = plain(out)
    return cleaned


def _rates_json(made: Analysis) -> dict[str, Any]:
    found: dict[str, Any] = {"sensitivity": made.sensitivity, "transfer": {}, "boundary": {}}
    for axis, verdict in made.transfers.items():
        found["transfer"][axis] = {
            "transfers": verdict.ok,
            "reasons": verdict.reasons,
            "groups": [{"at": name, **_transfer_json(item)} for name, item in verdict.groups.items()],
            "one_size_only": verdict.alone,
        }
    for axis, bounds in made.boundaries.items():
        found["boundary"][axis] = [
            {
                "at": name,
                "exponent": bound.line.exponent,
                "interval": (bound.line.low, bound.line.high),
                "coefficient": bound.line.coefficient,
                "never_diverged": bound.open_cells,
                "contradicted_by": bound.contradicted,
            }
            for name, bound in bounds.items()
        ]
    return found


def _transfer_json(item: Transfer) -> dict[str, Any]:
    cells = [
        {"cell": c.name, "size": c.size, "lr": c.optimum, "interval": c.interval, "loss": c.best, "edge": c.edge}
        for c in item.cells
    ]
    return {
        "transfers": item.ok,
        "reasons": item.reasons,
        "exponent": None if item.line is None else item.line.exponent,
        "interval": None if item.line is None else (item.line.low, item.line.high),
        "coefficient": None if item.line is None else item.line.coefficient,
        "shift_steps": item.shift_steps,
        "regret": item.regret,
        "wider_is_better": item.wider_is_better,
        "curvature": item.curvature,
        "held_out_error": {"line": item.held_out[0], "parabola": item.held_out[1]},
        "cells": cells,
    }


def plain(value: Any) -> Any:
    """Containers of JSON types only; NaN and infinities, which JSON lacks, become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
