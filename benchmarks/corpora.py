"""Synthetic corpora of MM1's three kinds, as the packer sees them: lengths and image places.

    caption       one image and a caption of 20 to 200 tokens, uniform
    interleaved   long-tailed text (log-normal, median 493 tokens, mean 813), 1 image or more, 3 in the mean (geometric)
    text          long-tailed text (log-normal, median 545 tokens, mean 997)

`mixed` holds 45% captions, 45% interleaved documents and 10% text, in one source; images stand evenly spread.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_mm.data.pieces import Limits

MM1 = Limits(positions=4096, images=16, tokens_per_image=144)
SHARES = {"caption": 0.45, "interleaved": 0.45, "text": 0.1}
Kind = Literal["caption", "interleaved", "text", "mixed"]
_BLOCK = 1 << 18  # documents drawn at once


@dataclass(frozen=True)
class Corpus:
    """Lengths (int32) in tokens with bos, eos and image ids, and the number of each document's first image (int64)."""

    lengths: np.ndarray
    image_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def meta(self, document: int) -> np.ndarray:
        """Where the images of a document stand: the one field of a source's rows that packing reads."""
        count = int(self.image_starts[document + 1] - self.image_starts[document])
        rows = np.zeros(count, dtype=[("offset", "<u4")])
        if count:
            rows["offset"] = 1 + np.arange(count) * ((int(self.lengths[document]) - 2) // count)
        return rows


def corpus(kind: Kind, documents: int, folder: Path | None = None) -> Corpus:
    """Args: folder: of mapped files to hold it; None: in memory."""
    lengths = _array(folder, "lengths", "<i4", documents)
    image_starts = _array(folder, "image_starts", "<i8", documents + 1)
    image_starts[0], at = 0, 0
    for block_lengths, images in _blocks(kind, documents):
        here = slice(at, at + len(images))
        lengths[here] = block_lengths
        image_starts[at + 1 : at + len(images) + 1] = image_starts[at] + np.cumsum(images)
        at += len(images)
    return Corpus(lengths, image_starts)


def mapped_corpus(folder: Path) -> Corpus:
    """One made in a folder."""
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ("lengths", "image_starts"))
    return Corpus(*arrays)


def _array(folder: Path | None, name: str, dtype: str, size: int) -> np.ndarray:
    if folder is None:
        return np.empty(size, dtype=dtype)
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=(size,))


def _blocks(kind: Kind, documents: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for start in range(0, documents, _BLOCK):
        n = min(_BLOCK, documents - start)
        kinds = rng.choice(list(SHARES), n, p=list(SHARES.values())) if kind == "mixed" else np.full(n, kind)
        is_caption, is_text = kinds == "caption", kinds == "text"
        tail = np.exp(rng.standard_normal(n) * np.where(is_text, 1.1, 1.0) + np.where(is_text, 6.3, 6.2))
        words = np.where(is_caption, rng.integers(20, 201, n), np.ceil(tail)).astype(np.int64)
        images = np.where(is_text, 0, np.where(is_caption, 1, rng.geometric(1 / 3, n)))
        yield words + images + 2, images
