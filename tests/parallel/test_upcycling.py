"""Sparse upcycling: right after it the model with experts computes what the dense one did, in any layout."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

import megatron_mm.hf  # noqa: F401 (registers the classes)
from megatron_mm.config import config_from_dict
from megatron_mm.errors import UserError
from megatron_mm.training.checkpoint_files import CheckpointReader, step_directory
from megatron_mm.training.same_run import check_same_run
from megatron_mm.training.upcycling import check_upcycling
from tests.parallel.recipes import MOE
from tests.parallel.test_checkpoints import EP2_TP2, SCRIPT, TP2_PP2, train
from tests.ranks import ROOT, run_ranks
from tests.tiny import tiny_run, tool

FFN = "language_model.decoder.layers.{}.mlp.{}linear_fc{}.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dense run of two steps in TP2·PP2, bf16 with fp32 masters."""
    folder = tmp_path_factory.mktemp("dense")
    train(folder, "dense", 4, TP2_PP2, "checkpoint.interval=2", steps=2, precision="bf16")
    return folder


def upcycled(folder: Path, tmp_path: Path, *options: str, to: str = "init") -> Path:
    """The checkpoint with experts; its run's config is TMP/moe.yaml."""
    config = yaml.safe_load((folder / "dense.yaml").read_text())
    config["model"]["decoder"]["moe"] = MOE
    config["parallel"] = EP2_TP2
    config["run_dir"] = str(tmp_path / "moe")
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(config))
    tool(
        "convert_checkpoint.py", "upcycle", "--checkpoint", folder / "dense", "--config", tmp_path / "moe.yaml",
        "--output", tmp_path / to, *options,
    )  # fmt: skip
    return tmp_path / to


def test_weights_and_moments(dense: Path, tmp_path: Path) -> None:
    """Every second layer holds experts; moments shrink with their share of the tokens."""
    before = CheckpointReader(step_directory(dense / "dense" / "checkpoints", 2))
    after = CheckpointReader(upcycled(dense, tmp_path, "--optimizer"))
    assert after.step == 2
    for prefix, factor in (("", 1), ("main/", 1), ("exp_avg/", 1 / 4), ("exp_avg_sq/", 1 / 16)):
        for matrix in (1, 2):
            old, new = FFN.format(1, "", matrix), FFN.format(1, "experts.", matrix)
            assert prefix + old not in after
            wanted = before.tensor(prefix + old) * factor
            experts = after.tensor(prefix + new)
            assert len(experts) == 4
            assert all(torch.equal(expert, wanted) for expert in experts)
            kept = prefix + FFN.format(0, "", matrix)
            assert torch.equal(after.tensor(kept), before.tensor(kept))
        router = after.tensor(prefix + "language_model.decoder.layers.3.mlp.router.weight")
        assert (router.abs().max() > 0) == (prefix in ("", "main/"))
    assert torch.equal(
        after.tensor("main/language_model.decoder.layers.3.mlp.router.weight").bfloat16(),
        after.tensor("language_model.decoder.layers.3.mlp.router.weight"),
    )
    weights = CheckpointReader(upcycled(dense, tmp_path, to="weights"))
    assert weights.step == 0
    assert weights.keys() == list(weights.index["tensors"])


def test_the_run_goes_on_where_the_dense_one_stood(dense: Path, tmp_path: Path) -> None:
    """In another layout, with the optimizer's state: the next loss is the dense run's (in bf16), and it trains."""
    upcycled(dense, tmp_path, "--optimizer", to="moe/checkpoints/step-00000002")
    losses = []
    for config, name in ((tmp_path / "moe.yaml", "moe"), (dense / "dense.yaml", "dense")):
        options = ["training.steps=4", "checkpoint.interval=9", "optimizer.lr=1e-4"]
        run_ranks(4, [SCRIPT, str(config), *options], tmp_path / f"{name}.logs")
        log = (tmp_path / f"{name}.logs" / "rank-0.log").read_text()
        assert "resumed after step 2" in log
        losses.append([float(x) for x in re.findall(r"loss (\S+)", log)])
    assert len(losses[0]) == 2
    assert losses[0][0] == pytest.approx(losses[1][0], rel=2e-3)
    assert losses[0] != losses[1]


def test_logits_equal_the_dense_models(data: Path, tmp_path: Path) -> None:
    """fp32, through transformers; with noise they differ."""
    config = tiny_run(tmp_path, data, training__steps=3, training__validation_interval=0)
    run_ranks(2, ["-m", "megatron_mm.train", "--config", str(config)], tmp_path / "logs")
    sparse = yaml.safe_load(config.read_text())
    sparse["model"]["decoder"]["moe"] = {"num_experts": 4, "topk": 2, "layer_freq": 2}
    (tmp_path / "sparse.yaml").write_text(yaml.safe_dump(sparse))
    models = []
    for name, options in (("dense", None), ("sparse", []), ("noisy", ["--noise", "0.1"])):
        source = tmp_path / "run"
        if options is not None:
            source = tmp_path / f"{name}-checkpoint"
            tool(
                "convert_checkpoint.py", "upcycle", "--checkpoint", tmp_path / "run", "--config",
                tmp_path / "sparse.yaml", "--output", source, *options,
            )  # fmt: skip
        tool("convert_checkpoint.py", "to-hf", "--checkpoint", source, "--output", tmp_path / name)
        models.append(AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32).eval())
    tokens = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense, same, noisy = (model(tokens).logits for model in models)
    assert models[1].config.text_config.num_experts == 4
    torch.testing.assert_close(same, dense, atol=1e-5, rtol=0)
    assert (noisy - dense).abs().max() > 1e-3


def sparse_config(folder: Path, change: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The dense run's with experts, and other fields of some sections."""
    config = yaml.safe_load((folder / "dense.yaml").read_text())
    config["parallel"] = {}
    config["model"]["decoder"]["moe"] = MOE
    for name, fields in change.items():
        section = config["model"]["decoder"] if name == "decoder" else config[name]
        section.update(fields)
    return config


def refused(folder: Path, tmp_path: Path, change: dict[str, dict[str, Any]], *options: str) -> str:
    """The command's error; nothing may be left of it."""
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(sparse_config(folder, change)))
    done = subprocess.run(
        [sys.executable, ROOT / "tools/convert_checkpoint.py", "upcycle", "--checkpoint", folder / "dense",
         "--config", tmp_path / "moe.yaml", "--output", tmp_path / "out", *options],
        capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))
    return done.stderr


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"moe": None}, "model.decoder.moe"),
        ({"hidden_size": 96, "kv_channels": 8}, "model.decoder.hidden_size"),
        ({"moe": {**MOE, "ffn_hidden_size": 64}}, "model.decoder.moe.ffn_hidden_size"),
    ],
)
def test_another_model_is_refused(dense: Path, tmp_path: Path, change: dict[str, Any], where: str) -> None:
    assert where in refused(dense, tmp_path, {"decoder": change})


@pytest.mark.parametrize("noise", ["nan", "-0.1"])
def test_noise_is_a_number(dense: Path, tmp_path: Path, noise: str) -> None:
    assert "--noise: out of range" in refused(dense, tmp_path, {}, f"--noise={noise}")


def test_the_command_refuses_other_samples(dense: Path, tmp_path: Path) -> None:
    text = refused(dense, tmp_path, {"training": {"global_batch_size": 16}}, "--optimizer")
    assert "training.global_batch_size: differs from the dense run" in text
    assert "leave out --optimizer" in text


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("training", "global_batch_size", 16),
        ("training", "seed", 5),
        ("data", "seq_length", 64),
        ("data", "max_images", 2),
        ("data", "block_attention", False),
        ("data", "sources", [{"path": "none", "weight": 1}, {"path": "more", "weight": 1}]),
    ],
)
def test_the_optimizers_state_goes_on_with_the_same_samples(
    dense: Path, section: str, field: str, value: object
) -> None:
    """Weights alone go into any run."""
    before = CheckpointReader(step_directory(dense / "dense" / "checkpoints", 2)).config
    check_upcycling(before, config_from_dict(sparse_config(dense, {})), with_optimizer=True)
    other = config_from_dict(sparse_config(dense, {section: {field: value}}))
    check_upcycling(before, other)
    with pytest.raises(UserError) as caught:
        check_upcycling(before, other, with_optimizer=True)
    assert caught.value.where == f"{section}.{field}"


def test_a_frozen_part_has_no_state_to_go_on_with(dense: Path) -> None:
    free = CheckpointReader(step_directory(dense / "dense" / "checkpoints", 2)).config
    frozen = replace(free, training=replace(free.training, frozen=("vision",)))
    check_same_run(free, frozen, fault="differs", do="keep it")
    with pytest.raises(UserError, match=r"training\.frozen: differs: a part that was frozen"):
        check_same_run(frozen, free, fault="differs", do="keep it")


def test_into_another_precision(tmp_path: Path) -> None:
    """A dense run in fp32, with the optimizer's state into a sparse one in bf16, whose masters are those weights."""
    train(tmp_path, "dense", 1, {}, "checkpoint.interval=2", steps=2)
    upcycled(tmp_path, tmp_path, "--optimizer", to="moe/checkpoints/step-00000002")
    options = ["training.precision=bf16", f"--save-to={tmp_path / 'copy'}"]
    log = run_ranks(4, [SCRIPT, str(tmp_path / "moe.yaml"), *options], tmp_path / "logs")
    assert "resumed after step 2" in log
    dense = CheckpointReader(step_directory(tmp_path / "dense" / "checkpoints", 2))
    sparse = CheckpointReader(step_directory(tmp_path / "copy", 2))
    for matrix in (1, 2):
        wanted = dense.tensor(FFN.format(1, "", matrix))
        assert all(torch.equal(e, wanted) for e in sparse.tensor("main/" + FFN.format(1, "experts.", matrix)))
        assert all(torch.equal(e, wanted.bfloat16()) for e in sparse.tensor(FFN.format(1, "experts.", matrix)))
