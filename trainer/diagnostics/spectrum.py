"""Energy that a predicted field has at small scales, against the truth: where unstable rollouts show first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.diagnostics.base import Context, Diagnostic


def energies(fields: Tensor, cut: float = 0.5) -> tuple[Tensor, Tensor]:
    """(total, high) spectral energy of periodic fields `[time, channel, *space]`, summed over time and channel.

    High: radial wavenumber of at least `cut` times the Nyquist wavenumber, each axis in its own Nyquist units. The mean
    is in neither. Summing |F|^2/n over all modes is the sum of squares of the field (Parseval).
    """
    space = fields.shape[2:]
    axes = tuple(range(2, fields.ndim))
    power = torch.fft.fftn(fields.float(), dim=axes, norm="ortho").abs().square().sum(dim=(0, 1))
    grids = torch.meshgrid(*(2.0 * torch.fft.fftfreq(n, device=fields.device) for n in space), indexing="ij")
    radius = torch.stack([grid.square() for grid in grids]).sum(0).sqrt()
    return (power * (radius > 0)).sum(), (power * (radius >= cut)).sum()


class Spectrum(Diagnostic):
    """`high_log10`, `total_log10`: log10 of predicted over true energy, at high wavenumbers and over all of them.

    0 is right, +1 ten times too much. Measured after the step on the first sample of this rank's batch with one more
    forward pass (`task.evaluation_example`).
    """

    def __init__(self) -> None:
        self._context: Context | None = None

    def check(self, task: Any) -> None:
        if hasattr(getattr(task.network, "config", None), "vocab_size"):
            raise ValueError(
                "diagnostics.names: 'spectrum' needs a task on fields, not tokens; remove it from the list"
            )

    def start(self, context: Context) -> None:
        self._context = context

    def collect(self) -> dict[str, Tensor]:
        assert self._context is not None
        task, batch = self._context.task, self._context.batch
        training = task.training
        task.eval()
        try:
            with torch.no_grad():
                example = task.evaluation_example({name: value[:1] for name, value in batch.items()})
        finally:
            task.train(training)
        device = next(iter(batch.values())).device
        predicted = energies(example["prediction"].to(device))
        true = energies(example["truth"].to(device))
        floor = 1e-12 * true[0] + torch.finfo(torch.float32).tiny  # a truth without small scales gives a finite number
        total, high = ((a + floor).log10() - (b + floor).log10() for a, b in zip(predicted, true, strict=True))
        return {"high_log10": high, "total_log10": total}

    def stop(self) -> None:
        self._context = None
