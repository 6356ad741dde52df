"""Which checkpoints are kept, as a pure function and by a real saver."""

import math
import threading

import pytest
import torch

from datamodules.store import Store
from trainer.callbacks.recovery import Rollback
from trainer.checkpoint import Checkpointer, Retention, committed_steps
from trainer.checkpoint.retention import Entry, Ledger
from trainer.rollback import go_back


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


def test_a_metric_that_is_noted_before_the_save_begins_in_the_background_is_kept(tmp_path, monkeypatch):
    """Validation may be over before the thread that uploads has looked at what lies there."""
    noted, listing = threading.Event(), Store.list

    def later(store: Store, prefix: str = "") -> list[str]:
        assert threading.current_thread() is threading.main_thread() or noted.wait(20)
        return listing(store, prefix)

    monkeypatch.setattr(Store, "list", later)
    store = Store(str(tmp_path))
    saver = Checkpointer(store, retention=Retention(best="val/loss"), background=True)
    net = torch.nn.Linear(2, 2)
    for value in (1.0, 2.0):  # the second time the step is written anew, and the first value is no longer its own
        noted.clear()
        saver.save(1, net, [torch.optim.SGD(net.parameters(), lr=1.0)], {}, device=torch.device("cpu"))
        saver.note(1, {"val/loss": value})
        noted.set()
        saver.wait()
        assert [entry.metrics for entry in saver._ledger.entries()] == [{"val/loss": value}]
        assert [entry.metrics for entry in Ledger(store).entries()] == [{"val/loss": value}]
        (tmp_path / "step-00000001" / "state.pt").unlink()
    saver.save(1, net, [torch.optim.SGD(net.parameters(), lr=1.0)], {}, device=torch.device("cpu"))
    saver.wait()
    assert [entry.metrics for entry in Ledger(store).entries()] == [None]


def test_metrics_that_are_noted_while_they_are_read_are_kept(tmp_path, monkeypatch):
    store, net = Store(str(tmp_path)), torch.nn.Linear(2, 2)
    Checkpointer(store).save(1, net, [torch.optim.SGD(net.parameters(), lr=1.0)], {}, device=torch.device("cpu"))
    ledger = Ledger(store)

    def late(self: Ledger, step: int) -> None:
        ledger.note(step, {"val/loss": 1.0})  # by the other thread, after the look

    monkeypatch.setattr(Ledger, "_values", late)
    assert [entry.metrics for entry in ledger.entries()] == [{"val/loss": 1.0}]


@pytest.mark.parametrize(("bad", "commits", "target"), [(7, 1, 6), (7, 2, 4), (6, 2, 2), (7, 9, 2), (2, 2, None)])
def test_a_rollback_goes_back_so_many_commits_before_the_bad_step(tmp_path, bad, commits, target):
    store, net = Store(str(tmp_path)), torch.nn.Linear(2, 2)
    saver = Checkpointer(store, retention=Retention(keep_last=9))
    for step in (2, 4, 6):
        saver.save(step, net, [torch.optim.SGD(net.parameters(), lr=1.0)], {}, device=torch.device("cpu"))
    saver.wait()
    assert go_back(store, Rollback(bad, 0, "a test"), commits) == target
    assert committed_steps(store) == [step for step in (2, 4, 6) if step <= (target or 0)]


def test_a_rollback_takes_the_metrics_of_what_it_removes_along(tmp_path):
    store, net = Store(str(tmp_path)), torch.nn.Linear(2, 2)
    saver = Checkpointer(store, retention=Retention(keep_last=9))
    for step in (1, 2, 3):
        saver.save(step, net, [torch.optim.SGD(net.parameters(), lr=1.0)], {}, device=torch.device("cpu"))
        saver.wait()
        saver.note(step, {"val/loss": float(step)})
    assert go_back(store, Rollback(3, 0, "a test"), 1) == 2
    assert store.list("metrics") == ["metrics/step-00000001.json", "metrics/step-00000002.json"]
    assert committed_steps(store) == [1, 2]


def test_discovery_names_no_shard(tmp_path, monkeypatch):
    """Folders are asked for their marker: of many ranks a listing of everything is long."""
    store, net = Store(str(tmp_path)), torch.nn.Linear(2, 2)
    saver = Checkpointer(store)
    for step in (2, 4):
        saver.save(step, net, [torch.optim.SGD(net.parameters(), lr=1.0)], {}, device=torch.device("cpu"))
    saver.wait()
    (tmp_path / "step-00000009").mkdir()  # begun and not committed
    (tmp_path / "notes").mkdir()
    monkeypatch.setattr(Store, "list", lambda *_: pytest.fail("a listing of everything"))
    assert committed_steps(store) == [2, 4]
