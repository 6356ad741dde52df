"""Tiny data sets and run configs on which the whole path takes seconds."""

from pathlib import Path
from typing import Any

import numpy as np

from datamodules.format import ArraySpec, write_dataset


def tiny_fields(url: str, *, trajectories: int = 12, frames: int = 6, size: int = 16, seed: int = 0) -> str:
    """Writes smooth periodic fields [trajectory, time, 1, size, size] that drift by one point per frame."""
    generator = np.random.default_rng(seed)
    x = np.arange(size) / size * 2 * np.pi
    phases = generator.uniform(0, 2 * np.pi, (trajectories, 3, 2))
    waves = sum(
        np.sin(k * x[None, :, None] + phases[:, k - 1, 0, None, None])
        * np.cos(k * x[None, None, :] + phases[:, k - 1, 1, None, None])
        / k
        for k in (1, 2, 3)
    )
    values = np.stack([np.roll(waves, shift, axis=1) for shift in range(frames)], axis=1)[:, :, None].astype("f4")
    spec = ArraySpec(
        shape=values.shape,
        dtype="float32",
        shard_length=2,
        dimensions=("trajectory", "time", "channel", "x", "y"),
    )
    train, held = trajectories - 4, trajectories - 2
    attributes = {
        "kind": "fields",
        "array": "fields",
        "channels": ["w"],
        "dt": 1.0,
        "splits": {"train": [0, train], "validation": [train, held], "test": [held, trajectories]},
    }
    write_dataset(url, {"fields": spec}, {"fields": values}, attributes)
    return url


def tiny_text(url: str, *, tokens: int = 20_000, seed: int = 0) -> str:
    """Writes a text whose next byte is nearly a function of the present one."""
    generator = np.random.default_rng(seed)
    values = np.empty(tokens, dtype="u1")
    values[0] = 97
    jumps = generator.random(tokens) < 0.1
    for i in range(1, tokens):
        values[i] = 97 + (generator.integers(26) if jumps[i] else (values[i - 1] - 97) * 3 % 26)
    spec = ArraySpec(shape=(tokens,), dtype="uint8", shard_length=4096, chunk_length=1024, dimensions=("token",))
    attributes = {
        "kind": "text",
        "array": "tokens",
        "vocab_size": 256,
        "splits": {"train": [0, tokens * 8 // 10], "validation": [tokens * 8 // 10, tokens]},
    }
    write_dataset(url, {"tokens": spec}, {"tokens": values}, attributes)
    return url


def fno_config(url: str, data: str, **train: Any) -> dict[str, Any]:
    """A run of a tiny FNO on `tiny_fields`."""
    return {
        "name": "tiny_fno",
        "url": url,
        "seed": 7,
        "model": {"name": "fno", "width": 8, "modes": [6, 6], "depth": 2},
        "task": {"name": "field_rollout", "space": [16, 16], "eval_rollout_steps": 4},
        "data": {"name": "fields", "url": data, "window_shards": 2},
        "optim": {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-4},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "strategy": {"name": "fsdp"},
        "train": {"max_steps": 8, "global_batch": 4, "grad_clip": 1.0, **train},
        "checkpoint": {"every": 4},
        "log": {"every": 3, "flush_seconds": 1.0, "trace": True, "progress": False},
        "diagnostics": {"every": 4, "names": ["gradients", "updates", "activations"]},
        "resources": {"accelerator": "cpu", "threads": 1},
    }


def lm_config(url: str, data: str, **train: Any) -> dict[str, Any]:
    """A run of a tiny transformer on `tiny_text`."""
    return fno_config(url, data, **train) | {
        "name": "tiny_lm",
        "model": {"name": "transformer", "width": 16, "depth": 2, "heads": 2, "max_seq_len": 32},
        "task": {"name": "next_token", "seq_len": 32},
        "data": {"name": "text", "url": data, "window_shards": 2},
        "diagnostics": {"every": 4, "names": ["gradients", "logits"]},
    }


def slowed(seconds: float) -> dict[str, str]:
    """Environment of workers whose steps take that long, and next to none of a processor's time."""
    return {"KEEL_TEST_STEP_S": str(seconds), "PYTHONPATH": str(Path(__file__).parent / "slow")}
