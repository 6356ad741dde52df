"""Shards of the same trajectories are written by one process on one machine, whatever stopped a `make` and wherever it goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import make as make_module
from datamodules.format import ArraySpec, Dataset
from datamodules.make import MakeConfig, generator_of, make
from datamodules.simulators.fields import trajectory_rng
from datamodules.simulators.integrators import dopri5
from datamodules.simulators.skew_product import SkewProduct, System, draw_system


class Stopped(Exception):
    """A `make` was interrupted."""


def stop_at(count: int) -> Callable[[int, int], None]:
    """Progress that stops a `make` when so many shards are written or kept."""

    def report(done: int, total: int) -> None:
        if done == count:
            raise Stopped

    return report


class Chooser:
    """A generator whose values hold the machine that computed them: its choice, as by the bits of a chaotic solution."""

    version = 1
    config = MakeConfig()
    machine = 0.0

    def specs(self) -> dict[str, ArraySpec]:
        fields = ArraySpec((4, 2, 1), "float32", ("trajectory", "time", "channel"), 2)
        return {"fields": fields, "parameters": ArraySpec((4,), "float64", ("trajectory",), 2)}

    def attributes(self) -> dict[str, Any]:
        return {"kind": "fields", "array": "fields", "splits": {"train": [0, 4]}, "channels": ["u"]}

    def source(self) -> dict[str, Any]:
        return {}

    def values(self, name: str, k: int) -> np.ndarray:
        return np.full((2, *self.specs()[name].shape[1:]), self.machine)


@pytest.mark.parametrize("lost", [None, "fields", "parameters"])
def test_choices_are_never_mixed(lost, tmp_path, monkeypatch):
    """Stopped after any shard, one of them lost or none, stopped again on another machine, and finished on a third."""
    generator, machines = Chooser(), set()
    monkeypatch.setattr(make_module, "generator_of", lambda config: ("chooser", generator))
    for first, second in itertools.product((1, 2, 3), (1, 2, 3)):
        config = MakeConfig(url=str(tmp_path / f"{first}-{second}"))
        for generator.machine, count in ((1.0, first), (2.0, second)):
            with pytest.raises(Stopped):
                make(config, stop_at(count))
            if generator.machine == 1.0 and lost is not None:
                Path(config.url, lost, generator.specs()[lost].shard_key(0)).unlink(missing_ok=True)
        generator.machine = 3.0
        dataset = Dataset.open(make(config))
        fields = np.stack([dataset.main.read((i,), 0, 2)[0, 0] for i in range(4)])
        np.testing.assert_array_equal(fields, dataset.arrays["parameters"].read((), 0, 4), err_msg=config.url)
        machines |= set(fields.tolist())
    assert machines == ({1.0, 2.0, 3.0} if lost is None else {2.0, 3.0})  # what was whole was kept


def test_rows_of_a_skew_product_solve_its_fields(tmp_path, monkeypatch):
    """Between the two arrays another machine takes over, on which the first system that passed does not."""
    given = {"train": 2, "validation": 0, "test": 0, "batch": 2, "frames": 4, "dt_save": 0.05, "per_system": 1}
    config = MakeConfig(url=str(tmp_path / "d"), generator={"name": "skew_product", **given})
    with pytest.raises(Stopped):
        make(config, stop_at(1))
    real = SkewProduct._references

    def references(self: SkewProduct, systems: list[System]) -> list[np.ndarray | None]:
        found = real(self, systems)
        found[next(i for i, series in enumerate(found) if series is not None)] = None
        return found

    monkeypatch.setattr(SkewProduct, "_references", references)
    dataset, generator = Dataset.open(make(config)), generator_of(config)[1]
    assert isinstance(generator, SkewProduct)
    for i, seed in enumerate(generator.seeds(0, 2)):
        drawn = (draw_system(generator.config, trajectory_rng(seed, f"system {k}")) for k in range(100))
        row, frames = dataset.arrays["parameters"].read((), i, i + 1)[0], dataset.main.read((i,), 0, 4)
        system = next(system for system in drawn if (system.row == row).all())
        start = torch.from_numpy(frames[:1].astype("f8"))
        again = dopri5(generator.rhs([system]), start, [0.05], 1e-8, 1e-8)[0, 0].numpy()
        np.testing.assert_allclose(again, frames[1], atol=1e-3 * np.abs(frames).max())
