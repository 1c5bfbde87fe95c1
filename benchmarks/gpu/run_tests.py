"""`pytest tests/gpu`, each test's outcome written down as soon as it is there: gpu-tests.json. A rerun runs what has
not passed yet.

    python benchmarks/gpu/run_tests.py            all but those of several minutes, and those of the GPU's whole memory
    python benchmarks/gpu/run_tests.py --long     those too, after the others

The files of tests/gpu run side by side: their models are small, and most of their time is spent on a CPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kit import RESULTS, ROOT, has_gpu, machine, write

LONG = ("trains_as_bf16_does", "planned_one")  # parts of names: 200 steps twice a recipe; memory.py measures it too


class Recorder:
    """A plugin of pytest's: outcomes go into a file."""

    def __init__(self, path: Path, done: set[str], long: bool, stop_after: float) -> None:
        self.path, self.done, self.long = path, done, long
        self.end = time.perf_counter() + stop_after
        self.cases: dict[str, Any] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left = [i for i in items if i.nodeid not in self.done and self.long == any(n in i.name for n in LONG)]
        config.hook.pytest_deselected(items=[i for i in items if i not in left])
        items[:] = left

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.perf_counter() > self.end:
            pytest.exit("no time left", returncode=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            case: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 1)}
            if report.longrepr:
                case["why"] = str(report.longrepr)[-2000:].replace(f"{ROOT}/", "")
            self.cases[report.nodeid] = case
            write(self.path, self.cases)


def _run_file(file: Path, results: Path, done: set[str], long: bool, stop_after: float) -> int:
    arguments = ["-p", "no:cacheprovider", "-q", "--rootdir", str(ROOT), str(file)]
    arguments += ["-o", "timeout_method=signal"]  # one that hangs fails, and the others go on
    recorder = Recorder(results / f".tests-{file.stem}.json", done, long, stop_after)
    code = pytest.main(arguments, plugins=[recorder])
    return 0 if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else int(code)


class Gatherer:
    """Outcomes of the files that run side by side, in one."""

    def __init__(self, results: Path, files: list[Path]) -> None:
        self.path = results / "gpu-tests.json"
        self.parts = [results / f".tests-{file.stem}.json" for file in files]
        self.record: dict[str, Any] = {"benchmark": "gpu-tests", "machine": machine(), "cases": {}}
        if self.path.exists():
            self.record["cases"] = json.loads(self.path.read_text())["cases"]
        for part in self.parts:
            part.unlink(missing_ok=True)

    def gather(self) -> None:
        found: dict[str, Any] = {}
        for part in self.parts:
            if part.exists():
                found |= json.loads(part.read_text())
        if any(self.record["cases"].get(name) != case for name, case in found.items()):
            self.record["cases"] |= found
            write(self.path, self.record)

    def passed(self) -> set[str]:
        return {name for name, case in self.record["cases"].items() if case["outcome"] == "passed"}


def _side_by_side(files: list[Path], gatherer: Gatherer, arguments: list[str]) -> int:
    """How many of the files had something fail."""
    processes = []
    for file in files:
        command = [sys.executable, __file__, "--file", str(file), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
    listeners = []
    for file, process in zip(files, processes, strict=True):
        listeners.append(threading.Thread(target=_pass_on, args=(file.stem, process), daemon=True))
        listeners[-1].start()
    while any(process.poll() is None for process in processes):
        time.sleep(0.2)
        gatherer.gather()
    for listener in listeners:
        listener.join(5)
    gatherer.gather()
    return sum(process.returncode != 0 for process in processes)


def _pass_on(name: str, process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if not re.fullmatch(r"\s*|[.sFExX]+ +\[ *\d+%\]", line.rstrip()):
            print(f"    {name}: {line.rstrip()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="those of several minutes, one by one")
    parser.add_argument(
        "--smoke", action="store_true", help="also without a GPU: then every test skips, with its reason"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--stop-after", type=float, default=1e9, metavar="SECONDS", help="start no test later")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="these of tests/gpu: one_gpu for test_one_gpu.py")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # in the process of one file
    args = parser.parse_args()
    if not args.smoke and not has_gpu():
        sys.exit("error: PyTorch sees no GPU here\n  do: run it on a machine with one")
    started = time.perf_counter()
    args.results.mkdir(parents=True, exist_ok=True)
    files = sorted((ROOT / "tests/gpu").glob("test_*.py"))
    if args.only:
        files = [file for file in files if file.stem.removeprefix("test_") in args.only]
    gatherer = Gatherer(args.results, [args.file] if args.file else files)
    if args.file:
        sys.exit(_run_file(args.file, args.results, gatherer.passed(), args.long, args.stop_after))
    arguments = ["--results", str(args.results), *(["--smoke"] if args.smoke else [])]
    failed = 0
    for group in [[file] for file in files] if args.long else [files]:
        left = args.stop_after - (time.perf_counter() - started)
        more = ["--long"] if args.long else []
        failed += _side_by_side(group, gatherer, [*arguments, *more, "--stop-after", str(left)])
    for part in gatherer.parts:
        part.unlink(missing_ok=True)
    outcomes = [case["outcome"] for case in gatherer.record["cases"].values()]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped"))
    print(f"tests: {counts} in {time.perf_counter() - started:.0f} s", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
