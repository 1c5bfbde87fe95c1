"""Documents cut to pieces: what fits into a sequence, read off lengths and image places alone.

A document of n tokens gives n - 1 inputs and n - 1 labels (the next tokens). A *piece* is a run [start, end) of its
inputs: the whole document if it fits into a sequence, else parts that tile it, so that every target is trained once.
In the sequence each image id becomes `tokens_per_image` positions: a piece costs

    positions = (end - start) + images · (tokens_per_image - 1)

Documents are read in runs of BLOCK, so that memory does not grow with their number.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

BLOCK = 1 << 13  # documents read at once
PIECE = np.dtype([("document", "<u4"), ("start", "<i4"), ("end", "<i4")])
Split = Literal["train", "validation"]


class Piece(NamedTuple):
    """Inputs tokens[start:end] and labels tokens[start + 1:end + 1] of a document."""

    document: int
    start: int
    end: int


@dataclass(frozen=True)
class Limits:
    """Of a sequence."""

    positions: int
    images: int
    tokens_per_image: int


class Documents(Protocol):
    """What is asked of a source."""

    @property
    def lengths(self) -> np.ndarray: ...  # int32 [documents], tokens
    @property
    def image_starts(self) -> np.ndarray: ...  # int64 [documents + 1]
    def meta(self, document: int) -> np.ndarray: ...  # rows with the field offset, a row an image
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Pieces:
    """n pieces in the documents' order."""

    rows: np.ndarray  # PIECE [n]
    positions: np.ndarray  # int64 [n]
    images: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> "Pieces":
        return Pieces(self.rows[part], self.positions[part], self.images[part])


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A 64-bit mixing function (Steele, Lea, Flood 2014): uint64 in, uint64 out, every bit depends on every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def documents_of(split: Split, documents: range, validation_fraction: float) -> np.ndarray:
    """Those of the documents that are in a split, int64, ascending. It depends on the number alone, so it never
    moves."""
    numbers = np.arange(documents.start, documents.stop)
    held_out = splitmix64(numbers.astype(np.uint64)) / 2.0**64 < validation_fraction
    return numbers[held_out if split == "validation" else ~held_out]


def windows(
    source: Documents, split: Split, validation_fraction: float, limits: Limits, size: int
) -> Iterator[tuple[Pieces, int]]:
    """All pieces of a split, `size` at a time (the last ones fewer), and how many of the source's documents have been
    read so far."""
    assert len(source) <= 1 << 32  # a row keeps the document's number in 32 bits
    waiting: list[Pieces] = []
    pieces = stop = 0
    for start in range(0, len(source), BLOCK):
        stop = min(start + BLOCK, len(source))
        found = _cut_all(source, documents_of(split, range(start, stop), validation_fraction), limits)
        waiting.append(found)
        pieces += len(found)
        if pieces < size:
            continue
        joined = _join(waiting)
        whole = pieces - pieces % size
        for first in range(0, whole, size):
            yield joined[first : first + size], stop
        waiting, pieces = [joined[whole:]], pieces - whole
    if pieces:
        yield _join(waiting), stop


def _join(parts: Sequence[Pieces]) -> Pieces:
    return Pieces(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("rows", "positions", "images")))


def _cut_all(source: Documents, documents: np.ndarray, limits: Limits) -> Pieces:
    """All pieces of some neighbouring documents, which are as many as BLOCK at most."""
    ends = source.lengths[documents].astype(np.int64) - 1
    starts = source.image_starts
    images = starts[documents + 1] - starts[documents]
    extra = limits.tokens_per_image - 1
    too_large = (ends + images * extra > limits.positions) | (images > limits.images)
    # Text alone is cut anywhere; elsewhere it takes a look at where the images are.
    looked_at = {
        row: _cut_document(source, int(documents[row]), limits) for row in np.flatnonzero(too_large & (images > 0))
    }
    count = np.where(too_large, -(-ends // limits.positions), 1)
    for row, cuts in looked_at.items():
        count[row] = len(cuts)
    firsts = np.cumsum(count) - count
    rows = np.empty(int(count.sum()), dtype=PIECE)
    rows["document"] = np.repeat(documents, count)
    begin = (np.arange(len(rows)) - np.repeat(firsts, count)) * limits.positions
    rows["start"], rows["end"] = begin, np.minimum(begin + limits.positions, np.repeat(ends, count))
    pictures = np.repeat(images, count)
    for row, cuts in looked_at.items():
        here = slice(firsts[row], firsts[row] + len(cuts))
        rows["start"][here], rows["end"][here], pictures[here] = zip(*cuts, strict=True)
    positions = rows["end"].astype(np.int64) - rows["start"] + pictures * extra
    return Pieces(rows, positions, pictures)


def _cut_document(source: Documents, document: int, limits: Limits) -> list[tuple[int, int, int]]:
    """Start, end and images of its pieces."""
    places = source.meta(document)["offset"].tolist()
    runs = cut(int(source.lengths[document]), places, limits)
    return [(start, end, bisect_left(places, end) - bisect_left(places, start)) for start, end in runs]


def cut(tokens: int, places: Sequence[int], limits: Limits) -> list[tuple[int, int]]:
    """Pieces [start, end) of a document that does not fit: as long as possible, and not ending between a picture and
    the text after it where that can be helped.

    Args:
        tokens: of the document, bos and eos counted.
        places: of its image ids, ascending.
    """
    pieces, extra, last = [], limits.tokens_per_image - 1, tokens - 1
    start = first = 0  # first: number of the first image at or after start
    while start < last:
        images = 0
        while (
            first + images < len(places)
            and images < limits.images
            and places[first + images] + 1 <= start + limits.positions - (images + 1) * extra
        ):
            images += 1
        end = min(last, start + limits.positions - images * extra)
        if first + images < len(places):
            end = min(end, places[first + images])
        if end < last:
            back = end
            while back > start and first + images > 0 and _is_place(places, back - 1):
                back -= 1
            # Pictures only, or bos and pictures: moving them on would move them for ever.
            end = back if back > start + 1 else end
        pieces.append((start, end))
        start, first = end, bisect_left(places, end)
    return pieces


def _is_place(places: Sequence[int], position: int) -> bool:
    i = bisect_left(places, position)
    return i < len(places) and places[i] == position
