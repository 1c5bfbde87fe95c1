"""Layouts that work, near one that does not."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mm.config.checks import check_consistency, check_layout, check_ranges
from megatron_mm.config.files import read_config
from megatron_mm.config.schema import ParallelConfig, RunConfig
from megatron_mm.errors import UserError

_MOST_TP = 64  # a tensor-parallel group beyond that has no hardware


def load_for(path: str | Path, overrides: list[str] | None, world_size: int) -> RunConfig:
    """Load a run and check its layout on `world_size` ranks. An impossible layout's error names the nearest others."""
    config = read_config(path, overrides)
    check_ranges(config)  # nothing is near a size of 0
    try:
        check_consistency(config)
        check_layout(config, world_size)
    except UserError as error:
        raise with_nearest(error, config, world_size) from None
    return config


def with_nearest(error: UserError, config: RunConfig, world_size: int) -> UserError:
    """The error with the nearest layouts that work, or else the nearest numbers of ranks for this layout; as it is
    where neither mends it."""
    if near := nearest_layouts(config, world_size):
        changed = (changes(dataclasses.replace(config, parallel=p), config) for p in near)
        advice = f"take a layout that works on {world_size} ranks:" + "".join(f"\n    {words}" for words in changed)
    elif worlds := nearest_world_sizes(config, world_size):
        advice = f"start {' or '.join(map(str, worlds))} ranks: no layout of this run works on {world_size}"
    else:
        return error
    do = f"{error.do}; or {advice}" if error.do else advice
    return UserError(error.what, where=error.where, found=error.found, allowed=error.allowed, do=do)


def nearest_world_sizes(config: RunConfig, world_size: int) -> list[int]:
    """The next smaller and the next larger number of ranks that the layout works on, up to four times as many."""
    p, t = config.parallel, config.training
    rows = t.global_batch_size // t.micro_batch_size  # microbatches of all ranks
    sizes = sorted(p.model_parallel_size * dp for dp in divisors(rows, rows))
    below = next((n for n in reversed(sizes) if n < world_size and _works(config, n)), None)
    above = next((n for n in sizes if world_size < n <= 4 * world_size and _works(config, n)), None)
    return [n for n in (below, above) if n]


def _works(config: RunConfig, world_size: int) -> bool:
    try:
        check_consistency(config)
        check_layout(config, world_size)
    except UserError:
        return False
    return True


def nearest_layouts(config: RunConfig, world_size: int, count: int = 3) -> list[ParallelConfig]:
    """Layouts that pass the checks on `world_size` ranks, the least changed first; all else of the run stays."""
    candidates = _layouts(config, world_size)
    found = [p for p in candidates if _works(dataclasses.replace(config, parallel=p), world_size)]
    layers = config.model.decoder.num_layers
    return sorted(found, key=lambda p: distance(p, config.parallel, layers))[:count]


def _layouts(config: RunConfig, world_size: int) -> Iterator[ParallelConfig]:
    p, d = config.parallel, config.model.decoder
    experts = d.moe.num_experts if d.moe else 1
    expert_tp = {p.expert_tensor_parallel_size, 1} if d.moe else {p.expert_tensor_parallel_size}
    sizes = itertools.product(
        divisors(world_size, _MOST_TP), divisors(world_size, d.num_layers),
        divisors(p.context_parallel_size, world_size), divisors(experts, world_size), expert_tp,
    )  # fmt: skip
    for tp, pp, cp, ep, etp in sizes:
        for vpp in {p.virtual_pipeline_model_parallel_size, 1} if pp > 1 else {1}:
            for first in _first_stages(config, pp, vpp):
                yield dataclasses.replace(
                    p, tensor_model_parallel_size=tp, sequence_parallel=tp > 1 and (p.sequence_parallel or experts > 1),
                    pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp,
                    first_pipeline_stage_layers=first, context_parallel_size=cp,
                    expert_model_parallel_size=ep, expert_tensor_parallel_size=etp,
                )  # fmt: skip


def _first_stages(config: RunConfig, pp: int, vpp: int) -> list[int | None]:
    """An even split where there is one, and the first stage's nearest allowed share of it. Not a larger one than the
    others': the first stage holds the encoder."""
    layers = config.model.decoder.num_layers
    if pp == 1:
        return [None]
    even = [None] if layers % (pp * vpp) == 0 else []
    wanted = first_stage_share(config.parallel, layers)
    shares = [n for n in first_stage_shares(layers, pp, vpp) if n * pp <= layers * max(1.0, wanted)]
    near = sorted(shares, key=lambda n: abs(n * pp / layers - wanted))
    return [*even, *(near[:1] if wanted != 1 or not even else [])]


def first_stage_shares(layers: int, pp: int, vpp: int) -> list[int]:
    """How many layers the first of several stages may hold so that the others share the rest evenly."""
    return [n for n in range(vpp, layers, vpp) if (layers - n) % ((pp - 1) * vpp) == 0]


def divisors(n: int, most: int) -> set[int]:
    return {i for i in range(1, min(n, most) + 1) if n % i == 0}


def first_stage_share(p: ParallelConfig, layers: int) -> float:
    """The first stage's layers over those of an even split."""
    return (p.first_pipeline_stage_layers or layers / p.pipeline_model_parallel_size) * (
        p.pipeline_model_parallel_size / layers
    )


def distance(a: ParallelConfig, b: ParallelConfig, layers: int) -> float:
    """How much of a layout of `layers` decoder layers another one changes: doublings of its sizes, above all."""

    def far(x: int, y: int) -> float:
        return abs(math.log2(x / y))

    return (
        far(a.tensor_model_parallel_size, b.tensor_model_parallel_size)
        + far(a.pipeline_model_parallel_size, b.pipeline_model_parallel_size)
        + far(a.context_parallel_size, b.context_parallel_size)
        + far(a.expert_model_parallel_size, b.expert_model_parallel_size)
        + far(a.expert_tp, b.expert_tp) / 2
        + far(a.virtual_pipeline_model_parallel_size, b.virtual_pipeline_model_parallel_size) / 2
        + abs(first_stage_share(a, layers) - first_stage_share(b, layers)) / 2
        + (a.vision_tensor_parallel != b.vision_tensor_parallel) / 2
        + (a.sequence_parallel != b.sequence_parallel) / 4
    )


def changes(config: RunConfig, base: RunConfig) -> str:
    """What `config` has of its own in its layout, as overrides of the command line; nothing where that is nothing."""
    pairs: list[tuple[str, Any, Any]] = [
        ("parallel", config.parallel, base.parallel),
        ("training", config.training, base.training),
    ]
    words = []
    for section, ours, theirs in pairs:
        for field in dataclasses.fields(ours):
            value = getattr(ours, field.name)
            if value != getattr(theirs, field.name):
                words.append(f"{section}.{field.name}={json.dumps(value)}")
    return " ".join(words)
