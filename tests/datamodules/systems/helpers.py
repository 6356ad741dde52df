"""What several of these tests measure: Jacobians, Lyapunov exponents, and a generator at its default parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from datamodules.simulators.integrators import rk4_step

Step = Callable[[Tensor], Tensor]
SIZES = {"train": 4, "validation": 2, "test": 2, "batch": 4, "frames": 20}


def make(cls: type, seed: int = 0, shard_bytes: int = 10**7, **config: Any) -> Any:
    """A small generator of a class."""
    return cls(cls.config_class(**{**SIZES, **config}), seed, shard_bytes)


def parameters(generator: Any, count: int = 1) -> dict[str, Tensor]:
    """The drawn parameters of the first trajectories, [count] each; without axes for one."""
    p = generator.parameters(generator.seeds(0, count))
    return {name: value[0] for name, value in p.items()} if count == 1 else p


def jacobian(f: Step, x: Tensor) -> Tensor:
    """df/dx [C, C] at x [C]."""
    return torch.autograd.functional.jacobian(f, x)


def sorted_eigenvalues(matrix: Tensor) -> Tensor:
    """Complex eigenvalues in the order of (real, imaginary) rounded to 6 digits."""
    values = torch.linalg.eigvals(matrix).tolist()
    return torch.tensor(sorted(values, key=lambda v: (round(v.real, 6), round(v.imag, 6))))


def flow_step(generator: Any, dt: float, p: dict[str, Tensor]) -> Step:
    """One RK4 step of a generator's equation; parameters without axes."""
    return lambda x: rk4_step(lambda y: generator.rhs(y, p), x, dt)


def largest_exponent(step: Step, x: Tensor, transient: int, steps: int, dt: float = 1.0) -> float:
    """Largest Lyapunov exponent by Benettin's two trajectories, renormalised each step; mean over the rows of x [B, C]."""
    for _ in range(transient):
        x = step(x)
    generator, size = torch.Generator().manual_seed(0), 1e-8
    apart = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    apart = size * apart / apart.norm(dim=-1, keepdim=True)
    total = 0.0
    for i in range(steps + 50):
        x, other = step(torch.cat([x, x + apart])).chunk(2)
        apart = other - x
        norm = apart.norm(dim=-1, keepdim=True)
        if i >= 50:  # the first steps turn the difference into the fastest direction
            total += float(torch.log(norm / size).mean())
        apart = apart * (size / norm)
    return total / (steps * dt)


def order(errors: list[float]) -> list[float]:
    """Orders of convergence between errors at halved steps."""
    return [math.log2(a / b) for a, b in pairwise(errors)]
