"""Every benchmark runs on toy sizes, beside its competitors, and ends with the line that says what was measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = {"common", "corpora", "made"}  # modules that benchmarks have in common
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in SHARED)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_last_line(name):
    before = {path: path.read_bytes() for path in (ROOT / "benchmarks/results").glob("*")}
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    number = r"[\d.e+-]+"
    assert re.fullmatch(
        rf"{name}: {number} .+ / {number} .+ = {number} \(target .+: toy sizes\)", done.stdout.splitlines()[-1]
    )
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks/results").glob("*")} == before


def test_all_are_found():
    assert set(BENCHMARKS) >= {"balance", "ingest", "loader", "packing", "reader"}
