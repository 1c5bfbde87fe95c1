"""Lines of a text file, plain or compressed by gzip, Zstandard or zip, in chunks that workers share.

A plain file is cut into byte ranges, at line ends; a compressed one can be read from its start alone, so it is one
chunk; a zip archive holds one file. Only a newline ends a line.
"""

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO, Any

from megatron_mm.data.ingest import CHUNK_BYTES, BadRecord, Chunk
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.errors import UserError

MAX_LINE_BYTES = 256 << 20  # a longer line is no record: it would fill a worker's memory
_BLOCK = 1 << 20
_SAMPLE = 100  # lines at a file's start
_ZSTD_INPUT = 1 << 10  # bytes decompressed at once: 32 MiB at the most, should they be all zeros
_ZSTD_WINDOW = 1 << 31  # `zstd --long=31` writes these
_Readable = IO[bytes] | io.BufferedIOBase
_SUFFIXES = (".gz", ".zst", ".zip")


class DamagedError(ValueError):
    """The rest of the input cannot be read; the message is a reason for people."""


def line_chunks(
    paths: Sequence[Path], chunk_bytes: int = CHUNK_BYTES, pictures: Callable[[bytes], int] = lambda line: 0
) -> list[Chunk]:
    """Files cut at line ends, about `chunk_bytes` each.

    Args:
        pictures: how many pictures a line names that lie elsewhere. A file's first lines tell how much its chunks bring
            with them; a chunk's `bytes` count that.
    Raises:
        UserError: a file cannot be read, or its name promises a compression that it does not have.
    """
    chunks: list[Chunk] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                start, size = 0, file.seek(0, io.SEEK_END)
                if compression := _compression(path, file):
                    _decompressed(file, compression).close()  # is the package there that this takes?
                    chunks.append(Chunk(path, 0, size, size))
                    continue
                weight = _weight(first_lines(path), pictures)
                while start < size:
                    end = _next_line(file, start + max(1, int(chunk_bytes / weight)), size)
                    chunks.append(Chunk(path, start, end, int((end - start) * weight)))
                    start = end
        except OSError as error:
            raise UserError("cannot read the input", where=str(path), found=error.strerror) from None
        except DamagedError as error:
            raise UserError(str(error), where=str(path)) from None
    return chunks


def read_lines(chunk: Chunk) -> Iterator[tuple[str, bytes] | BadRecord]:
    """Lines of a chunk that are not empty, each with the id of a record there.

    The id is FILE:LINE. In a later chunk of a file, whose lines are not numbered without reading all before them, it is
    FILE:byte N: `tail -c +N FILE | head -n 1` shows the line.
    """
    where = f"{chunk.path}:1"
    try:
        with chunk.path.open("rb") as raw:
            compression = _compression(chunk.path, raw)
            raw.seek(chunk.start)
            with closing(_decompressed(raw, compression)) as file:
                position, number = chunk.start, 0
                while compression or position < chunk.end:
                    number += 1
                    where = f"{chunk.path}:{number}" if chunk.start == 0 else f"{chunk.path}:byte {position + 1}"
                    line, length = _line(file)
                    if not length:
                        if compression:
                            return
                        raise DamagedError(f"truncated: the file ends {chunk.end - position} bytes early")
                    position += length
                    if length > MAX_LINE_BYTES:
                        yield BadRecord(where, f"line too long: {length} bytes, allowed are {MAX_LINE_BYTES}")
                    elif line.strip():
                        yield where, line
    except DamagedError as error:
        yield BadRecord(where, str(error), damaged_input=True)
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
        yield BadRecord(
            where, f"damaged {'zip' if compression == '.zip' else 'gzip'} file: {error}", damaged_input=True
        )
    except OSError as error:
        yield BadRecord(where, f"cannot read the input: {error.strerror}", damaged_input=True)


def first_lines(path: Path) -> list[bytes]:
    """Some at a file's start, to see what its lines hold; none where it cannot be read."""
    start = Chunk(path, 0, _BLOCK, _BLOCK)
    return [line[1] for line in islice(read_lines(start), _SAMPLE) if not isinstance(line, BadRecord)]


def _weight(lines: Sequence[bytes], pictures: Callable[[bytes], int]) -> float:
    """Bytes to be read for a byte of the file, pictures that lie elsewhere among them."""
    return 1 + PICTURE_BYTES * sum(map(pictures, lines)) / max(1, sum(map(len, lines)))


def _next_line(file: IO[bytes], position: int, size: int) -> int:
    """The first start of a line at or after `position`; `size` if there is none."""
    if position >= size:
        return size
    file.seek(position - 1)
    while block := file.read(_BLOCK):
        if (newline := block.find(b"\n")) >= 0:
            return file.tell() - len(block) + newline + 1
    return size


def _line(file: _Readable) -> tuple[bytes, int]:
    """A line and its length; of one that is too long, its start and the length of it all."""
    line = file.readline(MAX_LINE_BYTES + 1)
    length = len(line)
    if length > MAX_LINE_BYTES:
        last = line
        while last and not last.endswith(b"\n"):
            last = file.readline(_BLOCK)
            length += len(last)
    return line, length


def _compression(path: Path, file: IO[bytes]) -> str:
    """One of _SUFFIXES or "", told by the first bytes. Raises UserError where the name says otherwise."""
    file.seek(0)
    start = file.read(4)
    if start.startswith(b"\x1f\x8b"):
        return ".gz"
    if start == b"\x28\xb5\x2f\xfd" or re.fullmatch(rb"[\x50-\x5f]\x2a\x4d\x18", start):  # a frame, or one to skip
        return ".zst"
    if start == b"PK\x03\x04":
        return ".zip"
    if path.suffix in _SUFFIXES:
        raise UserError(
            f"this is no {path.suffix} file", where=str(path), found=f"first bytes {start!r}",
            do="download or write it anew",
        )  # fmt: skip
    return ""


def _decompressed(file: IO[bytes], compression: str) -> _Readable:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".zst":
        return io.BufferedReader(_ZstdFile(file), _BLOCK)
    if compression == ".zip":
        return _unzipped(file)
    return file


def _unzipped(file: IO[bytes]) -> _Readable:
    """The only file of an archive, as a stream."""
    try:
        archive = zipfile.ZipFile(file)
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len(names) == 1:
            return archive.open(names[0])
    except (
        zipfile.BadZipFile,
        ValueError,
        RuntimeError,
    ) as error:  # RuntimeError: a password, or an unknown way to pack
        raise DamagedError(f"damaged zip file: {error}") from None
    raise DamagedError(f"a zip file must hold one file: this one holds {len(names)}")


class _ZstdFile(io.RawIOBase):
    """Frames of Zstandard as one stream. The package's own stream takes a truncated frame for the end of the file."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(
                "reading .zst files needs the package zstandard", do="pip install 'megatron-mm[ingest]'"
            ) from None
        self.file, self.error = file, zstandard.ZstdError
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self.frame: Any = None  # the one being read
        self.input, self.output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.output:
            self.input = self.input or self.file.read(_ZSTD_INPUT)
            if not self.input:
                if self.frame:
                    raise DamagedError("damaged zstd file: it ends within a frame")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            try:
                self.output = memoryview(self.frame.decompress(self.input))
            except self.error as error:
                raise DamagedError(f"damaged zstd file: {error}") from None
            self.input = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = None
        length = min(len(buffer), len(self.output))
        buffer[:length] = self.output[:length]
        self.output = self.output[length:]
        return length
