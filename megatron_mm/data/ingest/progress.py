"""What a build says while it runs: one line, rewritten on a terminal and at most every ten seconds elsewhere."""

import sys
import time
from typing import TextIO

from megatron_mm.data.ingest.shards import Report, Tally


class Progress:
    """Reports of all workers, added up and shown.

    Args:
        size: of the input in bytes.
        shards: in all.
    """

    def __init__(self, name: str, stream: TextIO | None, size: int, shards: int) -> None:
        self.name, self.stream, self.started = name, stream or sys.stderr, time.monotonic()
        self.size, self.shards, self.done = size, shards, 0
        self.reused, self.finished, self.running = Tally(), Tally(), dict[int, Tally]()
        self.shown, self.interval = self.started, 0.5 if self.stream.isatty() else 10.0

    def reuse(self, tally: Tally) -> None:
        """A shard that an earlier run has made."""
        self.reused.add(tally)
        self.finished.add(tally)
        self.done += 1

    def hear(self, report: Report) -> None:
        """A shard that this run makes."""
        if report.done:
            self.running.pop(report.number, None)
            self.finished.add(report.tally)
            self.done += 1
        else:
            self.running[report.number] = report.tally
        if self._due():
            now, before, seconds = self.tally, self.reused, self.seconds
            documents, images = now.documents - before.documents, now.images - before.images
            self._show(
                f"{now.bytes / max(1, self.size):.1%} of {self.size / 1e9:.2f} GB, "
                f"{self.done} of {self.shards} shards, {now.documents} documents ({documents / seconds:.0f}/s), "
                f"{now.images} images ({images / seconds:.0f}/s), {now.bad.total()} bad",
                (now.bytes - before.bytes) / max(1, self.size - before.bytes), seconds,
            )  # fmt: skip

    def merge(self, done: int, size: int, started: float) -> None:
        """Shards put together so far, in bytes."""
        if self._due():
            seconds = time.monotonic() - started
            rate = done / 1e6 / seconds
            self._show(f"merging, {done / size:.1%} of {size / 1e9:.2f} GB ({rate:.0f} MB/s)", done / size, seconds)

    @property
    def tally(self) -> Tally:
        """Of all shards, finished or not."""
        tally = Tally()
        for one in (self.finished, *self.running.values()):
            tally.add(one)
        return tally

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self.shown < self.interval:
            return False
        self.shown = now
        return True

    def _show(self, text: str, share: float, seconds: float) -> None:
        left = f"{(seconds / share - seconds) / 60:.1f} min left" if share > 0 else "time left unknown"
        line = f"{self.name}: {text}, {left}"
        self.stream.write(f"\r{line}\x1b[K" if self.stream.isatty() else line + "\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        self.stream.write(f"{self.name}: {text}\n")
        self.stream.flush()

    def clear(self) -> None:
        """Take the line off a terminal."""
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
            self.stream.flush()
