"""The planner's picture of Megatron-Core's pipeline against Megatron-Core."""

from pathlib import Path

import pytest

from megatron_mm.config import RunConfig, load_config
from megatron_mm.parallel.backend import import_megatron
from megatron_mm.planning.memory import ChunkBytes, StageBytes, stage_memory
from megatron_mm.planning.stages import order, stages
from tests.ranks import ROOT

RECIPES = ROOT / "examples/mm1"


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(RECIPES / f"{name}.yaml", list(overrides))


@pytest.mark.parametrize(
    ("name", "pp", "vpp", "first"),
    [("mm1-30b", 4, 1, 9), ("mm1-30b", 4, 3, None), ("mm1-30b", 2, 2, 22), ("mm1-7b-moe", 4, 1, 2),
     ("mm1-3b-moe", 2, 13, None)],
)  # fmt: skip
def test_layers_are_where_megatron_puts_them(name: str, pp: int, vpp: int, first: int | None) -> None:
    import_megatron()
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_mm.model.decoder import transformer_config

    config = recipe(
        name, f"parallel.pipeline_model_parallel_size={pp}", f"parallel.virtual_pipeline_model_parallel_size={vpp}",
        f"parallel.first_pipeline_stage_layers={'null' if first is None else first}",
    )  # fmt: skip
    transformer = transformer_config(config)
    sparse = transformer.moe_layer_freq if config.model.decoder.moe else [0] * transformer.num_layers
    found = stages(config)
    for rank, stage in enumerate(found):
        for v, chunk in enumerate(stage):
            number = v if vpp > 1 else None
            layers = get_num_layers_to_build(transformer, vp_stage=number, pp_rank=rank)
            offset = get_transformer_layer_offset(transformer, vp_stage=number, pp_rank=rank)
            assert chunk.layers == layers
            assert chunk.moe == sum(sparse[offset : offset + layers])
    assert [c.first for s in found for c in s].count(True) == found[0][0].first == 1
    assert [c.last for s in found for c in s].count(True) == found[-1][-1].last == 1


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), [(4, 1, 3), (4, 1, 16), (2, 2, 4), (4, 3, 8), (4, 2, 4)])
def test_order_is_megatrons(pp: int, vpp: int, microbatches: int) -> None:
    import_megatron()
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = [chunk for _, chunk in get_schedule_table(microbatches, vpp, pp)]
    for stage in range(pp):
        steps = list(order(stage, pp, vpp, microbatches))
        assert [v for forward, v in steps if forward] == table
        assert [v for forward, v in steps if not forward] == [vpp - 1 - v for v in table]
        held = 0
        for forward, _ in steps:
            held += 1 if forward else -1
            assert held >= 0
        assert held == 0


def test_microbatches_in_flight() -> None:
    """1F1B: stage i of p holds p - i; without a pipeline one; never more than there are."""
    plain = StageBytes(0, 0, 0, 0, chunks=(ChunkBytes(10, 12, 15),))
    assert [stage_memory(plain, i, 4, 16).in_flight for i in range(4)] == [4, 3, 2, 1]
    assert [stage_memory(plain, i, 4, 2).in_flight for i in range(4)] == [2, 2, 2, 1]
    first = stage_memory(plain, 0, 4, 16)
    assert (first.activations, first.working) == (40, 5)
    alone = stage_memory(plain, 0, 1, 64)
    assert (alone.in_flight, alone.activations) == (1, 10)
    interleaved = StageBytes(0, 0, 0, 0, chunks=(ChunkBytes(100, 100, 100), ChunkBytes(1, 1, 1)))
    # Stage 0 of 2: two microbatches of virtual stage 0 and two of 1 before its first backward pass, and one more.
    assert stage_memory(interleaved, 0, 2, 8).in_flight == 5
    assert stage_memory(interleaved, 0, 2, 8).activations > 300


def test_a_recipe_has_a_stage_a_rank() -> None:
    config = load_config(Path(RECIPES / "mm1-30b.yaml"))
    assert sum(chunk.layers for stage in stages(config) for chunk in stage) == config.model.decoder.num_layers
