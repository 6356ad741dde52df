"""Batches in shared memory without a name: the same values, the same aliasing."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
from torch import Tensor

from datamodules.stream.shared import anonymous

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this Python has no memfd_create")


def batch() -> dict[str, Tensor]:
    whole = torch.arange(48, dtype=torch.float32).reshape(2, 4, 6)[1:]  # begins inside of its memory
    return {
        "input": whole[:, :1],
        "target": whole[:, 1:].transpose(1, 2),
        "index": torch.tensor([7, 9]),
        "mask": torch.tensor([[True, False]]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.empty(0, 5),
    }


def test_values_places_and_aliases_are_kept() -> None:
    given, found = batch(), anonymous(batch())
    assert list(found) == list(given)
    for name, tensor in given.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
        assert found[name].stride() == tensor.stride() and (found[name].is_shared() or not tensor.numel())
    assert found["input"].untyped_storage().data_ptr() == found["target"].untyped_storage().data_ptr()
    again = anonymous(found)
    assert all(again[name] is found[name] for name in found)  # what is shared stays where it is


def test_what_another_process_writes_is_seen_and_no_file_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    found = anonymous(batch())

    def write(index: Tensor) -> None:
        index += 1

    process = multiprocessing.get_context("fork").Process(target=write, args=(found["index"],))
    process.start()
    process.join(20)
    assert found["index"].tolist() == [8, 10]
    process.close()
    del found
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("why", ["not built", "not allowed"])
def test_without_it_pytorch_goes_its_own_way(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    if why == "not built":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(os, "memfd_create", denied)
    given = batch()
    assert anonymous(given) is given
