"""Critical batch size: from steps against batch at one loss, or from gradient norms at two batch sizes.

McCandlish et al., arXiv:1812.06162. Batches are in samples (or tokens); the critical size comes in the same unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.laws.optimise import Array


@dataclass
class CriticalBatch:
    """S = steps (1 + critical/B): `steps` as the batch grows without end, `critical` where the second term equals one."""

    critical: float
    steps: float
    interval: tuple[float, float]
    warnings: list[str]

    @property
    def samples(self) -> float:
        """Samples needed as the batch shrinks."""
        return self.critical * self.steps


def from_steps(batch: Array, steps: Array) -> CriticalBatch:
    """Fits steps to one target loss against batch size; relative errors count alike.

    Raises:
        ValueError: fewer than three batch sizes, values that are not positive, or a fit without a critical size (steps do
            not fall with the batch as the law says).
    """
    b, s = np.asarray(batch, dtype=float), np.asarray(steps, dtype=float)
    if len(np.unique(b)) < 3:
        raise ValueError(f"{len(np.unique(b))} batch sizes: a critical one needs at least three")
    if not ((b > 0).all() and (s > 0).all() and np.isfinite(s).all()):
        raise ValueError("batch sizes and steps must be positive numbers")
    design = np.stack([np.ones_like(b), 1 / b], axis=1) / s[:, None]
    solution, *_ = np.linalg.lstsq(design, np.ones_like(s), rcond=None)
    least, slope = (float(v) for v in solution)
    if least <= 0 or slope <= 0:
        raise ValueError(
            "steps do not follow S = S_min (1 + B_crit/B): with a schedule of fixed length or decay they may not; "
            "measure with a constant rate"
        )
    critical = slope / least
    half = math.inf
    rest = design @ solution - 1
    if len(b) > 2:
        cov = np.linalg.inv(design.T @ design) * float(rest @ rest) / (len(b) - 2)
        grad = np.array([-1 / least, 1 / slope])
        half = 1.96 * math.sqrt(max(float(grad @ cov @ grad), 0.0))
    warnings = []
    if not b.min() <= critical <= b.max():
        warnings.append(f"the critical batch {critical:.3g} lies outside those tried ({b.min():g} to {b.max():g})")
    return CriticalBatch(critical, least, (critical * math.exp(-half), critical * math.exp(half)), warnings)


def from_gradients(
    batches: tuple[float, float], small: Array, large: Array, draws: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """The simple noise scale of steps with their |gradient|^2 at two batch sizes; and its 95% interval over resampled steps.

    Raises:
        ValueError: as `noise_scale`; norms that are not positive.
    """
    if not ((small > 0).all() and (large > 0).all() and np.isfinite(small + large).all()):
        raise ValueError("squared gradient norms must be positive numbers")
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        picks = rng.integers(0, len(small), len(small))
        signal, noise = _parts((batches[0], float(small[picks].mean())), (batches[1], float(large[picks].mean())))
        found.append(noise / signal if signal > 0 else math.inf)
    low, high = np.quantile(found, [0.025, 0.975], method="nearest")
    value = noise_scale((batches[0], float(small.mean())), (batches[1], float(large.mean())))
    return value, (max(float(low), 0.0), float(high))


def noise_scale(small: tuple[float, float], large: tuple[float, float]) -> float:
    """Simple noise scale tr(Sigma)/|G|^2 from mean squared gradient norms at two batch sizes.

    Args:
        small, large: (batch size, mean of |gradient|^2); average each over steps before dividing, as a ratio of noisy
            numbers is biased. Ranks of a data-parallel run give the small one for free.

    Raises:
        ValueError: equal batch sizes, or norms that are all noise (no positive |G|^2).
    """
    (b_s, g_s), (b_l, g_l) = small, large
    if not 0 < b_s < b_l:
        raise ValueError(f"batch sizes {b_s:g} and {b_l:g}: the second must be larger")
    signal, noise = _parts(small, large)
    if signal <= 0 or noise < 0:
        raise ValueError(
            f"the gradient norms {g_s:.4g} and {g_l:.4g} show no signal above their noise: average over more steps"
        )
    return noise / signal


def _parts(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """|G|^2 and tr(Sigma)."""
    (b_s, g_s), (b_l, g_l) = small, large
    return (b_l * g_l - b_s * g_s) / (b_l - b_s), (g_s - g_l) / (1 / b_s - 1 / b_l)
