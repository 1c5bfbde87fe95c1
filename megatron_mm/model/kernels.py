"""Which layers a run is built from: Megatron-Core's local ones or Transformer Engine's, and in which precision.

On a CPU there are the local layers alone. On a GPU with Transformer Engine its layers are the default: fused attention
over packed documents (`thd`), fused norms and, by `training.fp8`, matrix products in FP8. Everything that cannot run is
refused here, before a process group or a device is taken.
"""

import importlib.util
from typing import Any

import torch

from megatron_mm.config import RunConfig
from megatron_mm.config.fp8 import TILE
from megatron_mm.errors import UserError
from megatron_mm.parallel.backend import on_gpu

# FP8 matrix products need Ada or Hopper (8.9), blocks of scales Hopper (9.0), MX formats Blackwell (10.0).
_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
# With one scale a tensor, gradients need the range of e5m2 (hybrid); with one a block e4m3 has enough of it
# (Transformer Engine's own choices).
_FORMAT = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


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
    return TILE[recipe] if recipe and config.training.fp8_vision else None


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
        "fp8": _FORMAT.get(config.training.fp8 or ""),
        "fp8_recipe": config.training.fp8 or "delayed",
        # The longer history steadies the delayed recipe's scales (Megatron-LM's own runs use it too).
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }
