"""The interface to a source's files, and its local form."""

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from megatron_mm.data.source_files import file_of

BLOCK = 1 << 23  # bytes of a range when a whole file is read
_WINDOW = 8 * BLOCK  # bytes asked for at once


class Ranges(Protocol):
    """The bytes of one file."""

    def __call__(self, start: int, end: int) -> memoryview:
        """Bytes [start, end)."""
        ...

    def many(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The bytes of each [start, end), in the order asked for."""
        ...


class Storage(Protocol):
    """The files `PREFIX.part`."""

    def where(self, part: str) -> str:
        """The file's full name, for messages."""
        ...

    def read(self, part: str) -> bytes:
        """All of a small file. Raises OSError: there is no such file, or it cannot be read."""
        ...

    def size(self, part: str) -> int:
        """Bytes. Raises OSError: there is no such file."""
        ...

    def mapped(self, part: str, size: int, sha256: str) -> Path:
        """A local file with these contents, to map: the file itself or a copy."""
        ...

    def ranges(self, part: str, size: int) -> Ranges:
        """The file where it lies. Its size has been asked for before."""
        ...


def blocks(ranges: Ranges, size: int) -> Iterator[memoryview]:
    """A whole file, front to end, in bounded memory."""
    for window in range(0, size, _WINDOW):
        end = min(window + _WINDOW, size)
        yield from ranges.many([(start, min(start + BLOCK, end)) for start in range(window, end, BLOCK)])


class LocalRanges:
    """Views of a file's map: nothing is copied, and the map lives as long as they do."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            empty = not path.stat().st_size  # which cannot be mapped
            self._bytes = memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __call__(self, start: int, end: int) -> memoryview:
        return self._bytes[start:end]

    def many(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        return [self._bytes[start:end] for start, end in ranges]


class LocalStorage:
    """Files in a folder."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = prefix

    def where(self, part: str) -> str:
        return str(file_of(self.prefix, part))

    def read(self, part: str) -> bytes:
        return file_of(self.prefix, part).read_bytes()

    def size(self, part: str) -> int:
        return file_of(self.prefix, part).stat().st_size

    def mapped(self, part: str, size: int, sha256: str) -> Path:
        return file_of(self.prefix, part)

    def ranges(self, part: str, size: int) -> LocalRanges:
        return LocalRanges(file_of(self.prefix, part))
