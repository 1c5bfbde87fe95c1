"""A share of the input made into a small source of its own, under OUTPUT.shards, that a later run can take over.

N.text.bin … N.manifest.json   the source; absent when no document of the share was kept
N.urls.npy                     uint64, `url_hash` of each picture, for filters that look at the whole input
N.seen.npy                     hashes of URLs and pictures with how often each is there, ascending, for the same
N.quarantine.jsonl             bad records and why
N.done.json                    written last: what the shard was made of, what is in it, the sizes of the files above
"""

import dataclasses
import hashlib
import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_mm import __version__
from megatron_mm.config import Kind
from megatron_mm.data.ingest import BadRecord, Chunk, Format, Picture, Record
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.document import Document, make_document
from megatron_mm.data.ingest.filters import Filters
from megatron_mm.data.source_files import MANIFEST, file_of
from megatron_mm.data.source_writer import SourceWriter
from megatron_mm.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm.errors import UserError

SHARD_BYTES = 64 << 20  # small inputs are read together up to this, as every shard costs a few files
SEEN = np.dtype([("hash", "<u8"), ("count", "<i8")])
SHARD_FILE = re.compile(r"\d{6,}\..+|repeated")  # names under OUTPUT.shards
_VERSION = 1  # of a shard's contents: raise it when the same input gives another shard
CONTINUE = "run the same command again: finished shards are kept"
AGAIN = f"choose another --output, then {CONTINUE}"
_IN_FLIGHT = 8  # records a thread, read ahead
_REPORT = 0.5  # seconds between two reports of a shard that is being made
_SOURCE = ("text.bin", "text.idx", "image.bin", "image.idx", "loss.bin", "loss.idx", "meta.npy", MANIFEST)
_SIDECARS = ("urls.npy", "seen.npy", "quarantine.jsonl")
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Tally:
    """What was read, and what became of it."""

    documents: int = 0
    images: int = 0
    tokens: int = 0
    bytes: int = 0  # of input
    bad: Counter[str] = field(default_factory=Counter)  # a reason's text up to its colon → records
    filtered_documents: Counter[str] = field(default_factory=Counter)  # the filters' reason → documents
    filtered_images: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)  # inputs whose rest could not be read, and why

    @property
    def records(self) -> int:
        return self.documents + self.bad.total() + self.filtered_documents.total()

    def add(self, other: "Tally") -> None:
        for f in dataclasses.fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, mine + theirs)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tally":
        counters = {name: Counter(value) for name, value in values.items() if isinstance(value, dict)}
        return cls(**(values | counters))


@dataclass(frozen=True)
class Share:
    """What one shard is made of."""

    number: int
    chunks: tuple[Chunk, ...]
    inputs: tuple[tuple[str, int, int | str], ...]  # path, size and time (or digest) of the inputs of these chunks

    @cached_property
    def bytes(self) -> int:
        return sum(chunk.bytes for chunk in self.chunks)

    def __str__(self) -> str:
        first, last = self.chunks[0], self.chunks[-1]
        more = f" to {last.path}, {last.start}–{last.end}" if len(self.chunks) > 1 else ""
        return f"{first.path}, {first.start}–{first.end}{more}"


@dataclass(frozen=True)
class Report:
    """How far a shard is."""

    number: int
    tally: Tally
    done: bool


@dataclass(frozen=True)
class Job:
    """What all shards of a run have in common; all that a worker needs to know."""

    folder: Path
    format: Format
    kind: Kind
    tokenizer: str
    tokenizer_hash: str
    max_image_pixels: int
    filters: Filters

    def prefix(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def quarantine(self, number: int) -> Path:
        return file_of(self.prefix(number), "quarantine.jsonl")

    def holds_documents(self, number: int) -> bool:
        return file_of(self.prefix(number), MANIFEST).exists()

    def key(self, share: Share) -> dict[str, Any]:
        """All that decides what is in a shard, as JSON gives it back."""
        key = {
            "version": [__version__, _VERSION],
            "format": self.format.name,
            "kind": self.kind,
            "tokenizer": self.tokenizer_hash,
            "max_image_pixels": self.max_image_pixels,
            "filters": dataclasses.asdict(self.filters),
            "chunks": [[str(chunk.path), chunk.start, chunk.end] for chunk in share.chunks],
            "inputs": share.inputs,
        }
        return json.loads(json.dumps(key))

    def finished(self, share: Share) -> Tally | None:
        """What is in the shard, if an earlier run has made this very one and its files have their sizes."""
        prefix = self.prefix(share.number)
        try:
            done = json.loads(file_of(prefix, "done.json").read_bytes())
            if done["key"] != self.key(share) or _sizes(prefix) != done["files"]:
                return None
            return Tally.from_dict(done["tally"])
        except (OSError, ValueError, TypeError, KeyError):
            return None


def make_shares(chunks: Sequence[Chunk]) -> list[Share]:
    """Chunks dealt to shards, in order, small ones together. Depends on the inputs alone."""
    states: dict[Path, tuple[str, int, int | str]] = {}
    shares: list[Share] = []
    group: list[Chunk] = []

    def close() -> None:
        inputs = tuple(states[path] for path in dict.fromkeys(chunk.path for chunk in group))
        shares.append(Share(len(shares), tuple(group), inputs))
        group.clear()

    for chunk in chunks:
        if chunk.path not in states:
            states[chunk.path] = _state(chunk.path)
        if group and sum(c.bytes for c in group) + chunk.bytes > SHARD_BYTES:
            close()
        group.append(chunk)
    if group:
        close()
    return shares


def _state(path: Path) -> tuple[str, int, int | str]:
    """Changes when a file changes, or any file of a folder."""
    try:
        if not path.is_dir():
            status = path.stat()
            return str(path), status.st_size, status.st_mtime_ns
        digest, size = hashlib.sha256(), 0
        for folder, folders, files in os.walk(path):
            folders.sort()
            for name in sorted(files):
                file = os.path.join(folder, name)
                status = os.stat(file) if os.path.exists(file) else os.lstat(file)  # a link may lead nowhere
                digest.update(f"{folder}/{name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "replace"))
                size += status.st_size
        return str(path), size, digest.hexdigest()
    except OSError as error:
        raise UserError("cannot read the input", where=str(path), found=error.strerror) from None


def _sizes(prefix: Path) -> dict[str, int]:
    """The files of a shard that are there."""
    sizes = {}
    for part in (*_SOURCE, *_SIDECARS):
        try:
            sizes[part] = file_of(prefix, part).stat().st_size
        except FileNotFoundError:
            continue
    return sizes


def remove(prefix: Path) -> None:
    """A shard, whole or in pieces; the mark that it is done first."""
    for part in ("done.json", MANIFEST, *_SOURCE, *_SIDECARS):
        file_of(prefix, part).unlink(missing_ok=True)
        file_of(prefix, part + ".partial").unlink(missing_ok=True)
    file_of(prefix, MANIFEST + ".next").unlink(missing_ok=True)


class ShardMaker:
    """Makes shards of a job, one after the other, on `threads` threads."""

    def __init__(self, job: Job, threads: int) -> None:
        self.job, self.threads = job, threads
        self.tokenizer = open_tokenizer(job.tokenizer)
        if self.tokenizer.hash != job.tokenizer_hash:
            raise UserError(
                "the tokenizer is not the same everywhere, or changed during the run", where=job.tokenizer,
                found=f"sha256 {self.tokenizer.hash}", allowed=f"sha256 {job.tokenizer_hash}",
            )  # fmt: skip

    def make(self, share: Share, hear: Callable[[Report], None]) -> None:
        """Write a shard, telling `hear` every half second and at the end. Raises UserError when it cannot."""
        prefix = self.job.prefix(share.number)
        try:
            remove(prefix)
            with _Shard(share.number, self.job, self.tokenizer) as shard:
                self._fill(shard, share, hear)
                shard.finish(self.job.key(share))
        except OSError as error:
            raise UserError(
                "cannot write a shard", where=str(prefix), found=error.strerror,
                do=f"make room or {AGAIN}",
            ) from None  # fmt: skip
        hear(Report(share.number, shard.tally, done=True))

    def _fill(self, shard: "_Shard", share: Share, hear: Callable[[Report], None]) -> None:
        told = time.monotonic()
        for chunk in share.chunks:
            before = shard.tally.bytes
            with closing(self._documents(chunk)) as documents:
                for size, document in documents:
                    shard.add(document)
                    shard.tally.bytes = min(shard.tally.bytes + size, before + chunk.bytes)
                    if time.monotonic() > told + _REPORT:
                        shard.flush()
                        hear(Report(share.number, shard.tally, done=False))
                        told = time.monotonic()
            shard.tally.bytes = before + chunk.bytes

    def _documents(self, chunk: Chunk) -> Generator[tuple[int, Document | BadRecord]]:
        """With the bytes of each record, in the input's order."""

        def make(record: Record | BadRecord) -> tuple[int, Document | BadRecord]:
            if isinstance(record, BadRecord):
                return 0, record
            document = make_document(record, self.tokenizer, self.job.max_image_pixels, self.job.filters)
            return _bytes(record), document

        records = self._records(chunk)
        if self.threads == 1:
            yield from map(make, records)
        else:
            yield from _in_order(records, make, self.threads)

    def _records(self, chunk: Chunk) -> Iterator[Record | BadRecord]:
        try:
            yield from self.job.format.read(chunk, self.job.kind)
        except OSError as error:
            raise UserError("cannot read the input", where=str(chunk.path), found=error.strerror or error) from None


def _bytes(record: Record) -> int:
    """About what it took of the input."""
    parts = [part.content if isinstance(part, Picture) else part.text for part in record.parts]
    return sum(PICTURE_BYTES if isinstance(part, Path) else len(part) for part in parts)


def _in_order(items: Iterable[T], make: Callable[[T], R], threads: int) -> Generator[R]:
    """`make` of each item, on threads (the decoders release Python's lock), in the items' order."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > threads * _IN_FLIGHT:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Shard:
    """The files of one shard while they are written. Leaving the block without `finish` keeps the quarantine alone."""

    def __init__(self, number: int, job: Job, tokenizer: Tokenizer) -> None:
        prefix, quarantine = job.prefix(number), job.quarantine(number)
        self.prefix, self.filters, self.tally = prefix, job.filters, Tally()
        self.counts_repeats = job.filters.max_image_repeats is not None
        self.urls, self.hashes = bytearray(), bytearray()
        self.quarantine = quarantine.open("w", encoding="utf-8", errors="backslashreplace")
        self.writer = SourceWriter(prefix, job.kind, tokenizer, AGAIN)

    def __enter__(self) -> "_Shard":
        return self

    def __exit__(self, *error: Any) -> None:
        self.writer.__exit__(*error)
        self.quarantine.close()

    def add(self, document: Document | BadRecord) -> None:
        if isinstance(document, BadRecord):
            self._put_aside(document)
            return
        if fault := self._fault(len(document.images)):
            self.tally.filtered_documents[fault] += 1
        else:
            try:
                self.writer.add(document.tokens, document.images, document.loss)
            except ValueError as error:
                self._put_aside(BadRecord(document.id, f"cannot be stored: {error}"))
                return
            if self.counts_repeats:
                self.urls += np.array(document.urls, dtype="<u8").tobytes()
                self.hashes += np.array([image.hash for image in document.images], dtype="<u8").tobytes()
        writer, tally = self.writer, self.tally
        tally.documents, tally.images, tally.tokens = writer.documents, writer.images, writer.tokens
        tally.filtered_images += document.dropped

    def _put_aside(self, bad: BadRecord) -> None:
        self.quarantine.write(json.dumps({"record": bad.id, "reason": bad.reason}, ensure_ascii=False) + "\n")
        self.tally.bad[bad.reason.partition(":")[0]] += 1
        if bad.damaged_input:
            self.tally.damaged.append(f"{bad.id}: {bad.reason}")

    def _fault(self, images: int) -> str:
        """As the filters say; but a document with too many pictures may lose some that are repeated elsewhere."""
        fault = self.filters.document_fault(images)
        too_few = images < self.filters.min_document_images
        return fault if too_few or not self.counts_repeats else ""

    def flush(self) -> None:
        self.quarantine.flush()

    def finish(self, key: dict[str, Any]) -> None:
        self.quarantine.flush()
        os.fsync(self.quarantine.fileno())
        if self.counts_repeats:
            self._write_hashes()
        files = {part: size for part, size in _sizes(self.prefix).items() if part in _SIDECARS}
        if self.tally.documents:
            manifest = self.writer.finish({})
            files |= {part: entry["bytes"] for part, entry in manifest["files"].items()}
            files[MANIFEST] = file_of(self.prefix, MANIFEST).stat().st_size
        done = {"key": key, "tally": vars(self.tally), "files": files}
        partial = file_of(self.prefix, "done.json.partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(done, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, file_of(self.prefix, "done.json"))

    def _write_hashes(self) -> None:
        urls, hashes = np.frombuffer(self.urls, dtype="<u8"), np.frombuffer(self.hashes, dtype="<u8")
        keys, counts = np.unique(np.concatenate([urls[urls != 0], hashes]), return_counts=True)
        seen = np.empty(len(keys), dtype=SEEN)
        seen["hash"], seen["count"] = keys, counts
        for part, array in (("urls.npy", urls), ("seen.npy", seen)):
            with file_of(self.prefix, part).open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
