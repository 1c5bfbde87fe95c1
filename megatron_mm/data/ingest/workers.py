"""The processes of one machine that make the shards of a job.

The parent hands out one share at a time over a pipe and hears reports on the same. A pipe that closes tells that its
worker is dead; a worker whose parent is gone ends itself.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Protocol, cast

from megatron_mm.data.ingest.shard_maker import ShardMaker
from megatron_mm.data.ingest.shards import CONTINUE, Job, Report, Share
from megatron_mm.errors import UserError


class Team(Protocol):
    """Those who make shards."""

    def make(self, job: Job, shares: Sequence[Share], hear: Callable[[Report], None]) -> None:
        """Make all of them. What `hear` raises ends the work, as any error does; finished shards stay.

        Raises:
            UserError: a shard cannot be made, or one of the team died.
        """


class Processes:
    """Up to `workers` processes, each with one thread; a single share is made by as many threads of this process.

    Args:
        workers: None: one a core.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))

    def make(self, job: Job, shares: Sequence[Share], hear: Callable[[Report], None]) -> None:
        processes = min(self.workers, len(shares))
        if processes <= 1:
            maker = ShardMaker(job, self.workers)
            for share in shares:
                maker.make(share, hear)
        else:
            _deal(job, shares, processes, self.workers // processes, hear)


def largest_first(shares: Sequence[Share]) -> list[Share]:
    """Reversed, to be popped from the end: so that no large one is left for the end, when the others are idle."""
    return sorted(shares, key=lambda share: (share.bytes, -share.number))


def _deal(job: Job, shares: Sequence[Share], processes: int, threads: int, hear: Callable[[Report], None]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would take over this process's threads and locks
    waiting = largest_first(shares)
    started: list[SpawnProcess] = []
    at_work: dict[Connection, tuple[SpawnProcess, Share]] = {}
    try:
        for _ in range(processes):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(job, threads, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            at_work[pipe] = process, waiting.pop()
            _send(pipe, *at_work[pipe])
        while at_work:
            for ready in wait(list(at_work)):
                pipe = cast(Connection, ready)
                process, share = at_work[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    raise _died(process, share) from None
                heard(message, hear)
                if message.done and waiting:
                    at_work[pipe] = process, waiting.pop()
                    _send(pipe, *at_work[pipe])
                elif message.done:
                    del at_work[pipe]
                    pipe.close()
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _send(pipe: Connection, process: SpawnProcess, share: Share) -> None:
    try:
        pipe.send(share)
    except OSError:
        raise _died(process, share) from None


def heard(message: Report | UserError | str, hear: Callable[[Report], None]) -> None:
    """A worker's message: a report is passed on, an error is raised."""
    if isinstance(message, UserError):
        raise message
    if isinstance(message, str):
        raise RuntimeError(f"a worker failed:\n{message}")
    hear(message)


def _died(process: SpawnProcess, share: Share) -> UserError:
    process.join(5)
    code = process.exitcode
    if code is None or code >= 0:
        return UserError("a worker died", where=str(share), found=f"exit code {code}", do=f"see above; then {CONTINUE}")
    found = f"killed by {signal.Signals(-code).name}"
    if -code == signal.SIGKILL:
        found += ", as the kernel does when memory runs out"
    return UserError("a worker died", where=str(share), found=found, do=f"take fewer --workers, then {CONTINUE}")


def _work(job: Job, threads: int, pipe: Connection) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends the others
    _end_with_parent()
    try:
        maker = ShardMaker(job, threads)
        while True:
            maker.make(pipe.recv(), pipe.send)
    except EOFError:  # there is no more to do
        return
    except Exception as error:
        pipe.send(told(error))


def told(error: Exception) -> UserError | str:
    """An error as it is sent to the one who will raise it."""
    return error if isinstance(error, UserError) else "".join(traceback.format_exception(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
