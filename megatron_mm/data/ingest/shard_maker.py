"""A share of the input to a shard: records read, made into documents by one or more threads, written in their order."""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_mm.data.ingest import BadRecord, Chunk, Picture, Record
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.document import Document, make_document
from megatron_mm.data.ingest.shards import AGAIN, SEEN, SIDECARS, Job, Report, Share, Tally, remove, sizes
from megatron_mm.data.source_files import MANIFEST, file_of
from megatron_mm.data.source_writer import SourceWriter
from megatron_mm.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm.errors import UserError

_IN_FLIGHT = 8  # records a thread, read ahead
_REPORT = 0.5  # seconds between two reports of a shard that is being made
T = TypeVar("T")
R = TypeVar("R")


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
        files = {part: size for part, size in sizes(self.prefix).items() if part in SIDECARS}
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
