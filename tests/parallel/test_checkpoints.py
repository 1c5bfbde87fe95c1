"""Invariants I4 and decision 11 on real ranks: exact resume, any layout to any other, whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mm.training.checkpoint_files import CheckpointReader, complete, latest, step_directory
from tests.parallel.recipes import write_config
from tests.ranks import ROOT, kill_ranks, logs, run_ranks, start_ranks, wait_ranks

SCRIPT = str(ROOT / "tests/parallel/some_steps.py")
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
EP2_TP2 = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True}


EXPERT_TP1 = {**EP2_TP2, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
CP2 = {"context_parallel_size": 2}
VIRTUAL = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


def train(
    tmp: Path, name: str, world: int, parallel: dict, *overrides: str, moe: bool = False, **training: object
) -> Path:
    """Run some_steps.py on run_dir TMP/NAME; answers with its checkpoints folder."""
    config = write_config(tmp / f"{name}.yaml", tmp / name, parallel, moe, **training)
    run_ranks(world, [SCRIPT, str(config), *overrides], tmp / f"{name}.logs")
    return tmp / name / "checkpoints"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(directory)
    return {name: reader.tensor(name) for name in reader.index["tensors"]}


def same(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    different = [n for n in first if not torch.equal(first[n], second[n])]
    assert not different, different


@pytest.mark.parametrize(
    ("world", "parallel", "moe", "precision"),
    [
        (2, {}, False, "fp32"),
        (2, {"distributed_optimizer": False}, False, "bf16"),
        (4, EP2_TP2, True, "bf16"),
        (2, VIRTUAL, False, "bf16"),
        (2, CP2, False, "bf16"),
    ],
    ids=["dp2", "dp2-bf16-no-distributed-optimizer", "ep2-tp2-bf16", "virtual-stages-frozen-encoder", "cp2-bf16"],
)
def test_resume_is_bit_identical(
    tmp_path: Path, world: int, parallel: dict, moe: bool, precision: str, request: pytest.FixtureRequest
) -> None:
    frozen = {"frozen": ["vision"]} if "frozen" in request.node.callspec.id else {}
    whole = train(
        tmp_path, "whole", world, parallel, "checkpoint.interval=4", moe=moe, steps=4, precision=precision, **frozen
    )
    parts = train(
        tmp_path,
        "parts",
        world,
        parallel,
        "checkpoint.interval=2",
        "checkpoint.keep=0",
        moe=moe,
        steps=4,
        precision=precision,
        **frozen,
    )
    shutil.rmtree(step_directory(parts, 4))  # as if the run had died after step 2
    train(tmp_path, "parts", world, parallel, "checkpoint.interval=2", moe=moe, steps=4, precision=precision, **frozen)
    assert "resumed after step 2" in (tmp_path / "parts.logs" / "rank-0.log").read_text()
    same(step_directory(whole, 4), step_directory(parts, 4))
    if frozen:  # it neither moved nor has it moments
        first, last = tensors(step_directory(parts, 2)), tensors(step_directory(parts, 4))
        vision = [name for name in first if "vision." in name]
        assert vision
        assert all(name.startswith("vision.") and torch.equal(first[name], last[name]) for name in vision)
        assert not torch.equal(first["connector.fc1.weight"], last["connector.fc1.weight"])


@pytest.mark.parametrize(
    ("moe", "layouts"),
    [
        (False, [(4, TP2_PP2), (1, {"distributed_optimizer": False}), (2, {})]),
        (True, [(4, EP2_TP2), (1, {}), (2, {**CP2, "expert_model_parallel_size": 2})]),
        (True, [(4, EXPERT_TP1), (2, VIRTUAL)]),
    ],
    ids=["dense", "experts", "virtual-stages"],
)
def test_any_layout_reads_any_other(tmp_path: Path, moe: bool, layouts: list) -> None:
    """A state trained in the first layout passes through the others: parameters and moments stay bit-equal."""
    world, parallel = layouts[0]
    origin = train(tmp_path, "origin", world, parallel, "checkpoint.interval=2", moe=moe, steps=2, precision="bf16")
    for i, (world, parallel) in enumerate(layouts[1:]):
        copy = tmp_path / f"copy{i}" / "checkpoints"
        config = write_config(tmp_path / f"copy{i}.yaml", origin.parent, parallel, moe, steps=2, precision="bf16")
        run_ranks(world, [SCRIPT, str(config), f"--save-to={copy}"], tmp_path / f"copy{i}.logs")
        same(step_directory(origin, 2), step_directory(copy, 2))


def test_training_goes_on_in_another_layout(tmp_path: Path) -> None:
    """Equal within I2's bound to the run that kept its layout."""
    stayed = train(tmp_path, "stayed", 1, {}, "checkpoint.interval=2", "checkpoint.keep=0", steps=4)
    shutil.copytree(tmp_path / "stayed", tmp_path / "moved")
    shutil.rmtree(step_directory(tmp_path / "moved" / "checkpoints", 4))
    moved = train(tmp_path, "moved", 4, TP2_PP2, "checkpoint.interval=2", steps=4)
    first, second = tensors(step_directory(stayed, 4)), tensors(step_directory(moved, 4))
    start = tensors(step_directory(stayed, 2))
    for name, expected in first.items():
        moved_by = (expected - start[name]).norm()
        assert (second[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-3 * moved_by, name


def test_kill_while_writing_leaves_the_last_whole_one(tmp_path: Path) -> None:
    """kill -9 inside a checkpoint: the unfinished folder is not taken for a checkpoint, and goes away by itself."""
    train(tmp_path, "run", 2, {}, "checkpoint.interval=2", steps=2)
    root = tmp_path / "run" / "checkpoints"
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", {}, steps=400)
    log_dir = tmp_path / "killed.logs"
    ranks = start_ranks(2, [SCRIPT, str(config), "checkpoint.interval=1"], log_dir)
    while not list(root.glob("step-*.tmp")):
        assert all(r.poll() is None for r in ranks), logs(log_dir)
    kill_ranks(ranks)
    newest = latest(root)
    assert newest is not None
    (root / "step-00000399.tmp").mkdir(exist_ok=True)
    step = CheckpointReader(newest).step
    train(tmp_path, "run", 2, {}, "checkpoint.interval=1", steps=step + 1)
    assert f"resumed after step {step}" in (tmp_path / "run.logs" / "rank-0.log").read_text()
    assert not list(root.glob("*.tmp")), "leftovers are removed by the next save"


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    root = train(tmp_path, "run", 2, {}, "checkpoint.interval=1", "checkpoint.keep=3", steps=3)
    cut, flipped = step_directory(root, 3), step_directory(root, 2)
    file = cut / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert latest(root) == flipped
    file = flipped / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    shutil.rmtree(tmp_path / "run.logs")
    train(tmp_path, "run", 2, {}, "checkpoint.interval=9", steps=1)
    text = logs(tmp_path / "run.logs")
    assert "resumed after step 1" in text
    assert "bytes, expected" in text
    assert "digest differs" in text


def fail(tmp_path: Path, name: str, world: int, config: Path, *overrides: str) -> str:
    log_dir = tmp_path / f"{name}.logs"
    codes = wait_ranks(start_ranks(world, [SCRIPT, str(config), *overrides], log_dir), log_dir, 90)
    assert codes == [2] * world, logs(log_dir)
    return (log_dir / "rank-0.log").read_text()


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    train(tmp_path, "run", 1, {}, "checkpoint.interval=1", steps=1)
    text = fail(tmp_path, "other", 1, tmp_path / "run.yaml", "training.seed=5")
    assert "training.seed: differs from the run that this folder holds" in text
    assert "found:   5" in text
    assert "allowed: 0" in text


def test_no_space_for_a_checkpoint(tmp_path: Path) -> None:
    """A write that fails (here: over the file-size limit) ends in one error; the older checkpoint stays."""
    root = train(tmp_path, "run", 2, {}, "checkpoint.interval=1", steps=1)
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    log_dir = tmp_path / "full.logs"
    command = [str(script), SCRIPT, str(tmp_path / "run.yaml"), "training.steps=2", "checkpoint.interval=1"]
    codes = wait_ranks(start_ranks(2, command, log_dir), log_dir, 90)
    text = logs(log_dir)
    assert codes == [2, 2], text
    assert "the checkpoint could not be written" in text
    assert "earlier checkpoints are untouched" in text
    assert [d.name for d in complete(root)] == ["step-00000001"]
    assert not list(root.glob("*.tmp"))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """Invariant I7 on a checkpoint: safetensors, JSON, YAML and the tokenizer's own file are all there is."""
    root = train(tmp_path, "run", 2, {}, "checkpoint.interval=1", steps=1)
    names = {f.name for f in step_directory(root, 1).iterdir()}
    assert names == {"index.json", "config.yaml", "tokenizer.model", "rank-00000.safetensors", "rank-00001.safetensors"}
    index = json.loads((step_directory(root, 1) / "index.json").read_text())
    for entry in index["tensors"].values():
        assert {b["file"] for b in entry["boxes"]} <= set(index["files"])
