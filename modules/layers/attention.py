"""Causal self-attention with rotary positions.

Shapes: B batch, L sequence, D width, H heads, K key/value heads, E features of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.layers.linear import Linear
from modules.layers.norms import RMSNorm
from modules.scales import declare_factors, factor


def rotary_tables(length: int, features: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of `position * base**(-2i/E)` as float32 `(L, E/2)` each.

    Computed where they are used instead of kept: a buffer would need care on the meta device, and an argument of a
    sharded block would be cast to the compute dtype, in which large positions are no longer told apart.
    """
    frequency = base ** (-torch.arange(0, features, 2, device=device, dtype=torch.float32) / features)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the feature pairs (i, i + E/2) of `(.., L, E)` by their angles (RoPE, arXiv:2104.09864).

    Computed in float32 or wider, returned in the dtype of x. The dot product of two rotated vectors depends on their
    positions only through the difference.
    """
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class CausalAttention(nn.Module):
    """`(B, L, D) -> (B, L, D)`: softmax(q kᵀ / sqrt(E)) v over the past, with K key/value heads shared by H query heads.

    K = H is multi-head, K = 1 multi-query, between them grouped-query attention (arXiv:2305.13245). `qk_norm` puts an
    RMS norm over the features of each head, with one gain shared by the heads, on q and k before the rotation
    (arXiv:2302.05442). `branch_scale` multiplies the initial standard deviation of the output projection. Factor:
    `attention`, at first 1/sqrt(E).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        *,
        rope_base: float = 10000.0,
        qk_norm: bool = False,
        bias: bool = False,
        norm_eps: float = 1e-5,
        branch_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.grouped = kv_heads != heads
        self.rope_base = rope_base
        std = 1.0 / math.sqrt(width)
        self.query = Linear(width, heads * self.head_dim, bias=bias, std=std)
        self.key = Linear(width, kv_heads * self.head_dim, bias=bias, std=std)
        self.value = Linear(width, kv_heads * self.head_dim, bias=bias, std=std)
        self.out = Linear(heads * self.head_dim, width, bias=bias, std=branch_scale * std)
        declare_factors(self, attention=1.0 / math.sqrt(self.head_dim))
        self.query_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()

    def forward(self, x_BLD: Tensor) -> Tensor:
        heads = (-1, self.head_dim)
        q_BLHE = self.query_norm(self.query(x_BLD).unflatten(-1, heads))
        k_BLKE = self.key_norm(self.key(x_BLD).unflatten(-1, heads))
        v_BKLE = self.value(x_BLD).unflatten(-1, heads).transpose(1, 2)
        cos, sin = rotary_tables(x_BLD.shape[1], self.head_dim, self.rope_base, x_BLD.device)
        q_BHLE = rotate(q_BLHE.transpose(1, 2), cos, sin)
        k_BKLE = rotate(k_BLKE.transpose(1, 2), cos, sin)
        scale = factor(self, "attention")
        y_BHLE = F.scaled_dot_product_attention(
            q_BHLE, k_BKLE, v_BKLE, is_causal=True, enable_gqa=self.grouped, scale=scale
        )
        return self.out(y_BHLE.transpose(1, 2).flatten(2))
