"""Invariant I2: one step's loss and gradients in any layout equal one rank's, with and without images on each rank."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.one_step import VARIANTS
from tests.parallel.recipes import write_config
from tests.ranks import ROOT, run_ranks

# Largest relative difference of any gradient (of its norm), in fp32: the figures that the project promises.
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}, False, 5e-6),
    "tp2-sp": (2, TP2_SP, False, 5e-6),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, False, 0.0),
    "pp2-uneven": (2, {"pipeline_model_parallel_size": 2, "first_pipeline_stage_layers": 1}, False, 0.0),
    "dp2": (2, {"distributed_optimizer": False}, False, 1e-6),
    "dp2-distributed-optimizer": (2, {}, False, 1e-6),
    "dp2-overlap": (2, {"overlap_grad_reduce": True}, False, 1e-6),
    "ep2": (2, {"expert_model_parallel_size": 2}, True, 1e-6),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, False, 5e-6),
    "tp2-pp2-sp": (4, {**TP2_SP, "pipeline_model_parallel_size": 2}, False, 5e-6),
    "ep2-tp2-sp": (4, {**TP2_SP, "expert_model_parallel_size": 2}, True, 5e-6),
}  # fmt: skip


def run(out: Path, world: int, parallel: dict, moe: bool) -> Path:
    out.mkdir(parents=True)
    write_config(out / "config.yaml", out, parallel, moe)
    run_ranks(world, [str(ROOT / "tests/parallel/one_step.py"), str(out / "config.yaml"), str(out)], out / "logs")
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
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """One rank's gradients, dense and with experts."""
    root = tmp_path_factory.mktemp("single")
    return {moe: run(root / str(moe), 1, {}, moe) for moe in (False, True)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_ranks(name: str, single: dict[bool, Path], tmp_path: Path) -> None:
    world, parallel, moe, bound = LAYOUTS[name]
    out = run(tmp_path / "out", world, parallel, moe)
    for variant in VARIANTS:
        expected, found = assemble(single[moe], variant), assemble(out, variant)
        assert found.keys() == expected.keys()
        reference, record = (json.loads((d / f"{variant}.json").read_text()) for d in (single[moe], out))
        assert record["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        assert record["source_losses"] == pytest.approx(reference["source_losses"], rel=1e-6)
        assert record["images"] == reference["images"] == sum(VARIANTS[variant])
        assert record["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        worst = {
            n: ((found[n] - g).norm() / g.norm()).item() if g.norm() > 0 else found[n].norm().item()
            for n, g in expected.items()
        }
        largest = max(worst, key=worst.__getitem__)
        print(f"{name} {variant}: {worst[largest]:.2e} at {largest}")
        assert worst[largest] <= bound, (variant, largest, worst[largest])


def test_images_matter(single: dict[bool, Path]) -> None:
    """The comparison would be empty if nothing flowed into the encoder: it does with images, and not without."""
    for variant, counts in VARIANTS.items():
        gradients = assemble(single[False], variant)
        vision = [g.norm().item() for n, g in gradients.items() if n.startswith(("vision.", "connector."))]
        assert len(vision) > 30
        assert (max(vision) > 0) == (sum(counts) > 0), variant
