"""Small models for the tests: a tokenizer, run configurations, and random tensors under Megatron's names and shapes.

The shapes are written out from the definition of Megatron's layers, not taken from the code under test.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mm.config import RunConfig, config_from_dict
from megatron_mm.data import tokenizer
from megatron_mm.model.connector import build_connector

VARIANTS = {
    "qwen3": {},
    "qwen3 gqa": {"num_query_groups": 2, "kv_channels": 6},
    "llama": {"family": "llama"},
    "qwen3 moe": {"num_query_groups": 1, "moe": {"num_experts": 4, "layer_freq": 2, "ffn_hidden_size": 16}},
    "mixtral": {"family": "llama", "num_query_groups": 2, "moe": {"num_experts": 3, "layer_freq": 1}},
    "siglip": {}, "siglip second last": {}, "dinov2": {}, "average pool": {}, "attention pool": {},
}  # fmt: skip
PARTS: dict[str, dict[str, dict[str, object]]] = {
    "siglip": {"vision": {"family": "siglip"}},
    "siglip second last": {"vision": {"family": "siglip", "feature_layer": -2, "activation": "gelu"}},
    "dinov2": {"vision": {"family": "dinov2", "ffn_hidden_size": 48}},
    "average pool": {"connector": {"kind": "average_pool"}},
    "attention pool": {"connector": {"kind": "attention_pool", "hidden_size": 128}},
}


def train_tokenizer(folder: Path) -> Path:
    """A tokenizer as a run has it, of 300 ids."""
    words = "what shape is shown color red blue green circle rectangle yes no".split()
    texts = [
        f" Question: {a} {b}  {c}? Short answer: {d}\n"
        for a in words
        for b in words[:6]
        for c in words[6:]
        for d in words[:4]
    ]
    tokenizer.train_tokenizer(texts, folder / "tokenizer.model", vocab_size=300)
    return folder / "tokenizer.model"


def run_config(variant: str = "qwen3", **decoder: object) -> RunConfig:
    """A tiny run: images of 28 pixels, a grid of 7, 9 tokens an image (7 to 3 is no whole ratio)."""
    return config_from_dict(
        {
            "run_dir": "unused",
            "model": {
                "vision": {
                    "num_layers": 2, "hidden_size": 24, "num_attention_heads": 3, "ffn_hidden_size": 40,
                    "patch_size": 4, "image_size": 28, **PARTS.get(variant, {}).get("vision", {}),
                },
                "connector": {
                    "num_tokens": 9, "hidden_size": 16, "depth": 2, **PARTS.get(variant, {}).get("connector", {}),
                },
                "decoder": {
                    "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 4,
                    "ffn_hidden_size": 40, "vocab_size": 336, "rotary_base": 500.0, **VARIANTS[variant], **decoder,
                },
            },
            "data": {"tokenizer": "unused", "sources": [{"path": "unused", "weight": 1}], "seq_length": 256},
            "training": {"steps": 1},
        }
    )  # fmt: skip


def megatron_tensors(run: RunConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random global tensors. Scales differ, so that exchanged tensors of equal shape show."""
    v, c, d = run.model.vision, run.model.connector, run.model.decoder
    h, f = v.hidden_size, v.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "vision.conv1.weight": (h, 3, v.patch_size, v.patch_size),
        "vision.position_embeddings.weight": (v.grid**2 + (v.family != "siglip"), h),
    }
    if v.family != "clip":
        shapes["vision.conv1.bias"] = (h,)
    if v.family != "siglip":
        shapes["vision.class_token"] = (1, 1, h)
    if v.family == "clip":
        shapes["vision.ln_pre.weight"] = shapes["vision.ln_pre.bias"] = (h,)
    elif v.feature_layer == -1:
        shapes["vision.ln_post.weight"] = shapes["vision.ln_post.bias"] = (h,)
    for i in range(v.num_layers + 1 + v.feature_layer):
        layer = f"vision.decoder.layers.{i}"
        for name, out, inner in (
            ("self_attention.linear_qkv", 3 * h, h), ("self_attention.linear_proj", h, h),
            ("mlp.linear_fc1", f, h), ("mlp.linear_fc2", h, f),
        ):  # fmt: skip
            shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = (out, inner), (out,)
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (h,)
    for name, parameter in build_connector(c, h, v.grid, d.hidden_size).named_parameters():
        shapes[f"connector.{name}"] = tuple(parameter.shape)
    h, f, k = d.hidden_size, d.ffn_hidden_size, d.head_dim
    shapes["language_model.embedding.word_embeddings.weight"] = (d.vocab_size, h)
    for i in range(d.num_layers):
        layer = f"language_model.decoder.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.pre_mlp_layernorm.weight"] = (h,)
        heads = d.num_attention_heads + 2 * d.num_query_groups
        shapes[f"{layer}.self_attention.linear_qkv.weight"] = (heads * k, h)
        shapes[f"{layer}.self_attention.linear_proj.weight"] = (h, d.num_attention_heads * k)
        if d.family == "qwen3":
            shapes[f"{layer}.self_attention.q_layernorm.weight"] = (k,)
            shapes[f"{layer}.self_attention.k_layernorm.weight"] = (k,)
        if d.moe and (i + 1) % d.moe.layer_freq == 0:
            experts, e = d.moe.num_experts, d.moe.ffn_hidden_size or f
            shapes[f"{layer}.mlp.router.weight"] = (experts, h)
            shapes[f"{layer}.mlp.experts.linear_fc1.weight"] = (experts, 2 * e, h)
            shapes[f"{layer}.mlp.experts.linear_fc2.weight"] = (experts, h, e)
        else:
            shapes[f"{layer}.mlp.linear_fc1.weight"], shapes[f"{layer}.mlp.linear_fc2.weight"] = (2 * f, h), (h, f)
    shapes["language_model.decoder.final_layernorm.weight"] = (h,)
    shapes["language_model.output_layer.weight"] = (d.vocab_size, h)
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, shape, generator) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    norm = "norm" in name or "ln_p" in name
    return 1 + 0.3 * noise if norm and name.endswith("weight") else 0.3 * noise


@dataclass
class DictSource:
    """Tensors in memory, as the exporter reads them."""

    config: RunConfig
    tensors: dict[str, Tensor]

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]
