"""`model/sizes.py` against the modules: parameters, and the operations that torch counts in transformers' models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.config import ModelConfig, load_config
from megatron_mm.hf import MegatronMMForConditionalGeneration
from megatron_mm.hf.configuration import MegatronMMConfig
from megatron_mm.model.sizes import document_pairs, flops, parameters, passes
from tests.parallel.recipes import MODEL, write_config
from tests.ranks import ROOT, run_ranks

EXPERTS = {"num_experts": 4, "topk": 2, "layer_freq": 2, "ffn_hidden_size": 40}
MODELS = [
    {},
    {"decoder": {"family": "llama", "kv_channels": 10, "num_query_groups": 4}},
    {"decoder": {"moe": EXPERTS}, "vision": {"family": "siglip"}},
    {"decoder": {"moe": {"num_experts": 6, "layer_freq": 1}}, "vision": {"family": "dinov2", "feature_layer": -2}},
    {"vision": {"family": "dinov2"}, "connector": {"kind": "attention_pool"}},
    {"connector": {"kind": "average_pool", "num_tokens": 9}},
    {"connector": {"kind": "pixel_shuffle_mlp", "num_tokens": 25}},
]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sizes")
    paths = []
    for i, parts in enumerate(MODELS):
        path = write_config(folder / f"{i}.yaml", folder, {})
        config = yaml.safe_load(path.read_text())
        config["model"] = {name: {**MODEL[name], **parts.get(name, {})} for name in MODEL}
        path.write_text(yaml.safe_dump(config))
        paths.append(path)
    return paths


def test_parameters_are_what_the_modules_hold(configs: list[Path], tmp_path: Path) -> None:
    run_ranks(1, [str(ROOT / "tests/parallel/count_parameters.py"), *map(str, configs)], tmp_path)
    held = json.loads((tmp_path / "rank-0.log").read_text().strip().splitlines()[-1])
    assert len(held) == len(configs)
    for path, count in zip(configs, held, strict=True):
        found = parameters(load_config(path).model)
        assert {name: getattr(found, name) for name in count} == count, path.name
        assert found.total == sum(count.values())


def hf(model: ModelConfig) -> MegatronMMForConditionalGeneration:
    from megatron_mm.hf.exporter import text_config, vision_config

    config = MegatronMMConfig(
        vision_config=vision_config(model.vision, 0.02), vision_final_norm=model.vision.has_final_norm,
        text_config=text_config(model, 512, {}), tokens_per_image=model.connector.num_tokens,
        connector_kind=model.connector.kind, connector_hidden_size=model.connector.hidden_size,
        connector_depth=model.connector.depth,
    )  # fmt: skip
    with torch.device("meta"):
        return MegatronMMForConditionalGeneration._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("number", [0, 1, 4, 5, 6])
def test_operations_are_those_of_transformers(configs: list[Path], number: int) -> None:
    """Eager attention computes all s² pairs; the rest is the same. (Experts run data-dependently: not countable.)"""
    model = load_config(configs[number]).model
    module, s, n = hf(model), 96, 3
    embeds = torch.empty(2, s, model.decoder.hidden_size, device="meta")
    with FlopCounterMode(display=False) as decoder, torch.no_grad():
        module(inputs_embeds=embeds)
    with FlopCounterMode(display=False) as encoder, torch.no_grad():
        module.get_image_features(torch.empty(n, 3, model.vision.image_size, model.vision.image_size, device="meta"))
    found = flops(model, positions=2 * s, pairs=2 * s * s, images=n)
    # The rotary angles are a small product of their own.
    assert found.decoder + found.attention == pytest.approx(decoder.get_total_flops(), rel=1e-3)
    assert found.vision + found.connector == encoder.get_total_flops()
    assert found.training().total == 3 * found.total


@pytest.mark.parametrize(
    "frozen", [(), ("decoder",), ("connector",), ("connector", "decoder"), ("vision",), ("vision", "connector")]
)
def test_passes_of_frozen_parts_are_those_of_torch(configs: list[Path], frozen: tuple[str, ...]) -> None:
    """Each part alone, on an input that wants gradients where a part before it is trained; or where the part is, as if
    what it begins with were a layer within it."""
    model = load_config(configs[5]).model  # its connector has convolutions neither by channel nor attention
    module, s = hf(model), 96
    vision, connector, decoder = (part not in frozen for part in ("vision", "connector", "decoder"))
    for part, trained in ((module.model.connector, connector), (module.model.language_model, decoder)):
        part.requires_grad_(trained)
    module.lm_head.requires_grad_(decoder)

    def both(run: Callable[[torch.Tensor], torch.Tensor], wanted: bool, *shape: int) -> float:
        """Forward and backward over forward."""
        given = torch.empty(shape, device="meta", requires_grad=wanted)
        with FlopCounterMode(display=False) as forward:
            output = run(given)
        with FlopCounterMode(display=False) as backward:
            if output.requires_grad:
                output.sum().backward()
        return 1 + float(backward.get_total_flops()) / forward.get_total_flops()

    counted = passes(frozen)
    h, width = model.vision.hidden_size, model.decoder.hidden_size
    assert both(module.model.connector, vision or connector, 1, model.vision.grid**2, h) == counted.connector
    # Eager attention computes all pairs, and the rotary angles are a small product that has no gradient.
    work = flops(model, positions=s, pairs=s * s, images=0)
    share = work.training(frozen).total / work.total
    assert both(lambda x: module(inputs_embeds=x).logits, True, 1, s, width) == pytest.approx(share, rel=1e-3)
    assert counted.vision == (3 if vision else 1)


def test_experts_cost_their_active_share(configs: list[Path]) -> None:
    model = load_config(configs[2]).model
    assert model.decoder.moe is not None
    held = parameters(model)
    assert held.experts_active == held.experts * 2 // 4
    assert held.active == held.total - held.experts // 2
    dense = load_config(configs[2], ["model.decoder.moe=null"]).model
    d = model.decoder
    difference = 2 * (2 * 3 * d.hidden_size * 40 + 4 * d.hidden_size - 3 * d.hidden_size * d.ffn_hidden_size)
    assert flops(model, 10, 0, 0).decoder - flops(dense, 10, 0, 0).decoder == 2 * 10 * difference


def test_pairs_are_those_of_the_mask() -> None:
    lengths = [5, 1, 7]
    documents = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    allowed = (documents[:, None] == documents) & torch.ones(13, 13, dtype=torch.bool).tril()
    assert document_pairs(lengths) == allowed.sum().item()
