"""Transformer Engine's layers against the local ones on one GPU. `make test-gpu`.

Not yet run on a GPU (docs/status.md).
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.gpu.test_one_gpu import run
from tests.parallel.encoder_forms import IMAGES
from tests.parallel.one_step import VARIANTS
from tests.parallel.recipes import write_config
from tests.parallel.test_layouts import assemble

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a GPU and Transformer Engine, and they are not here",
)


def one_step(folder: Path, layers: str, precision: str, moe: bool) -> Path:
    folder.mkdir()
    config = write_config(folder / "config.yaml", folder, {}, moe, precision=precision, layers=layers)
    run("one_step.py", config, folder, gpu=True)
    return folder


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "grouped-experts"])
def test_gradients_are_the_local_layers(tmp_path: Path, moe: bool) -> None:
    """Packed documents against the block mask, fused kernels against plain ones, grouped experts against sequential
    ones, images on all, some and no sequences: in bf16 both are as far from fp32."""
    exact = one_step(tmp_path / "fp32", "local", "fp32", moe)
    local = one_step(tmp_path / "local", "local", "bf16", moe)
    fused = one_step(tmp_path / "te", "transformer_engine", "bf16", moe)
    for variant in VARIANTS:
        losses = [json.loads((d / f"{variant}.json").read_text())["loss"] for d in (exact, local, fused)]
        assert losses[2] == pytest.approx(losses[0], rel=0.01)
        wanted, plain, found = (assemble(d, variant) for d in (exact, local, fused))
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            size = max(gradient.norm().item(), 1e-3)
            ours = (plain[name] - gradient).norm().item() / size
            theirs = (found[name] - gradient).norm().item() / size
            assert theirs <= max(0.08, 2 * ours), (variant, name, theirs, ours)


RECIPES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_trains_as_bf16_does(tmp_path: Path, recipe: str, moe: bool) -> None:
    """200 steps: the mean loss of the last 20 within 1%."""
    if torch.cuda.get_device_capability() < RECIPES[recipe]:
        pytest.skip(f"{recipe} FP8 needs a newer GPU than this one")
    means = []
    for fp8 in (None, recipe):
        folder = tmp_path / str(fp8)
        folder.mkdir()
        path = write_config(
            folder / "config.yaml", folder, {}, moe, precision="bf16", layers="transformer_engine", fp8=fp8, steps=200
        )
        config = yaml.safe_load(path.read_text())
        config["data"]["seq_length"] = 256
        config["model"]["decoder"] |= {
            "hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 512,
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        log = run("some_steps.py", path, "checkpoint.interval=1000", "optimizer.lr=1e-3", gpu=True)
        losses = [float(x) for x in re.findall(r"loss (\S+)", log)]
        assert len(losses) == 200
        means.append(sum(losses[-20:]) / 20)
    assert means[1] == pytest.approx(means[0], rel=0.01)


# Heads as wide as ViT-H's, and its 730 positions an image.
ENCODER = {
    "num_layers": 4, "hidden_size": 640, "num_attention_heads": 8, "ffn_hidden_size": 2560, "patch_size": 14,
    "image_size": 378,
}  # fmt: skip


def encoded(folder: Path, *forms: str, **training: object) -> dict[str, dict[str, torch.Tensor]]:
    """Features and gradients by number of images and form, as IMAGES-FORM."""
    folder.mkdir()
    config = write_config(folder / "config.yaml", folder, {}, vision=ENCODER, **{"precision": "bf16", **training})
    run("encoder_forms.py", config, folder, *forms, gpu=True)
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Relative difference of the features and of the gradient of all matrices in the block, taken together: gradients
    of single biases are sums that nearly cancel, of which bf16 leaves little."""
    assert found.keys() == wanted.keys()
    matrices = [n for n in wanted if "linear_" in n and wanted[n].ndim == 2]
    assert len(matrices) == 4 * ENCODER["num_layers"]
    differences = []
    for names in (["features"], matrices):
        ours, theirs = (torch.cat([side[n].float().flatten() for n in names]) for side in (found, wanted))
        differences.append(((ours - theirs).norm() / theirs.norm()).item())
    return differences[0], differences[1]


def test_images_in_one_row_are_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16: images end to end, attention told their borders, with and without padding."""
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")  # no silent fall back to plain kernels
    found = encoded(tmp_path / "te", "plain", "1", "16", "128", layers="transformer_engine")
    for images in IMAGES:
        for tile in ("1", "16", "128"):
            features, gradient = apart(found[f"{images}-{tile}"], found[f"{images}-plain"])
            assert features <= 0.01, (images, tile)
            assert gradient <= 0.02, (images, tile)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "delayed"])
def test_encoder_in_fp8_is_near_bf16(tmp_path: Path, recipe: str) -> None:
    """FP8's rounding alone, emulated on a CPU, moves these features by 1.1% and this gradient by 5 to 7%; bf16's own by
    0.6% and 0.8%."""
    if torch.cuda.get_device_capability() < RECIPES[recipe]:
        pytest.skip(f"{recipe} FP8 needs a newer GPU than this one")
    bf16 = encoded(tmp_path / "bf16", "plain", layers="transformer_engine")
    fp8 = {"layers": "transformer_engine", "fp8": recipe, "fp8_vision": True}
    kept = encoded(tmp_path / "fp8", "own", **fp8)
    again = encoded(tmp_path / "recomputed", "own", recompute=True, **fp8)
    for images in IMAGES:
        features, gradient = apart(kept[f"{images}-own"], bf16[f"{images}-plain"])
        assert features <= 0.03, images
        assert 0.02 <= gradient <= 0.15, images  # less would be bf16's own rounding: FP8 was not on
        assert max(apart(again[f"{images}-own"], kept[f"{images}-own"])) <= 0.01, images
