"""Stop signals and the outcome file, in processes of their own: signals and their mask belong to a whole process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mm.training.resilience import write_outcome
from tests.ranks import rank_environment

# Says "ready", then answers each line on stdin with what requested() says.
RANK = """
import sys
from megatron_mm.training.resilience import StopSignal
stop = StopSignal(sys.argv[1], int(sys.argv[2]))
print("ready", flush=True)
for _ in sys.stdin:
    print(stop.requested(), flush=True)
"""

# Trains on nothing with two real loading workers until asked to stop; a dead worker would raise.
LOADING = """
import itertools, sys
from torch.utils.data import DataLoader, IterableDataset
from megatron_mm.training.resilience import StopSignal

class Numbers(IterableDataset):
    def __iter__(self):
        return itertools.count()

if __name__ == "__main__":
    stop = StopSignal(sys.argv[1], 0)
    loader = DataLoader(Numbers(), num_workers=2, multiprocessing_context="forkserver", batch_size=None)
    asked_at = None
    for number, _ in enumerate(loader):
        if number == 100:
            print("ready", flush=True)
        if asked_at is None and stop.requested():
            asked_at = number
        if asked_at is not None and number == asked_at + 1000:
            print("stopped", flush=True)
            break
"""


def start(code: str, tmp_path: Path, *arguments: str, **extra: str) -> subprocess.Popen[str]:
    script = tmp_path / "process.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), *arguments], env=rank_environment(**extra), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=120)
    return process.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_sets_the_flag_and_kills_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = start(RANK, tmp_path, "1")
    assert ask(process) == "False"
    process.send_signal(number)
    assert [ask(process), ask(process)] == ["True", "True"]
    process.send_signal(number)
    assert ask(process) == "True"
    assert end(process) == 0


def test_a_thread_older_than_the_handlers_sets_the_flag(tmp_path: Path) -> None:
    older_thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n"
    process = start(older_thread + RANK, tmp_path, "0")
    process.send_signal(signal.SIGTERM)
    assert ask(process) == "True"
    time.sleep(0.5)  # still pending it would count too, but kill the process once Python takes its handlers down
    assert end(process) == 0


@pytest.mark.parametrize(("rank", "expected"), [("0", "True"), ("1", "False")])
def test_the_stop_file_is_for_rank_0_of_this_attempt(tmp_path: Path, rank: str, expected: str) -> None:
    process = start(RANK, tmp_path, rank, SLURM_JOB_ID="71", SLURM_RESTART_COUNT="2")
    for other in ("stop.71.1", "stop.71.0", "stop.70.2", "stop.7.2"):
        (tmp_path / other).touch()
    assert ask(process) == "False"
    (tmp_path / "stop.71.2").touch()
    assert ask(process) == expected
    assert end(process) == 0


def test_the_first_attempt_is_number_0(tmp_path: Path) -> None:
    (tmp_path / "stop.71.0").touch()
    process = start(RANK, tmp_path, "0", SLURM_JOB_ID="71")
    assert ask(process) == "True"
    assert end(process) == 0


def test_loading_workers_outlive_a_signal_to_the_whole_step(tmp_path: Path) -> None:
    process = start(LOADING, tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=180)
    assert (output, process.returncode) == ("stopped\n", 0)


def test_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    write_outcome(tmp_path, "preempted", 7)
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"state": "preempted", "step": 7, "attempt": 0}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    write_outcome(tmp_path, "finished", 12)
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"state": "finished", "step": 12, "attempt": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["outcome.json"]


def test_no_reader_ever_sees_half_an_outcome(tmp_path: Path) -> None:
    writer = (
        "import sys\nfrom megatron_mm.training.resilience import write_outcome\nprint('ready', flush=True)\n"
        "step = 0\nwhile True:\n    step += 1\n    write_outcome(sys.argv[1], 'preempted', step)\n"
    )
    process = start(writer, tmp_path)
    try:
        seen: set[int] = set()
        limit = time.monotonic() + 120
        while len(seen) < 20 and time.monotonic() < limit:
            if (tmp_path / "outcome.json").exists():
                seen.add(json.loads((tmp_path / "outcome.json").read_text())["step"])
        assert len(seen) >= 20
    finally:
        process.kill()
        process.communicate()
