"""Start a command as several real ranks on this machine, with a limit in time, and kill only what was started.

Scripts of the tests are forked from processes that have imported torch and Megatron-Core already (`rank_server.py`).
Any other command is a process of its own, and all are on a machine with a GPU, which does not survive a fork.
"""

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mm.parallel.backend import on_gpu
from megatron_mm.parallel.launch import free_port

ROOT = Path(__file__).resolve().parent.parent


def rank_environment(**extra: str) -> dict[str, str]:
    """One thread a rank, this checkout's package, and none of an outer launcher's variables."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith(("SLURM_", "PMI_", "OMPI_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **extra}


class _Server:
    """A running `rank_server.py`."""

    def __init__(self, env: dict[str, str]) -> None:
        self.process: Any = subprocess.Popen(
            [sys.executable, "-m", "tests.rank_server"], bufsize=0, cwd=ROOT, env=env, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.codes: dict[int, int] = {}

    def start(self, command: list[str], env: dict[str, str], log: Path) -> "ForkedRank":
        self.process.stdin.write(json.dumps({"command": command, "env": env, "log": str(log)}).encode() + b"\n")
        while (pid := self._hear().get("pid")) is None:
            pass
        return ForkedRank(self, pid)

    def _hear(self) -> dict[str, int]:
        line = self.process.stdout.readline()
        assert line, "the rank server has died"
        message = json.loads(line)
        if "ended" in message:
            self.codes[message["ended"]] = message["code"]
        return message

    def code(self, pid: int) -> int | None:
        while pid not in self.codes and select.select([self.process.stdout], [], [], 0)[0]:
            self._hear()
        return self.codes.get(pid)


class ForkedRank:
    """What `subprocess.Popen` is for a rank that a server has forked."""

    def __init__(self, server: _Server, pid: int) -> None:
        self.server, self.pid = server, pid

    def poll(self) -> int | None:
        return self.server.code(self.pid)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    @property
    def returncode(self) -> int | None:
        return self.poll()


Rank = subprocess.Popen[bytes] | ForkedRank


@functools.cache
def _server(rank: int, path: str) -> _Server:
    """One for each number of a rank, and for each PYTHONPATH: Megatron-Core may come from elsewhere. It ends with this
    process, which holds its input."""
    return _Server({**rank_environment(), "PYTHONPATH": path})


def start_ranks(count: int, command: list[str], log_dir: Path) -> Sequence[Rank]:
    """Start `python COMMAND` as `count` ranks, as torchrun would; each writes LOG_DIR/rank-N.log."""
    log_dir.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    processes: list[Rank] = []
    for rank in range(count):
        env = rank_environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        path = log_dir / f"rank-{rank}.log"
        with path.open("ab") as log:
            if command[0].endswith(".py") and not on_gpu():
                processes.append(_server(rank, env["PYTHONPATH"]).start(command, env, path))
                continue
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=env,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
    return processes


def kill_ranks(processes: Sequence[Rank]) -> None:
    """kill -9 each rank and whatever it started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_ranks(processes: Sequence[Rank], log_dir: Path, timeout: float) -> list[int | None]:
    """Exit codes. One rank's failure ends the others after a grace; none outlives `timeout` seconds."""
    end = time.monotonic() + timeout
    while any(p.poll() is None for p in processes):
        if any(p.poll() not in (None, 0) for p in processes):
            end = min(end, time.monotonic() + 15)
        if time.monotonic() > end:
            kill_ranks(processes)
        time.sleep(0.05)
    return [p.returncode for p in processes]


def logs(log_dir: Path) -> str:
    return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-4000:]}" for f in sorted(log_dir.glob("*.log")))


def run_ranks(count: int, command: list[str], log_dir: Path, timeout: float = 300) -> str:
    """Run to the end; fails with the logs if any rank does. Answers with rank 0's log."""
    codes = wait_ranks(start_ranks(count, command, log_dir), log_dir, timeout)
    assert codes == [0] * count, f"exit codes {codes}\n{logs(log_dir)}"
    return (log_dir / "rank-0.log").read_text()
