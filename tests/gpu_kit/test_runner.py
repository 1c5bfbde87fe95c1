"""Stages and their cases: kept one by one, started again, in the order of what they tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import run
import torch

from tests.gpu_kit import GPU

CASES = """
import os, pathlib, subprocess, sys, time
import cases
cases.has_gpu = lambda: True
cases.clocks = lambda: None
cases.machine = lambda: {"gpu": "none, a test"}
cases._left_on_gpu = lambda: 2 << 30 if (here / "full").exists() else 0
here = pathlib.Path(__file__).parent

def good(smoke):
    os.environ["LEFT_BEHIND"] = "yes"
    return {"value": 3, "process": os.getpid()}
def also(smoke): return {"value": 5, "process": os.getpid(), "left": os.environ.get("LEFT_BEHIND")}
def bad(smoke):
    if not (here / "mended").exists():
        raise ValueError("what went wrong")
    return {"value": 4}
def slow(smoke):
    print("started", subprocess.Popen(["sleep", "50"]).pid, flush=True)
    time.sleep(50)
def other(smoke): return {"value": 6, "process": os.getpid(), "set": os.environ["FOR_ME"]}
def fills(smoke):
    (here / "full").write_text("")
    return {"value": 7, "process": os.getpid()}
def last(smoke):
    return {"value": 8, "process": os.getpid()}
def ratios(found, results):
    return [cases.at_least("toy", f["value"], "of ours", 2, "of theirs", 1.7) for f in found.values()][:1]
Case = cases.Case
cases.run("toy", "", [
    Case("good", good), Case("also", also), Case("bad", bad), Case("slow", slow, 2),
    Case("other", other, environment=(("FOR_ME", "1"),)), Case("fills", fills), Case("last", last),
], ratios)
"""


def test_cases_are_kept_one_by_one(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(CASES)
    environment = os.environ | {"PYTHONPATH": str(GPU)}

    def call(*arguments: str) -> tuple[int, str, dict[str, dict]]:
        command = [sys.executable, str(script), "--results", str(tmp_path), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        return done.returncode, done.stdout, json.loads((tmp_path / "gpu-toy.json").read_text())

    code, said, record = call("--only", "good", "also", "bad", "slow", "other", "fills")
    assert code == 1
    found = record["cases"]
    assert found["good"]["value"] == 3
    assert found["also"]["process"] == found["good"]["process"], "they share a process"
    assert found["also"]["left"] is None, "but not its environment"
    assert "ValueError: what went wrong" in found["bad"]["failed"]
    assert "exit code 1" in found["bad"]["failed"]
    assert found["other"]["set"] == "1"
    assert len({found[name]["process"] for name in ("good", "other", "fills")}) == 3
    assert record["machine"] == {"gpu": "none, a test"}
    assert record["ratios"] == ["toy: 3 of ours / 2 of theirs = 1.5 (target at least 1.7: missed)"]
    assert "exit code -9" in found["slow"]["failed"]
    started = next(line.split()[-1] for line in said.splitlines() if "started" in line)
    assert not Path(f"/proc/{started}").exists() or "Z" in Path(f"/proc/{started}/stat").read_text().split()[2]

    code, said, record = call("--stop-after", "-1")
    assert code == 1
    assert "bad: no time left" in said

    (tmp_path / "mended").write_text("")
    (tmp_path / "full").unlink()
    code, said, record = call("--only", "good", "bad", "fills", "last")
    assert code == 0
    assert "good: measured before" in said
    assert record["cases"]["bad"]["value"] == 4
    assert "failed" in record["cases"]["slow"], "what another call said stays"

    (tmp_path / "full").write_text("")
    code, _, record = call("--only", "last", "--again")
    assert code == 1, "a GPU that is never empty"
    assert "failed" in record["cases"]["last"]


def test_a_full_gpu_is_left_to_the_next_process(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    full_once = (
        'cases._left_on_gpu = lambda: 2 << 30 if (here / "full").exists() and not (here / "full").unlink() else 0'
    )
    line = next(line for line in CASES.splitlines() if line.startswith("cases._left_on_gpu"))
    script.write_text(CASES.replace(line, full_once))
    command = [sys.executable, str(script), "--results", str(tmp_path), "--only", "fills", "last"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(GPU)}, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "gpu-toy.json").read_text())["cases"]
    assert found["fills"]["process"] != found["last"]["process"]


def run_all(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(GPU / "run.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = run_all("--results", tmp_path, "--archive", tmp_path / "a.tgz", "decode", "step_3b:mix-bf16")
    assert done.returncode == 1
    assert "error: PyTorch sees no GPU here" in done.stdout
    assert "something failed or left in: decode step_3b:mix-bf16" in done.stdout
    assert (tmp_path / "a.tgz").exists()
    done = run_all("--results", tmp_path, "--minutes", "0", "decode")
    assert "0 minutes are over; left: decode" in done.stdout
    assert "no such stage: decoder" in run_all("decoder").stderr
    assert "--earlier nothing.tgz" in run_all("--earlier", "nothing.tgz").stderr


def test_rehearsal(tmp_path: Path) -> None:
    """Also without a GPU; a stage that does not run is named, with what it said."""
    done = run_all("--results", tmp_path, "rehearsal:ceilings,nonsense")
    assert done.returncode == 1
    found = json.loads((tmp_path / "gpu-rehearsal.json").read_text())["cases"]
    assert "failed" not in found["ceilings"]
    assert "nonsense.py" in found["nonsense"]["failed"]


def test_files_of_tests_run_side_by_side(tmp_path: Path) -> None:
    command = [sys.executable, str(GPU / "run_tests.py"), "--smoke", "--results", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "packed_attention", "one_gpu"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "gpu-tests.json").read_text())["cases"]
    assert {name.split("::")[0] for name in found} == {
        f"tests/gpu/test_{n}.py" for n in ("packed_attention", "one_gpu")
    }
    if not torch.cuda.is_available():
        assert {case["outcome"] for case in found.values()} == {"skipped"}
        assert f"tests: 0 passed, 0 failed, {len(found)} skipped" in done.stdout
    assert not list(tmp_path.glob(".tests-*")), "parts are gathered"


def test_every_case_of_the_plan_is_there() -> None:
    """And the plan ends with all of each script, in their own order."""
    for stage in run.PLAN:
        name, _, chosen = stage.partition(":")
        if chosen:
            text = (GPU / f"{name}.py").read_text()
            for case in chosen.split(","):
                assert f'"{case}"' in text or name in ("memory", "attention"), stage
    whole = {stage for stage in run.PLAN if ":" not in stage}
    assert whole == {*run.SCRIPTS, "rehearsal", "tests", "long-tests"}
    shared = {"bundle", "slim", "kit", "cases", "workload", "run", "run_tests", "gather", "report", "pictures"}
    assert {path.stem for path in GPU.glob("*.py")} == {*run.SCRIPTS, *shared}
