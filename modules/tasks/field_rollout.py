"""Step a field forward in time, again and again.

Shapes: B batch, T time, C channels, S spatial axes, F input frames, K steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modules.metrics.fields import relative_l2, vrmse
from modules.tasks.base import Batch, Sums, Task

LOSSES = ("relative_l2", "mse")


@dataclass
class FieldRolloutConfig:
    """`loss`: `relative_l2` of each predicted frame in physical units (per sample, over all channels), or `mse` in
    normalised units. `residual`: the network predicts the increment over the last frame instead of the next frame.
    `rollout_steps`: frames predicted in training, each from the ones before, with the gradient through all of them.
    `eval_rollout_steps`: frames predicted in evaluation.
    """

    input_frames: int = 1
    channels: int = 1
    space: list[int] = field(default_factory=lambda: [64, 64])
    loss: str = "relative_l2"
    residual: bool = True
    rollout_steps: int = 1
    eval_rollout_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("input_frames", "channels", "rollout_steps", "eval_rollout_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.eval_rollout_steps < self.rollout_steps:
            raise ValueError(
                f"eval_rollout_steps={self.eval_rollout_steps}: below rollout_steps={self.rollout_steps}, "
                "whose loss evaluation reports too; raise it"
            )
        if not self.space or min(self.space) < 1:
            raise ValueError(f"space={list(self.space)}: give the number of grid points of each axis")
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss}: choose one of {', '.join(LOSSES)}")


class FieldRollout(Task):
    """Predict the next frames of `{"fields": float32 (B, T, C, *S)}` from the first F ones, T >= F + K.

    An optional `"mask"` `(B,)` says which samples count. The network maps `(B, F*C, *S)`, the last F frames normalised
    per channel, oldest first, to `(B, C, *S)`; it has the attributes `in_channels`, `out_channels`, `dimensions` and
    `smallest_grid`.
    """

    config_class: ClassVar[type[Any]] = FieldRolloutConfig
    reads = ("fields",)
    may_read = ("mask",)
    config: FieldRolloutConfig
    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, config: FieldRolloutConfig) -> None:
        super().__init__(network, config)
        if not all(hasattr(network, name) for name in ("in_channels", "out_channels", "dimensions", "smallest_grid")):
            raise ValueError(
                f"{type(network).__name__}: is no field network (no in_channels, out_channels, dimensions, smallest_grid)"
            )
        wanted = {
            "in_channels": config.input_frames * config.channels,
            "out_channels": config.channels,
            "dimensions": len(config.space),
        }
        for name, value in wanted.items():
            if getattr(network, name) != value:
                raise ValueError(
                    f"network.{name}={getattr(network, name)}: task.input_frames={config.input_frames}, "
                    f"task.channels={config.channels}, task.space={list(config.space)} need {name}={value}"
                )
        smallest: tuple[int, ...] = network.smallest_grid  # type: ignore[assignment]
        if any(n < least for n, least in zip(config.space, smallest, strict=True)):
            raise ValueError(
                f"task.space={list(config.space)}: the network needs at least {list(smallest)} points; "
                "use fewer modes or a finer grid"
            )
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("std", torch.ones(config.channels))

    def bind(self, spec: Mapping[str, Any]) -> None:
        """Reads `kind`, `channels`, `space` and the per-channel `mean` and `std` of the training split."""
        config = self.config
        if spec.get("kind") != "fields":
            raise ValueError(f"task field_rollout: takes fields, but the data set holds {spec.get('kind')}")
        names = spec["channels"]
        channels = names if isinstance(names, int) else len(names)
        if channels != config.channels:
            raise ValueError(
                f"task.channels={config.channels}: the data set has {channels}; set task.channels={channels}"
            )
        if list(spec["space"]) != list(config.space):
            raise ValueError(f"task.space={list(config.space)}: the data set has {list(spec['space'])}")
        for name in ("mean", "std"):
            values = torch.tensor([float(value) for value in spec[name]], dtype=torch.float32, device="cpu")
            if values.numel() != channels or not bool(values.isfinite().all()):
                raise ValueError(f"{name}={list(spec[name])}: the data set must give one finite number per channel")
            if name == "std" and float(values.min()) <= 0:
                raise ValueError(f"std={list(spec[name])}: a constant channel cannot be normalised; leave it out")
            setattr(self, name, values if self.device.type == "meta" else values.to(self.device))

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        """Sum over samples and steps; count = samples * steps."""
        steps = self.config.rollout_steps
        fields, mask = self._read(batch, steps)
        start = self.config.input_frames
        predicted = self._rollout(self._normalise(fields[:, :start]), steps)
        errors = []
        for k, frame in enumerate(predicted):
            target = fields[:, start + k]
            if self.config.loss == "mse":
                errors.append((frame - self._normalise(target[:, None])[:, 0]).square().flatten(1).mean(1))
            else:
                errors.append(relative_l2(self._physical(frame), target))
        error = torch.stack(errors, dim=1)
        if mask is None:
            return error.sum(), error.numel(), {}
        return torch.where(mask[:, None], error, 0.0).sum(), mask.sum() * steps, {}

    def training_window(self) -> dict[str, Any]:
        return {"frames": self.config.input_frames + self.config.rollout_steps}

    def evaluation_window(self) -> dict[str, Any]:
        return {"frames": self.config.input_frames + self.config.eval_rollout_steps}

    def evaluation_step(self, batch: Batch) -> Sums:
        """Errors of one step and of a rollout, and the same of persistence (nothing changes), in physical units.

        One step, from true frames, mean over all pairs of the window: `relative_l2`, `vrmse`. Rollout from the first F
        frames over the K = T - F left (at most `eval_rollout_steps`), only for K > 1: `rollout/relative_l2@k` for each
        lead time k, the means over k `rollout_relative_l2` and `rollout_vrmse`, and `finite_rollouts`, the share of
        samples that are finite at all K steps. Each error of the network has its counterpart `persistence_*`, whose
        one-step forecast is the frame before and whose rollout is the last input frame. `loss` is the training loss.
        A prediction that is not finite counts as an infinite error.
        """
        fields, mask = self._read(batch, self.config.rollout_steps)
        start = self.config.input_frames
        steps = min(fields.shape[1] - start, self.config.eval_rollout_steps)
        truth = fields[:, start : start + steps]
        normalised = self._normalise(fields)
        total, count, _ = self.loss_terms(batch)
        found: Sums = {"loss": (total, count)}

        one_step = [self._physical(self._rollout(normalised[:, k : k + start], 1)[0]) for k in range(steps)]
        before = fields[:, start - 1 : start - 1 + steps]
        for prefix, frames in (("", torch.stack(one_step, dim=1)), ("persistence_", before)):
            found[f"{prefix}relative_l2"] = _sum(_per_frame(relative_l2, frames, truth), mask)
            found[f"{prefix}vrmse"] = _sum(_per_frame(vrmse, frames, truth), mask)
        if steps == 1:
            return found

        rollout = torch.stack([self._physical(frame) for frame in self._rollout(normalised[:, :start], steps)], dim=1)
        held = fields[:, start - 1 : start].expand_as(truth)
        for prefix, frames in (("", rollout), ("persistence_", held)):
            error = _per_frame(relative_l2, frames, truth)
            found[f"{prefix}rollout_relative_l2"] = _sum(error, mask)
            found[f"{prefix}rollout_vrmse"] = _sum(_per_frame(vrmse, frames, truth), mask)
            for k in range(steps):
                found[f"{prefix}rollout/relative_l2@{k + 1}"] = _sum(error[:, k : k + 1], mask)
        found["finite_rollouts"] = _sum(rollout.flatten(1).isfinite().all(1, keepdim=True).float(), mask)
        return found

    def evaluation_example(self, batch: Batch) -> dict[str, Tensor]:
        """`truth`, `prediction` (the rollout) and `error` (their difference) of the first sample, `(K, C, *S)`."""
        fields, _ = self._read({"fields": batch["fields"][:1]}, 1)
        start = self.config.input_frames
        steps = min(fields.shape[1] - start, self.config.eval_rollout_steps)
        predicted = self._rollout(self._normalise(fields[:, :start]), steps)
        prediction = torch.cat([self._physical(frame) for frame in predicted])
        truth = fields[0, start : start + steps]
        found = {"truth": truth, "prediction": prediction, "error": prediction - truth}
        return {name: value.detach().float().cpu() for name, value in found.items()}

    def example_batch(self, batch_size: int, device: torch.device | str = "meta") -> dict[str, Tensor]:
        return self._example(batch_size, self.config.rollout_steps, device)

    def _evaluation_batch(self) -> dict[str, Tensor]:
        return self._example(1, self.config.eval_rollout_steps, "meta")

    def _example(self, batch_size: int, steps: int, device: torch.device | str) -> dict[str, Tensor]:
        config = self.config
        frames = config.input_frames + steps
        return {
            "fields": torch.zeros(batch_size, frames, config.channels, *config.space, device=device),
            "index": torch.zeros(batch_size, dtype=torch.int64, device=device),
        }

    def _rollout(self, window: Tensor, steps: int) -> list[Tensor]:
        """`steps` predicted frames `(B, C, *S)` from the frames `(B, F, C, *S)`, all in normalised units."""
        frames: list[Tensor] = []
        for _ in range(steps):
            output = self.network(window.flatten(1, 2)).to(window.dtype)
            frame = window[:, -1] + output if self.config.residual else output
            frames.append(frame)
            window = torch.cat([window[:, 1:], frame[:, None]], dim=1)
        return frames

    def _read(self, batch: Batch, steps: int) -> tuple[Tensor, Tensor | None]:
        fields, mask = batch["fields"], batch.get("mask")
        needed = self.config.input_frames + steps
        if fields.ndim != 3 + len(self.config.space) or fields.shape[1] < needed:
            raise ValueError(
                f"fields of shape {tuple(fields.shape)}: need (batch, frames >= {needed}, {self.config.channels}, *space)"
            )
        if mask is not None and mask.shape != fields.shape[:1]:
            raise ValueError(f"mask of shape {tuple(mask.shape)}: one entry per sample, {tuple(fields.shape[:1])}")
        return fields, None if mask is None else mask.bool()

    def _normalise(self, frames: Tensor) -> Tensor:
        """`(B, T, C, *S)` in physical units to zero mean and unit variance per channel."""
        return (frames - self._column(self.mean, frames)) / self._column(self.std, frames)

    def _physical(self, frame: Tensor) -> Tensor:
        """The way back, of one frame `(B, C, *S)`."""
        return frame * self._column(self.std, frame) + self._column(self.mean, frame)

    def _column(self, values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.device, like.dtype).view(-1, *[1] * len(self.config.space))


def _per_frame(metric: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, truth: Tensor) -> Tensor:
    """A metric of `(B, C, *S)` on each frame of `(B, T, C, *S)`, as `(B, T)`; not finite counts as inf."""
    error = metric(prediction.flatten(0, 1), truth.flatten(0, 1)).view(truth.shape[:2])
    return torch.nan_to_num(error, nan=torch.inf, posinf=torch.inf)


def _sum(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """(sum, count) of `(B, n)` over the samples that count."""
    if mask is None:
        return values.sum(), values.numel()
    return torch.where(mask[:, None], values, 0.0).sum(), mask.sum() * values.shape[1]
