"""Limiters, ghost cells, and time steps of a trajectory's own."""

from __future__ import annotations

import pytest
import torch

from datamodules.simulators.compressible_flow_2d import IdealGas
from datamodules.simulators.finite_volume import LIMITERS, FiniteVolumes, padder
from datamodules.simulators.shallow_water_2d import ShallowWater


@pytest.mark.parametrize("name", LIMITERS)
def test_limiters_keep_straight_lines_and_make_no_new_extremum(name):
    limiter, generator = LIMITERS[name], torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1000, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(limiter(a, a), a)
    slope = limiter(a, b)
    torch.testing.assert_close(slope, limiter(b, a))
    assert (slope[a * b <= 0] == 0).all() and (slope[a * b > 0] * a[a * b > 0] > 0).all()
    assert (slope.abs() <= 2 * torch.minimum(a.abs(), b.abs()) + 1e-15).all()
    assert limiter(torch.zeros(1), torch.zeros(1)) == 0


def test_limiters_in_the_order_of_their_sharpness():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.5])
    slopes = [LIMITERS[name](a, b) for name in ("minmod", "van_leer", "mc")]
    torch.testing.assert_close(slopes, [torch.tensor(s) for s in ([1.0, 2.0], [1.5, 20 / 9], [2.0, 2.25])])


def test_ghost_cells():
    w = torch.arange(12.0).reshape(1, 1, 3, 4)
    torch.testing.assert_close(padder("periodic")(w, 2, 1)[0, 0, 0], torch.tensor([2.0, 3, 0, 1, 2, 3, 0, 1]))
    torch.testing.assert_close(padder("outflow")(w, 2, 0)[0, 0, :, 0], torch.tensor([0.0, 0, 0, 4, 8, 8, 8]))


def random_state(channels: int, batch: int = 2, n: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    w = 0.3 * torch.randn(batch, channels, n, n, dtype=torch.float64, generator=generator)
    w[:, [0, -1] if channels == 4 else [0]] = w[:, [0, -1] if channels == 4 else [0]].exp()
    return w


LAWS = {
    "water": (ShallowWater(2.0), 3),
    "gas": (IdealGas(1.4), 4),
    "viscous": (IdealGas(1.4, torch.full((2, 1, 1), 0.01, dtype=torch.float64)), 4),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_flux_between_equal_states_is_the_flux(name):
    """Consistency, and mirror images: F(l, r) = -F(r, l mirrored) but for the momentum along the axis."""
    law, channels = LAWS[name]
    w = random_state(channels)
    q = law.conserved(w)
    torch.testing.assert_close(law.primitive(q), w)
    pressure = w[:, 3] if channels == 4 else 0.5 * 2.0 * w[:, 0].square()
    for axis in (0, 1):
        exact = q * w[:, 1 + axis : 2 + axis]
        exact[:, 1 + axis] += pressure
        if channels == 4:
            exact[:, 3] += pressure * w[:, 1 + axis]
        torch.testing.assert_close(law.flux(w, w, axis), exact)
        left, right = w, w.roll(1, -1)
        sign = torch.ones(channels, 1, 1).double()
        sign[1 + axis] = -1
        torch.testing.assert_close(law.flux(left, right, axis), -sign * law.flux(sign * right, sign * left, axis))


@pytest.mark.parametrize("name", LAWS)
def test_x_and_y_are_alike(name):
    law, channels = LAWS[name]
    volumes = FiniteVolumes(law, (0.1, 0.1), "periodic", "mc", 0.4)
    q = law.conserved(random_state(channels))
    swapped = [0, 2, 1, 3][:channels]
    turned = volumes.tendency(q.transpose(-1, -2)[:, swapped]).transpose(-1, -2)[:, swapped]
    torch.testing.assert_close(turned, volumes.tendency(q), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_sums_are_conserved_to_rounding(name):
    law, channels = LAWS[name]
    volumes = FiniteVolumes(law, (0.1, 0.1), "periodic", "minmod", 0.4)
    q = law.conserved(random_state(channels))
    later = volumes.advance(q, 0.5)
    assert (later - q).abs().max() > 0.1
    assert (later.mean((-2, -1)) - q.mean((-2, -1))).abs().max() < 1e-14


def test_a_trajectory_does_not_wait_for_its_neighbours():
    law, channels = LAWS["water"]
    volumes = FiniteVolumes(law, (0.1, 0.1), "periodic", "mc", 0.4)
    w = random_state(channels)
    w[1, 1:] *= 9  # takes many more steps
    together = volumes.run(w, 0.1, 3)
    for i in (0, 1):
        torch.testing.assert_close(volumes.run(w[i : i + 1], 0.1, 3)[0], together[i], rtol=1e-12, atol=1e-13)


def test_a_solution_that_blows_up_ends():
    law, channels = LAWS["water"]
    w = random_state(channels)
    w[0, 1, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"cfl=0.4: the solution became non-finite or too fast; use a smaller cfl"):
        FiniteVolumes(law, (0.1, 0.1), "periodic", "mc", 0.4).run(w, 0.1, 2)
