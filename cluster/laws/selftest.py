"""What needs no data: laws with known answers, fitted here and now. `keel fit --selftest` prints the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.laws import batch, rates, stability, synthetic
from cluster.laws.allocation import allocate
from cluster.laws.fit import FitError, fit, vpnls
from cluster.laws.isoflop import isoflop
from cluster.laws.one_axis import broken
from cluster.laws.optimise import minimise
from cluster.laws.records import Runs, of_columns
from cluster.laws.uncertainty import pairs


@dataclass
class Check:
    """One figure against what it must be: `low <= value <= high`."""

    name: str
    value: float
    low: float
    high: float

    @property
    def ok(self) -> bool:
        return self.low <= self.value <= self.high


def run() -> Iterator[Check]:
    """All checks, one by one, in well under a minute on one core."""
    for part in PARTS:
        yield from part()


def recovery() -> Iterator[Check]:
    runs = synthetic.ladder()
    yield Check("runs in the ladder", len(runs), 50, 50)
    found = fit("chinchilla", runs)
    for name in ("alpha", "beta"):
        yield _near(f"approach 3, noise-free: {name}", found.values[name], synthetic.TRUTH[name], 1e-9)
    projected = vpnls(runs)
    for name in ("alpha", "beta"):
        yield _near(f"VPNLS, noise-free: {name}", projected.values[name], synthetic.TRUTH[name], 1e-8)


def invariance() -> Iterator[Check]:
    runs = synthetic.ladder(0.005, 1)
    base = fit("chinchilla", runs).values
    scaled = of_columns(n=runs["n"] / 1e6, d=runs["d"] * 1e3, loss=runs["loss"] * 0.5)
    other = fit("chinchilla", scaled).values
    twice = Runs({k: np.tile(v, 2) for k, v in runs.columns.items()}, runs.names * 2, runs.status * 2)
    doubled = fit("chinchilla", twice).values
    for name in ("alpha", "beta"):
        yield _near(f"other units leave {name}", other[name], base[name], 1e-6)
        yield _near(f"each run twice leaves {name}", doubled[name], base[name], 1e-6)
    yield _near("other units scale E", other["E"], 0.5 * base["E"], 1e-6)


def noise() -> Iterator[Check]:
    """Spread of 100 noisy ladders against the reference, one batch of fits per noise level."""
    runs = synthetic.ladder()
    found = fit("chinchilla", runs)
    expected = {0.002: (0.0063, 0.0038), 0.005: (0.0152, 0.0099), 0.01: (0.0327, 0.0198)}
    rng = np.random.default_rng(0)
    for sigma, reference in expected.items():
        samples = []
        for _ in range(100):
            target = np.log(runs["loss"]) + sigma * rng.standard_normal(len(runs))
            samples.append(
                minimise(found.law, target, found.theta[None], delta=1e-3, bounds=found.law.bounds()).theta[0, 3:]
            )
        for name, value, usual in zip(("alpha", "beta"), np.std(samples, axis=0), reference, strict=True):
            yield Check(f"noise {sigma}: sd({name})", float(value), 0.75 * usual, 1.3 * usual)


def coverage() -> Iterator[Check]:
    """How often a 95% bootstrap interval holds the truth."""
    hits = 0
    for seed in range(100):
        found = fit("chinchilla", synthetic.ladder(0.005, 1000 + seed))
        low, high = np.quantile(pairs(found, 200, seed)[:, 3], [0.025, 0.975])
        hits += int(low <= synthetic.TRUTH["alpha"] <= high)
    yield Check("coverage of 95% bootstrap intervals of alpha", hits / 100, 0.89, 0.995)


def allocation() -> Iterator[Check]:
    for flops, n, d, loss in ((1e19, 2.27956e8, 7.31136e9, 2.985741), (5.76e23, 3.21899e10, 2.98231e12, 1.930748)):
        best = allocate(synthetic.TRUTH, flops)
        yield _near(f"N* at {flops:g}", best.n, n, 1e-5 * n)
        yield _near(f"D* at {flops:g}", best.d, d, 1e-5 * d)
        yield _near(f"L* at {flops:g}", best.loss, loss, 1e-6)
        sizes = best.n * np.exp(np.linspace(-0.5, 0.5, 20001))
        brute = sizes[np.argmin(synthetic.loss_of(sizes, flops / 6 / sizes))]
        yield _near(f"N* at {flops:g}, brute force", float(brute), best.n, 1e-4 * best.n)


def approach_two() -> Iterator[Check]:
    """Its exponent is right; its coefficient is off by what the grid's width makes, and wide grids are warned of."""
    cases = (
        ("", synthetic.TRUTH, {2.0: 1.0033, 4.0: 1.0132, 16.0: 1.0537}),
        (" (asymmetric)", synthetic.ASYMMETRIC, {2.0: 1.0170, 4.0: 1.0695, 16.0: 1.3007}),
    )
    for kind, law, biases in cases:
        truth = allocate(law, 1e25)
        for factor, bias in biases.items():
            found = isoflop(synthetic.isoflops(factor, law), neighbours=None, sigma=1e-6, draws=50, log_loss=False)
            name = f"approach 2, grid x{factor:g}{kind}"
            yield _near(f"{name}: exponent", found.line.exponent, truth.exponent, 1e-6)
            yield _near(f"{name}: N* ratio at 1e25", found.line.at(1e25) / truth.n, bias, 1e-4)
            warned = any("bias the coefficient" in text for text in found.warnings)
            yield Check(f"{name}: warned of its width", float(warned), float(factor > 4), float(factor > 4))


def one_axis() -> Iterator[Check]:
    c = np.geomspace(1e15, 1e21, 40)
    x = c / 1e18
    loss = 0.5 + 2.0 * x**-0.1 * (1 + x ** (1 / 0.3)) ** (-0.25 * 0.3)
    found, _ = broken(of_columns(c=c, loss=loss))
    yield _near("broken law: RMS log residual", float(np.sqrt(np.mean(found.residuals**2))), 0.0, 1e-4)
    yield Check("broken law: a break was found", float(found.form != "saturating"), 1, 1)
    plain = fit("saturating", of_columns(c=c, loss=1.5 + 3.0 * (c / 1e15) ** -0.3), delta=math.inf)
    yield _near("saturating law: E", plain.values["E"], 1.5, 1e-6)
    yield _near("saturating law: alpha", plain.values["alpha"], 0.3, 1e-6)


def learning_rates() -> Iterator[Check]:
    moved = rates.transfer(rates.cells(synthetic.rate_curves(-0.5), "width"))
    still = rates.transfer(rates.cells(synthetic.rate_curves(0.0), "width"))
    yield Check("rate that shifts is refused", float(moved.ok), 0, 0)
    yield Check("rate that stays is accepted", float(still.ok), 1, 1)
    yield _near("slope of a shifting rate", moved.line.exponent if moved.line else math.nan, -0.5, 0.02)
    losses = np.array([3.0, 2.5, 2.2, 2.4, 3.4, np.inf, np.nan])
    yield _near(
        "LR sensitivity S", stability.sensitivity(losses, 5.0), np.mean([0.8, 0.3, 0, 0.2, 1.2, 2.8, 2.8]), 1e-12
    )
    sizes = np.array([8.0, 16, 32, 64, 128])
    yield _near("critical batch", batch.from_steps(sizes, 1000 * (1 + 50 / sizes)).critical, 50.0, 1e-6)
    yield _near("noise scale", batch.noise_scale((8, 10 + 400 / 8), (64, 10 + 400 / 64)), 40.0, 1e-9)


def failures() -> Iterator[Check]:
    """A fit that cannot be one says so."""
    runs = synthetic.ladder()
    flat = of_columns(n=runs["n"], d=runs["n"] * 20, loss=synthetic.loss_of(runs["n"], 20 * runs["n"]))
    found = fit("chinchilla", flat, strict=False)
    yield Check("one D/N only: warned", float(any("nearly the same" in w for w in found.warnings)), 1, 1)
    yield Check(
        "NaN losses only: refused",
        float(_refused(lambda: fit("chinchilla", of_columns(n=runs["n"], d=runs["d"], loss=runs["n"] * np.nan)))),
        1,
        1,
    )
    yield Check(
        "four runs for five parameters: refused", float(_refused(lambda: fit("chinchilla", runs.keep(range(4))))), 1, 1
    )


PARTS: tuple[Callable[[], Iterator[Check]], ...] = (
    recovery,
    invariance,
    noise,
    coverage,
    allocation,
    approach_two,
    one_axis,
    learning_rates,
    failures,
)


def _near(name: str, value: float, wanted: Any, within: float) -> Check:
    centre = float(np.asarray(wanted))
    return Check(name, value, centre - within, centre + within)


def _refused(action: Callable[[], object]) -> bool:
    try:
        action()
    except (FitError, ValueError):
        return True
    return False
