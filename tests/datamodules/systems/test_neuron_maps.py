"""Networks of map neurons against fixed points, eigenvalues by the network's Laplacian, symmetry and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from datamodules.simulators.chialvo_ring_star import ChialvoRingStar
from datamodules.simulators.chialvo_rulkov import ChialvoRulkov
from datamodules.simulators.neuron_maps import chialvo, rulkov

from .helpers import jacobian, largest_exponent, make, parameters, sorted_eigenvalues

A, B, C, K = 0.89, 0.18, 0.28, 0.03
UNCOUPLED = {"star": [0.0, 0.0], "ring": [0.0, 0.0], "triadic": [0.0, 0.0]}


def resting(low: float = 0.5, high: float = 2.0) -> tuple[float, float]:
    """The fixed point of one Chialvo neuron in this range of voltages, by bisection."""

    def excess(x: float) -> float:
        return x * x * math.exp((C - B * x) / (1 - A) - x) + K - x

    assert excess(low) * excess(high) < 0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(low) * excess(middle) > 0 else (low, middle)
    return low, (C - B * low) / (1 - A)


def test_maps_by_hand():
    x, y = torch.tensor(0.5), torch.tensor(0.2)
    assert [round(float(v), 6) for v in chialvo(x, y, A, B, C, K)] == [0.215205, 0.368]
    assert [round(float(v), 6) for v in rulkov(x, y, 4.1, 1e-3, -1.0)] == [3.48, 0.1985]


def test_rulkov_fixed_point_and_eigenvalues():
    """x = sigma, y = sigma - alpha / (1 + sigma^2); trace 1 + f', determinant f' + mu."""
    alpha, mu, sigma = 4.1, 1e-3, -1.2
    state = torch.tensor([sigma, sigma - alpha / (1 + sigma**2)], dtype=torch.float64)
    step = lambda s: torch.stack(rulkov(s[0], s[1], alpha, mu, sigma))  # noqa: E731
    torch.testing.assert_close(step(state), state, rtol=0, atol=1e-14)
    matrix, slope = jacobian(step, state), -2 * alpha * sigma / (1 + sigma**2) ** 2
    assert math.isclose(matrix.trace(), 1 + slope) and math.isclose(torch.linalg.det(matrix), slope + mu)


def test_a_lone_chialvo_neuron_is_chaotic_as_published():
    """Chialvo 1995 reports chaos at a = 0.89, b = 0.18, c = 0.28, k = 0.03 and regular spiking at b = 0.6."""
    g = make(ChialvoRingStar, **UNCOUPLED)
    p = parameters(g)
    start = g.initial_states(list(range(64)))
    assert largest_exponent(lambda x: g.step(x, p), start, 500, 1500) > 0.03
    calm = {**p, "b": torch.tensor(0.6, dtype=torch.float64)}
    assert largest_exponent(lambda x: g.step(x, calm), start, 500, 1500) < 0.005


# Ring-star


def test_the_smallest_network_is_complete_with_four_triangles():
    """Star and ring together join each pair once; each pair lies in two triangles."""
    laplacians = make(ChialvoRingStar).laplacians
    complete = torch.ones(4, 4, dtype=torch.float64) - 4 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(laplacians["star"] + laplacians["ring"], complete)
    torch.testing.assert_close(laplacians["triadic"], 2 * complete)


def test_a_larger_network_has_the_triangles_of_hub_and_ring():
    laplacians = make(ChialvoRingStar, neurons=7).laplacians
    assert laplacians["star"].diagonal().tolist() == [-6, -1, -1, -1, -1, -1, -1]
    assert laplacians["ring"].diagonal().tolist() == [0, -2, -2, -2, -2, -2, -2]
    assert laplacians["triadic"][0, 1:].tolist() == [2] * 6  # each spoke lies in two triangles
    assert laplacians["triadic"][1].tolist() == [2, -4, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("neurons", [4, 6])
def test_eigenvalues_at_the_synchronous_fixed_point(neurons):
    """Each mode of the coupling with eigenvalue l gives those of [[2x exp(y-x) - x^2 exp(y-x) + l, x - k], [-b, a]]."""
    g = make(ChialvoRingStar, neurons=neurons)
    p, (x, y) = parameters(g), resting()
    state = torch.tensor([x] * neurons + [y] * neurons, dtype=torch.float64)
    torch.testing.assert_close(g.step(state, p), state, rtol=0, atol=1e-13)
    coupling = sum(p[name] * w for name, w in g.laplacians.items())
    gain = math.exp(y - x)
    blocks = [
        [[2 * x * gain - x * x * gain + float(mode), x * x * gain], [-B, A]] for mode in torch.linalg.eigvalsh(coupling)
    ]
    expected = torch.block_diag(*(torch.tensor(block, dtype=torch.float64) for block in blocks))
    found = sorted_eigenvalues(jacobian(lambda s: g.step(s, p), state))
    torch.testing.assert_close(found, sorted_eigenvalues(expected), rtol=0, atol=1e-6)


def test_turning_the_ring_turns_the_motion():
    g = make(ChialvoRingStar, neurons=6)
    p, state = parameters(g), torch.rand(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = torch.tensor([0, 5, 1, 2, 3, 4])
    both = torch.cat([turn, turn + 6])
    torch.testing.assert_close(g.step(state[:, both], p), g.step(state, p)[:, both], rtol=0, atol=1e-14)


def test_synchronous_neurons_stay_so_and_follow_one_neuron():
    g = make(ChialvoRingStar)
    p, state = parameters(g), torch.tensor([0.4] * 4 + [0.7] * 4, dtype=torch.float64)
    x, y = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    for _ in range(20):
        state, (x, y) = g.step(state, p), chialvo(x, y, A, B, C, K)
    torch.testing.assert_close(state, torch.stack([x] * 4 + [y] * 4), rtol=1e-9, atol=0)


def test_coupling_too_strong_is_told():
    with pytest.raises(ValueError, match="ChialvoRingStar: a trajectory ran to infinity; use weaker coupling"):
        make(ChialvoRingStar, star=[3.0, 3.0]).group(0)


def test_the_default_network_is_chaotic_and_out_of_step_and_strong_coupling_synchronises():
    def spread(g: ChialvoRingStar) -> float:
        return float(g.group(0)[:, :, :4].std(2).mean())

    g = make(ChialvoRingStar, frames=200)
    p = parameters(g)
    assert largest_exponent(lambda x: g.step(x, p), g.initial_states(list(range(32))), 500, 1500) > 0.03
    assert spread(g) > 0.1
    assert spread(make(ChialvoRingStar, frames=200, star=[0.05, 0.05], ring=[0.05, 0.05])) < 1e-6


# Chain


def test_the_chain_by_hand():
    """Two Chialvo neurons with a Rulkov neuron between them, four strengths."""
    g = make(ChialvoRulkov, from_left=[0.2, 0.03], from_right=[0.01, 0.4])
    s = torch.tensor([0.5, -0.3, 0.9, 0.2, -3.1, 0.6], dtype=torch.float64)
    (x1, x2, x3, y1, y2, y3), out = s, g.step(s, parameters(g))
    (f1, r1), (f3, r3) = chialvo(x1, y1, A, B, C, K), chialvo(x3, y3, A, B, C, K)
    f2, r2 = rulkov(x2, y2, 4.3, 1e-3, -1.0)
    voltages = [f1 + 0.01 * (x2 - x1), f2 + 0.2 * (x1 - x2) + 0.4 * (x3 - x2), f3 + 0.03 * (x2 - x3)]
    torch.testing.assert_close(out, torch.stack([*voltages, r1, r2, r3]), rtol=1e-14, atol=1e-14)


def test_the_chain_reads_the_same_from_the_other_end():
    g = make(ChialvoRulkov, chain="ccrr", from_left=[0.1, 0.02, 0.03], from_right=[0.04, 0.05, 0.06])
    h = make(ChialvoRulkov, chain="rrcc", from_left=[0.06, 0.05, 0.04], from_right=[0.03, 0.02, 0.1])
    s, p = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), parameters(g)
    back = torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])
    torch.testing.assert_close(h.step(s[:, back], p), g.step(s, p)[:, back], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "cls,change,message",
    [
        (ChialvoRingStar, {"neurons": 3}, "neurons=3"),
        (ChialvoRingStar, {"burn_in": -1}, "burn_in=-1"),
        (ChialvoRingStar, {"dt_save": 0.5}, "dt_save=0.5: must be a whole number"),
        (ChialvoRulkov, {"chain": "cxc"}, "chain='cxc'"),
        (ChialvoRulkov, {"from_left": [0.1]}, r"from_left=\[0.1\]: needs one strength for each of the 2 links"),
    ],
)
def test_impossible_configs_are_refused(cls, change, message):
    with pytest.raises(ValueError, match=message):
        make(cls, **change)


@pytest.mark.parametrize("cls", [ChialvoRingStar, ChialvoRulkov])
def test_defaults_give_bursting_neurons(cls):
    series = make(cls, frames=300).group(0)
    assert series.shape[1] == 300 and np.abs(series).max() < 10 and (series[:, :, 0].std(1) > 0.05).all()


def test_iterations_are_counted():
    every, each = make(ChialvoRingStar, burn_in=7).group(0), make(ChialvoRingStar, burn_in=10, dt_save=3.0).group(0)
    np.testing.assert_allclose(each[:, :6], every[:, 3:19:3], rtol=1e-9)
