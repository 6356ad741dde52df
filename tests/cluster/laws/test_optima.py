"""Approaches 1 and 2, allocation, and straight lines in logarithms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.laws import synthetic
from cluster.laws.allocation import allocate, data_for, loss_at, regret, with_inference
from cluster.laws.envelope import Curve, envelope
from cluster.laws.isoflop import isoflop
from cluster.laws.lines import parabolas, power_line
from cluster.laws.records import DataProblem, Runs, of_columns

TRUTH = synthetic.TRUTH


def curves(exponent_noise: float = 0.0) -> list[Curve]:
    found = []
    for n in np.geomspace(3e6, 3e9, 25):
        for horizon in np.geomspace(5, 200, 12):
            d = np.linspace(0.01, 1, 200) * n * horizon
            found.append(Curve(f"{n:g}", float(n), 6 * n * d, d, synthetic.loss_of(np.full_like(d, n), d)))
    return found


def test_approach_one_finds_the_exponent() -> None:
    found = envelope(curves(), last=0.25)
    assert found.line_n.exponent == pytest.approx(allocate(TRUTH, 1e20).exponent, abs=0.02)
    assert found.line_n.exponent + found.line_d.exponent == pytest.approx(1, abs=1e-3)
    assert found.line_n.at(1e19) == pytest.approx(allocate(TRUTH, 1e19).n, rel=0.15)


def test_approach_one_needs_sizes_on_both_sides() -> None:
    small = [curve for curve in curves() if curve.n < 5e6]
    with pytest.raises(DataProblem, match="at least three sizes, got 2"):
        envelope(small)
    with pytest.raises(ValueError, match="last=0"):
        envelope(curves(), last=0.0)


def test_isoflop_drops_edges_and_says_so() -> None:
    runs = synthetic.isoflops(4.0)
    budgets = np.unique(runs["c"])
    centre = allocate(TRUTH, float(budgets[0])).n
    cut = runs.keep(~((runs["c"] == budgets[0]) & (runs["n"] > 0.9 * centre)))
    found = isoflop(cut, sigma=1e-4, draws=50)
    assert [bool(b.excluded) for b in found.budgets] == [True, False, False, False, False]
    assert "the largest N" in found.budgets[0].excluded and "add larger models" in found.warnings[0]
    assert found.line.exponent == pytest.approx(allocate(TRUTH, 1e20).exponent, abs=5e-3)


def test_isoflop_never_takes_a_maximum_for_an_optimum() -> None:
    n = np.tile(np.geomspace(1e6, 1e8, 5), 2)
    loss = 3 - 0.05 * np.log(n / 1e7) ** 2
    loss[[2, 7]] = 2.0  # a lucky run in the middle of a concave curve
    loss[[1, 3, 6, 8]] = 2.05
    c = np.repeat([1e18, 1e19], 5)
    _, vertex, _ = parabolas(np.log(n[:5]), np.array([[3.0, 3.4, 3.5, 3.4, 3.0]]))
    assert np.isnan(vertex[0])
    with pytest.raises(DataProblem, match="0 of 2 budgets"):
        isoflop(of_columns(n=n, c=c, loss=-loss + 6))


def test_one_budget_is_refused() -> None:
    runs = synthetic.isoflops(4.0)
    with pytest.raises(DataProblem, match=r"at least two budgets, the records have one \(C=1e\+18\)"):
        isoflop(runs.keep(runs["c"] == 1e18))


def test_budgets_that_are_alike_are_not_merged() -> None:
    runs = synthetic.isoflops(4.0)
    near = of_columns(**{k: np.concatenate([v, v]) for k, v in runs.columns.items()})
    near.columns["c"] = near["c"] * np.repeat([1.0, 1.6], len(runs))
    assert len(isoflop(near, sigma=1e-4, draws=20).budgets) == 10


def test_the_best_learning_rate_of_each_size_counts() -> None:
    runs = synthetic.isoflops(4.0)
    worse = {k: np.tile(v, 3) for k, v in runs.columns.items()}
    worse["lr"] = np.repeat([1e-3, 2e-3, 4e-3], len(runs))
    worse["loss"] = worse["loss"] * np.repeat([1.0, 1.2, 1.5], len(runs))
    found = isoflop(of_columns(**worse), sigma=1e-4, draws=20)
    assert found.plain.exponent == pytest.approx(isoflop(runs, sigma=1e-4, draws=20).plain.exponent, abs=1e-9)
    assert any("learning rate 0.001 is at the edge" in text for text in found.warnings)


def test_noise_makes_the_interval() -> None:
    rng = np.random.default_rng(0)
    runs = synthetic.isoflops(4.0)
    noisy = Runs(
        {**runs.columns, "loss": runs["loss"] * np.exp(2e-3 * rng.standard_normal(len(runs)))}, runs.names, runs.status
    )
    found = isoflop(noisy, neighbours=None)
    assert 5e-4 < found.sigma < 5e-3
    assert found.line.low < allocate(TRUTH, 1e20).exponent < found.line.high
    value, (low, high) = found.optimum(1e23)
    assert low < value < high and low < allocate(TRUTH, 1e23).n * 1.1


def test_power_line() -> None:
    x = np.array([1.0, 10, 100, 1000])
    line = power_line(x, 3 * x**0.7)
    assert (line.exponent, line.coefficient) == (pytest.approx(0.7), pytest.approx(3))
    off = 3 * x**0.7 * np.array([1, 1, 1, 10])
    assert power_line(x, off, np.array([0.01, 0.01, 0.01, 10])).exponent == pytest.approx(0.7, abs=1e-3)
    with pytest.raises(ValueError, match="two different"):
        power_line(np.ones(3), np.ones(3))


def test_allocation_is_optimal_and_tied_laws_have_one_too() -> None:
    for values in (TRUTH, {"A": 500.0, "B": 900.0, "E": 1.8, "alpha": 0.35}):
        best = allocate(values, 1e20)
        factors = np.linspace(0.8, 1.25, 91)
        losses = [loss_at(values, best.n * k, best.d / k) for k in factors]
        assert min(losses) >= best.loss - 1e-12
        assert 6 * best.n * best.d == pytest.approx(1e20)
        assert regret(values, best.n, best.d, 1.0) == 0 and regret(values, best.n, best.d, 2.0) > 0
    with pytest.raises(ValueError, match="budget=-1"):
        allocate(TRUTH, -1)
    with pytest.raises(ValueError, match="no compute-optimal point"):
        allocate({**TRUTH, "alpha": -0.1}, 1e20)


def test_overtraining_and_inference() -> None:
    best = allocate(TRUTH, 1e22)
    assert data_for(TRUTH, best.n, best.loss) == pytest.approx(best.d, rel=1e-9)
    with pytest.raises(ValueError, match=r"cannot reach a loss of 2\.139: at least"):
        data_for(TRUTH, best.n / 100, best.loss)
    alone = with_inference(TRUTH, best.loss, 0.0)
    assert (alone.n, alone.d) == (pytest.approx(best.n, rel=1e-4), pytest.approx(best.d, rel=1e-4))
    served = with_inference(TRUTH, best.loss, 1e13)
    assert served.n < best.n and loss_at(TRUTH, served.n, served.d) == pytest.approx(best.loss)

    def life(n: float) -> float:
        return 6 * n * data_for(TRUTH, n, best.loss) + 2 * n * 1e13

    assert life(served.n) <= min(life(served.n * 1.02), life(served.n * 0.98))
    with pytest.raises(ValueError, match="below the floor"):
        with_inference(TRUTH, 1.0, 1e12)
    assert math.isfinite(life(served.n))
