"""Time integration of batches of ordinary differential equations x' = f(x), on any device and dtype.

`rk4`: the classical method of order 4 with a fixed step. `dopri5`: Dormand and Prince's pair of order 5(4) (J. Comput. Appl.
Math. 6, 1980) with one step size per row, so that a row does not depend on the others. Legend: B rows, C components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Rhs = Callable[[Tensor], Tensor]  # [B, C] -> [B, C]

# Rows of the tableau of Dormand and Prince; the last row is the solution of order 5 (its slope is the next first one).
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # order 5 minus order 4


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values, made once for each device: a copy from the host in each step would hold up a GPU."""
    with torch.inference_mode(False):  # of use outside of it, too
        return torch.tensor(values, dtype=dtype, device=device)


def rk4_step(f: Rhs, x: Tensor, dt: float) -> Tensor:
    """x after one step of the classical Runge-Kutta method."""
    k1 = f(x)
    k2 = f(x + (0.5 * dt) * k1)
    k3 = f(x + (0.5 * dt) * k2)
    k4 = f(x + dt * k3)
    return x + (dt / 6) * (k1 + 2 * (k2 + k3) + k4)


def rk4(f: Rhs, x: Tensor, dt: float, first: int, every: int, frames: int) -> Tensor:
    """States [B, frames, C] from x [B, C]: the first after `first` steps dt, then one each `every` steps."""
    return iterate(lambda state: rk4_step(f, state, dt), x, first, every, frames)


def iterate(step: Rhs, x: Tensor, first: int, every: int, frames: int) -> Tensor:
    """States [B, frames, C] of a map from x [B, C]: the first after `first` iterations, then one each `every`."""
    out = []
    for frame in range(frames):
        for _ in range(first if frame == 0 else every):
            x = step(x)
        out.append(x)
    return torch.stack(out, dim=1)


def dopri5_step(f: Rhs, x: Tensor, slope: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step h [B, 1] from x with slope f(x): the new x, its slope, and the estimated error, each [B, C]."""
    slopes = torch.empty(len(ERROR), *x.shape, dtype=x.dtype, device=x.device)
    slopes[0] = slope
    new = x
    for i, row in enumerate(STAGES, 1):
        new = x + h * _weighted(row, slopes)
        slopes[i] = f(new)
    return new, slopes[-1], h * _weighted(ERROR, slopes)


def dopri5(
    f: Rhs,
    x: Tensor,
    times: Sequence[float],
    rtol: float = 1e-9,
    atol: float = 1e-9,
    bound: float = float("inf"),
    max_steps: int = 100_000,
) -> Tensor:
    """States [B, len(times), C] at ascending times >= 0 from x [B, C] at time 0.

    Steps end on the times asked for. A row is given up, and NaN from there on, when it becomes non-finite, when a component
    exceeds `bound`, or when it takes `max_steps` steps between two times.
    """
    slope = f(x)
    scale = atol + rtol * x.abs()
    h = 0.01 * _norm(x / scale).clamp_min(1e-5) / _norm(slope / scale).clamp_min(1e-300)
    alive = torch.ones_like(h, dtype=torch.bool)
    out, now = [], 0.0
    for time in times:
        left = alive * torch.full_like(h, time - now)
        for _ in range(max_steps):
            if not (left > 0).any():
                break
            last = h >= left
            used = torch.where(last, left, h)
            new, new_slope, error = dopri5_step(f, x, slope, used)
            size = _norm(error / (atol + rtol * torch.maximum(x.abs(), new.abs())))
            bad = ~torch.isfinite(size)
            accepted = (size <= 1) & (left > 0)
            x, slope = torch.where(accepted, new, x), torch.where(accepted, new_slope, slope)
            left = torch.where(accepted, torch.where(last, 0.0, left - used), left)
            factor = torch.where(bad, 0.2, (0.9 * size.clamp_min(1e-10) ** -0.2).clamp(0.2, 5.0))
            # A step that was cut at a time to save says nothing against the longer one that was planned.
            grown = used * factor
            h = torch.where(left > 0, grown, torch.where(accepted & last, torch.maximum(h, grown), h))
            alive = alive & (x.abs().amax(-1, keepdim=True) <= bound) & ((h > 1e-12 * time) | (left <= 0))
            left = torch.where(alive, left, 0.0)
        alive = alive & (left <= 0)
        now = time
        out.append(torch.where(alive, x, torch.nan))
    return torch.stack(out, dim=1)


def _weighted(weights: tuple[float, ...], slopes: Tensor) -> Tensor:
    """Sum of the first slopes [S, B, C] with these weights, [B, C]."""
    w = constant(weights, slopes.dtype, slopes.device)
    return (w[:, None, None] * slopes[: len(weights)]).sum(0)


def _norm(x: Tensor) -> Tensor:
    """Root mean square over components, [B, 1]."""
    return x.square().mean(-1, keepdim=True).sqrt()
