"""Writing a source: range checks, digests, and all or nothing."""

import contextlib
import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatron_mm.config import Kind
from megatron_mm.data.ingest.images import StoredImage
from megatron_mm.data.source_files import CODES, HEADER, MAGIC, MANIFEST, META, SCHEMA, file_of
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import UserError


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
    A killed writer leaves `X.*.partial` files, which no reader looks at and the next writer overwrites.

    Raises:
        UserError: the folder cannot be written, the disk is full, or another process is writing this source.
    """

    def __init__(self, prefix: str | Path, kind: Kind, tokenizer: Tokenizer) -> None:
        self.prefix, self.kind, self.tokenizer = str(prefix), kind, tokenizer
        # As Megatron-Core chooses for a vocabulary of this size.
        self.dtype = np.dtype("<u2") if tokenizer.vocab_size < 65500 else np.dtype("<i4")
        self._lengths, self._image_sizes, self._document_indices = array("i"), array("i"), array("q", [0])
        self._meta = bytearray()
        self._loss_sizes = array("i")
        self._files: dict[str, _DigestingFile] = {}
        self._lock: BinaryIO | None = None
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._lock = file_of(prefix, MANIFEST + ".partial").open("ab")
            self._take_lock()
            self._text, self._images = self._open("text.bin"), self._open("image.bin")
        except OSError as error:
            self._discard()
            raise self._failed(error) from None

    def _take_lock(self) -> None:
        assert self._lock
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise UserError("another process is writing this source", where=self.prefix, do="wait for it") from None
        except OSError:
            return  # a file system without locks

    def _open(self, part: str) -> _DigestingFile:
        self._files[part] = _DigestingFile(file_of(self.prefix, part + ".partial"))
        return self._files[part]

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            "cannot write the source", where=self.prefix, found=error.strerror,
            do="make room or choose another --output; nothing half-written was left",
        )  # fmt: skip

    def __enter__(self) -> "SourceWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._discard()

    def _discard(self) -> None:
        for file in self._files.values():
            file.discard()
        self._files.clear()
        if self._lock:
            file_of(self.prefix, MANIFEST + ".partial").unlink(missing_ok=True)
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
        if ids.min() < 0 or ids.max() >= t.vocab_size:
            raise ValueError(f"token ids from {ids.min()} to {ids.max()}, allowed are 0 to {t.vocab_size - 1}")
        if np.isin(ids[1:-1], (t.bos_id, t.eos_id, t.pad_id)).any():
            raise ValueError("bos, eos or pad inside a document")
        places = np.flatnonzero(ids == t.image_id)
        if len(places) != len(images):
            raise ValueError(f"{len(places)} image ids for {len(images)} pictures")
        check_loss(loss, len(ids))
        try:
            self._text.write(ids.astype(self.dtype).tobytes())
            for place, image in zip(places, images, strict=True):
                self._images.write(image.data)
                self._image_sizes.append(len(image.data))
                row = (
                    image.width, image.height, image.format, image.orientation, image.flags,
                    len(image.data), image.crc32, place, image.hash,
                )  # fmt: skip
                self._meta += np.array(row, dtype=META).tobytes()
            self._add_loss(loss, len(ids))
        except OSError as error:
            raise self._failed(error) from None
        self._lengths.append(len(ids))
        self._document_indices.append(len(self._image_sizes))

    def _add_loss(self, loss: Sequence[tuple[int, int]] | None, length: int) -> None:
        """From the first document with ranges on every one has them; those before it are filled in."""
        if "loss.bin" not in self._files:
            if loss is None:
                return
            file = self._open("loss.bin")
            for earlier in self._lengths:
                file.write(np.array([1, earlier], dtype="<i4").tobytes())
                self._loss_sizes.append(2)
        ranges = np.array([(1, length)] if loss is None else loss, dtype="<i4")
        self._files["loss.bin"].write(ranges.tobytes())
        self._loss_sizes.append(ranges.size)

    @property
    def documents(self) -> int:
        return len(self._lengths)

    @property
    def images(self) -> int:
        return len(self._image_sizes)

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
        lengths = np.frombuffer(self._lengths, dtype="<i4")
        self._write_index("text.idx", self.dtype, lengths, np.arange(self.documents + 1, dtype="<i8"))
        if self.images:
            sizes = np.frombuffer(self._image_sizes, dtype="<i4")
            indices = np.frombuffer(self._document_indices, dtype="<i8")
            self._write_index("image.idx", np.dtype("u1"), sizes, indices, modes=np.ones(self.images, dtype="i1"))
        else:  # an empty .bin cannot be mapped
            self._files.pop("image.bin").discard()
        if "loss.bin" in self._files:
            sizes = np.frombuffer(self._loss_sizes, dtype="<i4")
            self._write_index("loss.idx", np.dtype("<i4"), sizes, np.arange(self.documents + 1, dtype="<i8"))
        meta = self._open("meta.npy")
        header = {"descr": np.lib.format.dtype_to_descr(META), "fortran_order": False, "shape": (self.images,)}
        np.lib.format.write_array_header_1_0(meta, header)
        meta.write(memoryview(self._meta))
        manifest = {
            "schema": SCHEMA,
            "kind": self.kind,
            "documents": self.documents,
            "images": self.images,
            "tokens": int(lengths.sum(dtype=np.int64)),
            "dtype": self.dtype.name,
            "tokenizer": {"sha256": self.tokenizer.hash, "vocab_size": self.tokenizer.vocab_size},
            "ids": {"bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id, "image": self.tokenizer.image_id},
            "files": {part: file.close() for part, file in sorted(self._files.items())},
            "made": made,
        }
        partial = file_of(self.prefix, MANIFEST + ".partial")
        with partial.open("wb") as file:
            file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._put_in_place()
        return manifest

    def _write_index(
        self, part: str, dtype: np.dtype, lengths: np.ndarray, documents: np.ndarray, modes: np.ndarray | None = None
    ) -> None:
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        file = self._open(part)
        file.write(HEADER.pack(MAGIC, 1, CODES[dtype], len(lengths), len(documents)))
        for column in (lengths, pointers * dtype.itemsize, documents, modes):
            if column is not None:
                file.write(column.tobytes())

    def _put_in_place(self) -> None:
        """All bytes are on the disk; only names change now. The manifest goes first and comes last, so that a crash
        between two names is told as a missing manifest and never read as a mix of two sources."""
        file_of(self.prefix, MANIFEST).unlink(missing_ok=True)
        for part in ("image.bin", "image.idx", "loss.bin", "loss.idx"):
            if part not in self._files:
                file_of(self.prefix, part).unlink(missing_ok=True)
        for part, file in self._files.items():
            os.replace(file.path, file_of(self.prefix, part))
        os.replace(file_of(self.prefix, MANIFEST + ".partial"), file_of(self.prefix, MANIFEST))
        self._files.clear()
        folder = os.open(Path(self.prefix).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
