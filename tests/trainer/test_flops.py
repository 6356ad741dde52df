"""Counted FLOPs against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from modules.language.transformer import Transformer, TransformerConfig
from modules.operators.fno import FNO, FNOConfig
from modules.tasks.field_rollout import FieldRollout, FieldRolloutConfig
from modules.tasks.next_token import NextToken, NextTokenConfig
from trainer.flops import count_flops, count_operations, device_peak, fft_flops, meta_copy


def _meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def test_linear_forward_and_backward() -> None:
    layer = nn.Linear(3, 5, device="meta")
    x = _meta(7, 3, grad=True)
    assert count_operations(lambda: layer(x)) == 2 * 7 * 3 * 5
    assert count_operations(lambda: layer(x).sum().backward()) == 6 * 7 * 3 * 5


@pytest.mark.parametrize("shape", [(64,), (32, 48), (8, 16, 12)])
def test_ffts(shape: tuple[int, ...]) -> None:
    n, batch, axes = math.prod(shape), 6, tuple(range(2, 2 + len(shape)))
    complex_flops = round(5 * batch * n * math.log2(n))
    z, x = _meta(2, 3, *shape, dtype=torch.complex64), _meta(2, 3, *shape)
    assert count_operations(lambda: torch.fft.fftn(z, dim=axes)) == complex_flops
    assert count_operations(lambda: torch.fft.rfftn(x, dim=axes)) == round(complex_flops / 2)
    half = torch.fft.rfftn(x, dim=axes)
    assert count_operations(lambda: torch.fft.irfftn(half, s=shape, dim=axes)) == round(complex_flops / 2)
    assert fft_flops((5, 1), (1,), real=True) == 0


def test_complex_products_count_four_real_ones() -> None:
    a, b = _meta(4, 2, 3, dtype=torch.complex64), _meta(4, 3, 5, dtype=torch.complex64)
    assert count_operations(lambda: a @ b) == 4 * (2 * 4 * 2 * 3 * 5)


@pytest.mark.parametrize("heads", [2, 4])
def test_transformer_is_6n_plus_attention(heads: int) -> None:
    depth, width, length, vocabulary = 3, 32, 24, 50
    network = Transformer(
        TransformerConfig(
            vocab_size=vocabulary, width=width, depth=depth, heads=heads, max_seq_len=length, tie_embeddings=False
        )
    )
    task = NextToken(network, NextTokenConfig(seq_len=length, vocab_size=vocabulary))
    # matrices that multiply: all but the token table, which is a look-up, and the vectors
    matrices = sum(p.numel() for p in network.parameters() if p.ndim == 2) - vocabulary * width
    expected = length * (6 * matrices + 12 * depth * width * length)
    assert count_flops(task, 2) == expected
    assert count_flops(task, 5) == expected


def test_fno_block_against_its_parts() -> None:
    width, points, modes, batch = 8, 32, 8, 2
    network = FNO(FNOConfig(in_channels=1, out_channels=1, width=width, depth=1, modes=[modes], channel_mlp_ratio=0.0))
    task = FieldRollout(network, FieldRolloutConfig(space=[points]))
    block = network.blocks()[0]
    x = torch.empty(batch, width, points, device="meta", requires_grad=True)
    clone = meta_copy(task).network.blocks()[0]
    forward = count_operations(lambda: clone(x))
    columns = modes // 2 + 1
    ffts = 2 * fft_flops((batch, width, points), (2,), real=True)
    products = 8 * batch * width * width * columns
    skip = 2 * batch * width * width * points
    assert forward == ffts + products + skip
    assert count_flops(task, batch) * batch > 3 * (products + skip) + ffts
    assert next(block.parameters()).device.type == "cpu"


def test_meta_copy_shares_callables_and_holds_no_data() -> None:
    network = FNO(FNOConfig(in_channels=1, out_channels=1, width=4, depth=1, modes=[4]))
    task = FieldRollout(network, FieldRolloutConfig(space=[16]))
    task.prepare = lambda module: module
    clone = meta_copy(task)
    assert clone.prepare is task.prepare
    assert {tensor.device.type for tensor in [*clone.parameters(), *clone.buffers()]} == {"meta"}
    assert [p.shape for p in clone.parameters()] == [p.shape for p in task.parameters()]
    assert {tensor.device.type for tensor in [*task.parameters(), *task.buffers()]} == {"cpu"}


def test_device_peaks() -> None:
    assert device_peak("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989.4e12
    assert device_peak("NVIDIA H100 PCIe", "bf16-true") == 756e12
    assert device_peak("NVIDIA A100-SXM4-80GB", "16-mixed") == 312e12
    assert device_peak("NVIDIA L40S", "bf16-mixed") == 362e12
    assert device_peak("NVIDIA A100-SXM4-80GB", "32-true") in (19.5e12, 156e12)
    assert device_peak("NVIDIA A1000", "bf16-mixed") is None
    assert device_peak("NVIDIA H200", "64-true") is None
    assert device_peak("cpu", "32-true") is None
