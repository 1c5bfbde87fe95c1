"""Start a command as several real ranks on this machine, with a limit in time, and kill only what was started."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """One that nobody holds. Below the range from which the system takes ports for outgoing connections: one of those
    could take it before the ranks do."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def rank_environment(**extra: str) -> dict[str, str]:
    """One thread a rank, this checkout's package, and none of an outer launcher's variables."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith(("SLURM_", "PMI_", "OMPI_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **extra}


def start_ranks(count: int, command: list[str], log_dir: Path) -> list[subprocess.Popen[bytes]]:
    """Start `python COMMAND` as `count` ranks, as torchrun would; each writes LOG_DIR/rank-N.log."""
    log_dir.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    processes = []
    for rank in range(count):
        env = rank_environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        with (log_dir / f"rank-{rank}.log").open("ab") as log:
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


def kill_ranks(processes: list[subprocess.Popen[bytes]]) -> None:
    """kill -9 each rank and whatever it started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_ranks(processes: list[subprocess.Popen[bytes]], log_dir: Path, timeout: float) -> list[int]:
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


def run_ranks(count: int, command: list[str], log_dir: Path, timeout: float = 120) -> str:
    """Run to the end; fails with the logs if any rank does. Answers with rank 0's log."""
    codes = wait_ranks(start_ranks(count, command, log_dir), log_dir, timeout)
    assert codes == [0] * count, f"exit codes {codes}\n{logs(log_dir)}"
    return (log_dir / "rank-0.log").read_text()
