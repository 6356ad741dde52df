"""Shallow water: Stoker's dam break, a simple wave, conserved mass, symmetry of the radial dam."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.simulators.finite_volume import FiniteVolumes
from datamodules.simulators.shallow_water_2d import ShallowWater, ShallowWater2D, ShallowWater2DConfig
from tests.datamodules.simulators.checks import bisect, orders

G = 1.0


def stoker(x: np.ndarray, t: float, h_l: float, h_r: float) -> tuple[np.ndarray, np.ndarray]:
    """Height and velocity of the dam break of Stoker (1957), the dam at x = 0: a rarefaction and a bore."""
    c_l = math.sqrt(G * h_l)

    def velocity_behind_bore(h: float) -> float:
        return (h - h_r) * math.sqrt(0.5 * G * (1 / h + 1 / h_r))

    h_m = bisect(lambda h: velocity_behind_bore(h) - 2 * (c_l - math.sqrt(G * h)), h_r, h_l)
    u_m, c_m = velocity_behind_bore(h_m), math.sqrt(G * h_m)
    bore = h_m * u_m / (h_m - h_r)
    xi = x / t
    fan = (2 * c_l - xi) / 3  # the speed of sound inside the rarefaction
    regions = [xi < -c_l, xi < u_m - c_m, xi < bore]
    return np.select(regions, [h_l, fan**2 / G, h_m], h_r), np.select(regions, [0.0, 2 * (xi + c_l) / 3, u_m], 0.0)


@pytest.mark.parametrize("axis", [0, 1])
def test_dam_break_against_stoker(axis):
    errors, time = [], 1.0
    for n in (100, 200, 400):
        spacing = 6.0 / n
        x = spacing * (np.arange(n) + 0.5) - 3.0
        h = torch.from_numpy(np.where(x < 0, 2.0, 1.0))[None, :].expand(4, n)
        w = torch.stack([h, 0 * h, 0 * h])[None]
        w = w if axis == 1 else w.transpose(-1, -2)
        solver = FiniteVolumes(ShallowWater(G), (spacing, spacing), "outflow", "minmod", 0.4)
        found = solver.run(w.contiguous(), time, 2)[0, 1]
        line = (found[:, 0] if axis == 1 else found[:, :, 0]).numpy()
        height, velocity = stoker(x, time, 2.0, 1.0)
        errors.append(np.abs(line[0] - height).mean() + np.abs(line[1 + axis] - velocity).mean())
        assert np.abs(line[2 - axis]).max() < 1e-14
    # First order at jumps is all that a shock-capturing scheme has.
    assert min(orders(errors)) > 0.85 and errors[-1] < 5e-3


@pytest.mark.parametrize("limiter,least", [("minmod", 1.6), ("mc", 1.85), ("van_leer", 1.85)])
def test_order_on_a_simple_wave(limiter, least):
    """With u - 2 c constant, c is carried at u + c = 3 c - 2: an exact solution until it breaks."""
    time, errors = 0.2, []

    def start(x: np.ndarray) -> np.ndarray:
        return 1 + 0.1 * np.sin(2 * np.pi * x)

    for n in (32, 64, 128):
        x = (np.arange(n) + 0.5) / n
        c = start(x)
        for _ in range(200):  # a contraction while the wave has not broken
            c = start(x - (3 * c - 2) * time)
        states = []
        for now in (start(x), c):
            profile = torch.from_numpy(np.stack([now**2, 2 * (now - 1), 0 * now]))
            states.append(profile[None, :, :, None].expand(1, 3, n, 4).contiguous())
        solver = FiniteVolumes(ShallowWater(G), (1 / n, 1 / n), "periodic", limiter, 0.4)
        errors.append(float((solver.run(states[0], time, 2)[:, 1] - states[1]).abs().mean()))
    assert orders(errors)[-1] > least, errors


CONFIG = ShallowWater2DConfig(resolution=48, train=3, validation=0, test=0, batch=3, frames=5, dt_save=0.2)


@pytest.mark.parametrize("change", [{"frames": 3}, {"boundary": "periodic", "offset": 0.4, "frames": 9}])
def test_mass_is_conserved(change):
    """Without a wall: for ever on a torus; with outflow until the first trace of the bore arrives."""
    height = ShallowWater2D(replace(CONFIG, **change), 0, 1 << 20).group(0)[:, :, 0]
    mass = height.mean((-2, -1))
    assert np.abs(mass / mass[:, :1] - 1).max() < 1e-12
    assert height.min() > 0 and np.ptp(height[:, -1]) > 0.05


def test_water_leaves_through_an_open_boundary():
    config = replace(CONFIG, resolution=24, frames=2, dt_save=20.0)
    last = ShallowWater2D(config, 0, 1 << 20).group(0)[:, -1]
    assert np.abs(last[:, 0] - 1).max() < 0.02 and np.abs(last[:, 1:]).max() < 0.02


def test_a_dam_in_the_middle_stays_symmetric():
    h, u, v = np.moveaxis(ShallowWater2D(CONFIG, 0, 1 << 20).group(0)[:, -1], 1, 0)
    np.testing.assert_allclose(h, h.swapaxes(-1, -2), rtol=0, atol=1e-12)
    np.testing.assert_allclose(h, h[:, ::-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(u, v.swapaxes(-1, -2), rtol=0, atol=1e-12)
    np.testing.assert_allclose(u, -u[:, ::-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(v, v[:, ::-1], rtol=0, atol=1e-12)


def test_columns_have_the_drawn_radius_and_height():
    generator = ShallowWater2D(replace(CONFIG, inner_height=[1.5, 3.0], resolution=64), 0, 1 << 20)
    states = generator.group(0)
    for seed, state in zip(generator.seeds(0, len(states)), states, strict=True):
        radius, inner = generator.draw("radius", seed), generator.draw("inner_height", seed)
        volume = (state[0, 0] - 1).mean() * 25
        assert math.isclose(volume, math.pi * radius**2 * (inner - 1), rel_tol=0.01)
        assert math.isclose(state[0, 0].max(), inner) and not state[0, 1:].any()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"resolution": 11}, "resolution=11"),
        ({"outer_height": 0.0}, "outer_height=0.0: must be positive"),
        ({"radius": [0.0, 0.5]}, "radius"),
        ({"boundary": "wall"}, "boundary='wall'"),
        ({"limiter": "superbee"}, "limiter='superbee': unknown; use one of minmod, mc, van_leer"),
        ({"cfl": 0.9}, "cfl=0.9: unstable; use at most 0.5"),
        ({"offset": 0.6}, "offset=0.6"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
