"""DeepSpeed on CPU/gloo, for real: every stage and offload against DDP, and its checkpoints into and out of the others."""

import dataclasses
import importlib.util
import os
import re
import shutil
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from datamodules.store import Store
from modules.tasks.base import Task
from tests.conftest import unavailable
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import lm_config, tiny_text
from trainer import config as configs
from trainer.build import build, check
from trainer.checkpoint import committed_steps, load_module, read_manifest, step_name, verify
from trainer.checkpoint.pieces import Pieces, boxes
from trainer.config import ConfigError
from trainer.planning.simulate import trace
from trainer.records import read_attempts, read_metrics, read_record
from trainer.run import fit

ZERO = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero1_offload": {"stage": 1, "offload_optimizer": True},
    "zero3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
MUP = {
    "parametrization": {
        "name": "mup+depth+horizon",
        "base": {"width": 8, "heads": 1, "depth": 1},
        "base_data": 2048.0,
        "base_batch": 64.0,
    }
}
STEPS, CUT, BATCH = 6, 3, 6
ADAMW = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1}


def settings(url: str, data: str, strategy: dict[str, Any], world: int, **other: Any) -> configs.RunConfig:
    raw = lm_config(url, data, max_steps=STEPS, global_batch=BATCH, micro_batch=1, grad_clip=0.1)
    raw |= {"strategy": strategy, "diagnostics": {"every": 0, "names": []}, "optim": ADAMW}
    raw["resources"] = {**raw["resources"], "processes_per_node": world}
    for section, fields in other.items():
        raw[section] = {**raw[section], **fields} if section in ("train", "checkpoint") else fields
    return configs.load(raw)


def run_all(jobs: list[tuple[configs.RunConfig, bool]]) -> list[str]:
    """Worker: the runs one after the other in these processes; (config, resume) each."""
    torch.set_num_threads(1)
    step = Task.training_step

    def poisoned(self: Task, batch: Any, index: int) -> Any:
        """On rank 1 a gradient is no number in the fourth global batch, though the loss is one."""
        out = step(self, batch, index)
        number = self.trainer.datamodule.position // BATCH + 1
        if name == "poisoned" and number == 4 and self.trainer.global_rank == 1:
            weight = next(self.network.parameters()).flatten()[0]
            out["loss"] = out["loss"] + (weight - weight).sqrt()
        return out

    Task.training_step, found = poisoned, []  # type: ignore[method-assign, assignment]
    for config, resume in jobs:
        name = config.name
        found.append(fit(config, resume=resume)["status"])
    return found


def losses(url: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(Store(url)) if "loss" in row}


def cut_to(source: str, url: str, step: int) -> str:
    """A copy of a finished run as it was after the commit of `step`."""
    shutil.copytree(source, url)
    for other in committed_steps(Store(url).sub("checkpoints")):
        if other > step:
            shutil.rmtree(f"{url}/checkpoints/{step_name(other)}")
    return url


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        unavailable("tests of ZeRO need deepspeed: pip install 'keel[test]'")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URLs of finished runs on two processes."""
    folder = tmp_path_factory.mktemp("runs")
    data = tiny_text(str(folder / "text"))
    found, jobs = {"data": data, "compiled": str(folder / "compiled")}, []
    os.environ["TORCH_EXTENSIONS_DIR"] = found["compiled"]

    def add(name: str, strategy: dict[str, Any], **other: Any) -> None:
        found[name] = str(folder / name)
        config = settings(found[name], data, strategy, 2, **{"checkpoint": {"every": CUT}, **other})
        jobs.append((dataclasses.replace(config, name=name), False))

    add("ddp", {"name": "ddp"})
    add("fsdp", {"name": "fsdp"})
    for name, fields in ZERO.items():
        add(name, {"name": "deepspeed", **fields})
    for name in ("ddp", "fsdp", "zero3"):
        strategy = {"name": "deepspeed", **ZERO[name]} if name in ZERO else {"name": name}
        add(f"mup-{name}", strategy, **MUP)
    for precision in ("bf16-mixed", "bf16-true"):
        add(precision, {"name": "deepspeed", "stage": 2}, train={"precision": precision})
    add("poisoned", {"name": "deepspeed", "stage": 2}, recovery={"nonfinite": "rollback"})
    try:
        assert run_distributed(run_all, 2, jobs, timeout=280) == [["ok"] * len(jobs)] * 2
    finally:
        del os.environ["TORCH_EXTENSIONS_DIR"]
    return found


@pytest.mark.parametrize("name", ZERO)
def test_every_stage_takes_the_steps_of_ddp(runs, name):
    """With accumulated micro-batches and clipping in every step; `test_uneven` has the scale of the gradients."""
    reference, found = losses(runs["ddp"]), losses(runs[name])
    assert list(found) == list(range(1, STEPS + 1)) and reference[STEPS] < reference[1] - 0.02
    np.testing.assert_allclose(list(found.values()), list(reference.values()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_a_parametrisation_is_the_same_under_every_strategy(runs, name):
    """Rates, decay and epsilon of every parameter, as the optimiser holds them, and the losses."""
    reference, found = losses(runs["mup-ddp"]), losses(runs[f"mup-{name}"])
    np.testing.assert_allclose(list(found.values()), list(reference.values()), rtol=0, atol=2e-5)
    assert abs(found[STEPS] - losses(runs["ddp"])[STEPS]) > 1e-3
    ours, theirs = (read_manifest(Store(runs[u]).sub("checkpoints"), STEPS) for u in (f"mup-{name}", "mup-ddp"))
    settings = {key: value for key, value in theirs["scalars"].items() if ".param_groups." in key}
    assert settings == {key: value for key, value in ours["scalars"].items() if ".param_groups." in key}
    law = (STEPS * 6 * 32 / 2048) ** -0.32 * (6 * 32 / 64) ** 0.5
    rates = {key.split(".param_groups.")[1]: value for key, value in settings.items() if key.endswith(".initial_lr")}
    assert rates["network.embedding.weight.initial_lr"] == pytest.approx(3e-3 * law)
    assert rates["network.layers.1.mlp.up.weight.initial_lr"] == pytest.approx(3e-3 * law / 2 / 2**0.5)


CROSS = [  # saved by (world 2), world, strategy
    ("zero1", 2, {"name": "deepspeed", "stage": 1}),
    ("zero2", 2, {"name": "deepspeed", "stage": 2}),
    ("zero3", 2, {"name": "deepspeed", "stage": 3}),
    ("zero1", 2, {"name": "deepspeed", "stage": 3, "offload_optimizer": True}),
    ("zero3", 2, {"name": "fsdp"}),
    ("ddp", 2, {"name": "deepspeed", "stage": 3}),
    ("zero3", 1, {"name": "deepspeed", "stage": 2}),
    ("zero2", 1, {"name": "ddp"}),
    ("zero2", 3, {"name": "deepspeed", "stage": 1}),
    ("fsdp", 3, {"name": "deepspeed", "stage": 3}),
]


def label(case: tuple[str, int, dict[str, Any]]) -> str:
    return f"{case[0]}-{case[1]}-{case[2]['name']}{case[2].get('stage', '')}{'o' * ('offload_optimizer' in case[2])}"


@pytest.fixture(scope="module")
def resumed(runs, tmp_path_factory) -> dict[str, str]:
    """URLs of runs continued from step CUT of another one, at its world size or another."""
    folder = tmp_path_factory.mktemp("resumed")
    found = {}
    for world in (1, 2, 3):
        jobs = []
        for case in CROSS:
            if case[1] == world:
                url = cut_to(runs[case[0]], str(folder / label(case)), CUT)
                found[label(case)] = url
                jobs.append((settings(url, runs["data"], case[2], world, checkpoint={"every": CUT}), True))
        assert run_distributed(run_all, world, jobs) == [["ok"] * len(jobs)] * world
    return found


@pytest.mark.parametrize("case", CROSS, ids=label)
def test_a_checkpoint_goes_into_and_out_of_zero_with_its_optimiser(runs, resumed, case):
    saved, world, strategy = case
    url = resumed[label(case)]
    same = world == 2 and saved == f"zero{strategy.get('stage')}" and len(strategy) == 2
    before, after = losses(runs[saved]), losses(url)
    np.testing.assert_allclose(
        [after[step] for step in range(CUT + 1, STEPS + 1)],
        [before[step] for step in range(CUT + 1, STEPS + 1)],
        rtol=0,
        atol=0 if same else 5e-5,  # AdamW divides by sqrt(v), which is near zero in the first steps
    )
    last = [read_manifest(Store(u).sub("checkpoints"), STEPS) for u in (runs[saved], url)]
    assert last[1]["world_size"] == world and last[0]["scalars"] == last[1]["scalars"]
    assert set(last[0]["tensors"]) - {"rng.00001"} == set(last[1]["tensors"]) - {"rng.00001", "rng.00002"}


def test_a_gradient_that_is_no_number_rolls_back_in_its_step(runs):
    store = Store(runs["poisoned"])
    first, second = read_attempts(store)
    assert second["rollback"] == "a gradient is not finite"  # and not the loss of the next step
    # Found with the rows of steps 4 to 6, whose samples are left out.
    assert (first["resumed_from"], second["resumed_from"], second["skip_to"]) == (0, CUT, STEPS * BATCH)
    found, expected = losses(runs["poisoned"]), losses(runs["zero2"])
    assert [found[n] for n in (1, 2, 3)] == [expected[n] for n in (1, 2, 3)] and np.isfinite(list(found.values())).all()
    record = read_record(store)
    assert (record["status"], record["steps"], record["recovery"]["rollbacks"]) == ("ok", STEPS, 1)


def test_nothing_is_compiled(runs):
    """A host without a compiler will do, and no memory is shared by name."""
    assert not os.path.exists(runs["compiled"]) or not os.listdir(runs["compiled"])


def test_without_deepspeed_a_line_says_so(tmp_path, monkeypatch):
    config = settings(str(tmp_path), "nowhere", {"name": "deepspeed"}, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"DeepSpeed is not installed; pip install 'keel\[deepspeed\]'"):
        check(config)


def test_a_checkpoint_of_zero_is_one_like_any_other(runs, tmp_path):
    """Committed, verified, read without a process group; the same names, shapes and numbers as DDP's."""
    mine, other = (Store(runs[name]).sub("checkpoints") for name in ("zero3", "ddp"))
    assert committed_steps(mine) == [CUT, STEPS] and verify(mine, STEPS) == []
    tasks = []
    for name, store in (("zero3", mine), ("ddp", other)):
        task, _ = build(settings(runs[name], runs["data"], {"name": "ddp"}, 1))
        load_module(store, STEPS, task)
        tasks.append(task.state_dict())
    for name, tensor in tasks[0].items():
        torch.testing.assert_close(tensor, tasks[1][name], rtol=0, atol=2e-4)
    a, b = (read_manifest(store, STEPS)["tensors"] for store in (mine, other))
    assert {k: (v["shape"], v["dtype"]) for k, v in a.items()} == {k: (v["shape"], v["dtype"]) for k, v in b.items()}
    cut = [entry for entry in a.values() if len(entry["chunks"]) > 1]
    assert cut  # really written in parts by two ranks
    files = {chunk["file"] for entry in cut for chunk in entry["chunks"]}
    assert {re.search(r"rank-\d+", file)[0] for file in files} == {"rank-00000", "rank-00001"}  # type: ignore[index]


def test_precisions(runs):
    full = losses(runs["zero2"])
    for name in ("bf16-mixed", "bf16-true"):
        found = losses(runs[name])
        np.testing.assert_allclose(list(found.values()), list(full.values()), rtol=0, atol=0.05)
        assert found != full
        manifest = read_manifest(Store(runs[name]).sub("checkpoints"), STEPS)
        kinds = {v["dtype"] for k, v in manifest["tensors"].items() if k.startswith(("model.network", "optimizer"))}
        assert kinds == {"float32"}  # the masters, not the bfloat16 copies
        saved = sum(c["bytes"] for k, v in manifest["tensors"].items() if k[:4] != "rng." for c in v["chunks"])
        if dist.is_initialized():
            dist.destroy_process_group()  # of tests before this one: a dry run makes its own
        config = settings("memory://run", "memory://data", {"name": "deepspeed"}, 2, train={"precision": name})
        assert trace(config).checkpoint_bytes == pytest.approx(saved, rel=0.01)
    assert read_record(Store(runs["bf16-true"]))["status"] == "ok"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": {"name": "deepspeed", "stage": 4}}, "stage=4: must be 1, 2 or 3"),
        ({"strategy": {"name": "deepspeed", "stage": 2, "offload_parameters": True}}, "needs stage=3"),
        ({"train": {"precision": "16-mixed"}}, "train.precision=16-mixed does not run with strategy.name=deepspeed"),
        ({"optim": {"name": "muon"}}, "optim.name=muon needs whole matrices"),
        (
            {"train": {"compile": True}, "strategy": {"name": "deepspeed", "stage": 3}},
            "train.compile=true does not help",
        ),
        (
            {"strategy": {"name": "deepspeed", "stage": 3}, "recovery": {"parity_every": 2}},
            "recovery.parity_every=2 has no effect",
        ),
        ({"recovery": {"nonfinite": "skip"}}, "recovery: skip cannot undo a step of strategy.name=deepspeed"),
        (
            {"diagnostics": {"every": 2, "names": ["gradients"]}},
            "diagnostics.names: gradients cannot be measured with strategy.name=deepspeed",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        check(settings(str(tmp_path), "nowhere", **{"strategy": {"name": "deepspeed"}, "world": 1, **change}))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (4, 1, 3, 2)])
def test_a_stretch_is_cut_into_few_boxes(shape):
    whole = torch.arange(max(1, int(np.prod(shape)))).reshape(shape)
    for start in range(whole.numel()):
        for stop in range(start, whole.numel() + 1):
            cut = boxes(shape, start, stop)
            assert len(cut) <= max(1, 2 * len(shape) - 1)
            found = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in cut]
            assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(start, stop))


def test_pieces_are_views_and_no_tensor_to_compute_with():
    flat = torch.arange(10.0)
    pieces = Pieces.cut((4, 5), 3, flat)
    assert pieces.shape == (4, 5) and [offsets for offsets, _ in pieces.pieces] == [(0, 3), (1, 0), (2, 0)]
    pieces.pieces[1][1].zero_()
    assert flat.tolist() == [0, 1, 0, 0, 0, 0, 0, 7, 8, 9]
    with pytest.raises(RuntimeError, match="cut into pieces"):
        pieces + 1
