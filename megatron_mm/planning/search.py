"""The layouts of a run on given GPUs, best first.

Thousands are passed through the config's own checks and through formulas; the best of them are then built from the real
modules, until enough are known to fit. What is searched: tensor, pipeline, virtual pipeline, expert and expert tensor
parallelism, the first stage's layers, the microbatch, recomputation, and how the encoder is shared out.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from megatron_mm.config import ParallelConfig, RunConfig
from megatron_mm.config.checks import check_consistency, check_layout
from megatron_mm.config.nearest import distance, divisors, first_stage_shares
from megatron_mm.errors import UserError
from megatron_mm.planning.plan import Plan, Target, estimated_plan, make_plans

_MOST_STAGES = 32
_MOST_VIRTUAL = 8
_MICROBATCHES = (1, 2, 4, 8)
_SLACK = 1.06  # formulas may be this far from what the modules hold
_TRIES = 4  # layouts built for each one that is asked for, at most


def search(config: RunConfig, target: Target, count: int = 8) -> list[Plan]:
    """The fastest `count` layouts that fit, measured on the real modules.

    Raises:
        UserError: none fits, with the one that comes nearest.
    """
    plans = sorted(_estimates(config, target), key=lambda plan: plan.time.total)
    possible = [plan for plan in plans if plan.worst.total <= _SLACK * target.usable]
    fitting: list[Plan] = []
    for start in range(0, min(len(possible), _TRIES * count), count):
        chosen = [plan.config for plan in possible[start : start + count]]
        fitting += [plan for plan in make_plans(chosen, target) if plan.fits]
        if len(fitting) >= count:
            break
    if not fitting:
        raise _none_fits(plans, target)
    return sorted(fitting, key=lambda plan: plan.time.total)[:count]


def nearest_that_fit(config: RunConfig, target: Target, count: int = 3) -> list[Plan]:
    """The least changed layouts that fit with room to spare, by formula; where none does, UserError says so."""
    plans = list(_estimates(config, target))
    possible = [plan for plan in plans if plan.worst.total * _SLACK <= target.usable]
    if not possible:
        raise _none_fits(plans, target)
    return sorted(possible, key=lambda plan: _changes(plan.config, config))[:count]


def _changes(a: RunConfig, b: RunConfig) -> float:
    micro = abs(math.log2(a.training.micro_batch_size / b.training.micro_batch_size))
    return (
        distance(a.parallel, b.parallel, b.model.decoder.num_layers)
        + micro
        + (a.training.recompute != b.training.recompute)
    )


def _none_fits(plans: list[Plan], target: Target) -> UserError:
    if not plans:
        return UserError("no layout divides", where="--gpus", found=target.gpus, do="take another number of GPUs")
    smallest = min(plans, key=lambda plan: plan.worst.total)
    return UserError(
        f"no layout fits into {target.gpu.name}", where="--gpus",
        found=f"{target.gpus}, of which the fullest needs {smallest.worst.total / 2**30:.1f} GiB at least",
        allowed=f"{target.usable / 2**30:.1f} GiB a GPU", do="take more GPUs or larger ones",
    )  # fmt: skip


def _estimates(config: RunConfig, target: Target) -> Iterator[Plan]:
    """By formula, of every layout that passes the checks. Recomputation is looked at where nothing else fits."""
    for parallel in _layouts(config, target):
        for micro in _MICROBATCHES:
            for recompute in (False, True):
                training = dataclasses.replace(config.training, micro_batch_size=micro, recompute=recompute)
                candidate = dataclasses.replace(config, parallel=parallel, training=training)
                try:
                    check_consistency(candidate)
                    check_layout(candidate, target.gpus)
                except UserError:
                    break
                plan = estimated_plan(candidate, target)
                yield plan
                if plan.worst.total <= target.usable:
                    break


def _layouts(config: RunConfig, target: Target) -> Iterator[ParallelConfig]:
    d, gpus = config.model.decoder, target.gpus
    experts = divisors(d.moe.num_experts, gpus) if d.moe else {1}
    for tp, pp in itertools.product(
        divisors(gpus, target.gpu.gpus_per_node), divisors(gpus, min(d.num_layers, _MOST_STAGES))
    ):
        if gpus % (tp * pp):
            continue
        expert_tps = sorted({1, tp}) if d.moe else [None]
        encoders = [False, True] if tp > 1 else [False]
        for vpp, ep, expert_tp, cut_encoder in itertools.product(
            range(1, _MOST_VIRTUAL + 1 if pp > 1 else 2), sorted(experts), expert_tps, encoders
        ):
            for first in _first_stages(d.num_layers, pp, vpp):
                yield dataclasses.replace(
                    config.parallel, tensor_model_parallel_size=tp, sequence_parallel=tp > 1,
                    pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp,
                    expert_model_parallel_size=ep, expert_tensor_parallel_size=expert_tp,
                    vision_tensor_parallel=cut_encoder, first_pipeline_stage_layers=first,
                )  # fmt: skip


def _first_stages(layers: int, pp: int, vpp: int) -> list[int | None]:
    """Even, where that divides, and every smaller first stage: it holds the encoder too."""
    if pp == 1:
        return [None]
    even: list[int | None] = [None] if layers % (pp * vpp) == 0 else []
    return even + [n for n in first_stage_shares(layers, pp, vpp) if n < layers / pp]
