"""The ranks of an MPI run that make the shards of a job, over many machines: rank 0 deals and merges, the others work.

    mpiexec -n 33 python tools/preprocess_data.py …        srun --mpi=pmi2 -n 33 python tools/preprocess_data.py …

All of them see the same files. Waiting ranks sleep: MPI's own waiting would keep a core busy. An error on any rank ends
all of them.
"""

import fcntl
import os
import select
import signal
import stat
import struct
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from megatron_mm.data.ingest.shard_maker import ShardMaker
from megatron_mm.data.ingest.shards import CONTINUE, Job, Report, Share
from megatron_mm.data.ingest.workers import heard, largest_first, told
from megatron_mm.errors import UserError
from megatron_mm.parallel.launch import launch

SILENCE = 300  # seconds, after which a rank counts as dead
_PATIENCE = 0.005  # seconds between two looks for a message
_HAND_OVER = 10  # seconds for the launcher to read a last message
_ALIVE = "alive"


def world() -> Any:
    """MPI's communicator of all ranks, or None when this process was not started as one of several.

    Raises:
        UserError: it was, but by a launcher that does not speak MPI.
    """
    found = launch()
    if found.world_size == 1:
        return None
    if found.kind != "mpi":
        raise UserError(
            "many ranks, but they cannot speak to each other", where=found.kind, found=f"{found.world_size} processes",
            do="start with mpiexec or with srun --mpi=pmi2; or start one process, with --workers",
        )  # fmt: skip
    from mpi4py import MPI

    return MPI.COMM_WORLD


class Ranks:
    """The ranks from 1 on, seen from rank 0."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    def make(self, job: Job, shares: Sequence[Share], hear: Callable[[Report], None]) -> None:
        waiting = largest_first(shares)
        heard_from: dict[int, float] = {}  # ranks at work, and when they last said something
        for rank in range(1, self.comm.size):
            self.comm.send(job, rank)
            if waiting:
                self.comm.send(waiting.pop(), rank)
                heard_from[rank] = time.monotonic()
        while heard_from:
            if not (received := _receive(self.comm)):
                self._check(heard_from)
                continue
            message, rank = received
            heard_from[rank] = time.monotonic()
            if message == _ALIVE:
                continue
            heard(message, hear)
            if message.done and waiting:
                self.comm.send(waiting.pop(), rank)
            elif message.done:
                del heard_from[rank]

    @staticmethod
    def _check(heard_from: dict[int, float]) -> None:
        """mpiexec ends all ranks when one dies; srun does only when it is told to, and nobody tells the others."""
        rank = min(heard_from, key=heard_from.__getitem__)
        if (silent := time.monotonic() - heard_from[rank]) > SILENCE:
            raise UserError(
                "a rank is dead, or its machine is", where=f"rank {rank}", found=f"no word for {silent:.0f} s",
                do=f"see its machine's log; use srun --kill-on-bad-exit=1; {CONTINUE}",
            )  # fmt: skip


def run(comm: Any, main: Callable[[Ranks], None]) -> None:
    """Rank 0 does `main`, the others what it has for them; the first error ends all ranks."""
    try:
        if comm.rank:
            _serve(comm)
        else:
            main(Ranks(comm))
            for rank in range(1, comm.size):
                comm.send(None, rank)
    except BaseException as error:
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        hand_over_messages()
        code = error.code if isinstance(error, SystemExit) else 2
        # Where a rank is dead already MPI may wait for it: then the kernel ends this one.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)
        comm.Abort(code if isinstance(code, int) else 2)


def hand_over_messages() -> None:
    """Until the launcher has read what this rank printed: on Abort mpiexec drops what still lies in the pipe."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more: the ranks are to end nevertheless
            stream.flush()
            end = time.monotonic() + _HAND_OVER
            while _unread(stream.fileno()) and time.monotonic() < end:
                time.sleep(_PATIENCE)


def _unread(file: int) -> int:
    """Bytes written to a pipe that its reader has not read yet; 0 for other files and when the reader is gone."""
    if not stat.S_ISFIFO(os.fstat(file).st_mode):
        return 0
    poll = select.poll()
    poll.register(file, 0)
    if poll.poll(0):  # POLLERR, which is told unasked
        return 0
    (count,) = struct.unpack("i", fcntl.ioctl(file, termios.FIONREAD, bytes(4)))
    return int(count)


def _serve(comm: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to tidy up here
    maker: ShardMaker | None = None
    speaking = threading.Lock()  # MPI is spoken by one thread at a time

    def say(message: Report | UserError | str) -> None:
        with speaking:
            comm.send(message, 0)

    while True:
        received = _receive(comm)
        if not received:
            continue
        message, _ = received
        if message is None:
            return
        try:
            if isinstance(message, Job):
                maker = ShardMaker(message, threads=1)
            else:
                assert maker
                with _alive(say):
                    maker.make(message, say)
        except Exception as error:
            say(told(error))


@contextmanager
def _alive(say: Callable[[str], None]) -> Iterator[None]:
    """A word every few seconds, however long a record takes."""
    done = threading.Event()

    def speak() -> None:
        while not done.wait(SILENCE / 10):
            say(_ALIVE)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _receive(comm: Any) -> tuple[Any, int] | None:
    """The next message, and whose it is; None when there is none for a while."""
    from mpi4py import MPI

    status = MPI.Status()
    for _ in range(200):
        if comm.iprobe(status=status):
            return comm.recv(source=status.source), status.source
        time.sleep(_PATIENCE)
    return None
