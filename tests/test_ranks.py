"""The harness of the many-rank tests: a rank that fails, hangs or is killed shows as what it is."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import ForkedRank, kill_ranks, logs, run_ranks, start_ranks, wait_ranks

SCRIPT = """
import os, sys, time
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], sys.argv[1:], hash("seed"))
for word in sys.argv[1:]:
    exec(word)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def test_ranks_are_processes_of_their_own(script: str, tmp_path: Path) -> None:
    run_ranks(2, [script, "print(os.getpid(), os.getpgid(0))"], tmp_path / "logs")
    first, second = ((tmp_path / "logs" / f"rank-{rank}.log").read_text().split() for rank in range(2))
    assert first[:4] == ["rank", "0", "of", "2"]
    assert second[:4] == ["rank", "1", "of", "2"]
    assert first[-1] == first[-2] != second[-2] == second[-1]
    assert first[-3] != second[-3], "with one hash seed for all, ranks would agree on the order of sets by chance"


@pytest.mark.parametrize(
    ("word", "codes", "text"),
    [
        ("1 / 0", [1, 1], "ZeroDivisionError"),
        ("sys.exit(3)", [3, 3], ""),
        ("sys.exit('refused')", [1, 1], "refused"),
        ("os.abort()", [-signal.SIGABRT, -signal.SIGABRT], ""),
        ("pass", [0, 0], ""),
    ],
)
def test_how_a_rank_ended(script: str, tmp_path: Path, word: str, codes: list[int], text: str) -> None:
    assert wait_ranks(start_ranks(2, [script, word], tmp_path / "logs"), tmp_path / "logs", 60) == codes
    assert text in logs(tmp_path / "logs")


def test_ranks_that_hang_are_killed(script: str, tmp_path: Path) -> None:
    ranks = start_ranks(2, [script, "time.sleep(100)"], tmp_path / "logs")
    assert all(isinstance(rank, ForkedRank) for rank in ranks) != os.path.exists("/dev/nvidia0")
    began = time.monotonic()
    assert wait_ranks(ranks, tmp_path / "logs", 0.5) == [-signal.SIGKILL] * 2
    assert time.monotonic() - began < 20
    kill_ranks(ranks)  # harmless when they have ended
