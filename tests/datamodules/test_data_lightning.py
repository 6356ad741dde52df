"""The data modules under a trainer of Lightning's own: its loops, its checkpoints, its callbacks."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.data import FieldsConfig, FieldsData
from datamodules.position import StreamPosition

from .samples import write_fields


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("fields"))
    write_fields(url, trajectories=13, frames=7, per_shard=4, splits={"train": [0, 10], "validation": [10, 13]})
    return url


class Probe(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["index"].tolist())
        return self.layer(batch["fields"].mean((1, 2, 3, 4))[:, None]).square().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validated += batch["index"].tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


@pytest.fixture
def quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


# One endless epoch validated by steps; and several, for each of which Lightning starts the loader anew.
LOOPS: list[dict[str, Any]] = [
    {"val_check_interval": 12, "check_val_every_n_epoch": None},
    {"limit_train_batches": 12},
]


@pytest.mark.parametrize("loop", LOOPS, ids=["endless", "epochs"])
def test_lightning_accumulates_validates_and_goes_on(fields: str, quiet: None, loop: dict[str, Any]) -> None:
    data = FieldsData(FieldsConfig(url=fields, frames=3), global_batch=8, micro_batch=2, seed=3)
    off: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    options: dict[str, Any] = {"accelerator": "cpu", "accumulate_grad_batches": 4, **off, **loop}
    order = data.order
    probe = Probe()
    trainer = lightning.Trainer(max_steps=6, num_sanity_val_steps=1, **options)
    trainer.fit(probe, datamodule=data)
    assert [len(s) for s in probe.seen] == [2] * 24
    assert list(itertools.chain(*probe.seen)) == order.at(np.arange(48)).tolist()
    assert probe.validated == [0, 1, *range(15), *range(15)]
    state = data.state_dict()
    assert (state["epoch"], state["position"]) == (0, 48)

    again = FieldsData(FieldsConfig(url=fields, frames=3), global_batch=8, micro_batch=8, seed=3)
    again.load_state_dict(state)
    probe = Probe()
    trainer = lightning.Trainer(max_steps=2, limit_val_batches=0, **{**options, "accumulate_grad_batches": 1})
    trainer.fit(probe, datamodule=again)
    assert list(itertools.chain(*probe.seen)) == order.at(np.arange(48, 64)).tolist()


OFF: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)


def plain_trainer(steps: int, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(max_steps=steps, accelerator="cpu", limit_val_batches=0, **{**OFF, **options})


def data_of(url: str, **sizes: int) -> FieldsData:
    return FieldsData(FieldsConfig(url=url, frames=3), **{"global_batch": 4, "seed": 3, **sizes})  # type: ignore[arg-type]


def test_a_checkpoint_of_a_plain_trainer_goes_on_where_it_was(fields: str, quiet: None, tmp_path: Path) -> None:
    order, first = data_of(fields).order, plain_trainer(3)
    probe, data = Probe(), data_of(fields)
    first.fit(probe, datamodule=data)
    first.save_checkpoint(tmp_path / "third.ckpt")
    assert list(itertools.chain(*probe.seen)) == order.at(np.arange(12)).tolist() and data.position == 12
    again, data = Probe(), data_of(fields, micro_batch=2)
    plain_trainer(5, accumulate_grad_batches=2).fit(again, datamodule=data, ckpt_path=str(tmp_path / "third.ckpt"))
    assert list(itertools.chain(*again.seen)) == order.at(np.arange(12, 20)).tolist() and data.position == 20


def test_a_checkpoint_in_training_goes_on_where_it_was(fields: str, quiet: None, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    on = {"callbacks": [saver], "enable_checkpointing": True}
    plain_trainer(3, **on).fit(Probe(), datamodule=data_of(fields))
    for micro, steps in ((0, 1), (2, 2), (1, 4)):
        again, data = Probe(), data_of(fields, micro_batch=micro)
        trainer = plain_trainer(5, accumulate_grad_batches=steps)
        trainer.fit(again, datamodule=data, ckpt_path=str(tmp_path / "step=1.ckpt"))
        assert list(itertools.chain(*again.seen)) == data.order.at(np.arange(4, 20)).tolist() and data.position == 20


def test_a_position_that_is_kept_already_is_not_kept_twice(fields: str, quiet: None) -> None:
    trainer, data = plain_trainer(2, callbacks=[StreamPosition()]), data_of(fields)
    trainer.fit(Probe(), datamodule=data)
    assert data.position == 8
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(Probe(), datamodule=data)
    assert data.position == 12
    assert sum(isinstance(c, StreamPosition) for c in trainer.callbacks) == 1  # type: ignore[attr-defined]


def test_a_step_that_is_not_a_global_batch_is_refused(fields: str, quiet: None) -> None:
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=1: .* 2 micro-batches of 2; set it to 2") as caught:
        plain_trainer(2).fit(Probe(), datamodule=data_of(fields, micro_batch=2))
    assert "\n" not in str(caught.value)
