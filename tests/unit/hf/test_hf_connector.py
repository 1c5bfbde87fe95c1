"""C-Abstractor: shapes, parameters counted by hand, true adaptive pooling, initialisation."""

import math

import pytest
import torch
from torch import nn

from megatron_mm.config import ConnectorConfig
from megatron_mm.errors import UserError
from megatron_mm.hf.configuration import MegatronMMConfig
from megatron_mm.hf.modeling import MegatronMMModel
from megatron_mm.model.connector import CAbstractor


def block_parameters(inputs: int, width: int) -> int:
    reduced = round(inputs / 4)
    count = inputs * width + 2 * width  # 1×1 and its norm
    count += 9 * width + 2 * width  # depthwise 3×3 and its norm
    count += width * reduced + reduced + reduced * width + width  # squeeze and excite, with biases
    count += width * width + 2 * width  # 1×1 and its norm
    return count + (inputs * width + 2 * width if inputs != width else 0)  # shortcut


@pytest.mark.parametrize(
    ("vision", "grid", "tokens", "width", "depth", "output"),
    [(1280, 27, 144, 1024, 3, 3072), (24, 7, 9, 16, 2, 32), (16, 8, 16, 16, 1, 48)],
)
def test_parameters_by_hand(vision, grid, tokens, width, depth, output):
    with torch.device("meta"):
        module = CAbstractor(ConnectorConfig(num_tokens=tokens, hidden_size=width, depth=depth), vision, grid, output)
    first = block_parameters(vision, width) + (depth - 1) * block_parameters(width, width)
    wanted = grid**2 * vision + first + depth * block_parameters(width, width)
    wanted += width * output + output + output * output + output
    assert sum(p.numel() for p in module.parameters()) == wanted


def test_mm1_connector_size():
    """MM1's grid and token count with Honeybee's width, into the 3B decoder: 31.1 million."""
    with torch.device("meta"):
        module = CAbstractor(ConnectorConfig(), 1280, 27, 3072)
    assert sum(p.numel() for p in module.parameters()) == 31_056_704
    assert module(torch.empty(2, 729, 1280, device="meta")).shape == (2, 144, 3072)


def test_adaptive_pooling_27_to_12():
    """Cell i averages rows floor(27 i / 12) to ceil(27 (i + 1) / 12), exclusive; likewise columns."""
    module = CAbstractor(ConnectorConfig(num_tokens=144, hidden_size=8, depth=1), 8, 27, 8)
    x = torch.randn(2, 5, 27, 27, dtype=torch.float64)
    wanted = torch.empty(2, 5, 12, 12, dtype=torch.float64)
    for i in range(12):
        for j in range(12):
            rows = slice(math.floor(27 * i / 12), math.ceil(27 * (i + 1) / 12))
            columns = slice(math.floor(27 * j / 12), math.ceil(27 * (j + 1) / 12))
            wanted[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    torch.testing.assert_close(module.pool(x), wanted, atol=1e-14, rtol=1e-14)


def test_forward_by_hand():
    """The whole connector written with matrix products, on [n, grid, grid, c]."""
    torch.manual_seed(0)
    grid, c, width, out = 5, 12, 8, 6
    module = CAbstractor(ConnectorConfig(num_tokens=4, hidden_size=width, depth=2), c, grid, out, 0.5).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    w = dict(module.named_parameters())

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def pointwise(x, name):
        return x @ w[f"{name}.weight"].flatten(1).T

    def depthwise(x, name):
        padded = torch.zeros(len(x), x.shape[1] + 2, x.shape[2] + 2, x.shape[3], dtype=x.dtype)
        padded[:, 1:-1, 1:-1] = x
        return sum(
            padded[:, i : i + x.shape[1], j : j + x.shape[2]] * w[f"{name}.weight"][:, 0, i, j]
            for i in range(3)
            for j in range(3)
        )

    def block(x, name):
        y = nn.functional.silu(norm(pointwise(x, f"{name}.conv1"), f"{name}.norm1"))
        y = nn.functional.silu(norm(depthwise(y, f"{name}.conv2"), f"{name}.norm2"))
        gate = pointwise(y.mean((1, 2)), f"{name}.squeeze.fc1") + w[f"{name}.squeeze.fc1.bias"]
        gate = pointwise(nn.functional.silu(gate), f"{name}.squeeze.fc2") + w[f"{name}.squeeze.fc2.bias"]
        y = norm(pointwise(y * gate.sigmoid()[:, None, None], f"{name}.conv3"), f"{name}.norm3")
        if f"{name}.shortcut.0.weight" in w:
            x = norm(pointwise(x, f"{name}.shortcut.0"), f"{name}.shortcut.1")
        return nn.functional.silu(y + x)

    features = torch.randn(3, grid * grid, c, dtype=torch.float64)
    x = (features + w["position_embedding"]).view(3, grid, grid, c)
    x = block(block(x, "stage1.0"), "stage1.1")
    # 5 to 2: rows 0-2 and 2-4.
    x = torch.stack([torch.stack([x[:, a : a + 3, b : b + 3].mean((1, 2)) for b in (0, 2)], 1) for a in (0, 2)], 1)
    x = block(block(x, "stage2.0"), "stage2.1").flatten(1, 2)
    x = nn.functional.silu(x @ w["fc1.weight"].T + w["fc1.bias"]) @ w["fc2.weight"].T + w["fc2.bias"]
    torch.testing.assert_close(module(features), x, atol=1e-10, rtol=1e-10)


def test_no_images():
    """Nothing in, nothing out, and a gradient for every parameter: zero."""
    module = CAbstractor(ConnectorConfig(num_tokens=4, hidden_size=8, depth=1), 8, 4, 8)
    out = module(torch.randn(0, 16, 8))
    assert out.shape == (0, 4, 8)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_tokens_that_are_no_square():
    with pytest.raises(UserError, match=r"num_tokens: must be a square number") as caught:
        CAbstractor(ConnectorConfig(num_tokens=143), 8, 4, 8)
    assert "121 or 144" in str(caught.value)
    with pytest.raises(UserError, match="square"):
        MegatronMMModel(MegatronMMConfig(tokens_per_image=143))


def test_initial_scale():
    """Same seed, same weights; and the output varies from image to image and from token to token."""
    config = ConnectorConfig(num_tokens=16, hidden_size=64, depth=3)
    torch.manual_seed(1)
    first = CAbstractor(config, 48, 8, 32)
    torch.manual_seed(1)
    second = CAbstractor(config, 48, 8, 32)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert first.stage1[0].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    out = first(torch.randn(8, 64, 48))
    assert out.std(0).mean() > 0.1 * out.std()
    assert out.std(1).mean() > 0.1 * out.std()
