"""Real training in a real Slurm by slurm/submit.py: what ends an attempt, and that the run survives it unchanged."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_mm.training.checkpoint import latest, read_tensors
from tests.ranks import ROOT, run_ranks
from tests.slurm.cluster import SlurmCluster
from tests.tiny import tiny_run

STEPS = 60  # far more than pass between the third step's line in metrics.jsonl and the signal's arrival
# The only checkpoints are the one on request and the last one.
SETTINGS = {"training__steps": STEPS, "checkpoint__interval": 1000, "training__validation_interval": 0}


@dataclass(frozen=True)
class Run:
    """A submitted run, as its owner sees it: a job number and a folder."""

    cluster: SlurmCluster
    job: int
    folder: Path

    def log(self) -> str:
        files = [*sorted(self.folder.glob("slurm/*.out")), *sorted(self.folder.glob("slurm/*/*.out"))]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-30000:]}" for file in files)

    def steps(self) -> list[int]:
        """Training steps in metrics.jsonl, validation lines aside."""
        metrics = self.folder / "metrics.jsonl"
        # A line that is just being written has no end yet.
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n") and '"loss"' in line]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    def outcome(self) -> dict[str, object]:
        return json.loads((self.folder / "outcome.json").read_text())

    def wait_until_trained(self, step: int) -> None:
        def ready() -> bool:
            assert self.cluster.job(self.job)["JobState"] in ("PENDING", "RUNNING"), self.log()
            return max(self.steps(), default=0) >= step

        self.cluster.wait(ready, 120, f"step {step}", self.log)

    def wait_for_state(self, state: str, timeout: float = 120) -> dict[str, str]:
        return self.cluster.wait_for_state(self.job, state, timeout, self.log)


Submit = Callable[[Path], Run]


@pytest.fixture
def submit(cluster: SlurmCluster) -> Submit:
    """Submit CONFIG to two nodes, by the command that users have."""

    def call(config: Path) -> Run:
        profile = config.parent / "profile.yaml"
        profile.write_text("time: '10'\nsignal_seconds: 60\nmemory: 3G\nenvironment: {OMP_NUM_THREADS: '1'}\n")
        command: list[str | Path] = [sys.executable, ROOT / "slurm" / "submit.py", "--config", config, "--nodes", "2"]
        said = cluster.run(*command, "--profile", profile, cwd=config.parent)
        match = re.match(r"job (\d+): 2 nodes × 1 ranks\n", said)
        assert match, said
        return Run(cluster, int(match[1]), config.parent / "run")

    return call


def test_stopped_at_the_time_limit_requeued_resumed_and_the_same_in_the_end(
    cluster: SlurmCluster, submit: Submit, data: Path, tmp_path: Path
) -> None:
    run = submit(tiny_run(tmp_path / "slurm", data, **SETTINGS))
    run.wait_until_trained(3)
    cluster.run("scancel", "--signal=USR1", "--batch", str(run.job))  # what --signal=B:USR1@… does near the limit
    cluster.wait(lambda: cluster.job(run.job)["Restarts"] == "1", 60, "the requeue", run.log)
    (stopped,) = run.checkpoints()
    stopped_at = int(stopped.removeprefix("step-"))
    assert 3 <= stopped_at < STEPS
    assert run.outcome() == {"state": "preempted", "step": stopped_at, "attempt": 0}

    run.wait_for_state("COMPLETED")
    assert run.outcome() == {"state": "finished", "step": STEPS, "attempt": 1}
    assert run.steps() == list(range(1, STEPS + 1))  # none lost, none done twice
    assert f"resumed after step {stopped_at}" in run.log()
    # A folder an attempt, a log a rank; no stop file is left for a later attempt to obey.
    for attempt in (0, 1):
        assert len(list(run.folder.glob(f"slurm/run-{run.job}.{attempt}/rank-000[01].*.out"))) == 2
    assert list(run.folder.glob("stop.*")) == []

    undisturbed = tiny_run(tmp_path / "undisturbed", data, **SETTINGS)
    run_ranks(2, ["-m", "megatron_mm.train", "--config", str(undisturbed)], tmp_path / "undisturbed" / "logs")
    assert_same_tensors(run.folder, tmp_path / "undisturbed" / "run")


def assert_same_tensors(one: Path, other: Path) -> None:
    """Weights and optimizer state of the last checkpoints, bit for bit."""
    directories = [latest(folder / "checkpoints") for folder in (one, other)]
    a, b = (read_tensors(directory) for directory in directories if directory is not None)
    assert sorted(a.keys()) == sorted(b.keys())
    assert len(list(a.keys())) > 30
    different = [key for key in a.keys() if not torch.equal(a.tensor(key), b.tensor(key))]  # noqa: SIM118 (a reader)
    assert different == []


def test_cancelled_it_checkpoints_and_stays_cancelled(
    cluster: SlurmCluster, submit: Submit, data: Path, tmp_path: Path
) -> None:
    """`scancel` signals every process of the job: data-loading workers must outlive it, and nothing be requeued."""
    run = submit(tiny_run(tmp_path, data, **SETTINGS, data__num_workers=1))
    run.wait_until_trained(3)
    cluster.run("scancel", str(run.job))
    run.wait_for_state("CANCELLED")
    cluster.wait(lambda: "Slurm ends it" in run.log(), 60, "the batch script's last word", run.log)
    assert run.outcome()["state"] == "preempted"
    assert run.checkpoints() == [f"step-{run.outcome()['step']:08d}"]
    assert cluster.job(run.job)["Restarts"] == "0"


def test_a_node_is_lost_and_another_takes_its_place(
    cluster: SlurmCluster, submit: Submit, data: Path, tmp_path: Path
) -> None:
    run = submit(tiny_run(tmp_path, data, **SETTINGS | {"checkpoint__interval": 2}))
    run.wait_until_trained(5)
    first, second, spare = cluster.names
    cluster.run("scontrol", "update", f"NodeName={second}", "State=DOWN", "Reason=test")
    cluster.wait(lambda: cluster.job(run.job)["Restarts"] == "1", 90, "Slurm's requeue", run.log)
    run.wait_for_state("COMPLETED")
    assert run.outcome() == {"state": "finished", "step": STEPS, "attempt": 1}
    assert f"job {run.job} on 127.0.0.[{first[-1]},{spare[-1]}]" in run.log()


def test_what_cannot_succeed_is_not_tried_again(submit: Submit, tmp_path: Path, data: Path) -> None:
    """The manifest that submit.py finds is there, but what it says is nonsense: only the ranks find out."""
    broken = tmp_path / "data"
    broken.mkdir()
    for file in data.iterdir():
        (broken / file.name).symlink_to(file)
    (broken / "words.manifest.json").unlink()
    (broken / "words.manifest.json").write_text("{}")
    run = submit(tiny_run(tmp_path, broken, **SETTINGS))
    job = run.wait_for_state("FAILED")
    assert job["Restarts"] == "0"
    assert "failed with no new checkpoint" in run.log()
    assert "words.manifest.json" in run.log()


def test_a_partition_that_does_not_exist(cluster: SlurmCluster, submit: Submit, data: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, data)
    command: list[str | Path] = [sys.executable, ROOT / "slurm" / "submit.py", "--config", config, "--nodes", "2"]
    with pytest.raises(AssertionError, match="exit code 2") as error:
        cluster.run(*command, "--partition", "nowhere", cwd=tmp_path)
    assert "error: sbatch refused the job" in str(error.value)
    assert "invalid partition" in str(error.value)
    assert list((tmp_path / "run").rglob("submit-*")) == []
