"""The callbacks in a real Lightning loop, on two ranks, and against injected clocks."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from datamodules.store import Store
from modules.tasks.base import Task
from tests.helpers.distributed import run_distributed
from tests.trainer.test_diagnostics import Net
from trainer.callbacks.diagnostics import DiagnosticsLog
from trainer.callbacks.metrics import MetricsLog
from trainer.callbacks.progress import Progress
from trainer.callbacks.throughput import Throughput
from trainer.callbacks.validation import MissedValidation
from trainer.records import MetricsWriter, Row, TraceWriter, read_metrics, read_trace, start_attempt

LR = 0.1


def _batch(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"x": torch.randn(4, 5, generator=generator), "index": torch.arange(4) + 4 * number}


class Batches(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        number = 0
        while True:
            yield _batch(number)
            number += 1


class Held(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return _batch(100 + number)


class Toy(Task):
    """Mean square of the outputs; per-sample counts differ when the batch has a mask."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, None)
        self.optimizers_factory = self._optimizers

    def _optimizers(self, network: nn.Module) -> Any:
        optimizer = torch.optim.SGD(network.parameters(), lr=LR)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    def loss_terms(self, batch: Any) -> Any:
        error = self.network(batch["x"]).square().mean(1)
        extras = {"mean_x": batch["x"].mean(), "max_x": batch["x"].amax(), "count": len(error)}
        if "mask" in batch:
            return torch.where(batch["mask"], error, 0.0).sum(), batch["mask"].sum(), extras
        return error.sum(), error.numel(), extras

    def bind(self, spec: Any) -> None:
        pass

    def example_batch(self, batch_size: int, device: Any = "meta") -> Any:
        return {"x": torch.zeros(batch_size, 5, device=device)}

    def evaluation_step(self, batch: Any) -> Any:
        total, count, _ = self.loss_terms(batch)
        return {"loss": (total, count)}


def _fit(tmp_path: Path, steps: int, accumulate: int, callbacks: list[Any], **options: Any) -> lightning.Trainer:
    torch.manual_seed(0)
    task = Toy(Net())
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    held = DataLoader(Held(), batch_size=None) if "val_check_interval" in options else None
    trainer.fit(task, DataLoader(Batches(), batch_size=None), held)
    return trainer


def _reference(steps: int, accumulate: int) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, relative update) per step of the bare loop."""
    torch.manual_seed(0)
    network = Net()
    rows, numbers = [], iter(range(10**6))
    for step in range(steps):
        losses = [network(_batch(next(numbers))["x"]).square().mean() for _ in range(accumulate)]
        loss = torch.stack(losses).mean()
        network.zero_grad()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        weights = torch.cat([p.detach().flatten() for p in network.parameters()])
        lr = LR / (1 + step)
        rows.append((loss.item(), gradient.norm().item(), (lr * gradient.norm() / weights.norm()).item()))
        with torch.no_grad():
            for p in network.parameters():
                assert p.grad is not None
                p -= lr * p.grad  # type: ignore[misc]
    return rows


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_of_a_run_equal_the_bare_loop(tmp_path: Path, accumulate: int) -> None:
    store = Store(str(tmp_path / "run"))
    log = MetricsLog(MetricsWriter(store, 1), every=3, trace=TraceWriter(store, 1, 0))
    shown: list[Row] = []
    log.subscribe(shown.extend)
    diagnostics = DiagnosticsLog(["gradients", "updates"], 2, log)
    options = {"val_check_interval": 4 * accumulate, "check_val_every_n_epoch": None, "gradient_clip_val": 1e9}
    _fit(tmp_path, 7, accumulate, [diagnostics, log], **options)

    rows = read_metrics(store)
    assert rows == [row | {"attempt": 1} for row in sorted(shown, key=lambda row: row["step"])]  # bitwise
    train = [row for row in rows if "loss" in row]
    reference = _reference(7, accumulate)
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in train] == pytest.approx([loss for loss, _, _ in reference], rel=1e-6)
    assert [row["lr"] for row in train] == pytest.approx([LR / (1 + step) for step in range(7)], rel=1e-12)
    micro = [[_batch(step * accumulate + k)["x"] for k in range(accumulate)] for step in range(7)]
    assert [row["mean_x"] for row in train] == pytest.approx([torch.stack(x).mean().item() for x in micro], abs=1e-6)
    assert [row["max_x"] for row in train] == [torch.stack(x).amax().item() for x in micro]
    assert {row["count"] for row in train} == {4.0}
    assert [row["step"] for row in train if "diag/gradients/norm" in row] == [2, 4, 6]
    for row in train:
        if row["step"] % 2 == 0:
            _, norm, update = reference[row["step"] - 1]
            assert row["diag/gradients/norm"] == pytest.approx(norm, rel=1e-5)
            assert row["diag/updates/relative"] == pytest.approx(update, rel=1e-4)
    validation = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in validation] == [4]
    trace = read_trace(store)
    assert [row["step"] for row in trace] == [1, 2, 3, 4, 5, 6, 7]
    assert [i for row in trace for i in row["index"]] == list(range(4 * accumulate * 7))


def test_rows_do_not_depend_on_how_often_they_are_read(tmp_path: Path) -> None:
    found = []
    for every in (1, 4):
        store = Store(str(tmp_path / f"run{every}"))
        _fit(tmp_path, 6, 2, [MetricsLog(MetricsWriter(store, 1), every=every)])
        found.append([{k: v for k, v in row.items() if k != "time"} for row in read_metrics(store)])
    assert found[0] == found[1]  # bitwise


def test_gradients_are_measured_after_the_mean_over_uneven_counts() -> None:
    """The module finishes that mean in a hook which Lightning calls after the callbacks."""
    torch.manual_seed(0)
    task = Toy(Net())
    log = MetricsLog(SimpleNamespace(rank0=True), every=1)  # type: ignore[arg-type]
    diagnostics = DiagnosticsLog(["gradients"], 1, log)
    trainer: Any = SimpleNamespace(global_step=0)
    optimizer = torch.optim.SGD(task.network.parameters(), lr=0.0)
    task._trainer = SimpleNamespace(accumulate_grad_batches=2, strategy=None)  # type: ignore[assignment]
    batches = [_batch(n) | {"mask": torch.arange(4) < valid} for n, valid in enumerate((1, 4))]
    for number, batch in enumerate(batches):
        diagnostics.on_train_batch_start(trainer, task, batch, number)
        loss = task.training_step(batch, number)["loss"] / 2
        task.backward(loss)
    diagnostics.on_before_optimizer_step(trainer, task, optimizer)
    task.on_before_optimizer_step(optimizer)  # as Lightning does next: must change nothing
    trainer.global_step = 1
    diagnostics.on_train_batch_end(trainer, task, {}, batches[-1], 1)
    task.zero_grad()
    terms = [task.loss_terms(batch) for batch in batches]
    (sum(t[0] for t in terms) / 5).backward()
    expected = torch.cat([p.grad.flatten() for p in task.network.parameters() if p.grad is not None]).norm()
    assert log._pushed["diag/gradients/norm"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_result_that_is_no_scalar_is_named(tmp_path: Path) -> None:
    log = MetricsLog(MetricsWriter(Store(str(tmp_path)), 1), every=1)
    with pytest.raises(ValueError, match=r"training_step returned profile of shape \(3,\)"):
        log.on_train_batch_end(None, None, {"loss": torch.tensor(1.0), "profile": torch.ones(3)}, {}, 0)  # type: ignore[arg-type]


def _two_ranks(folder: str) -> tuple[int, list[Row]]:
    rank = dist.get_rank()
    store = Store(folder)
    log = MetricsLog(MetricsWriter(store, 1, rank0=rank == 0), every=4, trace=TraceWriter(store, 1, rank))
    shown: list[Row] = []
    log.subscribe(shown.extend)
    trainer: Any = SimpleNamespace(global_step=0)
    log.on_train_start(trainer, None)  # type: ignore[arg-type]
    calls, reduce = 0, dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    dist.all_reduce = counted
    for step in range(1, 11):
        trainer.global_step = step
        outputs = {"loss": torch.tensor(float(step + 10 * rank)), "max_y": torch.tensor(float(step * (1 - 2 * rank)))}
        log.push({"diag/a/max_b": torch.tensor(float(rank))} if step == 2 else {})
        log.on_train_batch_end(trainer, None, outputs, {"index": torch.tensor([step, rank])}, 0)  # type: ignore[arg-type]
    in_steps = calls
    log.flush()
    log.flush()  # nothing waits: no collective, and no harm
    return in_steps, [{k: v for k, v in row.items() if k != "time"} for row in shown]


def test_two_ranks_reduce_once_every_k_steps(tmp_path: Path) -> None:
    (calls, rows), (_, same) = run_distributed(_two_ranks, 2, str(tmp_path))
    assert rows == same
    assert calls == 2 * 2  # steps 4 and 8: means, maxima
    assert [row["loss"] for row in rows] == [step + 5.0 for step in range(1, 11)]
    assert [row["max_y"] for row in rows] == [float(step) for step in range(1, 11)]
    assert rows[1]["diag/a/max_b"] == 1.0
    store = Store(str(tmp_path))
    assert [row["step"] for row in read_metrics(store)] == list(range(1, 11))
    assert [(row["step"], row["rank"]) for row in read_trace(store)] == [(s, r) for s in range(1, 11) for r in (0, 1)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_against_a_known_timetable(tmp_path: Path) -> None:
    clock = Clock()
    log = MetricsLog(MetricsWriter(Store(str(tmp_path)), 1), every=5)
    shown: list[Row] = []
    log.subscribe(shown.extend)
    throughput = Throughput(
        log, global_batch=8, tokens_per_sample=16, flops_per_sample=10**12, peak=(8e12, "a sheet"), clock=clock
    )
    trainer: Any = SimpleNamespace(
        global_step=0,
        world_size=2,
        datamodule=SimpleNamespace(metrics=lambda: {"wait": 1.5}),
        sanity_checking=True,  # keeps validation rows out
    )
    order: list[Any] = [log, throughput]

    def call(hook: str, *args: Any) -> None:
        for callback in order:
            getattr(callback, hook)(trainer, None, *args)

    call("on_train_start")
    for step in range(1, 11):
        clock.now += 0.25  # the loader
        call("on_train_batch_start", {}, 0)
        clock.now += 7.0 if step == 1 else 0.75
        trainer.global_step = step
        if step == 7:  # where a checkpoint callback stands in the list
            log.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)}, {}, 0)  # type: ignore[arg-type]
            with throughput.stalled():
                clock.now += 3.0
            throughput.on_train_batch_end(trainer, None, {}, {}, 0)  # type: ignore[arg-type]
            call("on_validation_start")
            clock.now += 2.0
            call("on_validation_end")
        else:
            call("on_train_batch_end", {"loss": torch.tensor(1.0)}, {}, 0)

    first, second = (row for row in shown if "throughput/steps_per_s" in row)
    assert (first["step"], second["step"]) == (5, 10)
    for row in (first, second):  # a step of one second, a quarter of it waiting
        assert row["throughput/steps_per_s"] == pytest.approx(1.0)
        assert row["throughput/samples_per_s"] == pytest.approx(8.0)
        assert row["throughput/tokens_per_s"] == pytest.approx(128.0)
        assert row["throughput/data_wait"] == pytest.approx(0.25)
        assert row["throughput/tflop_per_s_per_device"] == pytest.approx(4.0)
        assert row["throughput/mfu"] == pytest.approx(0.5)
        assert row["stream/wait"] == 1.5
    assert (first["throughput/checkpoint_s"], first["throughput/validation_s"]) == (0.0, 0.0)
    assert (second["throughput/checkpoint_s"], second["throughput/validation_s"]) == (3.0, 2.0)
    summary = throughput.summary()
    assert summary["seconds"] == pytest.approx(7.25 + 9 + 5)
    assert summary["training_seconds"] == pytest.approx(7.25 + 9)
    assert summary["first_step_seconds"] == pytest.approx(7.25)
    assert summary["data_wait_seconds"] == pytest.approx(2.5)
    assert summary["steps_per_s"] == pytest.approx(1.0)
    assert summary["goodput"] == pytest.approx(10 * 0.75 / (7.25 + 9 + 5))
    assert (summary["peak_flop_per_s"], summary["peak_source"]) == (8e12, "a sheet")


def test_goodput_counts_what_earlier_attempts_took_and_kept(tmp_path: Path) -> None:
    """Resumed at step 6 of a run that first started 90 s ago: the steps that were lost with it are no gain."""
    clock = Clock()
    log = MetricsLog(MetricsWriter(Store(str(tmp_path)), 1), every=100)
    throughput = Throughput(log, global_batch=8, first_start=10.0, clock=clock, wall=lambda: 100.0)
    trainer: Any = SimpleNamespace(global_step=6, world_size=1)
    throughput.on_train_start(trainer, None)  # type: ignore[arg-type]
    for _ in range(4):
        throughput.on_train_batch_start(trainer, None, {}, 0)  # type: ignore[arg-type]
        clock.now += 2.5
        trainer.global_step += 1
        throughput.on_train_batch_end(trainer, None, {}, {}, 0)  # type: ignore[arg-type]
    assert throughput.summary()["elapsed_seconds"] == pytest.approx(100.0)
    assert throughput.summary()["goodput"] == pytest.approx(10 * 2.5 / 100.0)


def test_progress_without_a_terminal_prints_a_line_now_and_then(tmp_path: Path) -> None:
    clock, stream = Clock(), io.StringIO()
    log = MetricsLog(MetricsWriter(Store(str(tmp_path)), 1), every=1)
    progress = Progress(log, samples_per_step=4, stream=stream, clock=clock)
    trainer: Any = SimpleNamespace(global_step=0, max_steps=40)
    for callback in (log, progress):
        callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    for step in range(1, 31):
        clock.now += 1.0
        trainer.global_step = step
        for callback in (log, progress):
            callback.on_train_batch_end(trainer, None, {"loss": torch.tensor(0.5)}, {}, 0)  # type: ignore[arg-type]
    progress.on_train_end(trainer, None)  # type: ignore[arg-type]
    lines = stream.getvalue().splitlines()
    assert [re.search(r"step (\d+)/40", line)[1] for line in lines] == ["10", "20", "30"]  # type: ignore[index]
    assert "loss 0.5" in lines[0] and "4 samples/s" in lines[0] and "ETA 0:00:30" in lines[0]


def test_progress_on_a_terminal_and_on_other_ranks(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for rank0 in (True, False):
        stream = Terminal()
        log = MetricsLog(MetricsWriter(Store(str(tmp_path)), 1, rank0=rank0), every=2)
        _fit(tmp_path, 4, 1, [log, Progress(log, samples_per_step=4, stream=stream)])
        assert ("4/4" in stream.getvalue() and "loss" in stream.getvalue()) if rank0 else stream.getvalue() == ""


def test_what_validation_was_lost_is_asked_of_the_step_that_was_really_loaded(tmp_path: Path) -> None:
    """Not of the newest checkpoint, which may have been fallen back from."""
    store, validated = Store(str(tmp_path)), []
    writer = MetricsWriter(store, start_attempt(store, {}))
    writer.extend([{"step": 4, "time": 1.0, "val/loss": 0.5}, {"step": 8, "time": 2.0, "loss": 0.5}])
    writer.close()
    loop = SimpleNamespace(val_loop=SimpleNamespace(run=lambda: validated.append(trainer.global_step)))
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=loop))
    callback = MissedValidation(store, 4)
    for step in (0, 4, 6, 8):
        trainer.global_step = step
        callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert validated == [8]
