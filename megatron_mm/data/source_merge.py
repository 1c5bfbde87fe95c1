"""Several sources made into one: their documents one after the other, streamed in bounded memory.

Every file's digest is checked on the way: a damaged source must not become part of one that verifies.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.data.source_blocks import Block
from megatron_mm.data.source_files import CODES, HEADER, MAGIC, META, file_of
from megatron_mm.data.source_manifest import read_manifest
from megatron_mm.data.source_place import settle
from megatron_mm.data.source_writer import SourceWriter
from megatron_mm.data.storage import LocalStorage, is_remote
from megatron_mm.errors import UserError

_DOCUMENTS = 1 << 16  # of a block, at most
_BYTES = 1 << 25  # of a block's pictures, tokens and loss ranges, about
_PAIRS = ("text", "image", "loss")
_REBUILD = "restore it from a copy, or make the source anew with tools/preprocess_data.py"


def merge_sources(
    prefixes: Sequence[str | Path],
    prefix: str | Path,
    made: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a source of the documents of others, in the order given. Returns its manifest.

    Args:
        made: kept in the manifest, for people; None: the digests of the sources.
        progress: told bytes done and bytes in all.
    Raises:
        UserError: a source is missing or damaged, they do not fit each other, or the result cannot be written. Then
            nothing is left, and an older source of the same prefix stays.
    """
    if not prefixes:
        raise UserError("there is no source to merge")
    streams = [SourceStream(one) for one in prefixes]
    for stream in streams[1:]:
        check_fit(streams[0], stream)
    total, done = sum(stream.bytes for stream in streams), 0
    with SourceWriter(prefix, streams[0].manifest["kind"], streams[0].vocabulary) as writer:
        for stream in streams:
            for block in stream.blocks():
                writer.add_block(block)
                done += block.bytes
                if progress:
                    progress(done, total)
        return writer.finish(made or {"merged": [stream.described() for stream in streams]})


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer as a manifest describes it."""

    hash: str
    vocab_size: int
    bos_id: int
    eos_id: int
    image_id: int
    pad_id: int = -1  # not told, and not needed for documents that are checked already


class SourceStream:
    """A source read once from front to end.

    Attributes:
        bytes: of all documents, as `Block.bytes` counts them.

    Raises:
        UserError: a file is missing or does not fit the manifest.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        if is_remote(prefix):
            raise UserError("only local sources can be merged", where=self.prefix, do="copy it to a disk first")
        settle(prefix)
        self.manifest = m = read_manifest(LocalStorage(prefix))
        self.documents, self.images, self.dtype = m["documents"], m["images"], np.dtype(m["dtype"])
        tokenizer, ids = m["tokenizer"], m["ids"]
        self.vocabulary = _Vocabulary(
            tokenizer["sha256"], tokenizer["vocab_size"], ids["bos"], ids["eos"], ids["image"]
        )
        self.files = {part: (entry["bytes"], entry["sha256"]) for part, entry in m["files"].items()}
        self.bytes = sum(size for part, (size, _) in self.files.items() if part.endswith(".bin"))
        self.has_loss = "loss.bin" in self.files
        self._check_index("text", CODES[self.dtype], self.documents)
        if self.images:
            self._check_index("image", CODES[np.dtype("u1")], self.images)
        if self.has_loss:
            self._check_index("loss", CODES[np.dtype("<i4")], self.documents)
        for part, (size, _) in self.files.items():
            if (found := self._stat(part)) != size:
                raise self.damaged(part, f"{found} bytes", f"{size} bytes")

    def _stat(self, part: str) -> int:
        path = file_of(self.prefix, part)
        try:
            return path.stat().st_size
        except OSError as error:
            raise UserError(
                "cannot read a file of the source", where=str(path), found=error.strerror, do=_REBUILD
            ) from None

    def _check_index(self, name: str, code: int, sequences: int) -> None:
        part = f"{name}.idx"
        self._stat(part)
        with file_of(self.prefix, part).open("rb") as file:
            found = file.read(HEADER.size)
        if found != (wanted := HEADER.pack(MAGIC, 1, code, sequences, self.documents + 1)):
            raise self.damaged(part, f"header {found!r}", f"header {wanted!r}")

    def damaged(self, part: str, found: str, allowed: str) -> UserError:
        """The error to raise."""
        path = str(file_of(self.prefix, part))
        return UserError("the file's contents have changed", where=path, found=found, allowed=allowed, do=_REBUILD)

    def described(self) -> dict[str, Any]:
        """Which source this is, for a manifest."""
        return {"documents": self.documents, "files": {part: digest for part, (_, digest) in self.files.items()}}

    def blocks(self) -> Iterator[Block]:
        """All documents, in order, the next block read while one is used. Raises UserError when a digest is wrong."""
        blocks = self._blocks()
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(next, blocks, None)
            try:
                while (block := following.result()) is not None:
                    following = ahead.submit(next, blocks, None)
                    yield block
            finally:
                following.cancel()

    def _blocks(self) -> Iterator[Block]:
        with ExitStack() as stack:
            indices = {name: stack.enter_context(_Index(self, name)) for name in _PAIRS if f"{name}.idx" in self.files}
            files = {part: stack.enter_context(_File(self, part)) for part in self.files if not part.endswith(".idx")}
            _check_meta_header(self, files["meta.npy"])
            document = image = 0
            while document < self.documents:
                block = self._next(indices, files, document, image)
                yield block
                document += len(block.lengths)
                image += len(block.meta)
            for file in files.values():
                file.check()

    def _next(self, indices: dict[str, "_Index"], files: dict[str, "_File"], document: int, image: int) -> Block:
        """Documents from `document` on, whose first picture is `image`."""
        count = min(_DOCUMENTS, self.documents - document)
        lengths = indices["text"].lengths(document, count)
        sizes = lengths.astype(np.int64) * self.dtype.itemsize
        starts = indices["image"].starts(document, count + 1) if self.images else np.zeros(count + 1, dtype="<i8")
        if self.images:
            stored = indices["image"].lengths(image, int(starts[-1]) - image)
            ends = np.concatenate([[0], np.cumsum(stored, dtype=np.int64)])
            sizes += np.diff(ends[starts - image])
        if self.has_loss:
            edges = indices["loss"].lengths(document, count)
            sizes += 4 * edges.astype(np.int64)
        count = max(1, int(np.searchsorted(np.cumsum(sizes), _BYTES, side="right")))
        image_counts = np.diff(starts[: count + 1])
        meta = files["meta.npy"].array(META, int(image_counts.sum()))
        return Block(
            tokens=files["text.bin"].array(self.dtype, int(lengths[:count].sum(dtype=np.int64))),
            lengths=lengths[:count],
            image_counts=image_counts,
            meta=meta,
            pictures=[files["image.bin"].read(int(meta["nbytes"].sum(dtype=np.int64)))] if len(meta) else [],
            loss=files["loss.bin"].array("<i4", int(edges[:count].sum())).reshape(-1, 2) if self.has_loss else None,
            range_counts=edges[:count].astype(np.int64) // 2 if self.has_loss else None,
        )


class _File:
    """A file of a source that is read from front to end, and whose digest is then known."""

    def __init__(self, stream: SourceStream, part: str) -> None:
        self.stream, self.part, self.hash = stream, part, hashlib.sha256()
        self.file = file_of(stream.prefix, part).open("rb")

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, size: int = 0, /) -> bytes:
        data = self.file.read(size)
        if len(data) != size:
            raise self.stream.damaged(self.part, f"{size - len(data)} bytes are missing", "what the index says")
        self.hash.update(data)
        return data

    def array(self, dtype: str | np.dtype, count: int) -> np.ndarray:
        return np.frombuffer(self.read(count * np.dtype(dtype).itemsize), dtype=dtype)

    def check(self) -> None:
        """Raises UserError unless all has been read and is what the manifest says."""
        while rest := self.file.read(_BYTES):
            self.hash.update(rest)
        if (found := self.hash.hexdigest()) != (wanted := self.stream.files[self.part][1]):
            raise self.stream.damaged(self.part, f"sha256 {found}", f"sha256 {wanted}")


class _Index:
    """Columns of an `.idx`, read in pieces. Its digest is checked first: all else is believed from here on."""

    def __init__(self, stream: SourceStream, name: str) -> None:
        part = f"{name}.idx"
        with _File(stream, part) as file:
            file.check()
        self.sequences = stream.images if name == "image" else stream.documents
        self.file = file_of(stream.prefix, part).open("rb")

    def __enter__(self) -> "_Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def lengths(self, first: int, count: int) -> np.ndarray:
        return self._column("<i4", HEADER.size + 4 * first, count)

    def starts(self, first: int, count: int) -> np.ndarray:
        """First sequences of documents."""
        return self._column("<i8", HEADER.size + 12 * self.sequences + 8 * first, count)

    def _column(self, dtype: str, offset: int, count: int) -> np.ndarray:
        self.file.seek(offset)
        return np.frombuffer(self.file.read(count * np.dtype(dtype).itemsize), dtype=dtype)


def _check_meta_header(stream: SourceStream, file: _File) -> None:
    try:
        header = (np.lib.format.read_magic(file), *np.lib.format.read_array_header_1_0(file))
    except UserError:
        raise
    except Exception as error:  # numpy reads the header as Python: damage raises many types
        raise stream.damaged("meta.npy", str(error), "an .npy file") from None
    if header != ((1, 0), (stream.images,), False, META):
        raise stream.damaged("meta.npy", f"{header}", f"{stream.images} rows of {META}")


def check_fit(first: SourceStream, other: SourceStream) -> None:
    """Raises UserError unless documents of both can stand in one source."""

    def told(stream: SourceStream) -> dict[str, Any]:
        return {
            "kind": stream.manifest["kind"],
            "tokenizer's sha256": stream.vocabulary.hash,
            "vocabulary size": stream.vocabulary.vocab_size,
            "bos, eos and image id": (
                stream.vocabulary.bos_id, stream.vocabulary.eos_id, stream.vocabulary.image_id,
            ),
            "dtype": stream.dtype.name,
        }  # fmt: skip

    wanted = told(first)
    for name, found in told(other).items():
        if found != wanted[name]:
            raise UserError(
                f"the sources do not fit: not the same {name}", where=other.prefix, found=found,
                allowed=f"{wanted[name]}, as in {first.prefix}", do="merge only sources of one kind and tokenizer",
            )  # fmt: skip
