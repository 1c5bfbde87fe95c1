"""Launch detection under the real launchers of this machine (srun's is in tests/slurm), and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_mm.errors import UserError
from megatron_mm.parallel.launch import Launch, launch
from tests.ranks import rank_environment

PROBE = Path(__file__).parent / "launch_probe.py"
BIN = Path(sys.executable).parent
# What Slurm's batch shell hands on to everything that is started in it without srun.
BATCH_SHELL = {"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4"}


def probe(*command: str | Path, **extra: str) -> list[dict[str, Any]]:
    launcher = subprocess.Popen(
        [str(word) for word in command], env=rank_environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        output, errors = launcher.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # torchrun's ranks are in sessions of their own: it ends them itself
        launcher.communicate(timeout=180)
        raise
    assert launcher.returncode == 0, errors
    return sorted((json.loads(line) for line in output.splitlines()), key=lambda said: said["rank"])


def expect_two(ranks: list[dict[str, Any]], kind: str) -> None:
    numbers = [(r["rank"], r["world_size"], r["local_rank"], r["local_world_size"]) for r in ranks]
    assert numbers == [(0, 2, 0, 2), (1, 2, 1, 2)]
    assert [(r["kind"], r["met"]) for r in ranks] == [(kind, [1, 1])] * 2


def test_a_plain_python_is_one_rank() -> None:
    (rank,) = probe(sys.executable, PROBE)
    assert (rank["rank"], rank["world_size"], rank["local_world_size"], rank["kind"]) == (0, 1, 1, "single")
    assert rank["met"] == [1]


def test_torchrun() -> None:
    expect_two(probe(BIN / "torchrun", "--standalone", "--nproc-per-node=2", PROBE), "torchrun")


def test_mpiexec() -> None:
    expect_two(probe(BIN / "mpiexec", "-n", "2", sys.executable, PROBE), "mpi")


def test_mpiexec_and_torchrun_in_a_batch_shell() -> None:
    fork = (BIN / "mpiexec", "-launcher", "fork", "-hosts", "localhost", "-n", "2")
    expect_two(probe(*fork, sys.executable, PROBE, **BATCH_SHELL), "mpi")
    expect_two(probe(BIN / "torchrun", "--standalone", "--nproc-per-node=2", PROBE, **BATCH_SHELL), "torchrun")


def detect(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[Launch, dict[str, str]]:
    """`launch()` with these environment variables and no others."""
    environment = dict(variables)
    monkeypatch.setattr(os, "environ", environment)
    return launch(), environment


def step(**changes: str) -> dict[str, str]:
    """Rank 19 of an srun step of 8 + 8 + 8 + 4 tasks."""
    return {
        "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_PROCID": "19", "SLURM_LOCALID": "3", "SLURM_NODEID": "2",
        "SLURM_STEP_NUM_TASKS": "28", "SLURM_STEP_TASKS_PER_NODE": "8(x3),4",
        "SLURM_STEP_NODELIST": "gpu[007-009,012]",
    } | changes  # fmt: skip


def test_a_step_of_unequal_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    world, environment = detect(monkeypatch, **step())
    assert world == Launch(19, 28, 3, 8, "slurm")
    assert environment["MASTER_ADDR"] == "gpu007"
    set_for_torch = [environment[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    assert set_for_torch == ["19", "28", "3", "8"]
    last, _ = detect(monkeypatch, **step(SLURM_PROCID="24", SLURM_LOCALID="0", SLURM_NODEID="3"))
    assert last == Launch(24, 28, 0, 4, "slurm")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("a[3,5-7],b1", "a3"),
        ("b1,a[3,5-7]", "b1"),
        ("rack[0-3]n[08-11]", "rack0n08"),
        ("127.0.0.[1-2]", "127.0.0.1"),
        ("gpu-[01-02]-x.site", "gpu-01-x.site"),
    ],
)
def test_rank_0_is_met_on_the_first_node(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    assert detect(monkeypatch, **step(SLURM_STEP_NODELIST=nodes))[1]["MASTER_ADDR"] == first


def test_attempts_steps_and_jobs_meet_at_different_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    def port(**changes: str) -> int:
        return int(detect(monkeypatch, **step(**changes))[1]["MASTER_PORT"])

    assert port() == port(SLURM_PROCID="3", SLURM_NODEID="0")
    others = [port(SLURM_RESTART_COUNT="1"), port(SLURM_RESTART_COUNT="2"), port(SLURM_JOB_ID="1235")]
    assert len({port(), *others}) == 4
    assert port(SLURM_STEP_ID="1") != port()
    assert all(20000 <= port(SLURM_JOB_ID=str(job)) < 32000 for job in (1, 999_999, 67_000_001))


def test_an_address_of_the_users_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _, environment = detect(monkeypatch, **step(MASTER_ADDR="ib-gpu007", MASTER_PORT="29400"))
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("ib-gpu007", "29400")


def test_a_batch_shell_is_not_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect(monkeypatch, **BATCH_SHELL)[0] == Launch(0, 1, 0, 1, "single")


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({"RANK": "0"}, "MASTER_ADDR"),
        ({"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK"),
        (step(SLURM_STEP_TASKS_PER_NODE="eight"), "SLURM_STEP_TASKS_PER_NODE"),
        (step(SLURM_NODEID="4"), "SLURM_NODEID"),
        ({n: v for n, v in step().items() if n != "SLURM_STEP_NODELIST"}, "SLURM_STEP_NODELIST"),
    ],
)
def test_incomplete_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], where: str) -> None:
    with pytest.raises(UserError) as error:
        detect(monkeypatch, **variables)
    assert error.value.where == where


def fails(*python_options: str, **extra: str) -> str:
    code = "from megatron_mm.errors import run_cli; from megatron_mm.parallel.launch import launch; run_cli(launch)"
    command = [sys.executable, *python_options, "-c", code]
    done = subprocess.run(command, env=rank_environment(**extra), capture_output=True, text=True, timeout=180)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_another_mpi_than_the_launchers_is_no_run_of_single_ranks() -> None:
    # As Open MPI's mpiexec would start the MPICH that mpi4py loads here.
    told = fails(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="4")
    assert "OMPI_COMM_WORLD_SIZE" in told
    assert "4 processes started, 1 seen by MPICH" in told


def test_mpiexec_without_mpi4py() -> None:
    told = fails("-S", PMI_RANK="0", PMI_SIZE="2")  # -S: no installed packages
    assert "mpi4py" in told
    assert "pip install" in told
