"""Checkpoints: sharded by `torch.distributed.checkpoint`, in one safe format, committed by a marker written last.

`step-00000100/` holds `writer-0001-rank-00000-000.bin` ... (raw little-endian tensor bytes), `writer-0001-state.pt` (small
state, readable with `weights_only`), `writer-0001-manifest.json` (every tensor: dtype, shape, and where each chunk lies,
with its crc32c; config, code version, stream state) and, last of all, `COMMITTED` (the manifest's name and SHA-256). The
number is that of the attempt of the run: one that was replaced and does not know it yet, however slow, overwrites nothing
that its successor writes. Nothing is trusted without the marker, and nothing is unpickled but the small state, under
`weights_only`.
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
