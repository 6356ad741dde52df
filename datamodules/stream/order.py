"""The order of a stream: a pure function ``(seed, epoch, position) -> sample`` in O(1) memory and time.

Samples lie in groups (one group = the samples of one shard; the last may be short). An epoch visits the groups in a
keyed pseudo-random order, cuts that sequence into windows of ``window`` consecutive groups, and permutes the samples
inside each window. A reader therefore touches ``window`` shards at a time, while every sample is visited exactly once
per epoch. World size, batch size and worker count appear nowhere.

Both permutations are Feistel networks on ``[0, 2^bits)`` restricted to ``[0, size)`` by cycle walking (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002), followed by a keyed rotation, which makes the marginal
of each position exactly uniform over keys also on tiny domains. The order is part of the data format: a change of any
constant below changes every run, and the golden values in the tests notice it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]

ROUNDS = 8
_GROUPS, _SAMPLES = 1, 2  # key domains of the two permutations
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SALTS = [np.uint64((0x9E3779B97F4A7C15 * (step + 1)) & 0xFFFFFFFFFFFFFFFF) for step in range(ROUNDS)]
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = (np.uint64(s) for s in (27, 30, 31, 32))
_ONE = np.uint64(1)


def mix(x: U64) -> U64:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), element by element."""
    x = x + _GOLDEN
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


def key(*parts: U64 | int) -> U64:
    """One 64-bit key per element from broadcastable unsigned integers (Python ints are taken modulo 2^64)."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        word = np.uint64(part & 0xFFFFFFFFFFFFFFFF) if isinstance(part, int) else part
        state = mix(state ^ mix(np.asarray(word, np.uint64).reshape(-1)))
    return state


def permute(x: U64, size: U64 | np.uint64, keys: U64, inverse: bool = False) -> U64:
    """Keyed bijection of ``[0, size)``, element by element; ``x``, ``size >= 1`` and ``keys`` are 1D and broadcast."""
    x, size, keys = (np.array(a) for a in np.broadcast_arrays(x, size, keys))
    rotation = mix(keys) % size
    if inverse:
        x = (x + (size - rotation)) % size
    bits = np.frexp((size - _ONE).astype(np.float64))[1].astype(np.uint64)  # of the largest element
    low = bits >> _ONE
    high_mask, low_mask = (_ONE << (bits - low)) - _ONE, (_ONE << low) - _ONE
    todo = np.flatnonzero(size > _ONE)
    while todo.size:  # cycle walking: fewer than 2 rounds on average, as 2^bits < 2 * size
        x[todo] = _feistel(x[todo], low[todo], high_mask[todo], low_mask[todo], keys[todo], inverse)
        todo = todo[x[todo] >= size[todo]]
    return x if inverse else (x + rotation) % size


def _feistel(x: U64, low: U64, high_mask: U64, low_mask: U64, keys: U64, inverse: bool) -> U64:
    """Alternating Feistel network: halves of ``bits - low`` and ``low`` bits, each XORed in turn with a hash of the other."""
    a, b = x >> low, x & low_mask
    for step in range(ROUNDS - 1, -1, -1) if inverse else range(ROUNDS):
        salt = keys + _SALTS[step]
        if step % 2 == 0:
            a = a ^ ((mix(b ^ salt) >> _S32) & high_mask)
        else:
            b = b ^ ((mix(a ^ salt) >> _S32) & low_mask)
    return (a << low) | b


class Order:
    """Order of ``n`` samples in groups of ``group`` (the last may be short), shuffled over windows of ``window`` groups.

    ``order(epoch, position)`` is the sample at ``position`` in ``[0, n)`` of ``epoch``; ``position_of`` inverts it. Both
    take scalars or arrays, epoch and position broadcasting against each other. ``shuffle=False`` is the identity.
    ``ValueError`` for sizes below 1 and for positions outside ``[0, n)``.
    """

    def __init__(self, n: int, group: int, window: int, seed: int, *, shuffle: bool = True) -> None:
        for name, value in (("n", n), ("group", group), ("window", window)):
            if not 1 <= value < 1 << 52:  # float64 gives the bit count exactly up to here
                raise ValueError(f"order: {name}={value} must lie in [1, 2^52)")
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self.group = min(group, n)
        self.groups = -(-n // self.group)
        self.window = min(window, self.groups)
        self.deficit = self.groups * self.group - n  # samples that the last group lacks

    def identity(self) -> dict[str, int]:
        """What decides the order, for the state of a stream."""
        return {"seed": self.seed, "samples": self.n, "group": self.group, "window": self.window}

    def at(self, position: ArrayLike) -> NDArray[np.int64]:
        """Samples at global positions, which run on over epochs: ``order(position // n, position % n)``."""
        p = np.asarray(position, np.int64)
        return self(p // self.n, p % self.n)

    def __call__(self, epoch: ArrayLike, position: ArrayLike) -> NDArray[np.int64]:
        """Sample ids (int64, of the broadcast shape) at ``position`` of ``epoch``."""
        shape, e, p = self._arguments(epoch, position, "position")
        if not self.shuffle:
            return p.astype(np.int64).reshape(shape)
        group, deficit = np.uint64(self.group), np.uint64(self.deficit)
        short = self._short_rank(e)
        w, start, size = self._window_of_position(p, short)
        q = permute(p - start, size, key(self.seed, _SAMPLES, e, w))
        # Offset in the window -> (rank, offset in the group); ranks behind the short group lie `deficit` further back.
        first = w * np.uint64(self.window)
        cut = first * group + q >= (short + _ONE) * group - deficit
        q = q + np.where((short >= first) & cut, deficit, np.uint64(0))
        rank, offset = first + q // group, q % group
        ids = permute(rank, np.uint64(self.groups), key(self.seed, _GROUPS, e))
        return (ids * group + offset).astype(np.int64).reshape(shape)

    def position_of(self, epoch: ArrayLike, sample: ArrayLike) -> NDArray[np.int64]:
        """Positions (int64) at which ``epoch`` visits ``sample``: the inverse of a call."""
        shape, e, s = self._arguments(epoch, sample, "sample")
        if not self.shuffle:
            return s.astype(np.int64).reshape(shape)
        group, window, deficit = np.uint64(self.group), np.uint64(self.window), np.uint64(self.deficit)
        short = self._short_rank(e)
        rank = permute(s // group, np.uint64(self.groups), key(self.seed, _GROUPS, e), inverse=True)
        w = rank // window
        start, size = self._window_extent(w, short)
        q = rank * group + s % group - np.where(rank > short, deficit, np.uint64(0)) - start
        q = permute(q, size, key(self.seed, _SAMPLES, e, w), inverse=True)
        return (start + q).astype(np.int64).reshape(shape)

    def _arguments(self, epoch: ArrayLike, value: ArrayLike, name: str) -> tuple[tuple[int, ...], U64, U64]:
        e, v = np.broadcast_arrays(np.asarray(epoch, np.int64), np.asarray(value, np.int64))
        if v.size and (v.min() < 0 or v.max() >= self.n):
            raise ValueError(f"order: {name} must lie in [0, {self.n}), got {v.min()} to {v.max()}")
        return v.shape, e.reshape(-1).astype(np.uint64), v.reshape(-1).astype(np.uint64)

    def _short_rank(self, epoch: U64) -> U64:
        """Rank at which the epoch visits the last group, the only one that may be short."""
        epochs, back = np.unique(epoch, return_inverse=True)
        size = np.uint64(self.groups)
        return permute(np.full_like(epochs, size - _ONE), size, key(self.seed, _GROUPS, epochs), inverse=True)[back]

    def _window_extent(self, w: U64, short: U64) -> tuple[U64, U64]:
        """First position and number of samples of window ``w``."""
        group, window = np.uint64(self.group), np.uint64(self.window)
        none, deficit = np.uint64(0), np.uint64(self.deficit)
        first, last = w * window, np.minimum((w + _ONE) * window, np.uint64(self.groups))
        start = first * group - np.where(short < first, deficit, none)
        return start, last * group - np.where(short < last, deficit, none) - start

    def _window_of_position(self, p: U64, short: U64) -> tuple[U64, U64, U64]:
        """Window that holds position ``p``, with its first position and size."""
        window, span = np.uint64(self.window), np.uint64(self.window * self.group)
        # Up to the end of the window with the short group, windows have full length; behind it all is `deficit` early.
        end = (short // window + _ONE) * span - np.uint64(self.deficit)
        w = np.where(p < end, p // span, (p + np.uint64(self.deficit)) // span)
        return w, *self._window_extent(w, short)
