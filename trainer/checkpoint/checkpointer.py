"""Saves, commits, finds and loads the checkpoints of one run. Every method is collective unless it says otherwise."""

import dataclasses
import hashlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import google_crc32c
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from datamodules.store import Store, StoreError
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint import state as states
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.storage import ShardReader, ShardWriter, read_full
from trainer.distributed import on_rank_zero, rank, world_size

log = logging.getLogger("keel.checkpoint")


class Checkpointer:
    """The checkpoints under one store.

    Args:
        store: the `checkpoints/` prefix of a run.
        describe: plain data written into each manifest (resolved config, code version ...).
        part_bytes: size at which the next object is begun; only a larger chunk of one tensor makes a larger object.
        keep_last: how many committed steps are kept at least (2 or more).
        keep_every: steps divisible by it are kept for good (0: none).
    """

    def __init__(
        self,
        store: Store,
        describe: dict[str, Any] | None = None,
        *,
        part_bytes: int = 256 << 20,
        keep_last: int = 2,
        keep_every: int = 0,
    ) -> None:
        self.store, self.describe = store, describe or {}
        self.part_bytes, self.keep_last, self.keep_every = part_bytes, keep_last, keep_every
        # Raises CheckpointError when this writer has been replaced; asked on rank 0 around every commit.
        self.fence: Callable[[], None] = lambda: None

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        extra: dict[str, Any],
        *,
        device: torch.device,
        stream: dict[str, Any] | None = None,
    ) -> bool:
        """Writes and commits one step; False when the step is committed already (nothing is ever overwritten).

        Args:
            step: optimiser steps done.
            module: holds all parameters and buffers.
            optimizers: over the parameters of `module`.
            extra: small state of rank 0, plain data and tensors only.
            device: of this rank, whose generator is saved.
            stream: state of the data stream, for the manifest.

        Raises:
            CheckpointError: the store refused, or `extra` holds something that could not be loaded safely.
        """
        me, world = rank(), world_size()
        folder = self.store.sub(manifests.step_name(step))
        if on_rank_zero(lambda: self._begin(folder, step)):
            return False
        tensors, scalars = states.collect(module, optimizers)
        tensors[f"{states.RNG}{me:05d}"] = states.rng_state(device)
        writer = ShardWriter(folder, me, self.part_bytes)
        _dcp(
            lambda: dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized()), f"saving {folder.url}"
        )
        on_rank_zero(lambda: self._commit(folder, step, world, writer, scalars, extra, stream))
        return True

    def load(
        self, step: int, module: nn.Module, optimizers: list[torch.optim.Optimizer], *, device: torch.device
    ) -> dict[str, Any]:
        """Loads a committed step in place, whatever world and strategy saved it; returns `extra`.

        Raises:
            CheckpointError: not committed, damaged, or made for another network (the tensors are named).
        """
        folder = self.store.sub(manifests.step_name(step))
        manifest = on_rank_zero(lambda: manifests.read_manifest(self.store, step))
        tensors, scalars = states.collect(module, optimizers)
        mine = f"{states.RNG}{rank():05d}"
        check_compatible(manifest, tensors, scalars, folder.url)
        same_world = manifest["world_size"] == world_size()
        if same_world and mine in manifest["tensors"]:
            tensors[mine] = torch.empty(manifest["tensors"][mine]["shape"], dtype=torch.uint8)
        reader = ShardReader(folder, manifest["tensors"])
        _dcp(
            lambda: dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized()), f"loading {folder.url}"
        )
        packed = tensors.pop(mine, None)
        states.restore(module, optimizers, tensors, {name: manifest["scalars"][name] for name in scalars})
        if packed is not None:
            states.set_rng_state(packed, device)
        return _unpack(on_rank_zero(lambda: _read_state(folder, manifest)))

    def latest(self, before: int | None = None) -> int | None:
        """The newest whole step, agreed on by all ranks; None when there is none."""
        return on_rank_zero(lambda: manifests.latest(self.store, before=before))

    def _begin(self, folder: Store, step: int) -> bool:
        """Rank 0: True if the step is committed and whole; otherwise removes what is there of it."""
        self.fence()
        if folder.exists(manifests.MARKER):
            problems = manifests.verify(self.store, step)
            if not problems:
                return True
            log.warning("%s was damaged and is written again: %s", folder.url, problems[0])
            folder.delete(manifests.MARKER)
        folder.delete_tree("")
        return False

    def _commit(
        self,
        folder: Store,
        step: int,
        world: int,
        writer: ShardWriter,
        scalars: dict[str, Any],
        extra: dict[str, Any],
        stream: dict[str, Any] | None,
    ) -> None:
        """Rank 0: small state, then the manifest, then the marker; then retention."""
        packed = io.BytesIO()
        torch.save(extra, packed)
        state = packed.getvalue()
        try:
            _unpack(state)
        except Exception as error:
            raise CheckpointError(
                f"the state of a callback or scheduler is not plain data and could not be loaded safely: {error}"
            ) from error
        folder.write(manifests.STATE, state)
        files = [dataclasses.asdict(file) for file in writer.files]
        files.append({"path": manifests.STATE, "size": len(state), "crc32c": google_crc32c.value(state)})
        document = {
            "format": manifests.FORMAT_VERSION,
            "step": step,
            "world_size": world,
            "created": time.time(),
            **self.describe,
            "stream": stream,
            "files": files,
            "scalars": scalars,
            "tensors": writer.tensors,
        }
        raw = json.dumps(document, indent=1, sort_keys=True).encode()
        folder.write(manifests.MANIFEST, raw)
        marker = json.dumps({"step": step, "manifest_sha256": hashlib.sha256(raw).hexdigest()}).encode()
        self.fence()
        if not folder.create(manifests.MARKER, marker):
            raise CheckpointError(
                f"{folder.url} was committed by another process meanwhile: two runs write to the same URL; stop one"
            )
        self._retain()

    def _retain(self) -> None:
        """Rank 0: drops committed steps beyond the policy, marker first, so that a half-deleted one is never trusted."""
        try:
            whole = 0
            for step in reversed(manifests.committed_steps(self.store)):
                if whole < self.keep_last:  # only whole ones count: the damaged cannot be fallen back to
                    whole += not manifests.verify(self.store, step, deep=False)
                elif not (self.keep_every and step % self.keep_every == 0):
                    folder = self.store.sub(manifests.step_name(step))
                    folder.delete(manifests.MARKER)
                    folder.delete_tree("")
        except StoreError as error:  # the new step is safe; the next save tries again
            log.warning("old checkpoints could not be removed: %s", error)


def check_compatible(
    manifest: dict[str, Any], tensors: dict[str, torch.Tensor], scalars: dict[str, Any], url: str
) -> None:
    """Compares what a checkpoint holds with what is asked of it.

    Raises:
        CheckpointError: missing tensors or other shapes, named with both sides.
    """
    saved = manifest["tensors"]
    missing = [name for name in tensors if name not in saved] + [
        name for name in scalars if name not in manifest["scalars"]
    ]
    if missing:
        raise CheckpointError(f"{url} lacks {_some(missing)}: it was saved by another model or optimiser config")
    wrong = [
        f"{name} {saved[name]['shape']} (config: {list(tensor.shape)})"
        for name, tensor in tensors.items()
        if saved[name]["shape"] != list(tensor.shape)
    ]
    if wrong:
        raise CheckpointError(f"{url} has other shapes: {_some(wrong)}; use the config that it was saved with")
    extra = [name for name in saved if name.startswith(states.MODEL) and name not in tensors]
    if extra:
        raise CheckpointError(f"{url} holds {_some(extra)}, which the configured model has not")


def load_module(store: Store, step: int, module: nn.Module) -> None:
    """Loads only the parameters and buffers of an unsharded module, in one process (evaluation, export).

    Raises:
        CheckpointError: as `Checkpointer.load`.
    """
    manifest = manifests.read_manifest(store, step)
    folder = store.sub(manifests.step_name(step))
    own = module.state_dict()
    check_compatible(manifest, {states.MODEL + name: tensor for name, tensor in own.items()}, {}, folder.url)
    loaded = read_full(folder, manifest["tensors"], [states.MODEL + name for name in own])
    module.load_state_dict({name.removeprefix(states.MODEL): tensor for name, tensor in loaded.items()})


def _read_state(folder: Store, manifest: dict[str, Any]) -> bytes:
    raw = folder.read(manifests.STATE)
    (entry,) = [file for file in manifest["files"] if file["path"] == manifests.STATE]
    if len(raw) != entry["size"] or google_crc32c.value(raw) != entry["crc32c"]:
        raise CorruptCheckpoint(f"{folder.join(manifests.STATE)} is corrupt: crc32c differs")
    return raw


def _unpack(state: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(state), weights_only=True, map_location="cpu")


def _dcp(call: Callable[[], Any], what: str) -> None:
    # CheckpointException is a BaseException: `except Exception` would let it pass and print a page per rank.
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            call()
    except dcp.api.CheckpointException as error:
        causes = {str(_cause(failure)): _cause(failure) for failure in error.failures.values()}
        corrupt = any(isinstance(cause, CorruptCheckpoint) for cause in causes.values())
        raise (CorruptCheckpoint if corrupt else CheckpointError)(f"{what} failed: {'; '.join(causes)}") from error


def _cause(failure: Any) -> BaseException:
    return failure[0] if isinstance(failure, tuple) else failure


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
