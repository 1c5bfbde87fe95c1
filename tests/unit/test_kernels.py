"""What cannot run here is refused early, by the field that asks for it. (What can run on a GPU: tests/gpu.)"""

from pathlib import Path

import pytest
import torch

from megatron_mm.config import load_config
from megatron_mm.errors import UserError
from megatron_mm.model.kernels import check_fp8_shapes, check_kernels, fusions, uses_transformer_engine
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


def test_fp8_goes_with_bf16(tmp_path):
    with pytest.raises(UserError, match="goes with bf16"):
        check_kernels(config(tmp_path, "training.fp8=delayed", "training.precision=fp32"))


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
        check_fp8_shapes(config(tmp_path, *overrides))
    assert caught.value.where == where
    check_fp8_shapes(config(tmp_path, "training.fp8=delayed"))


def test_the_recipes_fit_fp8(tmp_path):
    for path in (Path(__file__).parents[2] / "examples/mm1").glob("*.yaml"):
        for recipe in ("delayed", "tensorwise", "mxfp8"):
            check_fp8_shapes(load_config(path, [f"training.fp8={recipe}"]))
