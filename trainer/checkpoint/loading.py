"""From a committed step back into tensors, sharded or not."""

import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from datamodules.store import Store, Unreachable
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint import state as states
from trainer.checkpoint.checksum import crc32c
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.storage import ShardReader, read_full


def load_tensors(folder: Store, table: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Fills `tensors` (live ones, DTensors where sharded) from the entries of the same names in `table`. Collective.

    Raises:
        CorruptCheckpoint: bytes that are not those which were committed; some of these may be in `tensors` by then.
        CheckpointError: the store refused.
    """
    reader = ShardReader(folder, table)
    alone = not dist.is_initialized()
    guarded(lambda: dcp.load(tensors, storage_reader=reader, no_dist=alone), f"loading {folder.url}")


def check_compatible(
    manifest: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, Any],
    url: str,
    *,
    whole: bool = True,
) -> None:
    """Compares what a checkpoint holds with what is asked of it.

    Args:
        manifest: of the checkpoint.
        tensors, scalars: those to be filled.
        url: for messages.
        whole: whether nothing of the checkpoint may be left over; otherwise only nothing of the model.

    Raises:
        CheckpointError: missing tensors or other shapes, named with both sides.
    """
    saved = manifest["tensors"]
    missing = [name for name in tensors if name not in saved] + [
        name for name in scalars if name not in manifest["scalars"]
    ]
    if missing:
        raise CheckpointError(f"{url} lacks {some(missing)}: it was saved by another model or optimiser config")
    wrong = [
        f"{name} {saved[name]['shape']} (config: {list(tensor.shape)})"
        for name, tensor in tensors.items()
        if saved[name]["shape"] != list(tensor.shape)
    ]
    if wrong:
        raise CheckpointError(f"{url} has other shapes: {some(wrong)}; use the config that it was saved with")
    left = [
        name
        for name in saved
        if name not in tensors and (name.startswith(states.MODEL) or (whole and not name.startswith(states.RNG)))
    ]
    if left:
        raise CheckpointError(f"{url} holds {some(left)}, which the configured run has not")


def load_module(store: Store, step: int, module: nn.Module, *, prefix: str = states.MODEL) -> None:
    """Loads only the parameters and buffers of an unsharded module, in one process (evaluation, export).

    Args:
        store: the `checkpoints/` store of a run.
        step: a committed one.
        module: filled in place.
        prefix: `model.`, or that of a copy of the weights such as `ema.`; what it lacks comes from `model.`.

    Raises:
        CheckpointError: as `Checkpointer.load`, or there is no such copy.
    """
    manifest = manifests.read_manifest(store, step)
    folder = store.sub(manifests.step_name(step))
    if not any(name.startswith(prefix) for name in manifest["tensors"]):
        raise CheckpointError(f"{folder.url} has no averaged weights: its run had train.ema_decay=0")
    own = module.state_dict()
    check_compatible(manifest, {states.MODEL + name: t for name, t in own.items()}, {}, folder.url, whole=False)
    names = {name: weights_name(manifest, name, prefix) for name in own}
    loaded = read_full(folder, manifest["tensors"], list(names.values()))
    module.load_state_dict({name: loaded[saved] for name, saved in names.items()})


def weights_name(manifest: dict[str, Any], name: str, prefix: str) -> str:
    """The saved name of a weight: of the copy called `prefix` where that has one (buffers are not copied)."""
    return prefix + name if prefix + name in manifest["tensors"] else states.MODEL + name


def read_state(folder: Store, manifest: dict[str, Any]) -> bytes:
    """The small state of a step, verified."""
    (entry,) = [file for file in manifest["files"] if file["path"].endswith(manifests.STATE)]
    raw = folder.read(entry["path"])
    if len(raw) != entry["size"] or crc32c(raw) != entry["crc32c"]:
        raise CorruptCheckpoint(f"{folder.join(entry['path'])} is corrupt: crc32c differs")
    return raw


def pack(extra: dict[str, Any]) -> bytes:
    """Small state as bytes that load under `weights_only`.

    Raises:
        CheckpointError: something in it is not plain data.
    """
    packed = io.BytesIO()
    try:
        torch.save(extra, packed)
        unpack(packed.getvalue())
    except (pickle.PicklingError, pickle.UnpicklingError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the state of a callback or scheduler is not plain data and could not be loaded safely: {error}"
        ) from error
    return packed.getvalue()


def unpack(state: bytes) -> dict[str, Any]:
    """What `pack` packed; code in it is refused, not run."""
    return torch.load(io.BytesIO(state), weights_only=True, map_location="cpu")


def guarded(call: Callable[[], Any], what: str) -> None:
    """Calls `torch.distributed.checkpoint`, whose CheckpointException is a BaseException: `except Exception` would let it
    pass and print a page per rank. It becomes one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            call()
    except dcp.api.CheckpointException as error:
        causes = {str(_cause(failure)): _cause(failure) for failure in error.failures.values()}
        kind: type[Exception] = CheckpointError
        if any(isinstance(cause, CorruptCheckpoint) for cause in causes.values()):
            kind = CorruptCheckpoint
        elif all(isinstance(cause, Unreachable) for cause in causes.values()):
            kind = Unreachable  # a later start may succeed
        raise kind(f"{what} failed: {'; '.join(causes)}") from error


def _cause(failure: Any) -> BaseException:
    return failure[0] if isinstance(failure, tuple) else failure


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
