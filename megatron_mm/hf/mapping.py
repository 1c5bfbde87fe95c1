"""One table of names: Megatron's global tensors ↔ the tensors of an exported folder. Both directions read it.

Values are only cut, put together and reshaped, never computed with, so a round trip is exact to the bit. Exported
names are those that the library's own `save_pretrained` writes (experts one by one, as Qwen3-MoE and Mixtral have
them on disk), so a folder's decoder is read by whatever reads these families.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mm.hf.configuration import MegatronMMConfig
from megatron_mm.model.connector import build_connector


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors that hold the same numbers."""

    megatron: str
    hf: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]


def rules(config: MegatronMMConfig) -> Iterator[Rule]:
    """Every tensor of a model of this configuration, in the order of the forward pass."""
    yield from vision_rules(config.vision_config, config.vision_final_norm)
    yield from _connector(config)
    yield from decoder_rules(config)


@dataclass(frozen=True)
class _Names:
    """What a vision family calls the parts that all have."""

    patches: str
    layers: str
    norm1: str
    attention: str
    output: str
    norm2: str
    final_norm: str


_CLIP = _Names("patch_embedding", "layers", "layer_norm1", "self_attn", "out_proj", "layer_norm2", "post_layernorm")
_DINOV2 = _Names("patch_embeddings.projection", "layer", "norm1", "attention", "o_proj", "norm2", "layernorm")


def vision_rules(vision: Any, final_norm: bool, tower: str = "model.vision_tower") -> Iterator[Rule]:
    """Every tensor of an encoder that stands under `tower` in the exported model."""
    family = vision.model_type
    names = _DINOV2 if family == "dinov2" else _CLIP
    embeddings = f"{tower}.embeddings"
    yield _same("vision.conv1.weight", f"{embeddings}.{names.patches}.weight")
    if family != "clip_vision_model":
        yield _same("vision.conv1.bias", f"{embeddings}.{names.patches}.bias")
    if family == "clip_vision_model":
        token = f"{embeddings}.class_embedding"
        yield Rule("vision.class_token", (token,), lambda x: [x.flatten()], lambda parts: parts[0].view(1, 1, -1))
    if family == "dinov2":
        yield _same("vision.class_token", f"{embeddings}.cls_token")
        positions = (f"{embeddings}.position_embeddings",)
        yield Rule("vision.position_embeddings.weight", positions, lambda x: [x[None]], lambda parts: parts[0][0])
    else:
        yield _same("vision.position_embeddings.weight", f"{embeddings}.position_embedding.weight")
    for kind in ("weight", "bias"):
        if family == "clip_vision_model":
            yield _same(f"vision.ln_pre.{kind}", f"{tower}.pre_layrnorm.{kind}")  # the library's spelling
        if final_norm:
            yield _same(f"vision.ln_post.{kind}", f"{tower}.{names.final_norm}.{kind}")
    heads = vision.num_attention_heads
    for i in range(vision.num_hidden_layers):
        ours, theirs = f"vision.decoder.layers.{i}", f"{tower}.encoder.{names.layers}.{i}"
        attention = f"{theirs}.{names.attention}"
        for kind in ("weight", "bias"):
            yield _same(f"{ours}.input_layernorm.{kind}", f"{theirs}.{names.norm1}.{kind}")
            yield _qkv(f"{ours}.self_attention.linear_qkv.{kind}", attention, kind, heads, heads)
            yield _same(f"{ours}.self_attention.linear_proj.{kind}", f"{attention}.{names.output}.{kind}")
            yield _same(f"{ours}.pre_mlp_layernorm.{kind}", f"{theirs}.{names.norm2}.{kind}")
            yield _same(f"{ours}.mlp.linear_fc1.{kind}", f"{theirs}.mlp.fc1.{kind}")
            yield _same(f"{ours}.mlp.linear_fc2.{kind}", f"{theirs}.mlp.fc2.{kind}")


def _connector(config: MegatronMMConfig) -> Iterator[Rule]:
    with torch.device("meta"):
        module = build_connector(config.connector, config.vision_config.hidden_size, config.grid, 1)
    for name, _ in module.named_parameters():
        yield _same(f"connector.{name}", f"model.connector.{name}")


def decoder_rules(config: MegatronMMConfig) -> Iterator[Rule]:
    """Every tensor of the decoder, under the exported model's names."""
    text = config.text_config
    yield _same("language_model.embedding.word_embeddings.weight", "model.language_model.embed_tokens.weight")
    for i in range(text.num_hidden_layers):
        ours, theirs = f"language_model.decoder.layers.{i}", f"model.language_model.layers.{i}"
        yield _same(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight")
        yield _qkv(
            f"{ours}.self_attention.linear_qkv.weight", f"{theirs}.self_attn", "weight",
            text.num_attention_heads, text.num_key_value_heads,
        )  # fmt: skip
        if text.model_type.startswith("qwen3"):
            for x in "qk":
                yield _same(f"{ours}.self_attention.{x}_layernorm.weight", f"{theirs}.self_attn.{x}_norm.weight")
        yield _same(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight")
        yield _same(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight")
        yield from _feed_forward(config, i, ours, theirs)
    yield _same("language_model.decoder.final_layernorm.weight", "model.language_model.norm.weight")
    yield _same("language_model.output_layer.weight", "lm_head.weight")


def _feed_forward(config: MegatronMMConfig, layer: int, ours: str, theirs: str) -> Iterator[Rule]:
    text = config.text_config
    if text.model_type == "mixtral":
        block, gate, up, down, sparse_step = "block_sparse_moe", "w1", "w3", "w2", 1
    else:
        block, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
        sparse_step = getattr(text, "decoder_sparse_step", 0)
    if sparse_step and (layer + 1) % sparse_step == 0:
        experts = [f"{theirs}.{block}.experts.{e}" for e in range(text.num_experts)]
        yield _same(f"{ours}.mlp.router.weight", f"{theirs}.{block}.gate.weight")
        yield Rule(
            f"{ours}.mlp.experts.linear_fc1.weight",
            tuple(f"{expert}.{name}.weight" for expert in experts for name in (gate, up)),
            lambda x: x.flatten(0, 1).chunk(2 * len(x)),
            lambda parts: torch.stack(list(parts)).view(len(parts) // 2, -1, parts[0].shape[1]),
        )
        yield Rule(
            f"{ours}.mlp.experts.linear_fc2.weight",
            tuple(f"{expert}.{down}.weight" for expert in experts),
            lambda x: x.unbind(),
            lambda parts: torch.stack(list(parts)),
        )
    else:
        yield Rule(
            f"{ours}.mlp.linear_fc1.weight",
            (f"{theirs}.mlp.{gate}.weight", f"{theirs}.mlp.{up}.weight"),
            lambda x: x.chunk(2),
            lambda parts: torch.cat(list(parts)),
        )
        yield _same(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.{down}.weight")


def _same(megatron: str, hf: str) -> Rule:
    return Rule(megatron, (hf,), lambda x: [x], lambda parts: parts[0])


def _qkv(megatron: str, attention: str, kind: str, heads: int, groups: int) -> Rule:
    names = tuple(f"{attention}.{x}_proj.{kind}" for x in "qkv")
    return Rule(megatron, names, lambda x: split_qkv(x, heads, groups), lambda parts: join_qkv(parts, heads, groups))


def split_qkv(qkv: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's rows, for each query group [its query heads, its key, its value] → queries, keys, values.

    Args:
        qkv: [(heads + 2 groups) · head_dim, …], a weight or a bias.
    """
    per_group = heads // groups
    x = qkv.view(groups, per_group + 2, -1, *qkv.shape[1:])
    q, k, v = x[:, :per_group], x[:, per_group], x[:, per_group + 1]
    return q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)


def join_qkv(parts: Sequence[Tensor], heads: int, groups: int) -> Tensor:
    """The inverse of `split_qkv`."""
    shaped = [x.view(groups, -1, len(parts[1]) // groups, *x.shape[1:]) for x in parts]
    return torch.cat(shaped, dim=1).flatten(0, 2)
