"""`pytest tests/gpu`, each test's outcome written down as soon as it is there: gpu-tests.json. A rerun runs what has
not passed yet.

    python benchmarks/gpu/tests.py            all but those of several minutes
    python benchmarks/gpu/tests.py --long     those too
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kit import RESULTS, ROOT, has_gpu, machine, write

LONG = ("trains_as_bf16_does",)  # parts of names: 200 steps twice a recipe


class Recorder:
    """A plugin of pytest's."""

    def __init__(self, path: Path, long: bool, stop_after: float) -> None:
        self.path, self.long, self.end = path, long, time.perf_counter() + stop_after
        self.record: dict[str, Any] = {"benchmark": "gpu-tests", "machine": machine(), "cases": {}}
        if path.exists():
            self.record["cases"] = json.loads(path.read_text())["cases"]

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = {name for name, case in self.record["cases"].items() if case["outcome"] == "passed"}
        left = [i for i in items if i.nodeid not in done and (self.long or not any(n in i.name for n in LONG))]
        config.hook.pytest_deselected(items=[i for i in items if i not in left])
        items[:] = left

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.perf_counter() > self.end:
            pytest.exit("no time left", returncode=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = str(report.longrepr)[-2000:].replace(f"{ROOT}/", "") if report.longrepr else ""
            case = {"outcome": report.outcome, "seconds": round(report.duration, 1)} | (
                {"why": reason} if reason else {}
            )
            self.record["cases"][report.nodeid] = case
            write(self.path, self.record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="those of several minutes too")
    parser.add_argument("--smoke", action="store_true", help="without a GPU: every test skips, with its reason")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS", help="start no test later")
    args = parser.parse_args()
    if not args.smoke and not has_gpu():
        sys.exit("error: PyTorch sees no GPU here\n  do: run it on a machine with one")
    start = time.perf_counter()
    arguments = ["-p", "no:cacheprovider", "-q", "--rootdir", str(ROOT), str(ROOT / "tests/gpu")]
    arguments += ["-o", "timeout_method=signal"]  # one that hangs fails, and the others go on
    recorder = Recorder(args.results / "gpu-tests.json", args.long, args.stop_after)
    code = pytest.main(arguments, plugins=[recorder])
    outcomes = [case["outcome"] for case in recorder.record["cases"].values()]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped"))
    print(f"tests: {counts} in {time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(0 if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else int(code))


if __name__ == "__main__":
    main()
