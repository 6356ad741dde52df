"""Saves, commits, finds and loads the checkpoints of one run. Every method is collective unless it says otherwise."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from datamodules.store import Store, StoreError, Unreachable
from trainer.checkpoint import loading
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint import state as states
from trainer.checkpoint.background import Flight
from trainer.checkpoint.checksum import crc32c
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.plan import Plan, make_plan, signature
from trainer.checkpoint.retention import Ledger, Retention
from trainer.checkpoint.staging import Buffers, Image, Written, tensor_table, upload
from trainer.distributed import on_rank_zero, rank, world_size

log = logging.getLogger("keel.checkpoint")

# For collectives after an upload: the first rank to be ready waits for the last.
_TIMEOUT = timedelta(hours=2)


class Checkpointer:
    """The checkpoints under one store.

    With `background` a save returns once this rank's bytes are copied to host memory; hashing, upload, commit and
    retention run in one thread, whose collectives have a process group of their own. One save is in flight: the next
    one waits for it. What goes wrong there is raised by `poll`, `wait`, the next save or the next load. Without
    `background` only old checkpoints are removed in that thread.

    Args:
        store: the `checkpoints/` prefix of a run.
        describe: plain data written into each manifest (resolved config, code version ...).
        part_bytes: size at which the next object is begun; larger pieces of tensors are cut.
        retention: which steps are kept; the default keeps the last two.
        background: saves beside training.
    """

    def __init__(
        self,
        store: Store,
        describe: dict[str, Any] | None = None,
        *,
        part_bytes: int = 256 << 20,
        retention: Retention | None = None,
        background: bool = False,
    ) -> None:
        self.store, self.describe = store, describe or {}
        self.part_bytes, self.background = part_bytes, background
        self.retention = retention or Retention()
        # Raises CheckpointError when this writer has been replaced; asked on rank 0 around every commit.
        self.fence: Callable[[], None] = lambda: None
        # Which of the writers that there may be of these steps this one is; the newest has the highest number. 0: the only one.
        self.writer = 0
        # Called on all ranks before a commit, in the thread that uploads: what must be in the store by then.
        self.before_commit: Callable[[], None] = lambda: None
        self.committed: tuple[int, float] | None = None  # on rank 0: (step, seconds since the epoch) of the last commit
        self._registered: dict[str, Callable[[], Mapping[str, torch.Tensor]]] = {}
        self._flight, self._ledger = Flight(), Ledger(store)
        self._image, self._buffers = Image(), Buffers()
        self._signature: list[Any] | None = None
        self._plan: Plan | None = None
        self._group: Any = None

    def register(self, prefix: str, source: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """More tensors to be saved as `prefix.<name>` and loaded in place, resharded like all others (such as averaged weights).

        Args:
            prefix: one word; `ema` is that of averaged weights, under the names of the module's parameters.
            source: gives the live tensors, DTensors where sharded; the same names on all ranks.
        """
        if f"{prefix}." in (states.MODEL, states.OPTIMIZER, states.RNG) or "." in prefix:
            raise ValueError(f"prefix={prefix}: taken, or not one word")
        self._registered[prefix] = source

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
        """Writes and commits one step, or begins to; False when the step is committed already (nothing is ever overwritten).

        Args:
            step: optimiser steps done.
            module: holds all parameters and buffers.
            optimizers: over the parameters of `module`.
            extra: small state of rank 0, plain data and tensors only.
            device: of this rank, whose generator is saved.
            stream: state of the data stream, for the manifest.

        Raises:
            CheckpointError: the store refused, now or in the save before, or `extra` holds something that could not be
                loaded safely.
        """
        self.wait()
        tensors, scalars = self._collect(module, optimizers)
        tensors[f"{states.RNG}{rank():05d}"] = states.rng_state(device)
        plan = self._planned(tensors)
        state = _try(lambda: loading.pack(extra)) if rank() == 0 else b""
        document = {"scalars": scalars, "stream": stream}
        source: Image | Buffers
        if self.background:
            self._image.fill(plan, tensors)
            source = self._image
        else:
            self._buffers.prepare(plan, tensors)
            source = self._buffers
        folder = self.store.sub(manifests.step_name(step))
        prefix, noted = manifests.writer_name(self.writer), self._ledger.noted(step)
        work = partial(self._write, step, lambda: upload(folder, plan, source, prefix), state, document, plan, noted)
        if self.background:
            self._flight.start(work, f"keel-save-{step}")
            return True
        begun = work()
        if begun and rank() == 0:
            self._flight.start(self._retain, "keel-retention")  # to remove the old need not hold training up
        return begun

    def load(
        self,
        step: int,
        module: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        *,
        device: torch.device,
        source: Store | None = None,
    ) -> dict[str, Any]:
        """Loads a committed step in place, whatever world and strategy saved it; returns `extra`.

        `source`: the `checkpoints/` of another run, of which this one is a branch: the settings of its optimisers (rates,
        decay) stay those of `optimizers`.

        Raises:
            CheckpointError: not committed, damaged (tensors may then hold wrong bytes: load another step, or end), or made
                for another network (the tensors are named).
        """
        self.wait()
        store = source or self.store
        folder = store.sub(manifests.step_name(step))
        manifest = on_rank_zero(lambda: manifests.read_manifest(store, step))
        tensors, running = self._collect(module, optimizers)
        scalars = {name: value for name, value in running.items() if states.is_state(name)}
        if source is not None:
            scalars = {name: value for name, value in scalars.items() if not states.is_setting(name)}
        mine = f"{states.RNG}{rank():05d}"
        loading.check_compatible(manifest, tensors, scalars, folder.url)
        same_world = manifest["world_size"] == world_size()
        if same_world and mine in manifest["tensors"]:
            tensors[mine] = torch.empty(manifest["tensors"][mine]["shape"], dtype=torch.uint8)
        loading.load_tensors(folder, manifest["tensors"], tensors)
        packed = tensors.pop(mine, None)
        own = {name: value for name, value in tensors.items() if name.startswith((states.MODEL, states.OPTIMIZER))}
        states.restore(module, optimizers, own, running | {name: manifest["scalars"][name] for name in scalars})
        if packed is not None:
            states.set_rng_state(packed, device)
        return loading.unpack(on_rank_zero(lambda: loading.read_state(folder, manifest)))

    def latest(self, before: int | None = None) -> int | None:
        """The newest whole step, agreed on by all ranks; None when there is none."""
        self.wait()
        return on_rank_zero(lambda: manifests.latest(self.store, before=before))

    def poll(self) -> bool:
        """Whether a save has ended since the last call; raises what it raised. Not collective; never waits."""
        return self._flight.poll()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for the save in flight, at most `seconds`; False when it goes on. Raises what it raised. Not collective."""
        return self._flight.wait(seconds)

    def note(self, step: int, metrics: dict[str, float]) -> None:
        """Keeps validation metrics of a step, for retention by the best. Collective only in that rank 0's are kept."""
        if rank() == 0:
            try:
                self._ledger.note(step, metrics)
            except StoreError as error:
                log.warning("the metrics of step %d could not be kept beside its checkpoint: %s", step, error)

    def _collect(
        self, module: nn.Module, optimizers: list[torch.optim.Optimizer]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors, scalars = states.collect(module, optimizers)
        for prefix, source in self._registered.items():
            tensors.update({f"{prefix}.{name}": tensor for name, tensor in source().items()})
        return tensors, scalars

    def _open_group(self) -> None:
        if self._group is None and world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def _planned(self, tensors: dict[str, torch.Tensor]) -> Plan:
        """The plan for these tensors; made anew when they are others than at the last save, on whichever rank."""
        self._open_group()
        found = signature(tensors)
        changed = torch.tensor([self._plan is None or found != self._signature], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(changed, dist.ReduceOp.MAX, group=self._group)
        if self._plan is None or bool(changed):
            self._plan, self._signature = make_plan(tensors, self.part_bytes, self._group), found
        return self._plan

    def _write(
        self,
        step: int,
        put: Callable[[], Written],
        state: bytes | Exception,
        document: dict[str, Any],
        plan: Plan,
        noted: dict[str, float] | None,
    ) -> bool:
        """All of a save that needs no live tensor (in the background) or is done at once; on all ranks."""
        folder = self.store.sub(manifests.step_name(step))
        if on_rank_zero(lambda: self._begin(folder, step, noted), self._group):
            return False
        mine: Written | Exception
        try:
            mine = put()
            self.before_commit()
        except Exception as error:
            mine = _portable(error)
        everyone: list[Any] = [mine]
        if self._group is not None:
            everyone = [None] * world_size()
            dist.gather_object(mine, everyone if rank() == 0 else None, dst=0, group=self._group)

        def commit() -> None:
            _raise_first([*everyone, state], folder.url)
            self._commit(folder, step, everyone, state, {**document, "tensors": tensor_table(plan, everyone)})  # type: ignore[arg-type]

        on_rank_zero(commit, self._group)
        if rank() == 0 and self.background:
            self._retain()
        return True

    def _begin(self, folder: Store, step: int, noted: dict[str, float] | None) -> bool:
        """Rank 0: True if the step is committed and whole; otherwise removes what is there of it."""
        self.fence()
        left = folder.list("")
        if manifests.MARKER in left:
            problems = manifests.verify(self.store, step)
            if not problems:
                return True
            self.fence()  # to read all of it took a while
            log.warning("%s was damaged and is written again: %s", folder.url, problems[0])
            folder.delete(manifests.MARKER)
        for path in left:
            if manifests.writer_of(path) <= self.writer:  # one that has replaced this one may be at it already
                folder.delete(path)
        self._ledger.forget(step, noted)
        return False

    def _commit(self, folder: Store, step: int, written: list[Written], state: bytes, document: dict[str, Any]) -> None:
        """Rank 0: small state, then the manifest, then the marker."""
        prefix = manifests.writer_name(self.writer)
        self.fence()
        folder.write(prefix + manifests.STATE, state)
        files = sorted((file for part in written for file in part.files), key=lambda file: file["path"])
        files.append({"path": prefix + manifests.STATE, "size": len(state), "crc32c": crc32c(state)})
        created = time.time()
        document = {
            "format": manifests.FORMAT_VERSION,
            "step": step,
            "world_size": world_size(),
            "created": created,
            **self.describe,
            **document,
            "files": files,
        }
        raw = json.dumps(document, sort_keys=True).encode()
        name = prefix + manifests.MANIFEST
        folder.write(name, raw)
        digest = hashlib.sha256(raw).hexdigest()
        marker = json.dumps({"step": step, "manifest": name, "manifest_sha256": digest, "created": created}).encode()
        self.fence()
        if not folder.create(manifests.MARKER, marker):
            raise CheckpointError(
                f"{folder.url} was committed by another process meanwhile: two runs write to the same URL; stop one"
            )
        self.committed = step, created

    def _retain(self) -> None:
        """Rank 0: drops committed steps beyond the policy, marker first, so that a half-deleted one is never trusted."""
        try:
            entries = self._ledger.entries(metrics=bool(self.retention.best))
            kept = self.retention.kept(entries, lambda step: not manifests.verify(self.store, step, deep=False))
            for entry in entries:
                if entry.step not in kept:
                    self._ledger.remove(entry.step)
        except StoreError as error:  # the new step is safe; the next save tries again
            log.warning("old checkpoints could not be removed: %s", error)


def _try(call: Callable[[], bytes]) -> bytes | Exception:
    try:
        return call()
    except CheckpointError as error:  # raised on all ranks, when they next meet
        return error


def _portable(error: Exception) -> Exception:
    """An error that travels to rank 0 and is built there again."""
    if isinstance(error, CheckpointError | StoreError):
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def _raise_first(results: Sequence[Any], url: str) -> None:
    errors = [result for result in results if isinstance(result, Exception)]
    if not errors:
        return
    lines = dict.fromkeys(" ".join(str(error).split()) for error in errors)
    defect = next((error for error in errors if not isinstance(error, CheckpointError | StoreError)), None)
    message = f"saving {url} failed: {'; '.join(lines)}"
    if defect is not None:
        raise RuntimeError(message)
    passing = all(isinstance(error, Unreachable) for error in errors)
    raise Unreachable(message) if passing else CheckpointError(message)
