"""The processes that read and decode: how they start, how their end shows, and that they end with the run."""

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Generator
from multiprocessing import forkserver, resource_tracker
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def alive(items: Any) -> Generator[Any, None, None]:
    """What a torch loader's iterator gives; one error for all the ways in which a worker's death shows."""
    # At the interpreter's end workers are asked by SIGTERM, which they hold back, and then waited for: end them first.
    finalizer = multiprocessing.util.Finalize(None, _kill, args=(items._workers,), exitpriority=100)
    try:
        yield from items
    except (OSError, EOFError) as error:  # it died while it handed a microbatch over
        raise RuntimeError("a data worker exited unexpectedly (killed, or out of memory?)") from error
    finally:
        items._shutdown_workers()
        _kill(items._workers)  # those that are left: torch shuts none down while the interpreter ends
        finalizer.cancel()


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()


def end_with_parent(_: int) -> None:
    """In a worker: end when the training process is gone, however it went. Its death shows to nobody else: the server
    process lives as long as its workers do, and they hold each other."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def worker_context() -> Any:
    """Workers come from a server process: forked from the training process they would inherit its threads and devices.

    The server imports torch once for all of them. Signals that ask a run to stop often go to all of its processes;
    server and workers hold them back, so that the training process can finish its step and write a checkpoint.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_mm.data.loader"])
    resource_tracker.ensure_running()  # first, as it would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
