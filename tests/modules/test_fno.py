import pytest
import torch
from torch.nn import functional as F

from modules.operators.fno import FNO, FNOBlock, FNOConfig, coordinates
from tests.modules.test_spectral_conv import band_limited, reference


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def build(**changes):
    torch.manual_seed(0)
    return FNO(FNOConfig(**{"in_channels": 3, "out_channels": 2, "width": 12, "modes": [12, 12], "depth": 2} | changes))


def pointwise(linear, x):
    y = torch.einsum("oi,bi...->bo...", linear.weight.detach().double(), x)
    return y if linear.bias is None else y + linear.bias.detach().double().view(-1, *[1] * (x.ndim - 2))


def mlp(module, x):
    return pointwise(module.down, F.gelu(pointwise(module.up, x)))


@pytest.mark.parametrize("shape", [(16, 14), (15, 13)])
def test_the_whole_network_equals_the_equations(shape):
    network = build(modes=[6, 5], depth=3)
    x = torch.randn(2, 3, *shape)
    i, j = torch.meshgrid(torch.arange(shape[0]) / shape[0], torch.arange(shape[1]) / shape[1], indexing="ij")
    v = mlp(network.lifting, torch.cat([x, torch.stack([i, j]).expand(2, -1, -1, -1)], dim=1).double())
    for number, block in enumerate(network.layers):
        z = reference(block.spectral, v) + pointwise(block.skip, v)
        z = F.gelu(z) if number < 2 else z
        z = mlp(block.mlp, z) + block.mlp_skip.weight.detach().double().view(-1, 1, 1) * v
        v = F.gelu(z) if number < 2 else z
    assert relative(network(x).double(), mlp(network.projection, v)) < 1e-5


@pytest.mark.parametrize("points", [64, 63])
def test_resolution_invariance(points):
    for grid, bound in ((False, 1e-3), (True, 1e-2)):  # what is left is the aliasing of the non-linearity
        network = build(grid=grid)
        coarse = network(band_limited(points, 2))
        fine = network(band_limited(2 * points, 2))[..., ::2, ::2]
        assert relative(fine, coarse) < bound


def test_shift_equivariance_without_coordinates_only():
    x = torch.randn(1, 3, 20, 21)
    for grid, equivariant in ((False, True), (True, False)):
        network = build(grid=grid, norm="instance")
        moved = network(x.roll((7, 4), dims=(2, 3)))
        error = relative(moved, network(x).roll((7, 4), dims=(2, 3)))
        assert (error < 1e-5) is equivariant


def test_a_block_without_spectral_weights_is_pointwise():
    block = FNOBlock(FNOConfig(width=6, modes=[4, 4]), last=False)
    with torch.no_grad():
        block.spectral.weight.zero_()
    v = torch.randn(2, 6, 9, 10)
    order = torch.randperm(90)
    shuffled = v.flatten(2)[..., order].view_as(v)
    torch.testing.assert_close(block(shuffled), block(v).flatten(2)[..., order].view_as(v), rtol=1e-6, atol=1e-6)


def test_samples_of_a_batch_do_not_mix():
    network = build(norm="group")
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(network(x)[[2, 0, 1]], network(x[[2, 0, 1]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modes": [8]},
        {"modes": [4, 4, 4]},
        {"norm": "group", "padding": [0.25, 0.1]},
        {"norm": "instance", "stabilizer": "tanh"},
        {"channel_mlp_ratio": 0.0, "grid": False},
        {"skip": "soft-gating", "channel_mlp_skip": "linear"},
        {"skip": "identity", "channel_mlp_skip": "none"},
        {"skip": "none", "channel_mlp_skip": "identity"},
    ],
)
def test_every_parameter_gets_a_gradient(changes):
    network = build(**changes)
    axes = network.dimensions
    out = network(torch.randn(2, 3, *(13, 14, 12)[:axes]))
    assert out.shape == (2, 2, *(13, 14, 12)[:axes])
    out.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_parameter_count_of_the_reference_size():
    """16x16 modes, 32 channels, 4 layers: as many real numbers as the reference implementation has."""
    network = FNO(FNOConfig(width=32, modes=[16, 16], depth=4))
    assert sum(p.numel() for p in network.parameters()) == 1_192_801


def test_padding_frees_the_ends_of_an_axis():
    """With zeros between the ends, one end of a non-periodic field does not see the other through a short kernel."""
    network = build(modes=[12, 12], padding=[0.25, 0.0])
    assert network(torch.randn(1, 3, 20, 16)).shape == (1, 2, 20, 16)
    seen = []
    network.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(torch.randn(1, 3, 21, 16))
    assert seen[0].shape == (1, 12, 21 + 2 * 5, 16)
    assert seen[0][:, :, :5].abs().sum() == seen[0][:, :, -5:].abs().sum() == 0
    assert seen[0][:, :, 5].abs().sum() > 0


def test_stabilizer_bounds_what_enters_the_convolution():
    block = build(stabilizer="tanh").layers[0]
    v = 100 * torch.randn(1, 12, 16, 16)
    plain = block.skip(v)
    seen = []
    block.spectral.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(v)
    assert seen[0].abs().max() <= 1
    assert plain.abs().max() > 1


def test_coordinates_exclude_the_end():
    grid = coordinates((4, 5), torch.device("cpu"))
    assert grid.shape == (1, 2, 4, 5)
    assert grid[0, 0, :, 0].tolist() == [0.0, 0.25, 0.5, 0.75]
    torch.testing.assert_close(grid[0, 1, 0], torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width=0: must be at least 1"),
        ({"modes": []}, r"modes=\[\]: one number per spatial axis"),
        ({"modes": [4, 0]}, r"modes=\[4, 0\]: each axis"),
        ({"lifting_ratio": 0.0}, "lifting_ratio=0.0: leaves no hidden channel"),
        ({"channel_mlp_ratio": 0.001}, "channel_mlp_ratio=0.001: leaves no hidden channel"),
        ({"skip": "conv"}, "skip=conv: choose one of linear"),
        ({"norm": "batch"}, "norm=batch: choose one of none, group, instance"),
        ({"stabilizer": "relu"}, "stabilizer=relu"),
        ({"padding": [0.1]}, r"padding=\[0.1\]: give one fraction"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        FNOConfig(**changes)


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"input of shape \(1, 2, 16, 16\): this FNO takes \(batch, 3\) and 2 spatial axes"
    ):
        build()(torch.zeros(1, 2, 16, 16))
