"""Memory of a step on the GPU, the most at any time, beside the planner's estimate for one rank.

16 images in every sequence, which is what the planner counts. `peak` is what PyTorch has handed out; what it holds back
beside that (`reserved`), and what CUDA takes for itself, are the planner's reserves and shown apart.
"""

import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cases import Case, Ratio, run
from kit import ROOT, Figures, has_gpu

GIB = 2**30
SHAPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ablation-6-layers": ("mm1-ablation", ("model.decoder.num_layers=6", "model.vision.num_layers=6")),
    "3b": ("mm1-3b", ()),
    "3b-recompute": ("mm1-3b", ("training.recompute=true",)),
    "3b-two-sequences-recompute": ("mm1-3b", ("training.recompute=true", "training.micro_batch_size=2")),
    "experts": ("mm1-3b-moe", ("model.decoder.num_layers=10", "model.decoder.moe.num_experts=8")),
}


def planned(config: Any) -> Figures:
    """The planner's bytes for the only rank (built in a process of its own that sees no GPU)."""
    from megatron_mm.planning.measure import measure
    from megatron_mm.planning.memory import stage_memory

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    [[stage]] = measure([config], world_size=1, imbalance=1.0)
    found = stage_memory(stage, 0, 1, config.training.global_batch_size // config.training.micro_batch_size)
    return dataclasses.asdict(found) | {"total": found.total}


def measured(name: str, smoke: bool) -> Figures:
    import torch
    from workload import batches, recipe, trainer_of

    source, overrides = SHAPES[name]
    if smoke:
        overrides = tuple(o for o in overrides if "num_" not in o)
    size = 2 if "training.micro_batch_size=2" in overrides else 1
    config = recipe(source, smoke, *overrides, f"training.global_batch_size={2 * size}")
    with ThreadPoolExecutor(1) as beside, trainer_of(config) as trainer:
        planning = beside.submit(planned, config)
        given, _ = batches(config, ["images"] * (2 * size))
        for step in range(1 if smoke else 3):  # the first makes the optimizer's state
            if has_gpu():
                torch.cuda.reset_peak_memory_stats()
            trainer.train_step(given, step)
        peak = torch.cuda.max_memory_allocated() if has_gpu() else None
        own = {
            "parameters": sum(p.numel() * p.element_size() for c in trainer.chunks for p in c.parameters()),
            "gradients": sum(
                b.grad_data.nbytes for w in trainer.wrapped for b in (*w.buffers, *w.expert_parallel_buffers)
            ),
        }
        plan = planning.result()
    found: Figures = {"planned_gib": {k: round(v / GIB, 3) for k, v in plan.items() if k not in ("stage", "in_flight")}}
    found["measured_gib"] = {k: round(v / GIB, 3) for k, v in own.items()}
    if peak is not None:
        free, total = torch.cuda.mem_get_info()
        found |= {
            "peak_gib": round(peak / GIB, 3), "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
            "taken_of_the_gpu_gib": round((total - free) / GIB, 3), "peak_over_plan": round(peak / plan["total"], 4),
        }  # fmt: skip
    return found


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    return [
        Ratio(
            f"memory, {name}", f["peak_gib"], "GiB at the peak", f["planned_gib"]["total"], "GiB planned",
            "within 5%", abs(f["peak_over_plan"] - 1) <= 0.05,
        )
        for name, f in found.items()
        if "peak_gib" in f
    ]  # fmt: skip


CASES = [Case(name, functools.partial(measured, name)) for name in SHAPES]

if __name__ == "__main__":
    run("memory", __doc__ or "", CASES, ratios)
