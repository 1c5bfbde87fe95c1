"""What a person is shown of a sequence: its tokens in runs of one nature, read off what a training step is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mm.config import SequenceLayout
from megatron_mm.data.batch import ImageRef, assemble
from megatron_mm.data.packing import Piece
from megatron_mm.data.source import Source
from megatron_mm.data.tokenizer import Tokenizer

SHOWN_TOKENS = 6000  # of a document when documents are shown; one may be a whole book


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one nature."""

    first: int  # number of the first one within the document
    tokens: int
    positions: range  # of the sequence that it fills; empty for a piece's last token, which is a label only
    trained: bool  # on as targets


@dataclass(frozen=True)
class Words(Run):
    text: str


@dataclass(frozen=True)
class Special(Run):
    name: str  # bos, eos, …


@dataclass(frozen=True)
class Shown(Run):
    """A picture in its place."""

    image: ImageRef


@dataclass(frozen=True)
class Fragment:
    """A piece of a document within a sequence, or a document for itself."""

    document: int
    tokens: range  # of the document: inputs, and the last label
    length: int  # tokens of the whole document
    positions: range
    runs: list[Run]


def counts(fragments: Sequence[Fragment]) -> str:
    """Their pictures and the tokens trained on, in words."""
    runs = [run for fragment in fragments for run in fragment.runs]
    pictures = sum(isinstance(run, Shown) for run in runs)
    trained = sum(run.tokens for run in runs if run.trained)
    return f"{pictures} picture{'s' * (pictures != 1)} · {trained:,} tokens trained on"


def look(
    source: Source, pieces: Sequence[Piece], layout: SequenceLayout, block_attention: bool, tokenizer: Tokenizer
) -> list[Fragment]:
    """The fragments of a sequence in order. Tokens, pictures and loss are those of `batch.assemble`."""
    sequence = assemble(source, pieces, layout, block_attention)
    images = iter(sequence.images)
    fragments, position = [], 0
    for document, start, end in pieces:
        ids, trained, spans = [], [False], []  # nothing predicts a piece's first token
        begin = position
        for _ in range(start, end):
            ids.append(int(sequence.tokens[position]))
            width = layout.tokens_per_image if ids[-1] == layout.image_token_id else 1
            spans.append(range(position, position + width))
            position += width
            trained.append(bool(sequence.loss_mask[position - 1]))
        ids.append(int(sequence.labels[position - 1]))
        spans.append(range(position, position))
        runs: list[Run] = []
        for first, last in _borders(np.array(ids), np.array(trained), tokenizer):
            run = (
                start + first, last - first, range(spans[first].start, spans[last - 1].stop), trained[first],
            )  # fmt: skip
            if ids[first] == layout.image_token_id:
                # As a last label it stands for a picture that opens the next piece.
                runs.append(Shown(*run, next(images)) if run[2] else Special(*run, "picture, in the next part"))
            elif name := _special(ids[first], start + first, tokenizer):
                runs.append(Special(*run, name))
            else:
                runs.append(Words(*run, tokenizer.decode(ids[first:last])))
        length = int(source.lengths[document])
        fragments.append(Fragment(document, range(start, end + 1), length, range(begin, position), runs))
    return fragments


def look_at_document(source: Source, document: int, tokenizer: Tokenizer) -> Fragment:
    """A document for itself, or its first SHOWN_TOKENS tokens; a picture takes one position."""
    inputs = min(int(source.lengths[document]) - 1, SHOWN_TOKENS)
    layout = SequenceLayout(
        seq_length=inputs,
        max_images=inputs,
        tokens_per_image=1,
        image_size=1,
        image_token_id=tokenizer.image_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    [fragment] = look(source, [Piece(document, 0, inputs)], layout, True, tokenizer)
    return fragment


def _special(number: int, place: int, tokenizer: Tokenizer) -> str:
    """The name of a special token at a place of its document, "" for any other. One id may be both bos and eos."""
    if number == tokenizer.bos_id and (place == 0 or number != tokenizer.eos_id):
        return "bos"
    return {tokenizer.pad_id: "pad", tokenizer.eos_id: "eos"}.get(number, "")


def _borders(ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """[first, last) of each run: special tokens and pictures one by one, words as long as their loss is the same."""
    alone = np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id])
    begins = np.ones(len(ids), dtype=bool)
    begins[1:] = alone[1:] | alone[:-1] | (trained[1:] != trained[:-1])
    starts = np.flatnonzero(begins).tolist()
    return list(zip(starts, [*starts[1:], len(ids)], strict=True))
