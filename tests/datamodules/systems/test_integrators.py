"""Integrators against closed forms and against each other."""

from __future__ import annotations

import math

import pytest
import torch

from datamodules.simulators.integrators import ERROR, STAGES, dopri5, dopri5_step, iterate, rk4
from datamodules.simulators.lorenz63 import Lorenz63

from .helpers import make, order, parameters

X0 = torch.tensor([[1.0, 0.0], [0.3, -0.7]], dtype=torch.float64)


def pendulum(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[..., 1], -torch.sin(x[..., 0])], -1)


def test_rk4_has_order_four():
    """Against the exact solution of x' = -x^3 + ..., here the logistic equation."""
    x0, t = torch.tensor([[0.1]], dtype=torch.float64), 4.0
    exact = 1 / (1 + 9 * math.exp(-t))
    errors = [abs(float(rk4(lambda x: x * (1 - x), x0, t / n, n, 1, 1)) - exact) for n in (10, 20, 40, 80)]
    assert errors[-1] < 1e-6 and all(abs(p - 4) < 0.3 for p in order(errors)), errors


def test_rk4_on_a_linear_equation_is_taylors_polynomial():
    z = -0.3
    found = rk4(lambda x: z * x, torch.ones(1, 1, dtype=torch.float64), 1.0, 1, 1, 1)
    assert math.isclose(float(found), 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24, rel_tol=1e-15)


def test_tableau_of_dormand_and_prince():
    """Consistency of each stage, and orders 5 and 4 of the two solutions from the error of one step."""
    nodes = [1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
    assert all(math.isclose(sum(row), node, rel_tol=1e-13) for row, node in zip(STAGES, nodes, strict=True))
    assert abs(sum(ERROR)) < 1e-15
    exact = {h: dopri5(pendulum, X0, [h], 1e-14, 1e-14)[:, 0] for h in (0.4, 0.2, 0.1)}
    fifth, fourth = [], []
    for h, end in exact.items():
        new, slope, error = dopri5_step(pendulum, X0, pendulum(X0), torch.full((2, 1), h, dtype=torch.float64))
        torch.testing.assert_close(slope, pendulum(new), rtol=0, atol=1e-15)
        fifth.append(float((new - end).norm()))
        fourth.append(float((new - error - end).norm()))
    assert all(abs(p - 6) < 0.5 for p in order(fifth)), fifth
    assert all(abs(p - 5) < 0.5 for p in order(fourth)), fourth


@pytest.mark.parametrize("tolerance", [1e-5, 1e-8, 1e-11])
def test_adaptive_error_follows_the_tolerance(tolerance):
    """The harmonic oscillator over ten periods."""
    times = [0.0, 0.5, 1.0, 20 * math.pi]
    found = dopri5(lambda x: torch.stack([x[:, 1], -x[:, 0]], -1), X0, times, tolerance, tolerance)
    for i, t in enumerate(times):
        c, s = math.cos(t), math.sin(t)
        exact = torch.stack([c * X0[:, 0] + s * X0[:, 1], c * X0[:, 1] - s * X0[:, 0]], -1)
        error = float((found[:, i] - exact).abs().max())
        assert error <= 200 * tolerance and (t == 0.0) == (error == 0.0), (t, error)


def test_the_two_integrators_agree_on_a_chaotic_system():
    generator = make(Lorenz63)
    p, x0 = parameters(generator), generator.initial_states([0, 1])
    fixed = rk4(lambda x: generator.rhs(x, p), x0, 1e-3, 0, 500, 5)
    adaptive = dopri5(lambda x: generator.rhs(x, p), x0, [0.0, 0.5, 1.0, 1.5, 2.0])
    torch.testing.assert_close(fixed, adaptive, rtol=0, atol=1e-6)


def test_a_row_does_not_depend_on_the_others():
    """Also not on one that needs steps a thousand times smaller."""
    rate = torch.tensor([1.0, 3000.0, 2.0], dtype=torch.float64)[:, None]
    x0, times = torch.tensor([[1.0], [1.0], [0.5]], dtype=torch.float64), [0.3, 1.0]
    together = dopri5(lambda x: -rate * x, x0, times, 1e-6, 1e-6)
    alone = torch.cat([dopri5(lambda x, i=i: -rate[i] * x, x0[i : i + 1], times, 1e-6, 1e-6) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        together[0, :, 0], torch.exp(-torch.tensor(times, dtype=torch.float64)), rtol=1e-5, atol=0
    )


def test_runaway_rows_are_given_up_and_the_others_finished():
    """x' = x^2 from 1 is infinite at t = 1, from -1 it is -1 / (1 + t)."""
    x0 = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    found = dopri5(lambda x: x.square(), x0, [0.5, 2.0], 1e-8, 1e-8, bound=1e6)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([2.0, -2 / 3], dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.isnan(found[0, 1]) and math.isclose(float(found[1, 1]), -1 / 3, rel_tol=1e-6)
    assert torch.isnan(dopri5(lambda x: x.square(), x0, [2.0], 1e-8, 1e-8)[0]).all()
    assert torch.isnan(dopri5(lambda x: -1e4 * x, x0, [1.0], 1e-6, 1e-6, max_steps=50)).all()


def test_iterates_are_counted():
    found = iterate(lambda x: x + 1, torch.zeros(1, 1), 3, 2, 4)
    assert found[0, :, 0].tolist() == [3, 5, 7, 9]
