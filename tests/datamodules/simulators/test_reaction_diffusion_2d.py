"""Reaction and diffusion against plane waves and the limit cycle, order of time stepping, boundedness, rotation."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from datamodules.simulators.reaction_diffusion_2d import ReactionDiffusion2D, ReactionDiffusion2DConfig, SpiralSolver
from tests.datamodules.simulators.checks import orders

LENGTH = 20.0


def solver(n: int, dt: float, diffusion: tuple[float, float] = (0.1, 0.1), beta: float = 1.0) -> SpiralSolver:
    d = torch.tensor(diffusion, dtype=torch.float64)[None, :, None, None]
    return SpiralSolver(n, LENGTH, d, torch.tensor([[[beta]]], dtype=torch.float64), dt)


def test_plane_waves_keep_their_amplitude_and_frequency():
    """A e^(i (k . x - beta A^2 t)) with A^2 = 1 - D |k|^2; a wave of two directions sees both derivatives."""
    n, beta, d, time = 32, 0.7, 0.1, 4.0
    x = LENGTH / n * torch.arange(n, dtype=torch.float64)
    phase = 2 * math.pi / LENGTH * (2 * x[:, None] - 3 * x)
    amplitude2 = 1 - d * (2 * math.pi / LENGTH) ** 2 * 13

    def wave(t: float) -> torch.Tensor:
        now = phase - beta * amplitude2 * t
        return math.sqrt(amplitude2) * torch.stack([torch.cos(now), torch.sin(now)])[None]

    errors = []
    for steps in (20, 40, 80):
        found = solver(n, time / steps, (d, d), beta).run(wave(0.0), steps, 1, 1)[:, 0]
        errors.append(float((found - wave(time)).abs().max()))
    assert errors[-1] < 1e-6 and min(orders(errors)) > 3.6


def test_the_reaction_runs_to_its_limit_cycle():
    """Without gradients r' = r (1 - r^2), theta' = -beta r^2: r^2 = 1 / (1 + (1/r0^2 - 1) e^(-2t))."""
    beta, time, r0 = 1.3, 2.0, 0.2
    state = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    state[:, 0] = r0
    u, v = solver(8, 0.02, beta=beta).run(state, round(time / 0.02), 1, 1)[0, 0, :, 3, 4]
    r2 = 1 / (1 + (1 / r0**2 - 1) * math.exp(-2 * time))
    turned = 0.5 * beta * math.log(r0**2 * math.exp(2 * time) + 1 - r0**2)
    assert math.isclose(u, math.sqrt(r2) * math.cos(turned), rel_tol=1e-7)
    assert math.isclose(v, -math.sqrt(r2) * math.sin(turned), rel_tol=1e-7)


CONFIG = ReactionDiffusion2DConfig(resolution=48, train=2, validation=0, test=0, batch=2, frames=5, dt_save=2.0)


def test_spirals_are_of_fourth_order_in_time():
    generator = ReactionDiffusion2D(CONFIG, 0, 1 << 20)
    start = torch.from_numpy(generator.group(0))[:1, 1]  # smooth by then
    ends = [solver(48, 2.0 / steps, (0.05, 0.2)).run(start, steps, 1, 1) for steps in (20, 40, 80, 160)]
    errors = [float((a - b).abs().max()) for a, b in pairwise(ends)]
    assert min(orders(errors)) > 3.6 and errors[-1] < 1e-6


@pytest.mark.parametrize("regime", [{}, {"diffusion_u": [0.03, 0.03], "diffusion_v": [0.2, 0.2], "beta": [0.65, 0.65]}])
def test_the_state_stays_bounded(regime):
    """The reaction points inwards where r > 1, so that the mean of u^2 + v^2 never much exceeds 1."""
    fields = ReactionDiffusion2D(replace(CONFIG, frames=21, **regime), 0, 1 << 20).group(0)
    mean = np.square(fields).sum(2).mean((-2, -1))
    assert mean.max() < 1.05 and mean[:, -1].min() > 0.5
    assert np.square(fields[:, 5:]).sum(2).max() < 1.1


def test_arms_are_the_winding_number_at_the_centre():
    for arms in (1, 2, 3):
        config = replace(CONFIG, arms=[arms, arms], offset=0.0, noise=0.0, train=1)
        state = ReactionDiffusion2D(config, 3, 1 << 20)._spiral(3).numpy()
        angle = 2 * np.pi * np.arange(64) / 64
        i, j = (np.round(24 + 5 * f(angle)).astype(int) for f in (np.cos, np.sin))
        theta = np.unwrap(np.arctan2(state[1, i, j], state[0, i, j]))
        assert round((theta[-1] - theta[0]) / (2 * np.pi)) == arms


@pytest.mark.parametrize(
    "change,message",
    [
        ({"resolution": 7}, "resolution=7"),
        ({"diffusion_u": [0.0, 1.0]}, "diffusion_u"),
        ({"arms": [0, 1]}, r"arms=\[0, 1\]: must be positive"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"dt_save": 0.51}, "dt_save=0.51"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
