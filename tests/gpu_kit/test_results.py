"""What several calls bring back becomes one result and a page."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gather
import kit
import pictures
import pytest

from tests.gpu_kit import GPU


def record(**cases: dict) -> dict:
    return {"benchmark": "gpu-x", "cases": cases, "machine": {"date": "2000-01-01"}, "ratios": []}


def test_results_of_several_calls_become_one(tmp_path: Path) -> None:
    here, first, second = (tmp_path / name for name in ("here", "first", "second"))
    kit.write(first / "gpu-x.json", record(a={"value": 1}, b={"failed": "no memory"}, c={"value": 3}))
    with gather.Archive(first, tmp_path / "first.tgz"):
        pass
    kit.write(second / "gpu-x.json", record(b={"value": 2}, c={"failed": "late"}, d={"failed": "late"}))
    kit.write(second / "gpu-tests.json", record(t={"outcome": "passed"}))
    kit.write(here / "gpu-x.json", record(a={"value": 10}))
    gather.merge(here, [tmp_path / "first.tgz", second])
    found = json.loads((here / "gpu-x.json").read_text())["cases"]
    assert found == {"a": {"value": 10}, "b": {"value": 2}, "c": {"value": 3}, "d": {"failed": "late"}}
    assert (here / "gpu-tests.json").exists()
    kit.write(here / "gpu-tests.json", record(t={"outcome": "failed"}))
    gather.merge(here, [second])
    assert json.loads((here / "gpu-tests.json").read_text())["cases"] == {"t": {"outcome": "passed"}}


def test_the_archive_is_never_old(tmp_path: Path) -> None:
    """What was written when a kill comes is in it: it is not only made at the end."""
    results, file, again = tmp_path / "results", tmp_path / "out/all.tar.gz", tmp_path / "again"
    results.mkdir()
    (results / "gpu-y.json.part").symlink_to("nowhere")  # as one that is gone by the time that it is looked at
    with gather.Archive(results, file, seconds=0.05):
        for value in range(3):
            kit.write(results / "gpu-x.json", record(a={"value": value}))
            for _ in range(100):
                time.sleep(0.05)
                if file.exists():
                    shutil.rmtree(again, ignore_errors=True)
                    gather.merge(again, [file])
                    if json.loads((again / "gpu-x.json").read_text())["cases"]["a"]["value"] == value:
                        break
            else:
                pytest.fail(f"value {value} never came")


STEP = {"median": 2.0, "spread": 0.01, "n": 5}
KERNELS = [
    {"busy_s": 0.9, "wall_s": 1.0}, {"kernel": "nvjet_tst_128x256", "share": 0.6, "calls": 9},
    {"kernel": "cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "share": 0.3, "calls": 4},
    {"kernel": "who_knows", "share": 0.1, "calls": 1},
]  # fmt: skip


def step(tokens_per_s: float, **more: object) -> dict:
    flops = {"vision": 1e14, "connector": 1e12, "decoder": 1e15, "attention": 1e13}
    return {
        "seconds_per_step": STEP, "tokens_per_s": tokens_per_s, "images_per_s": 99.0, "tflops": 400.0, "mfu": 0.404,
        "flops": flops, "peak_gib": 98.0, **more,
    }  # fmt: skip


def test_results_become_a_page(tmp_path: Path) -> None:
    """Of made-up figures: what is there is shown, what was missed says so, and a second time nothing is doubled."""
    raw, results, docs = (tmp_path / name for name in ("raw", "results", "docs"))
    machine = {
        "date": "2000-01-01", "gpu": "Made-up GPU", "gpu_gib": 1.0, "driver": "1", "cuda": "13", "cores": 2,
        "versions": {"torch": "0"},
    }  # fmt: skip

    def give(name: str, **cases: dict) -> None:
        kit.write(raw / f"gpu-{name}.json", {"benchmark": f"gpu-{name}", "machine": machine, "cases": cases})

    give("ceilings", bf16={"best_tflops": 780.0}, fp8={"best_tflops": 1400.0}, copy={"bytes_per_s": 4.3e12})
    give(
        "step_3b",
        **{
            "mix-bf16": step(2e4, profile=KERNELS), "mix-fp8-tensorwise": step(3e4, profile="failed: no tool"),
            "text-bf16": step(3e4),
            "text-transformers": {"failed": "Traceback\n  RuntimeError: no room in /some/where/else.py\nexit code 1"},
        },
    )  # fmt: skip
    give("fp8_loss", bf16={"losses": [9.0, 2.0], "last": 2.0}, tensorwise={"losses": [9.0, 2.1], "last": 2.1})
    give("levers", none=step(2e4), gradients=step(2.2e4), flash={"skipped": "needs flash-attn"})
    give("tests", **{"tests/gpu/test_a.py::test_b": {"outcome": "failed", "seconds": 1.0, "why": "because"}})
    docs.mkdir()
    (docs / "performance.md").write_text("# Performance\n\nBefore.\n")
    command = [sys.executable, str(GPU / "report.py"), "--results", str(results), "--docs", str(docs)]

    def call(*more: str) -> str:
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return (docs / "performance.md").read_text()

    page = call(str(raw))
    assert page.startswith("# Performance\n\nBefore.\n")
    assert "One Made-up GPU (1.0 GiB, driver 1, CUDA 13)" in page
    assert "780 TFLOP/s in bf16 and 1400 TFLOP/s in FP8; a copy moves 4.30 TB/s" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    by_name = {row[0]: row for row in rows}
    assert by_name["mix-bf16 MFU"][3:] == ["0.404", "at least 0.55", "**missed**"]
    assert by_name["mix FP8"][3:] == ["1.5", "at least 1.35", "reached"]
    assert by_name["loss, tensorwise"][3:] == ["1.05", "within 1%", "**missed**"]
    assert by_name["mix-bf16"] == ["mix-bf16", "20,000", "99", "2.000 (1%)", "400", "40.4%", "98", "90%"]
    assert by_name["`nvjet_tst_128x256`"] == ["`nvjet_tst_128x256`", "60.0%", "9"]
    assert "lever gradients: 2.2e+04 tokens/s / 2e+04 tokens/s of none = 1.1" in page
    assert "- failed: `tests/gpu/test_a.py::test_b`" in page
    assert "text-transformers" not in page
    kept = json.loads((results / "gpu-step_3b.json").read_text())["cases"]
    assert kept["text-transformers"] == {"failed": "RuntimeError: no room in else.py"}
    assert kept["text-bf16"] == step(3e4)
    shown = {line.split("(images/")[1].rstrip(")") for line in page.splitlines() if "(images/" in line}
    assert shown == {path.name for path in (docs / "images").iterdir()} == {
        "gpu-step.png", "gpu-where.png", "gpu-loss.png", "gpu-levers.png"
    }  # fmt: skip
    (docs / "performance.md").write_text(page + "\nAfter.\n")
    assert call() == page + "\nAfter.\n"


def test_kernels_have_a_family() -> None:
    """Names as cuBLAS, cuDNN, Transformer Engine, Triton and torch give them."""
    names = {
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT": "matrix products",
        "cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128": "attention",
        "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<": "norms",
        "void transformer_engine::quantize_helpers::cast_transpose_kernel": "FP8 casts",
        "void transformer_engine::multi_tensor_adam::MultiTensorApply": "optimizer",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add": "elementwise",
        "void at::native::(anonymous namespace)::conv_depthwise2d_backward_kernel<3": "convolutions",
        "Memcpy DtoD (Device -> Device)": "copies",
        "_cross_entropy_kernel": "loss",
        "who_knows": "other",
    }
    assert {name: pictures.family(name) for name in names} == names
    found = pictures.shares(KERNELS)
    assert sum(found.values()) == pytest.approx(1)
    assert found["idle"] == pytest.approx(0.1)
    assert found["other"] == pytest.approx(0.09)
