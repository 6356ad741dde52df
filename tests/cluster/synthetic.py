"""Runs as a store shows them, without training: what the report and the commands read."""

from __future__ import annotations

import io
import math

import numpy as np

from datamodules.store import Store
from trainer.records import MetricsWriter, start_attempt, write_record

CONFIG = """\
name: {name}
seed: 0
url: {url}
model: {{name: {model}, width: 32}}
task: {{name: {task}}}
train: {{max_steps: 200, global_batch: 16}}
"""


def operator_run(url: str, *, finished: bool = True, steps: int = 200) -> Store:
    """A run of 200 steps that was killed at 120 and resumed from 100; evaluated, with fields, when `finished`."""
    store = Store(url)
    store.write("config.yaml", CONFIG.format(name="fno <demo>", url=url, model="fno", task="field_rollout").encode())
    for attempt, resumed_from, start, stop in ((1, 0, 0, 120), (2, 100, 100, steps)):
        world = 3 - attempt
        info = {
            "resumed_from": resumed_from,
            "host": "node-1",
            "world_size": world,
            "torch": "2.13.0",
            "python": "3.11",
        }
        assert start_attempt(store, info) == attempt
        writer = MetricsWriter(store, attempt)
        writer.extend(operator_row(step, attempt) for step in range(start + 1, stop + 1))
        for step in range(start + 20, stop + 1, 20):
            writer.append({"step": step, "val/relative_l2": 0.9 * math.exp(-step / 60) + 0.02, "val/vrmse": 0.5})
        writer.close()
    if finished:
        metrics = {"relative_l2": 0.0212, "persistence_relative_l2": 0.31, "rollout_relative_l2": 0.11}
        for lead in range(1, 21):
            metrics[f"rollout/relative_l2@{lead}"] = 0.02 * lead**0.7
            metrics[f"persistence/relative_l2@{lead}"] = 0.31 * lead**0.4
        store.write_json("evaluation.json", {"step": steps, "split": "test", "samples": 32, "metrics": metrics})
        packed = io.BytesIO()
        np.savez_compressed(packed, **fields())  # type: ignore[arg-type]
        store.write("evaluation.npz", packed.getvalue())
        write_record(
            store, {"status": "ok", "parameters": 1_234_567, "attempt_seconds": 93.4, "steps": steps, "loss": 0.03}
        )
    return store


def language_run(url: str) -> Store:
    """A finished language run with a baseline."""
    store = Store(url)
    store.write("config.yaml", CONFIG.format(name="lm", url=url, model="transformer", task="next_token").encode())
    start_attempt(store, {"host": "node-1", "world_size": 2})
    writer = MetricsWriter(store, 1)
    writer.extend({"step": s, "loss": 5 * math.exp(-s / 50) + 1, "lr": 1e-3} for s in range(1, 201))
    writer.append({"step": 200, "val/loss": 1.2, "val/bits_per_byte": 1.7})
    writer.append({"step": 150, "event": "spike", "ratio": 3.5})
    writer.close()
    metrics = {"loss": 1.2, "bits_per_byte": 1.73}
    store.write_json("evaluation.json", {"step": 200, "metrics": metrics, "baseline": {"bigram_bits_per_byte": 3.4}})
    write_record(store, {"status": "ok", "parameters": 999})
    return store


def operator_row(step: int, attempt: int) -> dict:
    """One row of training, with what the diagnostics log every 10 steps."""
    noise = math.sin(37.0 * step) * 0.05
    loss = math.exp(-step / 50 + noise) + 0.02
    row = {
        "step": step,
        "attempt": attempt,
        "loss": loss,
        "lr": 1e-3 * min(1.0, step / 20),
        "diag/gradients/norm": 2.0 + noise,
    }
    if step % 10 == 0:
        row |= {
            "throughput/samples_per_s": 40 + noise,
            "throughput/data_wait": 0.02,
            "diag/gradients/norm": 2.0 + noise,
        }
        row |= {f"diag/activations/rms_block_{b:02d}": 1 + 0.2 * b + step / 500 for b in range(4)}
        row |= {f"diag/updates/block_{b:02d}": 1e-3 * (b + 1) for b in range(4)}
    return row


def fields(steps: int = 20, size: int = 64) -> dict[str, np.ndarray]:
    """A travelling wave and a prediction that drifts from it, [T, 1, size, size]."""
    axis = np.linspace(0, 2 * np.pi, size, endpoint=False)
    lead = np.arange(1, steps + 1)[:, None, None, None]
    truth = np.sin(2 * axis[:, None] + 0.2 * lead) * np.cos(3 * axis[None, :])
    prediction = np.sin(2 * axis[:, None] + 0.205 * lead) * np.cos(3 * axis[None, :])
    arrays = {"truth": truth, "prediction": prediction, "error": prediction - truth}
    return {name: array.astype(np.float32) for name, array in arrays.items()}
