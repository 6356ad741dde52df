"""How a task is driven: normalisation over ranks and micro-batches, validation sums, the hooks of Lightning."""

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from modules.language.transformer import Transformer, TransformerConfig
from modules.tasks.next_token import NextToken, NextTokenConfig
from tests.helpers.distributed import run_distributed

VOCAB, LENGTH = 11, 8


def task(rate=0.5):
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=VOCAB, width=16, depth=1, heads=2, max_seq_len=LENGTH)
    built = NextToken(Transformer(config), NextTokenConfig(seq_len=LENGTH, vocab_size=VOCAB, z_loss=1e-2))
    built.optimizers_factory = lambda network: (torch.optim.SGD(network.parameters(), lr=rate), None)
    return built


def samples(count, masked):
    """`count` samples; with a mask each has another number of valid targets, from none to all."""
    generator = torch.Generator().manual_seed(7)
    rows = [
        {"tokens": torch.randint(VOCAB, (LENGTH + 1,), generator=generator), "index": torch.tensor(i)}
        for i in range(count)
    ]
    if masked:
        for i, row in enumerate(rows):
            row["mask"] = torch.arange(LENGTH) < (3 * i) % (LENGTH + 1)
    return rows


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**quiet | {"accelerator": "cpu", "devices": 1, "max_epochs": 1} | options)


def batch(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def reference(masked):
    """One SGD step on the mean over all valid targets, written out."""
    built = task()
    total, count, _ = built.loss_terms(batch(samples(8, masked)))
    (total / count).backward()
    return {name: p.detach() - 0.5 * p.grad for name, p in built.network.named_parameters()}


def train(rank, world, accumulate, masked, sharded=False):
    """The same step through Lightning: rank r has the r-th slice of the samples, in micro-batches."""
    size = 8 // world
    rows = samples(8, masked)[rank * size : (rank + 1) * size]
    built = task()
    strategy = DDPStrategy(process_group_backend="gloo") if world > 1 else "auto"
    if sharded:
        strategy = ModelParallelStrategy(process_group_backend="gloo", data_parallel_size=world, tensor_parallel_size=1)
        built.prepare = lambda network: [fully_shard(part) for part in (*network.blocks(), network)][-1]
    fit = trainer(strategy=strategy, devices=world, accumulate_grad_batches=accumulate, use_distributed_sampler=False)
    fit.fit(built, DataLoader(rows, batch_size=size // accumulate))
    whole = {name: p.full_tensor() if sharded else p for name, p in built.network.named_parameters()}
    return {name: p.detach().tolist() for name, p in whole.items()}


def assert_equal_steps(got, expected):
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(got[name]), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_process_steps_along_the_gradient_of_the_mean_over_valid_targets(masked, accumulate):
    assert_equal_steps(train(0, 1, accumulate, masked), reference(masked))


def test_the_difference_would_show():
    """The plain mean of per-micro-batch means is another step: what the tests above would catch."""
    built = task()
    for row in samples(8, True):
        total, count, _ = built.loss_terms(batch([row]))
        (total / count.clamp_min(1) / 8).backward()
    expected = reference(True)
    wrong = {name: p.detach() - 0.5 * p.grad for name, p in built.network.named_parameters()}
    assert max((wrong[name] - expected[name]).abs().max() for name in expected) > 1e-3


CASES = [(1, True, False), (2, True, False), (2, False, False), (2, True, True)]  # accumulate, masked, sharded


def _validate():
    rank = torch.distributed.get_rank()
    built = task()
    logged, calls = {}, []
    built.log = lambda name, value, **_: logged.update({name: float(value)})
    reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **kwargs: (calls.append(1), reduce(*args, **kwargs))[1]
    built.on_validation_epoch_start()
    with torch.no_grad():
        for rows in (samples(8, True)[rank * 4 : rank * 4 + 1], samples(8, True)[rank * 4 + 1 : rank * 4 + 4]):
            built.validation_step(batch(rows), 0)
    built.on_validation_epoch_end()
    torch.distributed.all_reduce = reduce
    return logged, len(calls)


def _on_a_rank():
    """All that needs two processes, at the price of one start."""
    return _validate(), [train(torch.distributed.get_rank(), 2, *case) for case in CASES]


def test_two_processes_equal_one():
    """Steps are those of the mean over all valid targets; validation is their mean, in one collective."""
    built = task()
    with torch.no_grad():
        found = built.evaluation_step(batch(samples(8, True)))
    expected = {f"val/{name}": float(total / count) for name, (total, count) in found.items()}
    for (logged, collectives), steps in run_distributed(_on_a_rank, 2):
        assert collectives == 1
        assert logged == pytest.approx(expected, rel=1e-5)
        for (_, masked, _), got in zip(CASES, steps, strict=True):
            assert_equal_steps(got, reference(masked))


def test_fit_and_validate_with_lightning_in_one_process():
    built = task(rate=0.1)
    prepared = []
    built.prepare = lambda network: prepared.append(network)
    fit = trainer(max_epochs=3)
    rows = samples(8, False)
    fit.fit(built, DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=3))
    after = fit.callback_metrics["val/loss"].item()
    with torch.no_grad():
        total, count = built.evaluation_step(batch(rows))["loss"]
    assert after == pytest.approx((total / count).item(), rel=1e-5)
    assert {"val/loss", "val/bits_per_byte", "val/accuracy"} <= set(fit.callback_metrics)
    fit.validate(built, DataLoader(rows, batch_size=3), verbose=False)
    assert prepared == [built.network]  # sharding or compiling twice would break the network


def test_prepare_may_replace_the_network():
    built = task()
    replacement = torch.nn.Sequential(built.network)
    built.prepare = lambda network: replacement
    built.configure_model()
    built.configure_model()
    assert built.network is replacement


def test_training_step_gives_scalars_for_the_log():
    result = task().training_step(batch(samples(4, False)), 0)
    assert set(result) == {"loss", "cross_entropy", "logit_max"}
    assert result["loss"].requires_grad and not result["cross_entropy"].requires_grad
    assert all(value.ndim == 0 for value in result.values())


def test_a_batch_without_valid_targets_has_no_gradient():
    rows = batch(samples(4, True))
    rows["mask"].zero_()
    built = task()
    built.training_step(rows, 0)["loss"].backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in built.network.parameters())


def test_schedulers_step_with_the_optimiser_and_a_missing_factory_is_named():
    built = task()
    optimizer = torch.optim.SGD(built.network.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    built.optimizers_factory = lambda network: (optimizer, scheduler)
    assert built.configure_optimizers() == {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }
    built.optimizers_factory = None
    with pytest.raises(RuntimeError, match=r"NextToken.optimizers_factory is not set"):
        built.configure_optimizers()
