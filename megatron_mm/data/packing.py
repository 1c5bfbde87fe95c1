"""Documents to sequences, once, before anything is mixed or shuffled.

A document of n tokens gives n - 1 inputs and n - 1 labels (the next tokens). A *piece* is a run [start, end) of its
inputs: the whole document if it fits into a sequence, else parts that tile it, so that every target is trained once.
In the sequence each image id becomes `tokens_per_image` positions: a piece costs

    positions = (end - start) + images · (tokens_per_image - 1)

Pieces are laid by best fit, largest first, into sequences of at most `seq_length` positions and `max_images` images,
within windows of WINDOW pieces in the documents' order. It reads lengths and image places only, is deterministic, and
is kept on disk under a key of everything it depends on.
"""

import hashlib
import json
import os
import shutil
import tempfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megatron_mm.config import SequenceLayout
from megatron_mm.data.source import Source
from megatron_mm.errors import UserError

VERSION = 1  # of the algorithm; part of the key
WINDOW = 1 << 16  # pieces packed together
_PIECE = np.dtype([("document", "<u4"), ("start", "<i4"), ("end", "<i4")])
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


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A 64-bit mixing function (Steele, Lea, Flood 2014): uint64 in, uint64 out, every bit depends on every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def documents_of(split: Split, documents: int, validation_fraction: float) -> np.ndarray:
    """Numbers of the documents in a split, int64, ascending. It depends on the number alone, so it never moves."""
    held_out = splitmix64(np.arange(documents, dtype=np.uint64)) / 2.0**64 < validation_fraction
    return np.flatnonzero(held_out if split == "validation" else ~held_out)


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


def _pieces(source: Source, documents: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pieces of the documents in order, with their positions and images, int64 each."""
    ends = source.lengths[documents].astype(np.int64) - 1
    images = source.image_counts[documents].astype(np.int64)
    cost = ends + images * (limits.tokens_per_image - 1)
    pieces = np.zeros(len(documents), dtype=_PIECE)
    pieces["document"], pieces["end"] = documents, ends
    too_large = np.flatnonzero((cost > limits.positions) | (images > limits.images))
    if not len(too_large):
        return pieces, cost, images
    cut_pieces, cut_images = [], []
    for row in too_large:
        document = int(documents[row])
        places = source.meta(document)["offset"].tolist()
        for start, end in cut(int(ends[row]) + 1, places, limits):
            cut_pieces.append((document, start, end))
            cut_images.append(bisect_left(places, end) - bisect_left(places, start))
    keep = np.ones(len(documents), dtype=bool)
    keep[too_large] = False
    pieces = np.concatenate([pieces[keep], np.array(cut_pieces, dtype=_PIECE)])
    images = np.concatenate([images[keep], np.array(cut_images, dtype=np.int64)])
    order = np.lexsort((pieces["start"], pieces["document"]))
    pieces, images = pieces[order], images[order]
    cost = pieces["end"].astype(np.int64) - pieces["start"] + images * (limits.tokens_per_image - 1)
    return pieces, cost, images


def best_fit(cost: np.ndarray, images: np.ndarray, limits: Limits) -> tuple[np.ndarray, int]:
    """The sequence of each piece, int32 in the order given, and the number of sequences.

    Largest first (by the scarcer of the two limits), each into the open sequence with the fewest positions left that
    holds it. Open sequences with m images left are found by a bit set over their positions left: one shift and one
    lowest bit for each m, whatever the number of open sequences.
    """
    largest = np.maximum(cost * limits.images, images * limits.positions)
    order = np.argsort(-largest, kind="stable")
    free = [0] * (limits.images + 1)  # free[m]: bit c is set when a sequence has c positions and m images left
    open_at: dict[tuple[int, int], list[int]] = defaultdict(list)
    sequence = np.empty(len(cost), dtype=np.int32)
    count = 0
    for i, size, pictures in zip(order.tolist(), cost[order].tolist(), images[order].tolist(), strict=True):
        best, best_m = limits.positions + 1, -1
        for m in range(pictures, limits.images + 1):
            fitting = free[m] >> size
            if fitting:
                left = size + (fitting & -fitting).bit_length() - 1
                if left < best:
                    best, best_m = left, m
        if best_m < 0:
            number, best, best_m = count, limits.positions, limits.images
            count += 1
        else:
            found = open_at[best, best_m]
            number = found.pop()
            if not found:
                free[best_m] ^= 1 << best
        sequence[i] = number
        if best > size:
            open_at[best - size, best_m - pictures].append(number)
            free[best_m - pictures] |= 1 << (best - size)
    return sequence, count


def pack(
    source: Source, documents: np.ndarray, limits: Limits, window: int = WINDOW
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay documents into sequences.

    Returns:
        pieces: rows of document, start, end, [pieces], sequence after sequence and in the documents' order within one.
        offsets: int64 [sequences + 1]; sequence i holds pieces[offsets[i]:offsets[i + 1]].
        images: int32 [sequences].
    """
    pieces, cost, counts = _pieces(source, documents, limits)
    sequence = np.empty(len(pieces), dtype=np.int64)
    total = 0
    for start in range(0, len(pieces), window):
        here = slice(start, start + window)
        numbers, count = best_fit(cost[here], counts[here], limits)
        sequence[here] = numbers
        sequence[here] += total
        total += count
    order = np.argsort(sequence, kind="stable")
    offsets = np.zeros(total + 1, dtype=np.int64)
    np.cumsum(np.bincount(sequence, minlength=total), out=offsets[1:])
    images = np.bincount(sequence, weights=counts, minlength=total).astype(np.int32)
    return pieces[order], offsets, images


class PackedSource:
    """The sequences of one split of a source.

    Attributes:
        image_counts: int32 [sequences].
    """

    def __init__(self, folder: Path, layout: SequenceLayout) -> None:
        try:
            self._pieces, self._offsets, self.image_counts = (
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("pieces", "offsets", "images")
            )
            whole = self._pieces.dtype == _PIECE and int(self._offsets[-1]) == len(self._pieces)
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise self._damaged(folder, str(error)) from None
        if not whole or len(self._offsets) != len(self.image_counts) + 1:
            raise self._damaged(folder, "files that do not belong together")
        self._layout = layout

    @staticmethod
    def _damaged(folder: Path, found: str) -> UserError:
        return UserError("the packing is damaged", where=str(folder), found=found, do="delete this folder")

    @classmethod
    def open(
        cls,
        source: Source,
        split: Split,
        layout: SequenceLayout,
        validation_fraction: float,
        cache_dir: str | Path | None = None,
    ) -> "PackedSource":
        """Open the packing of a split, made first if it is not there yet. Several processes may do so at once.

        Args:
            cache_dir: folder of the packings; None: beside the source.
        """
        limits = Limits(layout.seq_length, layout.max_images, layout.tokens_per_image)
        key = json.dumps(
            {
                "version": VERSION,
                "window": WINDOW,
                "source": source.digest,
                "split": split,
                "fraction": validation_fraction,
                "limits": [limits.positions, limits.images, limits.tokens_per_image],
            }
        )
        base = Path(cache_dir) / Path(source.prefix).name if cache_dir else Path(source.prefix)
        folder = base.with_name(f"{base.name}.packed-{hashlib.sha256(key.encode()).hexdigest()[:16]}-{split}")
        if not folder.exists():
            try:
                _build(folder, source, documents_of(split, len(source), validation_fraction), limits)
            except OSError as error:
                raise UserError(
                    "cannot write the packing", where=str(folder), found=error.strerror,
                    do="make room, or set data.cache_dir to a folder that can be written",
                ) from None  # fmt: skip
        return cls(folder, layout)

    def __len__(self) -> int:
        return len(self.image_counts)

    def pieces(self, i: int) -> list[Piece]:
        """Pieces of sequence i, in the documents' order."""
        return [Piece(*row) for row in self._pieces[int(self._offsets[i]) : int(self._offsets[i + 1])].tolist()]

    def image_count(self, i: int) -> int:
        return int(self.image_counts[i])

    @property
    def images(self) -> int:
        return int(self.image_counts.sum(dtype=np.int64))

    @property
    def fill(self) -> float:
        """Share of the positions that are not padding, 0 to 1."""
        inputs = int((self._pieces["end"].astype(np.int64) - self._pieces["start"]).sum())
        positions = inputs + self.images * (self._layout.tokens_per_image - 1)
        return positions / max(1, len(self) * self._layout.seq_length)


def _build(folder: Path, source: Source, documents: np.ndarray, limits: Limits) -> None:
    """Under a temporary name, then renamed; whoever comes second drops its own, which is the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        for name, content in zip(("pieces", "offsets", "images"), pack(source, documents, limits), strict=True):
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, content, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
