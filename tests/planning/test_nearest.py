"""An impossible layout is refused with the nearest layouts that work."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.config import check_layout, load_config
from megatron_mm.config.checks import check_consistency
from megatron_mm.config.files import read_config
from megatron_mm.config.nearest import first_stage_share, load_for, nearest_layouts, nearest_world_sizes
from megatron_mm.errors import UserError
from tests.ranks import ROOT

RECIPES = ROOT / "examples/mm1"


@pytest.mark.parametrize(
    ("name", "gpus", "overrides", "field", "works"),
    [
        ("mm1-30b", 256, ["parallel.tensor_model_parallel_size=3"], "num_query_groups", "tensor_model_parallel_size=4"),
        ("mm1-30b", 256, ["parallel.pipeline_model_parallel_size=5"], "first_pipeline_stage_layers", "pipeline"),
        ("mm1-30b", 384, [], "training.global_batch_size", "virtual"),
        ("mm1-3b-moe", 64, ["parallel.expert_model_parallel_size=48"], "experts", "expert_model_parallel_size=64"),
        ("mm1-3b-moe", 64, ["parallel.sequence_parallel=false"], "sequence_parallel", "sequence_parallel=true"),
    ],
)
def test_errors_name_what_works(name: str, gpus: int, overrides: list[str], field: str, works: str) -> None:
    with pytest.raises(UserError) as refused:
        load_for(RECIPES / f"{name}.yaml", overrides, gpus)
    assert field in refused.value.where
    assert works in refused.value.do
    for line in refused.value.do.split("ranks:")[1].strip().splitlines():
        assert load_for(RECIPES / f"{name}.yaml", [*overrides, *line.split()], gpus)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mm1-3b", ["parallel.pipeline_model_parallel_size=7"]),
        ("mm1-30b", ["training.global_batch_size=100"]),
        ("mm1-7b", ["parallel.tensor_model_parallel_size=3"]),
    ],
)
def test_the_first_stage_gets_no_more_than_its_share(name: str, overrides: list[str]) -> None:
    """It holds the encoder; and an even split's nearest is not a first stage of one layer."""
    config = read_config(RECIPES / f"{name}.yaml", overrides)
    layers, wanted = (
        config.model.decoder.num_layers,
        first_stage_share(config.parallel, config.model.decoder.num_layers),
    )
    near = nearest_layouts(config, 64)
    assert near
    for parallel in near:
        assert first_stage_share(parallel, layers) <= max(1, wanted)
    assert abs(first_stage_share(near[0], layers) - wanted) < 0.3


def test_where_no_layout_works_the_nearest_numbers_of_ranks_are_named() -> None:
    with pytest.raises(UserError) as refused:
        load_for(RECIPES / "mm1-30b.yaml", [], 252)
    assert "start 128 or 256 ranks" in refused.value.do
    assert load_for(RECIPES / "mm1-30b.yaml", [], 128)


@pytest.mark.parametrize(("name", "gpus"), [("mm1-30b", 252), ("mm1-3b", 7), ("mm1-3b", 64), ("mm1-3b-moe", 130)])
def test_the_nearest_numbers_of_ranks_are_those_that_a_search_of_all_finds(name: str, gpus: int) -> None:
    config = load_config(RECIPES / f"{name}.yaml")

    def works(world_size: int) -> bool:
        try:
            return check_layout(config, world_size) > 0
        except UserError:
            return False

    below = next((n for n in range(gpus - 1, 0, -1) if works(n)), None)
    above = next((n for n in range(gpus + 1, 4 * gpus + 1) if works(n)), None)
    assert nearest_world_sizes(config, gpus) == [n for n in (below, above) if n]


def test_an_absurd_number_of_ranks_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="start 512 ranks"):
        load_for(RECIPES / "mm1-3b.yaml", [], 10**8)


@pytest.mark.parametrize("value", [0, -4])
@pytest.mark.parametrize(
    "field",
    [
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "parallel.virtual_pipeline_model_parallel_size",
        "parallel.expert_model_parallel_size",
        "training.micro_batch_size",
    ],
)
def test_sizes_below_one_have_no_neighbours(field: str, value: int) -> None:
    with pytest.raises(UserError, match="out of range") as refused:
        load_for(RECIPES / "mm1-3b-moe.yaml", [f"{field}={value}"], 64)
    assert refused.value.where == field


def test_other_faults_keep_their_error() -> None:
    with pytest.raises(UserError) as refused:
        load_for(RECIPES / "mm1-3b.yaml", ["model.decoder.num_attention_heads=7"], 64)
    assert "works on" not in refused.value.do


@settings(max_examples=25)
@given(gpus=st.integers(1, 600), tp=st.integers(1, 12), pp=st.integers(1, 12), ep=st.sampled_from([1, 2, 3, 8, 64]))
def test_every_proposal_passes_the_checks(gpus: int, tp: int, pp: int, ep: int) -> None:
    config = load_config(RECIPES / "mm1-3b-moe.yaml")
    wanted = dataclasses.replace(
        config.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep
    )
    for parallel in nearest_layouts(dataclasses.replace(config, parallel=wanted), gpus):
        candidate = dataclasses.replace(config, parallel=parallel)
        check_consistency(candidate)
        assert check_layout(candidate, gpus) >= 1
