"""The stochastic shell model: energy, its balance under both kinds of noise, and orders of convergence."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

from datamodules.simulators.dyadic_shell import DyadicShell, rotate

from .helpers import make, order, parameters

OFF = {"viscosity": [0.0, 0.0], "additive": [0.0, 0.0], "transport": [0.0, 0.0], "burn_in": 0.0}


def energy(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x.square().sum(-1)


def run(g: DyadicShell, x: torch.Tensor, steps: int) -> torch.Tensor:
    """The state after so many steps from x [B, N]."""
    seeds = list(range(len(x)))
    return next(islice(g.steps(x, parameters(g, len(x)), seeds), steps - 1, None))


def start(count: int = 3, shells: int = 6) -> torch.Tensor:
    return 0.5 * torch.randn(count, shells, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_convection_by_hand_and_its_energy():
    g = make(DyadicShell, shells=4, ratio=2.0, k0=3.0, beta=1.5, convection=0.5)
    x = torch.tensor([0.3, -0.7, 1.1, 0.4], dtype=torch.float64)
    k = [0.5 * (3.0 * 2.0**n) ** 1.5 for n in range(4)]
    low = [0.0, k[0] * 0.09, k[1] * 0.49, k[2] * 1.21]
    high = [k[0] * 0.3 * -0.7, k[1] * -0.7 * 1.1, k[2] * 1.1 * 0.4, 0.0]
    expected = torch.tensor([a - b for a, b in zip(low, high, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(g.convection(x), expected)
    many = start(50, 4)
    flow = (many * g.convection(many)).sum(1)
    assert flow.abs().max() < 1e-13 * g.convection(many).abs().max()


def test_energy_is_conserved_without_noise_and_viscosity():
    """RK4 loses energy at order 5 of the step, so order 4 and more in total."""
    drift = []
    for steps in (20, 40, 80):
        g = make(DyadicShell, shells=6, dt=1.0 / steps, dt_save=1.0, **OFF)
        drift.append(float((energy(run(g, start(), steps)) / energy(start()) - 1).abs().max()))
    assert drift[-1] < 1e-4 and all(p > 3.7 for p in order(drift)), drift


def test_viscosity_alone_is_exact():
    g = make(DyadicShell, shells=6, convection=0.0, **{**OFF, "viscosity": [0.01, 0.01]})
    k = torch.tensor([2.0**n for n in range(6)], dtype=torch.float64)
    found = run(g, start(), 40)  # to t = 0.1
    torch.testing.assert_close(found, start() * torch.exp(-0.01 * k.square() * 0.1), rtol=1e-11, atol=0)


def test_splitting_has_order_two():
    g = [
        make(DyadicShell, shells=5, dt=1 / n, dt_save=1.0, **{**OFF, "viscosity": [0.02, 0.02]})
        for n in (32, 64, 128, 512)
    ]
    ends = [run(each, start(3, 5), round(1 / each.config.dt)) for each in g]
    errors = [float((end - ends[-1]).norm()) for end in ends[:-1]]
    assert all(abs(p - 2) < 0.3 for p in order(errors)), errors


def test_additive_noise_alone_is_the_ornstein_uhlenbeck_process():
    """Variance a^2 (1 - exp(-2 nu k^2 t)) / (2 nu k^2), also for steps longer than the decay."""
    g = make(DyadicShell, shells=3, forced=3, convection=0.0, dt=0.25, dt_save=0.25,
             **{**OFF, "viscosity": [0.5, 0.5], "additive": [0.6, 0.6]})  # fmt: skip
    found = run(g, torch.zeros(6000, 3, dtype=torch.float64), 4).var(0)
    rate = 0.5 * torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)
    torch.testing.assert_close(found, 0.36 * (1 - torch.exp(-2 * rate)) / (2 * rate), rtol=0.06, atol=0)


def test_mean_energy_balance_with_additive_noise():
    """Mean of energy(t) - energy(0) + nu int sum k^2 x^2 = forced a^2 t / 2 (Ito's formula)."""
    g = make(DyadicShell, shells=5, forced=2, dt=0.01, dt_save=0.01,
             **{**OFF, "viscosity": [0.02, 0.02], "additive": [0.4, 0.4]})  # fmt: skip
    count, steps = 3000, 100
    x0 = start(1, 5).repeat(count, 1)
    k2 = torch.tensor([4.0**n for n in range(5)], dtype=torch.float64)
    lost, previous = torch.zeros(count, dtype=torch.float64), x0
    for x in islice(g.steps(x0, parameters(g, count), list(range(count))), steps):
        lost += 0.5 * 0.01 * 0.02 * (k2 * (x.square() + previous.square())).sum(1)
        previous = x
    balance = energy(previous) - energy(x0) + lost
    error = float(balance.std()) / math.sqrt(count)
    assert abs(float(balance.mean()) - 2 * 0.16 / 2) < 3 * error and error < 0.01


def test_transport_noise_conserves_the_energy_of_each_path():
    """To rounding without convection, to the order of RK4 with it; and it does move energy."""
    noisy = {**OFF, "transport": [0.2, 0.2]}
    still = run(make(DyadicShell, shells=6, convection=0.0, **noisy), start(), 200)
    torch.testing.assert_close(energy(still), energy(start()), rtol=1e-13, atol=0)
    assert (still - start()).abs().max() > 0.1
    moving = run(make(DyadicShell, shells=6, **noisy), start(), 200)
    torch.testing.assert_close(energy(moving), energy(start()), rtol=1e-6, atol=0)


def test_transport_noise_is_stratonovichs():
    """Its Ito drift: without convection the mean of x_n decays as exp(-s^2 (k_n^2 + k_(n-1)^2) t / 2)."""
    g = make(DyadicShell, shells=4, convection=0.0, dt=0.01, dt_save=0.01, **{**OFF, "transport": [0.25, 0.25]})
    x0 = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64).repeat(4000, 1)
    found = run(g, x0, 50)
    k2 = [1.0, 4.0, 16.0]
    rates = torch.tensor([k2[0], k2[0] + k2[1], k2[1] + k2[2], k2[2]], dtype=torch.float64)
    expected = x0[0] * torch.exp(-0.5 * 0.0625 * rates * 0.5)
    error = found.std(0) / math.sqrt(4000)
    assert ((found.mean(0) - expected).abs() < 3.5 * error).all()
    assert ((x0[0] - expected).abs()[1:] > 6 * error[1:]).all()  # an Ito scheme, whose mean stays, would be found out


def test_rotations_undo_each_other():
    x, angles = start(4, 5), start(4, 4)
    torch.testing.assert_close(rotate(rotate(x, angles, False), -angles, True), x, rtol=0, atol=1e-15)
    one = rotate(x, torch.tensor([[0.0, 0.3, 0.0, 0.0]], dtype=torch.float64).repeat(4, 1), False)
    torch.testing.assert_close(one[:, 1], math.cos(0.3) * x[:, 1] - math.sin(0.3) * x[:, 2])
    torch.testing.assert_close(one[:, 2], math.sin(0.3) * x[:, 1] + math.cos(0.3) * x[:, 2])


def test_noise_comes_from_the_trajectorys_own_seed():
    first, later = make(DyadicShell, burn_in=0.5), make(DyadicShell, seed=2, burn_in=0.5)
    a, b = first.solve([0, 1, 2, 3]), later.solve([2, 3, 4, 5])
    torch.testing.assert_close(a[2:], b[:2], rtol=1e-12, atol=0)
    assert (a[0] - a[1]).abs().max() > 0.05


@pytest.mark.parametrize(
    "change,message",
    [
        ({"shells": 2}, "shells=2"),
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"forced": 13}, "forced=13: must be from 0 to shells=12"),
        ({"viscosity": [-1.0, 1.0]}, r"viscosity=\[-1.0, 1.0\]: must be >= 0"),
        ({"dt_save": 0.0011}, "dt_save=0.0011: must be a whole number"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(DyadicShell, **change)
