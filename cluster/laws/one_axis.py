"""Questions about loss against one axis: is there a floor, and how many breaks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from cluster.laws.fit import Fit, fit
from cluster.laws.records import DataProblem, Runs, usable


def profile_floor(runs: Runs, axis: str = "c") -> dict[str, float | bool]:
    """Whether the floor of a saturating power law is identified: AIC against the pure power law, and decades covered.

    Returns:
        `delta_aic` (positive: the floor is needed), `decades` of the axis, `identified`.

    Raises:
        DataProblem, FitError: as `fit`.
    """
    renamed = Runs({**runs.columns, "c": runs[axis]}, runs.names, runs.status, runs.text, runs.warnings)
    plain = fit("power", renamed, delta=math.inf, strict=False)
    floored = fit("saturating", renamed, delta=math.inf, strict=False)
    count = len(plain.loss)
    tiny = 1e-26 * count
    gain = count * math.log((plain.objective + tiny) / (floored.objective + tiny))
    decades = float(np.ptp(np.log10(plain.law.axes["c"])))
    needed = gain - 2.0
    return {"delta_aic": needed, "decades": decades, "identified": needed > 2 and decades >= 2}


def broken(runs: Runs, held_out: int | None = None) -> tuple[Fit, Mapping[str, float]]:
    """The broken power law with the number of breaks (0, 1 or 2) that predicts the tail best.

    Args:
        runs: with columns c and loss.
        held_out: how many of the largest runs judge; None: a fifth, at least two.

    Returns:
        The fit to all runs, and each candidate's RMS log error on the tail.

    Raises:
        DataProblem: fewer points than 3 (breaks + 1) + 3 for every candidate.
    """
    kept = usable(runs, ("c",))
    order = np.argsort(kept["c"])
    tail = held_out or max(2, len(kept) // 5)
    head, last = kept.keep(order[:-tail]), kept.keep(order[-tail:])
    errors: dict[str, float] = {}
    for breaks, form in enumerate(("saturating", "broken1", "broken2")):
        if len(head) < 3 * (breaks + 1) + 3:
            continue
        guess = fit(form, head, delta=math.inf, strict=False)
        errors[form] = float(np.sqrt(np.mean(np.log(guess.predict(c=last["c"]) / last["loss"]) ** 2)))
    if not errors:
        raise DataProblem(f"{len(kept)} runs are too few to choose a number of breaks: 6 besides the {tail} held out")
    chosen = min(errors, key=lambda form: errors[form])
    return fit(chosen, kept, delta=math.inf, strict=False), errors
