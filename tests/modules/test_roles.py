import pytest
import torch
from torch import nn

from modules.language.transformer import Transformer, TransformerConfig
from modules.layers.linear import Linear
from modules.operators.fno import FNO, FNOConfig
from modules.roles import declare, roles


def test_roles_of_an_fno():
    network = FNO(FNOConfig(width=8, modes=[4], depth=1, norm="group"))
    assert roles(network) == {
        "lifting.up.weight": "embedding",
        "lifting.up.bias": "vector",
        "lifting.down.weight": "hidden",
        "lifting.down.bias": "vector",
        "layers.0.spectral.weight": "spectral",
        "layers.0.spectral.bias": "vector",
        "layers.0.skip.weight": "hidden",
        "layers.0.spectral_norm.weight": "vector",
        "layers.0.spectral_norm.bias": "vector",
        "layers.0.mlp.up.weight": "hidden",
        "layers.0.mlp.up.bias": "vector",
        "layers.0.mlp.down.weight": "hidden",
        "layers.0.mlp.down.bias": "vector",
        "layers.0.mlp_skip.weight": "vector",
        "layers.0.mlp_norm.weight": "vector",
        "layers.0.mlp_norm.bias": "vector",
        "projection.up.weight": "hidden",
        "projection.up.bias": "vector",
        "projection.down.weight": "readout",
        "projection.down.bias": "vector",
    }


def test_roles_of_a_transformer():
    config = TransformerConfig(width=16, depth=1, heads=2, qk_norm=True)
    found = roles(Transformer(config))
    assert found["embedding.weight"] == "embedding"
    assert found["readout.weight"] == "readout"
    assert found["norm.weight"] == found["layers.0.attention.query_norm.weight"] == "vector"
    matrices = {path for path, role in found.items() if role == "hidden"}
    assert matrices == {f"layers.0.attention.{name}.weight" for name in ("query", "key", "value", "out")} | {
        f"layers.0.mlp.{name}.weight" for name in ("gate", "up", "down")
    }


def test_a_shared_parameter_is_reported_once():
    first, second = Linear(4, 4), Linear(4, 4, role="readout")
    second.weight = first.weight
    assert roles(nn.Sequential(first, second)) == {"0.weight": "hidden"}


def test_roles_outlive_the_parameter_objects():
    layer = Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4))
    assert roles(nn.Sequential(layer)) == {"0.weight": "hidden"}


def test_a_parameter_without_a_role_is_named():
    with pytest.raises(ValueError, match=r"^1\.weight: parameter of LayerNorm has no role"):
        roles(nn.Sequential(Linear(4, 4), nn.LayerNorm(4)))


def test_wrong_declarations_are_refused():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"Linear.gain: a role was declared, but no such parameter"):
        declare(layer, gain="vector")
    with pytest.raises(ValueError, match=r"Linear.weight: role=matrix: choose one of embedding"):
        declare(layer, weight="matrix")
