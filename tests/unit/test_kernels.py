"""What cannot run here is refused early, by the field that asks for it. (What can run on a GPU: tests/gpu.)"""

from pathlib import Path

import pytest
import torch

from megatron_mm.config import load_config
from megatron_mm.errors import UserError
from megatron_mm.model.kernels import check_kernels, fusions, uses_transformer_engine, vision_tile
from tests.parallel.recipes import write_config

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU refuses")


def config(tmp_path: Path, *overrides: str):
    return load_config(write_config(tmp_path / "c.yaml", tmp_path, {}, precision="bf16"), list(overrides))


@no_gpu
@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["training.layers=transformer_engine"], "training.layers"),
        (["training.fp8=delayed"], "training.fp8"),
        (["training.fp8=mxfp8"], "training.fp8"),
    ],
)
def test_a_machine_without_a_gpu_refuses(tmp_path, overrides, where):
    with pytest.raises(UserError, match="sees no GPU") as caught:
        check_kernels(config(tmp_path, *overrides))
    assert caught.value.where == where


@no_gpu
def test_auto_is_local_without_a_gpu(tmp_path):
    run = config(tmp_path)
    check_kernels(run)
    assert not uses_transformer_engine(run)
    switches = fusions(run)
    assert not any(value for name, value in switches.items() if name.endswith(("fusion", "gemm", "norm")))
    assert switches["fp8"] is None


@pytest.mark.parametrize(("recipe", "number"), [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3")])
def test_the_recipe_sets_the_format_of_numbers(recipe, number):
    switches = fusions(load_config(MM1_3B, [f"training.fp8={recipe}"]))
    assert (switches["fp8"], switches["fp8_recipe"]) == (number, recipe)


def test_fp8_goes_with_bf16(tmp_path):
    with pytest.raises(UserError, match="goes with bf16"):
        config(tmp_path, "training.fp8=delayed", "training.precision=fp32")


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["training.fp8=delayed", "model.decoder.ffn_hidden_size=136"], "model.decoder.ffn_hidden_size"),
        (["training.fp8=blockwise"], "model.decoder.hidden_size"),
        (["training.fp8=mxfp8", "data.seq_length=40", "training.micro_batch_size=1"], "data.seq_length"),
        (
            ["training.fp8=delayed", "model.decoder.moe={num_experts: 4, ffn_hidden_size: 24}"],
            "model.decoder.moe.ffn_hidden_size",
        ),
    ],
)
def test_fp8_needs_whole_tiles(tmp_path, overrides, where):
    with pytest.raises(UserError, match="tiles of") as caught:
        config(tmp_path, *overrides)
    assert caught.value.where == where
    config(tmp_path, "training.fp8=delayed")


RECIPES = Path(__file__).parents[2] / "examples/mm1"


def test_the_recipes_fit_fp8():
    for path in RECIPES.glob("*.yaml"):
        for recipe in ("delayed", "tensorwise", "mxfp8"):
            encoder = "false" if recipe == "delayed" else "true"
            load_config(path, [f"training.fp8={recipe}", f"training.fp8_vision={encoder}"])


MM1_3B = RECIPES / "mm1-3b.yaml"
SO400M = (
    "model.vision={family: siglip, num_layers: 27, hidden_size: 1152, num_attention_heads: 16, ffn_hidden_size: 4304, "
    "patch_size: 14, image_size: 378}"
)
HIDDEN, FFN = "model.vision.hidden_size", "model.vision.ffn_hidden_size"
SPLIT = ["parallel.vision_tensor_parallel=true", "parallel.tensor_model_parallel_size=4"]


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["training.fp8=blockwise", SO400M], FFN),
        (["training.fp8=mxfp8", SO400M], FFN),
        (["training.fp8=tensorwise", "model.vision.num_attention_heads=8", "model.vision.hidden_size=1256"], HIDDEN),
        (["training.fp8=blockwise", *SPLIT], HIDDEN),  # 320 on each rank
    ],
)
def test_fp8_in_the_encoder_needs_whole_tiles(overrides, where):
    with pytest.raises(UserError, match="tiles of") as caught:
        load_config(MM1_3B, [*overrides, "training.fp8_vision=true"])
    assert caught.value.where == where
    assert "fp8_vision" in str(caught.value)
    load_config(MM1_3B, overrides)


@pytest.mark.parametrize(
    ("overrides", "tile"),
    [
        (["training.fp8=tensorwise"], 16),
        (["training.fp8=tensorwise", SO400M], 16),
        (["training.fp8=tensorwise", *SPLIT], 16),
        (["training.fp8=mxfp8", "training.frozen=[vision]"], 32),
        (["training.fp8=blockwise"], 128),
    ],
)
def test_fp8_in_the_encoder_needs_no_whole_images(overrides, tile):
    """Its 729 or 730 positions an image are padded."""
    run = load_config(MM1_3B, [*overrides, "training.fp8_vision=true"])
    assert vision_tile(run) == tile
    assert vision_tile(load_config(MM1_3B, overrides)) is None
