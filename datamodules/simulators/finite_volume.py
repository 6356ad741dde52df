"""Second-order finite volumes for 2D conservation laws q_t + F(q)_x + G(q)_y = 0 on a uniform grid.

MUSCL: primitive variables are extended linearly within each cell with limited slopes (van Leer, J. Comput. Phys. 32, 1979), a
Riemann solver gives the flux through each face, Heun's method (strong-stability preserving) steps in time. What leaves a cell
enters its neighbour, so that the sums of q change through the boundary alone.

Legend of shapes: B trajectories, C variables, N x M cells. Every trajectory has its own time step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

BOUNDARIES = ("periodic", "outflow")
MOST_STEPS = 1e6


def minmod(a: Tensor, b: Tensor) -> Tensor:
    """The smaller of two slopes of one sign, else 0: the most diffusive."""
    return 0.5 * (torch.sign(a) + torch.sign(b)) * torch.minimum(a.abs(), b.abs())


def monotonized_central(a: Tensor, b: Tensor) -> Tensor:
    """The mean slope, at most twice either: the sharpest."""
    return minmod(0.5 * (a + b), 2 * minmod(a, b))


def van_leer(a: Tensor, b: Tensor) -> Tensor:
    """The harmonic mean of slopes of one sign, else 0."""
    product = a * b
    return torch.where(product > 0, 2 * product / torch.where(product > 0, a + b, 1.0), 0.0)


LIMITERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minmod": minmod,
    "mc": monotonized_central,
    "van_leer": van_leer,
}


class Law(Protocol):
    """A system of conservation laws; channel 1 + axis is the momentum, or velocity, along that axis."""

    def primitive(self, q: Tensor) -> Tensor:
        """Primitive from conserved variables, [B, C, N, M]."""
        ...

    def conserved(self, w: Tensor) -> Tensor:
        """The inverse of `primitive`."""
        ...

    def flux(self, left: Tensor, right: Tensor, axis: int) -> Tensor:
        """Flux along an axis through faces with these primitive states on both sides."""
        ...

    def rate(self, w: Tensor, spacing: tuple[float, float]) -> Tensor:
        """Crossings of a cell per unit of time, summed over axes and processes, [B, N, M]."""
        ...

    def diffusive_flux(self, w: Tensor, axis: int, spacing: tuple[float, float], pad: Pad) -> Tensor | None:
        """Flux of diffusion through the faces along an axis, one more than there are cells; None if there is none."""
        ...


Pad = Callable[[Tensor, int, int], Tensor]


def padder(boundary: str) -> Pad:
    """`pad(w, cells, axis)`: w with ghost cells at both ends of an axis (0: x, 1: y)."""

    def pad(w: Tensor, cells: int, axis: int) -> Tensor:
        dim, n = axis - 2, w.shape[axis - 2]
        if boundary == "periodic":
            before, after = w.narrow(dim, n - cells, cells), w.narrow(dim, 0, cells)
        else:
            before, after = (w.narrow(dim, at, 1).repeat_interleave(cells, dim) for at in (0, n - 1))
        return torch.cat([before, w, after], dim)

    return pad


class FiniteVolumes:
    """Advances conserved variables [B, C, N, M] of a law.

    Args:
        spacing: of the cells along x and y. boundary: one of BOUNDARIES. limiter: one of LIMITERS.
        cfl: share of the time in which the fastest wave crosses a cell; at most 0.5 keeps the scheme stable.
    """

    def __init__(self, law: Law, spacing: tuple[float, float], boundary: str, limiter: str, cfl: float) -> None:
        self.law, self.spacing, self.cfl = law, spacing, cfl
        self.limiter, self.pad = LIMITERS[limiter], padder(boundary)

    def tendency(self, q: Tensor) -> Tensor:
        """q_t, [B, C, N, M]."""
        w, total = self.law.primitive(q), torch.zeros_like(q)
        for axis in (0, 1):
            dim = axis - 2
            wide = self.pad(w, 2, axis)
            steps = wide.diff(dim=dim)
            cells = w.shape[dim] + 2  # with one ghost cell at each end
            half = 0.5 * self.limiter(steps.narrow(dim, 0, cells), steps.narrow(dim, 1, cells))
            inner = wide.narrow(dim, 1, cells)
            left, right = (inner + half).narrow(dim, 0, cells - 1), (inner - half).narrow(dim, 1, cells - 1)
            flux = self.law.flux(left, right, axis)
            diffusion = self.law.diffusive_flux(w, axis, self.spacing, self.pad)
            if diffusion is not None:
                flux = flux + diffusion
            total -= flux.diff(dim=dim) / self.spacing[axis]
        return total

    def advance(self, q: Tensor, interval: float) -> Tensor:
        """q after an interval of time; ValueError if that takes too many steps, as when a solution blows up."""
        left = torch.full((len(q),), interval, dtype=q.dtype, device=q.device)
        while (left > 0).any():
            fastest = self.law.rate(self.law.primitive(q), self.spacing).amax((-2, -1))
            steps = torch.ceil(left * fastest / self.cfl).clamp_min(1.0)
            if not (steps < MOST_STEPS).all():
                raise ValueError(f"cfl={self.cfl}: the solution became non-finite or too fast; use a smaller cfl")
            dt = left / steps
            left = left - dt
            dt = dt[:, None, None, None]  # 0 for trajectories that are there already
            first = q + dt * self.tendency(q)
            q = 0.5 * (q + first + dt * self.tendency(first))
        return q

    def run(self, w: Tensor, interval: float, frames: int) -> Tensor:
        """Frames [B, frames, C, N, M] of primitive variables from w [B, C, N, M], one each `interval`."""
        q, out = self.law.conserved(w), [w]
        for _ in range(frames - 1):
            q = self.advance(q, interval)
            out.append(self.law.primitive(q))
        return torch.stack(out, 1)
