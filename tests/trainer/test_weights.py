"""Weights into a new run: from safetensors, from a run's checkpoint, by a name map, into a sharded network."""

import struct
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import torch as library
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from datamodules.store import Store
from tests.helpers.distributed import run_distributed
from trainer.checkpoint import Checkpointer, CheckpointError, safetensors
from trainer.checkpoint.weights import difference, export, load_into, rename, select
from trainer.schema import WeightsConfig


class Task(nn.Module):
    def __init__(self, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))
        self.network.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("mean", torch.arange(3.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A run's URL with one checkpoint of `Task(seed=1)`, and averaged weights that are twice the others."""
    url = str(tmp_path_factory.mktemp("run"))
    task = Task(seed=1)
    saver = Checkpointer(Store(url).sub("checkpoints"))
    saver.register("ema", lambda: {name: 2 * p.detach() for name, p in task.named_parameters()})
    saver.save(5, task, [torch.optim.AdamW(task.parameters())], {}, device=torch.device("cpu"))
    return url


def same(network: nn.Module, other: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, other[name] * (factor if "scale" not in name else 1), rtol=0, atol=0)


def test_an_export_is_loaded_by_the_library_and_by_plain_torch(run, tmp_path):
    checkpoints, truth = Store(run).sub("checkpoints"), Task(seed=1)
    count, total = export(checkpoints, 5, str(tmp_path / "w.safetensors"))
    assert count == 5 and total == (tmp_path / "w.safetensors").stat().st_size
    loaded = library.load_file(tmp_path / "w.safetensors")
    fresh = Task(seed=9)
    fresh.network.load_state_dict(loaded)
    same(fresh.network, truth.network.state_dict())
    export(checkpoints, 5, str(tmp_path / "e.safetensors"), ema=True, everything=True, dtype="bfloat16")
    averaged = library.load_file(tmp_path / "e.safetensors")
    assert set(averaged) == {f"network.{name}" for name in loaded} | {"mean"}
    torch.testing.assert_close(averaged["network.0.weight"], (2 * loaded["0.weight"]).bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(averaged["network.scale"], torch.tensor(2.0).bfloat16())
    assert not list(tmp_path.glob("*keel-tmp"))


def test_an_export_asks_for_each_tensor_when_its_turn_comes():
    asked: list[str] = []

    class Target:
        def write_pieces(self, path: str, pieces: Any, size: int) -> None:
            taken = [len(memoryview(next(pieces)).cast("B"))]
            for number, piece in enumerate(pieces):
                assert asked == ["a", "b", "c"][: number + 1], "no more is held than one"
                taken.append(len(memoryview(piece).cast("B")))
            assert size == sum(taken) and taken[1:] == [20, 20, 20]

    def content(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.ones(5)

    safetensors.write(Target(), "w", {name: ("float32", [5]) for name in "abc"}, content, {})  # type: ignore[arg-type]
    assert asked == ["a", "b", "c"]


def test_weights_come_from_a_run_and_from_what_the_library_wrote(run, tmp_path):
    truth = Task(seed=1).network.state_dict()
    for config, factor in ((WeightsConfig(url=run), 1.0), (WeightsConfig(url=run, step=5, ema=True), 2.0)):
        fresh = Task(seed=9)
        report = load_into(config, fresh.network)
        assert report.complete and sorted(report.loaded) == sorted(truth)
        same(fresh.network, truth, factor)
    library.save_file({f"body.{k}": v.to(torch.bfloat16) for k, v in truth.items()}, tmp_path / "hf.safetensors")
    fresh = Task(seed=9)
    load_into(WeightsConfig(url=str(tmp_path / "hf.safetensors"), map={r"^body\.": ""}), fresh.network)
    same(fresh.network, {name: tensor.bfloat16().float() for name, tensor in truth.items()})


def test_changed_shapes_are_refused_or_reported(run, caplog):
    wide = Task(width=6, seed=9)
    wide.network[2] = nn.Linear(6, 4)
    wide.network.add_module("head", nn.Linear(3, 1))
    before = {name: tensor.clone() for name, tensor in wide.network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"2 not in it: head\.weight, head\.bias; 2 of another shape: 2\.weight \[3, 6\] \(here \[4, 6\]\).*strict=false"):  # fmt: skip
        load_into(WeightsConfig(url=run), wide.network)
    for name, tensor in wide.network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    report = load_into(WeightsConfig(url=run, strict=False), wide.network)
    assert sorted(report.loaded) == ["0.bias", "0.weight", "scale"] and report.missing == ["head.weight", "head.bias"]
    assert report.other_shape == {"2.weight": [[3, 6], [4, 6]], "2.bias": [[3], [4]]} and report.unused == []
    assert "3 tensors loaded; 2 not in it" in caplog.text
    after = wide.network.state_dict()
    torch.testing.assert_close(after["0.weight"], Task(seed=1).network[0].weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(after["2.weight"], before["2.weight"], rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"nothing fits; rename with weights\.map"):
        load_into(WeightsConfig(url=run, strict=False, map={"^": "x."}), wide.network)
    left = load_into(WeightsConfig(url=run, strict=False, map={r"^2\.": "3."}), Task(seed=9).network)
    assert sorted(left.unused) == ["2.bias", "2.weight"]
    assert load_into(WeightsConfig(url=run, strict=False, map={r"^2\..*": ""}), Task(seed=9).network).unused == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WeightsConfig(url="{tmp}/none.safetensors"), "there is no such file"),
        (WeightsConfig(url="{tmp}/cut.safetensors"), "not a whole safetensors file"),
        (WeightsConfig(url="{tmp}/long.safetensors"), "not a whole safetensors file: header of"),
        (WeightsConfig(url="{tmp}"), "no committed checkpoint there"),
        (WeightsConfig(url="{run}", step=6), "not committed"),
        (WeightsConfig(url="{run}", map={"(": ""}), "is not a regular expression"),
        (WeightsConfig(url="{run}", map={r"\d": "n"}), "the same name n.bias"),
    ],
)
def test_a_source_that_cannot_serve_is_named_in_one_line(run, tmp_path, config, message):
    library.save_file({"a": torch.ones(100)}, tmp_path / "cut.safetensors")
    raw = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[:-8])
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + raw[8:])
    config = WeightsConfig(**{**vars(config), "url": config.url.format(tmp=tmp_path, run=run)})
    with pytest.raises(CheckpointError) as caught:
        load_into(config, Task().network)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_without_averaged_weights_says_so():
    with pytest.raises(CheckpointError, match="no averaged weights"):
        select({"tensors": {"model.network.a": {}}}, "url", ema=True)


def test_rules_apply_first_match_first():
    table: dict[str, Any] = {"a.w": 1, "b.w": 2, "c.w": 3}
    assert rename(table, {"^a": "x", r"\.w$": ".v", "c": "never"}, "url") == {"x.w": ("a.w", 1), "b.v": ("b.w", 2), "c.v": ("c.w", 3)}  # fmt: skip


def test_settings_without_effect_are_refused():
    for wrong in ({"step": 3}, {"strict": False}, {"url": "x.safetensors", "ema": True}):
        with pytest.raises(ValueError, match=r"no effect without url|is a file"):
            WeightsConfig(**wrong)


def test_the_distance_of_two_checkpoints_of_a_tensor(tmp_path):
    stores = []
    for value in (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 1.0])):
        store = Store(str(tmp_path / str(len(stores))))
        safetensors.write(store, "w.safetensors", {"w": ("float32", [2])}, lambda name, value=value: value, {})
        stores.append((store, safetensors.read_table(store, "w.safetensors")))
    found = difference("w", stores[0], stores[1])
    assert (found.norm, found.distance, found.largest, found.relative) == (5.0, 3.0, 3.0, 0.6)


def sharded(url: str, file: str) -> list[bool]:
    """Worker: a run's checkpoint and a foreign file into a sharded network; each rank reads its own rows of the file."""
    truth, found = Task(seed=1), []
    reads: list[int] = []
    ranges = Store.read_ranges

    def counted(store: Store, requests: Any, sinks: Any = None) -> list[bytes]:
        reads.extend(end - start for _, start, end in requests)
        return ranges(store, requests, sinks)

    Store.read_ranges = counted  # type: ignore[method-assign]
    for source in (url, file):
        reads.clear()
        task = Task(seed=9)
        fully_shard(task.network, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        assert load_into(WeightsConfig(url=source), task.network).complete
        whole = {
            name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            for name, tensor in task.network.state_dict().items()
        }
        found.append(all(torch.equal(whole[name], tensor) for name, tensor in truth.network.state_dict().items()))
    header = reads[:2] if dist.get_rank() == 0 else []
    found.append(sum(reads) - sum(header) <= 4 * (3 * 5 + 3 + 2 * 6 + 2 + 1))
    return found


def test_a_sharded_network_is_filled(run, tmp_path):
    file = str(tmp_path / "w.safetensors")
    export(Store(run).sub("checkpoints"), 5, file)
    assert run_distributed(sharded, 2, run, file) == [[True] * 3] * 2
