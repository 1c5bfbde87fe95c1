"""Where the records of a file lie that is one JSON list: found in one pass, with no more than a record in memory.

The file is read as Latin-1, where a character is a byte: JSON's marks are ASCII, so the borders are right, whatever the
text's bytes are. Each record is parsed anew, as UTF-8, when it is read.
"""

import json
import re
from array import array
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from megatron_mm.errors import UserError

MAX_RECORD_BYTES = 64 << 20
_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_NUMBER = "0123456789.eE+-"  # behind a value, these may be the rest of a number that the window cuts
_SPACE = re.compile(r"[ \t\r\n]*")
_START = re.compile(rb"[ \t\r\n]*\[")
_DECODER = json.JSONDecoder(strict=False, parse_int=str)  # what a value is does not matter here: only where it ends


class Borders(NamedTuple):
    """First byte of each record, and the one after its last."""

    starts: array
    ends: array


def is_array(path: Path) -> bool:
    """A JSON list, by the first bytes. Raises OSError."""
    with path.open("rb") as file:
        return bool(_START.match(file.read(4096).removeprefix(_BOM)))


def find_borders(path: Path) -> Borders:
    """Borders of a file's records; a worker that reads several chunks of a file finds them once.

    Raises:
        UserError: it is no JSON list, is cut off, or holds a record of more than MAX_RECORD_BYTES.
    """
    try:
        status = path.stat()
        return _find(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise UserError("cannot read the input", where=str(path), found=error.strerror) from None


@lru_cache(maxsize=1)
def _find(path: Path, modified: int, size: int) -> Borders:
    borders = Borders(array("q"), array("q"))
    with path.open("rb") as file:
        window = _Window(path, file)
        window.take("[")
        if window.next() == "]":
            window.take("]")
        else:
            while True:
                start = window.position
                end = window.skip_value()
                borders.starts.append(start)
                borders.ends.append(end)
                if window.next() == "]":
                    window.take("]")
                    break
                window.take(",")
                window.next()
        if window.next():
            raise window.fault("not JSON: more stands after the list's end")
    return borders


class _Window:
    """The part of a file that is being looked at. It slides on, and grows where a value is longer than it."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        skipped = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(skipped)
        self.offset = skipped  # of the text's first character in the file
        self.text, self.at, self.ended = "", 0, False
        self.next()

    @property
    def position(self) -> int:
        return self.offset + self.at

    def fault(self, what: str) -> UserError:
        return UserError(what, where=f"{self.path}: byte {self.position + 1}", allowed="a JSON list of records")

    def _read(self) -> None:
        """At least as much again as there is."""
        more = self.file.read(max(_BLOCK, len(self.text) - self.at))
        self.ended = not more
        self.offset += self.at
        self.text, self.at = self.text[self.at :] + more.decode("latin-1"), 0

    def next(self) -> str:
        """The next character that is no white space, which is where the window stands then; "" at the file's end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read()

    def take(self, mark: str) -> None:
        if (found := self.next()) != mark:
            raise self.fault(
                f"not JSON: {mark!r} is expected, there is {found!a}" if found else "not JSON: it is cut off"
            )
        self.at += 1

    def skip_value(self) -> int:
        """Where the value ends that starts here."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self.text, self.at)
                if self.ended or (end < len(self.text) and self.text[end] not in _NUMBER):
                    self.at = end
                    return self.position
            except RecursionError:
                raise self.fault("not JSON: nested too deeply") from None
            except ValueError as error:
                if self.ended:
                    raise self.fault(f"not JSON, or cut off: {error.args[0].partition(':')[0]}") from None
            if len(self.text) - self.at > MAX_RECORD_BYTES:
                raise self.fault(f"a record of more than {MAX_RECORD_BYTES >> 20} MiB, or not JSON")
            self._read()
