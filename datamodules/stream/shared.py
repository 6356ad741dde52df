"""Batches in shared memory that never has a name.

What a worker process of a ``DataLoader`` puts in its queue PyTorch moves to a file below /dev/shm, which it unlinks a moment
later: a kill in that moment leaves it there until the machine restarts, and a small /dev/shm (64 MiB in many containers)
bounds what is in flight. Memory by ``memfd_create`` has neither a name nor that bound; PyTorch hands it on as it is.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor, UntypedStorage


def nameless(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in shared memory without a name; tensors that view one memory still do. Linux alone has it."""
    if sys.platform != "linux":
        return batch
    moved: dict[int, UntypedStorage] = {}
    found = {}
    for name, tensor in batch.items():
        storage = tensor.untyped_storage()
        if not storage.nbytes() or storage.is_shared():
            found[name] = tensor
            continue
        if storage.data_ptr() not in moved:
            moved[storage.data_ptr()] = _shared(storage)
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        found[name] = torch.empty(0, dtype=tensor.dtype).set_(moved[storage.data_ptr()], *place)
    return found


def _shared(storage: UntypedStorage) -> UntypedStorage:
    descriptor = os.memfd_create("keel-batch", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, storage.nbytes())
        copy = UntypedStorage._new_shared_fd_cpu(descriptor, storage.nbytes())  # type: ignore[attr-defined]
    finally:
        os.close(descriptor)
    return copy.copy_(storage)  # type: ignore[no-any-return, unused-ignore]
