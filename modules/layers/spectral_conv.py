"""Convolution as multiplication of the lowest Fourier modes, on periodic grids of 1, 2 or 3 dimensions.

Shapes: B batch, I channels in, O channels out, n_i grid points and m_i modes of axis i, d number of axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from modules.roles import declare
from modules.scales import declare_factors, declare_fans, normal_, scaled

_AXES = "xyz"


class SpectralConv(nn.Module):
    """`y = irfft(W(k) rfft(x)) + b` on the kept modes k (FNO, arXiv:2010.08895). `(B, I, *n) -> (B, O, *n)`.

    Kept wave numbers are `-(m//2) .. (m-1)//2` on all axes but the last and `0 .. m//2` on the last, whose negative half
    follows from the real signal. The transform is normalised forward (divided by the number of points), so coefficients,
    and with them the weights, mean the same on any grid. A grid with fewer points than modes uses the weights of the
    wave numbers that it resolves and leaves the others out.

    - `weight`: float `(I, O, m_1, .., m_{d-1}, m_d//2 + 1, 2)`, role spectral. Real pairs instead of complex numbers, so
      that sharding, collectives, clipping and optimisers see ordinary tensors. Index j of an axis is wave number
      `j - m//2` (j on the last axis).
    - `bias`: `(O,)`.

    Fans are channels. Factor: `weight`. Initial weights are complex normal with `E|w|² = 2 / (I + O)`; the bias has the same variance.

    Transforms run in float32 (float64 for float64 input), also under autocast: half-precision FFTs lose the small
    modes and exist only for some sizes. The result has the input's dtype. Transforms are pruned: each axis is cut to
    its kept modes before the next one is transformed.

    The spectrum after multiplication is not Hermitian on its self-conjugate columns (k_d = 0 and, on an even grid,
    Nyquist), and what a complex-to-real transform makes of that differs between FFT libraries. The imaginary part of
    these columns is dropped here, which is the inverse of the Hermitian part, on every backend.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_channels: int, out_channels: int, modes: Sequence[int], *, bias: bool = True) -> None:
        super().__init__()
        if not 1 <= len(modes) <= len(_AXES):
            raise ValueError(f"modes={list(modes)}: give one number per axis, for 1 to {len(_AXES)} axes")
        if min(modes) < 1:
            raise ValueError(f"modes={list(modes)}: each axis needs at least 1 mode")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.modes = tuple(modes)
        columns = modes[-1] // 2 + 1
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels, *modes[:-1], columns, 2))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        declare(self, weight="spectral", bias="vector")
        declare_fans(self, weight=(in_channels, out_channels))  # modes are no width
        declare_factors(self, weight=1.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = math.sqrt(2.0 / (self.in_channels + self.out_channels))
        normal_(self, "weight", std / math.sqrt(2.0))  # two real parts share the variance
        if self.bias is not None:
            normal_(self, "bias", std)

    def forward(self, x: Tensor, output_shape: Sequence[int] | None = None) -> Tensor:
        """`x` `(B, I, *n)` to `(B, O, *output_shape)`, by default on the input's grid.

        Another `output_shape` samples the same trigonometric polynomial on that grid (exact where both grids have more
        points than modes). Raises ValueError if the number of axes or channels does not fit.
        """
        if x.ndim != len(self.modes) + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: SpectralConv with modes={list(self.modes)} takes "
                f"(batch, {self.in_channels}, {', '.join(f'n_{i + 1}' for i in range(len(self.modes)))})"
            )
        shape = tuple(x.shape[2:]) if output_shape is None else tuple(output_shape)
        if len(shape) != len(self.modes):
            raise ValueError(f"output_shape={list(shape)}: the input has {len(self.modes)} spatial axes")
        with _no_autocast(x.device.type):
            y = self._convolve(x.to(torch.promote_types(x.dtype, torch.float32)), shape)
            if self.bias is not None:
                y = y + self.bias.to(y.dtype).view(-1, *[1] * len(shape))
        return y.to(x.dtype)

    def _convolve(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        axes = range(2, x.ndim)
        # wave numbers [-low, high) that the weights, the input grid and the output grid all have
        kept = [
            (min(m // 2, n // 2, s // 2), min((m - 1) // 2, (n - 1) // 2, (s - 1) // 2) + 1)
            for m, n, s in zip(self.modes, x.shape[2:], shape, strict=True)
        ]
        columns = kept[-1][0] + 1  # 0 .. low on the last axis

        spectrum = torch.fft.rfft(x, dim=-1, norm="forward").narrow(-1, 0, columns)
        for axis, (low, high) in zip(axes[:-1], kept[:-1], strict=True):
            spectrum = torch.fft.fft(spectrum, dim=axis, norm="forward")
            n = spectrum.shape[axis]
            spectrum = torch.cat([spectrum.narrow(axis, n - low, low), spectrum.narrow(axis, 0, high)], dim=axis)

        weight: Tensor = self.weight
        for axis, m, (low, high) in zip(axes[:-1], self.modes[:-1], kept[:-1], strict=True):
            weight = weight.narrow(axis, m // 2 - low, low + high)
        weight = weight.narrow(len(axes) + 1, 0, columns).to(x.dtype)
        modes = _AXES[: len(axes)]
        spectrum = scaled(spectrum, self, "weight")
        spectrum = torch.einsum(f"bi{modes},io{modes}->bo{modes}", spectrum, torch.view_as_complex(weight.contiguous()))

        for axis, size, (low, high) in zip(axes[:-1], shape[:-1], kept[:-1], strict=True):
            gap = list(spectrum.shape)
            gap[axis] = size - low - high
            parts = [spectrum.narrow(axis, low, high), spectrum.new_zeros(gap), spectrum.narrow(axis, 0, low)]
            spectrum = torch.fft.ifft(torch.cat(parts, dim=axis), dim=axis, norm="forward")

        keep = torch.ones(columns, 2, dtype=x.dtype, device=x.device)
        keep[0, 1] = 0.0
        if 2 * (columns - 1) == shape[-1]:  # Nyquist of an even grid
            keep[-1, 1] = 0.0
        spectrum = torch.view_as_complex(torch.view_as_real(spectrum) * keep)
        return torch.fft.irfft(spectrum, n=shape[-1], dim=-1, norm="forward")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, modes={self.modes}, bias={self.bias is not None}"


def _no_autocast(device: str) -> torch.autocast | nullcontext[None]:
    """Autocast off for `device`; devices without autocast (meta) need nothing."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
