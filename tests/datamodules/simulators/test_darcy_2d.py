"""Darcy flow: a manufactured solution, the residual, the maximum principle, the statistics of the media."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.simulators import darcy_2d
from datamodules.simulators.darcy_2d import Darcy2D, Darcy2DConfig, DarcySolver, neumann_field
from tests.datamodules.simulators.checks import orders

PI = math.pi


def test_a_manufactured_solution_is_approached_at_second_order():
    """a = 2 + sin(3x) cos(2y), p = sin(pi x) sin(2 pi y)."""
    errors = []
    for n in (17, 33, 65, 129):
        x = torch.linspace(0, 1, n, dtype=torch.float64)[:, None]
        y = x.T
        a = 2 + torch.sin(3 * x) * torch.cos(2 * y)
        p = torch.sin(PI * x) * torch.sin(2 * PI * y)
        a_x, a_y = 3 * torch.cos(3 * x) * torch.cos(2 * y), -2 * torch.sin(3 * x) * torch.sin(2 * y)
        p_x, p_y = PI * torch.cos(PI * x) * torch.sin(2 * PI * y), 2 * PI * torch.sin(PI * x) * torch.cos(2 * PI * y)
        f = 5 * PI**2 * a * p - a_x * p_x - a_y * p_y
        errors.append(float((DarcySolver(a[None]).solve(f[None])[0] - p).abs().max()))
    assert min(orders(errors)) > 1.9 and errors[-1] < 1e-3


CONFIG = Darcy2DConfig(resolution=65, train=6, validation=0, test=0, batch=6)


@pytest.mark.parametrize("change", [{}, {"coefficient": "lognormal"}, {"high": 1e3, "low": 1.0}])
def test_pressures_solve_the_equation_and_are_positive(change):
    fields = torch.from_numpy(Darcy2D(replace(CONFIG, **change), 0, 1 << 20).group(0))[:, 0]
    a, p = fields.unbind(1)
    residual = DarcySolver(a).apply(p[:, 1:-1, 1:-1]) - 1
    assert residual.square().mean((-2, -1)).sqrt().max() < 1e-10
    assert (p[:, 1:-1, 1:-1] > 0).all()
    for edge in (p[:, 0], p[:, -1], p[:, :, 0], p[:, :, -1]):
        assert (edge == 0).all()


def test_pressure_scales_with_the_medium():
    a = torch.from_numpy(Darcy2D(CONFIG, 0, 1 << 20).group(0))[:, 0, 0]
    f = torch.ones_like(a)
    torch.testing.assert_close(DarcySolver(5 * a).solve(f), DarcySolver(a).solve(f) / 5, rtol=1e-9, atol=0)


def test_iterations_do_not_grow_with_the_points(monkeypatch):
    counts, real = [], DarcySolver.apply
    monkeypatch.setattr(DarcySolver, "apply", lambda self, p: (counts.append(self.h), real(self, p))[1])
    for n in (17, 33, 65, 129):
        Darcy2D(replace(CONFIG, resolution=n, batch=2), 0, 1 << 20).group(0)
    iterations = [counts.count(1 / (n - 1)) for n in (17, 33, 65, 129)]
    assert max(iterations) <= 30, iterations


def test_media():
    fields = Darcy2D(CONFIG, 0, 1 << 20).group(0)[:, 0, 0]
    assert set(np.unique(fields)) == {4.0, 12.0}
    assert 0.2 < (fields == 12.0).mean() < 0.8
    coarse = Darcy2D(replace(CONFIG, resolution=33), 0, 1 << 20).group(0)[:, 0, 0]
    assert (coarse == fields[:, ::2, ::2]).mean() > 0.97  # one seed, one medium at any resolution


def test_spread_of_the_random_field():
    """The mean square over the unit square is the sum of the variances of the orthonormal modes."""
    samples = np.stack([neumann_field(33, 2.0, 3.0, np.random.default_rng(seed)) for seed in range(600)])
    weights = np.full(33, 1 / 32)
    weights[[0, -1]] = 1 / 64
    k = np.arange(32)
    variance = 9.0 * (PI**2 * (k[:, None] ** 2 + k**2) + 9) ** -2.0
    variance[0, 0] = 0
    found = np.einsum("sij,i,j->s", samples**2, weights, weights).mean()
    assert math.isclose(found, variance.sum(), rel_tol=0.1)
    assert abs(np.einsum("sij,i,j->s", samples, weights, weights)).max() < 1e-12


@pytest.mark.parametrize(
    "change,message",
    [
        ({"resolution": 3}, "resolution=3"),
        ({"coefficient": "granite"}, "coefficient='granite'"),
        ({"low": 0.0}, "low=0.0: must be positive"),
        ({"frames": 2}, "frames=2, .*: a steady problem has one frame"),
        ({"dt_save": 2.0}, "dt_save=2.0: a steady problem has one frame"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_a_medium_beyond_the_solver_is_told(monkeypatch):
    with pytest.raises(ValueError, match="did not converge in 2000 iterations"):
        Darcy2D(replace(CONFIG, resolution=9, coefficient="lognormal", tau=1.0, alpha=-2.0), 0, 1 << 20).group(0)
    monkeypatch.setattr(darcy_2d, "MOST_ITERATIONS", 9)
    with pytest.raises(ValueError, match="did not converge in 9 iterations; lower the contrast"):
        Darcy2D(CONFIG, 0, 1 << 20).group(0)
