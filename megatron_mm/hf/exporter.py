"""A checkpoint → a folder that transformers loads after `import megatron_mm.hf`.

The tensors stream through: one Megatron tensor and one output file are in memory at a time. The folder is written
under another name beside its place and renamed when it is whole.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from megatron_mm.config import ModelConfig, RunConfig, VisionConfig
from megatron_mm.data.tokenizer import Tokenizer, find_tokenizer, open_tokenizer
from megatron_mm.errors import UserError
from megatron_mm.hf.configuration import MegatronMMConfig
from megatron_mm.hf.mapping import rules
from megatron_mm.hf.processing import MegatronMMImageProcessor, MegatronMMProcessor
from megatron_mm.hf.tokenization import exported_tokenizer

MAX_FILE_BYTES = 4 << 30


class TensorSource(Protocol):
    """What is needed of a checkpoint; `megatron_mm.training.checkpoint.read_tensors` answers with one."""

    @property
    def config(self) -> RunConfig: ...
    def keys(self) -> Iterable[str]: ...
    def tensor(self, name: str) -> Tensor: ...


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint's folder itself, or the newest whole checkpoint of a run's folder."""
    from megatron_mm.training.checkpoint_files import latest

    path = Path(path)
    if (path / "index.json").is_file():
        return path
    newest = latest(path / "checkpoints") or latest(path)
    if newest is None:
        raise UserError(
            "no checkpoint here", where=str(path), found="no such folder" if not path.is_dir() else "nothing whole",
            allowed="a run's folder, or one like RUN_DIR/checkpoints/step-00001000",
        )  # fmt: skip
    return newest


def export(checkpoint: str | Path, output: str | Path) -> Path:
    """Export a checkpoint (or a run's newest one); answers with the checkpoint that was taken."""
    from megatron_mm.training.checkpoint_files import read_tensors

    checkpoint = find_checkpoint(checkpoint)
    reader = read_tensors(checkpoint)
    export_tensors(reader, find_tokenizer(checkpoint), output)
    return checkpoint


def export_tensors(
    source: TensorSource, tokenizer_path: str | Path, output: str | Path, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Export tensors under their Megatron names; `output` must not exist yet.

    Raises:
        UserError: the folder exists, the tokenizer is missing or larger than the vocabulary, tensors are missing or
            too many, or the decoder is of a form that no Hugging Face family has.
    """
    output, run = Path(output), source.config
    if output.exists():
        raise UserError("already there", where=str(output), do="remove it, or name another folder")
    tokenizer = open_tokenizer(tokenizer_path)
    config = hf_config(run.model, tokenizer, run.data.seq_length)
    table = list(rules(config))
    _check_names(set(source.keys()), {rule.megatron for rule in table})

    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        writer = _ShardWriter(temporary, max_file_bytes)
        for rule in table:
            tensor = source.tensor(rule.megatron)
            config.dtype = config.dtype or tensor.dtype
            for name, part in zip(rule.hf, rule.split(tensor), strict=True):
                writer.add(name, part)
        writer.close()
        config.save_pretrained(temporary)
        _generation_config(config, tokenizer).save_pretrained(temporary)
        build_processor(run.model, tokenizer).save_pretrained(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def build_processor(model: ModelConfig, tokenizer: Tokenizer) -> MegatronMMProcessor:
    """The processor that feeds a model of this configuration as training did."""
    vision = model.vision
    return MegatronMMProcessor(
        MegatronMMImageProcessor(vision.image_size, vision.image_mean, vision.image_std),
        exported_tokenizer(tokenizer),
        tokens_per_image=model.connector.num_tokens,
    )


def hf_config(model: ModelConfig, tokenizer: Tokenizer, max_positions: int) -> MegatronMMConfig:
    """The exported model's configuration, from the run's."""
    if tokenizer.vocab_size > model.decoder.vocab_size:
        raise UserError(
            "the vocabulary is smaller than the tokenizer", where="model.decoder.vocab_size",
            found=model.decoder.vocab_size, allowed=f"at least {tokenizer.vocab_size} ({tokenizer.path})",
        )  # fmt: skip
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    vision = model.vision
    return MegatronMMConfig(
        vision_config=vision_config(vision, model.init_std),
        vision_final_norm=vision.has_final_norm,
        text_config=text_config(model, max_positions, ids),
        image_token_id=tokenizer.image_id,
        tokens_per_image=model.connector.num_tokens,
        connector_kind=model.connector.kind,
        connector_hidden_size=model.connector.hidden_size,
        connector_depth=model.connector.depth,
        architectures=["MegatronMMForConditionalGeneration"],
        **ids,
    )


def vision_config(vision: VisionConfig, init_std: float) -> PreTrainedConfig:
    common: dict[str, Any] = {
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.built_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": "gelu_pytorch_tanh" if vision.activation == "gelu_tanh" else vision.activation,
        "layer_norm_eps": vision.layernorm_epsilon,
    }
    if vision.family == "clip":
        return CLIPVisionConfig(**common, intermediate_size=vision.ffn_hidden_size)
    if vision.family == "siglip":
        return SiglipVisionConfig(**common, intermediate_size=vision.ffn_hidden_size, vision_use_head=False)
    ratio, rest = divmod(vision.ffn_hidden_size, vision.hidden_size)
    if rest:
        raise UserError(
            "Hugging Face's DINOv2 has an FFN of a whole multiple of its width", where="model.vision.ffn_hidden_size",
            found=vision.ffn_hidden_size, allowed=f"a multiple of {vision.hidden_size}",
        )  # fmt: skip
    return Dinov2Config(**common, mlp_ratio=ratio, use_mask_token=False, initializer_range=init_std)


def text_config(model: ModelConfig, max_positions: int, ids: dict[str, int]) -> PreTrainedConfig:
    d = model.decoder
    common: dict[str, Any] = dict(
        vocab_size=d.vocab_size,
        hidden_size=d.hidden_size,
        intermediate_size=d.ffn_hidden_size,
        num_hidden_layers=d.num_layers,
        num_attention_heads=d.num_attention_heads,
        num_key_value_heads=d.num_query_groups,
        head_dim=d.head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=d.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": d.rotary_base},
        initializer_range=model.init_std,
        tie_word_embeddings=False,
        **ids,
    )
    if d.moe is None:
        return Qwen3Config(**common) if d.family == "qwen3" else LlamaConfig(**common)
    expert_size = d.moe.ffn_hidden_size or d.ffn_hidden_size
    if d.family == "qwen3":
        return Qwen3MoeConfig(
            **common,
            num_experts=d.moe.num_experts,
            num_experts_per_tok=d.moe.topk,
            moe_intermediate_size=expert_size,
            decoder_sparse_step=d.moe.layer_freq,
            norm_topk_prob=True,  # Megatron's softmax is over the chosen experts, which is the same
            router_aux_loss_coef=d.moe.load_balance_coeff,
        )
    if d.moe.layer_freq != 1:
        raise UserError(
            "no Hugging Face family has this decoder", where="model.decoder.family",
            found=f"llama with experts in every {d.moe.layer_freq} layers (moe.layer_freq)",
            allowed="llama with experts in every layer (Mixtral), or qwen3 with any layer_freq",
        )  # fmt: skip
    common["intermediate_size"] = expert_size
    return MixtralConfig(
        **common,
        num_local_experts=d.moe.num_experts,
        num_experts_per_tok=d.moe.topk,
        router_aux_loss_coef=d.moe.load_balance_coeff,
    )


def _generation_config(config: MegatronMMConfig, tokenizer: Tokenizer) -> GenerationConfig:
    # Never an answer: the placeholder, the other special tokens, and ids that pad the vocabulary.
    never = tokenizer.special_ids.union(range(tokenizer.vocab_size, config.text_config.vocab_size))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        suppress_tokens=sorted(never - {tokenizer.eos_id}),
    )


def _check_names(found: set[str], wanted: set[str]) -> None:
    for fault, names in (("is without tensors of its model", wanted - found), ("has unknown tensors", found - wanted)):
        if names:
            raise UserError(
                f"the checkpoint {fault}", where="tensors",
                found=", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else ""),
                do="take the config.yaml that belongs to these tensors",
            )  # fmt: skip


class _ShardWriter:
    """safetensors files of bounded size and their index, under the library's names."""

    def __init__(self, directory: Path, max_file_bytes: int) -> None:
        self.directory, self.max_file_bytes = directory, max_file_bytes
        self.held: dict[str, Tensor] = {}
        self.files: list[list[str]] = []  # names of the tensors in each
        self.held_bytes = self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.held and self.held_bytes + tensor.nbytes > self.max_file_bytes:
            self._flush()
        # A copy: parts of one tensor share memory, which the format cannot say.
        self.held[name] = tensor.clone(memory_format=torch.contiguous_format)
        self.held_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _flush(self) -> None:
        path = self.directory / f"part-{len(self.files)}"
        save_file(self.held, path, metadata={"format": "pt"})
        self.files.append(list(self.held))
        self.held, self.held_bytes = {}, 0

    def close(self) -> None:
        self._flush()
        count = len(self.files)
        if count == 1:
            (self.directory / "part-0").rename(self.directory / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self.files):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.directory / f"part-{i}").rename(self.directory / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
