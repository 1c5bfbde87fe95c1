"""One GPU against the CPU: the same step, and checkpoints that pass between them. `make test-gpu`.

Not yet run on a GPU (docs/status.md).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mm.parallel.launch import free_port
from megatron_mm.training.checkpoint_files import step_directory
from tests.parallel.recipes import write_config
from tests.parallel.test_checkpoints import same
from tests.parallel.test_layouts import assemble
from tests.ranks import ROOT, rank_environment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none here")


def run(script: str, *arguments: str | Path, gpu: bool) -> str:
    env = rank_environment(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()), CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0") if gpu else "",
    )  # fmt: skip
    command = [sys.executable, str(ROOT / "tests/parallel" / script), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_gradients_equal_the_cpus(tmp_path: Path, moe: bool) -> None:
    for name in ("cpu", "gpu"):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name / "config.yaml", tmp_path / name, {}, moe)
        run("one_step.py", config, tmp_path / name, gpu=name == "gpu")
    for variant in ("all", "some", "none"):
        cpu, gpu = (json.loads((tmp_path / n / f"{variant}.json").read_text()) for n in ("cpu", "gpu"))
        assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-5)
        expected, found = assemble(tmp_path / "cpu", variant), assemble(tmp_path / "gpu", variant)
        for tensor, gradient in expected.items():
            assert (found[tensor] - gradient).norm() <= 1e-4 * gradient.norm(), (variant, tensor)


@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_checkpoints_pass_between_cpu_and_gpu(tmp_path: Path, first: str) -> None:
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", {}, steps=2, precision="bf16")
    run("some_steps.py", config, "checkpoint.interval=2", gpu=first == "gpu")
    copy = tmp_path / "copy"
    run("some_steps.py", config, f"--save-to={copy}", gpu=first != "gpu")
    same(step_directory(tmp_path / "run" / "checkpoints", 2), step_directory(copy, 2))
    shutil.rmtree(copy)
