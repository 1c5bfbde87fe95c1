"""Open weights to start from: a Hugging Face encoder or decoder folder → Megatron's global tensors.

An encoder is read by the library's own class, which knows its families' names on disk. It may have another resolution
(position embeddings are interpolated) and more layers than the run's `feature_layer` asks for. A decoder streams from
its files, whose names are stable; where the run's vocabulary is larger, the new rows are the mean of the old ones.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from megatron_mm.config import ModelConfig, VisionConfig
from megatron_mm.errors import UserError
from megatron_mm.hf.configuration import MegatronMMConfig
from megatron_mm.hf.exporter import text_config, vision_config
from megatron_mm.hf.importer import FolderReader
from megatron_mm.hf.mapping import decoder_rules, vision_rules
from megatron_mm.model.positions import fit_grid

_VISION = {
    "clip": "clip", "clip_vision_model": "clip", "siglip": "siglip", "siglip_vision_model": "siglip",
    "dinov2": "dinov2",
}  # fmt: skip
_DECODERS = ("llama", "mistral", "qwen3", "qwen3_moe", "mixtral")
_VISION_FIELDS = (
    "hidden_size intermediate_size mlp_ratio num_attention_heads patch_size hidden_act layer_norm_eps".split()
)
_TEXT_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "rms_norm_eps rope_parameters num_experts num_local_experts num_experts_per_tok moe_intermediate_size "
    "decoder_sparse_step norm_topk_prob".split()
)


def import_pretrained(folder: str | Path, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Megatron name and value of each tensor that the folder gives to a model of this configuration.

    Raises:
        UserError: the folder holds no encoder or decoder of a known family, or one of another shape.
    """
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError("not a Hugging Face model", where=str(folder), found=str(error).splitlines()[0]) from None
    if found.model_type in _VISION:
        yield from _encoder(folder, found, model.vision)
    elif found.model_type in _DECODERS:
        yield from _decoder(folder, found, model)
    else:
        raise UserError(
            "no model to start from", where=f"{folder}/config.json: model_type", found=found.model_type,
            allowed=", ".join([*_VISION, *_DECODERS]),
        )  # fmt: skip


def _check(folder: str | Path, found: Any, wanted: Any, fields: list[str], section: str) -> None:
    faults = [
        f"{field}: {a!r} in the folder, {b!r} in the config"
        for field in fields
        if hasattr(found, field) and hasattr(wanted, field)
        if (a := getattr(found, field)) != (b := getattr(wanted, field))
    ]
    if faults:
        raise UserError(
            "the run's model is not the folder's", where=str(folder), found="; ".join(faults),
            do=f"change {section} of the config",
        )  # fmt: skip


def _encoder(folder: str | Path, found: PreTrainedConfig, vision: VisionConfig) -> Iterator[tuple[str, Tensor]]:
    shape = getattr(found, "vision_config", found)
    family = _VISION[found.model_type]
    if family != vision.family:
        raise UserError("another encoder family", where="model.vision.family", found=vision.family, allowed=family)
    if getattr(shape, "use_swiglu_ffn", False):
        raise UserError("DINOv2 with a gated FFN (giant) is not supported", where=str(folder))
    _check(folder, shape, vision_config(vision, 0.02), _VISION_FIELDS, "model.vision")
    if shape.num_hidden_layers != vision.num_layers:
        raise UserError(
            "another depth", where="model.vision.num_layers", found=vision.num_layers, allowed=shape.num_hidden_layers,
            do="set it to the encoder's own depth; model.vision.feature_layer says whose output is used",
        )  # fmt: skip
    whole = AutoModel.from_pretrained(folder, dtype="auto", local_files_only=True)
    tensors = getattr(whole, "vision_model", whole).state_dict()
    if family == "dinov2":
        _fold_layer_scales(tensors, vision.built_layers)
    built = vision_config(vision, 0.02)
    for rule in vision_rules(built, vision.has_final_norm, tower="tower"):
        value = rule.join([tensors[name.removeprefix("tower.")] for name in rule.hf])
        yield rule.megatron, fit_grid(rule.megatron, value, vision)


def _fold_layer_scales(tensors: dict[str, Tensor], layers: int) -> None:
    """λ · (W x + b) = (λ W) x + λ b."""
    for i in range(layers):
        for scale, linear in (("layer_scale1", "attention.o_proj"), ("layer_scale2", "mlp.fc2")):
            factor = tensors[f"encoder.layer.{i}.{scale}.lambda1"].float()
            for kind in ("weight", "bias"):
                name = f"encoder.layer.{i}.{linear}.{kind}"
                value = tensors[name]
                tensors[name] = (factor.view(-1, *[1] * (value.ndim - 1)) * value.float()).to(value.dtype)


def _decoder(folder: str | Path, found: PreTrainedConfig, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    wanted: Any = text_config(model, 0, {})
    family = {"mistral": "llama"}.get(found.model_type, found.model_type)
    if family != wanted.model_type:
        raise UserError(
            "another decoder family", where="model.decoder.family and model.decoder.moe", found=wanted.model_type,
            allowed=found.model_type,
        )  # fmt: skip
    _check(folder, found, wanted, _TEXT_FIELDS, "model.decoder")
    if getattr(found, "attention_bias", False) or getattr(found, "mlp_bias", False):
        raise UserError("a decoder with biases is not supported", where=str(folder))
    if getattr(found, "sliding_window", None) and getattr(found, "use_sliding_window", True):
        raise UserError(
            "a decoder with a sliding window is not supported", where=str(folder), found=found.sliding_window
        )
    if found.vocab_size > model.decoder.vocab_size:
        raise UserError(
            "the vocabulary is smaller than the folder's", where="model.decoder.vocab_size",
            found=model.decoder.vocab_size, allowed=f"{found.vocab_size}, or more for a tokenizer with new ids",
        )  # fmt: skip
    reader = FolderReader(Path(folder))
    config = MegatronMMConfig(text_config=found)
    for rule in decoder_rules(config):
        names = [name.replace("model.language_model.", "model.") for name in rule.hf]
        if names == ["lm_head.weight"] and found.tie_word_embeddings:
            names = ["model.embed_tokens.weight"]
        value = rule.join([reader[name] for name in names])
        if rule.megatron.endswith(("word_embeddings.weight", "output_layer.weight")):
            new = model.decoder.vocab_size - len(value)
            value = torch.cat([value, value.float().mean(0, keepdim=True).to(value.dtype).expand(new, -1)])
        yield rule.megatron, value
