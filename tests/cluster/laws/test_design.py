"""The next run: by hand on a law, against a brute-force count of what each candidate would tell."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.laws.design import Design, best_at
from cluster.laws.fit import Fit, fit
from cluster.laws.records import DataProblem, of_columns

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


@pytest.fixture(scope="module")
def found() -> Fit:
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e6, 1e8, 5), np.geomspace(1e8, 1e10, 5)))
    rng = np.random.default_rng(0)
    loss = TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"]
    return fit("chinchilla", of_columns(n=n, d=d, loss=loss * np.exp(0.003 * rng.standard_normal(len(n)))))


def test_what_a_run_tells_is_what_the_information_matrix_says(found: Fit) -> None:
    target = {"n": 1e9, "d": 1e11}
    design = Design(found, target)
    axes = {"n": np.array([1e6, 1e8, 4e8]), "d": np.array([1e10, 1e8, 4e10])}
    cost = np.array([1.0, 1.0, 5.0])
    choice = design.choose(axes, cost)
    theta = found.theta[None]
    done = found.law.jacobian(theta)[0]
    towards = found.law.at({name: np.array([value]) for name, value in target.items()}).jacobian(theta)[0, 0]
    variance = []
    for k in range(3):
        one = found.law.at({name: values[k : k + 1] for name, values in axes.items()}).jacobian(theta)[0]
        information = np.vstack([done, one])
        variance.append(design.noise * towards @ np.linalg.solve(information.T @ information, towards))
    assert (design.std**2 - np.array(variance)) / cost == pytest.approx(choice.gain, rel=1e-4)
    assert choice.after == pytest.approx(np.sqrt(variance[choice.index]), rel=1e-5) and choice.after < choice.std


def test_a_prediction_far_away_asks_for_large_runs_until_they_cost_too_much(found: Fit) -> None:
    axes = {"n": np.geomspace(1e6, 4e8, 8), "d": np.geomspace(1e8, 4e10, 8)}
    design = Design(found, best_at(found, 1e22, 6.0))
    assert design.choose(axes, np.ones(8)).index == 7
    assert design.choose(axes, (axes["n"] * axes["d"]) ** 3).index < 7
    assert design.std > Design(found, {"n": 1e7, "d": 1e9}).std  # further away is less certain


def test_as_many_parameters_as_runs_have_no_variance() -> None:
    n, d = np.array([1e6, 1e7, 1e8, 1e6, 1e7, 1e8]), np.array([1e8, 1e8, 1e8, 1e10, 1e10, 1e9])
    loss = TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"]
    made = fit("chinchilla", of_columns(n=n, d=d, loss=loss))
    made.law = made.law.at({"n": n[:5], "d": d[:5]})
    with pytest.raises(DataProblem, match="5 runs leave no freedom"):
        Design(made, {"n": 1e8, "d": 1e10})
