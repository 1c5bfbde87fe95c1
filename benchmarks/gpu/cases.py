"""Cases of a benchmark on a GPU, measured one by one, each kept as soon as it is there.

    python benchmarks/gpu/step_3b.py                    measures what benchmarks/results/gpu-step_3b.json lacks
    python benchmarks/gpu/step_3b.py --only mix-bf16    one case; --again measures it although it is there
    python benchmarks/gpu/step_3b.py --smoke            toy sizes, nothing written: does the code run here?

The cases of a script share a process, since starting one takes longer than many a measurement; each finds the GPU
empty, or a new process is started for it. A case that fails or hangs ends its process and takes no other case with it:
the next ones get another. Figures, and the machine that they are of, go into the file before the next case counts; a
failed case is written down with the end of its output, and is tried again by the next call.
"""

import argparse
import collections
import contextlib
import gc
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kit import RESULTS, ROOT, Figures, clocks, has_gpu, load, machine, write


class Case(NamedTuple):
    """`measure(smoke)` answers with figures, or with {"skipped": reason} where this machine cannot run it."""

    name: str
    measure: Callable[[bool], Figures]
    limit: int = 300  # seconds
    # Set in the case's process from its start, which it then has for itself: what is read once, at import.
    environment: tuple[tuple[str, str], ...] = ()


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
    parser.add_argument("--answer-to", type=int, help=argparse.SUPPRESS)  # in the process of cases: a pipe
    args = parser.parse_args()
    chosen = [c for name in args.only for c in cases if c.name == name] if args.only else list(cases)
    if args.answer_to is not None:
        _answer(chosen, args.answer_to)
    elif args.smoke:
        _rehearse(benchmark, chosen, ratios, args.results)
    elif not has_gpu():
        sys.exit("error: PyTorch sees no GPU here\n  do: run it on a machine with one; --smoke runs toy sizes on a CPU")
    else:
        _measure_all(benchmark, chosen, ratios, args.results, args.again, args.stop_after)


def _rehearse(
    benchmark: str, cases: Sequence[Case], ratios: Callable[[dict[str, Figures], Path], list[Ratio]], results: Path
) -> None:
    """Every case on toy sizes in this process; what fails does not keep the others from being tried."""
    found: dict[str, Figures] = {}
    failed = []
    for case in cases:
        try:
            found[case.name] = json.loads(json.dumps(case.measure(True)))
            print(f"{case.name}: {found[case.name]}", flush=True)
        except Exception:
            failed.append(case.name)
            print(f"{case.name}: FAILED\n{traceback.format_exc()}", flush=True)
            _end_groups()
    for ratio in ratios({n: f for n, f in found.items() if "skipped" not in f}, results):
        print(f"{ratio}, toy sizes", flush=True)
    if failed:
        sys.exit(f"{benchmark}: FAILED on toy sizes: {' '.join(failed)}")
    print(f"{benchmark}: runs, {len(found)} cases on toy sizes", flush=True)


def _end_groups() -> None:
    """Of a case that failed inside its world."""
    from megatron_mm.parallel.topology import shut_down

    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        shut_down()


# --- in the process of the cases ---

_EMPTY = 1 << 30  # bytes on the GPU that may stay behind: workspaces of cuBLAS and Transformer Engine


def _answer(cases: Sequence[Case], pipe: int) -> None:
    """Each case's beginning and its figures, a line of JSON each."""
    with os.fdopen(pipe, "w") as answers:

        def say(**message: Any) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        for case in cases:
            if _left_on_gpu() > _EMPTY:
                return  # the others get a new process
            say(begins=case.name)
            before = dict(os.environ)
            figures = case.measure(False)
            if has_gpu():
                figures["sm_mhz_temperature_watts_after"] = clocks()
            say(figures=figures, machine=machine())
            del figures
            os.environ.clear()
            os.environ.update(before)


def _left_on_gpu() -> int:
    """Bytes that are still taken, after everything that can go has gone."""
    if "torch" not in sys.modules or not has_gpu():
        return 0
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


# --- in the script ---


def _measure_all(
    benchmark: str,
    cases: Sequence[Case],
    ratios: Callable[[dict[str, Figures], Path], list[Ratio]],
    results: Path,
    again: bool,
    stop_after: float,
) -> None:
    path, end = results / f"gpu-{benchmark}.json", time.perf_counter() + stop_after
    failed = 0
    left = collections.deque(cases)
    if not again:
        done = load(results, benchmark)
        for case in cases:
            if case.name in done:
                left.remove(case)
                print(f"{benchmark} {case.name}: measured before", flush=True)
    while left and time.perf_counter() < end:
        together = list(itertools.takewhile(lambda c: c.environment == left[0].environment, left))
        if left[0].environment:
            del together[1:]
        with _Child(together, results) as child:
            while left and left[0] in together and time.perf_counter() < end:
                case, started = left[0], time.perf_counter()
                if not child.begins(case):
                    break
                print(f"{benchmark} {case.name} …", flush=True)
                answer = child.figures(case)
                left.popleft()
                if answer is None:
                    failed += 1
                    answer = {"figures": {"failed": child.tail()}, "machine": None}
                    print(f"{benchmark} {case.name}: FAILED\n{child.tail()}", flush=True)
                _keep(path, benchmark, case, answer, time.perf_counter() - started, ratios)
    for case in left:
        failed += 1
        print(f"{benchmark} {case.name}: no time left", flush=True)
    if path.exists():
        print("\n".join(json.loads(path.read_text()).get("ratios", [])), flush=True)
    sys.exit(1 if failed else 0)


def _keep(
    path: Path,
    benchmark: str,
    case: Case,
    answer: Figures,
    seconds: float,
    ratios: Callable[[dict[str, Figures], Path], list[Ratio]],
) -> None:
    figures = answer["figures"]
    record: Figures = {"benchmark": f"gpu-{benchmark}", "cases": {}}
    if path.exists():
        record = json.loads(path.read_text())
    record["machine"] = answer["machine"] or record.get("machine")
    record["cases"][case.name] = figures | {"wall_s": round(seconds, 1)}
    finished = {n: f for n, f in record["cases"].items() if not {"failed", "skipped"} & f.keys()}
    record["ratios"] = [str(ratio) for ratio in ratios(finished, path.parent)]
    write(path, record)
    shown = {k: v for k, v in figures.items() if k not in ("profile", "failed", "losses")}
    print(f"{benchmark} {case.name}: {json.dumps(shown)}", flush=True)


class _Child:
    """A process that goes through cases; its output goes on to ours. Leaving the block ends it with all that it
    started."""

    def __init__(self, cases: Sequence[Case], results: Path) -> None:
        inside, outside = os.pipe()
        self._said: collections.deque[str] = collections.deque(maxlen=25)
        self._rest, self._began, self._dead = "", False, False
        self._pipe = inside
        command = [sys.executable, sys.argv[0], "--results", str(results), "--answer-to", str(outside)]
        self._process = subprocess.Popen(
            [*command, "--only", *(case.name for case in cases)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True, pass_fds=[outside],
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(cases[0].environment),
        )  # fmt: skip
        os.close(outside)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        os.close(self._pipe)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line.rstrip())
            print(f"    {self._said[-1]}", flush=True)

    def _end(self) -> None:
        if not self._dead:
            self._dead = True
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._listener.join(5)  # what it started may hold its output open

    def _message(self, limit: float) -> Figures | None:
        """None: it ended, or was silent for that long."""
        end = time.perf_counter() + limit
        while "\n" not in self._rest:
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, end - time.perf_counter()))
            content = os.read(self._pipe, 1 << 16).decode() if ready else ""
            if not content:
                if ready:  # it closed the pipe: it ends by itself
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(20)
                self._end()
                return None
            self._rest += content
        line, self._rest = self._rest.split("\n", 1)
        message: Figures = json.loads(line)
        return message

    def begins(self, case: Case) -> bool:
        """Whether it starts with the case. False: the case is for a new process. One that comes to no case at all has
        failed at the first."""
        message = self._message(240)
        if message is None:
            return not self._began
        assert message == {"begins": case.name}
        self._began = True
        return True

    def figures(self, case: Case) -> Figures | None:
        """What it measured and the machine. None: it failed, or was ended after the case's limit."""
        return None if self._dead else self._message(case.limit)

    def tail(self) -> str:
        """The last lines of its output."""
        return "\n".join([*self._said, f"exit code {self._process.returncode}"]).replace(f"{ROOT}/", "")
