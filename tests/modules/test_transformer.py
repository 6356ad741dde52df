import math

import pytest
import torch
from torch.nn import functional as F

from modules.language.transformer import Block, Transformer, TransformerConfig
from modules.layers.attention import CausalAttention, rotary_tables, rotate


def build(**changes):
    torch.manual_seed(0)
    small = {"vocab_size": 50, "width": 32, "depth": 2, "heads": 4, "max_seq_len": 64}
    return Transformer(TransformerConfig(**small | changes))


def rms(x, gain, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def explicit_block(block, config, x):
    """One block in float64, position by position and head by head, with complex rotations."""
    p = {name: value.detach().double() for name, value in block.named_parameters()}
    x = x.double()
    heads, kv_heads = config.heads, config.kv_heads or config.heads
    e, length = config.width // heads, x.shape[1]
    angle = torch.arange(length, dtype=torch.float64)[:, None] * config.rope_base ** (-torch.arange(e // 2) * 2.0 / e)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotated(v):
        z = torch.complex(v[..., : e // 2], v[..., e // 2 :]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    h = rms(x, p["attention_norm.weight"], config.norm_eps)
    q, k, v = (h @ p[f"attention.{name}.weight"].T for name in ("query", "key", "value"))
    outputs = []
    for head in range(heads):
        shared = head * kv_heads // heads
        q_h, k_h, v_h = (
            q[..., head * e : (head + 1) * e],
            k[..., shared * e : (shared + 1) * e],
            v[..., shared * e : (shared + 1) * e],
        )
        if config.qk_norm:
            q_h = rms(q_h, p["attention.query_norm.weight"], config.norm_eps)
            k_h = rms(k_h, p["attention.key_norm.weight"], config.norm_eps)
        scores = rotated(q_h) @ rotated(k_h).transpose(1, 2) / math.sqrt(e)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ v_h)
    x = x + torch.cat(outputs, dim=-1) @ p["attention.out.weight"].T
    h = rms(x, p["mlp_norm.weight"], config.norm_eps)
    if config.mlp == "swiglu":
        gate = h @ p["mlp.gate.weight"].T
        return x + (gate * gate.sigmoid() * (h @ p["mlp.up.weight"].T)) @ p["mlp.down.weight"].T
    up = h @ p["mlp.up.weight"].T
    return x + (up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))) @ p["mlp.down.weight"].T


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_equals_the_equations(mlp, kv_heads, qk_norm):
    torch.manual_seed(0)
    config = TransformerConfig(width=32, heads=4, kv_heads=kv_heads, mlp=mlp, qk_norm=qk_norm, rope_base=100.0)
    block = Block(config)
    with torch.no_grad():
        for parameter in block.parameters():  # gains away from one, weights large enough to matter
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 11, 32)
    expected = explicit_block(block, config, x)
    assert (block(x).double() - expected).norm() / expected.norm() < 2e-6


def test_the_future_does_not_reach_the_past():
    network = build(kv_heads=2)
    tokens = torch.randint(50, (2, 20))
    changed = tokens.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 50
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :13], after[:, :13], rtol=0, atol=1e-6)
    assert (before[:, 13:] - after[:, 13:]).abs().amax(-1).min() > 1e-3


def test_a_prefix_gives_the_same_logits():
    network = build()
    tokens = torch.randint(50, (2, 20))
    torch.testing.assert_close(network(tokens)[:, :9], network(tokens[:, :9]), rtol=1e-5, atol=1e-6)


def test_rotations_see_distances_only():
    torch.manual_seed(0)
    e, length = 16, 200
    cos, sin = rotary_tables(length, e, 10000.0, torch.device("cpu"))
    assert cos.dtype == torch.float32 and cos.shape == (length, e // 2)
    q, k = torch.randn(e), torch.randn(e)
    dots = rotate(q.expand(length, e), cos, sin) @ rotate(k.expand(length, e), cos, sin).T
    for distance in (0, 1, 17):
        diagonal = dots.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=2e-4)
    assert (dots[0, 0] - dots[5, 0]).abs() > 0.1
    torch.testing.assert_close(rotate(q.expand(length, e), cos, sin).norm(dim=-1), q.norm().expand(length))


def test_rotation_is_in_float32_under_autocast():
    cos, sin = rotary_tables(300, 8, 10000.0, torch.device("cpu"))
    x = torch.randn(300, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tables = rotary_tables(300, 8, 10000.0, torch.device("cpu"))
        wide, half = rotate(x, *tables), rotate(x.bfloat16(), *tables)
    assert torch.equal(tables[0], cos) and torch.equal(tables[1], sin)
    assert torch.equal(wide, rotate(x, cos, sin))
    assert torch.equal(half, rotate(x.bfloat16().float(), cos, sin).bfloat16())


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_heads(kv_heads):
    torch.manual_seed(0)
    grouped, full = CausalAttention(32, 4, kv_heads), CausalAttention(32, 4, 4)
    weights = grouped.state_dict()
    for name in ("key.weight", "value.weight"):
        weights[name] = weights[name].unflatten(0, (kv_heads, 8)).repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-5, atol=1e-6)


def test_qk_norm_makes_attention_blind_to_the_scale_of_the_queries():
    torch.manual_seed(0)
    attention = CausalAttention(32, 4, 4, qk_norm=True)
    x = torch.randn(2, 9, 32)
    before = attention(x)
    with torch.no_grad():
        attention.query.weight.mul_(100)
    torch.testing.assert_close(attention(x), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count(mlp, kv_heads, tied):
    config = TransformerConfig(
        vocab_size=300, width=48, depth=3, heads=6, kv_heads=kv_heads, mlp=mlp, qk_norm=True, tie_embeddings=tied
    )
    d, v, e = 48, 300, 8
    hidden = {"swiglu": 128, "gelu": 192}[mlp]
    assert config.mlp_hidden == hidden
    attention = 2 * d * d + 2 * d * e * (kv_heads or 6) + 2 * e
    block = attention + {"swiglu": 3, "gelu": 2}[mlp] * d * hidden + 2 * d
    assert sum(p.numel() for p in Transformer(config).parameters()) == (1 if tied else 2) * v * d + 3 * block + d


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_is_that_of_a_uniform_guess(tied):
    network = build(vocab_size=256, width=64, depth=6, tie_embeddings=tied)
    tokens = torch.randint(256, (8, 65))
    loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(256)) < 0.1


def test_the_residual_stream_does_not_grow_with_depth():
    sizes = []
    for depth in (2, 32):
        network = build(depth=depth)
        seen = []
        network.norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].std().item()))
        network(torch.randint(50, (4, 32)))
        sizes.append(seen[0])
    assert 0.5 < sizes[1] / sizes[0] < 2
    ends = build(depth=8).layers[0]
    for matrix, fan_in in ((ends.attention.out.weight, 32), (ends.mlp.down.weight, ends.mlp.down.in_features)):
        assert abs(matrix.std().item() * math.sqrt(fan_in) * math.sqrt(16) - 1) < 0.1


def test_every_parameter_gets_a_gradient_and_logits_are_float32():
    network = build(qk_norm=True, bias=True, kv_heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(torch.randint(50, (2, 64)))
    assert logits.dtype == torch.float32 and logits.shape == (2, 64, 50)
    build_plain = build()
    assert not any("bias" in name for name, _ in build_plain.named_parameters())
    logits.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth=0: must be at least 1"),
        ({"heads": 3}, "heads=3: does not divide width=256"),
        ({"width": 12, "heads": 4}, "heads=4: gives heads of 3 features"),
        ({"kv_heads": 3}, "kv_heads=3: must divide heads=4"),
        ({"mlp": "relu"}, "mlp=relu: choose one of swiglu, gelu"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0: must be positive"),
        ({"rope_base": -1.0}, "rope_base=-1.0: must be positive"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**changes)


def test_bad_input():
    with pytest.raises(ValueError, match=r"tokens of shape \(1, 65\).*max_seq_len=64"):
        build()(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.parametrize(("tied", "expected"), [(False, 1.0), (True, 0.02)])
def test_initial_scale_of_the_token_table(tied, expected):
    network = build(vocab_size=512, width=64, tie_embeddings=tied)
    assert network.embedding.weight.std().item() == pytest.approx(expected, rel=0.03)
    if not tied:
        assert network.readout.weight.std().item() == pytest.approx(0.02, rel=0.03)
