"""The order is a bijection for all sizes, fixed for ever (golden values), and nearly as good as a full shuffle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.stream.order import Order, key, permute

sizes = st.integers(1, 400)
smalls = st.integers(1, 60)
seeds = st.integers(0, 2**64 - 1)

GOLDEN_A = [15, 9, 8, 14, 10, 12, 13, 11, 3, 0, 5, 1, 7, 4, 2, 6, 18, 19, 16, 17]
GOLDEN_B = [15, 3, 2, 4, 16, 13, 11, 12, 14, 18, 0, 10, 1, 19, 17, 9, 5, 7, 21, 6, 20, 8]
GOLDEN_C = [578899505606, 333537452518, 582447102019, 426526432351]


@settings(max_examples=150, deadline=None)
@given(n=sizes, group=smalls, window=st.integers(1, 12), seed=seeds, epoch=st.integers(0, 1 << 40))
def test_each_epoch_visits_every_sample_once(n: int, group: int, window: int, seed: int, epoch: int) -> None:
    order = Order(n, group, window, seed)
    samples = order(epoch, np.arange(n))
    assert np.array_equal(np.sort(samples), np.arange(n))
    assert np.array_equal(order.position_of(epoch, samples), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=sizes, group=smalls, window=st.integers(1, 12), seed=seeds)
def test_a_window_holds_whole_groups(n: int, group: int, window: int, seed: int) -> None:
    visited = (Order(n, group, window, seed)(3, np.arange(n)) // min(group, n)).tolist()
    left = dict.fromkeys(visited)  # distinct groups in the order of their first visit
    start = 0
    while start < n:
        members = [g for g in left if g in visited[start:]][:window]
        stop = start + sum(visited.count(g) for g in members)
        assert set(visited[start:stop]) == set(members)
        start = stop


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), secret=seeds)
def test_permutation_and_its_inverse(size: int, secret: int) -> None:
    x, n, k = np.arange(size, dtype=np.uint64), np.full(size, size, np.uint64), key(secret)
    y = permute(x, n, k)
    assert np.array_equal(np.sort(y), x)
    assert np.array_equal(permute(y, n, k, inverse=True), x)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, (1 << 52) - 1),
    group=st.integers(1, 1 << 40),
    window=st.integers(1, 1000),
    seed=seeds,
    data=st.data(),
)
def test_huge_sizes_in_constant_memory(n: int, group: int, window: int, seed: int, data: st.DataObject) -> None:
    order = Order(n, group, window, seed)
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8)))
    samples = order(7, positions)
    assert samples.min() >= 0 and samples.max() < n
    assert np.array_equal(order.position_of(7, samples), positions)


def test_the_order_is_part_of_the_format() -> None:
    # Recorded once. If this fails, every stored stream position means something else: bump the format instead.
    assert Order(20, 4, 2, 0)(0, np.arange(20)).tolist() == GOLDEN_A
    assert Order(22, 5, 3, 1234)(1, np.arange(22)).tolist() == GOLDEN_B
    assert Order(10**12, 10**6, 16, 99)(5, [0, 1, 10**9, 10**12 - 1]).tolist() == GOLDEN_C


def test_vectorised_equals_one_by_one_and_epochs_run_on() -> None:
    order = Order(101, 8, 3, 11)
    positions = np.arange(50, 350)
    together = order.at(positions)
    assert together.tolist() == [int(order(p // 101, p % 101)) for p in positions.tolist()]
    assert order.at(positions.reshape(3, 100)).shape == (3, 100)


def test_epochs_and_seeds_differ() -> None:
    rows = [Order(256, 16, 4, seed)(epoch, np.arange(256)) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert np.mean(a == b) < 0.05  # two random permutations agree in 1 place of 256 on average


def test_no_shuffle_is_the_identity() -> None:
    order = Order(10, 3, 2, 5, shuffle=False)
    assert order.at(np.arange(25)).tolist() == [*range(10), *range(10), *range(5)]
    assert order.position_of(4, 7) == 7


def test_windows_as_wide_as_the_data_are_a_full_shuffle() -> None:
    n = 4096
    samples = Order(n, 64, n, 3)(0, np.arange(n)).astype(float)
    x, y = np.arange(n), samples
    assert abs(np.mean(np.abs(x - y)) / n - 1 / 3) < 0.015  # mean displacement of a uniform permutation: (n^2 - 1) / 3n
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.06
    for lag in (1, 2, 16, 64):
        assert abs(np.corrcoef(y[:-lag], y[lag:])[0, 1]) < 0.06


def test_within_a_window_neighbours_are_independent() -> None:
    order = Order(64 * 32, 32, 8, 17)
    samples = order(2, np.arange(64 * 32)).reshape(8, 256)
    for row in samples:
        rank = np.argsort(np.argsort(row)).astype(float)
        assert abs(np.corrcoef(rank[:-1], rank[1:])[0, 1]) < 0.25  # 4 sigma for 256 values
        assert np.mean(row[:-1] // 32 == row[1:] // 32) < 0.3  # same shard twice in a row: 1/8 when independent


@pytest.mark.parametrize(("n", "group", "window"), [(5, 1, 5), (7, 1, 3), (8, 1, 8), (12, 3, 2), (15, 5, 2)])
def test_chi_square_of_sample_at_each_position(n: int, group: int, window: int) -> None:
    """Over seeds every sample is as likely as any other at every position, also for tiny, uneven domains."""
    runs = 1200
    table = np.zeros((n, n))
    positions = np.arange(n)
    for seed in range(runs):
        table[positions, Order(n, group, window, seed)(0, positions)] += 1
    chi = ((table - runs / n) ** 2 / (runs / n)).sum()
    mean = n * (n - 1)  # of uniform permutations: n / (n - 1) times a chi-square with (n - 1)^2 degrees of freedom
    assert chi < mean + 5 * np.sqrt(2) * n


def test_pairs_of_positions_are_near_uniform_on_a_tiny_domain() -> None:
    """Chi-square of ordered pairs: a weak round function on 3 bits would show here."""
    runs, n = 3000, 6
    table = np.zeros((n, n))
    for seed in range(runs):
        a, b = Order(n, 1, n, seed)(0, [0, 1])
        table[a, b] += 1
    off = ~np.eye(n, dtype=bool)
    expected = runs / (n * (n - 1))
    chi = ((table[off] - expected) ** 2 / expected).sum()
    assert table[~off].sum() == 0
    assert chi < 29 + 5 * np.sqrt(58)


@pytest.mark.parametrize("kwargs", [{"n": 0}, {"group": 0}, {"window": -1}, {"n": 1 << 52}])
def test_bad_sizes_are_named(kwargs: dict[str, int]) -> None:
    name, value = next(iter(kwargs.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Order(**{"n": 8, "group": 2, "window": 2, "seed": 0, **kwargs})  # type: ignore[arg-type]


def test_positions_outside_the_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"position must lie in \[0, 8\)"):
        Order(8, 2, 2, 0)(0, [3, 8])
