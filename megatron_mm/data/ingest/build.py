"""Records to a source: pictures checked and text encoded by threads, written in the records' order."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_mm.config import Kind
from megatron_mm.data.ingest import BadRecord, Record, Text
from megatron_mm.data.ingest.images import BadImageError, StoredImage, store
from megatron_mm.data.ingest.jsonl import read_records
from megatron_mm.data.source_files import file_of
from megatron_mm.data.source_writer import SourceWriter
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import UserError

RATE_AFTER = 100  # records, before the rate of bad ones can stop the build
_IN_FLIGHT = 8  # records a thread, read ahead


@dataclass(frozen=True)
class Document:
    tokens: list[int]
    images: list[StoredImage]


@dataclass(frozen=True)
class Summary:
    documents: int
    images: int
    tokens: int
    bad: int
    reasons: dict[str, int]  # a reason's text up to its colon → records
    seconds: float


def make_document(record: Record, tokenizer: Tokenizer, max_pixels: int) -> Document | BadRecord:
    """Tokens and stored pictures of a record, or why there are none."""
    tokens: list[int] = [tokenizer.bos_id]
    images: list[StoredImage] = []
    for part in record.parts:
        if isinstance(part, Text):
            tokens += tokenizer.encode(part.text)
            continue
        name, data = f"image {len(images)}", part.content
        try:
            if isinstance(data, Path):
                name = f"image {data}"
                data = data.read_bytes()
            images.append(store(data, max_pixels))
        except OSError as error:
            return BadRecord(record.id, f"{error.strerror}: {name}")
        except BadImageError as error:
            return BadRecord(record.id, f"{error}: {name}")
        tokens.append(tokenizer.image_id)
    return Document([*tokens, tokenizer.eos_id], images)


def _in_order(
    records: Iterable[Record | BadRecord], make: Callable[[Record], Document | BadRecord], threads: int
) -> Generator[Document | BadRecord]:
    """`make` of each record, on threads (the decoders release Python's lock), in the records' order."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[BadRecord | Future[Document | BadRecord]] = deque()
        try:
            for record in records:
                waiting.append(record if isinstance(record, BadRecord) else pool.submit(make, record))
                if len(waiting) > threads * _IN_FLIGHT:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _result(item: "BadRecord | Future[Document | BadRecord]") -> Document | BadRecord:
    return item if isinstance(item, BadRecord) else item.result()


class _Progress:
    """One line on stderr, rewritten on a terminal and at most every ten seconds elsewhere."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name, self.stream, self.started = name, stream, time.monotonic()
        self.interval = 0.5 if stream.isatty() else 10.0
        self.shown, self.read, self.size = self.started, 0, 1

    def bytes_read(self, read: int, size: int) -> None:
        self.read, self.size = read, size

    def show(self, documents: int, images: int, bad: int) -> None:
        now = time.monotonic()
        if now - self.shown < self.interval:
            return
        self.shown = now
        seconds, share = now - self.started, self.read / max(1, self.size)
        left = seconds / share - seconds if share else 0.0
        line = (
            f"{self.name}: {share:.1%}, {documents} documents ({documents / seconds:.0f}/s), "
            f"{images} images ({images / seconds:.0f}/s), {bad} bad, {left / 60:.1f} min left"
        )
        self.stream.write(f"\r{line}\x1b[K" if self.stream.isatty() else line + "\n")
        self.stream.flush()

    def end(self) -> float:
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
        return time.monotonic() - self.started


class _Quarantine:
    """`X.quarantine.jsonl`: one line a bad record. It replaces an older build's, and is absent when all were good."""

    def __init__(self, prefix: Path) -> None:
        self.path = file_of(prefix, "quarantine.jsonl")
        self.partial = file_of(prefix, "quarantine.jsonl.partial")
        self.count = 0
        self.reasons: dict[str, int] = {}
        with self._told():
            self.file = self.partial.open("w", encoding="utf-8")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                self.file.close()
            self.partial.unlink(missing_ok=True)
            raise UserError("cannot write the quarantine", where=str(self.path), found=error.strerror) from None

    def add(self, bad: BadRecord) -> None:
        with self._told():
            self.file.write(json.dumps({"record": bad.id, "reason": bad.reason}, ensure_ascii=False) + "\n")
        self.count += 1
        kind = bad.reason.partition(":")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1

    def __enter__(self) -> "_Quarantine":
        return self

    def __exit__(self, *_: object) -> None:
        """Kept also when the build fails: the reasons are what the user needs then."""
        with self._told():
            self.file.close()
            if self.count:
                os.replace(self.partial, self.path)
            else:
                self.partial.unlink(missing_ok=True)
                self.path.unlink(missing_ok=True)


def build_source(
    inputs: list[Path],
    prefix: Path,
    kind: Kind,
    tokenizer: Tokenizer,
    *,
    max_bad_rate: float = 0.05,
    max_image_pixels: int = 40_000_000,
    threads: int | None = None,
    made: dict[str, Any] | None = None,
    stream: TextIO | None = None,
) -> Summary:
    """Read JSONL files and write a source; an older one of the same prefix is replaced only when this completes.

    Args:
        max_bad_rate: of the records read; above it (after the first 100, and at the end) the build stops.
        max_image_pixels: pictures whose header claims more are refused before decoding.
        threads: that decode; None: as many as cores.
        made: kept in the manifest, for people.
        stream: of the progress lines; None: stderr.
    Raises:
        UserError: an input cannot be read, too many records are bad, none is good, or the disk is full.
    """
    progress = _Progress(prefix.name, stream or sys.stderr)
    records = read_records(inputs, kind, progress.bytes_read)
    threads = threads or os.cpu_count() or 1
    documents = _in_order(records, lambda record: make_document(record, tokenizer, max_image_pixels), threads)
    with SourceWriter(prefix, kind, tokenizer) as writer, closing(documents):
        with _Quarantine(prefix) as quarantine:
            for document in documents:
                if isinstance(document, BadRecord):
                    quarantine.add(document)
                else:
                    writer.add(document.tokens, document.images)
                progress.show(writer.documents, writer.images, quarantine.count)
                _check_rate(quarantine, writer.documents, max_bad_rate, RATE_AFTER)
            _check_rate(quarantine, writer.documents, max_bad_rate, 0)
        manifest = writer.finish(made or {})
    return Summary(
        documents=manifest["documents"],
        images=manifest["images"],
        tokens=manifest["tokens"],
        bad=quarantine.count,
        reasons=quarantine.reasons,
        seconds=progress.end(),
    )


def _check_rate(quarantine: _Quarantine, good: int, allowed: float, after: int) -> None:
    seen = good + quarantine.count
    if seen > after and quarantine.count > allowed * seen:
        reasons = ", ".join(f"{n} × {reason}" for reason, n in sorted(quarantine.reasons.items(), key=lambda x: -x[1]))
        raise UserError(
            "too many bad records", where=str(quarantine.path), found=f"{quarantine.count} of {seen}: {reasons}",
            allowed=f"at most {allowed:.2%}", do="see the reasons there; mend the input or raise --max-bad-rate",
        )  # fmt: skip
