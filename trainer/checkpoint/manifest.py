"""Which checkpoints of a run are whole: naming, discovery and verification. Reads only; needs no process group."""

import hashlib
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datamodules.store import NotFound, Store
from trainer.checkpoint.checksum import crc32c
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.commits import MARKER, committed_steps, step_name

__all__ = ["MARKER", "committed_steps", "latest", "read_manifest", "step_name", "verify"]

FORMAT_VERSION = 1
MANIFEST, STATE = "manifest.json", "state.pt"
_THREADS = 16
_WRITER = re.compile(r"^writer-(\d{4,})-")

log = logging.getLogger("keel.checkpoint")


def writer_name(writer: int) -> str:
    """What the names of a writer's objects begin with, but for the marker: of writers that do not know of each other each
    writes its own objects. 0: nothing, for one who is the only one."""
    return f"writer-{writer:04d}-" if writer else ""


def writer_of(name: str) -> int:
    """The writer of an object of a step's folder; 0: none is named."""
    match = _WRITER.match(name)
    return int(match.group(1)) if match else 0


def read_manifest(store: Store, step: int) -> dict[str, Any]:
    """The manifest of a committed step, checked against its marker.

    Raises:
        CheckpointError: not committed, or the manifest is not the one that was committed.
    """
    folder = store.sub(step_name(step))
    try:
        marker = json.loads(folder.read(MARKER))
        name, digest = marker.get("manifest", MANIFEST), marker["manifest_sha256"]
        raw = folder.read(name)
    except NotFound as error:
        raise CheckpointError(f"checkpoint {folder.url} is not committed: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(
            f"checkpoint {folder.url}: {MARKER} is not readable; the checkpoint is damaged"
        ) from error
    if hashlib.sha256(raw).hexdigest() != digest:
        raise CorruptCheckpoint(f"checkpoint {folder.url}: {name} differs from the committed one; it is damaged")
    manifest = json.loads(raw)
    if manifest["format"] > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {folder.url} has format {manifest['format']}, this Keel reads up to {FORMAT_VERSION}: update Keel"
        )
    return manifest


def verify(store: Store, step: int, *, deep: bool = True) -> list[str]:
    """What is wrong with a step, one line each; empty when it is whole.

    Args:
        store: the `checkpoints/` store of a run.
        step: the step to check.
        deep: also read every file and compare its crc32c; otherwise existence and size only.
    """
    try:
        manifest = read_manifest(store, step)
    except CheckpointError as error:
        return [str(error)]
    folder = store.sub(step_name(step))

    def problem(file: dict[str, Any]) -> str | None:
        path = folder.join(file["path"])
        try:
            size = folder.size(file["path"])
            if size != file["size"]:
                return f"{path} has {size} bytes instead of {file['size']}"
            if deep and crc32c(folder.read(file["path"])) != file["crc32c"]:
                return f"{path} is corrupt (crc32c differs)"
        except NotFound:
            return f"{path} is missing"
        return None

    # Latency dominates a shallow look; a deep one holds whole files in memory.
    with ThreadPoolExecutor(2 if deep else _THREADS) as pool:
        return [found for found in pool.map(problem, manifest["files"]) if found]


def latest(store: Store, *, before: int | None = None) -> int | None:
    """The newest committed step whose files are there with their sizes; bad ones are passed over with a warning.

    Args:
        store: the `checkpoints/` store of a run.
        before: only steps below this one.

    Raises:
        CorruptCheckpoint: there are committed steps, and none is whole.
    """
    steps = [step for step in committed_steps(store) if before is None or step < before]
    found: list[str] = []
    for step in reversed(steps):
        problems = verify(store, step, deep=False)
        if not problems:
            return step
        found += problems[:1]
        log.warning("checkpoint %s passed over: %s", step_name(step), "; ".join(problems[:3]))
    if steps:
        raise CorruptCheckpoint(
            f"no committed checkpoint at {store.url} is whole: {found[0]}; start a new run at another url"
        )
    return None
