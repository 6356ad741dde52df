"""Exponential time differencing, and Burgers, Kuramoto-Sivashinsky and Korteweg-de Vries on it."""

from __future__ import annotations

import cmath
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from datamodules.simulators.burgers_1d import burgers_solver
from datamodules.simulators.convection_1d import angular_wavenumbers
from datamodules.simulators.etdrk4 import ETDRK4
from datamodules.simulators.korteweg_de_vries_1d import korteweg_de_vries_solver
from datamodules.simulators.kuramoto_sivashinsky_1d import kuramoto_sivashinsky_solver
from datamodules.simulators.random_fields import gaussian_random_line, random_sines
from tests.datamodules.simulators.checks import orders

TWO_PI = 2 * math.pi


def unit(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float64) / n


# Exponential time differencing


@pytest.mark.parametrize("z", [0.0, -1e-9, -1e-3, -0.5, -40.0, 1e-6j, 0.3j, 3j, 200j])
def test_coefficients_are_their_power_series_or_closed_forms(z):
    """Near 0 the closed forms lose all digits; the series of phi_1, phi_2, phi_3 do not."""
    phi = []
    for order in (1, 2, 3):
        if abs(z) < 1:
            phi.append(sum(z**j / math.factorial(j + order) for j in range(20)))
        else:
            rest = cmath.exp(z) - sum(z**j / math.factorial(j) for j in range(order))
            phi.append(rest / z**order)
    phi_1, phi_2, phi_3 = phi
    linear = torch.tensor([z], dtype=torch.complex128 if isinstance(z, complex) else torch.float64)
    etd = ETDRK4(linear, lambda v: v, 1.0)
    assert etd.now.is_complex() == isinstance(z, complex)
    for found, expected in (
        (etd.now, phi_1 - 3 * phi_2 + 4 * phi_3),
        (etd.middle, phi_2 - 2 * phi_3),
        (etd.end, 4 * phi_3 - phi_2),
    ):
        assert abs(complex(found[0]) - expected) < 2e-14 * max(1.0, abs(expected))


@pytest.mark.parametrize("linear", [-2.0, 2.0j, -6.0])
def test_order_of_time_stepping(linear):
    """The logistic equation v' = L v - v^2."""
    start, time = 0.5, 1.0
    growth = cmath.exp(linear * time)
    exact = linear * start * growth / (linear + start * (growth - 1))
    errors = []
    for steps in (20, 40, 80):
        dtype = torch.complex128 if isinstance(linear, complex) else torch.float64
        etd = ETDRK4(torch.tensor([linear], dtype=dtype), lambda v: -v.square(), time / steps)
        found = etd.frames(torch.tensor([start], dtype=torch.complex128), steps, 1, 1)[0]
        errors.append(float((found - exact).abs() / abs(exact)))
    assert errors[-1] < 1e-5 and min(orders(errors)) > 3.7


# Random states


def test_random_lines_have_the_spread_of_the_benchmark():
    lines = torch.stack([gaussian_random_line(128, 2.0, 5.0, 25.0, seed) for seed in range(600)])
    k = torch.arange(1, 2000, dtype=torch.float64)
    expected = math.sqrt(2 * 625 * ((4 * math.pi**2 * k**2 + 25) ** -2).sum())
    assert math.isclose(expected, 0.594, abs_tol=3e-3)
    assert math.isclose(lines.square().mean().sqrt(), expected, rel_tol=0.06)
    assert lines.mean(-1).abs().max() < 1e-15
    fine = gaussian_random_line(1024, 2.0, 5.0, 25.0, 7)
    spectrum = torch.fft.rfft(fine, norm="forward")[:64]
    torch.testing.assert_close(torch.fft.rfft(lines[7], norm="forward")[:64], spectrum, rtol=1e-9, atol=1e-15)


# Burgers


def cole_hopf(x: torch.Tensor, t: float, nu: float) -> torch.Tensor:
    """u = -2 nu phi_x / phi with phi = 2 + cos(2 pi x) e^(-4 pi^2 nu t), which solves the heat equation."""
    decay = math.exp(-(TWO_PI**2) * nu * t)
    return 2 * nu * TWO_PI * decay * torch.sin(TWO_PI * x) / (2 + decay * torch.cos(TWO_PI * x))


def test_burgers_against_the_cole_hopf_solution():
    nu, time, x = torch.tensor([[0.02], [0.2]], dtype=torch.float64), 1.0, unit(128)
    u0 = torch.stack([cole_hopf(x, 0.0, float(v)) for v in nu])
    exact = torch.stack([cole_hopf(x, time, float(v)) for v in nu])
    errors = []
    for steps in (25, 50, 100):
        found = burgers_solver(128, nu, time / steps).run(u0, steps, 1, 1)[:, 0]
        errors.append(float((found - exact).abs().max()))
    assert errors[-1] < 1e-8 and min(orders(errors)) > 3.5


def test_burgers_conserves_the_mean_and_loses_energy_as_it_must():
    """d/dt mean u^2 / 2 = -nu mean u_x^2, whatever the convection does."""
    nu, dt = 0.01, 1e-3
    u0 = gaussian_random_line(256, 2.0, 5.0, 25.0, 1)[None] + 0.3
    u = burgers_solver(256, torch.tensor([[nu]], dtype=torch.float64), dt).run(u0, 200, 1, 3)[0]
    assert (u.mean(-1) - u0.mean()).abs().max() < 1e-15
    energy = 0.5 * u.square().mean(-1)
    k = angular_wavenumbers(256, 1.0)
    u_x = torch.fft.irfft(1j * k * torch.fft.rfft(u[1]), n=256)
    slope = float(energy[2] - energy[0]) / (2 * dt)
    assert math.isclose(slope, -nu * float(u_x.square().mean()), rel_tol=1e-4)


# Kuramoto-Sivashinsky


def test_kuramoto_sivashinsky_is_of_fourth_order_and_conserves_the_mean():
    n, length = 64, 16 * math.pi
    x = length * unit(n)
    u0 = (torch.cos(2 * x / 16) * (1 + torch.sin(2 * x / 16)) + 0.1)[None]
    runs = [
        kuramoto_sivashinsky_solver(n, length, 3.0 / steps).run(u0, steps, 1, 1)[0, 0] for steps in (40, 80, 160, 320)
    ]
    errors = [float((coarse - fine).abs().max()) for coarse, fine in pairwise(runs)]
    assert min(orders(errors)) > 3.5 and errors[-1] < 1e-8
    assert (runs[0].mean() - u0.mean()).abs() < 1e-14


def test_kuramoto_sivashinsky_grows_by_its_dispersion_relation():
    """A small wave of number k grows at k^2 - k^4."""
    n, length, time = 64, 16 * math.pi, 5.0
    solver = kuramoto_sivashinsky_solver(n, length, 0.25)
    for mode in (4, 6, 9):
        k = mode / 8
        found = solver.run(1e-8 * torch.cos(k * length * unit(n))[None], 20, 1, 1).abs().max()
        assert math.isclose(float(found), 1e-8 * math.exp((k**2 - k**4) * time), rel_tol=1e-6)


def test_kuramoto_sivashinsky_chaos():
    """On the attractor u has rms 1.3; two nearby states part at the largest Lyapunov exponent, about 0.09."""
    n, length = 128, 32 * math.pi
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    u0 = torch.stack([torch.rand(n, generator=g, dtype=torch.float64) - 0.5 for g in generators])
    u0 = u0 - u0.mean(-1, keepdim=True)
    solver = kuramoto_sivashinsky_solver(n, length, 0.25)
    base = solver.run(u0, 800, 4, 60)
    assert 1.1 < base.std() < 1.5
    near = solver.run(base[:, 0] + 1e-9 * torch.sin(TWO_PI * 5 * unit(n)), 0, 4, 200)
    far = solver.run(base[:, 0], 0, 4, 200)
    gap = (near - far).square().mean(-1).sqrt().log().mean(0)
    assert 0.06 < float(gap[140] - gap[20]) / 120 < 0.13


# Korteweg-de Vries


def soliton(x: torch.Tensor, t: float, c: float, length: float, convection: float) -> torch.Tensor:
    """(3 c / convection) sech^2(sqrt(c) (x - c t) / 2), wrapped to the interval centred at 0."""
    away = (x - c * t + length / 2) % length - length / 2
    return 3 * c / convection / torch.cosh(math.sqrt(c) / 2 * away).square()


def test_korteweg_de_vries_against_the_soliton():
    n, length, time = 256, 32.0, 2.0
    x = length * (unit(n) - 0.5)
    cases = [(4.0, 6.0), (1.5, 1.0)]
    u0 = torch.stack([soliton(x, 0.0, c, length, a) for c, a in cases])
    exact = torch.stack([soliton(x, time, c, length, a) for c, a in cases])
    convection = torch.tensor([[a] for _, a in cases], dtype=torch.float64)
    errors = []
    for steps in (250, 500, 1000):
        found = korteweg_de_vries_solver(n, length, convection, time / steps).run(u0, steps, 1, 1)[:, 0]
        errors.append(float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max()))
    # The tail of the slower soliton at the ends of the interval, e^-19 of its height, limits the last one.
    assert errors[1] < 1e-5 and min(orders(errors)) > 3.5


def test_korteweg_de_vries_conserves_mass_momentum_and_energy():
    n, length = 128, 64.0
    u0 = torch.stack([random_sines(n, 10, 3, np.random.default_rng(seed)) for seed in range(3)])
    convection = torch.ones(3, 1, dtype=torch.float64)
    u = korteweg_de_vries_solver(n, length, convection, 0.02).run(u0, 0, 500, 5)
    k = angular_wavenumbers(n, length)
    u_x = torch.fft.irfft(1j * k * torch.fft.rfft(u), n=n)
    mass, momentum, energy = u.mean(-1), u.square().mean(-1), (u_x.square() - u**3 / 3).mean(-1)
    assert (mass - mass[:, :1]).abs().max() < 1e-15
    assert (momentum / momentum[:, :1] - 1).abs().max() < 1e-6
    assert (energy - energy[:, :1]).abs().max() < 1e-5 * u.pow(3).abs().mean()
