"""Being asked to stop, and leaving word of how the run ended.

A cluster asks in three ways, and all of them end in one flag that the training loop reads after a step:

    SIGTERM              partition preemption, `scancel`, `scontrol requeue`, torchrun's agent: each rank gets it
    SIGUSR1, SIGUSR2     sent to the ranks by hand
    run_dir/stop.J.R     touched by the batch script when Slurm tells it that the time limit of job J, restart R, is
                         near: the script can reach every rank so without a signal passing through srun or torchrun

Exit codes are no answer: srun, torchrun and a dying node each make up their own. `outcome.json` is the answer.
"""

import json
import os
import signal
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Literal

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})


def job_attempt() -> int:
    """How often Slurm has restarted this job; 0 at first and outside Slurm."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def stop_file(run_dir: str | Path) -> Path | None:
    """What the batch script touches to stop this attempt and no later one; None outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return Path(run_dir) / f"stop.{job}.{job_attempt()}" if job else None


class StopSignal:
    """Takes over SIGTERM, SIGUSR1 and SIGUSR2. Make it once a process, in the main thread, before anything slow.

    The signals are also blocked, which every thread and process started from here inherits: Slurm signals all
    processes of a step, and a data-loading worker that dies of it would fail the run instead of stopping it.
    """

    def __init__(self, run_dir: str | Path, rank: int) -> None:
        self._signalled = False
        # One rank asks the file system, not thousands: the ranks tell each other.
        self._file = stop_file(run_dir) if rank == 0 else None
        # Threads that are older than this object do not block the signals; what reaches them ends here.
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        # Python's tracker unblocks SIGTERM when it starts, which would be just before the first worker does.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only a flag: a handler may run between any two instructions, in the middle of a collective too.
        self._signalled = True

    def requested(self) -> bool:
        """Whether this rank has been asked. Others may not have been: agree by a maximum over ranks, then stop."""
        if signal.sigpending() & STOP_SIGNALS or (self._file is not None and self._file.exists()):
            self._signalled = True
        return self._signalled


def write_outcome(run_dir: str | Path, state: Literal["preempted", "finished"], step: int) -> None:
    """Say in run_dir/outcome.json how this attempt ended, after its checkpoint of `step` is whole. Rank 0 only.

    The batch script removes the file when an attempt starts; where it is missing at the end, the attempt failed.
    """
    path = Path(run_dir) / "outcome.json"
    temporary = path.with_name(f".outcome.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(json.dumps({"state": state, "step": step, "attempt": job_attempt()}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
