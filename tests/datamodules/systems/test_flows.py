"""Ordinary differential equations against fixed points, eigenvalues, conserved quantities and published exponents."""

from __future__ import annotations

import math

import pytest
import torch

from datamodules.simulators.double_pendulum import DoublePendulum
from datamodules.simulators.integrators import rk4
from datamodules.simulators.lorenz63 import Lorenz63
from datamodules.simulators.lorenz96 import Lorenz96
from datamodules.simulators.rossler import Rossler

from .helpers import flow_step, jacobian, largest_exponent, make, order, parameters, sorted_eigenvalues


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Lorenz 63


def test_lorenz63_fixed_points_and_symmetry():
    g = make(Lorenz63)
    p = parameters(g)
    r = math.sqrt(8 / 3 * 27)
    for point in (vector(0, 0, 0), vector(r, r, 27), vector(-r, -r, 27)):
        assert g.rhs(point, p).abs().max() < 1e-12
    x, mirror = torch.randn(5, 3, dtype=torch.float64), vector(-1, -1, 1)
    torch.testing.assert_close(g.rhs(mirror * x, p), mirror * g.rhs(x, p), rtol=0, atol=0)


def test_lorenz63_eigenvalues_and_contraction():
    g = make(Lorenz63)
    p = parameters(g)
    at_origin = sorted_eigenvalues(jacobian(lambda x: g.rhs(x, p), vector(0, 0, 0))).real
    root = math.sqrt(9**2 + 4 * 10 * 28)
    torch.testing.assert_close(at_origin, torch.tensor([(-11 - root) / 2, -8 / 3, (-11 + root) / 2]), rtol=1e-6, atol=0)
    anywhere = jacobian(lambda x: g.rhs(x, p), vector(3, -7, 20)).trace()
    assert math.isclose(anywhere, -(10 + 1 + 8 / 3), rel_tol=1e-13)


def test_lorenz63_largest_exponent():
    g = make(Lorenz63)
    step = flow_step(g, 0.01, parameters(g))
    found = largest_exponent(step, g.initial_states(list(range(192))), 500, 2500, 0.01)
    assert math.isclose(found, 0.9056, rel_tol=0.03), found


# Rossler


def test_rossler_fixed_points():
    g = make(Rossler)
    p = parameters(g)
    for sign in (-1, 1):
        z = (5.7 + sign * math.sqrt(5.7**2 - 4 * 0.2 * 0.2)) / (2 * 0.2)
        assert g.rhs(vector(0.2 * z, -z, z), p).abs().max() < 1e-12
    assert math.isclose(jacobian(lambda x: g.rhs(x, p), vector(1, 2, 3)).trace(), 0.2 + 1 - 5.7, rel_tol=1e-13)


def test_rossler_largest_exponent():
    g = make(Rossler)
    found = largest_exponent(flow_step(g, 0.05, parameters(g)), g.initial_states(list(range(128))), 2000, 6000, 0.05)
    assert math.isclose(found, 0.0714, rel_tol=0.06), found


# Lorenz 96


def test_lorenz96_eigenvalues_at_rest():
    """At x = F the Jacobian is circulant: -1 + F (exp(i t) - exp(-2 i t)) for t = 2 pi m / K."""
    g = make(Lorenz96, sites=9, forcing=[3.0, 3.0])
    p, rest = parameters(g), torch.full((9,), 3.0, dtype=torch.float64)
    assert g.rhs(rest, p).abs().max() == 0
    t = 2 * math.pi * torch.arange(9, dtype=torch.float64) / 9
    expected = sorted_eigenvalues(torch.diag(-1 + 3 * (torch.exp(1j * t) - torch.exp(-2j * t))))
    torch.testing.assert_close(sorted_eigenvalues(jacobian(lambda x: g.rhs(x, p), rest)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fast", [0, 5])
def test_lorenz96_energy_and_symmetry(fast):
    """d/dt (sum x^2 + sum y^2) / 2 = -sum x^2 - c sum y^2 + F sum x: products and coupling conserve."""
    g = make(Lorenz96, sites=8, fast=fast, coupling=0.7, time_ratio=6.0, amplitude_ratio=4.0)
    p = parameters(g)
    state = torch.randn(3, len(g.channels), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y = state[:, :8], state[:, 8:]
    expected = -x.square().sum(1) - 6.0 * y.square().sum(1) + 8.0 * x.sum(1)
    torch.testing.assert_close((state * g.rhs(state, p)).sum(1), expected, rtol=1e-12, atol=1e-12)
    turned = torch.cat([x.roll(3, 1), y.roll(3 * fast, 1)], 1)
    slope = g.rhs(state, p)
    torch.testing.assert_close(
        g.rhs(turned, p), torch.cat([slope[:, :8].roll(3, 1), slope[:, 8:].roll(3 * fast, 1)], 1), rtol=0, atol=1e-12
    )


def test_lorenz96_second_level_by_hand():
    """One entry of each level, written out from the equations."""
    g = make(Lorenz96, sites=4, fast=2, coupling=0.5, time_ratio=3.0, amplitude_ratio=2.0)
    s = torch.arange(1, 13, dtype=torch.float64)
    x, y, out = s[:4], s[4:], g.rhs(s, parameters(g))
    assert math.isclose(out[1], (x[2] - x[3]) * x[0] - x[1] + 8.0 - 0.75 * (y[2] + y[3]))
    assert math.isclose(out[4 + 3], -6.0 * y[4] * (y[5] - y[2]) - 3.0 * y[3] + 0.75 * x[1])


@pytest.mark.parametrize("sites,forcing,published", [(40, 8.0, 1.68), (20, 10.0, 2.09)])
def test_lorenz96_largest_exponent(sites, forcing, published):
    g = make(Lorenz96, sites=sites, forcing=[forcing, forcing])
    found = largest_exponent(flow_step(g, 0.02, parameters(g)), g.initial_states(list(range(48))), 500, 2000, 0.02)
    assert math.isclose(found, published, rel_tol=0.03), found


# Double pendulum

BODY = {"mass1": [1.3, 1.3], "mass2": [0.7, 0.7], "length1": [0.9, 0.9], "length2": [1.2, 1.2], "form": "angles"}


def test_double_pendulum_conserves_energy_with_order_four():
    g = make(DoublePendulum, **BODY)
    p, x0 = parameters(g), g.initial_states([0, 1, 2])
    drift = []
    for dt in (0.008, 0.004, 0.002):
        x = rk4(lambda x: g.rhs(x, p), x0, dt, round(1.6 / dt), 1, 1)[:, 0]
        drift.append(float((g.energy(x, p) - g.energy(x0, p)).abs().max()))
    assert drift[-1] < 1e-6 and all(p > 3.7 for p in order(drift)), drift


def test_double_pendulum_obeys_the_euler_lagrange_equations():
    """d/dt dL/d omega = dL/d theta with L = T - V = 2 T - energy, by automatic differentiation."""
    g = make(DoublePendulum, **BODY)
    p, x = parameters(g), vector(0.8, -1.9, 1.1, -0.4)
    zero_g = make(DoublePendulum, **BODY, gravity=0.0)

    def lagrangian(state: torch.Tensor) -> torch.Tensor:
        return 2 * zero_g.energy(state, p) - g.energy(state, p)

    slope = torch.autograd.functional.jacobian(lagrangian, x)
    momentum_rate = torch.autograd.functional.hessian(lagrangian, x)[2:] @ g.rhs(x, p)
    torch.testing.assert_close(momentum_rate, slope[:2], rtol=1e-10, atol=1e-10)


def test_double_pendulum_small_oscillations():
    """Equal masses and lengths: squared frequencies (g / l) (2 -+ sqrt 2)."""
    g = make(DoublePendulum, form="angles")
    values = sorted_eigenvalues(jacobian(lambda x: g.rhs(x, parameters(g)), torch.zeros(4, dtype=torch.float64)))
    found = sorted(v.imag**2 for v in values.tolist())
    low, high = 9.81 * (2 - math.sqrt(2)), 9.81 * (2 + math.sqrt(2))
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, [low, low, high, high], strict=True))


def test_double_pendulum_forms_agree():
    angles, circle = make(DoublePendulum, form="angles").group(0), make(DoublePendulum).group(0)
    assert angles.shape == (4, 20, 4) and circle.shape == (4, 20, 6)
    a = torch.from_numpy(angles)
    expected = [a[..., 0].cos(), a[..., 0].sin(), a[..., 1].cos(), a[..., 1].sin(), a[..., 2], a[..., 3]]
    torch.testing.assert_close(torch.from_numpy(circle), torch.stack(expected, -1))
