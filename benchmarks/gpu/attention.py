"""Which attention kernels are fastest here: Transformer Engine's choice beside torch's flash and cuDNN kernels.

    mix        the decoder's: 24 heads of 128, 4096 positions of packed documents as captions and pages have them
    document   the same positions as one document
    encoder    16 images of 730 positions, 16 heads of 80, no mask

Forward and backward. Work is counted by true pairs, the backward pass as twice the forward one. Packed documents go to
Transformer Engine with their borders (`thd`); torch has no such form without the package flash-attn, so there each of
them is a call of its own.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case, Ratio, at_least, run
from kit import Figures, has_gpu, seconds_each, spread

HEADS = {"mix": (24, 128), "document": (24, 128), "encoder": (16, 80)}
KERNELS = ("transformer-engine", "flash", "cudnn", "flash-attn")


def _borders(shape: str, smoke: bool) -> list[int]:
    """Where documents, or images, begin, and the end."""
    if shape == "encoder":
        return [i * (30 if smoke else 730) for i in range(3 if smoke else 17)]
    if shape == "document":
        return [0, 64 if smoke else 4096]
    from workload import documents_of, recipe

    config = recipe("mm1-3b", smoke)
    lengths = [images * config.model.connector.num_tokens + words for images, words in documents_of(config)]
    return list(itertools.accumulate(lengths, initial=0))


def measured(shape: str, kernel: str, smoke: bool) -> Figures:
    if kernel == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
        return {"skipped": "needs the package flash-attn"}
    if kernel == "transformer-engine" and not has_gpu():
        return {"skipped": "needs CUDA and Transformer Engine"}
    import torch

    from megatron_mm.parallel.backend import device

    borders = _borders(shape, smoke)
    heads, width = HEADS[shape]
    causal = shape != "encoder"
    q, k, v = (
        torch.randn(borders[-1], heads, width, device=device(), dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    )
    weight = torch.randn_like(q)
    attend = _BY_KERNEL[kernel](borders, heads, width, causal)

    def step() -> None:
        q.grad = k.grad = v.grad = None
        attend(q, k, v).view_as(weight).backward(weight)

    seconds = spread(seconds_each(step, 2 if smoke else 30, 1 if smoke else 5))
    lengths = [b - a for a, b in itertools.pairwise(borders)]
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
    rate = 3 * 4 * heads * width * pairs / seconds["median"]
    figures = {"tflops": round(rate / 1e12, 3), "seconds": seconds, "documents": len(lengths), "longest": max(lengths)}
    return figures | ({"chosen": _chosen()} if kernel == "transformer-engine" else {})


def _transformer_engine(borders: list[int], heads: int, width: int, causal: bool) -> Callable[..., Any]:
    import torch
    from transformer_engine.pytorch import DotProductAttention

    starts = torch.tensor(borders, dtype=torch.int32, device="cuda")
    longest = max(b - a for a, b in itertools.pairwise(borders))
    layer = DotProductAttention(
        heads, width, qkv_format="thd", attn_mask_type="padding_causal" if causal else "padding", attention_dropout=0.0
    )
    return functools.partial(
        layer, cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _torch(kernel: str, borders: list[int], heads: int, width: int, causal: bool) -> Callable[..., Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[kernel]
    allowed = [backend] if has_gpu() else [backend, SDPBackend.MATH]
    alike = len({b - a for a, b in itertools.pairwise(borders)}) == 1

    def attend(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(allowed):
            if alike:  # [n, heads, length, width]
                given = (t.unflatten(0, (len(borders) - 1, -1)).transpose(1, 2) for t in (q, k, v))
                return _attend(*given).transpose(1, 2).flatten(0, 1)
            parts = [
                _attend(*(t[None, a:b].transpose(1, 2) for t in (q, k, v))) for a, b in itertools.pairwise(borders)
            ]
            return torch.cat([part.transpose(1, 2)[0] for part in parts])

    def _attend(q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attend


def _flash_attn(borders: list[int], heads: int, width: int, causal: bool) -> Callable[..., Any]:
    import torch
    from flash_attn import flash_attn_varlen_func

    starts = torch.tensor(borders, dtype=torch.int32, device="cuda")
    longest = max(b - a for a, b in itertools.pairwise(borders))
    return functools.partial(
        flash_attn_varlen_func, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest,
        causal=causal,
    )  # fmt: skip


_BY_KERNEL: dict[str, Callable[[list[int], int, int, bool], Callable[..., Any]]] = {
    "transformer-engine": _transformer_engine,
    "flash": functools.partial(_torch, "flash"),
    "cudnn": functools.partial(_torch, "cudnn"),
    "flash-attn": _flash_attn,
}


def _chosen() -> str:
    """What Transformer Engine took, as its own record says; the record is no public interface."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as module

    record = getattr(module, "_attention_backends", {})
    taken = [name for name in ("flash", "fused", "unfused") if record.get(f"use_{name}_attention")]
    return " ".join(taken) + (f" ({record.get('fused_attention_backend')})" if taken == ["fused"] else "")


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    lines = []
    for shape in HEADS:
        ours = found.get(f"{shape}-transformer-engine")
        others = {k: found[f"{shape}-{k}"]["tflops"] for k in KERNELS[1:] if f"{shape}-{k}" in found}
        if ours and others:
            best = max(others, key=lambda k: others[k])
            lines.append(
                at_least(
                    f"attention, {shape}", ours["tflops"], "TFLOP/s of Transformer Engine's", others[best],
                    f"TFLOP/s of {best}", 1.0,
                )
            )  # fmt: skip
    return lines


CASES = [
    Case(f"{shape}-{kernel}", functools.partial(measured, shape, kernel), 120) for shape in HEADS for kernel in KERNELS
]

if __name__ == "__main__":
    run("attention", __doc__ or "", CASES, ratios)
