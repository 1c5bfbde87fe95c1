"""Everything on one GPU, in an order that gives most when it is cut off. `run.sh` starts it.

    benchmarks/gpu/run.sh [--results DIR] [--archive FILE.tar.gz] [--earlier FILE…] [--minutes N] [STAGE…]

Results are DIR/gpu-*.json (benchmarks/results), each case written as soon as it is measured. A second call does what
is missing or failed. STAGE names what to do alone: `decode`, or `step_3b:mix-bf16,text-bf16`. --archive keeps one file
with all results up to date, for machines whose disk goes away; --earlier takes over what such files have. --minutes
starts no case after N minutes.

The first stage, `rehearsal`, runs every other one on toy sizes and `tests/gpu`, all side by side: what cannot run here
shows in two minutes. It alone runs without a GPU too, by the local layers.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from gather import Archive, merge
from kit import RESULTS, ROOT, write

HERE = Path(__file__).resolve().parent
SCRIPTS = (
    "check", "ceilings", "step_3b", "vit", "attention", "memory", "decode", "data_wait", "fp8_loss", "moe", "levers"
)  # fmt: skip
PLAN = (
    "rehearsal",
    "check",
    "ceilings",
    "step_3b:mix-bf16,text-bf16,mix-fp8-tensorwise,text-transformers,text-bare,images-bf16",
    "vit:te-16,transformers-16,te-64",
    "memory:3b",
    "decode:gpu-16,cpu-all-cores",
    "data_wait:dali-4-workers",
    "fp8_loss:bf16,tensorwise",
    "moe:experts-bf16,dense-bf16",
    "levers:none,gradients+loss,text,text+gradients+loss,fp8,fp8+gradients+loss",
    "step_3b:mix-fp8-tensorwise-encoder-too,text-fp8-tensorwise,images-transformers",
    "fp8_loss:tensorwise-encoder-too,blockwise,delayed",
    "memory:ablation-6-layers,3b-recompute,experts",
    "attention",
    "data_wait:cpu-8-workers",
    "step_3b", "levers", "vit", "moe", "fp8_loss", "decode", "memory", "data_wait", "tests", "long-tests",
)  # fmt: skip


REHEARSAL = 270  # seconds that a stage may take on toy sizes


def command_of(stage: str) -> list[str]:
    name, _, cases = stage.partition(":")
    if name in ("tests", "long-tests"):
        return [str(HERE / "run_tests.py"), *(["--long"] if name == "long-tests" else [])]
    return [str(HERE / f"{name}.py"), *(["--only", *cases.split(",")] if cases else [])]


def _say(log: IO[str], line: str) -> None:
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def _run(command: list[str], log: IO[str]) -> int:
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    for line in process.stdout:
        _say(log, line.rstrip())
    return process.wait()


def rehearse(results: Path, log: IO[str], stages: Sequence[str]) -> bool:
    """Whether each of them runs on toy sizes, `tests` as they are; gpu-rehearsal.json has what a failed one said."""
    path = results / "gpu-rehearsal.json"
    record: dict[str, Any] = {"benchmark": "gpu-rehearsal", "cases": {}}
    if path.exists():
        record = json.loads(path.read_text())
    lock = threading.Lock()

    def one(stage: str) -> bool:
        started = time.perf_counter()
        command = ["timeout", "-k", "10", str(REHEARSAL), sys.executable, *command_of(stage)]
        done = subprocess.run(
            [*command, "--smoke", "--results", str(results)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        case: dict[str, Any] = {"wall_s": round(time.perf_counter() - started, 1)}
        if done.returncode:
            said = f"{done.stdout}\nexit code {done.returncode}".replace(f"{ROOT}/", "")
            case["failed"] = said[-8000:]
        with lock:
            record["cases"][stage] = case
            write(path, record)
            verdict = "FAILED\n" + case["failed"][-3000:] if "failed" in case else "runs"
            _say(log, f"rehearsal {stage} [{case['wall_s']} s]: {verdict}")
        return not done.returncode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return all(list(pool.map(one, stages)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {' '.join(dict.fromkeys(PLAN))}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="keep all results in this .tar.gz")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], metavar="FILE", help="archives, or folders")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no case later")
    args = parser.parse_args()
    known = {*SCRIPTS, "rehearsal", "tests", "long-tests"}
    for stage in args.stages:
        if stage.partition(":")[0] not in known:
            parser.error(f"no such stage: {stage}; allowed: {' '.join(sorted(known))}")
    for path in args.earlier:
        if not path.exists():
            parser.error(f"--earlier {path}: no such file or folder")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    args.results.mkdir(parents=True, exist_ok=True)
    merge(args.results, args.earlier)
    began, failed = time.perf_counter(), []
    with Archive(args.results, args.archive), (args.results / "gpu-run.log").open("a") as log:
        for stage in args.stages or PLAN:
            spent = time.perf_counter() - began
            left = args.minutes * 60 - spent
            if left <= 0:
                _say(log, f"=== {args.minutes:g} minutes are over; left: {stage} and what comes after it")
                failed.append(f"{stage} (not started)")
                break
            _say(log, f"=== {stage} [{spent:.0f} s]")
            if stage.partition(":")[0] == "rehearsal":
                chosen = stage.partition(":")[2]
                good = rehearse(args.results, log, chosen.split(",") if chosen else ["tests", *SCRIPTS])
            else:
                good = not _run([*command_of(stage), "--results", str(args.results), "--stop-after", str(left)], log)
            if not good:
                failed.append(stage)
        spent = time.perf_counter() - began
        rest = f"; something failed or left in: {' '.join(failed)}" if failed else ""
        _say(log, f"=== done in {spent:.0f} s{rest}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
