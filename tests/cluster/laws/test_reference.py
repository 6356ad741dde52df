"""Published data and the numbers that a correct fitter gets from them (arXiv:2404.10102, 2406.19146, 2502.06857)."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

from cluster.laws import rates, records, uncertainty
from cluster.laws.allocation import allocate
from cluster.laws.fit import Fit, fit, vpnls
from cluster.laws.isoflop import isoflop
from cluster.laws.lines import power_line
from cluster.laws.records import Runs
from tests.cluster.laws.reference import table

PORIAN = ("dataset", "hparams", "warmup", "decay", "param_count", "split")


@pytest.fixture(scope="module")
def everything() -> Runs:
    return records.load(table("chinchilla_epoch_svg.csv"))


@pytest.fixture(scope="module")
def chinchilla(everything: Runs) -> Runs:
    return everything.keep(np.sort(np.argsort(-everything["loss"])[5:]))


@pytest.fixture(scope="module")
def found(chinchilla: Runs) -> Fit:
    return fit("chinchilla", chinchilla)


def test_point_fit(found: Fit) -> None:
    assert len(found.loss) == 240
    assert found.objective <= 1.018275e-3
    v = found.values
    assert v["A"] == pytest.approx(477.83, abs=1) and v["B"] == pytest.approx(2143.4, abs=6)
    assert v["E"] == pytest.approx(1.81722, abs=2e-4)
    assert v["alpha"] == pytest.approx(0.34731, abs=1e-4) and v["beta"] == pytest.approx(0.36717, abs=1e-4)
    assert found.status == "CONVERGED"


def test_the_protocols_starts_agree(chinchilla: Runs, found: Fit) -> None:
    starts = found.law.grid()  # type: ignore[attr-defined]
    assert len(starts) == 4500
    grid = fit("chinchilla", chinchilla, starts=starts[::15])
    assert grid.reached > 0.95
    assert grid.objective == pytest.approx(found.objective, rel=1e-9)


def test_bootstrap_errors(found: Fit) -> None:
    bands = uncertainty.bands(found, uncertainty.pairs(found, 500, seed=0))
    assert bands["alpha"]["se"] == pytest.approx(0.0149, abs=0.002)
    assert bands["beta"]["se"] == pytest.approx(0.0209, abs=0.003)
    assert bands["E"]["se"] == pytest.approx(0.0260, abs=0.003)
    assert bands["a"]["se"] == pytest.approx(0.0197, abs=0.003)


def test_outliers_matter(everything: Runs, found: Fit) -> None:
    kept = fit("chinchilla", everything)
    assert kept.objective == pytest.approx(1.82601e-3, rel=1e-5)
    expected = {"A": 495.73, "B": 12845.6, "E": 1.89134, "alpha": 0.34931, "beta": 0.45305}
    assert kept.values == pytest.approx(expected, rel=1e-4)
    assert kept.values["beta"] - found.values["beta"] > 0.08


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        (1e-4, {"beta": 0.36538}),
        (1e-2, {"E": 1.83808, "beta": 0.38154}),
        (0.1, {"A": 593.32, "B": 4875.64, "E": 1.86455, "alpha": 0.36025, "beta": 0.40588}),
        (math.inf, {"A": 593.32, "B": 4875.64, "E": 1.86455, "alpha": 0.36025, "beta": 0.40588}),
    ],
)
def test_ladder_of_thresholds(chinchilla: Runs, delta: float, expected: dict[str, float]) -> None:
    values = fit("chinchilla", chinchilla, delta=delta).values
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=2e-5)


def test_least_squares_on_the_loss(chinchilla: Runs) -> None:
    found = vpnls(chinchilla)
    assert found.values["E"] == pytest.approx(1.88281, abs=1e-5)
    assert found.values["alpha"] == pytest.approx(0.35762, abs=1e-5)
    assert found.values["beta"] == pytest.approx(0.42762, abs=1e-5)
    assert 2 * found.objective == pytest.approx(0.083204, abs=1e-6)


def test_allocation(found: Fit) -> None:
    small, large = allocate(found.values, 1e19), allocate(found.values, 5.88e23)
    assert small.n == pytest.approx(2.6186e8, rel=5e-3) and small.d == pytest.approx(6.3646e9, rel=5e-3)
    assert large.n == pytest.approx(73.97e9, rel=5e-3) and large.d == pytest.approx(1.3249e12, rel=5e-3)
    assert large.d / large.n == pytest.approx(17.91, rel=5e-3)


def test_larger_runs_are_predicted(chinchilla: Runs) -> None:
    small = chinchilla.keep(chinchilla["c"] <= 1e21)
    large = chinchilla.keep(chinchilla["c"] > 1e21)
    found = fit("chinchilla", small)
    assert (len(small), len(large)) == (217, 23)
    assert found.values["alpha"] == pytest.approx(0.32713, abs=1e-5)
    error = np.abs(found.predict(n=large["n"], d=large["d"]) / large["loss"] - 1)
    assert error.mean() == pytest.approx(0.01051, abs=1e-5) and error.max() == pytest.approx(0.02776, abs=1e-5)


def published() -> dict[tuple[str, ...], float]:
    with open(table("porian_published_fits.csv")) as file:
        return {tuple(row[key] for key in PORIAN): float(row["a"]) for row in csv.DictReader(file)}


def optima(key: tuple[str, ...]) -> list[dict[str, str]]:
    with open(table("porian_optima.csv")) as file:
        return [row for row in csv.DictReader(file) if tuple(row[k] for k in PORIAN) == key]


def columns(rows: list[dict[str, str]], *names: str) -> list[np.ndarray]:
    return [np.array([float(row[name]) for row in rows]) for name in names]


def test_weighted_exponents_of_all_configurations() -> None:
    expected = published()
    assert len(expected) == 15
    for key, exponent in expected.items():
        line = power_line(*columns(optima(key), "flops", "n_star", "log_n_star_std"))
        assert line.exponent == pytest.approx(exponent, abs=5e-4), key


def test_parabolas_of_all_configurations() -> None:
    dropped = set()
    for key, exponent in published().items():
        runs = records.load(table("porian_isoflops.csv"), where=[f"{k}={v}" for k, v in zip(PORIAN, key, strict=True)])
        found = isoflop(runs, draws=100)
        assert found.plain.exponent == pytest.approx(exponent, abs=0.03), key
        # The weighted line is at most a little farther where grids are too wide, and then says so.
        wide = any("bias the coefficient" in text for text in found.warnings)
        assert found.line.exponent == pytest.approx(exponent, abs=0.04 if wide else 0.03), key
        assert 10 <= len(found.good) <= 12
        dropped |= {budget.excluded for budget in found.budgets if budget.excluded}
    assert any("smallest N" in text for text in dropped)


def test_parabolas_give_the_independent_estimates() -> None:
    expected = [0.865, 0.695, 0.593, 0.552, 0.501]
    for key, exponent in zip(list(published())[:5], expected, strict=True):
        runs = records.load(table("porian_isoflops.csv"), where=[f"{k}={v}" for k, v in zip(PORIAN, key, strict=True)])
        assert isoflop(runs, draws=50).plain.exponent == pytest.approx(exponent, abs=6e-4)


def test_eight_budgets_predict_four() -> None:
    flops, n, std = columns(
        optima(("rw", "tuned", "short", "const", "standard", "val")), *("flops", "n_star", "log_n_star_std")
    )
    line = power_line(flops[:8], n[:8], std[:8])
    assert line.exponent == pytest.approx(0.4832, abs=5e-4)
    ratios = [line.at(c) / size for c, size in zip(flops[8:], n[8:], strict=True)]
    assert ratios == pytest.approx([1.036, 0.850, 0.928, 0.907], abs=2e-3)


def test_rates_that_do_not_transfer() -> None:
    runs = records.load(table("gemstone_mup_lr.csv"))
    cells = rates.cells(runs, "width", ("depth",))
    tried = [float(cell.lr[cell.loss.argmin()]) for cell in cells]
    assert tried == pytest.approx([5e-3, 5e-3, 5e-4, 5e-4])
    verdict = rates.transfer(cells)
    assert not verdict.ok and verdict.shift_steps == 2
    assert math.isinf(verdict.regret) and any("diverges at width=3072" in text for text in verdict.reasons)
    assert [cell.unstable for cell in cells] == [0.05, 0.05, 0.005, 0.005]
