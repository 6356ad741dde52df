"""Size and outliers of what each block puts out."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trainer.diagnostics.base import Context, Diagnostic, Observers


def channel_axis(network: object) -> int:
    """Axis of the channels in a block's output: the network's `channel_axis`, else last for tokens, 1 for fields."""
    declared = getattr(network, "channel_axis", None)
    if declared is not None:
        return int(declared)
    return -1 if hasattr(getattr(network, "config", None), "vocab_size") else 1


def outlier_percent(hidden: Tensor, axis: int) -> Tensor:
    """100 * share of entries more than 5 standard deviations from the mean over the channels of their position.

    A Gaussian gives 5.7e-5 %. With fewer than 27 channels no entry can be that far out.
    """
    deviation, mean = torch.std_mean(hidden, dim=axis, correction=0, keepdim=True)
    return 100.0 * ((hidden - mean).abs() > 5.0 * deviation).to(torch.float32).mean()


class Activations(Diagnostic):
    """Per block and over all blocks: `rms` = sqrt(mean h^2 + 1e-30), `max_abs` = max |h|, `outliers` in percent.

    Averaged over the micro-batches of the step (`max_abs`: the largest). Recomputation under activation checkpointing
    calls a block twice with the same values and changes none of the three.
    """

    def __init__(self) -> None:
        self._observers = Observers()
        self._seen: list[list[tuple[Tensor, Tensor, Tensor]]] = []
        self._axis = -1

    def start(self, context: Context) -> None:
        blocks = context.network.blocks()
        self._axis = channel_axis(context.network)
        self._seen = [[] for _ in blocks]
        for number, block in enumerate(blocks):
            self._observers.add(block, partial(self._see, number))

    def _see(self, number: int, output: Tensor) -> None:
        hidden = output.float()
        self._seen[number].append((hidden.square().mean(), hidden.abs().amax(), outlier_percent(hidden, self._axis)))

    def collect(self) -> dict[str, Tensor]:
        silent = [str(number) for number, seen in enumerate(self._seen) if not seen]
        if silent:
            raise RuntimeError(
                f"diagnostics 'activations': no output seen of block {', '.join(silent)}; compile the blocks, not the "
                "whole network, or drop the diagnostic"
            )
        rows = [[torch.stack(values) for values in zip(*seen, strict=True)] for seen in self._seen]
        square = torch.stack([row[0].mean() for row in rows])
        largest = torch.stack([row[1].amax() for row in rows])
        outliers = torch.stack([row[2].mean() for row in rows])
        rms = (square + 1e-30).sqrt()
        found = {"rms": rms.mean(), "max_abs": largest.amax(), "outliers": outliers.mean()}
        width = max(2, len(str(len(rows) - 1)))
        for name, values in (("rms", rms), ("max_abs", largest), ("outliers", outliers)):
            found |= {f"{name}_block_{number:0{width}d}": value for number, value in enumerate(values.unbind())}
        return found

    def stop(self) -> None:
        self._observers.remove()
        self._seen = []
