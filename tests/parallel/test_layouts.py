"""Invariant I2: one step's loss and gradients in any layout equal one rank's, with and without images on each rank."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.one_step import VARIANTS, padding_of
from tests.parallel.recipes import MORE_HEADS, write_config
from tests.ranks import ROOT, run_ranks

# Largest relative difference of any gradient (of its norm), in fp32: the figures that the project promises.
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
VISION_TP = {"vision_tensor_parallel": True}


@dataclass(frozen=True)
class Layout:
    ranks: int
    parallel: dict[str, Any]
    bound: float
    moe: bool = False
    more_heads: bool = False  # `MORE_HEADS`
    training: dict[str, Any] = field(default_factory=dict)
    reference: str = "fp32"  # the one rank's precision
    packed: bool = False  # rows end to end, as Transformer Engine's attention takes them; the encoder's too


LAYOUTS = {
    "tp2": Layout(2, TP2, 5e-6),
    "tp2-sp": Layout(2, TP2_SP, 5e-6),
    "tp2-sp-recompute": Layout(2, TP2_SP, 5e-6, training={"recompute": True}),
    "pp2": Layout(2, PP2, 0.0),
    "pp2-uneven": Layout(2, {**PP2, "first_pipeline_stage_layers": 1}, 0.0),
    "pp2-virtual": Layout(2, VPP2, 0.0),
    "dp2": Layout(2, {"distributed_optimizer": False}, 1e-6),
    "dp2-distributed-optimizer": Layout(2, {}, 1e-6),
    "dp2-overlap": Layout(2, {"overlap_grad_reduce": True}, 1e-6),
    "ep2": Layout(2, EP2, 1e-6, moe=True),
    "tp2-pp2": Layout(4, {**TP2, **PP2}, 5e-6),
    "tp2-pp2-sp": Layout(4, {**TP2_SP, **PP2}, 5e-6),
    "ep2-tp2-sp": Layout(4, {**TP2_SP, **EP2}, 5e-6, moe=True),
    "ep4-expert-tp1-tp2-sp": Layout(
        4, {**TP2_SP, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}, 5e-6, moe=True
    ),
    "dp2-tp2-ep2-expert-tp1-sp": Layout(
        4, {**TP2_SP, **EP2, "expert_tensor_parallel_size": 1}, 5e-6, moe=True
    ),
    "cp2": Layout(2, CP2, 5e-6),
    "cp2-ep2-recompute": Layout(2, {**CP2, **EP2}, 5e-6, moe=True, training={"recompute": True}),
    "cp4": Layout(4, {"context_parallel_size": 4}, 5e-6, more_heads=True),
    "cp2-dp2-overlap": Layout(4, {**CP2, "overlap_grad_reduce": True}, 5e-6),
    "cp2-vision-tp2-pp2": Layout(8, {**CP2, **TP2, **PP2, **VISION_TP}, 5e-6, more_heads=True),
    "cp2-tp2-sp-pp2-virtual-ep4": Layout(
        8, {**CP2, **TP2_SP, **VPP2, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}, 5e-6,
        moe=True, more_heads=True,
    ),
    "packed-cp2-tp2-sp": Layout(4, {**CP2, **TP2_SP}, 5e-6, packed=True, more_heads=True),
    "packed-tp2-sp": Layout(2, TP2_SP, 5e-6, packed=True),
    "packed-pp2-virtual": Layout(2, VPP2, 5e-6, packed=True),
    "packed-vision-tp2-recompute": Layout(
        2, {**TP2, **VISION_TP}, 5e-6, more_heads=True, training={"recompute": True}, packed=True
    ),
    "vision-tp2": Layout(2, {**TP2, **VISION_TP}, 5e-6, more_heads=True),
    "vision-tp2-sp-pp2": Layout(4, {**TP2_SP, **PP2, **VISION_TP}, 5e-6, more_heads=True),
    "frozen-encoder-tp2": Layout(2, TP2, 5e-6, training={"frozen": ["vision"]}),
    "frozen-decoder-pp2": Layout(2, PP2, 0.0, training={"frozen": ["decoder"]}),
    "frozen-connector-dp2-overlap": Layout(
        2, {"overlap_grad_reduce": True}, 1e-6, training={"frozen": ["connector"]}
    ),
    "tp2-pp2-virtual-dp2-ep2-sp-overlap": Layout(
        8, {**TP2_SP, **VPP2, **EP2, "overlap_grad_reduce": True}, 5e-6, moe=True
    ),
    # Against one rank's fp32: what bf16 itself costs, in any layout.
    "tp2-sp-bf16": Layout(2, TP2_SP, 0.08, training={"precision": "bf16"}),
    # Against one rank's bf16: to fp32, a token whose two best experts are about equal may go to the other.
    "ep2-bf16": Layout(2, EP2, 0.01, moe=True, training={"precision": "bf16"}, reference="bf16"),
}  # fmt: skip


def run(out: Path, layout: Layout) -> Path:
    out.mkdir(parents=True)
    heads = MORE_HEADS if layout.more_heads else {}
    write_config(out / "config.yaml", out, layout.parallel, layout.moe, **heads, **layout.training)
    script = str(ROOT / "tests/parallel/one_step.py")
    packed = ["--packed"] if layout.packed else []
    run_ranks(layout.ranks, [script, str(out / "config.yaml"), str(out), *packed], out / "logs")
    return out


def assemble(out: Path, variant: str) -> dict[str, torch.Tensor]:
    """The global gradients. A box that several ranks hold must be the same on each."""
    boxes: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for file in sorted(out.glob(f"{variant}.*.safetensors")):
        for key, tensor in load_file(file).items():
            name, offset = key.split("@")
            place = tuple(int(o) for o in offset.split(","))
            known = boxes.setdefault(name, {}).setdefault(place, tensor)
            assert torch.equal(known, tensor), f"{name}: replicas disagree"
    gradients = {}
    for name, parts in boxes.items():
        shape = [max(o[i] + t.shape[i] for o, t in parts.items()) for i in range(next(iter(parts.values())).ndim)]
        whole = torch.full(shape, float("nan"), dtype=torch.float64)
        for offset, tensor in parts.items():
            whole[tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))] = tensor.double()
        assert not whole.isnan().any(), f"{name}: parts are missing"
        gradients[name] = whole
    return gradients


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """One rank's gradients of the model of a layout."""
    root = tmp_path_factory.mktemp("single")

    @functools.cache
    def made(moe: bool, more_heads: bool, precision: str) -> Path:
        layout = Layout(1, {}, 0.0, moe, more_heads, training={"precision": precision})
        return run(root / f"{moe}-{more_heads}-{precision}", layout)

    return lambda layout: made(layout.moe, layout.more_heads, layout.reference)


def imbalance(counts: list[int], layout: Layout) -> float:
    """Of 4 microbatches of 2 sequences, dealt in turn to the data-parallel ranks."""
    p = layout.parallel
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    dp = layout.ranks // math.prod(p.get(size, 1) for size in sizes)
    bins = [sum(counts[i : i + 2]) for i in range(0, 8, 2)]
    most = sum(max(bins[i : i + dp]) for i in range(0, 4, dp))
    return most * dp / sum(counts) if sum(counts) else 1.0


PARTS = {"vision": "vision.", "connector": "connector.", "decoder": "language_model."}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_ranks(name: str, single: Callable[[Layout], Path], tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    alone, out = single(layout), run(tmp_path / "out", layout)
    frozen = tuple(PARTS[part] for part in layout.training.get("frozen", ()))
    close = 0.01 if layout.training.get("precision") == "bf16" else 1e-6
    for variant in VARIANTS:
        expected, found = assemble(alone, variant), assemble(out, variant)
        expected = {name: gradient for name, gradient in expected.items() if not name.startswith(frozen or "-")}
        assert found.keys() == expected.keys()
        reference, record = (json.loads((d / f"{variant}.json").read_text()) for d in (alone, out))
        assert record["loss"] == pytest.approx(reference["loss"], rel=close)
        assert record["source_losses"] == pytest.approx(reference["source_losses"], rel=close)
        assert record["images"] == reference["images"] == sum(VARIANTS[variant])
        assert record["padding"] == sum(map(padding_of, range(8))) / (8 * 48)
        assert record["image_imbalance"] == imbalance(VARIANTS[variant], layout)
        norm = sum(g.square().sum().item() for g in expected.values()) ** 0.5
        assert record["grad_norm"] == pytest.approx(norm, rel=10 * close, abs=1e-12)
        worst = {
            n: ((found[n] - g).norm() / g.norm()).item() if g.norm() > 0 else found[n].norm().item()
            for n, g in expected.items()
        }
        largest = max(worst, key=worst.__getitem__)
        print(f"{name} {variant}: {worst[largest]:.2e} at {largest}")
        assert worst[largest] <= layout.bound, (variant, largest, worst[largest])


def test_images_matter(single: Callable[[Layout], Path]) -> None:
    """The comparison would be empty if nothing flowed into the encoder: it does with images, and not without."""
    for variant, counts in VARIANTS.items():
        gradients = assemble(single(Layout(1, {}, 0.0)), variant)
        vision = [g.norm().item() for n, g in gradients.items() if n.startswith(("vision.", "connector."))]
        assert len(vision) > 30
        assert (max(vision) > 0) == (sum(counts) > 0), variant
