"""Intervals: resampling of runs and of budgets, seed noise, influence, and methods that disagree."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.laws import synthetic, uncertainty
from cluster.laws.allocation import allocate
from cluster.laws.analysis import Options, analyse
from cluster.laws.fit import Fit, fit
from cluster.laws.records import DataProblem, of_columns


@pytest.fixture(scope="module")
def found() -> Fit:
    return fit("chinchilla", synthetic.ladder(0.005, 2))


def test_pairs_are_seeded_and_cover_the_truth(found: Fit) -> None:
    one, again, other = (uncertainty.pairs(found, 200, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    bands = uncertainty.bands(found, one)
    for name in ("alpha", "beta"):
        low, high = bands[name]["interval"]
        assert low < synthetic.TRUTH[name] < high
    assert bands["alpha"]["se"] == pytest.approx(0.0152, rel=0.5)


def test_budgets_are_drawn_whole(found: Fit) -> None:
    labels = np.round(np.log(6 * found.law.axes["n"] * found.law.axes["d"]), 3)
    assert len(np.unique(labels)) == 8
    thetas = uncertainty.blocks(found, labels, 200)
    assert thetas.shape[1] == 5 and len(thetas) > 190
    assert 0.3 < thetas[:, 3].std() / uncertainty.pairs(found, 200)[:, 3].std() < 3
    with pytest.raises(DataProblem, match="2 budgets"):
        uncertainty.blocks(found, labels > labels.mean())


def test_seed_noise_is_pooled_over_cells() -> None:
    rng = np.random.default_rng(0)
    n = np.repeat(np.geomspace(1e6, 1e8, 30), 5)
    runs = of_columns(n=n, d=n * 20, seed=np.tile(range(5), 30), loss=3 * np.exp(0.01 * rng.standard_normal(150)))
    assert uncertainty.seed_noise(runs, ("n", "d")) == pytest.approx(0.01, rel=0.15)
    assert uncertainty.seed_noise(runs.keep(runs["seed"] < 2), ("n", "d")) is None
    fitted = fit("chinchilla", synthetic.ladder())
    assert uncertainty.noise(fitted, 0.005, 60)[:, 3].std() == pytest.approx(0.0152, rel=0.35)


def test_influence_is_what_a_refit_without_the_run_gives(found: Fit) -> None:
    influence = uncertainty.influence(found, 1e22)
    name, shift = influence.most
    assert abs(shift) == np.abs(influence.shift).max() > 1e-3
    runs = synthetic.ladder(0.005, 2)
    alone = fit("chinchilla", runs.keep([i for i, other in enumerate(runs.names) if other != name]))
    expected = np.log(allocate(alone.values, 1e22).n / allocate(found.values, 1e22).n)
    assert shift == pytest.approx(expected, abs=1e-4)


def test_methods_that_agree_and_methods_that_do_not(found: Fit) -> None:
    runs = synthetic.ladder(0.005, 2)
    spread = uncertainty.model_spread(found, runs, 1e23, uncertainty.pairs(found, 200))
    assert {"approach 3", "VPNLS", "without the largest budget", "tied exponents"} == set(spread.estimates) | set(
        spread.failed
    )
    low, high = spread.union
    assert all(low <= value <= high for value, _ in spread.estimates.values())
    extra = {"approach 2": (1e12, (9e11, 1.1e12))}
    alarmed = uncertainty.model_spread(found, runs, 1e23, uncertainty.pairs(found, 200), extra=dict(extra))
    assert "approach 2" in alarmed.alarm and "disagree" in alarmed.alarm


def test_a_bootstrap_over_budgets_does_not_split_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs spend a percent more or less than their budget, also where a rounding of ln C has its edge."""
    runs = synthetic.isoflops(4.0, sizes=5)
    edge = np.exp(0.1 * (np.round(np.log(runs["c"]) / 0.1) + 0.5))
    runs.columns["c"] = edge * np.tile([0.99, 1.01, 0.99, 1.01, 1.0], 5)
    drawn = []

    def blocks(found: Fit, labels: np.ndarray, draws: int, seed: int) -> np.ndarray:
        drawn.append(labels)
        return found.refit(np.ones((2, len(labels))))

    monkeypatch.setattr(uncertainty, "blocks", blocks)
    analyse(runs, Options(forms=("chinchilla",), draws=10))
    assert [list(labels) for labels in drawn] == [list(np.repeat(range(5), 5))]
