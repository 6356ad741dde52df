"""Known traps of the libraries below, each with the test that shows that Keel does not fall in; those without a better place
stand here."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator

from tests.conftest import unavailable
from trainer import distributed
from trainer.checkpoint import CheckpointError, CorruptCheckpoint, loading

ROOT = Path(__file__).resolve().parents[2]

TRAPS = {
    "stock Lightning writes an FSDP2 checkpoint for s3:// into a local folder of that name": (
        "test_checkpoint_runs.py::test_two_ranks_save_by_the_clock_in_the_background_to_s3_and_survive_a_failure"
    ),
    "a failed overwrite leaves a mixed checkpoint that looks whole": (
        "test_checkpoint_background.py::test_a_failed_rewrite_of_a_damaged_checkpoint_leaves_none_that_looks_whole"
    ),
    "a committed step is overwritten": (
        "test_checkpoint.py::test_a_committed_step_is_never_overwritten_and_leftovers_are"
    ),
    "CheckpointException is a BaseException: a failed save is lost with its thread": (
        "test_checkpoint_background.py::test_an_error_surfaces_and_the_next_save_is_good"
    ),
    "CheckpointException is a BaseException: a failed load passes every handler": (
        "test_traps.py::test_a_failed_load_is_an_ordinary_error"
    ),
    "process-mode async save hangs without a main guard": (
        "test_checkpoint_background.py::test_a_script_without_a_main_guard_saves_in_the_background"
    ),
    "an upload that is done is committed by the next save only": (
        "test_checkpoint_background.py::test_training_goes_on_and_what_is_saved_is_what_was"
    ),
    "an error of an asynchronous save surfaces at the next one": (
        "test_checkpoint_runs.py::test_so_many_failures_in_a_row_are_survived_and_told"
    ),
    "a resume in mid-epoch begins the loader again": (
        "test_run.py::test_a_crashed_run_continues_without_losing_or_repeating_a_sample"
    ),
    "a resume on another world size gives other means where the batch does not divide": (
        "test_uneven.py::test_the_step_is_that_of_the_mean_over_all_valid_elements"
    ),
    "ZeRO refuses a checkpoint of another world size": (
        "test_deepspeed.py::test_a_checkpoint_goes_into_and_out_of_zero_with_its_optimiser"
    ),
    "the script zero_to_fp32 needs a package that is not there": (
        "test_deepspeed.py::test_a_checkpoint_of_zero_is_one_like_any_other"
    ),
    "DeepSpeed casts the weights of a mixed-precision run": "test_deepspeed.py::test_precisions",
    "DeepSpeed compiles an all-reduce at the first use": "test_deepspeed.py::test_nothing_is_compiled",
    "Lightning's DeepSpeed strategy runs on CUDA only": "test_deepspeed.py::test_every_stage_takes_the_steps_of_ddp",
    "the subclass that lets DeepSpeed run on a CPU keeps it there": (
        "test_traps.py::test_deepspeed_lies_on_the_device_of_its_accelerator"
    ),
    "the norm that clipping returns is a DTensor": (
        "test_sharding.py::test_clipping_by_the_global_norm_equals_the_unsharded_one"
    ),
    "parameters from the meta device hold other values": (
        "test_sharding.py::test_deferred_initial_weights_are_those_of_the_whole_network_bit_for_bit"
    ),
    "the second call of configure_model shards twice": (
        "../modules/test_task_base.py::test_fit_and_validate_with_lightning_in_one_process"
    ),
    "saves beside training need a group for host memory, next to NCCL": "test_traps.py::test_a_group_for_the_host_too",
    "the one who queues a job again is killed with it, before the save is complete": (
        "../cluster/test_slurm_run.py::test_a_run_survives_what_slurm_does_to_it_bit_for_bit"
    ),
    "the metadata of a stock checkpoint is unpickled": "test_checkpoint.py::test_code_in_a_checkpoint_is_not_run",
}


@pytest.mark.parametrize("test", TRAPS.values())
def test_each_trap_has_its_test(test: str) -> None:
    file, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (Path(__file__).parent / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("cause", [CorruptCheckpoint("a file is damaged"), RuntimeError("the network is gone")])
def test_a_failed_load_is_an_ordinary_error(cause: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise dcp.api.CheckpointException("one page of traceback per rank", {0: cause, 1: (cause, None)})  # type: ignore[dict-item]

    assert not issubclass(dcp.api.CheckpointException, Exception)
    monkeypatch.setattr(dcp, "load", fails)
    kind = type(cause) if isinstance(cause, CorruptCheckpoint) else CheckpointError
    with pytest.raises(kind, match=f"loading here failed: {cause}$"):
        loading.load_tensors(SimpleNamespace(url="here"), {}, {})  # type: ignore[arg-type]


def test_deepspeed_lies_on_the_device_of_its_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        unavailable("tests of ZeRO need deepspeed: pip install 'keel[test]'")
    from trainer.strategies.deepspeed import DeepSpeed

    strategy = object.__new__(DeepSpeed)
    strategy._parallel_devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(DeepSpeed, "local_rank", 1)
    strategy._accelerator = object.__new__(CUDAAccelerator)
    assert strategy.root_device == torch.device("cuda", 1)
    strategy._accelerator = object.__new__(CPUAccelerator)
    assert strategy.root_device == torch.device("cpu", 1)


def test_a_group_for_the_host_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # whatever tests before this one left
    for accelerator in ("cuda", "cpu"):
        distributed.init_process_group(accelerator, 60)
    assert asked == ["cpu:gloo,cuda:nccl", "gloo"]
