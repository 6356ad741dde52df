"""Every system that the package dysts has: made by name, and what comes out obeys its own equations."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from typing import Any

import numpy as np

from datamodules.simulators.delay import DelaySolution
from datamodules.simulators.dysts_system import MODULES, DystsSystem
from tests.conftest import unavailable

from .helpers import make, order

ONE = {"train": 1, "validation": 0, "test": 0, "batch": 1}


def names(kind: str) -> list[str]:
    """Names of all systems of a kind."""
    if importlib.util.find_spec("dysts") is None:
        unavailable("dysts is not installed: pip install 'keel[chaos]'")
    members = vars(importlib.import_module(MODULES[kind]))
    return [name for name, value in members.items() if getattr(value, "__module__", "") == MODULES[kind]]


def by_rk4(system: Any, x: np.ndarray, span: float, steps: int) -> np.ndarray:
    """The state of a flow of dysts after `span` from x at time 0."""
    h = span / steps
    f = lambda x, t: np.asarray(system.rhs(x, t), np.float64)  # noqa: E731
    for i in range(steps):
        k1 = f(x, i * h)
        k2 = f(x + 0.5 * h * k1, (i + 0.5) * h)
        k3 = f(x + 0.5 * h * k2, (i + 0.5) * h)
        x = x + h / 6 * (k1 + 2 * (k2 + k3) + f(x + h * k3, (i + 1) * h))
    return x


def bounded(system: Any, x: np.ndarray) -> np.ndarray:
    """What dysts stores of a state: angles and the like as their sines and cosines."""
    return np.hstack(system._postprocessing(*x)) if hasattr(system, "_postprocessing") else x


def test_every_flow_and_delay_equation():
    """The second frame is where classical steps of the system's own right-hand side lead from the first."""
    kinds = {"delay": 0, "bounded": 0, "driven": 0, "high": 0}
    for name in names("flow"):
        g = make(DystsSystem, system=name, kind="flow", burn_in=0, dt_save=0.01, spread=0.0, **{**ONE, "frames": 4})
        system, frames = g.system, g.group(0)[0]
        assert frames.shape == (4, len(g.channels)) and (frames[0] != frames[3]).any(), name
        assert json.loads(json.dumps(g.attributes()))["parameters"]["system"] == name
        kinds["delay"] += g.is_delay
        kinds["bounded"] += hasattr(system, "_postprocessing")
        kinds["driven"] += bool(getattr(system, "nonautonomous", False))
        kinds["high"] += len(g.channels) >= 6 and not g.is_delay
        if not g.is_delay:
            start = np.asarray(system.ic, np.float64)
            np.testing.assert_allclose(frames[0], bounded(system, start), rtol=1e-12, err_msg=name)
            end = bounded(system, by_rk4(system, start, 0.01 * system.period, 20))
            error = np.abs(frames[1] - end).max() / np.abs(end - frames[0]).max()
            assert error < 1e-3, (name, error)
    assert min(kinds.values()) >= 4, kinds


def test_every_map():
    """Each frame is the map of the one before."""
    sizes = set()
    for name in names("map"):
        g = make(DystsSystem, system=name, kind="map", burn_in=2, dt_save=1.0, **{**ONE, "frames": 4})
        frames = g.group(0)[0]
        sizes.add(len(g.channels))
        assert frames.shape == (4, len(g.channels)) and (frames[0] != frames[3]).any(), name
        again = np.reshape(g.system.rhs(frames[:-1]), frames[1:].shape)
        np.testing.assert_allclose(again, frames[1:], rtol=1e-10, atol=1e-12, err_msg=name)
        assert json.loads(json.dumps(g.attributes()))["solver"] == {"package": "dysts", "precision": "float64"}
    assert sizes >= {1, 2}, sizes


def test_a_delay_equation_in_closed_form():
    """x' = -x(t - 1) with x = 1 before: a polynomial of one degree more in each interval."""
    t = np.linspace(-0.5, 3, 50)
    expected = sum((-1) ** k * np.maximum(t - k + 1, 0) ** k / math.factorial(k) for k in range(1, 5)) + 1
    np.testing.assert_allclose(DelaySolution(lambda x, before, t: -before, 1.0, 1.0, 3.0, 0.3)(t), expected, atol=1e-3)


def test_delay_equations_are_solved_at_order_four():
    def mackey_glass(x: float, before: float, t: float) -> float:
        return 2 * before / (1 + before**10) - x

    times = np.linspace(0, 8, 90)
    solutions = [DelaySolution(mackey_glass, 0.5, 2.0, 8.0, 2 / n)(times) for n in (20, 40, 80, 1280)]
    errors = [float(np.abs(found - solutions[-1]).max()) for found in solutions[:-1]]
    assert errors[-1] < 1e-5 and all(p > 3.5 for p in order(errors)), errors


def test_delay_equations_of_dysts():
    """Its own solver, of first order, comes near with steps a thousand times smaller than the frames; channels are delays."""
    names("flow")
    g = make(DystsSystem, system="MackeyGlass", burn_in=0, dt_save=0.02, spread=0.0, **{**ONE, "frames": 26})
    own = g.system.make_trajectory(3501, init_cond=np.asarray(g.system.ic), pts_per_period=3501 / 0.5)[::140]
    assert np.abs(g.group(0)[0] - own).max() < 0.02 * own.std()
    every = g.system.tau / 9 / g.system.period
    series = make(DystsSystem, system="MackeyGlass", burn_in=3, dt_save=every, **{**ONE, "frames": 12}).group(0)[0]
    np.testing.assert_allclose(series[1:, 1:], series[:-1, :-1], rtol=1e-9)
    assert (series[1:, 0] != series[:-1, 0]).all() and g.solver()["dt"] == g.system.period / 400
