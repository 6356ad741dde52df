"""Fourth-order exponential time differencing for u_t = L u + N(u) with diagonal L.

Cox and Matthews (J. Comput. Phys. 176, 2002) with the coefficients of Kassam and Trefethen (SIAM J. Sci. Comput. 26,
2005): each is the mean of an entire function over a circle around dt L, which avoids the cancellation near 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

CONTOUR_POINTS = 64


class ETDRK4:
    """Time steps of modes under a diagonal linear part.

    Args:
        linear: L, real or complex double, of any shape that broadcasts against the state (a batch of viscosities, say).
        nonlinear: N, from state to tendency, both complex.
        dt: step.

    The full circle is used: that of half the points with the real part taken holds for real L only, and gives wrong
    coefficients for dispersive terms such as i k^3.
    """

    def __init__(self, linear: Tensor, nonlinear: Callable[[Tensor], Tensor], dt: float) -> None:
        self.nonlinear, self.dt = nonlinear, dt
        z0 = dt * linear.to(torch.complex128)
        stage, now, middle, end = (torch.zeros_like(z0) for _ in range(4))
        for point in range(CONTOUR_POINTS):
            angle = 2 * math.pi * (point + 0.5) / CONTOUR_POINTS
            z = z0 + complex(math.cos(angle), math.sin(angle))
            e, cubed = torch.exp(z), z**3
            stage += (torch.exp(z / 2) - 1) / z
            now += (-4 - z + e * (4 - 3 * z + z**2)) / cubed
            middle += (2 + z + e * (z - 2)) / cubed
            end += (-4 - 3 * z - z**2 + e * (4 - z)) / cubed
        coefficients = [dt / CONTOUR_POINTS * total for total in (stage, now, middle, end)]
        coefficients += [torch.exp(z0), torch.exp(z0 / 2)]
        if not linear.is_complex():  # real coefficients: half the work, and no imaginary rounding
            coefficients = [value.real for value in coefficients]
        self.stage, self.now, self.middle, self.end, self.whole, self.half = coefficients

    def step(self, v: Tensor) -> Tensor:
        """The state after one more step."""
        n_v = self.nonlinear(v)
        kept = self.half * v
        a = kept + self.stage * n_v
        n_a = self.nonlinear(a)
        b = kept + self.stage * n_a
        n_b = self.nonlinear(b)
        c = self.half * a + self.stage * (2 * n_b - n_v)
        n_c = self.nonlinear(c)
        return self.whole * v + self.now * n_v + 2 * self.middle * (n_a + n_b) + self.end * n_c

    def frames(self, v: Tensor, first: int, every: int, count: int) -> list[Tensor]:
        """`count` states: the first after `first` steps from v, then one each `every` steps."""
        out = []
        for frame in range(count):
            for _ in range(first if frame == 0 else every):
                v = self.step(v)
            out.append(v)
        return out
