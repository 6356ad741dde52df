"""Size of a language model's logits: the early sign of a softmax that drifts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.diagnostics.base import Context, Diagnostic, Observers


class Logits(Diagnostic):
    """`max_abs` = max |logit|, `z` = mean (logsumexp of the logits)^2 (the quantity of the z-loss, arXiv 2204.02311).

    The network's output must be logits `[batch, length, vocabulary]`.
    """

    def __init__(self) -> None:
        self._observers = Observers()
        self._seen: list[tuple[Tensor, Tensor]] = []

    def check(self, task: Any) -> None:
        if not hasattr(getattr(task.network, "config", None), "vocab_size"):
            raise ValueError(
                f"diagnostics.names: 'logits' needs a language model, and {type(task.network).__name__} has no "
                "vocabulary; remove it from the list"
            )

    def start(self, context: Context) -> None:
        self._observers.add(context.network, self._see)

    def _see(self, output: Tensor) -> None:
        logits = output.float()
        self._seen.append((logits.abs().amax(), torch.logsumexp(logits, dim=-1).square().mean()))

    def collect(self) -> dict[str, Tensor]:
        if not self._seen:
            raise RuntimeError("diagnostics 'logits': the network was not called in this step")
        largest, z = (torch.stack(values) for values in zip(*self._seen, strict=True))
        return {"max_abs": largest.amax(), "z": z.mean()}

    def stop(self) -> None:
        self._observers.remove()
        self._seen = []
