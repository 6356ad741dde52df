"""What is done to each repeated block of a network before it is sharded: activation checkpointing, compilation.

Both replace the block's `forward` and nothing else: names of parameters, hooks and the module tree stay as they are, so
checkpoints and diagnostics do not see them.
"""

from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

BACKEND = "inductor"

aten = torch.ops.aten

# Kept by `selective`: what costs most to compute per byte. Fourier transforms on the way to the kept modes are computed
# again, since autograd needs none of their results; the last one of a block's spectral convolution is kept.
_KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._fft_c2r.default,
    torch.ops._c10d_functional.all_reduce.default,  # of tensor parallelism: nothing is sent twice
    torch.ops._c10d_functional.all_gather_into_tensor.default,
}


def apply(network: nn.Module, *, compiled: bool, activation_checkpointing: str) -> None:
    """Treats each of `network.blocks()` in place.

    `activation_checkpointing`: `block` keeps only a block's input and runs its forward again in the backward pass
    (arXiv:1604.06174: about a third more arithmetic); `selective` keeps the results of matrix products, convolutions,
    attention and collectives too and computes only what lies between them again. Random numbers are drawn alike.
    `compiled`: by `torch.compile`, one graph per block, the same for blocks of equal shapes.
    """
    recompute = activation_checkpointing != "none"
    treat = _recomputed(_SELECTIVE if activation_checkpointing == "selective" else None)
    for block in network.blocks():  # type: ignore[operator]
        # Methods of one function for all blocks: the compiler keys its graphs by function, so one graph serves them all.
        forward = MethodType(treat(type(block).forward), block) if recompute else block.forward
        if compiled:
            forward = torch.compile(forward, backend=BACKEND)
        if compiled or recompute:
            block.forward = forward


def _recomputed(context: Callable[..., Any] | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    how: dict[str, Any] = {} if context is None else {"context_fn": context}

    @cache
    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, block, *args, use_reentrant=False, **how, **kwargs)

        return run

    return wrapped


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_SELECTIVE = partial(create_selective_checkpoint_contexts, _policy)
