"""Padding has no bearing on routing: not on the experts' load, nor on the router losses, nor on any gradient."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.parallel.recipes import MOE, write_config
from tests.ranks import ROOT, run_ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    # Coefficients at which the router losses' gradients are no rounding beside the others.
    moe = {**MOE, "load_balance_coeff": 0.3, "z_loss_coeff": 0.2}
    config = write_config(folder / "config.yaml", folder, {}, decoder={"moe": moe})
    run_ranks(1, [str(ROOT / "tests/parallel/router_padding.py"), str(config), str(folder)], folder / "logs")
    return folder


@pytest.fixture(scope="module")
def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "record.json").read_text())
    assert found["routers"] == 2
    return found


def test_losses_and_gradients_are_those_without_padding(out: Path, record: dict[str, Any]) -> None:
    without, padded = record["without"], record["with"]
    assert padded["loss"] == pytest.approx(without["loss"], rel=1e-6)
    for name, losses in without["router_losses"].items():
        assert sum(losses) > 0
        assert padded["router_losses"][name] == pytest.approx(losses, rel=1e-6), name
    expected, found = load_file(out / "without.safetensors"), load_file(out / "with.safetensors")
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_padding_goes_to_all_experts_alike(record: dict[str, Any]) -> None:
    assert len(record["with"]["to_padding"]) == 2 * 4  # routers, microbatches
    for tokens in record["with"]["to_padding"]:
        assert sum(tokens) == 20 * 2 * MOE["topk"]
        assert max(tokens) - min(tokens) <= 1


def test_router_losses_are_the_formulas(record: dict[str, Any]) -> None:
    alone = record["alone"]
    assert alone["found"] == pytest.approx(alone["expected"], rel=1e-5)
    assert alone["gradient_error"] < 1e-5
    assert record["z_loss_of_no_weight"] == alone["found"]["z_loss"]
    assert alone["padding_weights"] == 0
    assert alone["real_weights"] == pytest.approx([1.0] * len(alone["real_weights"]))
