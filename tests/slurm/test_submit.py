"""slurm/submit.py up to the point where sbatch would be called: the script that it writes, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ranks import ROOT, rank_environment
from tests.tiny import tiny_run

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run whose data is only named: submit.py looks for the files, not into them."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("tokenizer.model", "captions.manifest.json", "pages.manifest.json", "words.manifest.json"):
        (data / name).touch()
    return tiny_run(tmp_path, data)


def submit(config: Path, *options: str | Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "slurm" / "submit.py", "--config", config, *options]
    env = rank_environment(PATH=os.environ["PATH"] if path is None else path)
    return subprocess.run(
        [str(word) for word in command], cwd=config.parent, env=env, capture_output=True, text=True, timeout=180
    )


def profile(tmp_path: Path, **fields: object) -> Path:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize(
    ("golden", "options"),
    [
        ("defaults", ["--nodes", "2"]),
        ("cpu", ["--nodes", "2", "--profile", "cpu.yaml", "--time", "30", "--partition", "debug", "training.steps=9"]),
        ("gpu8", ["--nodes", "1", "--profile", "gpu8.yaml", "training.micro_batch_size=1", "--max-restarts", "3"]),
        ("gpu8-container", ["--nodes", "1", "--profile", "gpu8-container.yaml", "training.micro_batch_size=1"]),
    ],
)
def test_golden_script(config: Path, golden: str, options: list[str]) -> None:
    before = sorted(config.parent.rglob("*"))
    options = [str(ROOT / "slurm" / "profiles" / o) if o.endswith(".yaml") else o for o in options]
    done = submit(config, *options, "--dry-run", path="")  # no sbatch in reach
    assert done.returncode == 0, done.stderr
    script = done.stdout.replace(str(config.parent), "/RUNS").replace(sys.executable, "/VENV/bin/python")
    assert script == (GOLDEN / f"{golden}.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, timeout=10).returncode == 0
    assert sorted(config.parent.rglob("*")) == before  # a dry run writes nothing


def test_every_profile_that_is_shipped_has_its_golden_script() -> None:
    shipped = {p.stem for p in (ROOT / "slurm" / "profiles").iterdir()}
    assert shipped == {p.stem for p in GOLDEN.iterdir()} - {"defaults"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "0"], ["--nodes", "1 or more"]),
        (["--nodes", "3"], ["training.global_batch_size", "3 data-parallel ranks"]),
        (["--nodes", "3", "parallel.tensor_model_parallel_size=2"], ["parallel", "3 ranks", "multiples of 2"]),
        (["--nodes", "2", "training.stepz=3"], ["training.stepz", "unknown field"]),
        (["--nodes", "2", "training.fp8=delayed", "training.precision=fp32"], ["training.fp8", "goes with bf16"]),
        (["--nodes", "2", "data.tokenizer=nowhere.model"], ["data.tokenizer", "nowhere.model", "no such file"]),
        (["--nodes", "2", "data.sources.1.path=gone"], ["data.sources.1.path", "gone.manifest.json"]),
        (["--nodes", "2", "run_dir=a run"], ["run_dir", "a run", "letters, digits"]),
        (["--nodes", "2", "--time", "4h"], ["time", "'4h'", "hours:minutes:seconds"]),
        (["--nodes", "2", "--time", "4:00"], ["time", "4:00", "signal_seconds (300"]),
        (["--nodes", "2", "--gpus-per-node", "-1"], ["gpus_per_node", "-1"]),
        (["--nodes", "2", "--partition", "a b"], ["partition", "'a b'"]),
        (["--nodes", "2", "--max-restarts", "-1"], ["max_restarts", "0 or more"]),
        (["--nodes", "2", "--profile", "gone.yaml"], ["gone.yaml", "--profile"]),
    ],
)
def test_bad_input_is_one_clear_error(config: Path, options: list[str], words: list[str]) -> None:
    refused(config, options, words)


def test_sources_in_object_storage_are_left_to_the_job(config: Path) -> None:
    done = submit(config, "--nodes", "2", "--dry-run", "data.sources.0.path=s3://bucket/data/captions", path="")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"partitoin": "gpu"}, ["partitoin", "unknown field", "partition"]),
        ({"time": 86400}, ["time", "86400", "quotes"]),  # what YAML makes of 24:00:00 without quotes
        ({"max_restarts": "many"}, ["max_restarts", "'many'"]),
        ({"gpus_per_node": 4, "tasks_per_node": 2}, ["tasks_per_node", "one GPU"]),
        ({"container_mounts": ["/a:/a"]}, ["container_mounts", "container_image"]),
        ({"environment": {"A B": "1"}}, ["environment", "'A B'"]),
        ({"srun_options": ["verbose"]}, ["srun_options", "'verbose'"]),
        ({"signal_seconds": 70000, "time": "2-0"}, ["signal_seconds", "65535"]),
    ],
)
def test_bad_profiles_are_one_clear_error(config: Path, fields: dict[str, object], words: list[str]) -> None:
    refused(config, ["--nodes", "2", "--profile", str(profile(config.parent, **fields))], words)


def test_a_profile_that_is_no_mapping(config: Path) -> None:
    path = config.parent / "profile.yaml"
    path.write_text("- time: 30\n")
    refused(config, ["--nodes", "2", "--profile", str(path)], ["profile.yaml", "mapping"])
    path.write_text("time: '30\n")
    refused(config, ["--nodes", "2", "--profile", str(path)], ["profile.yaml", "YAML"])


def test_without_sbatch(config: Path) -> None:
    refused(config, ["--nodes", "2"], ["sbatch", "login node", "--dry-run"], path="")


def refused(config: Path, options: list[str], words: list[str], path: str | None = None) -> None:
    before = sorted(config.parent.rglob("*"))
    done = submit(config, *options, path=path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [w for w in words if w not in done.stderr] == [], done.stderr
    assert sorted(config.parent.rglob("*")) == before  # nothing is left in the way


@pytest.mark.parametrize("time", ["6", "5:01", "0:5:1", "0-1", "0-0:6", "0-0:5:1", "7-00:00:00"])
def test_time_formats_of_slurm(config: Path, time: str) -> None:
    done = submit(config, "--nodes", "2", "--time", time, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"#SBATCH --time={time}\n" in done.stdout
