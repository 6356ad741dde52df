"""Evaluation of a committed checkpoint on held-out data."""

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from datamodules.store import Store
from trainer import config as configs
from trainer.build import accelerator_name, build
from trainer.checkpoint import CheckpointError, latest, load_module
from trainer.checkpoint.state import MODEL
from trainer.checkpoint.weights import EMA
from trainer.config import ConfigError
from trainer.quiet import quiet
from trainer.records import encode


def evaluate(
    url: str,
    overrides: Sequence[str] = (),
    *,
    split: str = "test",
    limit: int | None = None,
    batch: int = 8,
    step: int | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Evaluates a committed checkpoint of a run in this process and writes `evaluation.json` and `evaluation.npz`; with
    overrides or `ema`, which make it another question, `evaluation-<their hash>.json` alone.

    Args:
        url: of the run.
        overrides: `data.` and `task.` keys that are other than in training: another data set, or the same at another
            resolution (an operator has no grid of its own). Fields are normalised as in training.
        split: of its data set.
        limit: at most this many samples (None: all).
        batch: samples at once.
        step: which checkpoint (None: the last whole one).
        ema: the averaged weights of the run in place of those that it trains.

    Returns:
        {"step", "split", "samples", "metrics": {name: value}}, and "overrides" and "ema" where they are given.

    Raises:
        ConfigError: an override of something that is part of the trained network, or that does not fit it.
        CheckpointError: nothing committed to evaluate, or no averaged weights.
    """
    quiet()
    store = Store(configs.absolute_url(url))
    for override in overrides:
        if not override.startswith(("data.", "task.")):
            raise ConfigError(
                f"{override}: an evaluation may change data.* and task.*; the network is as it was trained"
            )
    config = configs.load(store.join("config.yaml"), overrides)
    task, data = build(config)
    checkpoints = store.sub("checkpoints")
    step = latest(checkpoints) if step is None else step
    if step is None:
        raise CheckpointError(f"{url} has no committed checkpoint to evaluate; train it first")
    load_module(checkpoints, step, task, prefix=EMA if ema else MODEL)
    device = torch.device(accelerator_name(config.resources.accelerator))
    task.to(device).eval()
    sums: dict[str, list[torch.Tensor]] = {}
    samples, example = 0, None
    with torch.inference_mode():
        for item in data.evaluation_loader(split, task.evaluation_window(), batch=batch, limit=limit or 0):
            item = {key: value.to(device) for key, value in item.items()}
            if example is None:
                example = task.evaluation_example(item)
            for name, (total, count) in task.evaluation_step(item).items():
                entry = sums.setdefault(
                    name, [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
                )
                entry[0] += torch.as_tensor(total, dtype=torch.float64).cpu()
                entry[1] += count
            samples += len(item["index"])
    if not samples:
        raise ConfigError(f"split '{split}' of {config.data.url} gives no sample to evaluate")
    result = {
        "step": step,
        "split": split,
        "samples": samples,
        "metrics": {name: float(total / count) for name, (total, count) in sums.items()},
    }
    if overrides or ema:
        result |= {"overrides": list(overrides)} if overrides else {}
        result |= {"ema": True} if ema else {}
        question = [*sorted(overrides), *(["--ema"] if ema else [])]
        digest = hashlib.sha256("\n".join(question).encode()).hexdigest()[:12]
        store.write(f"evaluation-{digest}.json", encode(result))
        return result
    packed = io.BytesIO()
    np.savez_compressed(packed, **{name: tensor.cpu().numpy() for name, tensor in (example or {}).items()})  # type: ignore[arg-type]
    store.write("evaluation.npz", packed.getvalue())
    store.write("evaluation.json", encode(result))  # an unstable model gives infinities, which plain JSON has not
    return result
