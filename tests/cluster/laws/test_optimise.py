"""The shared optimiser: one answer from all starts, statuses that tell the truth, independent problems in one batch."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.laws import optimise, synthetic
from cluster.laws.fit import FitError, fit
from cluster.laws.forms import lookup
from cluster.laws.optimise import huber, minimise
from cluster.laws.records import DataProblem, of_columns


def chinchilla(sigma: float = 0.005) -> tuple[object, np.ndarray]:
    runs = synthetic.ladder(sigma, 3)
    return lookup("chinchilla")(runs.axes(("n", "d")), runs["loss"]), np.log(runs["loss"])


def test_huber_and_its_derivatives() -> None:
    residual = np.array([-3.0, -0.5, 0.0, 0.5, 3.0])
    value, slope, curve = huber(residual, 1.0)
    np.testing.assert_allclose(value, [2.5, 0.125, 0.0, 0.125, 2.5])
    np.testing.assert_allclose(slope, [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_allclose(curve, [0, 1, 1, 1, 0])


def test_all_starts_meet() -> None:
    law, target = chinchilla()
    outcome = minimise(law, target, law.grid()[::30], delta=1e-3, bounds=law.bounds())
    best = outcome.objective[outcome.best]
    assert np.mean(outcome.objective <= best * (1 + 1e-4)) > 0.95
    assert outcome.status[outcome.best] == optimise.CONVERGED
    assert outcome.gradient[outcome.best] < 1e-7


def test_nothing_near_the_optimum_is_better() -> None:
    law, target = chinchilla()
    outcome = minimise(law, target, law.starts(), delta=1e-3, bounds=law.bounds())
    theta, rng = outcome.theta[outcome.best], np.random.default_rng(0)
    nearby = theta + rng.standard_normal((500, 5)) * 10.0 ** rng.uniform(-6, -2, (500, 1))
    loss = huber(law.evaluate(nearby)[0] - target, 1e-3)[0].sum(axis=1)
    assert (loss >= outcome.objective[outcome.best] * (1 - 1e-12)).all()


def test_rows_of_weights_are_problems_of_their_own() -> None:
    law, target = chinchilla()
    start = minimise(law, target, law.starts(), delta=1e-3).theta[:1]
    weights = np.random.default_rng(1).integers(0, 3, (7, len(target))).astype(float)
    together = minimise(law, target, np.repeat(start, 7, axis=0), delta=1e-3, weights=weights, stages=())
    for row, theta in zip(weights, together.theta, strict=True):
        alone = minimise(law, target, start, delta=1e-3, weights=row, stages=())
        np.testing.assert_allclose(theta, alone.theta[0], rtol=1e-5, atol=1e-6)


def test_a_bound_that_holds_is_reported() -> None:
    runs = of_columns(n=np.geomspace(1e6, 1e9, 12), d=np.tile([1e9, 1e10, 1e11], 4), loss=np.ones(12))
    runs.columns["loss"] = 40 * runs["n"] ** -0.2 + 90 * runs["d"] ** -0.25  # no floor: log E goes to minus infinity
    found = fit("chinchilla", runs)
    assert found.values["E"] < 1e-3
    assert found.status == optimise.BOUND_HIT
    assert any("BOUND_HIT" in text and "log_E" in text for text in found.warnings)


def test_a_fit_that_has_not_moved_is_no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimise, "_step", lambda gradient, *_: (np.zeros_like(gradient), np.zeros(len(gradient))))
    with pytest.raises(FitError, match=r"INIT_UNCHANGED.*starting point"):
        fit("chinchilla", synthetic.ladder(0.01))
    loose = fit("chinchilla", synthetic.ladder(0.01), strict=False)
    assert loose.status == optimise.INIT_UNCHANGED and any("INIT_UNCHANGED" in text for text in loose.warnings)


def test_a_fit_cut_short_is_no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    law, target = chinchilla()
    outcome = minimise(law, target, law.starts()[:4], delta=1e-3, iterations=1, stages=())
    assert set(outcome.status) == {optimise.MAX_ITER}


def test_each_run_twice_changes_nothing() -> None:
    runs = synthetic.ladder(0.01, 5)
    twice = runs.keep(np.repeat(np.arange(len(runs)), 2))
    assert fit("chinchilla", twice).values == pytest.approx(fit("chinchilla", runs).values, rel=1e-6)


def test_too_few_runs_and_constant_axes_are_refused() -> None:
    runs = synthetic.ladder()
    with pytest.raises(DataProblem, match="5 parameters and needs at least 6 runs, but only 5"):
        fit("chinchilla", runs.keep(range(5)))
    same = of_columns(n=np.full(10, 1e8), d=np.geomspace(1e9, 1e10, 10), loss=np.linspace(4, 3, 10))
    with pytest.raises(DataProblem, match=r"all runs have n=1e\+08"):
        fit("chinchilla", same)


def test_designs_that_leave_a_law_open_are_warned_of() -> None:
    n = np.geomspace(1e7, 1e9, 12)
    line = of_columns(n=n, d=20 * n, loss=synthetic.loss_of(n, 20 * n))
    assert any("D/N is nearly the same" in text for text in fit("chinchilla", line, strict=False).warnings)
    budget = of_columns(n=n, d=1e18 / n, loss=synthetic.loss_of(n, 1e18 / n))
    assert any("one budget" in text for text in fit("chinchilla", budget, strict=False).warnings)


def test_an_axis_with_two_values_does_not_give_an_exponent() -> None:
    runs = synthetic.ladder()
    sizes = np.unique(runs["n"])
    two = runs.keep(np.isin(runs["n"], sizes[3:5]))
    found = fit("chinchilla", two, strict=False)
    assert any(text.startswith("alpha is not identified: n has 2 values") for text in found.warnings), found.warnings
    assert not any("beta is not identified" in text for text in found.warnings)
    three = fit("chinchilla", runs.keep(np.isin(runs["n"], sizes[3:6])), strict=False)
    assert not any("not identified" in text for text in three.warnings)
    tied = fit("tied", two, strict=False)  # whose exponent the other axis gives
    assert not any("not identified" in text for text in tied.warnings)
