"""Layouts over two GPUs and NCCL, with Transformer Engine's layers, against one GPU. `make test-gpu`.

Not yet run on a GPU (docs/status.md).
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.parallel.one_step import VARIANTS
from tests.parallel.test_layouts import CP2, EP2, PP2, TP2_SP, Layout, assemble, run

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2 or importlib.util.find_spec("transformer_engine") is None,
    reason="needs two GPUs and Transformer Engine, and they are not here",
)

LAYOUTS = {"cp2": (CP2, False), "tp2-sp": (TP2_SP, False), "pp2": (PP2, False), "dp2": ({}, False), "ep2": (EP2, True)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_one_gpus(tmp_path: Path, name: str) -> None:
    """In bf16, both against fp32: two GPUs are as far from it as one."""
    parallel, moe = LAYOUTS[name]
    fused = {"precision": "bf16", "layers": "transformer_engine"}
    plain = {"precision": "fp32", "layers": "local"}
    exact = run(tmp_path / "exact", Layout(1, {}, 0.0, moe, training=plain))
    one = run(tmp_path / "one", Layout(1, {}, 0.0, moe, training=fused))
    two = run(tmp_path / "two", Layout(2, parallel, 0.0, moe, training=fused))
    for variant in VARIANTS:
        losses = [json.loads((d / f"{variant}.json").read_text())["loss"] for d in (exact, two)]
        assert losses[1] == pytest.approx(losses[0], rel=0.01)
        wanted, alone, found = (assemble(d, variant) for d in (exact, one, two))
        assert found.keys() == wanted.keys()
        for tensor, gradient in wanted.items():
            size = max(gradient.norm().item(), 1e-3)
            ours, theirs = ((g[tensor] - gradient).norm().item() / size for g in (alone, found))
            assert theirs <= max(0.08, 2 * ours), (variant, tensor, theirs, ours)
