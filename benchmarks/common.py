"""What every benchmark shares: how it is called, fair timing, and where its figures go.

    make bench NAME=packing                        measures, and writes benchmarks/results/packing.json
    .venv/bin/python benchmarks/packing.py --smoke  seconds, on toy sizes, to see that it works; writes nothing

Competitors run in the same call and take turns, so that a slow minute of the machine meets all of them. Figures are
medians over the rounds; the spread beside them is (largest - smallest) / median.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMPETITORS = ROOT / ".venv" / "benchmarks"  # where benchmarks/requirements.txt is installed
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not


@dataclass(frozen=True)
class Options:
    smoke: bool
    rounds: int


def options(description: str, rounds: int) -> Options:
    """Of the command line; `rounds` is how often each competitor is measured unless told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, nothing written")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"measurements of each competitor (default {rounds})"
    )
    args = parser.parse_args()
    return Options(args.smoke, 1 if args.smoke else args.rounds)


@dataclass(frozen=True)
class Figure:
    """A quantity measured several times."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0

    def __str__(self) -> str:
        return f"{self.median:.4g} (spread {self.spread:.0%} of {len(self.values)})"


def take_turns(competitors: dict[str, Callable[[], float]], rounds: int) -> dict[str, Figure]:
    """What each gives, `rounds` times, one after the other in each round; the order turns round by round."""
    values: dict[str, list[float]] = {name: [] for name in competitors}
    names = list(competitors)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            values[name].append(competitors[name]())
            print(f"  round {number + 1}/{rounds}  {name}: {values[name][-1]:.4g}", flush=True)
    return {name: Figure(found) for name, found in values.items()}


class Stopwatch:
    """`with Stopwatch() as watch: …`, then watch.wall and watch.cpu: seconds, of all threads of this process."""

    def __enter__(self) -> "Stopwatch":
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def in_child(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """What a module's function answers in a fresh process with one thread, and the bytes that the process held at
    most, mapped files included."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=_one_thread) as pool:
        result: tuple[Any, int] = pool.apply(_measured, (function, *args))
        return result


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"


def _measured(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    return function(*args), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory() -> tuple[int, int]:
    """Bytes that this process holds now: its own, and in all (pages of mapped files too, which the system takes back
    when it needs them)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, all_ = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    return own, all_


def import_competitors() -> None:
    """Make the packages of benchmarks/requirements.txt importable."""
    sys.path.append(str(COMPETITORS))
    try:
        importlib.metadata.version("megatron-energon")
        importlib.metadata.version("webdataset")
    except importlib.metadata.PackageNotFoundError as missing:
        folder, requirements = COMPETITORS.relative_to(ROOT), "benchmarks/requirements.txt"
        sys.exit(
            f"error: this benchmark compares with {missing}, which is not installed\n"
            f"  do: .venv/bin/python -m pip install --no-deps --target {folder} -r {requirements}"
        )


def machine(packages: Sequence[str]) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "load_before": round(_LOAD_BEFORE, 2),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in sorted({"megatron-mm", "numpy", *packages})},
    }


_LOAD_BEFORE = os.getloadavg()[0]


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Printed as GitHub's Markdown, ready for docs/performance.md."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def finish(
    name: str,
    ours: tuple[float, str],
    other: tuple[float, str],
    target: str,
    reached: bool,
    figures: dict[str, Any],
    packages: Sequence[str],
    smoke: bool,
) -> None:
    """Write the results, and print the last line: `NAME: ours / other = ratio (target …)`.

    Args:
        ours: value and what it is.
        other: of the competitor that the target names.
    """
    ratio = ours[0] / other[0]
    if not smoke:
        RESULTS.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": name, "ours": ours[0], "ours_is": ours[1], "other": other[0], "other_is": other[1],
            "ratio": round(ratio, 4), "target": target, "reached": reached, "machine": machine(packages),
        } | figures  # fmt: skip
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    verdict = "toy sizes" if smoke else "reached" if reached else "missed"
    print(f"{name}: {ours[0]:.4g} {ours[1]} / {other[0]:.4g} {other[1]} = {ratio:.3g} (target {target}: {verdict})")


def _plain(value: Any) -> Any:
    if isinstance(value, Figure):
        return {"median": value.median, "values": value.values}
    return value.item()  # a number of numpy's
