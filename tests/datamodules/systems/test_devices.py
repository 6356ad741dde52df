"""What a GPU needs of the systems without space, shown without one: no tensor elsewhere, and no copy from the host in a step.

Tensors of `meta` have no data and mix with those of no other device: what runs on them runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datamodules.registry import lookup
from datamodules.simulators.chialvo_ring_star import ChialvoRingStar
from datamodules.simulators.chialvo_rulkov import ChialvoRulkov
from datamodules.simulators.dyadic_shell import DyadicShell
from datamodules.simulators.fields import Simulation
from datamodules.simulators.integrators import constant, dopri5_step, iterate, rk4_step
from datamodules.simulators.skew_product import SkewProduct, draw_system
from datamodules.simulators.trajectories import IteratedMap, Ode

from .helpers import make

ODES: dict[str, dict[str, Any]] = {
    "lorenz63": {},
    "lorenz96": {"fast": 2},
    "rossler": {},
    "double_pendulum": {"form": "circle"},
}
SHORT = {"burn_in": 0.01, "dt": 0.01, "dt_save": 0.01, "frames": 3}
NOISY = {"shells": 5, "transport": [0.0, 0.1], "burn_in": 0.01, "dt_save": 0.005, "frames": 3}
TO_HOST = {"nonzero", "_local_scalar_dense"}
OF_NUMBERS = {"tensor", "new_tensor", "as_tensor", "asarray", "from_numpy"}


@pytest.fixture
def meta(monkeypatch) -> torch.device:
    """Generators solve on `meta`, which no config may name."""
    device = torch.device("meta")
    monkeypatch.setattr(Simulation, "device", device)
    return device


def ode(name: str) -> Ode:
    generator = make(lookup("generator", name)[1], **{**SHORT, **ODES[name]})
    assert isinstance(generator, Ode)
    return generator


def chain(cls: type[IteratedMap]) -> IteratedMap:
    generator = make(cls, burn_in=1, frames=3)
    assert isinstance(generator, IteratedMap)
    return generator


def steps() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """What each system does in its step, and a batch of states for it, on the device of the generators."""
    found: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}
    for name in ODES:
        g = ode(name)
        p, x = g.parameters([0, 1]), g.initial_states([0, 1])
        found[name] = (lambda x, g=g, p=p: g.rhs(x, p)), x
    for cls in (ChialvoRingStar, ChialvoRulkov):
        m = chain(cls)
        p, x = m.parameters([0, 1]), m.initial_states([0, 1])
        found[cls.__name__] = (lambda x, m=m, p=p: m.step(x, p)), x
    shell = make(DyadicShell, **NOISY)
    stepper = shell.steps(shell.initial_states([0, 1]), shell.parameters([0, 1]), [0, 1])
    found["dyadic_shell"] = (lambda x: next(stepper)), shell.initial_states([0, 1])
    skew = make(SkewProduct, per_system=1)
    systems = [draw_system(skew.config, np.random.default_rng(i)) for i in range(2)]
    start = torch.from_numpy(np.stack([system.start for system in systems])).to(skew.device)
    found["skew_product"] = skew.rhs(systems), start
    return found


@pytest.mark.parametrize("name", ODES)
def test_no_ode_leaves_a_tensor_on_the_cpu(name, meta):
    generator = ode(name)
    found = generator.solve([0, 1])
    assert found.device == meta and found.shape == (2, 3, len(generator.channels))


def test_no_map_leaves_a_tensor_on_the_cpu(meta):
    for cls in (ChialvoRingStar, ChialvoRulkov):
        g = chain(cls)
        p = g.parameters([0, 1])
        found = g.observe(iterate(lambda x, g=g, p=p: g.step(x, p), g.initial_states([0, 1]), 1, 2, 3))
        assert found.device == meta and found.shape == (2, 3, len(g.channels))


def test_no_shell_leaves_a_tensor_on_the_cpu(meta):
    assert make(DyadicShell, **NOISY).solve([0, 1]).device == meta


def test_neither_integrator_leaves_a_tensor_on_the_cpu(meta):
    for name, (f, x) in steps().items():
        if name in ODES or name == "skew_product":
            new, slope, error = dopri5_step(f, x, f(x), torch.ones_like(x[:, :1]))
            assert {t.device for t in (new, slope, error, rk4_step(f, x, 0.1))} == {meta}, name


class Calls(TorchFunctionMode):
    """What makes a tensor of Python's numbers within: a call by name, or a list as index."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        indices = args[1] if name == "__getitem__" else ()
        if name in OF_NUMBERS or any(isinstance(index, list) for index in tree_leaves(indices, is_leaf=is_list)):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def is_list(value: Any) -> bool:
    return isinstance(value, list)


class Operations(TorchDispatchMode):
    """Names of the operations within, and of those that take a tensor from the host or wait for values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.waiting: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.add(name)
        given = [value for value in tree_leaves((args, kwargs or {})) if isinstance(value, Tensor)]
        if name in TO_HOST or any(tensor.device.type == "cpu" for tensor in given):
            self.waiting.add(name)
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_host(meta):
    """Constants are on the device after the first step: a copy, or a look at values, in each would hold up a GPU."""
    for name, (f, x) in steps().items():
        for step in (f, lambda x, f=f: dopri5_step(f, x, f(x), torch.ones_like(x[:, :1]))[0]):
            step(x)
            with Operations() as seen, Calls() as made:
                step(x)
            assert "mul" in seen.names and not seen.waiting | made.names, (name, seen.waiting | made.names)


def test_a_constant_can_be_differentiated_through_wherever_it_was_made():
    with torch.inference_mode():
        constant((0.25, 4.0), torch.float64, torch.device("cpu"))
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (constant((0.25, 4.0), torch.float64, x.device) * x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.25, 4.0]
