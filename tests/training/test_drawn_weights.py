"""The training command draws the initial weights that no checkpoint gives, and no others: large models take minutes."""

import shutil
from pathlib import Path

import pytest

from megatron_mm.training.checkpoint_files import CheckpointReader, step_directory, write_tensors
from tests.ranks import ROOT, run_ranks
from tests.tiny import tiny_run
from tests.training.test_train_command import assert_same_end, losses

SCRIPT = str(ROOT / "tests/training/train_telling_draws.py")


def run(config: Path, log_dir: Path, *overrides: str) -> tuple[list[str], str]:
    """What rank 0 of two has drawn, and its log."""
    text = run_ranks(2, [SCRIPT, "--config", str(config), *overrides], log_dir)
    return [line.removeprefix("drawn: ") for line in text.splitlines() if line.startswith("drawn: ")], text


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of four steps, undisturbed, and what it drew."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_run(folder, data, training__steps=4, training__validation_interval=0, checkpoint__interval=1,
                      checkpoint__keep=0, training__precision="bf16")  # fmt: skip
    return config, run(config, folder / "logs")[0]


def checkpoint(config: Path, step: int) -> Path:
    return step_directory(config.parent / "run" / "checkpoints", step)


def matrices(config: Path) -> set[str]:
    reader = CheckpointReader(checkpoint(config, 4))
    return {n for n in reader.index["tensors"] if "/" not in n and len(reader.shape(n)) > 1}


def test_a_new_run_draws_every_matrix_once(whole: tuple[Path, list[str]]) -> None:
    config, drawn = whole
    assert sorted(drawn) == sorted({n if not n.startswith("connector.") else "connector" for n in matrices(config)})


@pytest.mark.parametrize(
    ("damaged", "resumed"), [([], 2), ([2], 1), ([1, 2], 0)], ids=["sound", "newest-damaged", "all-damaged"]
)
def test_a_resume_draws_nothing(
    whole: tuple[Path, list[str]], tmp_path: Path, damaged: list[int], resumed: int
) -> None:
    """From whichever checkpoint; without a whole one the run starts anew. It ends as the undisturbed one."""
    config, everything = whole
    shutil.copytree(config.parent / "run", tmp_path / "run")
    own = tmp_path / "config.yaml"
    own.write_text(config.read_text().replace(str(config.parent / "run"), str(tmp_path / "run")))
    for step in (3, 4):
        shutil.rmtree(checkpoint(own, step))
    for step in damaged:
        file = checkpoint(own, step) / "rank-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    drawn, text = run(own, tmp_path / "logs")
    assert drawn == ([] if resumed else everything)
    assert text.count("is damaged and is passed over") == len(damaged)
    assert (f"resumed after step {resumed}\n" in text) == bool(resumed)
    assert_same_end(own, config, 4)
    assert losses(own) == losses(config)


def test_weights_of_other_checkpoints_are_not_drawn(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    config, everything = whole
    given = CheckpointReader(checkpoint(config, 4))
    new = [f"run_dir={tmp_path / 'new'}", "training.steps=1"]
    drawn, text = run(config, tmp_path / "logs", *new, f"checkpoint.init_from=[{given.directory}]")
    assert drawn == []
    assert "; 0 tensors start at random" in text
    names = [n for n in list(given.keys()) if n.startswith("vision.")]
    write_tensors(tmp_path / "encoder", given.config, {n: given.tensor(n) for n in names})
    shutil.rmtree(tmp_path / "new")
    drawn, text = run(config, tmp_path / "logs2", *new, f"checkpoint.init_from=[{tmp_path / 'encoder'}]")
    assert drawn == [n for n in everything if not n.startswith("vision.")]
    assert "finished after step 1" in text
