"""What the tests of solvers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise


def orders(errors: Sequence[float]) -> list[float]:
    """Observed orders of convergence from errors at steps h, h/2, h/4, ..."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def bisect(f: Callable[[float], float], low: float, high: float) -> float:
    """A root of a continuous function with f(low) and f(high) of different signs, to rounding."""
    rising = f(high) > f(low)
    for _ in range(200):
        middle = 0.5 * (low + high)
        if (f(middle) < 0) == rising:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
