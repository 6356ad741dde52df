"""Solvers against closed forms, conservation laws and their own order of convergence."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from datamodules.simulators.fields import trajectory_seed
from datamodules.simulators.navier_stokes_2d import NavierStokes2D, NavierStokes2DConfig, Solver
from datamodules.simulators.random_fields import gaussian_random_field

TWO_PI = 2 * math.pi


def grid(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(n, dtype=torch.float64) / n
    return x[:, None], x[None, :]


def random_vorticity(n: int, count: int = 2) -> torch.Tensor:
    """Smooth fields strong enough for convection to matter within a unit of time."""
    return 8 * torch.stack([gaussian_random_field(n, 3.5, 7.0, seed) for seed in range(count)])


def advance(solver: Solver, w: torch.Tensor, steps: int) -> torch.Tensor:
    return solver.run(w, steps, 1, 1)[:, 0]


# Random fields


def test_initial_vorticity_has_the_spread_of_the_benchmark():
    """The benchmark takes the real part of a complex field with i.i.d. noise; its standard deviation is 0.262."""
    n, count, rng = 64, 400, np.random.default_rng(0)
    k = np.fft.fftfreq(n, 1 / n)
    scale = 7.0**1.5 * (4 * np.pi**2 * (k[:, None] ** 2 + k[None, :] ** 2) + 49) ** -1.25
    scale[0, 0] = 0
    noise = rng.standard_normal((count, n, n)) + 1j * rng.standard_normal((count, n, n))
    benchmark = np.fft.ifft2(np.sqrt(2) * scale * noise * n**2).real
    fields = torch.stack([gaussian_random_field(n, 2.5, 7.0, seed) for seed in range(count)])
    expected = math.sqrt(2 * np.square(scale).sum())
    assert math.isclose(expected, 0.262, abs_tol=5e-4)
    assert math.isclose(benchmark.std(), expected, rel_tol=0.04)  # 4 standard errors: few modes carry most of it
    assert math.isclose(fields.square().mean().sqrt(), expected, rel_tol=0.04)
    assert fields.mean((-2, -1)).abs().max() < 1e-15


def test_each_mode_has_its_variance():
    fields = torch.stack([gaussian_random_field(16, 2.5, 7.0, seed) for seed in range(800)])
    modes = torch.fft.fft2(fields, norm="forward").abs().square().mean(0)
    for kx, ky in ((1, 0), (0, 1), (1, 1), (-1, 1), (2, -3), (-4, 0)):
        expected = 2 * 7.0**3 * (4 * math.pi**2 * (kx**2 + ky**2) + 49) ** -2.5
        assert math.isclose(modes[kx, ky], expected, rel_tol=0.15), (kx, ky)


def test_a_seed_is_the_same_field_at_every_resolution():
    coarse, fine = (torch.fft.fft2(gaussian_random_field(n, 2.5, 7.0, 3), norm="forward") for n in (32, 96))
    keep = torch.cat([torch.arange(0, 16), torch.arange(-15, 0)])
    torch.testing.assert_close(coarse[keep][:, keep], fine[keep][:, keep], rtol=1e-10, atol=1e-14)
    assert not torch.equal(gaussian_random_field(32, 2.5, 7.0, 3), gaussian_random_field(32, 2.5, 7.0, 4))


# Space


def test_velocity_has_the_given_curl_and_no_divergence():
    n = 32
    solver, w = Solver(n, 1e-3, "none", 1e-2), random_vorticity(32)
    w = solver.field(solver.transform(w))
    u, v = (torch.fft.fft2(component) for component in solver.velocity(solver.transform(w)))
    k = 1j * TWO_PI * torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    dx, dy = k[:, None], k[None, :]
    torch.testing.assert_close(torch.fft.ifft2(dx * v - dy * u).real, w, rtol=0, atol=1e-12)
    assert torch.fft.ifft2(dx * u + dy * v).abs().max() < 1e-12


def test_convection_against_a_closed_form():
    """Two crossed shear flows of different wave numbers, whose interaction is a product of sines."""
    n, a, b = 32, TWO_PI, 2 * TWO_PI
    x, y = grid(n)
    # psi = cos ax + 0.5 cos by; u = psi_y = -0.5 b sin by; v = -psi_x = a sin ax; w = -lap psi.
    w = a**2 * torch.cos(a * x) + 0.5 * b**2 * torch.cos(b * y)
    u, v = -0.5 * b * torch.sin(b * y), a * torch.sin(a * x)
    w_x, w_y = -(a**3) * torch.sin(a * x), -0.5 * b**3 * torch.sin(b * y)
    expected = -(u * w_x + v * w_y)
    solver = Solver(n, 1e-3, "none", 1e-2)
    found = solver.field(solver.tendency(solver.transform(w[None])))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected.abs().max())


def test_forcing_is_that_of_the_benchmark():
    n = 16
    x, y = grid(n)
    expected = 0.1 * (torch.sin(TWO_PI * (x + y)) + torch.cos(TWO_PI * (x + y)))
    solver = Solver(n, 1e-3, "fno", 1e-2)
    still = torch.zeros(1, n, n // 2 + 1, dtype=torch.complex128)
    torch.testing.assert_close(solver.field(solver.tendency(still))[0], expected, rtol=0, atol=1e-15)


def test_kolmogorov_flow_tends_to_its_laminar_state():
    """f = 4 cos 8 pi y alone drives a shear flow, which convection leaves as it is: w_t = f - nu k^2 w."""
    n, nu, dt, steps, k = 32, 1e-2, 1e-2, 40, 4 * TWO_PI
    _, y = grid(n)
    force = 4 * torch.cos(k * y).expand(n, n)
    for scheme in ("euler", "ab2", "heun"):
        solver = Solver(n, nu, "kolmogorov", dt, scheme)
        found = advance(solver, torch.zeros(1, n, n, dtype=torch.float64), steps)[0]
        laminar = force / (nu * k**2)
        half = 0.5 * nu * k**2 * dt  # Crank-Nicolson's own factor, exactly
        torch.testing.assert_close(found, laminar * (1 - ((1 - half) / (1 + half)) ** steps), rtol=0, atol=1e-12)
        torch.testing.assert_close(found, laminar * (1 - math.exp(-nu * k**2 * dt * steps)), rtol=0, atol=2e-3)
        torch.testing.assert_close(advance(solver, laminar[None], steps)[0], laminar, rtol=0, atol=1e-12)


def test_kolmogorov_flow_balances_its_enstrophy():
    """d/dt <w^2>/2 = <w f> - nu <|grad w|^2>, by Simpson's rule over a convecting flow."""
    n, nu, dt = 32, 1e-3, 1e-3
    solver = Solver(n, nu, "kolmogorov", dt, "heun")
    states = [solver.transform(random_vorticity(n))]
    stepper = solver.steps(states[0])
    states += [next(stepper) for _ in range(200)]
    force = solver.field(solver.forcing[None])
    gain = torch.stack([(solver.field(s) * force).mean((-2, -1)) - 2 * nu * solver.palinstrophy(s) for s in states])
    weights = torch.ones(201, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    found = solver.enstrophy(states[-1]) - solver.enstrophy(states[0])
    torch.testing.assert_close(found, (weights[:, None] * gain).sum(0) * dt / 3, rtol=1e-5, atol=0)


def test_convection_conserves_energy_and_enstrophy():
    """The 2/3 rule removes aliasing: <psi N> = <w N> = 0 to rounding, also for a field with all modes."""
    solver = Solver(32, 1e-3, "none", 1e-2)
    w_hat = solver.transform(torch.randn(2, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    n, w = solver.field(solver.tendency(w_hat)), solver.field(w_hat)
    psi = solver.field(torch.where(solver.laplacian > 0, w_hat / solver.laplacian.clamp_min(1.0), 0.0))
    assert n.abs().max() > 1e-2
    for weight in (w, psi):
        assert (weight * n).mean().abs() < 1e-13 * (weight.std() * n.std())


# Time


@pytest.mark.parametrize("scheme", ["euler", "ab2", "heun"])
def test_taylor_green_vortex_decays_as_it_should(scheme):
    """w = cos 2 pi x cos 2 pi y is steady but for viscosity: w(t) = w(0) exp(-8 pi^2 nu t)."""
    n, nu, dt, steps = 32, 1e-2, 1e-2, 100
    x, y = grid(n)
    w = (torch.cos(TWO_PI * x) * torch.cos(TWO_PI * y))[None]
    found = advance(Solver(n, nu, "none", dt, scheme), w, steps)
    rate = 8 * math.pi**2 * nu
    torch.testing.assert_close(found, w * math.exp(-rate * steps * dt), rtol=0, atol=1e-4)
    half = 0.5 * rate * dt  # Crank-Nicolson's own factor, exactly
    torch.testing.assert_close(found, w * ((1 - half) / (1 + half)) ** steps, rtol=0, atol=1e-13)


def test_enstrophy_decays_by_palinstrophy():
    """Without forcing d/dt <w^2>/2 = -nu <|grad w|^2>, integrated by Simpson's rule over a convecting flow."""
    n, nu, dt = 32, 1e-3, 1e-3
    solver = Solver(n, nu, "none", dt, "heun")
    states = [solver.transform(random_vorticity(n))]
    stepper = solver.steps(states[0])
    states += [next(stepper) for _ in range(200)]
    drop = solver.enstrophy(states[0]) - solver.enstrophy(states[-1])
    p = torch.stack([solver.palinstrophy(state) for state in states])
    weights = torch.ones(201, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    integral = 2 * nu * (weights[:, None] * p).sum(0) * dt / 3
    assert (drop > 0).all()
    torch.testing.assert_close(drop, integral, rtol=1e-6, atol=0)


def test_each_trajectory_has_its_viscosity():
    """Taylor-Green vortices of two viscosities in one batch, each as it is alone."""
    n, dt, steps, nu = 32, 1e-2, 100, torch.tensor([1e-2, 3e-3], dtype=torch.float64)
    x, y = grid(n)
    w = (torch.cos(TWO_PI * x) * torch.cos(TWO_PI * y)).expand(2, n, n)
    found = advance(Solver(n, nu[:, None, None], "none", dt), w, steps)
    half = 0.5 * 8 * math.pi**2 * nu[:, None, None] * dt
    torch.testing.assert_close(found, w * ((1 - half) / (1 + half)) ** steps, rtol=0, atol=1e-13)
    w = random_vorticity(n)
    both = advance(Solver(n, nu[:, None, None], "fno", dt), w, steps)
    for i, one in enumerate(nu.tolist()):
        torch.testing.assert_close(both[i], advance(Solver(n, one, "fno", dt), w, steps)[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme,order", [("euler", 1), ("ab2", 2), ("heun", 2)])
def test_order_of_convergence_in_time(scheme, order):
    n, w = 32, random_vorticity(32)
    exact = advance(Solver(n, 1e-3, "fno", 1 / 3200, "heun"), w, 3200)
    errors = [(advance(Solver(n, 1e-3, "fno", 1 / s, scheme), w, s) - exact).norm() for s in (50, 100, 200)]
    slopes = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(abs(slope - order) < 0.15 for slope in slopes), slopes


def test_flow_is_equivariant_under_translation_by_grid_points():
    w, solver = random_vorticity(32), Solver(32, 1e-3, "none", 1e-2)
    shifted = advance(solver, w.roll((5, 9), (-2, -1)), 30)
    torch.testing.assert_close(shifted, advance(solver, w, 30).roll((5, 9), (-2, -1)), rtol=0, atol=1e-12)


# Generator

TINY = {"resolution": 16, "dt": 0.05, "dt_save": 0.5, "frames": 4, "train": 7, "validation": 2, "test": 1, "batch": 4}


def all_fields(seed: int = 0, shard_bytes: int = 10**6, **changes) -> np.ndarray:
    generator = NavierStokes2D(NavierStokes2DConfig(**{**TINY, **changes}), seed, shard_bytes)
    return np.concatenate([generator.values("fields", k) for k in range(generator.specs()["fields"].shards)])


def test_bits_do_not_depend_on_shards_nor_threads_nor_count():
    whole = all_fields()
    assert whole.shape == (10, 4, 1, 16, 16) and whole.dtype == np.float32
    for shard_bytes in (1, 3 * 4 * 1028, 5 * 4 * 1028):
        np.testing.assert_array_equal(all_fields(shard_bytes=shard_bytes), whole)
    np.testing.assert_array_equal(all_fields(train=10)[:10], whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        np.testing.assert_array_equal(all_fields(), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_range_of_viscosities_is_drawn_and_stored():
    generator = NavierStokes2D(NavierStokes2DConfig(**{**TINY, "viscosity": [1e-4, 1e-2]}), 0, 10**6)
    assert generator.specs()["viscosity"].shape == (10,) and "viscosity" in generator.attributes()["per_trajectory"]
    drawn = generator.values("viscosity", 0)
    assert ((drawn >= 1e-4) & (drawn <= 1e-2)).all() and len(set(drawn.tolist())) == 10
    found = generator.values("fields", 0)
    for i in (0, 5):
        np.testing.assert_allclose(found[i], all_fields(viscosity=float(drawn[i]))[i], rtol=0, atol=1e-6)
    assert np.abs(found[0] - all_fields()[0]).max() > 1e-3


def test_one_viscosity_is_as_before_ranges():
    generator = NavierStokes2D(NavierStokes2DConfig(**TINY), 0, 10**6)
    assert "viscosity" not in generator.specs() and generator.attributes()["per_trajectory"] == {}
    assert generator.attributes()["parameters"] == {"viscosity": 1e-3, "forcing": "fno"}
    assert [f.name for f in fields(generator.config)][-8:] == [
        "resolution", "viscosity", "forcing", "scheme", "dt", "burn_in", "alpha", "tau"
    ]  # fmt: skip  # they identify data sets that were made before
    np.testing.assert_array_equal(all_fields(viscosity=[1e-3, 1e-3]), all_fields())


def test_data_sets_of_other_seeds_share_no_trajectory():
    seeds = [0, 1, 2, 2**32, 2**32 + 1]
    assert len({trajectory_seed(seed, i) for seed in seeds for i in range(100)}) == 500
    both = np.concatenate([all_fields(seed=seed) for seed in (0, 1)])
    assert len(np.unique(both[:, 0].reshape(20, -1), axis=0)) == 20


def test_frames_begin_after_the_burn_in():
    np.testing.assert_allclose(all_fields(burn_in=1.0)[:, 0], all_fields()[:, 2], rtol=0, atol=1e-6)
    first = all_fields()[3, 0, 0]
    solver = Solver(16, 1e-3, "fno", 0.05)
    w0 = gaussian_random_field(16, 2.5, 7.0, trajectory_seed(0, 3))
    np.testing.assert_allclose(first, solver.field(solver.transform(w0[None]))[0], atol=1e-7)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"resolution": 15}, "resolution=15"),
        ({"viscosity": 0.0}, "viscosity=0.0"),
        ({"viscosity": [0.0, 1.0]}, r"viscosity=\[0.0, 1.0\]: must be positive"),
        ({"viscosity": [1.0]}, r"viscosity=\[1.0\]: must be a range"),
        ({"viscosity": "thin"}, "viscosity=thin: must be a number, or a range"),
        ({"forcing": "gravity"}, "forcing='gravity'"),
        ({"scheme": "rk9"}, "scheme='rk9'"),
        ({"dt_save": 0.12}, "dt_save=0.12: must be a whole number of steps"),
        ({"burn_in": 0.12}, "burn_in=0.12"),
        ({"frames": 1}, "frames=1"),
        ({"train": 0}, "train=0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        NavierStokes2DConfig(**{**TINY, **change})


def test_a_step_that_is_too_large_is_told():
    with pytest.raises(ValueError, match=r"dt=20\.0: .*smaller time step"):
        all_fields(dt=20.0, dt_save=2000.0, resolution=32)
