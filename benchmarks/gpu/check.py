"""Is all there that the rest needs? Versions, Transformer Engine's kernels, DALI, NCCL: each by itself, in seconds."""

from pathlib import Path
from typing import Any

from cases import Case, Ratio, run
from kit import Figures, has_gpu, machine

NO_GPU = {"skipped": "needs CUDA"}


def versions(smoke: bool) -> Figures:
    import torch

    from megatron_mm.parallel.backend import import_megatron

    import_megatron()
    memory = torch.cuda.mem_get_info() if has_gpu() else (0, 0)
    return {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "free_gib": memory[0] >> 30} | {
        "versions": machine()["versions"]
    }


def _distance(found: Any, exact: Any) -> float:
    """Relative, of whole tensors."""
    return round(((found.float() - exact).norm() / exact.norm()).item(), 5)


def transformer_engine(smoke: bool) -> Figures:
    """A matrix product in bf16 and by each FP8 recipe that this GPU has, forward and backward: distance from fp32."""
    if not has_gpu():
        return NO_GPU
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    recipes = {
        "bf16": None,
        "delayed": recipe.DelayedScaling(),
        "tensorwise": recipe.Float8CurrentScaling(),
        "blockwise": recipe.Float8BlockScaling(),
    }
    found = {}
    for name, chosen in recipes.items():
        torch.manual_seed(0)
        layer = te.Linear(3072, 8192, bias=False, params_dtype=torch.bfloat16, device="cuda")
        x = torch.randn(4096, 3072, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(4096, 8192, device="cuda", dtype=torch.bfloat16)
        for _ in range(2):  # the delayed recipe knows its scales from the step before
            x.grad = None
            with te.autocast(enabled=chosen is not None, recipe=chosen):
                y = layer(x)
            y.backward(weight)
        exact = x.detach().float() @ layer.weight.detach().float().t()
        back = weight.float() @ layer.weight.detach().float()
        found[name] = {"forward": _distance(y, exact), "backward": _distance(x.grad, back)}
        print(f"{name}: {found[name]}", flush=True)
    return found


def attention(smoke: bool) -> Figures:
    """Transformer Engine's attention over packed documents against plain attention in fp32; it prints its kernel."""
    if not has_gpu():
        return NO_GPU
    import os

    os.environ["NVTE_DEBUG"], os.environ["NVTE_DEBUG_LEVEL"] = "1", "1"
    import torch
    from transformer_engine.pytorch import DotProductAttention

    lengths = torch.tensor([900, 100, 2000, 1096])
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]).cuda()
    q, k, v = (torch.randn(4096, 24, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    layer = DotProductAttention(24, 128, qkv_format="thd", attn_mask_type="padding_causal", attention_dropout=0.0)
    output = layer(q, k, v, cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=4096, max_seqlen_kv=4096).view(
        4096, 24, 128
    )
    output.square().sum().backward()
    exact = []
    for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        queries, keys, values = (t.detach()[a:b].float().transpose(0, 1) for t in (q, k, v))
        part = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        exact.append(part.transpose(0, 1))
    finite = all(t.grad is not None and bool(t.grad.isfinite().all()) for t in (q, k, v))
    return {"distance": _distance(output, torch.cat(exact)), "gradients_finite": finite}


def dali(smoke: bool) -> Figures:
    """A picture decoded on the device beside the CPU's decoders."""
    import made
    import torch

    from megatron_mm.data.decode import CpuBackend, DaliBackend
    from megatron_mm.parallel.backend import device

    data = {0: made.jpeg(0)}
    exact = torch.empty((1, 3, 378, 378), dtype=torch.uint8)
    CpuBackend(10**7)(data, exact)
    found = torch.empty((1, 3, 378, 378), dtype=torch.uint8, device=device())
    bad = DaliBackend(10**7, device())(data, found)
    apart = (found.cpu().int() - exact.int()).abs()
    return {"bad": len(bad), "at_most": int(apart.max()), "on_average": round(apart.float().mean().item(), 3)}


def nccl(smoke: bool) -> Figures:
    """A world of one rank and Megatron-Core's groups."""
    import torch
    import torch.distributed as dist
    from workload import alone, recipe

    from megatron_mm.parallel.backend import device

    with alone(recipe("mm1-3b", smoke)):
        total = torch.ones(4, device=device())
        dist.all_reduce(total)
        return {"backend": dist.get_backend(), "sum": total.sum().item()}


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    return []


CASES = [Case(f.__name__.replace("_", "-"), f, 120) for f in (versions, transformer_engine, attention, dali, nccl)]

if __name__ == "__main__":
    run("check", __doc__ or "", CASES, ratios)
