"""Advection against a shifted closed form."""

from __future__ import annotations

import math

import numpy as np
import torch

from datamodules.simulators.advection_1d import Advection1D, Advection1DConfig, shifted


def test_a_profile_moves_at_its_speed():
    def profile(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(torch.sin(2 * math.pi * x)) + 0.2 * torch.cos(6 * math.pi * x)

    x, distance = torch.arange(64, dtype=torch.float64) / 64, torch.tensor([[0.0, 0.1234, 2.5]], dtype=torch.float64)
    found = shifted(profile(x)[None], distance)[0]
    for moved, by in zip(found, distance[0], strict=True):
        torch.testing.assert_close(moved, profile(x - by), rtol=0, atol=1e-13)


def test_trajectories_move_at_the_speed_that_is_stored():
    config = Advection1DConfig(resolution=32, frames=5, dt_save=0.25, train=8, validation=0, test=0, speed=[-1.0, 1.0])
    generator = Advection1D(config, seed=5, shard_bytes=2**20)
    fields, speed = generator.values("fields", 0), generator.values("speed", 0)
    k = 2 * np.pi * np.arange(17)
    for i in range(8):
        for frame in range(5):
            moved = np.fft.irfft(np.fft.rfft(fields[i, 0, 0]) * np.exp(-1j * k * speed[i] * 0.25 * frame), 32)
            np.testing.assert_allclose(fields[i, frame, 0], moved, rtol=0, atol=2e-6)
    assert (speed < 0).any() and (speed > 0).any()
