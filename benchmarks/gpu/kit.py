"""What the benchmarks on a GPU share: cases measured one by one, each kept as soon as it is there.

    python benchmarks/gpu/step_3b.py                    measures what benchmarks/results/gpu-step_3b.json lacks
    python benchmarks/gpu/step_3b.py --only mix-bf16    one case; --again measures it although it is there
    python benchmarks/gpu/step_3b.py --smoke            toy sizes on a CPU, nothing written: does the code run?

Each case is a process of its own: it finds the GPU empty, and one that fails or hangs takes no other with it. Its
figures, and the machine that they are of, go into the file before the next one starts; a failed one is written down
with the end of its output, and is tried again by the next call.
"""

import argparse
import collections
import importlib.metadata
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
for folder in (ROOT / "benchmarks", ROOT):  # a script's own folder is on the path, these are not
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

Figures = dict[str, Any]
_PACKAGES = (
    "torch", "numpy", "megatron-core", "transformer-engine", "nvidia-dali-cuda130", "nvidia-cudnn-cu13", "transformers"
)  # fmt: skip


class Case(NamedTuple):
    """`measure(smoke)` answers with figures, or with {"skipped": reason} where this machine cannot run it."""

    name: str
    measure: Callable[[bool], Figures]
    limit: int = 480  # seconds


@dataclass(frozen=True)
class Ratio:
    """One line of the end: `what: ours / other = ratio (target …)`."""

    what: str
    ours: float
    ours_is: str
    other: float
    other_is: str
    target: str = "reported"
    reached: bool = True

    def __str__(self) -> str:
        verdict = "" if self.target == "reported" else ": reached" if self.reached else ": missed"
        return (
            f"{self.what}: {self.ours:.4g} {self.ours_is} / {self.other:.4g} {self.other_is} = "
            f"{self.ours / self.other:.3g} (target {self.target}{verdict})"
        )


def at_least(what: str, ours: float, ours_is: str, other: float, other_is: str, ratio: float) -> Ratio:
    return Ratio(what, ours, ours_is, other, other_is, f"at least {ratio}", ours >= ratio * other)


def at_most(what: str, ours: float, ours_is: str, other: float, other_is: str, ratio: float) -> Ratio:
    return Ratio(what, ours, ours_is, other, other_is, f"at most {ratio}", ours <= ratio * other)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    """What the figures are of. In the process that has the GPU."""
    import torch

    versions = {"megatron-mm": _version_here(), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_gib"] = round(torch.cuda.mem_get_info()[1] / 2**30, 1)
        found["cuda"] = torch.version.cuda
        found["driver"] = _smi("driver_version")
        found["sm_mhz_temperature_watts_after"] = _smi("clocks.sm,temperature.gpu,power.draw")
    return found | {"versions": versions}


def _version_here() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "megatron_mm/__init__.py").read_text())[1]  # type: ignore[index]


def _smi(fields: str) -> str | None:
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def seconds_each(function: Callable[[], Any], times: int, warm_up: int = 5) -> list[float]:
    """Of each call, by the GPU's own clock where there is one."""
    import torch

    for _ in range(warm_up):
        function()
    found = []
    if not torch.cuda.is_available():
        for _ in range(times):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
        return found
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def spread(values: Sequence[float]) -> Figures:
    """Median and (largest - smallest) / median."""
    middle = statistics.median(values)
    return {"median": middle, "spread": round((max(values) - min(values)) / middle, 4), "n": len(values)}


def load(results: Path, benchmark: str) -> dict[str, Figures]:
    """Finished cases of a benchmark by name."""
    path = results / f"gpu-{benchmark}.json"
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    return {name: case for name, case in cases.items() if "failed" not in case}


def run(
    benchmark: str,
    description: str,
    cases: Sequence[Case],
    ratios: Callable[[dict[str, Figures], Path], list[Ratio]],
) -> None:
    """A script's `main`. `ratios` is given the finished cases and the folder where other benchmarks' results lie."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on a CPU too, nothing written")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=[c.name for c in cases], help="these cases alone")
    parser.add_argument("--again", action="store_true", help="measure finished cases anew")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS", help="start no case later")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # in the process of one case: its name,
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # and where its figures go
    args = parser.parse_args()
    chosen = [c for c in cases if not args.only or c.name in args.only]
    if args.case:
        (case,) = (c for c in cases if c.name == args.case)
        figures = case.measure(False)
        args.write.write_text(json.dumps({"figures": figures, "machine": machine()}))
    elif args.smoke:
        found = {}
        for case in chosen:
            found[case.name] = json.loads(json.dumps(case.measure(True)))
            print(f"{case.name}: {found[case.name]}", flush=True)
        for ratio in ratios({n: f for n, f in found.items() if "skipped" not in f}, args.results):
            print(f"{ratio}, toy sizes", flush=True)
        print(f"{benchmark}: runs, {len(found)} cases on toy sizes", flush=True)
    elif not has_gpu():
        sys.exit("error: PyTorch sees no GPU here\n  do: run it on a machine with one; --smoke runs toy sizes on a CPU")
    else:
        _measure_all(benchmark, chosen, ratios, args.results, args.again, args.stop_after)


def _measure_all(
    benchmark: str,
    cases: Sequence[Case],
    ratios: Callable[[dict[str, Figures], Path], list[Ratio]],
    results: Path,
    again: bool,
    stop_after: float,
) -> None:
    path = results / f"gpu-{benchmark}.json"
    failed, began = 0, time.perf_counter()
    for case in cases:
        if not again and case.name in load(results, benchmark):
            print(f"{benchmark} {case.name}: measured before", flush=True)
            continue
        if time.perf_counter() - began > stop_after:
            failed += 1
            print(f"{benchmark} {case.name}: no time left", flush=True)
            continue
        print(f"{benchmark} {case.name} …", flush=True)
        started = time.perf_counter()
        content, tail = in_child([sys.argv[0], "--case", case.name, "--results", str(results)], case.limit)
        if content is None:
            failed += 1
            print(f"{benchmark} {case.name}: FAILED\n{tail}", flush=True)
            content = {"figures": {"failed": tail}, "machine": None}
        record = json.loads(path.read_text()) if path.exists() else {"benchmark": f"gpu-{benchmark}", "cases": {}}
        record["machine"] = content["machine"] or record.get("machine")
        record["cases"][case.name] = content["figures"] | {"wall_s": round(time.perf_counter() - started, 1)}
        finished = {n: f for n, f in record["cases"].items() if not {"failed", "skipped"} & f.keys()}
        record["ratios"] = [str(ratio) for ratio in ratios(finished, results)]
        write(path, record)
        shown = {k: v for k, v in content["figures"].items() if k not in ("profile", "failed")}
        print(f"{benchmark} {case.name}: {json.dumps(shown)}", flush=True)
    if path.exists():
        print("\n".join(json.loads(path.read_text()).get("ratios", [])), flush=True)
    sys.exit(1 if failed else 0)


def write(path: Path, record: Figures) -> None:
    """At once: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def in_child(arguments: Sequence[str], limit: float) -> tuple[Figures | None, str]:
    """(what the script wrote, the last lines that it said). Its output goes on to ours. None: it failed or was ended
    after `limit` seconds, with all that it started."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "figures.json")
        process = subprocess.Popen(
            [sys.executable, *arguments, "--write", str(answer)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        late = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        said: collections.deque[str] = collections.deque(maxlen=25)
        try:
            for line in process.stdout:
                said.append(line.rstrip())
                print(f"    {said[-1]}", flush=True)
            code = process.wait()
        finally:
            late.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        tail = "\n".join([*said, f"exit code {code}"]).replace(f"{ROOT}/", "")
        return (json.loads(answer.read_text()) if code == 0 and answer.exists() else None), tail
