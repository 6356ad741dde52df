"""Measures how well the windowed order of a stream shuffles, beside a full permutation, and writes docs/results/order.md.

    python scripts/order_quality.py

Figures per epoch, averaged over EPOCHS: how far a sample moves from its place; whether two samples that follow each other
lie in one shard; of how many shards a batch is made; how much the means of batches scatter, against the same of a full
shuffle. The last is taken of values that differ from sample to sample, and of values that are the same all over a shard (a data
set written in the order of its parameter), the worst case.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datamodules.stream.order import Order

SHARDS, GROUP, BATCH, EPOCHS = 256, 512, 64, 8  # 131,072 samples; a shard of 64 MiB holds 512 of 128 KiB
WINDOWS = (1, 4, 16, 64, 256)
USUAL = 16  # `window_shards` of a stream that does not say otherwise
PAGE = ROOT / "docs" / "results" / "order.md"
Ids = NDArray[np.int64]


def quality(epoch: Callable[[int], Ids], shards: int, group: int, batch: int, epochs: int) -> dict[str, float]:
    """Figures of an order: `epoch(e)` gives the ids in [0, shards * group) as epoch e visits them."""
    n = shards * group
    noise = np.random.default_rng(0).standard_normal(n)
    found: dict[str, list[float]] = {"moved": [], "same": [], "shards": [], "noise": [], "sorted": []}
    for e in range(epochs):
        ids = epoch(e)
        shard = ids // group
        batches = ids[: n // batch * batch].reshape(-1, batch)
        present = np.sort(batches // group, axis=1)
        found["moved"].append(float(np.abs(ids - np.arange(n)).mean() / n))
        found["same"].append(float((shard[1:] == shard[:-1]).mean()))
        found["shards"].append(float(1 + (np.diff(present, axis=1) != 0).sum(1).mean()))
        for name, values in (("noise", noise[batches]), ("sorted", (batches // group).astype(np.float64))):
            found[name].append(float(values.mean(1).var() / values.var() * batch))
    means = {name: float(np.mean(figures)) for name, figures in found.items()}
    return {**means, "noise": math.sqrt(means["noise"]), "sorted": math.sqrt(means["sorted"])}


def expected(shards: int, window: int, batch: int) -> dict[str, float]:
    """The same of ideal random draws from windows of that many shards; large shards are taken for infinite."""
    between = (shards - window) / (shards - 1) / window  # variance of a window's mean over that of the shards
    return {
        "moved": 1 / 3,
        "same": 1 / window,
        "shards": window * (1 - (1 - 1 / window) ** batch),
        "noise": 1.0,
        "sorted": math.sqrt(batch * between + 1 - between),
    }


def windowed(window: int) -> Callable[[int], Ids]:
    """The order of a stream with that window."""
    order = Order(SHARDS * GROUP, GROUP, window, 0)
    return lambda e: order(e, np.arange(order.n))


def shuffled(e: int) -> Ids:
    """A full shuffle by numpy."""
    return np.random.default_rng(e).permutation(SHARDS * GROUP)


def page() -> str:
    """The table with what it is of."""
    lines = [
        "# Quality of the order of a stream",
        "",
        f"{SHARDS * GROUP:,} samples in {SHARDS} shards, batches of {BATCH}, {EPOCHS} epochs; in brackets what ideal random draws",
        "from a window would give. Scatter: standard deviation of the means of batches over that of a full shuffle, for values that",
        "differ from sample to sample, and for values that are the same all over a shard, which is the worst case. For data whose",
        "shards resemble each other, as those of `keel data make` do, the window costs next to nothing; data written in the order",
        f"of a parameter want a larger `window_shards` than {USUAL}, the default, or to be written in another order.",
        "",
        "| window [shards] | moved [epoch] | next in one shard | shards in a batch | scatter, samples | scatter, shards |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    names = ("moved", "same", "shards", "noise", "sorted")
    for window in WINDOWS:
        found, ideal = quality(windowed(window), SHARDS, GROUP, BATCH, EPOCHS), expected(SHARDS, window, BATCH)
        cells = [f"{found[name]:.3g} ({ideal[name]:.3g})" for name in names]
        lines.append(f"| {window} | {' | '.join(cells)} |")
    full = quality(shuffled, SHARDS, GROUP, BATCH, EPOCHS)
    lines.append(f"| full shuffle by numpy | {' | '.join(f'{full[name]:.3g}' for name in names)} |")
    return "\n".join([*lines, "", "Written by `python scripts/order_quality.py`.", ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(PAGE), help="where the page goes")
    args = parser.parse_args(arguments)
    text = page()
    Path(args.out).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
