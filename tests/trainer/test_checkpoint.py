"""Checkpoints: the format, the commit protocol, resharding, and every way in which one can be broken."""

import hashlib
import io
import json
import os
import pickle
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from datamodules.store import AccessDenied, Store, StoreError, Unreachable
from tests.helpers.distributed import run_distributed
from trainer.checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpoint,
    Retention,
    committed_steps,
    latest,
    load_module,
    read_manifest,
    step_name,
    verify,
)

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.second = nn.Linear(width, 3, bias=False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


def make(shard: bool, width: int = 6, seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net(width)
    if shard:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net.first, mesh=mesh)
        fully_shard(net, mesh=mesh)
    groups = [{"params": [net.first.weight, net.second.weight], "weight_decay": 0.1}, {"params": [net.first.bias]}]
    return net, torch.optim.AdamW(groups, lr=1e-2)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    """Every rank sees the whole batch: the mean gradient is that of one process."""
    losses = []
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
        loss = ((net(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save_after(url: str, steps: int, shard: bool) -> list[float]:
    net, optimizer = make(shard)
    losses = train(net, optimizer, 0, steps)
    Checkpointer(Store(url)).save(steps, net, [optimizer], {"note": "hello", "step": steps}, device=CPU)
    return losses + train(net, optimizer, steps, steps + 3)


def resume_from(url: str, steps: int, shard: bool) -> tuple[list[float], dict, int]:
    net, optimizer = make(shard, seed=99)
    extra = Checkpointer(Store(url)).load(steps, net, [optimizer], device=CPU)
    decays = len({group["weight_decay"] for group in optimizer.param_groups})
    return train(net, optimizer, steps, steps + 3), extra, decays


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((1, False), (1, False)), ((2, True), (1, False)), ((2, True), (3, True)), ((1, False), (2, True))],
)
def test_a_run_continues_on_any_world_and_strategy(tmp_path, saved, loaded):
    url = str(tmp_path)
    whole = run_distributed(save_after, saved[0], url, 4, saved[1])[0]
    losses, extra, decays = run_distributed(resume_from, loaded[0], url, 4, loaded[1])[0]
    assert extra == {"note": "hello", "step": 4}
    assert decays == 2
    np.testing.assert_allclose(losses, whole[4:], rtol=0, atol=0 if saved == loaded else 1e-6)
    manifest = read_manifest(Store(url), 4)
    assert manifest["world_size"] == saved[0]
    shape = manifest["tensors"]["model.first.weight"]
    assert shape["shape"] == [6, 5] and shape["dtype"] == "float32" and len(shape["chunks"]) == saved[0]


def committed(tmp_path, steps=(2, 4)) -> tuple[Store, Checkpointer]:
    store = Store(str(tmp_path))
    checkpointer = Checkpointer(store, {"config": {"a": 1}})
    for step in steps:
        net, optimizer = make(False)
        train(net, optimizer, 0, step)
        assert checkpointer.save(step, net, [optimizer], {"step": step}, device=CPU, stream={"position": step * 8})
    return store, checkpointer


def test_manifest_tells_all_and_verifies(tmp_path):
    store, _ = committed(tmp_path)
    manifest = read_manifest(store, 4)
    assert manifest["config"] == {"a": 1} and manifest["stream"] == {"position": 32}
    assert manifest["scalars"]["optimizer.0.param_groups.first.weight.weight_decay"] == 0.1
    assert {file["path"] for file in manifest["files"]} == {"rank-00000-000.bin", "state.pt"}
    assert verify(store, 4) == [] and committed_steps(store) == [2, 4]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/keel-was-here",)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """An attacker who can write the store makes a checkpoint whose checksums are all right."""
    store, checkpointer = committed(tmp_path)
    packed = io.BytesIO()
    torch.save({"loops": Bomb()}, packed)
    folder = store.sub(step_name(4))
    manifest = read_manifest(store, 4)
    state = packed.getvalue()
    (entry,) = [file for file in manifest["files"] if file["path"] == "state.pt"]
    entry.update(size=len(state), crc32c=google_crc32c.value(state))
    raw = json.dumps(manifest).encode()
    folder.write("state.pt", state)
    folder.write("manifest.json", raw)
    folder.write("COMMITTED", json.dumps({"step": 4, "manifest_sha256": hashlib.sha256(raw).hexdigest()}).encode())
    net, optimizer = make(False)
    with pytest.raises(pickle.UnpicklingError):
        checkpointer.load(4, net, [optimizer], device=CPU)
    assert not os.path.exists("/tmp/keel-was-here")


def test_a_flipped_bit_in_the_small_state_is_found(tmp_path):
    _, checkpointer = committed(tmp_path)
    path = tmp_path / step_name(4) / "state.pt"
    raw = bytearray(path.read_bytes())
    raw[-30] ^= 1
    path.write_bytes(raw)
    net, optimizer = make(False)
    with pytest.raises(CorruptCheckpoint, match=r"state\.pt is corrupt"):
        checkpointer.load(4, net, [optimizer], device=CPU)


def test_state_that_needs_pickle_is_refused_before_the_commit(tmp_path):
    store, checkpointer = committed(tmp_path)
    net, optimizer = make(False)
    with pytest.raises(CheckpointError, match="not plain data"):
        checkpointer.save(6, net, [optimizer], {"object": object()}, device=CPU)
    assert committed_steps(store) == [2, 4]


@pytest.mark.parametrize("damage", ["no marker", "no manifest", "other manifest", "truncated", "missing"])
def test_discovery_falls_back_from_a_broken_checkpoint(tmp_path, damage, caplog):
    store, _ = committed(tmp_path)
    folder = tmp_path / step_name(4)
    if damage == "no marker":
        (folder / "COMMITTED").unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "other manifest":
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace('"step": 4', '"step": 5'))
    elif damage == "truncated":
        os.truncate(folder / "rank-00000-000.bin", 100)
    else:
        (folder / "rank-00000-000.bin").unlink()
    assert latest(store) == 2
    if damage != "no marker":
        assert "step-00000004 passed over" in caplog.text
    assert verify(store, 4) != []


def test_a_flipped_bit_is_named_when_loading(tmp_path):
    store, checkpointer = committed(tmp_path)
    path = tmp_path / step_name(4) / "rank-00000-000.bin"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    net, optimizer = make(False)
    with pytest.raises(CorruptCheckpoint, match=r"rank-00000-000.bin is corrupt at byte \d+ \(tensor "):
        checkpointer.load(4, net, [optimizer], device=CPU)
    assert verify(store, 4, deep=False) == [] and "corrupt" in verify(store, 4)[0]


def test_a_committed_step_is_never_overwritten_and_leftovers_are(tmp_path):
    store, checkpointer = committed(tmp_path)
    before = store.read(f"{step_name(4)}/manifest.json")
    net, optimizer = make(False, seed=5)
    assert not checkpointer.save(4, net, [optimizer], {}, device=CPU)
    assert store.read(f"{step_name(4)}/manifest.json") == before
    store.write(f"{step_name(6)}/rank-00007-000.bin", b"left by a killed attempt of 8 processes")
    assert checkpointer.save(6, net, [optimizer], {}, device=CPU)
    assert not store.exists(f"{step_name(6)}/rank-00007-000.bin")


def test_when_nothing_is_whole_that_is_an_error_and_no_fresh_start(tmp_path):
    store, _ = committed(tmp_path)
    for step in (2, 4):
        os.truncate(tmp_path / step_name(step) / "rank-00000-000.bin", 10)
    with pytest.raises(CorruptCheckpoint, match=r"no committed checkpoint at .* is whole"):
        latest(store)
    assert latest(Store(str(tmp_path / "empty"))) is None


def test_retention_counts_whole_steps_only(tmp_path):
    store, checkpointer = committed(tmp_path)
    net, optimizer = make(False)
    os.truncate(tmp_path / step_name(4) / "rank-00000-000.bin", 10)
    checkpointer.save(6, net, [optimizer], {}, device=CPU)
    checkpointer.wait()
    assert committed_steps(store) == [2, 4, 6]


def test_retention_keeps_the_last_and_the_permanent(tmp_path):
    store = Store(str(tmp_path))
    checkpointer = Checkpointer(store, retention=Retention(keep_last=2, keep_every=4))
    net, optimizer = make(False)
    for step in range(1, 8):
        checkpointer.save(step, net, [optimizer], {}, device=CPU)
    checkpointer.wait()
    assert committed_steps(store) == [4, 6, 7]
    assert not any(path.startswith(step_name(5)) for path in store.list(""))


def test_parts_are_bounded(tmp_path):
    store = Store(str(tmp_path))
    net, optimizer = make(False, width=1500)
    train(net, optimizer, 0, 1)
    Checkpointer(store, part_bytes=40_000).save(1, net, [optimizer], {}, device=CPU)
    parts = [file for file in read_manifest(store, 1)["files"] if file["path"].startswith("rank")]
    assert len(parts) > 2 and all(file["size"] <= 40_000 for file in parts)
    fresh, other = make(False, width=1500, seed=3)
    Checkpointer(store).load(1, fresh, [other], device=CPU)
    torch.testing.assert_close(fresh.first.weight, net.first.weight, rtol=0, atol=0)


def test_another_network_is_refused_by_name(tmp_path):
    _, checkpointer = committed(tmp_path)
    net, optimizer = make(False, width=7)
    with pytest.raises(CheckpointError, match=r"model.first.weight \[6, 5\] \(config: \[7, 5\]\)"):
        checkpointer.load(4, net, [optimizer], device=CPU)


def test_weights_alone_load_without_a_process_group(tmp_path):
    run_distributed(save_after, 2, str(tmp_path), 4, True)
    net, optimizer = make(False)
    train(net, optimizer, 0, 4)
    fresh = Net()
    load_module(Store(str(tmp_path)), 4, fresh)
    torch.testing.assert_close(fresh.state_dict(), net.state_dict(), rtol=0, atol=1e-6)


def test_generators_continue(tmp_path):
    store = Store(str(tmp_path))
    net, optimizer = make(False)
    torch.manual_seed(11)
    np.random.seed(12)
    torch.rand(3), np.random.rand(2)
    Checkpointer(store).save(1, net, [optimizer], {}, device=CPU)
    expected = torch.rand(4), np.random.rand(4)
    torch.manual_seed(0)
    np.random.seed(0)
    Checkpointer(store).load(1, net, [optimizer], device=CPU)
    torch.testing.assert_close(torch.rand(4), expected[0], rtol=0, atol=0)
    np.testing.assert_array_equal(np.random.rand(4), expected[1])


def test_a_full_disk_ends_in_one_line_and_no_commit(tmp_path, monkeypatch):
    store, checkpointer = committed(tmp_path)
    net, optimizer = make(False)

    def full(self: Store, path: str, data: bytes) -> None:
        from datamodules.store import OutOfSpace

        raise OutOfSpace(f"no space left for {self.join(path)}")

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(CheckpointError, match="no space left") as caught:
        checkpointer.save(6, net, [optimizer], {}, device=CPU)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert committed_steps(store) == [2, 4] and latest(store) == 4


def test_two_writers_cannot_both_commit(tmp_path):
    _, checkpointer = committed(tmp_path)
    net, optimizer = make(False)
    begin = checkpointer._begin

    def begin_then_lose(folder: Store, step: int, noted: dict[str, float] | None) -> bool:
        begun = begin(folder, step, noted)
        folder.write("COMMITTED", json.dumps({"step": 6, "manifest_sha256": "other"}).encode())
        return begun

    checkpointer._begin = begin_then_lose
    with pytest.raises(CheckpointError, match="committed by another process"):
        checkpointer.save(6, net, [optimizer], {}, device=CPU)


@pytest.mark.parametrize("slow_at", ["rank-00000-000.bin", "state.pt", "manifest.json", "COMMITTED"])
def test_a_replaced_writer_that_is_slow_spoils_nothing(tmp_path, monkeypatch, slow_at):
    """It hangs in any of its writes while its successor commits the same step, and then goes on."""
    store = Store(str(tmp_path))
    nets = {writer: make(False, seed=writer) for writer in (1, 2)}
    old, new = Checkpointer(store), Checkpointer(store)
    old.writer, new.writer = 1, 2

    def save(checkpointer: Checkpointer) -> bool:
        net, optimizer = nets[checkpointer.writer]
        return checkpointer.save(6, net, [optimizer], {"writer": checkpointer.writer}, device=CPU)

    def slow(method: Any) -> Any:
        def call(self: Store, path: str, data: bytes) -> Any:
            if path.endswith(slow_at):
                monkeypatch.undo()
                assert save(new)
            return method(self, path, data)

        return call

    monkeypatch.setattr(Store, "write", slow(Store.write))
    monkeypatch.setattr(Store, "create", slow(Store.create))
    with pytest.raises(CheckpointError, match="committed by another process"):
        save(old)
    assert verify(store, 6) == []
    net, optimizer = make(False, seed=99)
    assert new.load(6, net, [optimizer], device=CPU) == {"writer": 2}
    torch.testing.assert_close(net.state_dict(), nets[2][0].state_dict(), rtol=0, atol=0)
    assert not save(old)  # it is there and whole
    assert verify(store, 6) == []


def test_what_a_successor_is_writing_is_left_alone(tmp_path):
    """A replaced writer that begins late takes away only what its predecessors left."""
    store = Store(str(tmp_path))
    for writer in (1, 3):
        store.write(f"{step_name(6)}/writer-{writer:04d}-rank-00000-000.bin", b"of a writer")
    checkpointer = Checkpointer(store)
    checkpointer.writer = 2
    net, optimizer = make(False)
    assert checkpointer.save(6, net, [optimizer], {}, device=CPU)
    left = {path.partition("-rank-")[0] for path in store.list(step_name(6)) if "-rank-" in path}
    assert left == {f"{step_name(6)}/writer-0002", f"{step_name(6)}/writer-0003"}


def test_settings_of_another_device_are_not_taken_over(tmp_path):
    """A guard on CUDA has made the optimiser capturable; its checkpoint goes on on a CPU, where that cannot be."""
    store = Store(str(tmp_path))
    net, optimizer = make(False)
    whole = train(net, optimizer, 0, 2)
    for group in optimizer.param_groups:
        group["capturable"] = True
    Checkpointer(store).save(2, net, [optimizer], {}, device=CPU)
    for group in optimizer.param_groups:
        group["capturable"] = False
    whole += train(net, optimizer, 2, 4)
    net, optimizer = make(False, seed=99)
    Checkpointer(store).load(2, net, [optimizer], device=CPU)
    assert not any(group["capturable"] for group in optimizer.param_groups)
    assert train(net, optimizer, 2, 4) == whole[2:]


def test_a_store_that_is_away_is_told_from_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    """The one passes, so that a launcher may try again; the other wants somebody."""
    _, checkpointer = committed(tmp_path)
    net, optimizer = make(False)

    def fails(error: StoreError) -> Any:
        def call(self: Store, path: str, data: bytes) -> None:
            raise error

        return call

    for error, kind in ((Unreachable("away"), Unreachable), (AccessDenied("not yours"), CheckpointError)):
        monkeypatch.setattr(Store, "write", fails(error))
        with pytest.raises(kind, match=f"saving .* failed: {error}"):
            checkpointer.save(6, net, [optimizer], {}, device=CPU)
    monkeypatch.undo()
    read = Store.read_ranges
    monkeypatch.setattr(Store, "read_ranges", lambda self, *a, **k: (_ for _ in ()).throw(Unreachable("away")))
    with pytest.raises(Unreachable, match="away"):
        checkpointer.load(4, net, [optimizer], device=CPU)
    monkeypatch.setattr(Store, "read_ranges", read)
    checkpointer.load(4, net, [optimizer], device=CPU)
