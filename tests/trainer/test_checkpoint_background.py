"""Saves beside training: what is saved, when it is committed, what happens when it fails, and what a kill leaves."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from datamodules.store import Store, Unreachable
from tests.helpers.distributed import run_distributed
from trainer.checkpoint import Checkpointer, CheckpointError, committed_steps, read_manifest, step_name, verify
from trainer.checkpoint.background import Flight
from trainer.checkpoint.checksum import combine, crc32c
from trainer.checkpoint.pieces import Pieces
from trainer.checkpoint.plan import Piece, assign, cut, make_plan
from trainer.checkpoint.staging import Image, upload

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def make(seed: int = 0, shard: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    if shard:
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    step(net, optimizer)
    return net, optimizer


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.ones(4, 5)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def wait_for(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


class Gate:
    """Holds every upload of tensors until it is opened; or fails it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        write = Store.write

        def gated(store: Store, path: str, data: bytes) -> None:
            if path.endswith(".bin"):
                self.reached.set()
                assert self.opened.wait(20)
                if error is not None:
                    raise error
            write(store, path, data)

        monkeypatch.setattr(Store, "write", gated)


def background(url: object) -> Checkpointer:
    return Checkpointer(Store(str(url)), background=True)


def test_training_goes_on_and_what_is_saved_is_what_was(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    checkpointer = background(tmp_path)
    net, optimizer = make()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert checkpointer.save(1, net, [optimizer], {"step": 1}, device=CPU)
    assert gate.reached.wait(20) and committed_steps(checkpointer.store) == []
    assert not checkpointer.poll() and not checkpointer.wait(0.01)
    step(net, optimizer)
    gate.opened.set()
    assert wait_for(lambda: committed_steps(checkpointer.store) == [1]), "committed by itself, at no call of ours"
    assert wait_for(checkpointer.poll) and not checkpointer.poll()
    other, fresh = make(seed=3)
    assert checkpointer.load(1, other, [fresh], device=CPU) == {"step": 1}
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert not torch.equal(net.state_dict()["0.weight"], before["0.weight"])


def test_one_save_is_in_flight_and_memory_is_reused(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    checkpointer = background(tmp_path)
    net, optimizer = make()
    checkpointer.save(1, net, [optimizer], {}, device=CPU)
    place, plan = checkpointer._image._buffer.data_ptr(), checkpointer._plan
    threading.Timer(0.2, gate.opened.set).start()
    started = time.monotonic()
    checkpointer.save(2, net, [optimizer], {}, device=CPU)
    assert time.monotonic() - started >= 0.15, "the second save waits for the first"
    checkpointer.wait()
    assert committed_steps(checkpointer.store) == [1, 2]
    assert checkpointer._image._buffer.data_ptr() == place and checkpointer._plan is plan
    content = sum(tensor.numel() * 4 for tensor in (*net.parameters(), *net.parameters(), *net.parameters()))
    assert content <= checkpointer._image.bytes < content + 40_000, "one copy of the state, a few generators, no more"


@pytest.mark.parametrize(
    "error", [Unreachable("the store is down"), torch.distributed.checkpoint.api.CheckpointException("x", {})]
)
def test_an_error_surfaces_and_the_next_save_is_good(tmp_path, monkeypatch, error):
    """CheckpointException derives from BaseException: `except Exception` would lose it with its thread."""
    gate = Gate(monkeypatch, error)
    gate.opened.set()
    checkpointer = background(tmp_path)
    net, optimizer = make()
    checkpointer.save(1, net, [optimizer], {}, device=CPU)
    with pytest.raises((CheckpointError, type(error))) as caught:
        wait_for(checkpointer.poll)
    if isinstance(error, Unreachable):
        assert "saving" in str(caught.value) and "the store is down" in str(caught.value)
    assert not checkpointer.poll(), "told once"
    monkeypatch.undo()
    checkpointer.save(2, net, [optimizer], {}, device=CPU)
    checkpointer.wait()
    assert committed_steps(checkpointer.store) == [2]


def test_state_that_needs_pickle_is_refused_in_the_background_too(tmp_path):
    checkpointer = background(tmp_path)
    net, optimizer = make()
    checkpointer.save(1, net, [optimizer], {"object": object()}, device=CPU)
    with pytest.raises(CheckpointError, match="not plain data"):
        checkpointer.wait()
    assert committed_steps(checkpointer.store) == []


def test_a_failed_rewrite_of_a_damaged_checkpoint_leaves_none_that_looks_whole(tmp_path, monkeypatch):
    checkpointer = Checkpointer(Store(str(tmp_path)))
    net, optimizer = make()
    for number in (1, 2):
        checkpointer.save(number, net, [optimizer], {}, device=CPU)
    os.truncate(tmp_path / step_name(2) / "rank-00000-000.bin", 7)
    gate = Gate(monkeypatch, Unreachable("gone"))
    gate.opened.set()
    with pytest.raises(Unreachable, match="gone"):
        checkpointer.save(2, net, [optimizer], {}, device=CPU)
    assert committed_steps(checkpointer.store) == [1]
    assert not list((tmp_path / step_name(2)).glob("*")), "no old manifest beside new files"


def test_a_flight_waits_for_nothing_that_it_need_not():
    flight, gate = Flight(), threading.Event()
    assert not flight.poll() and flight.wait()
    flight.start(gate.wait, "test")
    assert not flight.poll() and not flight.wait(0.01)
    gate.set()
    assert flight.wait(10) and not flight.poll()


def test_pieces_are_written_once_evenly_and_never_in_too_large_objects():
    def piece(name: str, rows: int, at: int = 0, of: int = 0) -> Piece:
        return Piece(name, "float32", (of or rows, 10), (at, 0), (rows, 10))

    replicated = [piece(f"r{i}", 10) for i in range(6)]
    everyone = [[piece("s", 30, 30 * rank, 90), *replicated] for rank in range(3)]
    owners = assign(everyone)
    load = [sum(p.bytes for p, owner in owners.items() if owner == rank) for rank in range(3)]
    assert len(owners) == 9 and max(load) == min(load)
    assert all(owners[ranks[0]] == rank for rank, ranks in enumerate(everyone)), "a shard is written by its holder"
    files = cut([piece("big", 100)], 0, 900)
    assert [file.size for file in files] == [880] * 4 + [480] and files[-1].begin == 4 * 896
    rows = [placed.piece.offsets[0] for file in files for placed in file.chunks]
    assert rows == [0, 22, 44, 66, 88] and all(placed.local == placed.piece.offsets for placed in files[1].chunks)
    wide = cut([Piece("wide", "int64", (2, 64), (0, 0), (2, 64))], 0, 128)
    assert len(wide) == 8 and {file.size for file in wide} == {128}
    assert cut([Piece("none", "float32", (0, 3), (0, 0), (0, 3))], 0, 100) == []


def test_checksums_are_those_of_the_standard_library_of_the_format():
    data = np.random.default_rng(0).integers(0, 256, (4 << 20) + 3, dtype="u1")
    import google_crc32c

    assert crc32c(data) == crc32c(bytearray(data.tobytes())) == google_crc32c.value(data.tobytes())
    assert crc32c(b"") == 0
    for at in (0, 1, 1 << 20, len(data)):
        parts = data[:at], data[at:]
        assert combine(crc32c(parts[0]), crc32c(parts[1]), len(parts[1])) == crc32c(data)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_holds_every_byte_and_its_files_have_their_checksums(tmp_path, monkeypatch, threads):
    """However many threads fill it, with gaps between chunks, chunks on both sides of what is hashed twice, and strides."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "small": torch.randn(5, generator=generator),
        "strided": torch.randn(9, 7, generator=generator).T,
        "large": torch.randn(700, 999, generator=generator),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(77, dtype=torch.uint8),
        "last": torch.randn(600, 600, generator=generator),
    }
    plan, image = make_plan(tensors, 3 << 20), Image()
    image.fill(plan, tensors)
    image._buffer.fill_(0xAB)
    image.fill(plan, tensors)
    written = upload(Store(str(tmp_path)), plan, image)
    found = {file["path"]: crc32c((tmp_path / file["path"]).read_bytes()) for file in written.files}
    assert len(found) > 1 and found == {file["path"]: file["crc32c"] for file in written.files}
    content = dict.fromkeys(tensors, b"")
    for name, chunk in sorted(written.chunks, key=lambda item: item[1]["offsets"]):
        raw = (tmp_path / chunk["file"]).read_bytes()[chunk["start"] : chunk["start"] + chunk["bytes"]]
        assert crc32c(raw) == chunk["crc32c"]
        content[name] += raw
    assert content == {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def test_stretches_of_a_buffer_say_where_they_lie():
    """By the device of its tensors a save knows that host memory must be pinned and the copy waited for; ZeRO's are all
    such stretches."""
    assert Pieces.cut((4, 3), 2, torch.empty(7, device="meta")).device.type == "meta"
    assert Pieces.cut((4, 3), 0, torch.empty(0)).device.type == "cpu"


def two_ranks(url: str) -> dict[str, object]:
    """Worker: all that takes two real processes, in one start of them."""
    me, found = dist.get_rank(), {}
    net, optimizer = make(shard=True)
    blocking = Checkpointer(Store(url).sub("blocking"))
    blocking.save(1, net, [optimizer], {}, device=CPU)
    beside = background(Store(url).sub("beside").url)
    beside.save(1, net, [optimizer], {}, device=CPU)
    beside.wait()
    found["local"] = any(Path.cwd().glob("s3*"))
    # A failure of one rank's upload is told on both.
    write = Store.write

    def fail(store: Store, path: str, data: bytes) -> None:
        if me == 1 and path.endswith(".bin"):
            raise Unreachable("rank 1 lost the store")
        write(store, path, data)

    Store.write = fail  # type: ignore[method-assign]
    beside.save(2, net, [optimizer], {}, device=CPU)
    try:
        beside.wait()
    except Unreachable as error:
        found["error"] = str(error)
    Store.write = write  # type: ignore[method-assign]
    beside.save(3, net, [optimizer], {}, device=CPU)
    beside.wait()
    other, fresh = make(seed=5, shard=True)
    beside.load(3, other, [fresh], device=CPU)
    same = [torch.equal(a.to_local(), b.to_local()) for a, b in zip(net.parameters(), other.parameters(), strict=True)]
    found["same"] = all(same)
    return found


def test_two_ranks_on_an_object_store(tmp_path, s3, monkeypatch):
    """Stock Lightning writes a sharded checkpoint for s3://bucket/x into the local folder `s3:/bucket/x`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    url = s3.url("run")
    found = run_distributed(two_ranks, 2, url)
    assert not any(Path.cwd().iterdir()) and not any(result["local"] for result in found)
    a, b = (read_manifest(Store(url).sub(name), 1) for name in ("blocking", "beside"))
    assert a["tensors"] == b["tensors"] and a["files"][:-1] == b["files"][:-1]
    assert {file["path"] for file in a["files"]} == {"rank-00000-000.bin", "rank-00001-000.bin", "state.pt"}
    assert all("rank 1 lost the store" in str(result["error"]) and result["same"] for result in found)
    beside = Store(url).sub("beside")
    assert committed_steps(beside) == [1, 3] and verify(beside, 3) == []


def killed(url: str) -> None:
    """Worker: rank 1 is killed in the middle of the upload of its second save."""
    net, optimizer = make(shard=True)
    checkpointer = background(url)
    checkpointer.save(1, net, [optimizer], {}, device=CPU)
    checkpointer.wait()
    write = Store.write

    def die(store: Store, path: str, data: bytes) -> None:
        write(store, path, data)
        if dist.get_rank() == 1 and path.endswith(".bin"):
            os.kill(os.getpid(), signal.SIGKILL)

    Store.write = die  # type: ignore[method-assign]
    checkpointer.save(2, net, [optimizer], {}, device=CPU)
    checkpointer.wait()


def test_a_kill_in_the_middle_leaves_the_commit_before(tmp_path):
    with pytest.raises(RuntimeError, match=r"exit code -9|failed:"):
        run_distributed(killed, 2, str(tmp_path))
    store = Store(str(tmp_path))
    assert committed_steps(store) == [1] and verify(store, 1) == []
    assert store.exists(f"{step_name(2)}/rank-00001-000.bin"), "it died later than it wrote"


def test_a_script_without_a_main_guard_saves_in_the_background(tmp_path):
    """torch's asynchronous saves in a process would import the script again, and hang."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from datamodules.store import Store\n"
        "from trainer.checkpoint import Checkpointer\n"
        "net = torch.nn.Linear(2, 2)\n"
        "optimizer = torch.optim.SGD(net.parameters(), lr=1.0)\n"
        f"checkpointer = Checkpointer(Store({str(tmp_path / 'out')!r}), background=True)\n"
        "checkpointer.save(1, net, [optimizer], {}, device=torch.device('cpu'))\n"
        "checkpointer.wait()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(script)], check=True, timeout=60, env=environment)
    assert committed_steps(Store(str(tmp_path / "out"))) == [1]
