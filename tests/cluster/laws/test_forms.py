"""Laws: exact derivatives, recovery of known parameters, independence of units."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.laws.fit import fit
from cluster.laws.forms import FORMS, Law, lookup
from cluster.laws.records import Runs, of_columns

CENTRES = {"n": 18.0, "d": 22.0, "u": 21.0, "c": 45.0, "h": -3.0, "width": 6.0, "depth": 2.0}


def law_on_points(name: str, count: int = 40, seed: int = 0) -> Law:
    rng = np.random.default_rng(seed)
    kind = FORMS[name]
    axes = {axis: np.exp(CENTRES[axis] + 1.5 * rng.standard_normal(count)) for axis in kind.axes_needed}
    return kind(axes, rng.uniform(2, 4, count))


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_are_exact(name: str) -> None:
    law, rng = law_on_points(name), np.random.default_rng(1)
    theta = np.clip(law.starts()[:3] + 0.02 * rng.standard_normal((3, law.size)), *law.bounds())
    slope, curve = rng.standard_normal((3, 40)), rng.uniform(size=(3, 40))
    centre, kept = law.evaluate(theta)
    gradient, hessian = law.derivatives(theta, kept, slope, curve)
    jacobian = law.jacobian(theta)

    def objective_gradient(at: np.ndarray) -> np.ndarray:
        value, _ = law.evaluate(at)
        return np.einsum("sn,snp->sp", slope + curve * (value - centre), law.jacobian(at))

    np.testing.assert_allclose(gradient, objective_gradient(theta), rtol=1e-9, atol=1e-9)
    for index in range(law.size):
        step = np.zeros(law.size)
        step[index] = 1e-6
        slopes = (law.evaluate(theta + step)[0] - law.evaluate(theta - step)[0]) / 2e-6
        np.testing.assert_allclose(jacobian[:, :, index], slopes, atol=1e-7)
        bends = (objective_gradient(theta + 10 * step) - objective_gradient(theta - 10 * step)) / 2e-5
        np.testing.assert_allclose(hessian[:, index], bends, rtol=1e-4, atol=1e-4 * (1 + np.abs(hessian).max()))


def grid(**axes: np.ndarray) -> dict[str, np.ndarray]:
    mesh = np.meshgrid(*axes.values(), indexing="ij")
    return {name: values.ravel() for name, values in zip(axes, mesh, strict=True)}


N, D = np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6)
C = np.geomspace(1e15, 1e21, 40)
TRUTHS: dict[str, tuple[dict[str, float], dict[str, np.ndarray]]] = {
    "chinchilla": ({"A": 400.0, "B": 1500.0, "E": 1.7, "alpha": 0.34, "beta": 0.37}, grid(n=N, d=D)),
    "tied": ({"A": 400.0, "B": 900.0, "E": 1.7, "alpha": 0.35}, grid(n=N, d=D)),
    "kaplan": ({"Nc": 8.8e13, "Dc": 5.4e13, "alpha": 0.076, "beta": 0.095}, grid(n=N, d=D)),
    "joint": (
        {"A": 2300.0, "B": 9900.0, "E": 1.75, "alpha": 0.42, "beta": 0.43, "gamma": 0.77},
        grid(n=N, d=D),
    ),
    "data_constrained": (
        {"A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.353, "beta": 0.353, "RD": 15.4, "RN": 5.3},
        grid(n=N, d=np.geomspace(1e8, 1e11, 7), u=np.geomspace(1e7, 1e9, 5)),
    ),
    "shape": (
        {"A": 20.0, "B": 900.0, "G": 1.0, "E": 1.7, "alpha": 0.6, "beta": 0.35, "gamma": 1.0},
        grid(width=np.array([64.0, 128, 256, 512]), d=D, depth=np.array([2.0, 4, 8, 16])),
    ),
    "power": ({"A": 50.0, "alpha": 0.05}, {"c": C}),
    "saturating": ({"A": 3e4, "E": 1.5, "alpha": 0.25}, {"c": C}),
    "operator": (
        {"A": 5.0, "B": 1.0, "G": 60.0, "K": 3.0, "E": 0.01, "alpha": 0.4, "beta": 0.5, "gamma": 0.6, "order": 2.0},
        grid(
            n=np.geomspace(1e4, 1e7, 4),
            u=np.array([16.0, 64, 256, 1024]),
            d=np.geomspace(1e4, 1e6, 4),
            h=1 / np.array([16.0, 32, 64, 128]),
        ),
    ),
    "operator_fixed_grid": (
        {"A": 5.0, "B": 1.0, "G": 60.0, "E": 0.02, "alpha": 0.4, "beta": 0.5, "gamma": 0.6},
        grid(n=np.geomspace(1e4, 1e7, 5), u=np.array([16.0, 64, 256, 1024]), d=np.geomspace(1e4, 1e6, 5)),
    ),
}


def runs_of(name: str) -> Runs:
    values, axes = TRUTHS[name]
    v = {key: np.float64(value) for key, value in values.items()}
    n, d, u, h = (axes.get(axis, np.ones(1)) for axis in ("n", "d", "u", "h"))
    if name in ("chinchilla", "tied"):
        loss = v["E"] + v["A"] * n ** -v["alpha"] + v["B"] * d ** -v.get("beta", v["alpha"])
    elif name == "kaplan":
        loss = ((v["Nc"] / n) ** (v["alpha"] / v["beta"]) + v["Dc"] / d) ** v["beta"]
    elif name == "joint":
        loss = v["E"] + (v["A"] * n ** -v["alpha"] + v["B"] * d ** -v["beta"]) ** v["gamma"]
    elif name == "data_constrained":
        u = np.minimum(u, d)
        g = (v["alpha"] * v["A"] / (v["beta"] * v["B"])) ** (1 / (v["alpha"] + v["beta"]))
        unit = np.minimum(n, (u * g) ** (v["beta"] / v["alpha"]) * g)
        seen = u + u * v["RD"] * (1 - np.exp(-(d / u - 1) / v["RD"]))
        held = unit + unit * v["RN"] * (1 - np.exp(-(n / unit - 1) / v["RN"]))
        loss = v["E"] + v["A"] * held ** -v["alpha"] + v["B"] * seen ** -v["beta"]
    elif name == "shape":
        loss = v["E"] + v["A"] * axes["width"] ** -v["alpha"] + v["B"] * d ** -v["beta"]
        loss = loss + v["G"] * axes["depth"] ** -v["gamma"]
    elif name in ("power", "saturating"):
        loss = v.get("E", 0.0) + v["A"] * axes["c"] ** -v["alpha"]
    else:
        loss = v["E"] + v["A"] * n ** -v["alpha"] + v["B"] * u ** -v["beta"] + v["G"] * d ** -v["gamma"]
        loss = loss + (v["K"] * h ** v["order"] if name == "operator" else 0.0)
    return of_columns(**axes, loss=loss)


@pytest.mark.parametrize("name", TRUTHS)
def test_known_parameters_are_recovered(name: str) -> None:
    found = fit(name, runs_of(name), delta=math.inf)
    assert found.status == "CONVERGED"
    truth = TRUTHS[name][0]
    assert found.values == pytest.approx(truth, rel=1e-4)
    assert set(found.values) == set(truth)


@pytest.mark.parametrize("name", ["chinchilla", "kaplan", "joint", "data_constrained"])
def test_units_do_not_matter(name: str) -> None:
    runs = runs_of(name)
    runs.columns["loss"] = runs["loss"] * np.exp(0.003 * np.random.default_rng(0).standard_normal(len(runs)))
    scaled = of_columns(**{k: v * {"n": 1e-6, "d": 1e-9, "u": 1e-9}.get(k, 1.0) for k, v in runs.columns.items()})
    one, other = fit(name, runs), fit(name, scaled)
    assert other.objective == pytest.approx(one.objective, rel=1e-6)
    if name != "data_constrained":  # its bound between N and U has a unit of its own
        assert other.values["alpha"] == pytest.approx(one.values["alpha"], rel=1e-4)


def test_broken_power_laws_fit_what_they_describe() -> None:
    x = C / 1e18
    once = 0.5 + 2.0 * x**-0.1 * (1 + x ** (1 / 0.3)) ** (-0.25 * 0.3)
    found = fit("broken1", of_columns(c=C, loss=once), delta=math.inf)
    assert found.values["d1"] == pytest.approx(1e18, rel=1e-3)
    assert found.values["c1"] == pytest.approx(0.25, rel=1e-3)
    twice = 0.5 + (once - 0.5) * (1 + (C / 1e20) ** (1 / 0.2)) ** (-0.3 * 0.2)
    two = fit("broken2", of_columns(c=C, loss=twice), delta=math.inf, strict=False)
    assert np.abs(two.residuals).max() < 1e-4 < np.abs(fit("broken1", of_columns(c=C, loss=twice)).residuals).max()


def test_an_unknown_law_is_named() -> None:
    with pytest.raises(ValueError, match="no law 'chinchila': choose one of chinchilla"):
        lookup("chinchila")
