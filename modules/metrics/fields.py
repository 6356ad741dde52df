"""Errors of predicted fields, one number per sample.

Shapes: B batch, C channels, S spatial axes. Both arguments are in the same (physical) units.
"""

from __future__ import annotations

import torch
from torch import Tensor

_VRMSE_EPS = 1e-7


def relative_l2(prediction: Tensor, target: Tensor) -> Tensor:
    """`‖p - y‖₂ / ‖y‖₂` over all axes but the first, as `(B,)` in float32 or wider (arXiv:2010.08895).

    A target of zero norm gives inf, or nan if the prediction is zero as well.
    """
    _check(prediction, target)
    wide = torch.promote_types(target.dtype, torch.float32)
    y = target.to(wide).flatten(1)
    error = prediction.to(wide).flatten(1) - y
    return torch.linalg.vector_norm(error, dim=1) / torch.linalg.vector_norm(y, dim=1)


def vrmse(prediction: Tensor, target: Tensor) -> Tensor:
    """`sqrt(mean_x(e²) / (var_x(y) + 1e-7))` of `(B, C, *S)`, mean over channels, as `(B,)` (The Well, arXiv:2412.00568).

    The variance over space is the unbiased one, so predicting the spatial mean gives sqrt((n - 1) / n) on n points.
    """
    _check(prediction, target)
    wide = torch.promote_types(target.dtype, torch.float32)
    y = target.to(wide).flatten(2)
    error = prediction.to(wide).flatten(2) - y
    return (error.square().mean(-1) / (y.var(-1, correction=1) + _VRMSE_EPS)).sqrt().mean(1)


def _check(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction of shape {tuple(prediction.shape)}: the target has {tuple(target.shape)}")
