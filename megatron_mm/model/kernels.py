"""Which layers a run is built from: Megatron-Core's local ones or Transformer Engine's, and in which precision.

On a CPU there are the local layers alone. On a GPU with Transformer Engine its layers are the default: fused attention
over packed documents (`thd`), fused norms and, by `training.fp8`, matrix products in FP8. Everything that cannot run is
refused here, before a process group or a device is taken.
"""

import importlib.util
from typing import Any

import torch

from megatron_mm.config import RunConfig
from megatron_mm.errors import UserError
from megatron_mm.parallel.backend import on_gpu

# FP8 matrix products need Ada or Hopper (8.9), blocks of scales Hopper (9.0), MX formats Blackwell (10.0).
_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_FP8_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}  # of both sides of a matrix


def uses_transformer_engine(config: RunConfig) -> bool:
    """Whether the run's layers are Transformer Engine's."""
    choice = config.training.layers
    return choice == "transformer_engine" or (choice == "auto" and on_gpu() and _installed())


def _installed() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def check_kernels(config: RunConfig) -> None:
    """Raises UserError where this machine cannot run what the configuration asks for."""
    t = config.training
    if t.layers == "transformer_engine":
        _need_gpu("training.layers", t.layers)
        if not _installed():
            raise UserError(
                "Transformer Engine is not installed", where="training.layers", found=t.layers,
                allowed="local, or auto", do="pip install 'megatron-mm[gpu-cu13]' (or gpu-cu12)",
            )  # fmt: skip
    if t.fp8 is not None:
        _check_fp8(config, t.fp8)


def _need_gpu(where: str, found: str) -> None:
    if not on_gpu():
        raise UserError("needs a GPU", where=where, found=f"{found}, and PyTorch sees no GPU here")


def _check_fp8(config: RunConfig, recipe: str) -> None:
    where = "training.fp8"
    if config.training.precision != "bf16":
        raise UserError("FP8 goes with bf16", where=where, found=f"training.precision = {config.training.precision}")
    _need_gpu(where, recipe)
    if not uses_transformer_engine(config):
        raise UserError(
            "FP8 needs Transformer Engine's layers", where=where, found=f"training.layers = {config.training.layers}",
            do="pip install 'megatron-mm[gpu-cu13]' (or gpu-cu12), and set training.layers to auto",
        )  # fmt: skip
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY[recipe]:
        usable = [name for name, least in _CAPABILITY.items() if capability >= least]
        raise UserError(
            "this GPU cannot run the recipe", where=where,
            found=f"{recipe} on {torch.cuda.get_device_name()} (capability {capability[0]}.{capability[1]})",
            allowed=", ".join(usable) or "none: leave it out",
        )  # fmt: skip


def vision_tile(config: RunConfig) -> int | None:
    """What the encoder's row of positions must be a multiple of, in FP8; None: the encoder is not in FP8."""
    recipe = config.training.fp8
    return _FP8_MULTIPLE[recipe] if recipe and config.training.fp8_vision else None


def check_fp8_shapes(config: RunConfig) -> None:
    """FP8 matrices have sides of whole tiles. Raises UserError; needs no GPU."""
    recipe = config.training.fp8
    if recipe is None:
        return
    d, p, tile = config.model.decoder, config.parallel, _FP8_MULTIPLE[recipe]
    tp = p.tensor_model_parallel_size
    rows = config.data.seq_length * config.training.micro_batch_size // (tp if p.sequence_parallel else 1)
    sides = {
        "model.decoder.hidden_size": d.hidden_size,
        "model.decoder.ffn_hidden_size": d.ffn_hidden_size // tp,
        "model.decoder.num_attention_heads": d.num_attention_heads * d.head_dim // tp,
        "data.seq_length": rows,
    }
    if d.moe is not None:
        sides["model.decoder.moe.ffn_hidden_size"] = (d.moe.ffn_hidden_size or d.ffn_hidden_size) // p.expert_tp
    if config.training.fp8_vision:  # its positions are padded to whole tiles, its heads are as wide as its stream
        v, ranks = config.model.vision, tp if p.vision_tensor_parallel else 1
        sides["model.vision.hidden_size"] = v.hidden_size // ranks
        sides["model.vision.ffn_hidden_size"] = v.ffn_hidden_size // ranks
    for where, side in sides.items():
        if side % tile:
            field = "fp8_vision" if where.startswith("model.vision") else "fp8"
            raise UserError(
                f"{recipe} FP8 works on tiles of {tile}", where=where, found=f"{side} on each rank",
                allowed=f"a multiple of {tile}",
                do=f"change it, the parallel sizes or the recipe, or leave training.{field} out",
            )  # fmt: skip


def fusions(config: RunConfig) -> dict[str, Any]:
    """Megatron-Core's switches for fused kernels: off where the kernels are not there."""
    te = uses_transformer_engine(config)
    return {
        "persist_layer_norm": False,  # apex's; Transformer Engine has its own norms
        "masked_softmax_fusion": False,  # apex's, of the local attention
        "gradient_accumulation_fusion": False,  # the output layer, a local one, would need apex for it
        "bias_activation_fusion": te,
        "bias_dropout_fusion": te,
        "apply_rope_fusion": te,
        "cross_entropy_loss_fusion": te,
        "moe_permute_fusion": te,
        "moe_grouped_gemm": te,
        "fp8": "hybrid" if config.training.fp8 else None,  # e4m3 forward, e5m2 backward
        "fp8_recipe": config.training.fp8 or "delayed",
        # The longer history steadies the delayed recipe's scales (Megatron-LM's own runs use it too).
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }
