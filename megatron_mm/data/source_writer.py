"""Writing a source: range checks, digests, bounded memory, and all or nothing."""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Protocol

import numpy as np

from megatron_mm.config import Kind
from megatron_mm.data.ingest.images import StoredImage
from megatron_mm.data.source_blocks import Block
from megatron_mm.data.source_files import CODES, HEADER, MAGIC, MANIFEST, META, SCHEMA, file_of
from megatron_mm.data.source_place import PARTIAL, put_in_place, same_file, settle
from megatron_mm.errors import UserError

_IN_MEMORY = 1 << 22  # bytes of a column, before it goes to a temporary file; and of one that are read at once
_ROWS = 1 << 20


class Vocabulary(Protocol):
    """What a source says of its tokenizer."""

    @property
    def hash(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def image_id(self) -> int: ...


class _DigestingFile:
    """A file under a temporary name that knows its size and sha256."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self._hash = path, 0, hashlib.sha256()
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> dict[str, Any]:
        """Flush to the disk itself; answers with the manifest's entry."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        self.path.unlink(missing_ok=True)


class _Column:
    """Numbers that grow, document after document, kept in a file without a name when they are many."""

    def __init__(self, dtype: str | np.dtype, folder: Path) -> None:
        self.dtype, self.count = np.dtype(dtype), 0
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(folder))  # noqa: SIM115 (close below)

    def append(self, values: np.ndarray | Sequence[Any]) -> None:
        if not len(values):
            return
        array = np.asarray(values, dtype=self.dtype)
        self._file.write(array.tobytes())
        self.count += array.size

    def blocks(self) -> Iterator[np.ndarray]:
        """All of them, in order."""
        self._file.seek(0)
        while data := self._file.read(_IN_MEMORY // self.dtype.itemsize * self.dtype.itemsize):
            yield np.frombuffer(data, dtype=self.dtype)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def check_loss(loss: Sequence[tuple[int, int]] | None, length: int) -> None:
    """Raises ValueError unless these are ranges of trained tokens of a document of `length` tokens."""
    if loss is None:
        return
    edges = [edge for start, end in loss for edge in (start, end)]
    if not edges or edges[0] < 1 or edges[-1] > length or any(a >= b for a, b in loss):
        raise ValueError(f"loss ranges {list(loss)} in a document of {length} tokens")
    if any(a > b for a, b in pairwise(edges)):
        raise ValueError(f"loss ranges {list(loss)} out of order")


class SourceWriter:
    """Writes a source beside an older one of the same prefix, and takes its place when complete.

        with SourceWriter(prefix, "caption", tokenizer) as writer:
            writer.add(tokens, images)
            writer.finish(made={...})

    Leaving the block without `finish`, by an error or not, removes what was written and keeps the older source.
    A killed writer leaves `X.*.partial` files, which no reader looks at and the next writer overwrites; one killed
    while it puts complete files in place is finished by whoever opens the source next (`settle`).
    Memory does not grow with the number of documents.

    Args:
        tokenizer: that made the ids.
        advice: for the user when writing fails, beside making room.

    Attributes:
        documents, images, tokens: written so far.

    Raises:
        UserError: the folder cannot be written, the disk is full, or another process is writing this source.
    """

    def __init__(
        self, prefix: str | Path, kind: Kind, tokenizer: Vocabulary, advice: str = "choose another --output"
    ) -> None:
        self.advice = advice
        self.prefix, self.kind, self.tokenizer = str(prefix), kind, tokenizer
        # As Megatron-Core chooses for a vocabulary of this size.
        self.dtype = np.dtype("<u2") if tokenizer.vocab_size < 65500 else np.dtype("<i4")
        self.documents = self.images = self.tokens = 0
        folder = Path(prefix).parent
        self._lengths, self._image_sizes = _Column("<i4", folder), _Column("<i4", folder)
        self._image_ends, self._loss_sizes = _Column("<i8", folder), _Column("<i4", folder)
        self._meta = _Column(META, folder)
        self._files: dict[str, _DigestingFile] = {}
        self._lock: BinaryIO | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = file_of(prefix, MANIFEST + PARTIAL).open("ab")
            self._take_lock()
            settle(prefix)
            self._text, self._images = self._open("text.bin"), self._open("image.bin")
        except OSError as error:
            self._discard()
            raise self._failed(error) from None
        except UserError:
            self._discard()
            raise

    def _take_lock(self) -> None:
        assert self._lock
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not same_file(self._lock):  # its holder has just finished or given up
                raise BlockingIOError
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise UserError("another process is writing this source", where=self.prefix, do="wait for it") from None
        except OSError:
            return  # a file system without locks

    def _open(self, part: str) -> _DigestingFile:
        self._files[part] = _DigestingFile(file_of(self.prefix, part + PARTIAL))
        return self._files[part]

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            "cannot write the source", where=self.prefix, found=error.strerror,
            do=f"make room or {self.advice}; nothing half-written was left",
        )  # fmt: skip

    def __enter__(self) -> "SourceWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._discard()

    def _discard(self) -> None:
        for file in self._files.values():
            file.discard()
        self._files.clear()
        for column in (self._lengths, self._image_sizes, self._image_ends, self._loss_sizes, self._meta):
            column.close()
        if self._lock:
            file_of(self.prefix, MANIFEST + PARTIAL).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def add(
        self,
        tokens: Sequence[int],
        images: Sequence[StoredImage] = (),
        loss: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """One document.

        Args:
            tokens: bos, text ids with one image id a picture, eos.
            images: the pictures, in the order of their ids.
            loss: ranges [start, end) of the tokens that are trained on, ascending and apart; None: all.
        Raises:
            ValueError: ids out of range, bos or eos not at the ends alone, not as many image ids as pictures, or loss
                ranges that are none, empty, out of order or outside [1, len(tokens)).
        """
        t = self.tokenizer
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or len(ids) < 2 or ids[0] != t.bos_id or ids[-1] != t.eos_id:
            raise ValueError("a document is bos, tokens, eos")
        if len(ids) >= 2**31:
            raise ValueError(f"{len(ids)} tokens, more than the index can hold")
        # Before the cast: Megatron-Core's own builder would wrap 70000 to 4464 in uint16.
        if ids.view("u8").max() >= t.vocab_size:  # seen so, negative ones are large
            raise ValueError(f"token ids from {ids.min()} to {ids.max()}, allowed are 0 to {t.vocab_size - 1}")
        inner = ids[1:-1]
        if ((inner == t.bos_id) | (inner == t.eos_id) | (inner == t.pad_id)).any():
            raise ValueError("bos, eos or pad inside a document")
        places = np.flatnonzero(ids == t.image_id)
        if len(places) != len(images):
            raise ValueError(f"{len(places)} image ids for {len(images)} pictures")
        check_loss(loss, len(ids))
        rows = [
            (i.width, i.height, i.format, i.orientation, i.flags, len(i.data), i.crc32, place, i.hash)
            for i, place in zip(images, places.tolist(), strict=True)
        ]
        self._write(
            Block(
                tokens=ids.astype(self.dtype),
                lengths=np.array([len(ids)], dtype="<i4"),
                image_counts=np.array([len(images)], dtype="<i8"),
                meta=np.array(rows, dtype=META),
                pictures=[image.data for image in images],
                loss=None if loss is None else np.array(loss, dtype="<i4"),
                range_counts=None if loss is None else np.array([len(loss)], dtype="<i8"),
            )
        )

    def add_block(self, block: Block) -> None:
        """Documents of another source with the same vocabulary; only their form is checked."""
        if block.tokens.dtype != self.dtype:
            raise ValueError(f"{block.tokens.dtype} tokens for a source of {self.dtype}")
        block.check()
        self._write(block)

    def _write(self, block: Block) -> None:
        try:
            self._text.write(block.tokens.tobytes())
            for data in block.pictures:
                self._images.write(data)
            self._add_loss(block)
            self._lengths.append(block.lengths)
            self._image_sizes.append(block.meta["nbytes"])
            self._image_ends.append(self.images + np.cumsum(block.image_counts, dtype=np.int64))
            self._meta.append(block.meta)
        except OSError as error:
            raise self._failed(error) from None
        self.documents += len(block.lengths)
        self.images += len(block.meta)
        self.tokens += len(block.tokens)

    def _add_loss(self, block: Block) -> None:
        """From the first document with ranges on every one has them; those before it are filled in."""
        if "loss.bin" not in self._files:
            if block.loss is None:
                return
            self._open("loss.bin")
            for lengths in self._lengths.blocks():
                self._write_loss(*all_trained(lengths))
        ranges, counts = block.loss, block.range_counts
        if ranges is None or counts is None:
            ranges, counts = all_trained(block.lengths)
        self._write_loss(ranges, counts)

    def _write_loss(self, ranges: np.ndarray, counts: np.ndarray) -> None:
        self._files["loss.bin"].write(ranges.tobytes())
        self._loss_sizes.append(2 * counts)

    def finish(self, made: dict[str, Any]) -> dict[str, Any]:
        """Complete the files and put them in place. Returns the manifest.

        Args:
            made: how the source came about, for people; plain JSON data.
        """
        if not self.documents:
            raise UserError("there is no document to write", where=self.prefix)
        try:
            return self._finish(made)
        except OSError as error:
            raise self._failed(error) from None

    def _finish(self, made: dict[str, Any]) -> dict[str, Any]:
        self._write_index("text.idx", self.dtype, self._lengths)
        if self.images:
            self._write_index("image.idx", np.dtype("u1"), self._image_sizes, self._image_ends)
        else:  # an empty .bin cannot be mapped
            self._files.pop("image.bin").discard()
        if "loss.bin" in self._files:
            self._write_index("loss.idx", np.dtype("<i4"), self._loss_sizes)
        meta = self._open("meta.npy")
        header = {"descr": np.lib.format.dtype_to_descr(META), "fortran_order": False, "shape": (self.images,)}
        np.lib.format.write_array_header_1_0(meta, header)
        for rows in self._meta.blocks():
            meta.write(rows.tobytes())
        manifest = {
            "schema": SCHEMA,
            "kind": self.kind,
            "documents": self.documents,
            "images": self.images,
            "tokens": self.tokens,
            "dtype": self.dtype.name,
            "tokenizer": {"sha256": self.tokenizer.hash, "vocab_size": self.tokenizer.vocab_size},
            "ids": {"bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id, "image": self.tokenizer.image_id},
            "files": {part: file.close() for part, file in sorted(self._files.items())},
            "made": made,
        }
        partial = file_of(self.prefix, MANIFEST + PARTIAL)
        with partial.open("wb") as file:
            file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        parts = list(self._files)
        self._files.clear()  # they are not to be discarded any more
        put_in_place(self.prefix, parts)
        return manifest

    def _write_index(self, part: str, dtype: np.dtype, lengths: _Column, document_ends: _Column | None = None) -> None:
        """The stock columns: lengths, byte pointers, where documents begin, and for pictures their modes."""
        file = self._open(part)
        file.write(HEADER.pack(MAGIC, 1, CODES[dtype], lengths.count, self.documents + 1))
        for block in lengths.blocks():
            file.write(block.tobytes())
        position = 0
        for block in lengths.blocks():
            ends = position + np.cumsum(block, dtype=np.int64) * dtype.itemsize
            file.write((ends - block.astype(np.int64) * dtype.itemsize).tobytes())
            position = int(ends[-1])
        if document_ends:
            file.write(bytes(8))
            for block in document_ends.blocks():
                file.write(block.tobytes())
            for block in lengths.blocks():
                file.write(np.ones(len(block), dtype="i1").tobytes())
        else:  # one sequence a document
            for start in range(0, self.documents + 1, _ROWS):
                end = min(start + _ROWS, self.documents + 1)
                file.write(np.arange(start, end, dtype="<i8").tobytes())


def all_trained(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss ranges of documents that are trained on throughout: int32 [d, 2], and how many each has, int64 [d]."""
    return np.stack([np.ones_like(lengths), lengths], axis=1).astype("<i4"), np.ones(len(lengths), dtype="<i8")
