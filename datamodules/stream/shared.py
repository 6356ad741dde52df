"""Batches in anonymous shared memory.

What a worker process of a ``DataLoader`` puts in its queue PyTorch moves to a file below /dev/shm, which it unlinks a moment
later: a kill in that moment leaves it there until the machine restarts, and a small /dev/shm (64 MiB in many containers)
bounds what is in flight. Memory by ``memfd_create`` has neither a name nor that bound; PyTorch hands it on as it is. Where
Python or the system lacks it, PyTorch goes its own way.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, UntypedStorage


def anonymous(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in anonymous shared memory; tensors that view one memory still do."""
    if not hasattr(os, "memfd_create"):
        return batch
    try:
        return _moved(batch)
    except OSError:  # not allowed here, or no descriptor is left
        return batch


def _moved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    moved: dict[int, UntypedStorage] = {}
    found = {}
    for name, tensor in batch.items():
        storage = tensor.untyped_storage()
        if not storage.nbytes() or storage.is_shared():
            found[name] = tensor
            continue
        if storage._cdata not in moved:
            moved[storage._cdata] = _shared(storage)
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        found[name] = torch.empty(0, dtype=tensor.dtype).set_(moved[storage._cdata], *place)
    return found


def _shared(storage: UntypedStorage) -> UntypedStorage:
    descriptor = os.memfd_create("keel-batch", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, storage.nbytes())
        copy = UntypedStorage._new_shared_fd_cpu(descriptor, storage.nbytes())  # type: ignore[attr-defined]
    finally:
        os.close(descriptor)
    return copy.copy_(storage)  # type: ignore[no-any-return, unused-ignore]
