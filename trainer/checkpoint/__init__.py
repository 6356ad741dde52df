"""Checkpoints: sharded by `torch.distributed.checkpoint`, in one safe format, committed by a marker written last.

`step-00000100/` holds `rank-00000-000.bin` ... (raw little-endian tensor bytes), `state.pt` (small state, readable with
`weights_only`), `manifest.json` (every tensor: dtype, shape, and where each chunk lies, with its crc32c; config, code
version, stream state) and, last of all, `COMMITTED` (the manifest's SHA-256). Nothing is trusted without that marker,
and nothing is unpickled but `state.pt`, under `weights_only`.
"""

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.loading import load_module
from trainer.checkpoint.manifest import committed_steps, latest, read_manifest, step_name, verify
from trainer.checkpoint.retention import Retention

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "CorruptCheckpoint",
    "Retention",
    "committed_steps",
    "latest",
    "load_module",
    "read_manifest",
    "step_name",
    "verify",
]
