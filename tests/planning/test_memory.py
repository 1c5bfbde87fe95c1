"""What the planner says that ranks hold against what real ranks hold."""

import json
from typing import Any

import pytest
import yaml

from megatron_mm.config import RunConfig, check_layout, load_config
from megatron_mm.planning.measure import measure
from megatron_mm.planning.memory import StageMemory, stage_memory
from tests.parallel.recipes import MORE_HEADS, write_config
from tests.ranks import ROOT, run_ranks

RANKS = 2
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2+SP, bf16": {"parallel": SP, "precision": "bf16"},
    "TP2, encoder cut": {
        "parallel": {"tensor_model_parallel_size": 2, "vision_tensor_parallel": True},
        **MORE_HEADS,
    },
    "PP2, uneven": {"parallel": {**PP, "first_pipeline_stage_layers": 1}},
    "PP2, virtual": {"parallel": {**PP, "virtual_pipeline_model_parallel_size": 2}},
    "DP2": {"parallel": {"overlap_grad_reduce": True}, "precision": "bf16"},
    "DP2, recompute": {"parallel": {"distributed_optimizer": False}, "recompute": True},
    "DP2, frozen": {"parallel": {}, "frozen": ["vision", "decoder"]},
    "CP2": {"parallel": {"context_parallel_size": 2}, "precision": "bf16"},
    "EP2": {"parallel": {"expert_model_parallel_size": 2}, "moe": True},
    "TP2+SP, experts too": {"parallel": SP, "moe": True, "precision": "bf16"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[StageMemory], list[dict[str, int]]]]:
    """Of each layout: the plan's stages, and what each real rank held."""
    folder = tmp_path_factory.mktemp("planning")
    configs: list[RunConfig] = []
    paths = []
    for number, layout in enumerate(LAYOUTS.values()):
        options = dict(layout)
        path = write_config(folder / f"{number}.yaml", folder, options.pop("parallel"), **options)
        data = yaml.safe_load(path.read_text())
        data["data"]["max_images"] = 4
        path.write_text(yaml.safe_dump(data))
        paths.append(str(path))
        configs.append(load_config(path))
    run_ranks(RANKS, [str(ROOT / "tests/planning/real_ranks.py"), str(folder), *paths], folder / "logs")
    answers = {}
    planned = measure(configs, RANKS, imbalance=1.0, gpu=False)
    for number, (name, config, stages) in enumerate(zip(LAYOUTS, configs, planned, strict=True)):
        pp = config.parallel.pipeline_model_parallel_size
        microbatches = config.training.global_batch_size // config.training.micro_batch_size
        microbatches //= check_layout(config, RANKS)
        plan = [stage_memory(stage, i, pp, microbatches) for i, stage in enumerate(stages)]
        real = [json.loads((folder / f"{number}.{rank}.json").read_text()) for rank in range(RANKS)]
        answers[name] = (plan, real)
    return answers


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_gradients_and_optimizer_are_exact(name: str, found: dict[str, Any]) -> None:
    plan, real = found[name]
    for rank in real:
        stage = plan[rank["stage"]]
        assert (stage.parameters, stage.gradients) == (rank["parameters"], rank["gradients"])
    # A shard ends inside a parameter: ranks of a data-parallel group differ by its padding.
    for number, stage in enumerate(plan):
        assert stage.optimizer == max(r["optimizer"] for r in real if r["stage"] == number)


@pytest.mark.parametrize("name", LAYOUTS)
def test_activations_are_within_a_tenth(name: str, found: dict[str, Any]) -> None:
    plan, real = found[name]
    for rank in real:
        stage = plan[rank["stage"]]
        kept, most = stage.activations / rank["saved"], (stage.activations + stage.working) / rank["live"]
        print(f"{name}, stage {rank['stage']}: saved {rank['saved']} ({kept:.3f}), alive {rank['live']} ({most:.3f})")
        # Recomputed, a layer's own tensors are saved during the backward pass: with them it is the fullest moment.
        assert 0.9 < kept < 1.1 or "recompute" in name
        assert 0.9 < most < 1.1
