"""Launch detection in real Slurm jobs: under srun, srun --mpi=pmi2, mpiexec in a job, and in the batch shell."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT
from tests.slurm.cluster import SlurmCluster

PROBE = ROOT / "tests" / "unit" / "parallel" / "launch_probe.py"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--mem=1G")


def ranks_of(output: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda said: said["rank"])


@pytest.mark.parametrize(("option", "kind"), [("--mpi=none", "slurm"), ("--mpi=pmi2", "mpi")])
def test_srun(cluster: SlurmCluster, option: str, kind: str) -> None:
    ranks = ranks_of(cluster.run("srun", *TWO_NODES, option, sys.executable, PROBE))
    assert [(r["rank"], r["world_size"], r["kind"], r["met"]) for r in ranks] == [(n, 2, kind, [1, 1]) for n in (0, 1)]
    assert [r["node"] for r in ranks] == cluster.names[:2]
    if kind == "slurm":
        assert {(r["local_rank"], r["local_world_size"], r["address"]) for r in ranks} == {(0, 1, cluster.names[0])}


def test_srun_with_several_tasks_a_node(cluster: SlurmCluster) -> None:
    tasks = ("--nodes=2", "--ntasks=3", "--mem=1G")
    ranks = ranks_of(cluster.run("srun", *tasks, sys.executable, PROBE))
    assert [(r["rank"], r["local_rank"], r["local_world_size"]) for r in ranks] == [(0, 0, 2), (1, 1, 2), (2, 0, 1)]
    assert [r["met"] for r in ranks] == [[1, 1, 1]] * 3


def test_inside_a_batch_script(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Where the shell's own SLURM_PROCID=0 misleads what does not look closely."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    script, log = tmp_path / "job.sbatch", tmp_path / "job.out"
    script.write_text(f"#!/bin/bash\n{sys.executable} {PROBE}\n{mpiexec} -n 2 {sys.executable} {PROBE}\n")
    job = int(cluster.run("sbatch", "--parsable", *TWO_NODES, f"--output={log}", script))
    cluster.wait_for_state(job, "COMPLETED", 60, lambda: log.read_text())
    alone, *under_mpi = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    assert (alone["kind"], alone["met"]) == ("single", [1])
    assert [(r["kind"], r["met"]) for r in under_mpi] == [("mpi", [1, 1])] * 2
    assert {r["rank"] for r in under_mpi} == {0, 1}
