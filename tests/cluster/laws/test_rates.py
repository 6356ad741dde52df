"""Learning rates: optima with diverged runs as evidence, the transfer verdict, stability, sensitivity, batch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.laws import batch, rates, synthetic
from cluster.laws.rates import boundary, cells, sensitivity, transfer, usable_decades
from cluster.laws.records import DataProblem, of_columns


def one_cell(loss: list[float], status: list[str] | None = None) -> rates.Cell:
    lr = 1e-4 * 2.0 ** np.arange(len(loss))
    runs = of_columns(width=np.full(len(loss), 64), lr=lr, loss=loss)
    runs.status = status or runs.status
    return cells(runs, "width")[0]


def test_optimum_is_the_vertex() -> None:
    x = np.log(2.0) * np.arange(8)
    cell = one_cell(list(3 * np.exp(0.03 * (x - 2.4) ** 2)))
    assert cell.optimum == pytest.approx(1e-4 * math.exp(2.4), rel=1e-6)
    assert cell.best == pytest.approx(3.0, rel=1e-6)
    assert cell.edge == "" and cell.interval[0] <= cell.optimum * 1.0001 and cell.unstable == math.inf


def test_edges_are_reported_and_a_cliff_is_none() -> None:
    assert one_cell([4.0, 3.5, 3.2, 3.0]).edge == "high"
    assert one_cell([3.0, 3.2, 3.5, 4.0]).edge == "low"
    cliff = one_cell([4.0, 3.5, 3.2, 3.0, math.nan])
    assert cliff.edge == "" and cliff.stable == pytest.approx(8e-4) and cliff.unstable == pytest.approx(1.6e-3)


def test_diverged_runs_hold_the_parabola_back() -> None:
    falling = [3.9, 3.5, 3.2, 3.0]
    free, held = one_cell([*falling, 2.95]), one_cell([*falling, math.nan, math.nan])
    assert free.edge == "high"
    assert held.optimum < 1.6e-3 and held.interval[1] < 3.2e-3


def test_divergence_by_status_by_start_and_by_being_stuck() -> None:
    by_status = one_cell([4.0, 3.0, 3.1, 3.2], ["ok", "ok", "ok", "diverged"])
    stuck = one_cell([4.0, 3.0, 3.1, 9.0])
    assert by_status.unstable == stuck.unstable == pytest.approx(8e-4)
    runs = of_columns(width=np.full(4, 64), lr=[1e-4, 2e-4, 4e-4, 8e-4], loss=[3.6, 3.0, 3.1, 4.0])
    assert cells(runs, "width", initial_loss=3.9)[0].diverged.tolist() == [False, False, False, True]


def test_one_diverged_seed_makes_a_rate_unstable() -> None:
    runs = of_columns(width=np.full(8, 64), lr=[1, 2, 4, 8] * 2, loss=[3.5, 3.0, 3.1, 3.2, 3.5, 3.0, 3.1, np.nan])
    assert cells(runs, "width")[0].diverged.tolist() == [False, False, False, True]


def test_too_few_rates_or_only_diverged_ones() -> None:
    with pytest.raises(DataProblem, match="width=64: 2 learning rates"):
        one_cell([3.0, 3.1])
    with pytest.raises(DataProblem, match="width=64: every run diverged"):
        one_cell([math.nan] * 4)


@pytest.mark.parametrize(("slope", "ok"), [(0.0, True), (-0.05, True), (-0.5, False), (-1.0, False)])
def test_verdict(slope: float, ok: bool) -> None:
    found = transfer(cells(synthetic.rate_curves(slope), "width"))
    assert found.ok is ok, found.reasons
    assert found.line is not None and found.line.exponent == pytest.approx(slope, abs=0.02)
    assert found.wider_is_better or not ok


def test_verdict_needs_sizes_and_sees_edges() -> None:
    runs = synthetic.rate_curves(0.0)
    with pytest.raises(DataProblem, match="at least two sizes"):
        transfer(cells(runs.keep(runs["width"] == 64), "width"))
    low = runs.keep(runs["lr"] < 3e-3)
    assert any("high edge" in text for text in transfer(cells(low, "width")).reasons)


def test_wider_must_be_better() -> None:
    runs = synthetic.rate_curves(0.0)
    runs.columns["loss"] = np.where(runs["width"] == 512, runs["loss"] * 1.2, runs["loss"])
    found = transfer(cells(runs, "width"))
    assert not found.ok and not found.wider_is_better


def test_curvature_of_the_optimum() -> None:
    rows = []
    for width in (64, 128, 256, 512, 1024):
        far = math.log(width / 64)
        best = 4e-3 * math.exp(-0.1 * far - 0.15 * far**2)
        rows += [
            (width, lr, 3.0 * (width / 64) ** -0.05 * math.exp(0.02 * math.log(lr / best) ** 2))
            for lr in 2.0 ** np.arange(-16, -3)
        ]
    width, lr, loss = np.array(rows).T
    found = transfer(cells(of_columns(width=width, lr=lr, loss=loss), "width"))
    assert found.curvature == pytest.approx(-0.15, abs=0.02)
    assert found.held_out[1] < 0.1 < found.held_out[0]


def test_stability_boundary() -> None:
    runs = synthetic.rate_curves(-0.5, diverge_at=1e9)
    found = boundary(cells(runs, "width"))
    assert found.line.exponent == pytest.approx(-0.5, abs=0.12) and not found.open_cells
    calm = runs.keep(np.isfinite(runs["loss"]))
    with pytest.raises(DataProblem, match="diverged runs at two sizes or more"):
        boundary(cells(calm, "width"))


def test_sensitivity_and_usable_range() -> None:
    loss = np.array([3.0, 2.5, 2.2, 2.4, 3.4, np.inf, np.nan])
    assert sensitivity(loss, 5.0) == pytest.approx((0.8 + 0.3 + 0 + 0.2 + 1.2 + 2.8 + 2.8) / 7)
    lr = 10.0 ** np.arange(-5, 2)
    assert usable_decades(lr, np.array([3.0, 2.21, 2.2, 2.21, 3.4, np.inf, np.nan])) == pytest.approx(2.0)


def test_critical_batch() -> None:
    sizes = np.array([8.0, 16, 32, 64, 128])
    found = batch.from_steps(sizes, 1000 * (1 + 50 / sizes))
    assert (found.critical, found.steps, found.samples) == tuple(map(pytest.approx, (50.0, 1000.0, 50_000.0)))
    assert not found.warnings
    assert batch.from_steps(sizes, 1000 * (1 + 5000 / sizes)).warnings
    with pytest.raises(ValueError, match="do not follow"):
        batch.from_steps(sizes, 10.0 * sizes)
    with pytest.raises(ValueError, match="at least three"):
        batch.from_steps(sizes[:2], sizes[:2])
    assert batch.scale_with_batch(50.0, 50.0) == 0.5


def test_noise_scale_from_gradients() -> None:
    rng = np.random.default_rng(0)
    mean, spread = np.full(100, 0.1), 2.0

    def norm(size: int) -> float:
        noise = rng.standard_normal((4000, 100)) * spread / math.sqrt(size)
        return float(((mean + noise) ** 2).sum(axis=1).mean())

    assert batch.noise_scale((8, norm(8)), (128, norm(128))) == pytest.approx(100 * spread**2 / 1.0, rel=0.1)
    with pytest.raises(ValueError, match="no signal"):
        batch.noise_scale((8, 10.0), (64, 1.0))
    with pytest.raises(ValueError, match="second must be larger"):
        batch.noise_scale((8, 10.0), (8, 1.0))
