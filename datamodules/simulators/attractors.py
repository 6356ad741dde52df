"""Does a time series look like a chaotic attractor? Tests that reject what is not worth learning.

The selection of Panda (arXiv 2505.13755) in outline: bounded, moving, not on a line, broad-banded, chaotic by the 0-1 test.
All take series [B, T, C] float64 without transient and return one bool per series. They are heuristics, not proofs.
"""

from __future__ import annotations

import numpy as np

LIMIT = 1e4  # of absolute values


def bounded(x: np.ndarray, limit: float = LIMIT, deviations: float = 10.0) -> np.ndarray:
    """Finite, at most `limit`, and within so many standard deviations of the mean."""
    with np.errstate(all="ignore"):
        z = np.abs(x - x.mean(1, keepdims=True)) / np.maximum(x.std(1, keepdims=True), 1e-10)
        return np.isfinite(x).all((1, 2)) & (np.abs(x).max((1, 2)) <= limit) & (z.max((1, 2)) <= deviations)


def moving(x: np.ndarray, tail: float = 0.05, tolerance: float = 1e-3) -> np.ndarray:
    """Not at rest in the last part: increments there exceed `tolerance` of the standard deviation, in every component."""
    last = x[:, -max(3, int(tail * x.shape[1])) :]
    return (np.abs(np.diff(last, axis=1)).max(1) > tolerance * np.maximum(x.std(1), 1e-10)).all(1)


def steady(x: np.ndarray, drift: float = 1.0) -> np.ndarray:
    """The means of the two halves differ by less than `drift` standard deviations in every component."""
    half = x.shape[1] // 2
    return (np.abs(x[:, :half].mean(1) - x[:, half:].mean(1)) < drift * np.maximum(x.std(1), 1e-10)).all(1)


def not_linear(x: np.ndarray, share: float = 0.98) -> np.ndarray:
    """The first principal component of the standardised series has at most this share of the variance."""
    z = (x - x.mean(1, keepdims=True)) / np.maximum(x.std(1, keepdims=True), 1e-10)
    power = np.linalg.svd(z, compute_uv=False) ** 2
    return np.asarray(power[:, 0] <= share * power.sum(1))


def broadband(x: np.ndarray, peaks: int = 3, height: float = 1e-4) -> np.ndarray:
    """The power spectrum of some component has so many local maxima above `height` of its largest value."""
    power = np.abs(np.fft.rfft(x - x.mean(1, keepdims=True), axis=1)) ** 2
    inner = power[:, 1:-1]
    high = (inner > power[:, :-2]) & (inner > power[:, 2:]) & (inner > height * power.max(1, keepdims=True))
    return np.asarray((high.sum(1) >= peaks).any(1))


def zero_one(x: np.ndarray, frequencies: int = 50, seed: int = 0) -> np.ndarray:
    """K of the 0-1 test for chaos, [B, C]: near 0 for regular motion, near 1 for chaos.

    Gottwald and Melbourne (SIAM J. Appl. Dyn. Syst. 8, 2009): the growth of the mean square displacement of
    p(n) = sum_j x_j cos(c j), q(n) = sum_j x_j sin(c j), as correlation with n; median over frequencies c in
    [pi/5, 4 pi/5]. The series is centred, which removes the oscillating term. It must not
    be oversampled: a few values per oscillation.
    """
    b, t, channels = x.shape
    n = t // 10
    if n < 10:
        raise ValueError(f"series of {t} values: the 0-1 test needs at least 100")
    z = (x - x.mean(1, keepdims=True)) / np.maximum(x.std(1, keepdims=True), 1e-10)
    lags = np.arange(1, n + 1)
    found = []
    for c in np.random.default_rng(seed).uniform(np.pi / 5, 4 * np.pi / 5, frequencies):
        path = np.cumsum(z * np.exp(1j * c * np.arange(1, t + 1))[:, None], 1)
        moved = np.stack([np.square(np.abs(path[:, lag : lag + t - n] - path[:, : t - n])).mean(1) for lag in lags])
        found.append(_correlation(lags, moved.reshape(n, -1)))
    return np.median(found, axis=0).reshape(b, channels)


def _correlation(lags: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of each column of values [n, M] with lags [n]."""
    u = lags - lags.mean()
    v = values - values.mean(0)
    return np.asarray(u @ v / np.maximum(np.sqrt(np.square(u).sum() * np.square(v).sum(0)), 1e-300))
