"""Reading a source, and verifying one. The files are described in `source_files`, where they may lie in `storage`.

Pictures and tokens are views of a local file's map, or come by range requests; everything else is mapped.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_mm.config import Kind
from megatron_mm.data.source_files import CODES, HEADER, MAGIC, META
from megatron_mm.data.source_manifest import REBUILD, read_manifest
from megatron_mm.data.source_writer import SourceWriter, check_loss, settle
from megatron_mm.data.storage import Ranges, is_remote, open_storage
from megatron_mm.data.storage.files import LocalRanges, blocks
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import UserError

__all__ = ["Source", "SourceWriter", "verify_source"]

_ROWS = 1 << 20  # of an index checked at once
_DOCUMENTS = 1 << 12  # read at once when verifying, at most
_BYTES = 1 << 26  # of their pictures, about


class _Index:
    """A `.bin` with its mapped `.idx`, whose header and sizes agree with the manifest."""

    def __init__(
        self, path: Path, data: Ranges, size: int, dtype: np.dtype, sequences: int, documents: int, where: str
    ) -> None:
        content = np.zeros(0, dtype="u1")
        if path.stat().st_size:  # an empty file cannot be mapped
            content = np.memmap(path, dtype="u1", mode="r").view(np.ndarray)  # whose elements are faster to get at
        header = HEADER.unpack(content[: HEADER.size].tobytes()) if len(content) >= HEADER.size else ()
        wanted = (MAGIC, 1, CODES[dtype], sequences, documents + 1)
        modes = sequences if path.name.endswith("image.idx") else 0
        length = HEADER.size + 12 * sequences + 8 * (documents + 1) + modes
        if header != wanted or len(content) != length:
            raise UserError(
                "the index does not fit the manifest", where=where, do=REBUILD,
                found=f"header {header}, {len(content)} bytes", allowed=f"header {wanted}, {length} bytes",
            )  # fmt: skip
        ends = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * (documents + 1)])
        self.lengths = content[ends[0] : ends[1]].view("<i4")
        self.pointers = content[ends[1] : ends[2]].view("<i8")
        self.documents = content[ends[2] : ends[3]].view("<i8")
        self._data, self._size, self._dtype, self._where = data, size, dtype, where
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * dtype.itemsize
        if end != size or int(self.documents[0]) or int(self.documents[-1]) != sequences:
            raise UserError(
                "the index points outside its .bin", where=where, do=REBUILD,
                found=f"last byte {end} of {size}, documents to {self.documents[-1]} of {sequences}",
            )  # fmt: skip

    def _range(self, i: int) -> tuple[int, int]:
        start = int(self.pointers[i])
        end = start + int(self.lengths[i]) * self._dtype.itemsize
        if not 0 <= start <= end <= self._size:
            raise UserError(
                "the index points outside its .bin", where=self._where, do=REBUILD,
                found=f"bytes {start} to {end} of {self._size}, sequence {i}",
            )  # fmt: skip
        return start, end

    def __getitem__(self, i: int) -> np.ndarray:
        return np.frombuffer(self._data(*self._range(i)), self._dtype)

    def some(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """Sequences of these numbers, asked for at once."""
        return [np.frombuffer(data, self._dtype) for data in self._data.many([self._range(i) for i in numbers])]

    def runs(self, runs: Sequence[tuple[int, int]]) -> list[list[memoryview]]:
        """Bytes of the sequences first to last - 1 of each (first, last), each run in one piece."""
        places = [[self._range(i) for i in range(first, last)] for first, last in runs]
        ranges = [(run[0][0], run[-1][1]) if run else (0, 0) for run in places]
        return [
            [data[start - base : end - base] for start, end in run]
            for run, (base, _), data in zip(places, ranges, self._data.many(ranges), strict=True)
        ]

    def check(self) -> None:
        """Raises UserError unless the sequences lie one after the other, and so do the documents."""
        ends = 0
        for i in range(0, len(self.lengths), _ROWS):
            sizes = self.lengths[i : i + _ROWS].astype(np.int64) * self._dtype.itemsize
            pointers = ends + np.cumsum(sizes) - sizes
            if (sizes < 0).any() or not np.array_equal(pointers, self.pointers[i : i + _ROWS]):
                raise UserError("the index does not fit its .bin", where=self._where, do=REBUILD)
            ends = int(pointers[-1] + sizes[-1])
        for i in range(0, len(self.documents), _ROWS):
            if (np.diff(self.documents[i : i + _ROWS + 1]) < 0).any():
                raise UserError("the documents are out of order", where=self._where, do=REBUILD)


class Source:
    """A source in a folder or in a bucket; opening checks sizes and headers, not contents (see `verify_source`).

    Args:
        prefix: DATA/NAME or s3://BUCKET/NAME.
        cache_dir: folder of local copies of a remote source's small files; None: ~/.cache/megatron_mm.

    Attributes:
        lengths: int32 [documents], tokens with bos and eos.
        image_starts: int64 [documents + 1]; document d owns pictures image_starts[d] to image_starts[d + 1] - 1.
        image_counts: int32 [documents]; computed when first asked for, all else is mapped.
        all_meta: rows of META of all pictures, document after document.
        manifest: as written.
        digest: of all files; whoever holds the same holds the same lengths, pictures and tokens.

    Raises:
        UserError: a file is missing, of another size than the manifest says, or its header does not fit; object
            storage does not answer.
    """

    def __init__(self, prefix: str | Path, cache_dir: str | Path | None = None) -> None:
        self.prefix = str(prefix)
        if not is_remote(prefix):
            settle(prefix)
        self.storage = open_storage(prefix, cache_dir)
        self.manifest = read_manifest(self.storage)
        self.kind: Kind = self.manifest["kind"]
        documents, images = self.manifest["documents"], self.manifest["images"]
        dtype = np.dtype(self.manifest["dtype"])
        self.tokenizer_hash: str = self.manifest["tokenizer"]["sha256"]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.image_id: int = self.manifest["ids"]["image"]
        self.files: dict[str, int] = {part: entry["bytes"] for part, entry in self.manifest["files"].items()}
        self._digests = {part: entry["sha256"] for part, entry in self.manifest["files"].items()}
        self.digest = hashlib.sha256(json.dumps(sorted(self._digests.items())).encode()).hexdigest()
        self.has_loss = "loss.bin" in self.files
        for part, size in self.files.items():
            self._check_size(part, size)
        self._text = self._open_pair("text", dtype, documents)
        self._images = self._open_pair("image", np.dtype("u1"), images) if images else None
        self._loss = self._open_pair("loss", np.dtype("<i4"), documents) if self.has_loss else None
        self.all_meta = self._open_meta(images)
        self.lengths = self._text.lengths
        none = np.broadcast_to(np.int64(0), documents + 1)  # which takes no memory
        self.image_starts = self._images.documents if self._images else none

    def _check_size(self, part: str, size: int) -> None:
        where = self.storage.where(part)
        try:
            found = self.storage.size(part)
        except OSError as error:
            raise UserError("a file of the source is missing", where=where, found=error.strerror, do=REBUILD) from None
        if found != size:
            raise UserError(
                "a file of the source is truncated" if found < size else "a file of the source is too long",
                where=where, found=f"{found} bytes", allowed=f"{size} bytes, as the manifest says", do=REBUILD,
            )  # fmt: skip

    def _mapped(self, part: str) -> Path:
        return self.storage.mapped(part, self.files[part], self._digests[part])

    def _open_pair(self, name: str, dtype: np.dtype, sequences: int) -> _Index:
        part, documents = f"{name}.bin", self.manifest["documents"]
        # Loss ranges are looked up one by one all over, and are small: they are no range requests.
        data = LocalRanges(self._mapped(part)) if name == "loss" else self.storage.ranges(part, self.files[part])
        where = self.storage.where(f"{name}.idx")
        return _Index(self._mapped(f"{name}.idx"), data, self.files[part], dtype, sequences, documents, where)

    def _open_meta(self, images: int) -> np.ndarray:
        path, where = self._mapped("meta.npy"), self.storage.where("meta.npy")
        try:
            meta = np.load(path, mmap_mode="r" if images else None, allow_pickle=False)
        except Exception as error:  # numpy reads the header as Python: damage raises many types
            raise UserError("not an .npy file", where=where, found=str(error), do=REBUILD) from None
        if meta.dtype != META or meta.shape != (images,):
            raise UserError(
                "not this source's pictures", where=where, found=f"{meta.shape} of {meta.dtype}", do=REBUILD
            )
        return meta.view(np.ndarray)  # whose elements are faster to get at than a memmap's

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def image_counts(self) -> np.ndarray:
        return np.diff(self.image_starts).astype(np.int32)

    def text(self, document: int) -> np.ndarray:
        """Its tokens, uint16 or int32 [lengths[document]]; of a local source a view of the map."""
        return self._text[document]

    def texts(self, documents: Sequence[int]) -> list[np.ndarray]:
        """`text` of several documents at once: from a bucket in few requests, in parallel."""
        return self._text.some(documents)

    def loss(self, document: int) -> np.ndarray | None:
        """Ranges [start, end) of its tokens that are trained on, int32 [ranges, 2]; None: all of them."""
        if not self._loss:
            return None
        edges = self._loss[document]
        if len(edges) % 2:
            raise UserError(
                "a document's loss ranges have no end", where=self.storage.where("loss.idx"),
                found=f"{len(edges)} numbers, document {document}", do=REBUILD,
            )  # fmt: skip
        return edges.reshape(-1, 2)

    def image(self, document: int, index: int) -> tuple[memoryview, int]:
        """One of its pictures as encoded, and the crc32 that the bytes should have."""
        return self.images([(document, index, index + 1)])[0][0]

    def images(self, requests: Sequence[tuple[int, int, int]]) -> list[list[tuple[memoryview, int]]]:
        """Pictures first to last - 1 of each (document, first, last), as `image` gives them, all at once: from a bucket
        in one request a document or fewer, in parallel."""
        if self._images is None:
            assert all(first == last for _, first, last in requests)
            return [[] for _ in requests]
        runs = []
        for document, first, last in requests:
            start, end = int(self.image_starts[document]), int(self.image_starts[document + 1])
            assert 0 <= first <= last <= end - start
            runs.append((start + first, start + last))
        crcs = self.all_meta["crc32"]
        return [
            list(zip(pictures, crcs[first:last].tolist(), strict=True))
            for (first, last), pictures in zip(runs, self._images.runs(runs), strict=True)
        ]

    def image_bytes(self, document: int) -> list[memoryview]:
        """Its pictures as encoded."""
        return [data for data, _ in self.images([(document, 0, int(self.image_counts[document]))])[0]]

    def meta(self, document: int) -> np.ndarray:
        """Rows of META, [image_counts[document]]."""
        return self.all_meta[int(self.image_starts[document]) : int(self.image_starts[document + 1])]

    def check_indices(self) -> None:
        """Raises UserError unless each index describes its .bin from end to end, and the pictures' places lie in their
        documents: what packing goes by."""
        for index in (self._text, self._images, self._loss):
            if index:
                index.check()
        for start in range(0, len(self), _DOCUMENTS):
            self._check_places(start, min(start + _DOCUMENTS, len(self)))

    def _check_places(self, start: int, stop: int) -> None:
        first, last = int(self.image_starts[start]), int(self.image_starts[stop])
        if first == last:
            return
        places = self.all_meta["offset"][first:last].astype(np.int64)
        of_image = np.repeat(np.arange(start, stop), np.diff(self.image_starts[start : stop + 1]))
        ascend = (np.diff(places) > 0) | (np.diff(of_image) > 0)
        if not (ascend.all() and (places > 0).all() and (places < self.lengths[of_image] - 1).all()):
            raise UserError(
                "the pictures' places are not in their documents", where=self.storage.where("meta.npy"),
                found=f"in documents {start} to {stop - 1}", do=REBUILD,
            )  # fmt: skip

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError unless the source was made with this very tokenizer."""
        if tokenizer.hash != self.tokenizer_hash:
            raise UserError(
                "the tokenizer is not the one that this source was made with", where=self.prefix,
                found=f"{tokenizer.path}, sha256 {tokenizer.hash[:16]}…", allowed=f"sha256 {self.tokenizer_hash[:16]}…",
                do="set data.tokenizer to the source's, or make the source anew with this one",
            )  # fmt: skip


def within(tokens: np.ndarray, vocab_size: int) -> bool:
    """Whether they are ids of a vocabulary."""
    return int(tokens.view(f"u{tokens.itemsize}").max()) < vocab_size  # seen so, negative ones are large


_Tell = Callable[[int], None]  # so many bytes more have been read


def _digest(source: Source, part: str, tell: _Tell) -> str:
    """Of the file where it lies; a remote source's local copy is not what is asked about."""
    hash_, size = hashlib.sha256(), source.files[part]
    for block in blocks(source.storage.ranges(part, size), size):
        hash_.update(block)
        tell(len(block))
    return hash_.hexdigest()


def _runs(source: Source) -> Iterator[range]:
    """All documents, as many at once as are good to read."""
    start = stop = size = 0
    while stop < len(source):
        size += int(source.meta(stop)["nbytes"].sum(dtype=np.int64))
        stop += 1
        if size >= _BYTES or stop - start == _DOCUMENTS or stop == len(source):
            yield range(start, stop)
            start, size = stop, 0


def _faults(source: Source, tell: _Tell) -> Iterator[str]:
    """What is wrong inside the documents; digests catch damage, this catches writers' mistakes."""
    source.check_indices()
    if (held := int(source.lengths.sum(dtype=np.int64))) != source.manifest["tokens"]:
        yield f"{held} tokens, not {source.manifest['tokens']} as the manifest says"
    bos, eos, image = (source.manifest["ids"][name] for name in ("bos", "eos", "image"))
    for documents in _runs(source):
        texts = source.texts(documents)
        pictures = source.images([(d, 0, int(source.image_counts[d])) for d in documents])
        for d, tokens, images in zip(documents, texts, pictures, strict=True):
            meta = source.meta(d)
            if len(tokens) < 2 or tokens[0] != bos or tokens[-1] != eos:
                yield f"document {d} is not bos, tokens, eos"
            elif not within(tokens, source.vocab_size):
                yield f"document {d} has ids outside the vocabulary"
            elif not np.array_equal(np.flatnonzero(tokens == image), meta["offset"]):
                yield f"document {d}: image ids and pictures do not agree"
            try:
                check_loss(None if (loss := source.loss(d)) is None else loss.tolist(), len(tokens))
            except ValueError as error:
                yield f"document {d}: {error}"
            for i, ((data, crc32), nbytes) in enumerate(zip(images, meta["nbytes"].tolist(), strict=True)):
                if len(data) != nbytes or zlib.crc32(data) != crc32:
                    yield f"document {d}, picture {i}: the bytes do not have their crc32"
        tell(sum(tokens.nbytes for tokens in texts) + sum(len(data) for images in pictures for data, _ in images))


def verify_source(
    prefix: str | Path, cache_dir: str | Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Source:
    """Read all of a source: every file's digest, every document's form, every picture's crc.

    Args:
        progress: told bytes read so far and bytes to read in all; tokens and pictures are read twice.
    Raises:
        UserError: names the first file, document or picture at fault.
    """
    source = Source(prefix, cache_dir)
    read, size = 0, sum(source.files.values()) + sum(source.files.get(part, 0) for part in ("text.bin", "image.bin"))

    def tell(more: int) -> None:
        nonlocal read
        read += more
        if progress:
            progress(read, size)

    # The small files first: what a document's fault is can be told by a whole index only.
    for part in sorted(source.files, key=lambda part: part.endswith(".bin")):
        wanted = str(source.manifest["files"][part]["sha256"])
        if (found := _digest(source, part, tell)) != wanted:
            fault = f"; {next(_faults(source, tell), 'no document shows it')}" if part.endswith(".bin") else ""
            raise UserError(
                "the file's contents have changed", where=source.storage.where(part), found=f"sha256 {found}{fault}",
                allowed=f"sha256 {wanted}", do=f"restore it from a copy, or {REBUILD}",
            )  # fmt: skip
    if fault := next(_faults(source, tell), ""):
        raise UserError("the source is inconsistent", where=str(prefix), found=fault, do=REBUILD)
    return source
