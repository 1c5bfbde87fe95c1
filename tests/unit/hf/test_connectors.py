"""The simpler connectors, each by hand in float64; every kind's shapes, size and initialisation."""

import math

import pytest
import torch

from megatron_mm.config import ConnectorConfig
from megatron_mm.errors import UserError
from megatron_mm.model.connector import CONNECTORS, Connector, build_connector


def build(kind: str, vision: int, grid: int, output: int, tokens: int, hidden: int = 16):
    config = ConnectorConfig(kind=kind, num_tokens=tokens, hidden_size=hidden, depth=1)  # type: ignore[arg-type]
    torch.manual_seed(0)
    module = build_connector(config, vision, grid, output, init_std=0.3).double()
    for parameter in module.parameters():  # biases and norms that differ, so that a missing one shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


@torch.no_grad()
def test_average_pool_by_hand():
    module, x = build("average_pool", 6, 7, 5, 9), torch.randn(2, 49, 6, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            rows = range(math.floor(7 * i / 3), math.ceil(7 * (i + 1) / 3))
            columns = range(math.floor(7 * j / 3), math.ceil(7 * (j + 1) / 3))
            mean = torch.stack([x[:, 7 * r + c] for r in rows for c in columns]).mean(0)
            torch.testing.assert_close(module(x)[:, 3 * i + j], mean @ module.proj.weight.T + module.proj.bias)


@torch.no_grad()
def test_attention_pool_by_hand():
    module, x = build("attention_pool", 6, 3, 5, 4, hidden=128), torch.randn(2, 9, 6, dtype=torch.float64)
    both = (norm(x, module.norm) + module.position_embedding) @ module.kv.weight.T + module.kv.bias
    pooled = torch.empty(2, 4, 128, dtype=torch.float64)
    for head in (slice(0, 64), slice(64, 128)):
        scores = module.queries[:, :, head] @ both[:, :, :128][:, :, head].transpose(1, 2) / 8
        pooled[:, :, head] = scores.softmax(-1) @ both[:, :, 128:][:, :, head]
    wanted = (pooled @ module.out.weight.T + module.out.bias) @ module.proj.weight.T + module.proj.bias
    torch.testing.assert_close(module(x), wanted)


@torch.no_grad()
def test_pixel_shuffle_by_hand():
    module, x = build("pixel_shuffle_mlp", 6, 6, 5, 9), torch.randn(2, 36, 6, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            square = [x[:, 6 * (2 * i + a) + 2 * j + b] for a in (0, 1) for b in (0, 1)]
            y = norm(torch.cat(square, -1), module.norm) @ module.fc1.weight.T + module.fc1.bias
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
            torch.testing.assert_close(module(x)[:, 3 * i + j], y @ module.fc2.weight.T + module.fc2.bias)


# Counted by hand for ViT-H at 378 px (1280 wide, 27 × 27) into the 3B decoder (3072), 1024 wide inside.
SIZES = {
    "average_pool": (144, 1280 * 3072 + 3072),
    "attention_pool": (
        144,
        2 * 1280 + 729 * 1280 + 144 * 1024 + 1280 * 2048 + 2048 + 1024 * 1024 + 1024 + 1024 * 3072 + 3072,
    ),
    "pixel_shuffle_mlp": (81, 2 * 9 * 1280 + 9 * 1280 * 3072 + 3072 + 3072 * 3072 + 3072),
    "c_abstractor": (144, 31_056_704),
}


@pytest.mark.parametrize("kind", CONNECTORS)
def test_size_and_shape_at_mm1s(kind):
    tokens, size = SIZES[kind]
    with torch.device("meta"):
        module = build_connector(ConnectorConfig(kind=kind, num_tokens=tokens), 1280, 27, 3072)
        assert module(torch.empty(2, 729, 1280)).shape == (2, tokens, 3072)
    assert sum(p.numel() for p in module.parameters()) == size


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_parameter_learns_and_is_drawn_again_alike(kind):
    module = build_connector(ConnectorConfig(kind=kind, num_tokens=9, hidden_size=32, depth=2), 12, 6, 8)
    torch.manual_seed(1)
    module.reset_parameters()
    first = {name: p.detach().clone() for name, p in module.named_parameters()}
    module(torch.randn(3, 36, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    torch.manual_seed(1)
    module.reset_parameters()
    assert all(torch.equal(first[name], p) for name, p in module.named_parameters())


def test_pixel_shuffle_needs_whole_squares():
    with pytest.raises(UserError, match=r"(?s)144 tokens from a grid of 27.*allowed: 1, 9, 81, 729"):
        build_connector(ConnectorConfig(kind="pixel_shuffle_mlp"), 12, 27, 8)


def test_a_kind_must_draw_its_weights():
    class Unfinished(Connector):
        pass

    with pytest.raises(TypeError, match="abstract method"):
        Unfinished(ConnectorConfig(num_tokens=4), 8, 4, 16)
