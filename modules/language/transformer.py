"""Decoder-only transformer: pre-norm blocks, rotary positions, RMS norm, SwiGLU or GELU.

Shapes: B batch, L sequence, D width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modules.layers.attention import CausalAttention
from modules.layers.linear import Embedding, Linear
from modules.layers.mlp import MLP, SwiGLU
from modules.layers.norms import RMSNorm
from modules.scales import declare_factors, scaled
from modules.tensor_plan import Split, TensorPlan

MLPS = {"swiglu": SwiGLU, "gelu": MLP}
_HIDDEN_MULTIPLE = 8  # keeps matrix sizes friendly to tensor cores


@dataclass
class TransformerConfig:
    """Sizes of a decoder-only transformer.

    `kv_heads`: None for as many as `heads`. `mlp_ratio`: hidden over width, None for 8/3 (swiglu) or 4 (gelu), so that
    both kinds have the same number of parameters; the hidden size is rounded up to a multiple of 8. `max_seq_len`: longer
    inputs are refused. `init_std`: initial standard deviation of the readout, and of a token table tied to it.
    """

    vocab_size: int = 256
    width: int = 256
    depth: int = 4
    heads: int = 4
    kv_heads: int | None = None
    mlp: str = "swiglu"
    mlp_ratio: float | None = None
    max_seq_len: int = 1024
    rope_base: float = 10000.0
    qk_norm: bool = False
    tie_embeddings: bool = False
    bias: bool = False
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "depth", "heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads}: does not divide width={self.width}")
        if (self.width // self.heads) % 2:
            raise ValueError(
                f"heads={self.heads}: gives heads of {self.width // self.heads} features at width={self.width}, "
                "but rotary positions turn pairs; choose an even number of features"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads={self.kv_heads}: must divide heads={self.heads}")
        if self.mlp not in MLPS:
            raise ValueError(f"mlp={self.mlp}: choose one of {', '.join(MLPS)}")
        for name in ("mlp_ratio", "rope_base", "norm_eps", "init_std"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: must be positive")

    @property
    def mlp_hidden(self) -> int:
        """Hidden size of the MLP."""
        ratio = self.mlp_ratio if self.mlp_ratio is not None else (8 / 3 if self.mlp == "swiglu" else 4.0)
        return math.ceil(round(ratio * self.width, 6) / _HIDDEN_MULTIPLE) * _HIDDEN_MULTIPLE


class Transformer(nn.Module):
    """Tokens int64 `(B, L)` to logits float32 `(B, L, V)` of the next token, with L at most `max_seq_len`.

    Initial weights are normal: matrices with variance 1/fan_in, the readout (or a tied table) with `init_std`, a table of
    its own with variance one, the size of what the blocks add to it. The two projections that end the residual branches
    of a block are scaled by 1/sqrt(2 depth), so that the residual stream does not grow with depth.
    """

    config_class: ClassVar = TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_seq_len = config.max_seq_len
        table_std = config.init_std if config.tie_embeddings else 1.0
        self.embedding = Embedding(config.vocab_size, config.width, std=table_std, tied=config.tie_embeddings)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.readout: Linear | None = None
        if not config.tie_embeddings:
            self.readout = Linear(config.width, config.vocab_size, role="readout", std=config.init_std)

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in order: units of sharding, compilation, checkpointing and diagnostics."""
        return list(self.layers)

    def tensor_plan(self) -> TensorPlan:
        """Heads and MLP features are split, the norms are whole; one all-reduce ends each residual branch."""
        splits: dict[str, Split] = {
            "embedding": "gather",
            "layers.*.attention_norm": "replicate",
            "layers.*.attention": "share",
            "layers.*.attention.query": "column",
            "layers.*.attention.key": "column",
            "layers.*.attention.value": "column",
            "layers.*.attention.out": "row",
            "layers.*.mlp_norm": "replicate",
            "layers.*.mlp": "share",
            "layers.*.mlp.up": "column",
            "layers.*.mlp.down": "row",
            "norm": "replicate",
        }
        if self.config.mlp == "swiglu":
            splits["layers.*.mlp.gate"] = "column"
        if self.config.qk_norm:
            splits |= {"layers.*.attention.query_norm": "heads", "layers.*.attention.key_norm": "heads"}
        if self.readout is not None:
            splits["readout"] = "gather"
        config = self.config
        divisible = {
            "vocab_size": config.vocab_size,
            "heads": config.heads,
            "kv_heads": config.kv_heads or config.heads,
            "mlp_hidden": config.mlp_hidden,
        }
        return TensorPlan(splits, divisible)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Raises ValueError for a sequence longer than `max_seq_len`."""
        if tokens_BL.ndim != 2 or tokens_BL.shape[1] > self.max_seq_len:
            raise ValueError(
                f"tokens of shape {tuple(tokens_BL.shape)}: this transformer takes (batch, length) "
                f"with length at most max_seq_len={self.max_seq_len}"
            )
        x_BLD = self.embedding(tokens_BL)
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        x_BLD = self.norm(x_BLD)
        logits_BLV = self.embedding(x_BLD) if self.readout is None else self.readout(x_BLD)
        return logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`. Factor: `branch`, on both branches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        declare_factors(self, branch=1.0)
        branch_scale = 1.0 / math.sqrt(2 * config.depth)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = CausalAttention(
            config.width,
            config.heads,
            config.kv_heads if config.kv_heads is not None else config.heads,
            rope_base=config.rope_base,
            qk_norm=config.qk_norm,
            bias=config.bias,
            norm_eps=config.norm_eps,
            branch_scale=branch_scale,
        )
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLPS[config.mlp](config.width, config.mlp_hidden, bias=config.bias, branch_scale=branch_scale)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + scaled(self.attention(self.attention_norm(x_BLD)), self, "branch")
        return x_BLD + scaled(self.mlp(self.mlp_norm(x_BLD)), self, "branch")
