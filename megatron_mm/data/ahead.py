"""Work done ahead of its consumer, by a thread."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(items: Generator[T, None, None], work: Callable[[T], R], depth: int) -> Generator[R, None, None]:
    """`work` of each item in order, done up to `depth` items before it is asked for; errors come in their place.

    It closes `items` when it ends or is closed.
    """
    results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    room, closed = threading.Semaphore(depth), threading.Event()

    def run() -> None:
        try:
            while room.acquire() and not closed.is_set():
                item = next(items, None)
                if item is None:
                    break
                results.put((True, work(item)))
        except BaseException as error:  # for the consumer, whatever it is
            results.put((False, error))
        else:
            results.put((False, None))

    thread = threading.Thread(target=run, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            there, value = results.get()
            if there:
                room.release()
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        closed.set()
        room.release()
        thread.join()
        items.close()
