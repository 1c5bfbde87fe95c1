"""Sequences assembled from their pieces, dealt to microbatches, and collated: what a training step is given."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_mm.config import SequenceLayout
from megatron_mm.data.packing import Piece
from megatron_mm.data.source import Source, within
from megatron_mm.errors import UserError


@dataclass
class Microbatch:
    """b sequences of s positions. Padding has the pad id, loss 0 and document -1.

    Pictures come in the order of their placeholders: sequence after sequence, left to right.
    """

    tokens: Tensor  # int64 [b, s]; a picture is tokens_per_image times the image id
    labels: Tensor  # int64 [b, s]; the next token of the same document
    loss_mask: Tensor  # float32 [b, s]; 1 where the label is text that is trained on
    documents: Tensor  # int32 [b, s]; number of the piece within its sequence; all 0 without block attention
    position_ids: Tensor  # int64 [b, s]; from 0 in each piece; in each sequence without block attention
    source_ids: Tensor  # int64 [b]
    images: Tensor  # uint8 [n, 3, H, W]; this rank's share
    num_images: int  # of the whole microbatch
    sample_ids: Tensor  # int64 [b]; the number of the sample in the run; -1: filler without loss

    def map(self, function: Callable[[Tensor], Tensor]) -> "Microbatch":
        """The same with `function` of each tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_images"}
        return Microbatch(num_images=self.num_images, **{name: function(t) for name, t in tensors.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Microbatch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


class ImageRef(NamedTuple):
    """A picture of a source."""

    document: int
    number: int  # within the document


@dataclass
class Assembled:
    """One sequence, numpy [s] each, and its pictures."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    documents: np.ndarray
    position_ids: np.ndarray
    images: list[ImageRef]


def assemble(source: Source, pieces: Sequence[Piece], layout: SequenceLayout, block_attention: bool) -> Assembled:
    """Lay pieces one after the other, widen the pictures, pad.

    Raises:
        UserError: the documents are not those that were packed: what a damaged file holds.
        ValueError: the pieces do not fit into a sequence.
    """
    s = layout.seq_length
    out = Assembled(
        tokens=np.full(s, layout.pad_token_id, dtype=np.int64),
        labels=np.full(s, layout.pad_token_id, dtype=np.int64),
        loss_mask=np.zeros(s, dtype=np.float32),
        documents=np.full(s, -1, dtype=np.int32),
        position_ids=np.zeros(s, dtype=np.int64),
        images=[],
    )
    if not pieces:
        return out
    texts = source.texts([piece.document for piece in pieces])
    # Of each piece its inputs and the token after them: all but the last are inputs, all but the first labels.
    ids = np.concatenate([text[start : end + 1] for text, (_, start, end) in zip(texts, pieces, strict=True)])
    lengths = np.array([end - start for _, start, end in pieces])
    if len(ids) != int(lengths.sum()) + len(pieces) or not within(ids, source.vocab_size):
        raise _changed(source, pieces)
    is_input = np.ones(len(ids), dtype=bool)
    is_input[np.cumsum(lengths + 1) - 1] = False
    places = np.flatnonzero(is_input)
    inputs, labels = ids[places], ids[places + 1]
    firsts = np.cumsum(lengths) - lengths  # of each piece, among the inputs
    is_image = inputs == layout.image_token_id
    out.images = _images(source, pieces, np.add.reduceat(is_image, firsts, dtype=np.int64), lengths)
    widths = np.where(is_image, layout.tokens_per_image, 1)
    used = int(widths.sum())
    if used > s:
        raise ValueError(f"{used} positions in a sequence of {s}")

    out.tokens[:used] = np.repeat(inputs, widths)
    # Inside a picture the next token is the picture's; only its last position looks at what comes after.
    out.labels[:used] = layout.image_token_id
    lasts = np.cumsum(widths) - 1
    out.labels[lasts] = labels
    carries_loss = labels != layout.image_token_id
    if source.has_loss:
        trained = [_trained(source.loss(document), start + 1, end + 1) for document, start, end in pieces]
        carries_loss &= np.concatenate(trained)
    out.loss_mask[lasts] = carries_loss
    positions = np.add.reduceat(widths, firsts)  # of each piece
    if block_attention:
        out.documents[:used] = np.repeat(np.arange(len(pieces)), positions)
        out.position_ids[:used] = np.arange(used) - np.repeat(np.cumsum(positions) - positions, positions)
    else:
        out.documents[:used] = 0
        out.position_ids[:used] = np.arange(used)
    return out


def _images(source: Source, pieces: Sequence[Piece], counts: np.ndarray, lengths: np.ndarray) -> list[ImageRef]:
    """The pictures of the pieces. Raises UserError when the tokens have other numbers of them than the source tells.

    Args:
        counts: image ids among the inputs of each piece.
        lengths: inputs of each piece.
    """
    documents = np.array([piece.document for piece in pieces])
    held = source.image_starts[documents + 1] - source.image_starts[documents]
    is_part = (lengths + 1 != source.lengths[documents]) & (held > 0)
    first = np.zeros(len(pieces), dtype=np.int64)
    for i in np.flatnonzero(is_part).tolist():
        document, start, end = pieces[i]
        first[i], last = np.searchsorted(source.meta(document)["offset"], (start, end))
        held[i] = last - first[i]
    if not np.array_equal(counts, held):
        raise _changed(source, pieces)
    return [
        ImageRef(piece.document, number)
        for piece, begin, count in zip(pieces, first.tolist(), counts.tolist(), strict=True)
        for number in range(begin, begin + count)
    ]


def _changed(source: Source, pieces: Sequence[Piece]) -> UserError:
    documents = sorted({piece.document for piece in pieces})
    return UserError(
        "the documents are not those that were packed: a file of the source is damaged", where=source.prefix,
        found=f"one of the documents {documents[0]} to {documents[-1]}",
        do="run inspect_data.py verify on it, then restore it from a copy",
    )  # fmt: skip


def _trained(ranges: np.ndarray | None, start: int, end: int) -> np.ndarray:
    """Which of the tokens [start, end) of a document lie in its loss ranges, bool [end - start]."""
    if ranges is None:
        return np.ones(end - start, dtype=bool)
    edges = np.clip(ranges.reshape(-1) - start, 0, end - start)
    # Ranges are ascending and apart: a token lies in one when an odd number of edges is at or before it.
    return np.searchsorted(edges, np.arange(end - start), side="right") % 2 == 1


def share_of(num_images: int, rank: int, size: int) -> slice:
    """Pictures of a microbatch that rank `rank` of `size` decodes and encodes: equal shares, the last ones short."""
    each = max(1, -(-num_images // size))
    return slice(rank * each, (rank + 1) * each)


def deal(image_counts: np.ndarray, num_bins: int) -> np.ndarray:
    """Deal the samples of a global batch into microbatches with about equal numbers of pictures.

    Largest first, each to the bin with the fewest pictures that still has room. Bins come out by falling number of
    pictures: those that data-parallel ranks work on at the same time, dp neighbours, hold about the same.

    Args:
        image_counts: [B].
        num_bins: a divisor of B.
    Returns:
        int64 [num_bins, B / num_bins], sample numbers within the batch, ascending in each bin.
    """
    counts = np.asarray(image_counts, dtype=np.int64)
    room, rest = divmod(len(counts), num_bins)
    if rest:
        raise ValueError(f"{len(counts)} samples do not divide into {num_bins} bins")
    heap = [(0, number) for number in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0] * num_bins
    for sample in np.argsort(-counts, kind="stable").tolist():
        total, number = heapq.heappop(heap)
        bins[number].append(sample)
        totals[number] = total + int(counts[sample])
        if len(bins[number]) < room:
            heapq.heappush(heap, (totals[number], number))
    order = sorted(range(num_bins), key=lambda number: (-totals[number], number))
    return np.array([sorted(bins[number]) for number in order], dtype=np.int64)


def back_and_forth(bins: np.ndarray, dp_size: int) -> np.ndarray:
    """Microbatches that are dealt by falling number of pictures, given to data-parallel ranks.

    The direction turns each time: the rank with the most pictures of one microbatch has the fewest of the next, so that
    over the whole batch they even out too.

    Args:
        bins: [n · dp_size, b], as `deal` gives them.
    Returns:
        [n, dp_size, b]; [p, r] is rank r's microbatch p.
    """
    of_rank = bins.reshape(-1, dp_size, bins.shape[1]).copy()
    of_rank[1::2] = of_rank[1::2, ::-1].copy()
    return of_rank
