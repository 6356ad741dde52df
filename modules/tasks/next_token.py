"""Predict the next token.

Shapes: B batch, L sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.metrics.text import bits_per_byte
from modules.tasks.base import Batch, Sums, Task


@dataclass
class NextTokenConfig:
    """`z_loss`: coefficient of `mean(ln² Z)`, Z the softmax denominator, which keeps logits near zero (arXiv:2204.02311)."""

    seq_len: int = 256
    vocab_size: int = 256
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seq_len", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.z_loss < 0:
            raise ValueError(f"z_loss={self.z_loss}: must not be negative; 0 turns it off")


class NextToken(Task):
    """Cross entropy of tokens 1..L given those before, from `{"tokens": int64 (B, L+1)}`.

    An optional `"mask"` `(B, L)` says which targets `tokens[:, 1:]` count. The network maps int64 `(B, L)` to logits
    `(B, L, V)` and has the attributes `vocab_size` and `max_seq_len`.
    """

    config_class: ClassVar[type[Any]] = NextTokenConfig
    reads = ("tokens",)
    may_read = ("mask",)
    config: NextTokenConfig

    def __init__(self, network: nn.Module, config: NextTokenConfig) -> None:
        super().__init__(network, config)
        vocab_size, longest = getattr(network, "vocab_size", None), getattr(network, "max_seq_len", None)
        if vocab_size is None or longest is None:
            raise ValueError(f"{type(network).__name__}: is no token network (no vocab_size, max_seq_len)")
        if vocab_size != config.vocab_size:
            raise ValueError(
                f"task.vocab_size={config.vocab_size}: the network has vocab_size={vocab_size}; make them equal"
            )
        if longest < config.seq_len:
            raise ValueError(f"task.seq_len={config.seq_len}: longer than the network's max_seq_len={longest}")
        self.bytes_per_token = 1.0

    def bind(self, spec: Mapping[str, Any]) -> None:
        """Reads `kind`, `vocab_size`, `seq_len` and, for tokens that are not bytes, `bytes_per_token`."""
        if spec.get("kind") != "text":
            raise ValueError(f"task next_token: takes text, but the data set holds {spec.get('kind')}")
        if spec["vocab_size"] > self.config.vocab_size:
            raise ValueError(
                f"task.vocab_size={self.config.vocab_size}: the data set's tokens go up to {spec['vocab_size'] - 1}; "
                f"set it (and the network's) to at least {spec['vocab_size']}"
            )
        if spec.get("seq_len", self.config.seq_len) != self.config.seq_len:
            raise ValueError(f"task.seq_len={self.config.seq_len}: the data stream gives seq_len={spec['seq_len']}")
        self.bytes_per_token = float(spec.get("bytes_per_token", 1.0))

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        """Sum in nats over valid targets (with the z-loss), their number, and `cross_entropy`, `logit_max`."""
        logits, targets, mask = self._predict(batch)
        nats = _nats(logits, targets)
        total = nats
        if self.config.z_loss > 0:
            total = nats + self.config.z_loss * torch.logsumexp(logits, dim=-1).square()
        valid = _sum(nats.detach(), mask)
        count = nats.numel() if mask is None else mask.sum()
        extras = {
            "cross_entropy": valid / torch.as_tensor(count).clamp_min(1),
            "logit_max": logits.detach().abs().amax(),
        }
        return _sum(total, mask), count, extras

    def training_window(self) -> dict[str, Any]:
        return {"seq_len": self.config.seq_len}

    def evaluation_step(self, batch: Batch) -> Sums:
        """`loss` (cross entropy, nats per token), `bits_per_byte`, `accuracy`."""
        logits, targets, mask = self._predict(batch)
        nats = _sum(_nats(logits, targets), mask)
        count = targets.numel() if mask is None else mask.sum()
        right = _sum((logits.argmax(-1) == targets).to(nats.dtype), mask)
        return {
            "loss": (nats, count),
            "bits_per_byte": (bits_per_byte(nats, self.bytes_per_token), count),
            "accuracy": (right, count),
        }

    def evaluation_example(self, batch: Batch) -> dict[str, Tensor]:
        """First sample: `tokens` (the targets), `prediction` (most likely ones), `nats` of each target, all `(L,)`."""
        logits, targets, _ = self._predict({"tokens": batch["tokens"][:1]})
        found = {"tokens": targets[0], "prediction": logits[0].argmax(-1), "nats": _nats(logits, targets)[0]}
        return {name: value.detach().cpu() for name, value in found.items()}

    def example_batch(self, batch_size: int, device: torch.device | str = "meta") -> dict[str, Tensor]:
        return {
            "tokens": torch.zeros(batch_size, self.config.seq_len + 1, dtype=torch.int64, device=device),
            "index": torch.zeros(batch_size, dtype=torch.int64, device=device),
        }

    def tokens_per_sample(self) -> int:
        return self.config.seq_len

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits `(B, L, V)` in float32, targets `(B, L)`, mask `(B, L)` or None)."""
        tokens, mask = batch["tokens"], batch.get("mask")
        if mask is not None and mask.shape != tokens[:, 1:].shape:
            raise ValueError(f"mask of shape {tuple(mask.shape)}: one entry per target, {tuple(tokens[:, 1:].shape)}")
        logits = self.network(tokens[:, :-1])
        return (
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            tokens[:, 1:],
            None if mask is None else mask.bool(),
        )


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _sum(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.sum() if mask is None else torch.where(mask, values, 0.0).sum()
