"""Reading a source through memory maps, and verifying one. The files are described in `source_files`."""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.config import Kind
from megatron_mm.data.source_files import CODES, HEADER, MAGIC, MANIFEST, META, SCHEMA, file_of
from megatron_mm.data.source_writer import SourceWriter, check_loss
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import UserError

__all__ = ["Source", "SourceWriter", "verify_source"]

_BLOCK = 1 << 22  # bytes read at once when digesting
_REBUILD = "make the source anew with tools/preprocess_data.py"


class _Index:
    """A mapped `.bin` with its `.idx`, whose header and sizes agree with the manifest."""

    def __init__(self, prefix: str, name: str, dtype: np.dtype, sequences: int, documents: int) -> None:
        path = file_of(prefix, f"{name}.idx")
        content = np.memmap(path, dtype="u1", mode="r")
        header = HEADER.unpack(content[: HEADER.size].tobytes()) if len(content) >= HEADER.size else ()
        wanted = (MAGIC, 1, CODES[dtype], sequences, documents + 1)
        modes = sequences if name == "image" else 0
        size = HEADER.size + 12 * sequences + 8 * (documents + 1) + modes
        if header != wanted or len(content) != size:
            raise UserError(
                "the index does not fit the manifest", where=str(path), do=_REBUILD,
                found=f"header {header}, {len(content)} bytes", allowed=f"header {wanted}, {size} bytes",
            )  # fmt: skip
        ends = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * (documents + 1)])
        self.lengths = content[ends[0] : ends[1]].view("<i4")
        self.pointers = content[ends[1] : ends[2]].view("<i8")
        self.documents = content[ends[2] : ends[3]].view("<i8")
        self.data = np.memmap(file_of(prefix, f"{name}.bin"), dtype=dtype, mode="r")
        held = len(self.data) * dtype.itemsize
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * dtype.itemsize
        if end != held or int(self.documents[0]) or int(self.documents[-1]) != sequences:
            raise UserError(
                "the index points outside its .bin", where=str(path), do=_REBUILD,
                found=f"last byte {end} of {held}, documents to {self.documents[-1]} of {sequences}",
            )  # fmt: skip

    def __getitem__(self, i: int) -> np.ndarray:
        start = int(self.pointers[i]) // self.data.itemsize
        return self.data[start : start + int(self.lengths[i])]


def _read_manifest(prefix: str) -> dict[str, Any]:
    path = file_of(prefix, MANIFEST)
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        there = any(file_of(prefix, part).exists() for part in ("text.bin", "text.idx"))
        raise UserError(
            "there is no such source" if not there else "the source has no manifest: it was not completed",
            where=str(path), found="no such file", do="check the path" if not there else _REBUILD,
        ) from None  # fmt: skip
    except OSError as error:
        raise UserError("cannot read the manifest", where=str(path), found=error.strerror) from None
    except ValueError as error:
        raise UserError("the manifest is damaged", where=str(path), found=str(error), do=_REBUILD) from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise UserError(
            "a manifest of another version", where=str(path), found=f"schema {found}", allowed=f"schema {SCHEMA}",
            do=_REBUILD,
        )  # fmt: skip
    return manifest


class Source:
    """Reads a source through memory maps; opening checks sizes and headers, not contents (see `verify_source`).

    Attributes:
        lengths: int32 [documents], tokens with bos and eos.
        image_counts: int32 [documents].
        all_meta: rows of META of all pictures, document after document.
        manifest: as written.

    Raises:
        UserError: a file is missing, of another size than the manifest says, or its header does not fit.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.manifest = _read_manifest(self.prefix)
        path = str(file_of(prefix, MANIFEST))
        try:
            self.kind: Kind = self.manifest["kind"]
            documents, images = int(self.manifest["documents"]), int(self.manifest["images"])
            dtype = np.dtype(self.manifest["dtype"])
            self.tokenizer_hash = str(self.manifest["tokenizer"]["sha256"])
            self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"])
            self.image_id = int(self.manifest["ids"]["image"])
            files = {str(part): int(entry["bytes"]) for part, entry in self.manifest["files"].items()}
            # Whoever holds the same digest holds the same lengths, pictures and tokens.
            digests = sorted((part, entry["sha256"]) for part, entry in self.manifest["files"].items())
            self.digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError("the manifest is damaged", where=path, found=repr(error), do=_REBUILD) from None
        wanted = {"text.bin", "text.idx", "meta.npy"} | ({"image.bin", "image.idx"} if images else set())
        self.has_loss = "loss.bin" in files
        if self.has_loss:
            wanted |= {"loss.bin", "loss.idx"}
        if files.keys() != wanted or dtype not in CODES or documents < 1:
            raise UserError("the manifest is damaged", where=path, found=f"{sorted(files)}, {dtype}", do=_REBUILD)
        for part, size in files.items():
            self._check_size(file_of(prefix, part), size)
        self._text = _Index(self.prefix, "text", dtype, documents, documents)
        self._images = _Index(self.prefix, "image", np.dtype("u1"), images, documents) if images else None
        self._loss = _Index(self.prefix, "loss", np.dtype("<i4"), documents, documents) if self.has_loss else None
        self.all_meta = self._open_meta(images)
        self.lengths = self._text.lengths
        starts = self._images.documents if self._images else np.zeros(documents + 1, dtype=np.int64)
        self._starts = starts
        self.image_counts = np.diff(starts).astype(np.int32)

    @staticmethod
    def _check_size(path: Path, size: int) -> None:
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(
                "a file of the source is missing", where=str(path), found=error.strerror, do=_REBUILD
            ) from None
        if found != size:
            raise UserError(
                "a file of the source is truncated" if found < size else "a file of the source is too long",
                where=str(path), found=f"{found} bytes", allowed=f"{size} bytes, as the manifest says", do=_REBUILD,
            )  # fmt: skip

    def _open_meta(self, images: int) -> np.ndarray:
        path = file_of(self.prefix, "meta.npy")
        try:
            meta = np.load(path, mmap_mode="r" if images else None, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError("not an .npy file", where=str(path), found=str(error), do=_REBUILD) from None
        if meta.dtype != META or meta.shape != (images,):
            raise UserError(
                "not this source's pictures", where=str(path), found=f"{meta.shape} of {meta.dtype}", do=_REBUILD
            )
        return meta

    def __len__(self) -> int:
        return len(self.lengths)

    def text(self, document: int) -> np.ndarray:
        """Its tokens, uint16 or int32 [lengths[document]], a view of the map."""
        return self._text[document]

    def texts(self, documents: Sequence[int]) -> list[np.ndarray]:
        """`text` of several documents at once."""
        return [self.text(document) for document in documents]

    def loss(self, document: int) -> np.ndarray | None:
        """Ranges [start, end) of its tokens that are trained on, int32 [ranges, 2]; None: all of them."""
        return self._loss[document].reshape(-1, 2) if self._loss else None

    def image_bytes(self, document: int) -> list[memoryview]:
        """Its pictures as encoded, views of the map."""
        if self._images is None:
            return []
        return [self._images[i].data for i in range(int(self._starts[document]), int(self._starts[document + 1]))]

    def images(self, requests: Sequence[tuple[int, int, int]]) -> list[list[tuple[memoryview, int]]]:
        """Pictures first to last - 1 of each (document, first, last), as `image` gives them, all at once."""
        return [[self.image(d, i) for i in range(first, last)] for d, first, last in requests]

    def image(self, document: int, index: int) -> tuple[memoryview, int]:
        """One of its pictures as encoded, and the crc32 that the bytes should have."""
        assert self._images is not None
        assert index < self.image_counts[document]
        row = int(self._starts[document]) + index
        return self._images[row].data, int(self.all_meta["crc32"][row])

    def meta(self, document: int) -> np.ndarray:
        """Rows of META, [image_counts[document]]."""
        return self.all_meta[int(self._starts[document]) : int(self._starts[document + 1])]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError unless the source was made with this very tokenizer."""
        if tokenizer.hash != self.tokenizer_hash:
            raise UserError(
                "the tokenizer is not the one that this source was made with", where=self.prefix,
                found=f"{tokenizer.path}, sha256 {tokenizer.hash[:16]}…", allowed=f"sha256 {self.tokenizer_hash[:16]}…",
                do="set data.tokenizer to the source's, or make the source anew with this one",
            )  # fmt: skip


def _digest(path: Path) -> str:
    hash_ = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hash_.update(block)
    return hash_.hexdigest()


def _faults(source: Source) -> Iterator[str]:
    """What is wrong inside the documents; digests catch damage, this catches writers' mistakes."""
    bos, eos, image = (source.manifest["ids"][name] for name in ("bos", "eos", "image"))
    for d in range(len(source)):
        tokens, meta, pictures = source.text(d), source.meta(d), source.image_bytes(d)
        if len(tokens) < 2 or tokens[0] != bos or tokens[-1] != eos:
            yield f"document {d} is not bos, tokens, eos"
        elif int(tokens.min()) < 0 or int(tokens.max()) >= source.vocab_size:
            yield f"document {d} has ids outside the vocabulary"
        elif not np.array_equal(np.flatnonzero(tokens == image), meta["offset"]):
            yield f"document {d}: image ids and pictures do not agree"
        try:
            check_loss(None if (loss := source.loss(d)) is None else loss.tolist(), len(tokens))
        except ValueError as error:
            yield f"document {d}: {error}"
        for i, (data, row) in enumerate(zip(pictures, meta, strict=True)):
            if len(data) != row["nbytes"] or zlib.crc32(data) != row["crc32"]:
                yield f"document {d}, picture {i}: the bytes do not have their crc32"


def verify_source(prefix: str | Path) -> Source:
    """Read all of a source: every file's digest, every document's form, every picture's crc.

    Raises:
        UserError: names the first file, document or picture at fault.
    """
    source = Source(prefix)
    for part, entry in source.manifest["files"].items():
        path = file_of(prefix, part)
        if (found := _digest(path)) != entry["sha256"]:
            fault = next(_faults(source), "no document shows it")
            raise UserError(
                "the file's contents have changed", where=str(path), found=f"sha256 {found}; {fault}",
                allowed=f"sha256 {entry['sha256']}", do=f"restore it from a copy, or {_REBUILD}",
            )  # fmt: skip
    if fault := next(_faults(source), ""):
        raise UserError("the source is inconsistent", where=str(prefix), found=fault, do=_REBUILD)
    return source
