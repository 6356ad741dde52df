"""Learning rates: optima with diverged runs as evidence, the transfer verdict, stability, sensitivity, batch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.laws import batch, rates, synthetic
from cluster.laws.analysis import Options, analyse
from cluster.laws.plan import Asked, plan
from cluster.laws.rates import cells, transfer
from cluster.laws.records import DataProblem, Runs, of_columns
from cluster.laws.stability import boundary, sensitivity, usable_decades


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


def two_axes(slope: float = 0.0, second: str = "depth", drift: float = -1.0) -> Runs:
    """Widths at two values of another axis, whose best rate goes as that axis^drift."""
    parts = [synthetic.rate_curves(slope), synthetic.rate_curves(slope)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in ("width", "lr", "loss")}
    columns[second] = np.repeat([4.0, 16.0], len(parts[0]))
    columns["lr"] = columns["lr"] * np.where(columns[second] == 16, 4.0**drift, 1.0)
    runs = of_columns(**columns)
    runs.status = parts[0].status * 2
    return runs


@pytest.mark.parametrize("second", ["depth", "batch", "horizon"])
def test_a_verdict_for_each_value_of_the_other_axes(second: str) -> None:
    """Sorted by width alone, each width's cells of two depths would be neighbours, and their drift one over width."""
    found = analyse(two_axes(second=second))
    over = found.transfers["width"]
    assert over.ok and list(over.groups) == [f"{second}=4", f"{second}=16"]
    assert all(law.line is not None and abs(law.line.exponent) < 0.02 for law in over.groups.values())
    other = found.transfers[second]
    assert not other.ok and len(other.groups) == 4
    assert [law.line.exponent for law in other.groups.values() if law.line] == pytest.approx([-1.0] * 4, abs=0.02)
    one_bad = two_axes(second=second)
    worse = (one_bad["width"] == 512) & (one_bad[second] == 16)
    one_bad.columns["loss"] = np.where(worse, 1.2 * one_bad["loss"], one_bad["loss"])
    over = analyse(one_bad).transfers["width"]
    assert not over.ok and [law.ok for law in over.groups.values()] == [True, False]
    assert all(text.startswith(f"{second}=16: ") for text in over.reasons)
    with pytest.raises(DataProblem, match="have a verdict each"):
        transfer(cells(two_axes(second=second), "width", (second,)))


def test_what_goes_with_an_axis_is_a_part_of_it() -> None:
    runs = synthetic.rate_curves(0.0)
    for depths in ([1, 1, 2, 2], [80, 3, 50, 12]):
        runs.columns["depth"] = np.repeat(np.array(depths, dtype=float), 10)
        assert list(analyse(runs).transfers["width"].groups) == [""]


def test_boundaries_of_each_value_of_the_other_axes() -> None:
    runs = synthetic.rate_curves(-0.5, diverge_at=1e9)
    two = {name: np.tile(runs[name], 2) for name in ("width", "lr", "loss")}
    two["depth"] = np.repeat([2.0, 4.0], len(runs))
    two["lr"][len(runs) :] *= 0.25
    both = of_columns(**two)
    both.status = runs.status * 2
    found = analyse(both).boundaries["width"]
    assert [bound.line.exponent for bound in found.values()] == pytest.approx([-0.5] * 2, abs=0.12)
    assert found["depth=2"].line.at(64) == pytest.approx(4 * found["depth=4"].line.at(64))


def test_a_pruned_or_failed_run_has_not_diverged() -> None:
    losses = [3.5, 3.0, 3.1, 3.2, 3.4]
    lr = 1e-4 * 2.0 ** np.arange(5)
    columns = {"width": np.full(7, 64), "lr": [*lr, lr[3], lr[4]], "loss": [*losses, 6.0, np.nan]}
    runs = of_columns(**columns)
    runs.status = ["ok"] * 5 + ["pruned", "failed"]
    (cell,) = cells(runs, "width")
    assert not cell.diverged.any() and cell.unstable == math.inf and cell.loss == pytest.approx(losses)
    runs.status[5] = "diverged"
    (cell,) = cells(runs, "width")
    assert cell.diverged.tolist() == [False] * 3 + [True, False]
    many = synthetic.rate_curves(0.0)
    many.status[5], many.status[9] = "pruned", "failed"
    assert "learning rates: left out, status failed, pruned: row 6, row 10" in analyse(many).warnings


def test_a_bad_cell_is_named_and_the_others_are_judged() -> None:
    runs = synthetic.rate_curves(0.0)
    few = runs.keep((runs["width"] != 128) | (runs["lr"] < 3e-4))
    found = analyse(few)
    assert found.transfers["width"].ok and len(found.transfers["width"].groups[""].cells) == 3
    assert any("left out, width=128: 2 learning rates" in text for text in found.warnings)
    assert any("no stability boundary over width" in text for text in analyse(calm(runs)).warnings)
    lone = few.keep((few["width"] == 64) | (few["width"] == 128))
    with pytest.raises(DataProblem, match="rates over width: a transfer verdict needs at least two sizes"):
        analyse(lone)


def calm(runs: Runs) -> Runs:
    return runs.keep(np.isfinite(runs["loss"]))


def test_runs_of_another_length_are_no_seeds_of_one_rate() -> None:
    """A ladder over n at two horizons, at the longer of which the best rate is lower: no rate of n alone is theirs."""
    rows = []
    for n in (1e6, 4e6, 16e6, 64e6):
        for d in (1e8, 8e8):
            best = 4e-3 * (n / 1e6) ** -0.25 * (d / 1e8) ** -0.5
            floor = 2 + 20 * n**-0.3 + 30 * d**-0.3
            rows += [(n, d, lr, floor * math.exp(0.02 * math.log(lr / best) ** 2)) for lr in 2.0 ** np.arange(-13, -4)]
    n, d, lr, loss = np.array(rows).T
    found = analyse(of_columns(n=n, d=d, c=6 * n * d, lr=lr, loss=loss), Options(draws=20))
    over = found.transfers["n"]
    assert list(over.groups) == ["d=1e+08", "d=8e+08"]
    lines = [law.line for law in over.groups.values()]
    assert [line.exponent for line in lines if line] == pytest.approx([-0.25] * 2, abs=0.01)
    chosen = plan(found, Asked(1e17, lr_horizon=-0.5))
    assert chosen.lr == pytest.approx(4e-3 * (chosen.n / 1e6) ** -0.25 * (chosen.d / 1e8) ** -0.5, rel=0.03)
    assert any("fitted to 4 sizes at d=8e+08" in note for note in chosen.notes)


def test_sensitivity_says_where_it_does_not_know_the_loss_before_training() -> None:
    runs = synthetic.rate_curves(0.0)
    told = [text for text in analyse(runs).warnings if "sensitivity S" in text]
    assert len(told) == 1 and "width=64; width=128" in told[0]
    assert not any("sensitivity S" in text for text in analyse(calm(runs)).warnings)  # nothing is clipped
    known = synthetic.rate_curves(0.0)
    known.columns["initial_loss"] = np.full(len(known), 7.0)
    for found in (analyse(known), analyse(runs, Options(initial_loss=7.0))):
        assert not any("sensitivity S" in text for text in found.warnings)
        assert {item["clipped_at"] for item in found.sensitivity.values()} == {7.0}


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
