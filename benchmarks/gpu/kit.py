"""What the benchmarks on a GPU share: the machine that figures are of, timing by the GPU's own clock, result files."""

import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
for folder in (ROOT / "benchmarks", ROOT):  # a script's own folder is on the path, these are not
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

Figures = dict[str, Any]
_PACKAGES = (
    "torch", "numpy", "megatron-core", "transformer-engine", "nvidia-dali-cuda130", "nvidia-cudnn-cu13", "transformers"
)  # fmt: skip


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    """What the figures are of. In the process that has the GPU."""
    import torch

    versions: dict[str, str] = {"megatron-mm": _version_here(), "python": platform.python_version()}
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
    return found | {"versions": versions}


def _version_here() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "megatron_mm/__init__.py").read_text())[1]  # type: ignore[index]


def clocks() -> str | None:
    """MHz, °C, W: of now."""
    return _smi("clocks.sm,temperature.gpu,power.draw")


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


def write(path: Path, record: Figures) -> None:
    """At once: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)
