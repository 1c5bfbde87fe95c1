"""What `tools/inspect_data.py show` puts on its page: documents of a source, or sequences of a run."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_mm.config import load_config
from megatron_mm.data.inspect.page import Section, write_page
from megatron_mm.data.inspect.view import counts, look, look_at_document
from megatron_mm.data.source import Source
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import UserError


def choose(documents: int, count: int, start: int | None, seed: int | None) -> list[int]:
    """Numbers of the documents to show, ascending: `count` from `start` on, or at random."""
    if seed is not None:
        chosen = np.random.default_rng(seed).choice(documents, min(count, documents), replace=False)
        return sorted(chosen.tolist())
    start = start or 0
    if start >= documents:
        raise UserError("there is no such document", where="--start", found=start, allowed=f"0 to {documents - 1}")
    return list(range(start, min(start + count, documents)))


def show_documents(source: Source, documents: Sequence[int], tokenizer: Tokenizer, output: Path) -> int:
    """Write a page of documents. Returns its size in bytes."""
    source.check_tokenizer(tokenizer)
    m = source.manifest
    about = [
        f"{source.kind} source of {m['documents']:,} documents, {m['images']:,} images, {m['tokens']:,} tokens; "
        f"tokenizer {tokenizer.path}; loss on {'some ranges of the text' if source.has_loss else 'all text'}.",
        f"Shown: {len(documents)} of them.",
    ]

    def sections() -> Iterator[Section]:
        for document in documents:
            fragment = look_at_document(source, document, tokenizer)
            yield Section(f"Document {document}", "", source, [fragment], fragment.positions.stop)

    return write_page(output, source.prefix, about, "", sections())


def show_sequences(config_path: Path, samples: range, output: Path) -> int:
    """Write a page of the sequences that a run's samples are, in the run's order. Returns its size in bytes."""
    from megatron_mm.data.loader import TrainingData  # imports torch

    config = load_config(config_path)
    data = TrainingData.open(config)
    batch, block = config.training.global_batch_size, config.data.block_attention
    total = config.training.steps * batch
    if not samples or samples.stop > total:
        raise UserError(
            "the run has no such sequences", where="--sequences", found=f"{samples.start}:{samples.stop}",
            allowed=f"START:END from 0 to {total}",
        )  # fmt: skip
    sources, sequences = data.mixture.locate_all(np.array(samples))
    about = [
        f"Sequences {samples.start} to {samples.stop - 1} of the run, as its training steps are given them"
        f" ({batch} a step). Attention {'does not cross' if block else 'crosses'} documents; a picture takes "
        f"{data.layout.tokens_per_image} positions.",
    ]

    def sections() -> Iterator[Section]:
        for sample, k, number in zip(samples, sources.tolist(), sequences.tolist(), strict=True):
            source, packed = data.sources[k], data.train[k]
            fragments = look(source, packed.pieces(number), data.layout, block, data.tokenizer)
            used = fragments[-1].positions.stop
            facts = (
                f"step {sample // batch + 1} · source {data.source_names[k]} ({source.kind}), its sequence {number} of "
                f"{len(packed)} · {used} of {data.layout.seq_length} positions filled "
                f"({used / data.layout.seq_length:.1%}) · {len(fragments)} documents · {counts(fragments)}"
            )
            yield Section(f"Sample {sample}", facts, source, fragments, data.layout.seq_length)

    return write_page(output, str(config_path), about, data.report(), sections())
