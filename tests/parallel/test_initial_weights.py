"""`checkpoint.init_from`: weights and masters bit for bit, in any layout, precision and resolution."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText

import megatron_mm.hf  # noqa: F401 (registers the classes)
from megatron_mm.training.checkpoint_files import CheckpointReader, step_directory, write_tensors
from tests.parallel.recipes import write_config
from tests.parallel.test_checkpoints import EP2_TP2, SCRIPT, TP2_PP2, tensors, train
from tests.ranks import ROOT, logs, run_ranks, start_ranks, wait_ranks
from tests.tiny import tiny_run, tool

START = str(ROOT / "tests/parallel/start_from.py")
ENCODER, CONNECTOR = "vision.position_embeddings.weight", "connector.position_embedding"
SPLIT_ENCODER = {"tensor_model_parallel_size": 2, "vision_tensor_parallel": True, "sequence_parallel": True}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of runs of two steps: precision → folder. Images of 40 pixels, a grid of 5."""
    folder = tmp_path_factory.mktemp("sources")
    fp32 = train(folder, "fp32", 4, TP2_PP2, "checkpoint.interval=2", steps=2)
    bf16 = train(folder, "bf16", 4, EP2_TP2, "checkpoint.interval=2", moe=True, steps=2, precision="bf16")
    return {"fp32": step_directory(fp32, 2), "bf16": step_directory(bf16, 2)}


def start(tmp_path: Path, world: int, parallel: dict, *overrides: str, moe: bool = False, **training: object) -> str:
    """Rank 0's log; TMP/new holds the checkpoint at step 0."""
    config = write_config(tmp_path / "new.yaml", tmp_path / "new", parallel, moe, **training)
    return run_ranks(world, [START, str(config), *overrides], tmp_path / "new.logs")


def begun(tmp_path: Path) -> dict[str, Tensor]:
    return tensors(step_directory(tmp_path / "new" / "checkpoints", 0))


def most_digits(directory: Path) -> dict[str, Tensor]:
    """Weights by name, in fp32: masters where there are."""
    reader = CheckpointReader(directory)
    best = {n: reader.tensor(f"main/{n}" if f"main/{n}" in reader else n) for n in list(reader.keys())}
    assert all(t.dtype == torch.float32 for t in best.values())
    return best


@pytest.mark.parametrize(
    ("source", "precision", "world", "parallel"),
    [
        ("fp32", "fp32", 2, {}),
        ("fp32", "bf16", 2, {"tensor_model_parallel_size": 2}),
        ("bf16", "bf16", 2, {"expert_model_parallel_size": 2}),
        ("bf16", "bf16", 1, {"distributed_optimizer": False}),
        ("bf16", "fp32", 2, {"pipeline_model_parallel_size": 2}),
    ],
)
def test_bit_equal(
    sources: dict[str, Path], tmp_path: Path, source: str, precision: str, world: int, parallel: dict
) -> None:
    """Nothing of what the source holds is lost, and nothing but the weights comes along."""
    log = start(
        tmp_path, world, parallel, f"checkpoint.init_from=[{sources[source]}]", moe=source == "bf16",
        precision=precision,
    )  # fmt: skip
    assert f"weights from {sources[source]}; 0 tensors start at random\n" in log
    wanted, found = most_digits(sources[source]), begun(tmp_path)
    rounded = {n: t.bfloat16() for n, t in wanted.items()}
    assert any((rounded[n].float() - t).abs().max() > 1e-4 for n, t in wanted.items())  # there are digits to lose
    assert {n for n in found if "/" not in n} == wanted.keys()
    for name, value in wanted.items():
        if precision == "fp32":
            assert torch.equal(found[name], value), name
        else:
            assert torch.equal(found[f"main/{name}"], value), name
            assert torch.equal(found[name], rounded[name]), name
        assert not found[f"exp_avg/{name}"].any()
        assert not found[f"exp_avg_sq/{name}"].any()
    assert any(n.startswith("main/") for n in found) == (precision == "bf16")


def at_grid(positions: Tensor, old: int, new: int) -> Tensor:
    """[old², h] → [new², h], as transformers interpolates them."""
    square = positions.view(1, old, old, -1).permute(0, 3, 1, 2)
    scaled = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
    return scaled.permute(0, 2, 3, 1).reshape(new * new, -1)


@pytest.mark.parametrize(
    ("source", "precision", "world", "parallel", "size"),
    [
        ("fp32", "fp32", 1, {}, 56),
        ("fp32", "bf16", 4, TP2_PP2, 24),
        ("bf16", "bf16", 2, {"distributed_optimizer": False}, 56),
        ("bf16", "bf16", 2, SPLIT_ENCODER, 56),
    ],
)
def test_another_resolution(
    sources: dict[str, Path], tmp_path: Path, source: str, precision: str, world: int, parallel: dict, size: int
) -> None:
    """Positions of encoder and connector are interpolated, in fp32 and from masters; all else is bit-equal."""
    overrides = [f"checkpoint.init_from=[{sources[source]}]", f"model.vision.image_size={size}"]
    if parallel == SPLIT_ENCODER:
        overrides.append("model.vision.num_attention_heads=2")  # of the same shapes as three
    log = start(tmp_path, world, parallel, *overrides, moe=source == "bf16", precision=precision)
    weights = most_digits(sources[source])
    new = size // 8
    for name in (ENCODER, CONNECTOR):
        assert f"{name} interpolated from a grid of 5 × 5 to {new} × {new}" in log
    wanted = dict(weights)
    wanted[ENCODER] = torch.cat([weights[ENCODER][:1], at_grid(weights[ENCODER][1:], 5, new)])
    wanted[CONNECTOR] = at_grid(weights[CONNECTOR][0], 5, new)[None]
    found = begun(tmp_path)
    for name, value in wanted.items():
        if precision == "bf16":
            assert torch.equal(found[f"main/{name}"], value), name
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def test_parts_of_several_checkpoints(sources: dict[str, Path], tmp_path: Path) -> None:
    """The last that holds a name wins; what is missing is counted over all ranks, once a tensor."""
    reader = CheckpointReader(sources["bf16"])
    names = list(reader.keys())
    first = {n: torch.full_like(reader.tensor(n), 2.0) for n in names if n.startswith("vision.")}
    second = {n: reader.tensor(n) for n in names if "layernorm" in n or n == ENCODER}
    for name, part in (("a", first), ("b", second)):
        write_tensors(tmp_path / name, reader.config, part)
    overrides = f"checkpoint.init_from=[{tmp_path / 'a'}, {tmp_path / 'b'}]"
    log = start(tmp_path, 2, {"pipeline_model_parallel_size": 2}, overrides, moe=True)
    missing = set(names) - first.keys() - second.keys()
    assert any(".experts." in n for n in missing)
    assert f"; {len(missing)} tensors start at random" in log
    found = begun(tmp_path)
    for name, value in (first | second).items():
        assert torch.equal(found[name], value.float()), name
    shutil.rmtree(tmp_path / "new")
    start(tmp_path, 1, {}, moe=True)
    assert all(torch.equal(begun(tmp_path)[name], found[name]) for name in missing)


@pytest.mark.parametrize(
    ("world", "parallel", "moe", "frozen"),
    [(4, EP2_TP2, True, []), (2, {"pipeline_model_parallel_size": 2}, False, ["decoder"])],
    ids=["ep2-tp2", "pp2-frozen-decoder"],
)
def test_drawn_late_is_drawn_alike(tmp_path: Path, world: int, parallel: dict, moe: bool, frozen: list) -> None:
    """Whether weights, and masters after them, are drawn before the optimizer is built, after it, or in part."""
    start(tmp_path, world, parallel, "--drawn-first", moe=moe, precision="bf16", frozen=frozen)
    wanted = begun(tmp_path)
    shutil.rmtree(tmp_path / "new")
    start(tmp_path, world, parallel, moe=moe, precision="bf16", frozen=frozen)
    late = begun(tmp_path)
    weights = {n: t for n, t in wanted.items() if "/" not in n}
    assert any(n.startswith("main/") for n in wanted)
    reader = CheckpointReader(step_directory(tmp_path / "new" / "checkpoints", 0))
    write_tensors(tmp_path / "part", reader.config, {n: t for i, (n, t) in enumerate(weights.items()) if i % 2})
    shutil.rmtree(tmp_path / "new")
    start(tmp_path, world, parallel, f"checkpoint.init_from=[{tmp_path / 'part'}]", moe=moe, precision="bf16",
          frozen=frozen)  # fmt: skip
    part = begun(tmp_path)
    assert wanted.keys() == late.keys() == part.keys()
    assert [n for n, t in wanted.items() if not (torch.equal(late[n], t) and torch.equal(part[n], t))] == []


def test_pixel_shuffle_grows_with_the_grid(tmp_path: Path) -> None:
    """Its weights fit squares of as many patches; with other squares it is refused."""
    kind = "model.connector.kind=pixel_shuffle_mlp"
    start(tmp_path, 1, {}, kind, "model.connector.num_tokens=1")
    shutil.move(tmp_path / "new", tmp_path / "old")
    source = step_directory(tmp_path / "old" / "checkpoints", 0)
    larger = [kind, f"checkpoint.init_from=[{source}]", "model.vision.image_size=80"]
    log = start(tmp_path, 1, {}, *larger, "model.connector.num_tokens=4")
    assert log.count("interpolated") == 1
    before, after = tensors(source), begun(tmp_path)
    different = [n for n, t in before.items() if "/" not in n and not torch.equal(after[n], t)]
    assert different == [ENCODER]
    command = [START, str(tmp_path / "new.yaml"), *larger, "model.connector.num_tokens=1"]
    codes = wait_ranks(start_ranks(1, command, tmp_path / "refused"), tmp_path / "refused", 90)
    assert codes == [2]
    assert "connector.norm.weight: the weights have another shape" in logs(tmp_path / "refused")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model.vision.image_size=56", "model.decoder.ffn_hidden_size=96"], "linear_fc"),
        (["model.vision.family=siglip", "model.vision.image_size=48"], ENCODER),
    ],
)
def test_another_shape_is_refused(sources: dict[str, Path], tmp_path: Path, overrides: list[str], name: str) -> None:
    config = write_config(tmp_path / "new.yaml", tmp_path / "new", {"pipeline_model_parallel_size": 2})
    command = [START, str(config), f"checkpoint.init_from=[{sources['fp32']}]", *overrides]
    codes = wait_ranks(start_ranks(2, command, tmp_path / "logs"), tmp_path / "logs", 90)
    text = logs(tmp_path / "logs")
    assert codes == [2, 2], text
    assert re.search(rf"checkpoint\.init_from: \S+: \S*{re.escape(name)}\S*: the weights have another shape", text), (
        text
    )
    assert "only model.vision.image_size may differ" in text


@torch.no_grad()
def test_a_trained_model_at_another_resolution(data: Path, tmp_path: Path) -> None:
    """Trained at 32 pixels, then 48: the logits are those of transformers' own interpolation, and it trains on."""
    config = tiny_run(tmp_path / "low", data, training__steps=2, training__validation_interval=0)
    run_ranks(1, ["-m", "megatron_mm.train", "--config", str(config)], tmp_path / "low.logs")
    trained = step_directory(tmp_path / "low" / "run" / "checkpoints", 2)
    config = tiny_run(
        tmp_path / "high", data, training__steps=1, training__validation_interval=0, model__vision__image_size=48,
        checkpoint__init_from=[str(trained)], parallel={"pipeline_model_parallel_size": 2},
    )  # fmt: skip
    run_ranks(2, [START, str(config), f"run_dir={tmp_path / 'high' / 'start'}"], tmp_path / "start.logs")
    for run, name in (("low/run", "low"), ("high/start", "high")):
        tool("convert_checkpoint.py", "to-hf", "--checkpoint", tmp_path / run, "--output", tmp_path / f"{name}-hf")
    low, high = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / f"{name}-hf", dtype=torch.float32).eval()
        for name in ("low", "high")
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 48, 48, generator=generator)
    tokens = torch.randint(5, 300, (3, 30), generator=generator)
    tokens[:, 4:8] = low.config.image_token_id
    found = high(input_ids=tokens, pixel_values=pixels).logits
    features = low.model.vision_tower(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    assert features.shape[1] == 36
    module = low.model.connector
    module.grid = 6
    module.position_embedding = torch.nn.Parameter(at_grid(module.position_embedding[0], 4, 6)[None])
    embeddings = low.get_input_embeddings()(tokens)
    embeddings[:, 4:8] = module(features)
    wanted = low(inputs_embeds=embeddings).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)

    log = run_ranks(2, ["-m", "megatron_mm.train", "--config", str(config)], tmp_path / "high.logs")
    assert f"{ENCODER} interpolated from a grid of 4 × 4 to 6 × 6" in log
    assert f"{CONNECTOR} interpolated from a grid of 4 × 4 to 6 × 6" in log
    assert "; 0 tensors start at random" in log
    assert "finished after step 1" in log


def test_learning_rates_of_the_parts(tmp_path: Path) -> None:
    """`vision_lr_scale` slows the encoder by that factor, in its groups and in what a step does; nothing else."""
    rates = ["optimizer.lr=2e-3", "optimizer.connector_lr=5e-4", "optimizer.warmup_steps=4"]
    log = start(
        tmp_path, 1, {"distributed_optimizer": False}, *rates, "optimizer.vision_lr_scale=0.25"
    )  # fmt: skip
    line = next(row for row in log.splitlines() if row.startswith("rates "))
    found = json.loads(line.removeprefix("rates "))
    first = begun(tmp_path)
    assert found.keys() == {n for n in first if "/" not in n}
    for name, rate in found.items():
        peak = {"vision": 0.25 * 2e-3, "connector": 5e-4, "language_model": 2e-3}[name.split(".")[0]]
        assert rate == pytest.approx(peak / 4), name  # of four warm-up steps the first
    moved = []
    for scale in (1.0, 0.25):
        name = f"scale{scale}"
        root = train(tmp_path, name, 2, {}, *rates, f"optimizer.vision_lr_scale={scale}", "checkpoint.interval=1")
        after = tensors(step_directory(root, 1))
        moved.append({n: after[n] - first[n] for n in found})
    for name, whole in moved[0].items():
        assert whole.norm() > 0, name
        if name.startswith("vision."):
            assert (moved[1][name] - 0.25 * whole).norm() <= 1e-3 * whole.norm(), name
        else:
            assert torch.equal(moved[1][name], whole), name


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_goes_on_in_another_precision(sources: dict[str, Path], tmp_path: Path, before: str, after: str) -> None:
    """Masters come from fp32 weights, fp32 weights from masters; the moments stay: no digit is lost."""
    config = sources[before].parents[1].with_suffix(".yaml")
    copy = tmp_path / "copy"
    options = [f"training.precision={after}", f"--save-to={copy}"]
    if before == "bf16":
        options += ["parallel.expert_model_parallel_size=1", "parallel.tensor_model_parallel_size=1",
                    "parallel.sequence_parallel=false"]  # fmt: skip
    log = run_ranks(2 if before == "bf16" else 4, [SCRIPT, str(config), *options], tmp_path / "logs")
    assert "resumed after step 2" in log
    wanted, old, new = most_digits(sources[before]), tensors(sources[before]), tensors(step_directory(copy, 2))
    for name, value in wanted.items():
        assert torch.equal(new[name], value.to(new[name].dtype)), name
        assert new[name].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[after]
        if after == "bf16":
            assert torch.equal(new[f"main/{name}"], value), name
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(new[f"{kind}/{name}"], old[f"{kind}/{name}"]), name
    assert any(n.startswith("main/") for n in new) == (after == "bf16")
