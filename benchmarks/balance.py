"""How far the number of images differs over the ranks that work at the same time, before and after dealing.

Ranks wait for the one with the most images: at every microbatch where something ties them together (pipeline stages,
experts), and at the end of the batch in any case. Slowest / mean is the most images of a rank over the mean of all
ranks, summed over all steps (or batches) before the division: 1 is perfect, 2 means that half of the encoders' time is
waiting.

    before   sample i of the batch goes to microbatch i div size of one, and these to the ranks in turn, as
             data-parallel samplers do
    after    megatron_mm.data.batch: `deal`, then `back_and_forth`: the same batch, other places

Two mixes, each packed and mixed as a run would:

    quickstart    examples/quickstart: its documents, tokenizer and limits (320 positions, 12 images)
    long-tailed   benchmarks/corpora.py: MM1's three kinds, 45/45/10, 4096 positions, 16 images

A batch has 4 microbatches a rank, and 512 sequences (MM1's batch) where those are more. With microbatches of one
sequence the best that any order can do is to sort, so what is left after dealing is what the sequences differ by.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import ROOT, finish, options, table
from corpora import MM1, Corpus, corpus

from megatron_mm.data.batch import back_and_forth, deal
from megatron_mm.data.mixture import Mixture
from megatron_mm.data.packing import pack
from megatron_mm.data.pieces import Limits
from megatron_mm.data.tokenizer import open_tokenizer, train_tokenizer

RANKS = (8, 64, 512)
BATCH = 512  # sequences
WEIGHTS = (45.0, 45.0, 10.0)  # captions, interleaved, text
VOCABULARY = 512  # the quickstart's


class Sequences(NamedTuple):
    """Images of each sequence of each source."""

    images: list[np.ndarray]

    def batches(self, size: int, count: int) -> np.ndarray:
        """Images of each sample of the first batches, [count, size]."""
        source, sequence = Mixture([len(i) for i in self.images], WEIGHTS, seed=0).locate_all(np.arange(count * size))
        found = np.empty(count * size, dtype=np.int64)
        for number, images in enumerate(self.images):
            found[source == number] = images[sequence[source == number]]
        return found.reshape(count, size)


def packed(corpora: list[Corpus], limits: Limits) -> Sequences:
    with tempfile.TemporaryDirectory() as name:
        folder, images = Path(name), []
        for documents in corpora:
            pack(folder, documents, "train", 0.0, limits, name="a mix")
            images.append(np.load(folder / "images.npy"))
    return Sequences(images)


def quickstart(pictures: int | None) -> Sequences:
    """Its documents, without their pictures' bytes. Args: pictures: of easy-VQA; None: all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, str(ROOT / "examples/quickstart/prepare.py"), "--output", str(folder)]
        subprocess.run(
            [*command, *(["--limit", str(pictures)] if pictures else [])], check=True, stdout=subprocess.DEVNULL
        )
        records = {
            kind: [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
            for kind in ("captions", "interleaved", "text")
        }
        texts = {kind: [_texts(record) for record in found] for kind, found in records.items()}
        lines = (
            line for found in texts.values() for parts in found for text in parts for line in text.splitlines(True)
        )
        train_tokenizer(lines, folder / "tokenizer.model", VOCABULARY, seed=0)
        tokenizer = open_tokenizer(folder / "tokenizer.model")
    corpora = []
    for kind, found in texts.items():
        images = np.array(
            [len(r.get("content", [])) // 2 if kind == "interleaved" else kind == "captions" for r in records[kind]]
        )
        tokens = np.array([sum(len(tokenizer.encode(text)) for text in parts) for parts in found])
        corpora.append(Corpus((tokens + images + 2).astype("<i4"), np.concatenate([[0], np.cumsum(images)])))
    return packed(corpora, Limits(positions=320, images=12, tokens_per_image=16))


def _texts(record: dict) -> list[str]:
    return [part["text"] for part in record["content"] if "text" in part] if "content" in record else [record["text"]]


class Unevenness(NamedTuple):
    """Slowest / mean."""

    steps: float  # over microbatch steps
    batches: float  # over whole batches


def unevenness(batches: np.ndarray, ranks: int, micro: int, dealt: bool) -> Unevenness:
    """Args: micro: sequences of a microbatch."""
    most = np.zeros(2)
    for images in batches:
        # Samples of each step of microbatches, rank and place in the microbatch.
        in_order = np.arange(len(images)).reshape(-1, ranks, micro)
        places = back_and_forth(deal(images, len(images) // micro), ranks) if dealt else in_order
        of_rank = images[places].sum(2)
        most += of_rank.max(1).sum() * ranks, of_rank.sum(0).max() * ranks
    return Unevenness(*(most / batches.sum()).tolist())


def main() -> None:
    given = options(__doc__ or "", rounds=1)
    documents, count = (5_000, 1) if given.smoke else (300_000, 100)
    kinds = [corpus(kind, documents) for kind in ("caption", "interleaved", "text")]
    mixes = {"quickstart": quickstart(300 if given.smoke else None), "long-tailed": packed(kinds, MM1)}
    found = {}
    for (mix, sequences), ranks, micro in itertools.product(mixes.items(), RANKS, (1, 4)):
        batches = sequences.batches(max(BATCH, 4 * micro * ranks), count)
        pair = [unevenness(batches, ranks, micro, dealt) for dealt in (False, True)]
        found[f"{mix}, {ranks} ranks, microbatches of {micro}"] = dict(zip(("before", "after"), pair, strict=True))
    print("slowest / mean")
    table(
        ["mix", "a step: before", "after", "a batch: before", "after"],
        [
            [
                name,
                *(f"{getattr(pair[when], what):.3f}" for what in ("steps", "batches") for when in ("before", "after")),
            ]
            for name, pair in found.items()
        ],
    )
    shown = found["long-tailed, 64 ranks, microbatches of 4"]
    finish(
        "balance",
        (shown["after"].steps, "slowest / mean, dealt"),
        (shown["before"].steps, "in order; long-tailed mix, 64 ranks, microbatches of 4"),
        "below 1 in every case",
        all(pair["after"].steps < pair["before"].steps for pair in found.values()),
        {"slowest_over_mean": {n: {when: u._asdict() for when, u in pair.items()} for n, pair in found.items()}},
        [],
        given.smoke,
    )


if __name__ == "__main__":
    main()
