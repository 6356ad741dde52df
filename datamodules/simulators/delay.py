"""Delay equations x'(t) = f(x(t), x(t - tau), t) of one component, with a constant past, by the classical Runge-Kutta method.

The delay is a whole number of steps, so that the kinks at 0, tau, 2 tau, ... fall between steps; half-way through a step the past
is a cubic Hermite interpolant of values and slopes. The error is of order 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


class DelaySolution:
    """The solution from time 0 to `end`; call it with times in [-inf, end].

    Args:
        f: right-hand side of (x(t), x(t - tau), t). past: x(t) for t <= 0. step: time step at most, cut to a part of tau.
    """

    def __init__(
        self, f: Callable[[float, float, float], float], past: float, tau: float, end: float, step: float
    ) -> None:
        lag = math.ceil(tau / step)
        h = self.step = tau / lag
        x, slope = [past], [float(f(past, past, 0.0))]
        for j in range(math.ceil(end / h)):
            now, t, i = x[j], j * h, j - lag
            middle = after = past
            if i >= 0:
                after = x[i + 1]
                middle = 0.5 * (x[i] + after) + h / 8 * (slope[i] - slope[i + 1])
            k1 = slope[j]
            k2 = f(now + 0.5 * h * k1, middle, t + 0.5 * h)
            k3 = f(now + 0.5 * h * k2, middle, t + 0.5 * h)
            k4 = f(now + h * k3, after, t + h)
            x.append(now + h / 6 * float(k1 + 2 * (k2 + k3) + k4))
            slope.append(float(f(x[-1], after, t + h)))
        self.x, self.slope = np.array(x), np.array(slope)

    def __call__(self, times: np.ndarray) -> np.ndarray:
        """x at these times, of their shape."""
        place = np.maximum(times, 0.0) / self.step
        i = np.minimum(place.astype(int), len(self.x) - 2)
        u = place - i
        start, stop = self.x[i], self.x[i + 1]
        rise, first, last = stop - start, self.step * self.slope[i], self.step * self.slope[i + 1]
        return np.asarray(start + u * (first + u * (3 * rise - 2 * first - last + u * (first + last - 2 * rise))))
