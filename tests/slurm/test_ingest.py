"""Ingest by the ranks of a Slurm step on several nodes."""

import sys
import threading
from pathlib import Path

import psutil
import pytest

from megatron_mm.data.ingest.beside import PICTURE_BYTES
from tests.ranks import ROOT
from tests.slurm.cluster import SlurmCluster

RUN = ROOT / "tests" / "unit" / "data" / "ingest_run.py"
STEP = ("srun", "--nodes=2", "--ntasks=3", "--mem=1G", "--mpi=pmi2")


def command(data: Path, output: Path, chunk: int) -> list[str | Path]:
    return [
        sys.executable, RUN, str(chunk), "--kind", "interleaved", "--input", data / "interleaved.jsonl",
        "--output", output, "--tokenizer", data / "tokenizer.model",
    ]  # fmt: skip


def content(prefix: Path) -> dict[str, bytes]:
    return {p.name.removeprefix(prefix.name): p.read_bytes() for p in prefix.parent.glob(f"{prefix.name}.*")}


def test_same_bytes_as_from_one_process(cluster: SlurmCluster, data: Path, tmp_path: Path) -> None:
    cluster.run(*STEP[:1], "--ntasks=1", "--mem=1G", "--mpi=none", *command(data, tmp_path / "one", 1 << 30))
    said = cluster.run(*STEP, *command(data, tmp_path / "many", 10 * PICTURE_BYTES))
    assert said.count("documents") == 1
    assert content(tmp_path / "many") == content(tmp_path / "one")


@pytest.mark.parametrize("option", ["--kill-on-bad-exit=1", "--kill-on-bad-exit=0"])
def test_a_killed_rank_ends_the_step(cluster: SlurmCluster, data: Path, tmp_path: Path, option: str) -> None:
    """At once where Slurm is told to, else when nothing is heard of it."""
    prefix, step_is_over = tmp_path / "x", threading.Event()

    def kill_a_rank() -> None:
        while not list(tmp_path.glob("x.shards/*.done.json")):
            if step_is_over.wait(0.005):
                return
        ranks = [p for p in psutil.process_iter() if str(prefix) in " ".join(_words(p)) and _rank(p) == "1"]
        ranks[0].kill()

    killer = threading.Thread(target=kill_a_rank)
    killer.start()
    words = command(data, prefix, 6 * PICTURE_BYTES)
    try:
        with pytest.raises(AssertionError) as error:
            cluster.run(*STEP, option, "env", "SILENCE=3", *words)
    finally:
        step_is_over.set()
        killer.join()
    assert ("rank 1: a rank is dead" in str(error.value)) == option.endswith("0")
    cluster.run(*STEP, *words)
    assert not list(tmp_path.glob("x.shards"))


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("PMI_RANK")
    except psutil.Error:
        return None
