"""Runs of documents as arrays: how many documents move from source to source at once, and lose pictures on the way."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Block:
    """d documents with n pictures and r loss ranges, one after the other."""

    tokens: np.ndarray  # uint16 or int32, of all documents
    lengths: np.ndarray  # int32 [d], tokens of each
    image_counts: np.ndarray  # int64 [d]
    meta: np.ndarray  # META [n]
    pictures: Sequence[bytes | memoryview]  # pieces that joined are the pictures' bytes
    loss: np.ndarray | None = None  # int32 [r, 2]; None: all tokens are trained on
    range_counts: np.ndarray | None = None  # int64 [d]

    @property
    def bytes(self) -> int:
        loss = 0 if self.loss is None else self.loss.nbytes
        return self.tokens.nbytes + sum(len(data) for data in self.pictures) + loss

    def check(self) -> None:
        """Raises ValueError unless the sums agree."""
        held = len(self.tokens), len(self.meta), sum(len(data) for data in self.pictures)
        told = self.lengths.sum(dtype=np.int64), self.image_counts.sum(), self.meta["nbytes"].sum(dtype=np.int64)
        ranges = 0 if self.loss is None else len(self.loss)
        if held != told or ranges != (0 if self.range_counts is None else self.range_counts.sum()):
            raise ValueError(f"a block of {held} tokens, pictures, bytes whose documents have {told}")


def thin(block: Block, keep_images: np.ndarray, keep_documents: np.ndarray) -> Block:
    """The same without some pictures and some documents, as if they had never been there.

    Every loss range must hold a token that is no picture's, as ingest's do.

    Args:
        keep_images: bool [n].
        keep_documents: bool [d]; all pictures of a document that goes, go.
    """
    documents = len(block.lengths)
    of_image = np.repeat(np.arange(documents), block.image_counts)  # [n], the document of each
    keep_images = keep_images & keep_documents[of_image]
    starts = np.cumsum(block.lengths, dtype=np.int64) - block.lengths  # of documents among the tokens
    places = starts[of_image] + block.meta["offset"]
    removed = np.sort(places[~keep_images])

    keep_tokens = np.repeat(keep_documents, block.lengths)
    keep_tokens[removed] = False
    lost = np.bincount(of_image[~keep_images], minlength=documents)

    meta = block.meta[keep_images]
    meta["offset"] -= _removed_before(removed, starts[of_image], places)[keep_images].astype("<u4")
    loss, range_counts = block.loss, block.range_counts
    if loss is not None and range_counts is not None:
        loss, range_counts = _shift_ranges(loss, range_counts, starts, removed, keep_documents)
    return Block(
        tokens=block.tokens[keep_tokens],
        lengths=(block.lengths - lost)[keep_documents].astype("<i4"),
        image_counts=(block.image_counts - lost)[keep_documents],
        meta=meta,
        pictures=_kept_pictures(block, keep_images),
        loss=loss,
        range_counts=range_counts,
    )


def _removed_before(removed: np.ndarray, starts: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How many removed tokens lie between the start of a document and a place in it."""
    return np.searchsorted(removed, places) - np.searchsorted(removed, starts)


def _shift_ranges(
    loss: np.ndarray, range_counts: np.ndarray, starts: np.ndarray, removed: np.ndarray, keep_documents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    of_range = np.repeat(np.arange(len(starts)), range_counts)
    base = starts[of_range][:, None]
    shifted = loss - _removed_before(removed, np.broadcast_to(base, loss.shape), base + loss)
    keep = keep_documents[of_range]
    shifted, of_range = shifted[keep], of_range[keep]
    # Two ranges with only a picture between them have become one.
    joined = np.zeros(len(shifted), dtype=bool)
    joined[1:] = (shifted[1:, 0] == shifted[:-1, 1]) & (of_range[1:] == of_range[:-1])
    ends = np.append(~joined[1:], True)[: len(shifted)]
    ranges = np.stack([shifted[~joined, 0], shifted[ends, 1]], axis=1).astype("<i4")
    return ranges, np.bincount(of_range[~joined], minlength=len(starts))[keep_documents]


def _kept_pictures(block: Block, keep: np.ndarray) -> list[memoryview]:
    """The bytes of the pictures that stay, a piece for each run of them."""
    data = memoryview(block.pictures[0] if len(block.pictures) == 1 else b"".join(block.pictures))
    ends = np.cumsum(block.meta["nbytes"], dtype=np.int64)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8))).reshape(-1, 2)
    starts = ends - block.meta["nbytes"]
    return [data[int(starts[first]) : int(ends[last - 1])] for first, last in edges]
