"""Invariant I6: what the MM1 recipes state is what the paper says; their tiny twins train.

The figures below are those of arXiv 2403.09611, as docs/recipes.md lists them, not the recipes' own.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from megatron_mm.config import RunConfig, check_layout, dump_yaml, load_config
from megatron_mm.model.sizes import moe_layers, parameters
from megatron_mm.training.optimizer import (
    mm1_learning_rate,
    non_embedding_parameters,
    peak_learning_rates,
    schedule,
)
from tests.ranks import ROOT, run_ranks
from tests.tiny import tiny_data

RECIPES = ROOT / "examples/mm1"
GOLDEN = Path(__file__).parent / "golden/mm1"


@dataclass(frozen=True)
class Paper:
    """Stated figures, in billions of parameters where they are sizes."""

    decoder: float  # its name in the paper: non-embedding parameters
    lr: float
    lr_by_law: float  # η(N) at the named size
    total: float | None = None  # with experts
    experts: int = 0
    every: int = 0
    vision: tuple[int, int, int, int] = (32, 1280, 16, 378)  # layers, width, heads, pixels


VIT_L = (24, 1024, 16, 336)
PAPER = {
    "mm1-9m": Paper(0.009, 6.75e-4, 6.75e-4, vision=VIT_L),
    "mm1-85m": Paper(0.085, 2.62e-4, 2.62e-4, vision=VIT_L),
    "mm1-302m": Paper(0.302, 1.54e-4, 1.54e-4, vision=VIT_L),
    "mm1-ablation": Paper(1.2, 8.58e-5, 8.58e-5, vision=VIT_L),
    "mm1-3b": Paper(2.9, 6e-5, 5.92e-5),
    "mm1-7b": Paper(6.4, 4e-5, 4.24e-5),
    "mm1-30b": Paper(30.0, 2e-5, 2.21e-5),
    "mm1-3b-moe": Paper(2.9, 6e-5, 5.92e-5, 64.0, 64, 2),
    "mm1-7b-moe": Paper(6.4, 4e-5, 4.24e-5, 47.0, 32, 4),
}
# The sizes of the learning-rate law are the ablations' base with another decoder: they have its parts and its twin.
TWINS = {name: "mm1-ablation" if name in ("mm1-9m", "mm1-85m", "mm1-302m") else name for name in PAPER}
TWIN_RANKS = {"mm1-ablation": 2, "mm1-3b": 2, "mm1-7b": 2, "mm1-30b": 4, "mm1-3b-moe": 4, "mm1-7b-moe": 4}


def recipe(name: str) -> RunConfig:
    return load_config(RECIPES / f"{name}.yaml")


def test_every_recipe_is_held_to_the_paper() -> None:
    assert {p.stem for p in RECIPES.glob("*.yaml")} == PAPER.keys()
    assert {p.stem for p in RECIPES.glob("tiny/*.yaml")} == set(TWINS.values()) == TWIN_RANKS.keys()


@pytest.mark.parametrize("name", [*PAPER, *(f"tiny/{name}" for name in TWIN_RANKS)])
def test_resolved_config_is_golden(name: str) -> None:
    """Whatever changes a recipe, a default among them, shows as a diff. Renew with: python -m tests.test_recipes"""
    assert dump_yaml(recipe(name)) == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", PAPER)
def test_model_is_the_papers(name: str) -> None:
    config, paper = recipe(name), PAPER[name]
    v, c, d = config.model.vision, config.model.connector, config.model.decoder
    assert (v.num_layers, v.hidden_size, v.num_attention_heads, v.image_size) == paper.vision
    assert (v.family, v.patch_size, v.feature_layer, v.activation) == ("clip", 14, -1, "quick_gelu")
    assert (c.kind, c.num_tokens) == ("c_abstractor", 144)
    assert non_embedding_parameters(d) / 1e9 == pytest.approx(paper.decoder, rel=0.02)
    held = parameters(config.model)
    if paper.experts:
        assert d.moe is not None
        assert (d.moe.num_experts, d.moe.layer_freq, d.moe.topk) == (paper.experts, paper.every, 2)
        assert (d.moe.load_balance_coeff, d.moe.z_loss_coeff) == (0.01, 0.001)
        assert paper.total is not None
        # The 3B's 64B fits the closed form; the 7B's 47B fits none that is known, ours is 40B (docs/recipes.md).
        decoder = (held.total - held.vision - held.connector) / 1e9
        assert decoder == pytest.approx(paper.total, rel=0.02 if name == "mm1-3b-moe" else 0.15)
        dense = recipe(name.removesuffix("-moe"))
        assert moe_layers(d) == d.num_layers // paper.every
        training = replace(dense.training, micro_batch_size=config.training.micro_batch_size)  # ours, as the layout
        assert (dense.optimizer, training, dense.data) == (config.optimizer, config.training, config.data)
        assert dense.model.vision == v
    else:
        assert d.moe is None
        assert held.total == held.active


@pytest.mark.parametrize("name", PAPER)
def test_training_is_the_papers(name: str) -> None:
    config, paper = recipe(name), PAPER[name]
    o, t, data = config.optimizer, config.training, config.data
    lr, connector_lr = peak_learning_rates(config)
    assert lr == pytest.approx(paper.lr, rel=0.01)
    assert mm1_learning_rate(paper.decoder * 1e9) == pytest.approx(paper.lr_by_law, rel=0.01)
    assert connector_lr == 8e-5
    assert (data.seq_length, data.max_images, t.global_batch_size, t.steps) == (4096, 16, 512, 200_000)
    assert data.seq_length * t.global_batch_size * t.steps == pytest.approx(4.2e11, rel=0.01)
    shares = {Path(s.path).name: s.weight for s in data.sources}
    assert shares == {"interleaved": 45, "captions": 45, "text": 10}
    assert data.block_attention
    assert (o.weight_decay, o.warmup_steps, o.min_lr_ratio, o.clip_grad, o.vision_lr_scale) == (0.1, 2000, 0.1, 1.0, 1)
    assert t.frozen == ()
    assert schedule(config, 1999) == 1
    assert schedule(config, t.steps - 1) == pytest.approx(0.1)
    assert data.max_images * config.model.connector.num_tokens < data.seq_length


@pytest.mark.parametrize(
    ("name", "gpus"),
    [("mm1-9m", 1), ("mm1-9m", 8), ("mm1-85m", 8), ("mm1-302m", 8), ("mm1-ablation", 32), ("mm1-3b", 64),
     ("mm1-7b", 128), ("mm1-30b", 256), ("mm1-30b", 512), ("mm1-3b-moe", 64), ("mm1-7b-moe", 128)],
)  # fmt: skip
def test_layout_divides(name: str, gpus: int) -> None:
    config = recipe(name)
    assert check_layout(config, gpus) >= 1
    assert config.parallel.distributed_optimizer
    assert config.parallel.overlap_grad_reduce


@pytest.mark.parametrize("name", PAPER)
def test_tiny_twin_has_the_same_parts(name: str) -> None:
    twin = TWINS[name]
    big, tiny = recipe(name), recipe(f"tiny/{twin}")

    def kinds(config: RunConfig) -> tuple:
        m, p, d = config.model, config.parallel, config.model.decoder
        return (
            m.vision.family, m.vision.patch_size, m.vision.activation, m.connector.kind, d.family,
            d.moe and (d.moe.topk, d.moe.layer_freq), d.num_query_groups == d.num_attention_heads,
            p.tensor_model_parallel_size > 1, p.sequence_parallel, p.pipeline_model_parallel_size > 1,
            p.virtual_pipeline_model_parallel_size > 1, p.first_pipeline_stage_layers is None,
            p.expert_model_parallel_size > 1, p.expert_tensor_parallel_size,
            p.overlap_grad_reduce, config.data.block_attention, [s.weight for s in config.data.sources],
        )  # fmt: skip

    assert kinds(big) == kinds(tiny)
    whole = re.search(r"on (\d) CPU rank", (RECIPES / f"tiny/{twin}.yaml").read_text())
    assert whole is not None
    assert int(whole[1]) == TWIN_RANKS[twin]


@pytest.mark.parametrize("name", TWIN_RANKS)
def test_tiny_twin_trains(name: str, data: Path, tmp_path: Path) -> None:
    tiny_data(data)
    overrides = [
        f"run_dir={tmp_path}/run", f"data.tokenizer={data}/tokenizer.model", f"data.sources.0.path={data}/pages",
        f"data.sources.1.path={data}/captions", f"data.sources.2.path={data}/words", "data.num_workers=0",
        "training.steps=8", "optimizer.warmup_steps=2", "training.validation_interval=0",
    ]  # fmt: skip
    config = str(RECIPES / f"tiny/{name}.yaml")
    run_ranks(TWIN_RANKS[name], ["-m", "megatron_mm.train", "--config", config, *overrides], tmp_path / "logs")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3


if __name__ == "__main__":
    (GOLDEN / "tiny").mkdir(parents=True, exist_ok=True)
    for each in (*PAPER, *(f"tiny/{name}" for name in TWIN_RANKS)):
        (GOLDEN / f"{each}.yaml").write_text(dump_yaml(recipe(each)))
    assert yaml.safe_load((GOLDEN / "mm1-3b.yaml").read_text())
