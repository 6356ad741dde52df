"""Which checkpoints are kept, as a pure function and by a real saver."""

import math

import pytest
import torch

from datamodules.store import Store
from trainer.checkpoint import Checkpointer, Retention, committed_steps
from trainer.checkpoint.retention import Entry, Ledger


def steps(rule: Retention, entries: list[Entry], **kwargs) -> list[int]:
    return sorted(rule.kept(entries, **kwargs))


def test_every_rule_keeps_its_own():
    entries = [Entry(step, 60.0 * step, {"val/loss": abs(step - 4.2)}) for step in range(1, 10)]
    assert steps(Retention(keep_last=2), entries) == [8, 9]
    assert steps(Retention(keep_last=2, keep_every=3), entries) == [3, 6, 8, 9]
    assert steps(Retention(keep_last=2, keep_minutes=4), entries) == [1, 5, 8, 9]
    assert steps(Retention(keep_last=2, best="val/loss", keep_best=2), entries) == [4, 5, 8, 9]
    assert steps(Retention(keep_last=2, best="val/loss", best_mode="max"), entries) == [8, 9]
    assert Retention(best="val/loss").kept(entries)[4] == "best"


@pytest.mark.parametrize("bad", [{"keep_last": 1}, {"keep_every": -5}, {"keep_minutes": -1}, {"keep_best": -1}])
def test_a_rule_that_would_remove_what_it_should_not_is_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.* at least"):
        Retention(**bad)


def test_damaged_ones_do_not_count_and_nothing_is_kept_for_a_metric_that_is_no_number():
    entries = [Entry(step, 0.0, {"val/loss": math.nan} if step == 1 else None) for step in range(1, 6)]
    assert steps(Retention(keep_last=2), entries, whole=lambda step: step != 5) == [3, 4, 5]
    assert steps(Retention(keep_last=2, best="val/loss"), entries) == [4, 5]


def test_a_clock_that_jumps_back_keeps_more_and_not_less():
    entries = [Entry(step, created) for step, created in enumerate([0.0, 600.0, 1200.0, 100.0, 160.0, 700.0], start=1)]
    assert steps(Retention(keep_last=2, keep_minutes=10), entries) == [1, 2, 3, 4, 5, 6]
    entries = [Entry(1, 1e9), Entry(2, 1e9 + 30), Entry(3, 60.0), Entry(4, 90.0), Entry(5, 95.0)]
    assert steps(Retention(keep_last=2, keep_minutes=10), entries) == [1, 3, 4, 5]


def test_the_best_survives_also_a_restart(tmp_path):
    rule = Retention(keep_last=2, best="val/loss")
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    values = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: math.nan, 6: 4.0}
    for step, value in values.items():
        saver = Checkpointer(Store(str(tmp_path)), retention=rule)  # each knows only what lies in the store
        saver.save(step, net, [optimizer], {}, device=torch.device("cpu"))
        saver.wait()
        saver.note(step, {"val/loss": value})
    store = Store(str(tmp_path))
    assert committed_steps(store) == [2, 5, 6]
    assert {entry.step: entry.metrics for entry in Ledger(store).entries()} == {2: {"val/loss": 1.0}, 5: {}, 6: {"val/loss": 4.0}}  # fmt: skip
    assert store.list("metrics") == [f"metrics/step-0000000{step}.json" for step in (2, 5, 6)]
    saver.retention = Retention(keep_last=2)
    saver.save(7, net, [optimizer], {}, device=torch.device("cpu"))
    saver.wait()
    assert committed_steps(store) == [6, 7] and store.list("metrics") == ["metrics/step-00000006.json"]
