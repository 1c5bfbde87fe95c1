"""The model once more, in float64 and from Megatron's weights alone: an oracle that shares no code with the export.

Only the connector is the package's own; it has its own tests. Attention is written per query group, rows of the
joint projection being [query heads of the group, key, value], as Megatron-Core defines it.
"""

import math

import torch
from torch import Tensor

from megatron_mm.config import RunConfig
from megatron_mm.model.connector import build_connector

Weights = dict[str, Tensor]


def logits(run: RunConfig, tensors: Weights, tokens: Tensor, pixels: Tensor, image_id: int) -> Tensor:
    """tokens [s], normalised pixels [n, 3, H, W] → [s, vocab]. One unpacked sequence."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    d = run.model.decoder
    x = w["language_model.embedding.word_embeddings.weight"][tokens]
    if len(pixels):
        x[tokens == image_id] = image_embeddings(run, w, pixels.double()).flatten(0, 1)
    s = len(tokens)
    frequencies = d.rotary_base ** (-torch.arange(0, d.head_dim, 2, dtype=torch.float64) / d.head_dim)
    angles = torch.arange(s, dtype=torch.float64)[:, None] * frequencies
    causal = torch.full((s, s), -math.inf, dtype=torch.float64).triu(1)
    for i in range(d.num_layers):
        layer = f"language_model.decoder.layers.{i}"
        y = rms_norm(x, w[f"{layer}.input_layernorm.weight"], d.layernorm_epsilon)
        x = x + decoder_attention(run, w, layer, y, angles, causal)
        y = rms_norm(x, w[f"{layer}.pre_mlp_layernorm.weight"], d.layernorm_epsilon)
        x = x + (experts if f"{layer}.mlp.router.weight" in w else swiglu)(run, w, f"{layer}.mlp", y)
    x = rms_norm(x, w["language_model.decoder.final_layernorm.weight"], d.layernorm_epsilon)
    return x @ w["language_model.output_layer.weight"].T


def image_embeddings(run: RunConfig, w: Weights, pixels: Tensor) -> Tensor:
    v = run.model.vision
    connector = build_connector(run.model.connector, v.hidden_size, v.grid, run.model.decoder.hidden_size).double()
    connector.load_state_dict({n.removeprefix("connector."): t for n, t in w.items() if n.startswith("connector.")})
    with torch.no_grad():
        return connector(vision_features(run, w, pixels))


def vision_features(run: RunConfig, w: Weights, pixels: Tensor) -> Tensor:
    """[n, grid², hidden] without the class token."""
    v = run.model.vision
    n, p, g = len(pixels), v.patch_size, v.grid
    patches = pixels.view(n, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(n, g * g, 3 * p * p)
    x = patches @ w["vision.conv1.weight"].flatten(1).T
    if v.family != "clip":
        x = x + w["vision.conv1.bias"]
    if v.family != "siglip":
        x = torch.cat([w["vision.class_token"].expand(n, 1, -1), x], 1)
    x = x + w["vision.position_embeddings.weight"]

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, w[f"vision.{name}.weight"], w[f"vision.{name}.bias"], v.layernorm_epsilon)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"vision.{name}.weight"].T + w[f"vision.{name}.bias"]

    if v.family == "clip":
        x = norm("ln_pre", x)
    width = v.hidden_size // v.num_attention_heads
    for i in range(v.num_layers + 1 + v.feature_layer):
        layer = f"decoder.layers.{i}"
        joint = linear(f"{layer}.self_attention.linear_qkv", norm(f"{layer}.input_layernorm", x))
        heads = []
        for head in range(v.num_attention_heads):
            q, k, value = (joint[..., (3 * head + j) * width : (3 * head + j + 1) * width] for j in range(3))
            heads.append((q @ k.transpose(1, 2) / math.sqrt(width)).softmax(-1) @ value)
        x = x + linear(f"{layer}.self_attention.linear_proj", torch.cat(heads, -1))
        y = linear(f"{layer}.mlp.linear_fc1", norm(f"{layer}.pre_mlp_layernorm", x))
        x = x + linear(f"{layer}.mlp.linear_fc2", activation(v.activation, y))
    if v.family != "clip" and v.feature_layer == -1:
        x = norm("ln_post", x)
    return x if v.family == "siglip" else x[:, 1:]


def activation(name: str, x: Tensor) -> Tensor:
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def decoder_attention(run: RunConfig, w: Weights, layer: str, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
    d = run.model.decoder
    width, per_group = d.head_dim, d.num_attention_heads // d.num_query_groups
    joint = x @ w[f"{layer}.self_attention.linear_qkv.weight"].T
    heads = []
    for group in range(d.num_query_groups):
        start = group * (per_group + 2) * width
        parts = [joint[:, start + j * width : start + (j + 1) * width] for j in range(per_group + 2)]
        *queries, key, value = parts
        if d.family == "qwen3":
            scale = w[f"{layer}.self_attention.q_layernorm.weight"]
            queries = [rms_norm(q, scale, d.layernorm_epsilon) for q in queries]
            key = rms_norm(key, w[f"{layer}.self_attention.k_layernorm.weight"], d.layernorm_epsilon)
        key = rotate(key, angles)
        for query in queries:
            scores = rotate(query, angles) @ key.T / math.sqrt(width) + mask
            heads.append(scores.softmax(-1) @ value)
    return torch.cat(heads, -1) @ w[f"{layer}.self_attention.linear_proj.weight"].T


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE on pairs (i, i + width/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def swiglu(run: RunConfig, w: Weights, mlp: str, x: Tensor) -> Tensor:
    return gated(x, w[f"{mlp}.linear_fc1.weight"], w[f"{mlp}.linear_fc2.weight"])


def gated(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = (x @ up.T).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * value) @ down.T


def experts(run: RunConfig, w: Weights, mlp: str, x: Tensor) -> Tensor:
    """The best experts' outputs, weighted by the softmax over their scores alone."""
    moe = run.model.decoder.moe
    assert moe is not None
    out = torch.zeros_like(x)
    for token, row in enumerate(x):
        scores = w[f"{mlp}.router.weight"] @ row
        best = scores.topk(moe.topk)
        for weight, e in zip(best.values.softmax(-1), best.indices.tolist(), strict=True):
            up, down = w[f"{mlp}.experts.linear_fc1.weight"][e], w[f"{mlp}.experts.linear_fc2.weight"][e]
            out[token] += weight * gated(row, up, down)
    return out


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias
