"""Every sharding equals the unsharded run: losses, gradient norms, initial weights, clipping; and resumes as any other."""

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from datamodules.store import Store
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import fno_config, lm_config, tiny_fields, tiny_text
from trainer import config as configs
from trainer import strategies
from trainer.build import build
from trainer.checkpoint import read_manifest
from trainer.checkpoint.loading import read_state
from trainer.distributed import LaunchedEnvironment
from trainer.lifecycle import prepare_new, prepare_resume
from trainer.records import read_metrics, read_trace
from trainer.run import fit
from trainer.strategies import blocks, precision
from trainer.strategies.clipping import clip_by_global_norm

CONFIG = {"fno": fno_config, "lm": lm_config}
HARD = ["model.tie_embeddings=true", "model.qk_norm=true", "model.bias=true", "model.mlp=gelu"]
MUP = {
    "lm": ["parametrization.name=mup+depth", "parametrization.base={width: 8, heads: 1, depth: 1}"],
    "fno": ["parametrization.name=mup", "parametrization.base.width=4"],
}
FSDP, DDP = "strategy.name=fsdp", "strategy.name=ddp"
WATCH = "diagnostics.names=[gradients,updates,{}]"
TP, HSDP = "strategy.tensor=2", "strategy.replicate=2"

# (world, kind, overrides, variant of the reference, tolerance of losses and of relative gradient norms)
PARITY: dict[str, tuple[int, str, list[str], str, float]] = {
    "two_tensor_parallel": (2, "lm", [FSDP, TP], "", 1e-5),
    "two_tensor_parallel_with_every_option": (2, "lm", [FSDP, TP, *HARD], "hard", 1e-5),
    "two_recomputed_blocks": (2, "lm", [FSDP, TP, "train.activation_checkpointing=block"], "", 1e-5),
    "two_recomputed_selectively": (2, "lm", [FSDP, TP, "train.activation_checkpointing=selective"], "", 1e-5),
    "two_compiled": (2, "lm", [FSDP, "train.compile=true", "train.activation_checkpointing=selective"], "", 1e-5),
    "two_of_mup": (2, "lm", [FSDP, TP, "train.activation_checkpointing=block", *MUP["lm"]], "mup", 1e-5),
    "two_of_mup_fields": (2, "fno", [FSDP, *MUP["fno"]], "mup", 1e-5),
    "two_bf16_mixed": (2, "lm", [FSDP, "train.precision=bf16-mixed"], "", 5e-4),
    "two_bf16_mixed_fields": (2, "fno", [FSDP, "train.precision=bf16-mixed"], "", 2e-3),
    "two_bf16_true": (2, "lm", [FSDP, "train.precision=bf16-true"], "", 1e-2),
    "two_bf16_true_fields": (2, "fno", [FSDP, "train.precision=bf16-true"], "", 1e-2),
    "two_scaled": (2, "lm", [FSDP, "train.precision=16-mixed", "checkpoint.every=2"], "", 5e-4),
    "two_16_mixed": (2, "lm", [FSDP, TP, "train.precision=16-mixed"], "", 5e-4),
    "two_16_mixed_fields": (2, "fno", [FSDP, "train.precision=16-mixed"], "", 1e-3),
    # A forward without a backward must leave the weights as the next step expects them.
    "two_watched_fields": (2, "fno", [FSDP, HSDP, "train.val_every=1", WATCH.format("activations,spectrum")], "", 1e-5),
    "four_watched": (4, "lm", [FSDP, TP, "train.val_every=1", WATCH.format("activations,logits")], "", 1e-5),
    "four_full": (4, "lm", [FSDP], "", 1e-5),
    "four_shard_grad_op": (4, "fno", [FSDP, "strategy.sharding=shard_grad_op"], "", 1e-5),
    "four_hybrid": (4, "lm", [FSDP, HSDP], "", 1e-5),
    "four_hybrid_fields": (4, "fno", [FSDP, HSDP], "", 1e-5),
    "four_tensor_and_sharded": (4, "lm", [FSDP, TP], "", 1e-5),
    "four_tensor_and_hybrid": (4, "lm", [FSDP, TP, HSDP, *HARD], "hard", 1e-5),
    "four_hybrid_accumulated": (4, "lm", [FSDP, HSDP, "train.micro_batch=1"], "", 1e-5),
    "four_whole_gradients": (4, "lm", [FSDP, "strategy.whole_gradients=true", "train.micro_batch=1"], "", 1e-5),
}

# One run of 16 steps in eight attempts of two steps each: (world, overrides).
CHAIN: list[tuple[int, list[str]]] = [
    (2, [DDP]),
    (2, [FSDP, TP]),
    (2, [FSDP]),
    (4, [FSDP, TP]),
    (4, [FSDP, HSDP]),
    (4, [DDP]),
    (3, [FSDP]),
    (1, [FSDP]),
]


SGD = {"lm": {"name": "sgd", "lr": 4.0, "momentum": 0.9}, "fno": {"name": "sgd", "lr": 0.2, "momentum": 0.9}}


def run(
    url: str, data: dict[str, str], kind: str, world: int, *overrides: str, steps: int = 4, optim: Any = None
) -> configs.RunConfig:
    """By default SGD with a norm that is always clipped: a wrong scale of any gradient shows."""
    raw = CONFIG[kind](url, data[kind], max_steps=steps, global_batch=12, grad_clip=0.05)
    raw["optim"] = optim or SGD[kind]
    raw["diagnostics"] = {"every": 1, "names": ["gradients"]}
    raw["schedule"] = {"name": "constant"}
    config = configs.load(raw, [f"resources.processes_per_node={world}", *overrides])
    prepare_new(config)
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"fno": tiny_fields(str(folder / "fields")), "lm": tiny_text(str(folder / "text"))}


@pytest.fixture(scope="module")
def done(data, tmp_path_factory) -> dict[str, Any]:
    """All runs of this file in as few launches as can be: URLs by name, and what `measure` found by world."""
    folder = tmp_path_factory.mktemp("runs")
    found: dict[str, Any] = {"chain": str(folder / "chain"), "whole": str(folder / "whole")}
    references = {"lm": ("lm", []), "fno": ("fno", []), "lm-hard": ("lm", HARD)}
    references |= {f"{kind}-mup": (kind, words) for kind, words in MUP.items()}
    alone = [run(str(folder / name), data, kind, 1, DDP, *more) for name, (kind, more) in references.items()]
    adamw = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}
    alone.append(run(found["whole"], data, "lm", 1, DDP, steps=2 * len(CHAIN), optim=adamw))
    prepare_new(configs.load(configs.to_dict(alone[-1]) | {"url": found["chain"]}))
    run_distributed(session, 1, alone, "")
    position = 0
    while position < len(CHAIN):
        world = CHAIN[position][0]
        first = world not in found
        names = [name for name, case in PARITY.items() if case[0] == world and first]
        fresh = [run(str(folder / name), data, PARITY[name][1], world, *PARITY[name][2]) for name in names]
        hops = []
        while position < len(CHAIN) and CHAIN[position][0] == world:
            steps = f"train.max_steps={2 * position + 2}"
            hops.append([f"resources.processes_per_node={world}", *CHAIN[position][1], steps])
            position += 1
        first_data = data if first else None
        results = run_distributed(session, world, fresh, found["chain"], hops, first_data, timeout=240)
        if first:
            found[world] = results
    return found | {name: str(folder / name) for name in (*references, *PARITY)}


def session(
    fresh: list[configs.RunConfig],
    chain: str,
    hops: list[list[str]] | None = None,
    data: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Worker function: new runs, then attempts of the chain, then measurements without a run."""
    torch.set_num_threads(1)
    blocks.BACKEND = "aot_eager"  # the compiler's front half: the back half takes a minute on two cores
    for config in fresh:
        if config.checkpoint.every == 2:  # in two attempts
            halves = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=2))
            assert fit(halves)["steps"] == 2
            assert fit(config, resume=True)["steps"] == 4
            continue
        assert fit(config)["status"] == "ok"
        if config.train.compile:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one for all blocks
    for overrides in hops or []:
        if dist.get_rank() == 0:
            prepare_resume(chain, overrides)
        dist.barrier()
        assert fit(configs.load(chain + "/config.yaml"), resume=True)["status"] == "ok"
    return measure(data) if data is not None else {}


def measure(data: dict[str, str]) -> dict[str, Any]:
    """Initial weights and clipping of each layout of this world, against the whole network on this rank."""
    found: dict[str, Any] = {}
    layouts = {"full": [FSDP]}
    if dist.get_world_size() % 2 == 0:
        layouts |= {
            "mup": [FSDP],
            "tensor": [FSDP, TP],
            "hybrid": [FSDP, HSDP],
            "low": [FSDP, "train.precision=bf16-true"],
        }
    for kind in ("lm", "fno"):
        for name, overrides in layouts.items():
            if kind == "fno" and name == "tensor":
                continue
            raw = CONFIG[kind]("unused", data[kind], global_batch=12) | {"url": f"/tmp/unused-{kind}-{name}"}
            world = f"resources.processes_per_node={dist.get_world_size()}"
            more = MUP[kind] if name == "mup" else HARD if kind == "lm" else []
            config = configs.load(raw, [world, *more, *overrides])
            whole = build(config)[0].network
            precision.cast_weights(whole, config.train.precision)
            network, plain = prepared(config), dict(whole.named_parameters())
            same = [
                isinstance(p, DTensor) and torch.equal(p.full_tensor(), plain[n]) for n, p in network.named_parameters()
            ]
            found[f"{kind}-{name}"] = (all(same), len(same) == len(plain), *clipped(network, plain))
    found["scaler"] = scaled()
    return found


def prepared(config: configs.RunConfig) -> Any:
    """The network of a run as its strategy makes it, without a trainer."""
    task, _ = build(config, deferred=True)
    assert all(parameter.is_meta for parameter in task.network.parameters())
    strategy = strategies.build(config, None)
    strategy.cluster_environment = LaunchedEnvironment()
    strategy.parallel_devices = [torch.device("cpu")] * dist.get_world_size()
    strategy.prepare(task.network)
    return task.network


def clipped(network: Any, plain: dict[str, Any]) -> tuple[float, float]:
    """(relative error of the norm, of the clipped gradient): the gradients are the weights themselves."""
    for parameter in (*network.parameters(), *plain.values()):
        parameter.grad = parameter.detach().clone()
    norm = clip_by_global_norm(network.parameters(), 0.5)
    expected = torch.nn.utils.clip_grad_norm_(plain.values(), 0.5)
    worst = max(
        float((p.grad.full_tensor() - plain[n].grad).abs().max() / plain[n].grad.abs().max().clamp_min(1e-9))
        for n, p in network.named_parameters()
    )
    return abs(float(norm / expected) - 1), worst


def scaled() -> tuple[float, bool, float]:
    """One rank's part of a sharded gradient overflows: (scale before, whether the step was left out, scale after)."""
    parameter = torch.nn.Linear(4, 12, bias=False)
    torch.nn.init.ones_(parameter.weight)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.distributed.fsdp.fully_shard(parameter, mesh=mesh)
    optimizer = torch.optim.SGD(parameter.parameters(), lr=1.0)
    scaler = precision.GradScaler(device="cpu", init_scale=8.0)
    scaler.scale(parameter(torch.ones(1, 4)).sum()).backward()
    if dist.get_rank() == dist.get_world_size() - 1:
        parameter.weight.grad.to_local()[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    kept = bool((parameter.weight.full_tensor() == 1).all())
    return 8.0, kept, float(scaler.get_scale())


def rows(url: str) -> tuple[dict[int, float], list[float]]:
    found = [row for row in read_metrics(Store(url)) if "loss" in row]
    return {row["step"]: row["loss"] for row in found}, [row["diag/gradients/norm"] for row in found]


@pytest.mark.parametrize("name", PARITY)
def test_a_sharded_run_equals_the_unsharded_one(done, name):
    _, kind, _, variant, tolerance = PARITY[name]
    expected, norms = rows(done[f"{kind}-{variant}" if variant else kind])
    got, found = rows(done[name])
    assert list(got) == [1, 2, 3, 4] and min(norms) > 0.05  # so that every step is clipped
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=0, atol=tolerance)
    np.testing.assert_allclose(found, norms, rtol=10 * tolerance)
    if tolerance > 1e-5:
        assert got != expected  # the lower precision was really used
    drawn = [sorted((row["step"], i) for row in read_trace(Store(done[n])) for i in row["index"]) for n in (kind, name)]
    assert drawn[0] == drawn[1]  # each sample once, also where several ranks compute it


def test_one_run_continues_through_all_layouts(done):
    expected, norms = rows(done["whole"])
    got, found = rows(done["chain"])
    assert list(got) == list(range(1, 2 * len(CHAIN) + 1)) == list(expected)
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=0, atol=3e-5)
    np.testing.assert_allclose(found, norms, rtol=1e-3)
    assert expected[1] - expected[2 * len(CHAIN)] > 0.3  # it learns: a lost weight would show


@pytest.mark.parametrize("world", [2, 3, 4])
def test_deferred_initial_weights_are_those_of_the_whole_network_bit_for_bit(done, world):
    for result in done[world]:
        cases = {name: value for name, value in result.items() if name != "scaler"}
        assert len(cases) == (2 if world == 3 else 9)
        assert {name: value[:2] for name, value in cases.items()} == dict.fromkeys(cases, (True, True))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_clipping_by_the_global_norm_equals_the_unsharded_one(done, world):
    for result in done[world]:
        for name, (_, _, norm, gradient) in ((n, v) for n, v in result.items() if n != "scaler"):
            assert norm < (5e-3 if name.endswith("low") else 1e-6), name
            assert gradient < (1e-2 if name.endswith("low") else 1e-6), name


def test_the_state_of_the_scaler_comes_back(done):
    """It counts the steps since the scale last changed: two in each attempt."""
    counts = []
    for step in ("step-00000002", "step-00000004"):
        store = Store(done["two_scaled"]).sub("checkpoints")
        state = read_state(store.sub(step), read_manifest(store, int(step[-8:])))
        counts.append(torch.load(io.BytesIO(state), weights_only=True)["Mixed"]["_growth_tracker"])
    assert counts == [2, 4]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(done, world):
    assert [result["scaler"] for result in done[world]] == [(8.0, True, 4.0)] * world
