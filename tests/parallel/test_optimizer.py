"""The optimizer against torch's AdamW in float64, given the same gradients: clipping, the parts' rates, weight decay.

Decay is what Megatron-Core's is: on every parameter of two or more dimensions (position embeddings, the class token
and the router among them), on no norm and no bias.
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.optimizer_steps import STEPS
from tests.parallel.recipes import write_config
from tests.parallel.test_layouts import assemble
from tests.ranks import ROOT, run_ranks

SCRIPT = str(ROOT / "tests/parallel/optimizer_steps.py")
RATES = {"vision": 4e-3 * 0.25, "connector": 2e-3, "language_model": 4e-3}  # at the peak
SHARES = (0.5, 1.0, 1.0, 0.1)  # of the peak: two steps of warm-up, then a cosine from its start to its end
DECAY, BETAS, EPS = 5.0, (0.8, 0.9), 1e-5
CLIP = 1.5  # the first step, without images, has a norm of 1.0; the others 1.8 to 3.4
OVERRIDES = {
    "lr": RATES["language_model"], "connector_lr": RATES["connector"], "vision_lr_scale": 0.25, "warmup_steps": 2,
    "min_lr_ratio": 0.1, "weight_decay": DECAY, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "clip_grad": CLIP,
}  # fmt: skip
UNDECAYED = re.compile(r"\.bias$|norm|\.ln_(pre|post)\.|\.shortcut\.1\.")  # the last is the norm of a shortcut
DECAYED = ("vision.class_token", "vision.position_embeddings.weight", "vision.conv1.weight",
           "connector.position_embedding", "language_model.embedding.word_embeddings.weight",
           "language_model.output_layer.weight")  # fmt: skip
EP2_TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}


def decays(name: str) -> bool:
    return not UNDECAYED.search(name)


def expected_weights(start: dict[str, Tensor], gradients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """After each update. The gradients are clipped here by their global norm."""
    own = {name: torch.nn.Parameter(value.double()) for name, value in start.items()}
    groups = [
        {"params": [p for n, p in own.items() if n.split(".")[0] == part and decays(n) == decayed], "part": part,
         "weight_decay": DECAY if decayed else 0.0}
        for part in RATES
        for decayed in (True, False)
    ]  # fmt: skip
    assert all(group["params"] for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(own)
    adam = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    found = []
    for share, given in zip(SHARES, gradients, strict=True):
        norm = torch.cat([g.flatten() for g in given.values()]).norm()
        for name, parameter in own.items():
            parameter.grad = given[name] * torch.clamp(CLIP / norm, max=1.0)
        for group in adam.param_groups:
            group["lr"] = RATES[group["part"]] * share
        adam.step()
        found.append({name: p.detach().clone() for name, p in own.items()})
    return found


@pytest.mark.parametrize(
    ("world", "parallel", "moe", "precision"),
    [
        (1, {}, False, "fp32"),
        (2, {"distributed_optimizer": False}, False, "bf16"),
        (4, EP2_TP2, True, "bf16"),
    ],
    ids=["alone", "dp2-bf16-no-distributed-optimizer", "ep2-tp2-sp-bf16"],
)
def test_updates_are_torchs(tmp_path: Path, world: int, parallel: dict[str, Any], moe: bool, precision: str) -> None:
    config = write_config(
        tmp_path / "config.yaml", tmp_path, parallel, moe, optimizer=OVERRIDES, steps=len(STEPS), precision=precision
    )
    run_ranks(world, [SCRIPT, str(config), str(tmp_path)], tmp_path / "logs")
    gradients = [assemble(tmp_path, f"gradients-{n}") for n in range(len(STEPS))]
    weights = [assemble(tmp_path, f"weights-{n}") for n in range(len(STEPS) + 1)]
    assert {n for n, w in weights[0].items() if w.ndim >= 2} == {n for n in weights[0] if decays(n)}
    assert set(DECAYED) < {n for n in weights[0] if decays(n)}

    told = json.loads((tmp_path / "steps.json").read_text())
    norms = [sum(g.square().sum().item() for g in step.values()) ** 0.5 for step in gradients]
    assert [t["grad_norm"] for t in told] == pytest.approx(norms, rel=1e-5)  # before clipping
    assert [t["learning_rate"] for t in told] == pytest.approx([4e-3 * share for share in SHARES])
    assert norms[0] < CLIP < min(norms[1:])
    expected = expected_weights(weights[0], gradients)
    for (before, found), wanted in zip(pairwise(weights), expected, strict=True):
        for name, value in wanted.items():
            moved = (value - before[name]).norm()
            # Of the movement, and the digits of fp32.
            assert (found[name] - value).norm() <= 1e-5 * moved + 5e-7 * value.norm(), name
