"""Skew products: base flows, the coupling by hand, and the selection of chaotic systems."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.format import Writer
from datamodules.make import bundles
from datamodules.simulators import attractors, skew_product
from datamodules.simulators.integrators import dopri5, rk4
from datamodules.simulators.lorenz63 import Lorenz63
from datamodules.simulators.quadratic_flows import FLOWS, evaluate
from datamodules.simulators.skew_product import COLUMNS, WIDTH, SkewProduct, draw_system
from datamodules.store import Store

from .helpers import largest_exponent, make, parameters


def skew(**config: Any) -> SkewProduct:
    return make(SkewProduct, **{"per_system": 2, **config})


def coefficients(name: str) -> torch.Tensor:
    flow = FLOWS[name]
    return torch.from_numpy(flow.coefficients(np.array(list(flow.parameters.values()))))


# Base flows

X = torch.tensor([0.7, -1.3, 2.1], dtype=torch.float64)
x, y, z = X.tolist()
BY_HAND = {
    "lorenz63": [10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z],
    "rossler": [-y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)],
    "halvorsen": [
        -1.4 * x - 4 * y - 4 * z - y * y,
        -1.4 * y - 4 * z - 4 * x - z * z,
        -1.4 * z - 4 * x - 4 * y - x * x,
    ],
    "chen": [35 * (y - x), (28 - 35) * x - x * z + 28 * y, x * y - 3 * z],
    "rucklidge": [-2 * x + 6.7 * y - y * z, x, -z + y * y],
    "lorenz84": [
        -1.32 * x - y * y - z * z + 1.32 * 4.83,
        -y + x * y - 7.91 * x * z + 4.194,
        -z + 7.91 * x * y + x * z,
    ],
    "dadras": [y - 3 * x + 2.7 * y * z, 1.7 * y - x * z + z, 2 * x * y - 9 * z],
    "genesio_tesi": [y, z, -x - 1.1 * y - 0.44 * z + x * x],
}


def test_base_flows_by_hand():
    assert BY_HAND.keys() == FLOWS.keys()
    for name, expected in BY_HAND.items():
        np.testing.assert_allclose(evaluate(coefficients(name), X), expected, rtol=1e-12, err_msg=name)
    lorenz = make(Lorenz63)
    torch.testing.assert_close(evaluate(coefficients("lorenz63"), X), lorenz.rhs(X, parameters(lorenz)))


def test_base_flows_are_chaotic_and_have_the_listed_speeds():
    """All at once over 40 periods from 8 states each; the exponent per period is positive for all."""
    names, count = list(FLOWS), 8
    c = torch.stack([FLOWS[name].period * coefficients(name) for name in names]).repeat(count, 1, 1)
    start = torch.tensor([FLOWS[name].start for name in names], dtype=torch.float64).repeat(count, 1)
    start = start * (
        1 + 1e-2 * torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    states = rk4(lambda s: evaluate(c, s), start, 1 / 200, 2000, 10, 800)
    speed = evaluate(c[:, None], states).square().mean(1).sqrt().reshape(count, len(names), 3).mean(0)
    np.testing.assert_allclose(speed, [FLOWS[name].rms for name in names], rtol=0.1)
    assert attractors.bounded(states.numpy()).all()
    for i, name in enumerate(names):
        flow = c[i :: len(names)]
        step = lambda s, flow=flow: rk4(  # noqa: E731
            lambda r: evaluate(flow.repeat(len(r) // count, 1, 1), r), s, 1 / 100, 1, 1, 1
        )[:, 0]
        assert largest_exponent(step, states[i :: len(names), -1], 0, 800, 0.01) > 0.1, name


# Coupling


def test_the_response_feels_the_drivers_flow_at_the_same_time():
    g = skew(drivers=["rossler"], responses=["lorenz63"], spread=0.0, strength=0.3)
    system = draw_system(g.config, np.random.default_rng(3))
    state = torch.tensor([[1.0, -2.0, 0.5, 3.0, 4.0, 20.0]], dtype=torch.float64)
    found = g.rhs([system])(state)[0]
    f_d = FLOWS["rossler"].period * evaluate(coefficients("rossler"), state[0, :3])
    f_r = FLOWS["lorenz63"].period * evaluate(coefficients("lorenz63"), state[0, 3:])
    row = dict(zip(COLUMNS, system.row, strict=True))
    ordered = [int(row[f"order{j}"]) for j in range(3)]
    assert sorted(ordered) == [0, 1, 2]
    rms_d, rms_r = np.array(FLOWS["rossler"].rms), np.array(FLOWS["lorenz63"].rms)
    push = 0.3 * torch.from_numpy(rms_r / rms_d[ordered]) * f_d[ordered]
    torch.testing.assert_close(found, torch.cat([f_d, f_r + push]), rtol=1e-12, atol=0)


def test_the_driver_runs_by_itself_and_no_push_leaves_the_response_alone():
    g = skew(drivers=["lorenz63"], responses=["chen"], spread=0.0, strength=0.0)
    systems = [draw_system(g.config, np.random.default_rng(i)) for i in range(2)]
    start = torch.from_numpy(np.stack([system.start for system in systems]))
    both = dopri5(g.rhs(systems), start, [0.5])[0, 0]
    for name, part in (("lorenz63", slice(0, 3)), ("chen", slice(3, 6))):
        alone = dopri5(lambda s, n=name: FLOWS[n].period * evaluate(coefficients(n), s), start[:1, part], [0.5])
        torch.testing.assert_close(both[part], alone[0, 0], rtol=1e-6, atol=0)


def test_parameters_are_spread_as_told():
    """p (1 + 0.1 N), where in half of the draws the change has the sign of p."""
    g = skew(drivers=["lorenz63"], responses=["chen"], spread=0.1)
    rng = np.random.default_rng(0)
    rows = np.stack([draw_system(g.config, rng).row for _ in range(4000)])
    sigma = rows[:, COLUMNS.index("driver_parameter0")] / 10 - 1
    assert math.isclose(np.square(sigma).mean(), 0.01, rel_tol=0.08)
    assert math.isclose((sigma > 0).mean(), 0.75, rel_tol=0.05)
    assert (rows[:, COLUMNS.index("driver_parameter0") + 3 : COLUMNS.index("driver_parameter0") + WIDTH] == 0).all()
    assert np.unique(rows[:, COLUMNS.index("order0")]).tolist() == [0, 1, 2]


# Selection


def lorenz_series(count: int = 4) -> np.ndarray:
    c = coefficients("lorenz63")
    start = torch.from_numpy(np.random.default_rng(0).normal([0, 0, 25], 1, (count, 3)))
    return rk4(lambda s: evaluate(c, s), start, 0.01, 1000, 15, 500).numpy()


def torus(count: int = 4) -> np.ndarray:
    """Two incommensurate frequencies."""
    t = 1.2 * np.arange(500)[None] + np.arange(count)[:, None]
    return np.stack([np.sin(t) + 0.5 * np.sin(math.sqrt(2) * t), np.cos(t), np.sin(math.sqrt(2) * t)], -1)


def test_zero_one_test_tells_chaos_from_tori():
    logistic = np.empty((3, 500, 1))
    logistic[:, 0, 0] = [0.1, 0.2, 0.3]
    for i in range(1, 500):
        logistic[:, i] = 4 * logistic[:, i - 1] * (1 - logistic[:, i - 1])
    assert (attractors.zero_one(logistic) > 0.9).all()
    assert (attractors.zero_one(lorenz_series())[:, :2] > 0.8).all()
    assert (attractors.zero_one(torus()) < 0.2).all()
    with pytest.raises(ValueError, match="series of 99 values"):
        attractors.zero_one(np.zeros((1, 99, 1)))


def test_each_filter_rejects_what_it_is_for():
    good = lorenz_series()
    t = np.linspace(0, 1, 500)[None, :, None]
    for test in (attractors.bounded, attractors.moving, attractors.steady, attractors.not_linear, attractors.broadband):
        assert test(good).all(), test.__name__
    spike, far, missing = good.copy(), good * 1e3, good.copy()
    spike[:, 100] += 500
    missing[:, 7, 1] = np.nan
    assert not any(attractors.bounded(series).any() for series in (spike, far, missing))
    assert not attractors.moving(good * np.exp(-60 * t)).any()
    assert not attractors.steady(good + 100 * t).any()
    assert not attractors.not_linear(good[:, :, :1] * np.array([1.0, -2.0, 3.0])).any()
    assert not attractors.broadband(np.sin(2 * np.pi * 10 * t[:, :-1] * 500 / 499) * np.ones((2, 1, 3))).any()


@pytest.fixture(scope="module")
def made() -> tuple[SkewProduct, np.ndarray]:
    g = skew(train=2, validation=0, test=2, batch=4, frames=40, dt_save=0.05)
    return g, g.group(0)


def test_systems_and_trajectories(made):
    """Trajectories of a system share its parameters, differ in their start, and obey its equation."""
    g, series = made
    rows = g.values("parameters", 0)
    assert series.shape == (4, 40, 6) and rows.shape == (4, len(COLUMNS))
    np.testing.assert_array_equal(rows[::2], rows[1::2])
    assert (rows[0] != rows[2]).any() and (series[0, 0] != series[1, 0]).all()
    assert np.abs(series).max() < attractors.LIMIT
    assert g.specs()["parameters"].attributes["columns"] == COLUMNS
    drawn = [draw_system(g.config, skew_product.trajectory_rng(g.seeds(2, 3)[0], f"system {k}")) for k in range(100)]
    system = next(system for system in drawn if (system.row == rows[2]).all())
    again = dopri5(g.rhs([system]), torch.from_numpy(series[2:3, 10]), [0.05], 1e-10, 1e-10)
    np.testing.assert_allclose(again[0, 0], series[2, 11], rtol=1e-4, atol=1e-4)


def test_parameters_do_not_depend_on_who_made_the_fields(made):
    g, _ = made
    alone = skew(train=2, validation=0, test=2, batch=4, frames=40, dt_save=0.05)
    np.testing.assert_array_equal(alone.values("parameters", 0), g.values("parameters", 0))


def test_whoever_makes_the_fields_makes_the_parameters_without_solving_again(tmp_path, monkeypatch):
    g = skew(train=4, validation=0, test=0, batch=2, frames=10, shard_bytes=1)
    jobs = bundles(Writer(Store(str(tmp_path)), g.specs(), {}))
    assert [("fields", 1), ("parameters", 1)] in jobs and [("time", 0)] in jobs
    solved = []
    real = SkewProduct.solve
    monkeypatch.setattr(SkewProduct, "solve", lambda self, seeds: solved.append(seeds) or real(self, seeds))
    for name, k in [("fields", 1), ("parameters", 1)]:
        g.values(name, k)
    assert len(solved) == 1


def test_hopeless_configs_end_in_one_line(monkeypatch):
    monkeypatch.setattr(skew_product, "ROUNDS", 1)
    with pytest.raises(ValueError, match=r"spread=30.0: no chaotic system in 4 draws; use a smaller spread"):
        skew(spread=30.0).group(0)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"drivers": ["lorentz"]}, "drivers=lorentz: unknown; use some of chen, "),
        ({"responses": []}, r"responses=\[\]"),
        ({"spread": -0.1}, "spread=-0.1"),
        ({"per_system": 3}, "train=4: must be a multiple of per_system=3"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        skew(**change)
