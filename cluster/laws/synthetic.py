"""Runs made from known laws: what the self-test and the tests fit."""

from __future__ import annotations

import numpy as np

from cluster.laws.optimise import Array
from cluster.laws.records import Runs, of_columns

# Constants near those published for language models (arXiv:2203.15556).
TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
ASYMMETRIC = {"E": 1.69, "A": 2000.0, "B": 100.0, "alpha": 0.465, "beta": 0.155}


def loss_of(n: Array, d: Array, truth: dict[str, float] | None = None) -> Array:
    """Loss of E + A/N^alpha + B/D^beta."""
    t = truth or TRUTH
    return np.asarray(t["E"] + t["A"] * n ** -t["alpha"] + t["B"] * d ** -t["beta"])


def ladder(sigma: float = 0.0, seed: int = 0, truth: dict[str, float] | None = None) -> Runs:
    """Nine sizes by eight budgets, ratios D/N from 0.3 to 2000; log losses with noise `sigma`."""
    n, c = (
        axis.ravel() for axis in np.meshgrid(np.geomspace(5e7, 1e10, 9), np.geomspace(6e18, 3e21, 8), indexing="ij")
    )
    d = c / (6 * n)
    kept = (d / n > 0.3) & (d / n < 2000)
    n, d, c = n[kept], d[kept], c[kept]
    noise = np.random.default_rng(seed).standard_normal(len(n))
    return of_columns(n=n, d=d, c=c, loss=loss_of(n, d, truth) * np.exp(sigma * noise))


def isoflops(factor: float, truth: dict[str, float] | None = None, sizes: int = 15, shift: float = 1.0) -> Runs:
    """Five budgets, each with `sizes` sizes from 1/factor to `factor` times the best one (times `shift`)."""
    from cluster.laws.allocation import allocate

    rows = []
    for c in np.geomspace(1e18, 1e22, 5):
        centre = allocate(truth or TRUTH, float(c)).n * shift
        rows += [(n, c / (6 * n), c) for n in centre * np.geomspace(1 / factor, factor, sizes)]
    n, d, c = np.array(rows).T
    return of_columns(n=n, d=d, c=c, loss=loss_of(n, d, truth))


def rate_curves(slope: float, widths: tuple[int, ...] = (64, 128, 256, 512), diverge_at: float = 0.3) -> Runs:
    """Losses over learning rates whose optimum goes as width^slope; rates far above it diverge (NaN)."""
    rows = []
    for width in widths:
        best = 4e-3 * (width / widths[0]) ** slope
        floor = 3.0 * (width / widths[0]) ** -0.05
        for lr in 2.0 ** np.arange(-13, -3):
            far = np.log(lr / best)
            loss = np.nan if lr > best * 8 or lr > diverge_at else floor * np.exp(0.02 * far**2)
            rows.append((width, lr, loss, 2 if np.isnan(loss) else 0))
    width, lr, loss, bad = np.array(rows).T
    runs = of_columns(width=width, lr=lr, loss=loss)
    runs.status = ["diverged" if b else "ok" for b in bad]
    return runs
