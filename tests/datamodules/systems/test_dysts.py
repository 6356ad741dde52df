"""Systems of the package dysts, with a stand-in for it: what is asked of it and what is made of its answers."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest

from datamodules.simulators.dysts_system import DystsSystem
from tests.conftest import unavailable

from .helpers import make


class Flow:
    """A rotation with the interface of `dysts.base.DynSys`: n points over period * n / pts_per_period, ends included."""

    def __init__(self) -> None:
        self.ic, self.dimension, self.period = np.array([1.0, 2.0]), 2, 4.0
        self.params, self.maximum_lyapunov_estimated = {"omega": np.float64(0.5)}, 0.1

    def make_trajectory(self, n, init_cond, pts_per_period, method, rtol, atol):
        assert method == "RK45" and rtol == atol == 1e-9
        t = np.linspace(0, self.period * n / pts_per_period, n)
        return np.stack([init_cond[0] + t, np.full(n, init_cond[1])], -1)


class Failing(Flow):
    def make_trajectory(self, n, **options):
        return None


class Startless(Flow):
    def __init__(self) -> None:
        super().__init__()
        del self.ic


class Refusing(Flow):
    def make_trajectory(self, n, **options):
        raise ValueError("`first_step` exceeds bounds.")


class Shift:
    """A map of one component with the interface of `dysts.base.DynMap`: the first value is the first iterate."""

    def __init__(self) -> None:
        self.ic, self.params = np.array([0.5]), {}

    def make_trajectory(self, n, init_cond):
        return init_cond[0] + 1.0 + np.arange(n)


@pytest.fixture
def dysts(monkeypatch) -> None:
    flows, maps = ModuleType("dysts.flows"), ModuleType("dysts.maps")
    held = (
        (flows, {"Spiral": Flow, "Failing": Failing, "Refusing": Refusing, "Startless": Startless, "Both": Flow}),
        (maps, {"Shift": Shift, "Both": Shift}),
    )
    for module, members in held:
        for name, value in members.items():
            setattr(module, name, type(name, (value,), {"__module__": module.__name__}))
    flows.DynSys = object  # type: ignore[attr-defined]
    for name, module in (("dysts", ModuleType("dysts")), ("dysts.flows", flows), ("dysts.maps", maps)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("dysts")
def test_a_flow():
    g = make(DystsSystem, system="Spiral", dt_save=0.25, burn_in=3)
    series = g.group(0)
    assert series.shape == (4, 20, 2) and g.channels == ("x0", "x1")
    np.testing.assert_allclose(np.diff(series[:, :, 0]), 0.25 * 4.0)  # dt_save is in periods
    start = np.stack([g.initial(np.random.Generator(np.random.Philox(0)))])
    assert start.shape == (1, 2) and 0 < np.abs(series[:, 0, 1] / 2 - 1).max() < 0.05
    np.testing.assert_allclose(series[:, 0, 0] - 3 * 1.0, 1.0, atol=0.05)  # three frames were dropped
    assert len({float(v) for v in series[:, 0, 1]}) == 4
    about = g.attributes()
    assert about["parameters"] == {
        "system": "Spiral", "values": {"omega": 0.5}, "period": 4.0, "largest_lyapunov_exponent": 0.1,
    }  # fmt: skip
    assert about["units"] == {"time": "period"} and "dysts" in g.source()


@pytest.mark.usefixtures("dysts")
def test_a_map():
    g = make(DystsSystem, system="Shift", dt_save=2.0, burn_in=5, spread=0.0)
    assert g.attributes()["units"] == {"time": "iteration"}
    np.testing.assert_allclose(g.group(0)[0, :, 0], 0.5 + 2 * np.arange(6, 26))
    with pytest.raises(ValueError, match=r"dt_save=0.5: must be a whole number of iterations"):
        make(DystsSystem, system="Shift", dt_save=0.5)


@pytest.mark.usefixtures("dysts")
def test_a_name_of_a_flow_and_a_map():
    assert not make(DystsSystem, system="Both").is_map and not make(DystsSystem, system="Both", kind="flow").is_map
    assert make(DystsSystem, system="Both", kind="map", dt_save=1.0).is_map
    with pytest.raises(ValueError, match="system=Shift: dysts has no such flow"):
        make(DystsSystem, system="Shift", kind="flow")
    with pytest.raises(ValueError, match="kind='flux': unknown"):
        make(DystsSystem, kind="flux")


def test_a_gpu_is_refused():
    with pytest.raises(ValueError, match="device='cuda': dysts solves with NumPy, on the CPU alone; use device: cpu"):
        make(DystsSystem, device="cuda")


def test_the_package_itself():
    """Names that both have, against the equations; a flow keeps to dysts' own period; a worker gets a copy."""
    if importlib.util.find_spec("dysts") is None:
        unavailable("dysts is not installed: pip install 'keel[chaos]'")
    flow = make(DystsSystem, system="Duffing", dt_save=0.01, burn_in=0, train=1, validation=0, test=0, batch=1)
    assert flow.channels == ("x0", "x1", "x2") and not flow.is_map
    series = flow.group(0)[0]
    step = 0.01 * flow.system.period
    x, v = series[:, 0], series[:, 1]
    np.testing.assert_allclose((x[2:] - x[:-2]) / (2 * step), v[1:-1], atol=5e-3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(flow)).group(0)[0], series)
    iterated = make(DystsSystem, system="Duffing", kind="map", dt_save=1.0, burn_in=5).group(0)
    a, b = 2.75, 0.2
    np.testing.assert_allclose(iterated[:, 1:, 0], iterated[:, :-1, 1], rtol=1e-12)
    expected = -b * iterated[:, :-1, 0] + a * iterated[:, :-1, 1] - iterated[:, :-1, 1] ** 3
    np.testing.assert_allclose(iterated[:, 1:, 1], expected, rtol=1e-12)
    delayed = make(DystsSystem, system="MackeyGlass", frames=10, burn_in=0, train=1, validation=0, test=0, batch=1)
    assert np.isfinite(delayed.group(0)).all()


@pytest.mark.usefixtures("dysts")
def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"system=Spiralle: dysts has no such system; did you mean Spiral\?"):
        make(DystsSystem, system="Spiralle")
    with pytest.raises(ValueError, match="system=DynSys: dysts has no such system"):
        make(DystsSystem, system="DynSys")
    with pytest.raises(ValueError, match="system=Failing: dysts could not integrate"):
        make(DystsSystem, system="Failing").group(0)
    with pytest.raises(
        ValueError, match=r"system=Refusing: dysts could not integrate a trajectory \(`first_step` exceeds"
    ):
        make(DystsSystem, system="Refusing").group(0)
    with pytest.raises(ValueError, match="system=Startless: dysts lists no initial state for it"):
        make(DystsSystem, system="Startless")
    with pytest.raises(ValueError, match="method='RK5': unknown; use one of RK45, "):
        make(DystsSystem, system="Spiral", method="RK5")


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    for name in ("dysts", "dysts.flows", "dysts.maps"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "dysts", None)
    with pytest.raises(ValueError, match="system=Lorenz: needs the package dysts; pip install dysts") as caught:
        make(DystsSystem)
    assert "\n" not in str(caught.value)
