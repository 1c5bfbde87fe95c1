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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm import __version__
from megatron_mm.config import Kind
from megatron_mm.data.ingest import Chunk, Format
from megatron_mm.data.ingest.filters import Filters
from megatron_mm.data.source_files import MANIFEST, file_of
from megatron_mm.errors import UserError

SHARD_BYTES = 64 << 20  # small inputs are read together up to this, as every shard costs a few files
SEEN = np.dtype([("hash", "<u8"), ("count", "<i8")])
SHARD_FILE = re.compile(r"\d{6,}\..+|repeated")  # names under OUTPUT.shards
_VERSION = 1  # of a shard's contents: raise it when the same input gives another shard
CONTINUE = "run the same command again: finished shards are kept"
AGAIN = f"choose another --output, then {CONTINUE}"
_SOURCE = ("text.bin", "text.idx", "image.bin", "image.idx", "loss.bin", "loss.idx", "meta.npy", MANIFEST)
SIDECARS = ("urls.npy", "seen.npy", "quarantine.jsonl")


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
            if done["key"] != self.key(share) or sizes(prefix) != done["files"]:
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


def sizes(prefix: Path) -> dict[str, int]:
    """The files of a shard that are there."""
    found = {}
    for part in (*_SOURCE, *SIDECARS):
        try:
            found[part] = file_of(prefix, part).stat().st_size
        except FileNotFoundError:
            continue
    return found


def remove(prefix: Path) -> None:
    """A shard, whole or in pieces; the mark that it is done first."""
    for part in ("done.json", MANIFEST, *_SOURCE, *SIDECARS):
        file_of(prefix, part).unlink(missing_ok=True)
        file_of(prefix, part + ".partial").unlink(missing_ok=True)
    file_of(prefix, MANIFEST + ".next").unlink(missing_ok=True)
