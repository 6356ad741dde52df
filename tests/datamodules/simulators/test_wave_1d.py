"""Waves: d'Alembert's solution, energy, order of time stepping, reflections."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from datamodules.simulators.wave_1d import STABLE, WEIGHTS, Wave1D, Wave1DConfig, WaveSolver
from tests.datamodules.simulators.checks import orders

LENGTH = 16.0


def centres(n: int) -> torch.Tensor:
    return LENGTH / n * (torch.arange(n, dtype=torch.float64) + 0.5)


def pulse(x: torch.Tensor, place: float) -> torch.Tensor:
    away = x - place
    return torch.exp(-(away - LENGTH * torch.round(away / LENGTH)).square())


@pytest.mark.parametrize("boundary,image", [("periodic", 0), ("fixed", -1), ("free", 1)])
def test_dalembert(boundary, image):
    """At constant speed two halves run apart; a fixed end returns one turned over, a free end as it came."""
    n, c, time, steps = 128, 2.0, 4.0, 800
    x, speed = centres(n), torch.full((1, n), c, dtype=torch.float64)
    solver = WaveSolver(speed, LENGTH, boundary, time / steps)
    u0 = pulse(x, 10.0)
    u, _ = solver.run(u0[None], torch.zeros_like(u0)[None], steps, 2)[0, 1]
    if boundary == "periodic":
        moved = pulse(x, 10.0 - c * time), pulse(x, 10.0 + c * time)
    else:  # images at -10 and 22 of 10 and 42, on a circle of twice the length
        signs = (1, 1, image, image)
        moved = [
            sum(
                sign * torch.exp(-(x - y - way * c * time).square())
                for y, sign in zip((10, 42, -10, 22), signs, strict=True)
            )
            for way in (-1, 1)
        ]
    torch.testing.assert_close(u, 0.5 * (moved[0] + moved[1]), rtol=0, atol=3e-7)


def media(n: int, boundary: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config = Wave1DConfig(resolution=n, boundary=boundary, train=2, validation=0, test=0)
    generator = Wave1D(config, 0, 1 << 20)
    speed = torch.from_numpy(np.stack([generator.static_field("speed", seed) for seed in (0, 1)]))
    u = pulse(centres(n), 7.0).expand(2, n)
    return speed, u, torch.zeros_like(u)


@pytest.mark.parametrize("boundary", ["periodic", "fixed", "free"])
def test_energy_is_kept_and_steps_are_of_fourth_order(boundary):
    n, time = 128, 8.0
    speed, u, v = media(n, boundary)
    assert speed.max() / speed.min() > 1.5
    ends, drifts = [], []
    for steps in (400, 800, 1600, 3200):
        solver = WaveSolver(speed, LENGTH, boundary, time / steps)
        states = solver.run(u, v, steps // 8, 9)
        energy = solver.energy(states)
        drifts.append(float((energy / energy[:, :1] - 1).abs().max()))
        ends.append(states[:, -1])
    errors = [float((a - b).abs().max()) for a, b in pairwise(ends)]
    assert min(orders(errors)) > 3.6 and errors[-1] < 1e-5
    assert max(drifts) < 1e-3 and min(orders(drifts)) > 3.6


def test_energy_of_shipped_numbers_does_not_drift():
    config = Wave1DConfig(train=4, validation=0, test=0, batch=4, frames=81)
    generator = Wave1D(config, 0, 1 << 30)
    speed = np.stack([generator.static_field("speed", seed) for seed in generator.seeds(0, 4)])
    solver = WaveSolver(torch.from_numpy(speed), config.length, config.boundary, config.dt)
    energy = solver.energy(torch.from_numpy(generator.group(0)))
    assert (energy / energy[:, :1] - 1).abs().max() < 1e-3


def test_space_converges_with_the_points():
    """The same medium and pulse on 64, 128 and 256 cells; compared where the cells of the finest lie between."""
    found = []
    for n in (64, 128, 256):
        x = centres(n)
        speed = (2 * torch.exp(0.3 * torch.sin(2 * math.pi / LENGTH * x)))[None]
        state = WaveSolver(speed, LENGTH, "periodic", 0.005).run(
            pulse(x, 7.0)[None], torch.zeros(1, n).double(), 400, 2
        )
        modes = torch.fft.rfft(state[0, 1, 0], norm="forward")[:32]
        found.append(modes * torch.exp(-1j * math.pi / n * torch.arange(32).double()))  # first centre at 0
    assert (found[0] - found[2]).abs().max() < 1e-5 and (found[1] - found[2]).abs().max() < 1e-10


def test_the_limit_of_stability():
    """One step for u'' = -w^2 u has a matrix with |trace| <= 2 exactly while it is stable."""

    def trace(z: float) -> float:
        step = np.eye(2)
        for h in np.array(WEIGHTS) * z:
            drift = np.array([[1, h / 2], [0, 1]])
            step = drift @ np.array([[1, 0], [-h, 1]]) @ drift @ step
        return abs(np.trace(step))

    assert all(trace(z) <= 2 + 1e-12 for z in np.linspace(0.01, STABLE, 200))
    assert trace(1.01 * STABLE) > 2


def test_pulses_move_one_way():
    config = Wave1DConfig(contrast=0.0, train=6, validation=0, test=0, batch=6, frames=5)
    generator = Wave1D(config, 0, 1 << 20)
    fields = generator.group(0)
    np.testing.assert_allclose(generator.static_field("speed", 0), 2.0)
    cells = round(config.mean_speed * config.dt_save * config.resolution / config.length)
    ways = set()
    for states in fields:
        gaps = {way: np.abs(np.roll(states[0, 0], way * 4 * cells) - states[4, 0]).max() for way in (-1, 1)}
        ways.add(min(gaps, key=gaps.get))
        assert min(gaps.values()) < 1e-4
    assert ways == {-1, 1}
