"""A line on stderr of how far long work is, told in bytes."""

import sys
import time
from typing import TextIO


class ByteProgress:
    """Called with bytes done and bytes in all: shows share, rate and time left, rewritten on a terminal and every ten
    seconds elsewhere. Short work shows nothing."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self.name, self.stream = name, stream or sys.stderr
        self.interval = 0.5 if self.stream.isatty() else 10.0
        self.started = self.shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.shown < self.interval:
            return
        self.shown = now
        seconds = now - self.started
        left = seconds * (total - done) / max(1, done)
        line = f"{self.name}: {done / max(1, total):.1%}, {done / seconds / 1e6:.0f} MB/s, {left / 60:.1f} min left"
        self.stream.write(f"\r{line}\x1b[K" if self.stream.isatty() else line + "\n")
        self.stream.flush()

    def end(self) -> None:
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
