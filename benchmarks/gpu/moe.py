"""MM1-3B-MoE with what fits on one GPU: 8 experts instead of 64 and 10 decoder layers instead of 26, on the mix.

Every second layer holds experts, top-2, as in the recipe; beside it the dense model of the same 10 layers. The experts'
products are twice the dense FFN's, so the figure is how much of that work's speed is kept.
"""

import functools
from pathlib import Path

from cases import Case, Ratio, run
from kit import Figures, has_gpu

LAYERS, EXPERTS = 10, 8


def measured(experts: bool, scaling: str | None, smoke: bool) -> Figures:
    from workload import MIX, recipe, train_figures

    if scaling and not has_gpu():
        return {"skipped": "needs CUDA and Transformer Engine"}
    overrides = [] if smoke else [f"model.decoder.num_layers={LAYERS}"]
    if experts and not smoke:
        overrides.append(f"model.decoder.moe.num_experts={EXPERTS}")
    if scaling:
        overrides.append(f"training.fp8={scaling}")
    config = recipe("mm1-3b-moe" if experts else "mm1-3b", smoke, *overrides)
    kinds = MIX[::10] if smoke else MIX
    return train_figures(config, kinds, smoke, 1 if smoke else 5, profiled=True) | {"experts": experts and EXPERTS}


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    lines = []
    if {"experts-bf16", "dense-bf16"} <= found.keys():
        ours, other = (found[n]["tflops"] for n in ("experts-bf16", "dense-bf16"))
        lines.append(Ratio("moe", ours, "TFLOP/s with experts", other, "TFLOP/s of the dense model"))
    if {"experts-bf16", "experts-fp8-tensorwise"} <= found.keys():
        ours, other = (found[n]["tokens_per_s"] for n in ("experts-fp8-tensorwise", "experts-bf16"))
        lines.append(Ratio("moe FP8", ours, "tokens/s", other, "tokens/s in bf16"))
    return lines


CASES = [
    Case("experts-bf16", functools.partial(measured, True, None)),
    Case("dense-bf16", functools.partial(measured, False, None)),
    Case("experts-fp8-tensorwise", functools.partial(measured, True, "tensorwise")),
]

if __name__ == "__main__":
    run("moe", __doc__ or "", CASES, ratios)
