"""Both ends of the supported range of Megatron-Core: the same gradients, the same training, and checkpoints that either
reads. (`make test-newest-megatron` runs the layouts themselves with the newest.)

The oldest is the environment's own; the newest lies in a folder of the environment that goes first on PYTHONPATH.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from megatron_mm.training.checkpoint_files import step_directory
from tests.parallel.one_step import VARIANTS
from tests.parallel.recipes import write_config
from tests.parallel.test_checkpoints import SCRIPT, same, train
from tests.parallel.test_layouts import Layout, assemble, run
from tests.ranks import run_ranks

EP2 = {"expert_model_parallel_size": 2}
BOTH_WAYS = [("oldest", "newest"), ("newest", "oldest")]


class Releases:
    """Chooses what the ranks import that are started from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp: Path) -> None:
        folders = list(Path(sys.prefix).glob("megatron-core-*"))
        assert len(folders) == 1, f"`make test` installs a second Megatron-Core into {sys.prefix}; found: {folders}"
        self.path = {"oldest": "", "newest": str(folders[0])}
        self.monkeypatch = monkeypatch
        version = ["-c", "from importlib.metadata import version; print(version('megatron-core'))"]
        found = []
        for name in self.path:
            self.use(name)
            found.append(run_ranks(1, version, tmp / f"{name}-version").strip())
        assert found == ["0.16.1", folders[0].name.removeprefix("megatron-core-")]

    def use(self, name: str) -> None:
        self.monkeypatch.setenv("PYTHONPATH", self.path[name])


@pytest.fixture
def releases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Releases:
    return Releases(monkeypatch, tmp_path)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_gradients_are_the_same(moe: bool, releases: Releases, tmp_path: Path) -> None:
    out = {}
    for name in releases.path:
        releases.use(name)
        out[name] = run(tmp_path / name, Layout(1, {}, 0.0, moe))
    for variant in VARIANTS:
        expected, found = (assemble(out[name], variant) for name in ("oldest", "newest"))
        assert expected.keys() == found.keys()
        worst = {n: (found[n] - g).norm().item() / (g.norm().item() or 1.0) for n, g in expected.items()}
        largest = max(worst, key=worst.__getitem__)
        print(f"{variant}: {worst[largest]:.2e} at {largest}")
        assert worst[largest] <= 1e-6, largest
        reference, record = (json.loads((out[n] / f"{variant}.json").read_text()) for n in ("oldest", "newest"))
        assert record.keys() == reference.keys()
        for figure in reference:
            assert record[figure] == pytest.approx(reference[figure], rel=1e-6), figure


@pytest.mark.parametrize(("before", "after"), BOTH_WAYS, ids=["upgrade", "downgrade"])
def test_a_run_goes_on_with_the_other_release(before: str, after: str, releases: Releases, tmp_path: Path) -> None:
    """Bit-identical to the run that kept its release; and read into another layout, bit for bit."""
    releases.use(before)
    every2 = ("checkpoint.interval=2", "checkpoint.keep=0")
    kept = train(tmp_path, "kept", 2, EP2, *every2, moe=True, steps=4, precision="bf16")
    shutil.copytree(tmp_path / "kept", tmp_path / "moved")
    shutil.rmtree(step_directory(tmp_path / "moved" / "checkpoints", 4))
    releases.use(after)
    copy = tmp_path / "copy"
    config = write_config(tmp_path / "copy.yaml", tmp_path / "moved", {}, moe=True, steps=2, precision="bf16")
    run_ranks(1, [SCRIPT, str(config), f"--save-to={copy}"], tmp_path / "copy.logs")
    same(step_directory(kept, 2), step_directory(copy, 2))
    moved = train(tmp_path, "moved", 2, EP2, *every2, moe=True, steps=4, precision="bf16")
    lines = (tmp_path / "moved.logs" / "rank-0.log").read_text().splitlines()
    assert [line.split(" loss")[0] for line in lines] == ["resumed after step 2", "step 3", "step 4"], "and no noise"
    same(step_directory(kept, 4), step_directory(moved, 4))
