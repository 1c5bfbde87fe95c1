"""What stands for the parts of a model that the meta device cannot run, or that need Transformer Engine.

Each keeps for the backward pass what the real part keeps, and computes nothing.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm.parallel.backend import import_megatron

import_megatron()

from megatron.core.transformer import attention  # noqa: E402
from megatron.core.transformer.attention import Attention  # noqa: E402
from megatron.core.transformer.moe import moe_layer  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher  # noqa: E402


class _FusedAttention(torch.autograd.Function):
    """Flash attention's memory: queries, keys, values, output, and a log-sum-exp for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        s, b, heads, _ = query.shape
        output = query.new_empty(s, b, heads * value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(b, heads, s, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class FusedAttention(nn.Module):
    """In the place of `core_attention`: no scores are written to memory."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _FusedAttention.apply(query, key, value)


class _FusedNorm(torch.autograd.Function):
    """A GPU's RMSNorm: its input and one number a row. (On a CPU torch writes out each step in fp32.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:2])


class _FusedRotation(torch.autograd.Function):
    """Transformer Engine's rotary embedding: the angles, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(grads[0]), None


def like_gpu(model: nn.Module) -> None:
    """Let a model of local layers keep what the same layers keep on a GPU, where torch's RMSNorm is fused."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = functools.partial(_norm, module)  # type: ignore[method-assign]


def _norm(module: nn.RMSNorm, x: Tensor) -> Tensor:
    return _FusedNorm.apply(x, module.weight)


def like_transformer_engine(model: nn.Module, decoder: Any) -> None:
    """Let a model of local layers keep what Transformer Engine's layers keep: fused attention everywhere; in the
    decoder, whose configuration is given, fused rotation, SwiGLU (its inputs alone) and cross-entropy."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.core_attention = FusedAttention()
    attention.apply_rotary_pos_emb = lambda x, angles, *args, **kwargs: _FusedRotation.apply(x, angles)
    decoder.bias_activation_fusion = decoder.bias_dropout_fusion = decoder.cross_entropy_loss_fusion = True


class BalancedDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-Core's dispatcher told in advance how many tokens go where: every rank sends the same number to every
    expert, and this rank receives `imbalance` times its share."""

    imbalance = 1.0

    def preprocess(self, routing_map: Tensor) -> Tensor:
        self.num_out_tokens = routing_map.size(0) * self.config.moe_router_topk
        arriving = self.num_out_tokens if self.ep_size == 1 else round(self.num_out_tokens * self.imbalance)
        self.input_splits = _shares(self.num_out_tokens, self.ep_size)
        self.output_splits = _shares(arriving, self.ep_size)
        self.output_splits_tp = torch.full((self.tp_size,), arriving, device="cpu")
        per_expert = _shares(arriving * self.tp_size, self.num_local_experts)
        sources = self.tp_size * self.ep_size
        # [sources, local experts]
        self.num_global_tokens_per_local_expert = torch.stack([_shares(int(n), sources) for n in per_expert], dim=1)
        self.cuda_sync_point = "before_finish"
        return per_expert


def _shares(total: int, parts: int) -> Tensor:
    """int64 [parts] that sum to `total`, as even as can be."""
    shares = torch.full((parts,), total // parts, device="cpu")
    shares[: total % parts] += 1
    return shares


def use_balanced_dispatcher(imbalance: float) -> None:
    """For the models built from now on in this process."""
    BalancedDispatcher.imbalance = imbalance
    moe_layer.MoEAlltoAllTokenDispatcher = BalancedDispatcher


class SelectTopk(TorchDispatchMode):
    """`masked_select` on meta tensors, whose result's size is not known there: the dispatcher's masks are
    [experts, tokens] with topk experts a token."""

    def __init__(self, topk: int) -> None:
        super().__init__()
        self.topk = topk

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.masked_select.default:
            values, mask = args
            return values.new_empty(mask.shape[-1] * self.topk)
        return function(*args, **(kwargs or {}))
