"""Planning ahead against closed forms, torch's profiler, and the machine that is not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.cli import main
from tests.conftest import unavailable
from tests.helpers.runs import fno_config, lm_config
from trainer import config as configs
from trainer.planning import simulate
from trainer.planning.advice import _candidates, changes_numbers, what_fits
from trainer.planning.devices import TABLE, find, recognise
from trainer.planning.estimate import ATTAINABLE, Plan, plan, sent_bytes, speed
from trainer.planning.fake import fake_world
from trainer.planning.simulate import Trace, trace
from trainer.planning.tracking import FORWARD, Route, Tracker, Traffic
from trainer.schema import RunConfig

BENCH = Path(__file__).resolve().parents[2] / "scripts/bench"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A dry run makes its own process group; tests before this one may have left theirs."""
    if dist.is_initialized():
        dist.destroy_process_group()
    yield
    assert not dist.is_initialized()


def _config(kind: str = "lm", world: int = 8, *overrides: str, **train: Any) -> RunConfig:
    raw = (lm_config if kind == "lm" else fno_config)("memory://planning/run", "memory://planning/data", **train)
    raw["resources"] |= {"nodes": max(1, world // 8), "processes_per_node": min(world, 8)}
    raw["train"]["global_batch"] = max(2 * world, 4)
    raw["diagnostics"] = {}
    return configs.load(raw, overrides)


def _bytes(found: Trace, kind: str) -> int:
    return sum(traffic.bytes for route, traffic in found.traffic.items() if route.kind == kind)


def test_tracker_counts_storages_once_until_they_die() -> None:
    with Tracker() as tracker:
        tracker.phase = FORWARD
        a = torch.zeros(1000)
        view = a.view(10, 100)[3:]
        b = a + 1
        del b
        c = a[:500] * 2
        assert tracker.total == 6000  # a and c; the view is a's memory
        del a
        assert tracker.total == 6000  # which the view keeps alive
        del view, c
        assert tracker.total == 0
        assert tracker.finish().bytes == 8000
        tracker.restart()
        storage = torch.empty(100).untyped_storage()
        storage.resize_(4000)
        storage.resize_(0)
        assert (tracker.total, tracker.finish().bytes) == (0, 4000)


def test_tracker_rounds_to_the_allocators_blocks() -> None:
    with Tracker(granule=512) as tracker:
        kept = torch.zeros(129)  # 516 bytes
        assert tracker.total == 1024
        del kept


def test_fsdp_states_and_traffic_equal_the_closed_form() -> None:
    world = 8
    found = trace(_config("lm", world))
    size = 4 * found.parameters
    assert found.memory["parameters"] == size // world  # every shape divides by 8
    tensors = 2 + 2 * 9  # table, readout and blocks of seven matrices and two gains, without the last norm ...
    assert found.memory["optimiser"] == 2 * size // world + 4 * (tensors + 1)  # ... and a step count for each
    assert found.checkpoint_bytes == 3 * size + 4 * (tensors + 1)
    assert _bytes(found, "reduce-scatter") == size
    outside = 4 * (2 * 256 * 16 + 16)  # gathered once, blocks again for the backward pass
    assert _bytes(found, "all-gather") == 2 * size - outside
    assert {route.ranks for route in found.traffic} == {world}


def test_ddp_sends_gradients_once_and_keeps_their_buckets() -> None:
    found = trace(_config("lm", 8, "strategy.name=ddp", "train.micro_batch=1"))
    size = 4 * found.parameters
    assert found.accumulation == 2
    assert found.memory["parameters"] == size
    assert found.memory["gradients"] == 2 * size  # buckets, and what the first micro-batch left
    assert found.traffic == {Route("all-reduce", 8, 8): Traffic(1, size)}


def test_many_micro_batches_are_counted_without_tracing_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config("lm", 2, "train.global_batch=12", "train.micro_batch=1")
    short = trace(config)
    monkeypatch.setattr(simulate, "_TRACED_MICRO_BATCHES", 6)
    whole = trace(config)
    assert short.accumulation == whole.accumulation == 6
    assert (short.peak, short.work, short.traffic) == (whole.peak, whole.work, whole.traffic)


def test_replicas_and_tensor_parallelism_are_told_apart_by_their_routes() -> None:
    replicated = trace(_config("lm", 16, "strategy.replicate=2"))
    routes = {(route.kind, route.ranks, route.across) for route in replicated.traffic}
    assert {("all-gather", 8, False), ("reduce-scatter", 8, False), ("all-reduce", 2, True)} <= routes
    split = trace(_config("lm", 16, "strategy.tensor=2"))
    blocking = {(route.kind, route.ranks) for route in split.traffic if route.blocking}
    assert ("all-reduce", 2) in blocking
    assert split.memory["parameters"] < replicated.memory["parameters"]


def test_a_thousand_ranks_need_no_thousand_machines() -> None:
    found = trace(_config("lm", 1024))
    assert found.data_parallel == 1024 and found.micro_batch == 2
    assert next(iter(found.traffic)).ranks == 1024


def test_recomputation_smaller_batches_and_precision_need_less() -> None:
    plain = trace(_config("lm", 2))
    for override in ("train.activation_checkpointing=block", "train.micro_batch=1"):
        assert trace(_config("lm", 2, override)).peak < plain.peak, override
    fields = trace(_config("fno", 2)).peak
    for precision in ("bf16-true", "16-mixed"):
        assert 0 < trace(_config("fno", 2, f"train.precision={precision}")).peak < 1.2 * fields


def test_work_counts_the_flops_that_torch_counts() -> None:
    found = trace(_config("lm", 1, "strategy.name=ddp"))
    traced = sum(work.flops * count for work, count in found.work.items())
    assert found.flops_per_sample is not None
    # On a CPU attention runs flash kernels, whose backward pass computes the scores again: no model FLOPs.
    assert traced == pytest.approx(found.flops_per_sample * 4, rel=0.15)


def test_zero_divides_what_its_stage_says() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        unavailable("ZeRO needs deepspeed: pip install 'keel[deepspeed]'")
    world = 4
    stages = [trace(_config("lm", world, "strategy.name=deepspeed", f"strategy.stage={s}")) for s in (1, 2, 3)]
    size = 4 * stages[0].parameters
    assert [found.memory["parameters"] for found in stages] == [size, size, size // world]
    assert stages[0].memory["gradients"] - stages[1].memory["gradients"] == size - size // world
    assert all(found.by_arithmetic for found in stages)
    offloaded = trace(
        _config("lm", world, "strategy.name=deepspeed", "strategy.stage=3", "strategy.offload_optimizer=true")
    )
    assert offloaded.memory["optimiser"] == 0 and offloaded.host_bytes == stages[2].memory["optimiser"]


def test_the_memory_of_machines_is_held_to_where_it_is_known() -> None:
    config = _config("lm", 4, "checkpoint.background=true")
    traced = Trace(memory={"parameters": 1}, host_bytes=1000, checkpoint_bytes=4000)
    made = Plan(config, TABLE["h100"], traced)
    assert made.host_bytes == config.resources.processes_per_node * (1000 + 4000 / config.resources.world_size)
    assert made.fits and not dataclasses.replace(made, host_memory=made.host_bytes).fits
    assert dataclasses.replace(made, host_memory=2 * made.host_bytes).fits


def test_planned_memory_is_the_measured_one_within_a_tenth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the cases of `scripts/bench/memory.py`, smaller, in real processes under torch's profiler."""
    monkeypatch.syspath_prepend(str(BENCH))
    import memory

    names = ["fno, ddp, 1 process", "transformer, fsdp, 2 processes, blocks recomputed"]
    sizes = {"transformer": {"model.depth": 2}, "fno": {"model.depth": 2}}
    for name in names:
        measured = []
        for attempt in range(3):  # on a busy machine a batch read ahead can lie in the peak of a run
            (row,) = memory.compare([name], str(tmp_path / f"{name}-{attempt}"), sizes)
            measured.append(row["measured"])
            if row["planned"] == pytest.approx(min(measured), rel=0.1):
                break
        assert row["planned"] == pytest.approx(min(measured), rel=0.1), (name, measured)


def test_rings_use_all_adapters_of_a_machine() -> None:
    device = TABLE["h100"]
    assert speed(Route("all-gather", 8, 8), device) == device.link
    assert speed(Route("all-gather", 1024, 8), device) == 8 * device.network
    assert speed(Route("all-reduce", 2, 1), device) == device.network
    assert sent_bytes(Route("all-reduce", 4, 4), Traffic(1, 1000)) == 1500
    assert sent_bytes(Route("all-gather", 4, 4), Traffic(1, 1000)) == 750


def test_estimates_obey_their_bounds() -> None:
    made = plan(_config("lm", 16, "strategy.tensor=2"), TABLE["h100"])
    assert made.step_seconds >= max(made.compute_seconds, made.overlapped_seconds) > 0
    assert made.blocking_seconds > 0
    assert made.mfu is not None and 0 < made.mfu <= ATTAINABLE
    assert made.checkpoint_seconds(1e9) == made.trace.checkpoint_bytes / 1e9
    assert made.fits


def test_what_would_fit_is_found_and_does() -> None:
    config = _config("lm", 2, "strategy.name=ddp", "train.global_batch=64")
    roomy = plan(config, TABLE["h100"])
    tight = dataclasses.replace(TABLE["h100"], memory=0.5 * roomy.trace.peak)
    assert not plan(config, tight).fits
    found = what_fits(config, tight)
    assert found and not any(changes_numbers(overrides) for overrides, _ in found)
    for overrides, made in found:
        assert made.fits, overrides
        assert made.config.train.global_batch == 64
        assert dataclasses.asdict(made.config.model) == dataclasses.asdict(config.model)
    alone = _config("lm", 1, "strategy.name=ddp", "train.global_batch=1")  # with few ways out
    assert what_fits(alone, dataclasses.replace(tight, memory=1000.0)) == []
    *exact, last = _candidates(config)  # what computes other numbers comes last, and is told
    assert changes_numbers(last) and not any(map(changes_numbers, exact))


def test_devices() -> None:
    assert recognise("NVIDIA H100 80GB HBM3") is TABLE["h100"]
    assert recognise("NVIDIA H100 PCIe") is TABLE["h100-pcie"]
    assert recognise("NVIDIA A1000") is None
    assert all(device.source and device.memory > 2**33 for device in TABLE.values())
    here = find("cpu")
    assert here.single > 1e8 and "measured" in here.source
    with pytest.raises(ValueError, match="device=h1000: unknown; one of b200"):
        find("h1000")


def test_a_process_of_a_real_group_makes_no_dry_run() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="a process of its own"), fake_world(4, 4):
            pass
    finally:
        dist.destroy_process_group()


def test_command_prints_a_plan_and_refuses_what_will_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = lm_config(str(tmp_path / "run"), str(tmp_path / "data")) | {"diagnostics": {}}
    path = tmp_path / "run.yaml"
    path.write_text(configs.yaml.safe_dump(raw))
    command = ["dryrun", str(path), "--world", "16", "train.global_batch=32"]
    assert main([*command, "--device", "h100"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "fsdp on 16 x NVIDIA H100 SXM (2 x 8)",
        "optimiser",
        "reduce-scatter",
        "MFU",
        "data sheet",
        "at 5 GB/s",
    ):
        assert words in printed
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(TABLE, "t4", dataclasses.replace(TABLE["t4"], memory=400_000.0))
    assert main([*command, "--device", "t4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not fit: a rank needs" in line and "What fits:" in line and "train." in line
    assert main([*command, "--device", "abacus"]) == 2
    assert "device=abacus: unknown" in capsys.readouterr().err
    assert main([*command, "--nodes", "3"]) == 2
    assert "does not divide over 3 machines" in capsys.readouterr().err
    assert main(["dryrun", str(path), "--world", "7"]) == 2
    assert "global_batch" in capsys.readouterr().err


def test_gpu_check_says_when_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        return
    script = BENCH.parent / "gpu_check.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["gpu-check: there is no CUDA GPU here (torch.cuda.is_available() is False)"]


def test_gpu_check_fails_where_a_run_cannot_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check
    import overhead

    case = "fsdp, saved beside training, continued"
    ended = {"status": "ok", "throughput": {"steps_per_s": 1.0, "samples_per_s": 1.0}, "peak": None, "loss": 1.0}
    again: dict[str, Any] = {}
    ways = {"--plan": {"planned": 1.0}, "--resume": again, "": ended | {"steps": 3, "attempts": 1}}
    monkeypatch.setattr(gpu_check, "start", lambda url, *words: ways[words[0] if words else ""])
    for made in ("fields", "text"):
        monkeypatch.setattr(overhead, made, lambda url: url)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--only", case])
    for found, code in (
        (ended | {"steps": 8, "attempts": 2}, 0),
        ({"error": "it broke"}, 1),
        (ended | {"steps": 8}, 1),
    ):
        again.clear()
        again.update(found)
        assert gpu_check.main() == code, found


def test_gpu_check_joins_figures_of_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check

    def run(name: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "status": "ok", "throughput": {"steps_per_s": 2.0, "samples_per_s": 1.0}, **more}

    ddp, fsdp = (run(name, peak=1 << 30, planned=1 << 30, shared=False) for name in ("ddp", "fsdp"))
    words = ["gpu_check.py", "--markdown", str(tmp_path / "gpu.md")]
    for i, found in enumerate(({"ddp": ddp, "fsdp": {"name": "fsdp", "error": "it broke"}}, {"fsdp": fsdp})):
        saved = {**found, "device": f"card {i}", "machine": {"commit": f"c{i}"}}
        (tmp_path / f"{i}.json").write_text(json.dumps(saved))
        words += ["--from-json", str(tmp_path / f"{i}.json")]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu_check.main() == 0
    page = (tmp_path / "gpu.md").read_text()
    assert "# Keel on one card 0" in page and "; fsdp in another run, at c1" in page and "- commit: c0" in page
    assert "| fsdp | ok | 500 |" in page and "it broke" not in page


def test_gpu_check_runs_from_end_to_end_on_tiny_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check

    case, page = "fsdp, muon, bad steps undone, continued", tmp_path / "gpu.md"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--only", case, "--markdown", str(page)])
    assert gpu_check.main() == 0
    assert f"| {case} | ok, continued |" in page.read_text()
