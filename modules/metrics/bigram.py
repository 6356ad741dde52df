"""A bigram model: what can be had from the previous token alone, as a floor for language models."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modules.metrics.text import bits_per_byte


class Bigram:
    """`P(b | a) = (n_ab + s) / (n_a + s V)` from counted pairs, with additive smoothing s > 0."""

    def __init__(self, vocab_size: int = 256, smoothing: float = 1.0) -> None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size}: must be at least 1")
        if smoothing <= 0:
            raise ValueError(f"smoothing={smoothing}: must be positive, or an unseen pair costs infinitely many bits")
        self.vocab_size = vocab_size
        self.smoothing = smoothing
        self.counts: NDArray[np.int64] = np.zeros((vocab_size, vocab_size), dtype=np.int64)

    def update(self, tokens: ArrayLike) -> None:
        """Count the pairs of a sequence `(L,)` or of separate sequences `(B, L)`; call it once per piece of text.

        Raises ValueError for a token outside the vocabulary.
        """
        self.counts += self._pairs(tokens)

    def nats(self, tokens: ArrayLike) -> tuple[float, int]:
        """(sum of -ln P, number of predicted tokens) of a sequence `(L,)` or of separate sequences `(B, L)`."""
        pairs = self._pairs(tokens)
        total = self.counts.sum(1, keepdims=True) + self.smoothing * self.vocab_size
        return float((pairs * (np.log(total) - np.log(self.counts + self.smoothing))).sum()), int(pairs.sum())

    def bits_per_byte(self, tokens: ArrayLike, bytes_per_token: float = 1.0) -> float:
        """Mean over the predicted tokens, as for a network that sees the same sequences."""
        total, count = self.nats(tokens)
        if count == 0:
            raise ValueError("tokens: at least two in a row are needed to predict one")
        return bits_per_byte(total / count, bytes_per_token)

    def _pairs(self, tokens: ArrayLike) -> NDArray[np.int64]:
        rows = np.atleast_2d(np.asarray(tokens)).astype(np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.vocab_size:
            bad = rows.min() if rows.min() < 0 else rows.max()
            raise ValueError(f"token {bad}: outside the vocabulary of {self.vocab_size}")
        codes = rows[:, :-1] * self.vocab_size + rows[:, 1:]
        counts = np.bincount(codes.ravel(), minlength=self.vocab_size**2)
        return counts.reshape(self.vocab_size, self.vocab_size).astype(np.int64)
