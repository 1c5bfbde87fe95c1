"""`python -m megatron_mm.train` as users start it: alone, under launchers, stopped, killed, and wrongly configured."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_mm.training.checkpoint_files import CheckpointReader, complete, step_directory
from tests.ranks import kill_ranks, logs, rank_environment, run_ranks, start_ranks, wait_ranks
from tests.tiny import tiny_run

TRAIN = ["-m", "megatron_mm.train", "--config"]
SIXTY_STEPS = {"training__steps": 60, "training__validation_interval": 0, "checkpoint__interval": 1000}


def metrics(config: Path) -> list[dict]:
    path = config.parent / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(config: Path) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in metrics(config) if "loss" in m}


def wait_for_step(config: Path, step: int, processes: list[subprocess.Popen[bytes]], log_dir: Path) -> None:
    end = time.monotonic() + 300
    while max(losses(config), default=0) < step:
        assert time.monotonic() < end, logs(log_dir)
        assert all(p.poll() is None for p in processes), logs(log_dir)
        time.sleep(0.02)


def final_tensors(config: Path, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(step_directory(config.parent / "run" / "checkpoints", step))
    return {name: reader.tensor(name) for name in reader.index["tensors"]}


def assert_same_end(a: Path, b: Path, step: int = 12) -> None:
    first, second = final_tensors(a, step), final_tensors(b, step)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks from start to end."""
    config = tiny_run(tmp_path_factory.mktemp("undisturbed"), data)
    run_ranks(2, [*TRAIN, str(config)], config.parent / "logs")
    return config


def test_what_a_run_leaves(undisturbed: Path) -> None:
    run, found = undisturbed.parent / "run", metrics(undisturbed)
    steps = [m for m in found if "loss" in m]
    assert [m["step"] for m in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1, "it learns"
    needed = {"loss/captions", "loss/pages", "grad_norm", "lr", "tokens_per_s", "images_per_s", "seconds_per_step"}
    assert needed <= {k for m in steps for k in m}
    validations = [m for m in found if "validation/captions" in m]
    assert [m["step"] for m in validations] == [6, 12]
    assert validations[1]["validation/pages"] < validations[0]["validation/pages"]
    assert json.loads((run / "outcome.json").read_text())["state"] == "finished"
    assert [d.name for d in complete(run / "checkpoints")] == ["step-00000012", "step-00000008"]
    assert list((run / "tensorboard").glob("events*"))
    text = (undisturbed.parent / "logs" / "rank-0.log").read_text()
    assert "ETA" in text
    assert "images/s" in text
    assert "step 12/12" in text


def test_one_rank_trains_the_same_model(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    """The same samples and the same losses at another data-parallel size, decoding workers included."""
    config = tiny_run(tmp_path, data, data__num_workers=1)
    done = subprocess.run(
        [sys.executable, *TRAIN, str(config)],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=450,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = losses(config), losses(undisturbed)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5), step


@pytest.mark.parametrize("at", [2, 5, 9])
def test_kill_9_and_resume_is_bit_identical(undisturbed: Path, data: Path, tmp_path: Path, at: int) -> None:
    """Invariant I4: before the first checkpoint, between two, and about the time of the second."""
    config = tiny_run(tmp_path, data)
    ranks = start_ranks(2, [*TRAIN, str(config)], tmp_path / "killed")
    wait_for_step(config, at, ranks, tmp_path / "killed")
    kill_ranks(ranks)
    run_ranks(2, [*TRAIN, str(config)], tmp_path / "logs")
    assert_same_end(config, undisturbed)
    assert losses(config) == losses(undisturbed), "metrics.jsonl is that of one run: redone steps are not doubled"


@pytest.fixture(scope="module")
def undisturbed_60(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough for a word to arrive before its end."""
    config = tiny_run(tmp_path_factory.mktemp("undisturbed_60"), data, **SIXTY_STEPS)
    run_ranks(2, [*TRAIN, str(config)], config.parent / "logs")
    return config


@pytest.mark.parametrize("how", ["signal", "stop file"])
def test_stop_checkpoints_at_once_and_resumes(undisturbed_60: Path, data: Path, tmp_path: Path, how: str) -> None:
    config = tiny_run(tmp_path, data, **SIXTY_STEPS)
    os.environ["SLURM_JOB_ID"] = "77"  # names the stop file; without a step it does not make this a Slurm launch
    try:
        ranks = start_ranks(2, ["-c", _WITH_JOB_ID, *TRAIN[2:], str(config)], tmp_path / "stopped")
    finally:
        del os.environ["SLURM_JOB_ID"]
    wait_for_step(config, 1, ranks, tmp_path / "stopped")
    if how == "signal":
        ranks[1].send_signal(signal.SIGUSR1)  # to any one rank
    else:
        (tmp_path / "run" / "stop.77.0").touch()
    assert wait_ranks(ranks, tmp_path / "stopped", 180) == [0, 0], logs(tmp_path / "stopped")
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["state"] == "preempted"
    assert 1 <= outcome["step"] < 60
    assert [d.name for d in complete(tmp_path / "run" / "checkpoints")] == [f"step-{outcome['step']:08d}"]
    run_ranks(2, [*TRAIN, str(config)], tmp_path / "logs")
    assert_same_end(config, undisturbed_60, 60)


# The harness gives ranks no SLURM_* variables; this one is set inside, as the batch script's environment would.
_WITH_JOB_ID = (
    "import os, runpy, sys; os.environ['SLURM_JOB_ID'] = '77'; os.environ['SLURM_RESTART_COUNT'] = '0'; "
    "sys.argv[0] = 'train'; runpy.run_module('megatron_mm.train', run_name='__main__')"
)


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_launchers(undisturbed: Path, data: Path, tmp_path: Path, launcher: str) -> None:
    config = tiny_run(tmp_path, data)
    programs = Path(sys.executable).parent
    command = {
        "torchrun": [str(programs / "torchrun"), "--standalone", "--nproc-per-node=2"],
        "mpiexec": [str(programs / "mpiexec"), "-n", "2", sys.executable],
    }[launcher]
    process = subprocess.Popen(
        [*command, *TRAIN, str(config), "training.steps=12"], env=rank_environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=450)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert_same_end(config, undisturbed)


def test_expert_losses_are_the_whole_batchs(data: Path, tmp_path: Path) -> None:
    """What is logged, of the routers too, does not depend on how many ranks share the work."""
    found = []
    stages = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
    experts_apart, cut = {"expert_model_parallel_size": 2}, {"context_parallel_size": 2}
    layouts = ((1, {}), (2, experts_apart), (2, cut), (4, stages))  # the first of two stages has no experts
    for number, (world, parallel) in enumerate(layouts):
        folder = tmp_path / str(number)
        experts = {"num_experts": 4}
        config = tiny_run(folder, data, training__steps=3, parallel=parallel, model__decoder__moe=experts)
        run_ranks(world, [*TRAIN, str(config)], folder / "logs")
        found.append([m for m in metrics(config) if "loss" in m])
    for one, *others in zip(*found, strict=True):
        for name in ("loss", "moe/load_balancing_loss", "moe/z_loss"):
            assert [other[name] for other in others] == pytest.approx([one[name]] * 3, rel=1e-5), name
        assert 1 <= one["moe/load_balancing_loss"] < 1.5  # 1 when tokens spread evenly over the experts


def refuse(config: Path, *overrides: str, world: int = 1) -> str:
    log_dir = config.parent / "refused"
    shutil.rmtree(log_dir, ignore_errors=True)
    codes = wait_ranks(start_ranks(world, [*TRAIN, str(config), *overrides], log_dir), log_dir, 180)
    assert codes == [2] * world, f"{codes}\n{logs(log_dir)}"
    text = logs(log_dir)
    assert text.count("error: ") == 1, f"one error, from one rank:\n{text}"
    assert "Traceback" not in text
    assert not (config.parent / "run" / "checkpoints").exists()
    return text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.stepz=3"], "training.stepz: unknown field"),
        (["training.steps=many"], "training.steps: wrong value"),
        (["model.decoder.num_query_groups=3"], "model.decoder.num_attention_heads: must be a multiple"),
        (["parallel.tensor_model_parallel_size=2"], "parallel: the ranks do not divide"),
        (["training.global_batch_size=7"], "training.global_batch_size: must be a multiple"),
        (["parallel.expert_model_parallel_size=2"], "there are no experts to share out"),
        (["data.sources.0.path=/nowhere/captions"], "/nowhere/captions"),
        (["data.tokenizer=/nowhere/tokenizer.model"], "/nowhere/tokenizer.model"),
        (["model.decoder.vocab_size=64"], "model.decoder.vocab_size"),
        (["checkpoint.init_from=[/nowhere]"], "not a checkpoint"),
    ],
)  # fmt: skip
def test_wrong_configurations_are_refused(data: Path, tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert expected in refuse(tiny_run(tmp_path, data), *overrides)


def test_a_truncated_source_is_refused_by_all_ranks(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    file = tmp_path / "data" / "pages.image.bin"
    file.write_bytes(file.read_bytes()[:-7])
    text = refuse(tiny_run(tmp_path, tmp_path / "data"), world=2)
    assert "pages.image.bin" in text


def test_a_foreign_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    from tests.tiny import tool

    other = tmp_path / "other.model"
    tool("train_tokenizer.py", "--input", data / "text.jsonl", "--output", other, "--vocab-size", "300")
    assert "tokenizer" in refuse(tiny_run(tmp_path, data), f"data.tokenizer={other}")


def test_no_space_for_a_checkpoint(data: Path, tmp_path: Path) -> None:
    """A full disk is told before anything is written, and the older checkpoint stays. The disk is a real one, of 2 MiB
    in a mount namespace: it holds one checkpoint and not a second."""
    disk = tmp_path / "disk"
    disk.mkdir()
    config = tiny_run(tmp_path, data, run_dir=str(disk / "run"))
    check = f"echo left:; ls -A {disk}/run/checkpoints; exit $code"
    script = f'mount -t tmpfs -o size=2m tmpfs {disk} && "$@"; code=$?; {check}'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", sys.executable, *TRAIN, str(config)],
        env=rank_environment(), capture_output=True, text=True, timeout=450,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    for part in ("no space for a checkpoint", "GiB free", "free some space"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.split("left:\n")[1].split() == ["step-00000004"]


def test_a_source_that_rots_stops_the_run(data: Path, tmp_path: Path) -> None:
    """Images whose bytes changed since ingest are trained blank up to the set rate; above it all ranks end."""
    shutil.copytree(data, tmp_path / "data")
    for name in ("captions", "pages"):
        file = tmp_path / "data" / f"{name}.image.bin"
        file.write_bytes(bytes(b ^ 255 for b in file.read_bytes()))
    config = tiny_run(tmp_path, tmp_path / "data", training__steps=400, data__num_workers=1)
    ranks = start_ranks(2, [*TRAIN, str(config)], tmp_path / "logs")
    codes = wait_ranks(ranks, tmp_path / "logs", 300)
    text = logs(tmp_path / "logs")
    assert 0 not in codes, text
    assert "too many" in text, text
    assert re.search(r"error: rank \d: ", text), text
    assert len(losses(config)) < 100, "it ends when 100 images were bad, not later"
