"""Packing at size: time, memory, and how full sequences are beside other ways to fill them.

MM1's shape: 4096 positions, at most 16 images of 144 tokens. Lengths and image places alone are read, so a synthetic
corpus (benchmarks/corpora.py) is as good as a real one.

    ours                largest piece that leaves room for the sequence's images, windows of 65,536 pieces
    first fit           each document into the first sequence of the window that holds it
    first fit, sorted   the same, largest documents first
    in order            a sequence is closed when the next document does not fit
    cut anywhere        all documents joined and cut where a limit is reached, as GPT-style training does: full of
                        positions, but documents that would have fitted are cut in two

Documents that do not fit into a sequence are cut alike for all of them. "Best possible" is what the two limits allow:
the positions of all pieces over those of as many sequences as max(positions / 4096, images / 16).
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Stopwatch, finish, in_child, options, table
from corpora import MM1, Corpus, Kind, corpus, mapped_corpus

from megatron_mm.data.fit import fit
from megatron_mm.data.packing import WINDOW, pack
from megatron_mm.data.pieces import cut, windows

DOCUMENTS, COMPARED = 10_000_000, 4 * WINDOW  # packed by us alone, and by every way


class Filled(NamedTuple):
    fill: float
    cut: float  # share of the documents that would have fitted and were cut


def pack_mapped(folder: Path) -> dict[str, Any]:
    """In a child process: pack the corpus of a folder into it."""
    with Stopwatch() as watch:
        totals = pack(folder, mapped_corpus(folder), "train", 0.0, MM1, name="the mixed corpus")
    return totals | {"seconds": watch.wall, "cpu_seconds": watch.cpu}


def first_fit(positions: np.ndarray, images: np.ndarray, order: np.ndarray) -> int:
    room = np.full(len(positions), MM1.positions)
    room_images = np.full(len(positions), MM1.images)
    count = first = 0  # sequences before `first` are full
    for i in order.tolist():
        size, pictures = positions[i], images[i]
        there = slice(first, count + 1)  # the last one is fresh, so one is always found
        place = first + int(np.argmax((room[there] >= size) & (room_images[there] >= pictures)))
        room[place] -= size
        room_images[place] -= pictures
        count = max(count, place + 1)
        while first < count and not room[first]:
            first += 1
    return count


def in_order(positions: np.ndarray, images: np.ndarray) -> int:
    count = room = room_images = 0
    for size, pictures in zip(positions.tolist(), images.tolist(), strict=True):
        if size > room or pictures > room_images:
            count, room, room_images = count + 1, MM1.positions, MM1.images
        room, room_images = room - size, room_images - pictures
    return count


def cut_anywhere(source: Corpus) -> Filled:
    lengths, starts = source.lengths.astype(np.int64) - 1, source.image_starts
    firsts = np.cumsum(lengths) - lengths
    places = [firsts[d] + source.meta(d)["offset"] for d in range(len(source)) if starts[d] < starts[d + 1]]
    joined = np.concatenate(places).tolist() if places else []
    runs = np.array(cut(int(lengths.sum()) + 1, joined, MM1))
    inside = np.setdiff1d(runs[1:, 0], firsts)
    cut_documents = np.unique(np.searchsorted(firsts, inside, side="right") - 1)
    images = np.diff(starts)
    extra = MM1.tokens_per_image - 1
    fitting = (lengths + images * extra <= MM1.positions) & (images <= MM1.images)
    positions = int(lengths.sum()) + int(starts[-1]) * extra
    return Filled(positions / len(runs) / MM1.positions, fitting[cut_documents].sum() / len(source))


def compare(source: Corpus) -> dict[str, Filled]:
    counts = dict.fromkeys(("ours", "first fit", "first fit, sorted", "in order"), 0)
    total = total_images = 0
    for pieces, _ in windows(source, "train", 0.0, MM1, WINDOW):
        positions, images = pieces.positions, pieces.images
        largest = np.argsort(-np.maximum(positions * MM1.images, images * MM1.positions), kind="stable")
        counts["ours"] += fit(positions, images, MM1)[1]
        counts["first fit"] += first_fit(positions, images, np.arange(len(positions)))
        counts["first fit, sorted"] += first_fit(positions, images, largest)
        counts["in order"] += in_order(positions, images)
        total, total_images = total + int(positions.sum()), total_images + int(images.sum())
    found = {name: Filled(total / count / MM1.positions, 0.0) for name, count in counts.items()}
    needed = max(total / MM1.positions, total_images / MM1.images)
    return found | {"cut anywhere": cut_anywhere(source), "best possible": Filled(total / needed / MM1.positions, 0.0)}


def main() -> None:
    given = options(__doc__ or "", rounds=1)
    documents, compared = (20_000, 2_000) if given.smoke else (DOCUMENTS, COMPARED)
    with tempfile.TemporaryDirectory() as folder:
        corpus("mixed", documents, Path(folder))
        print(f"packing {documents:,} documents in one process", flush=True)
        runs = [in_child(pack_mapped, Path(folder)) for _ in range(given.rounds)]
    totals, peak = min((run[0] for run in runs), key=lambda run: run["seconds"]), max(run[1] for run in runs)
    fill = totals["positions"] / totals["sequences"] / MM1.positions
    print(
        f"{totals['pieces']:,} pieces in {totals['sequences']:,} sequences in {totals['seconds']:.1f} s "
        f"({totals['cpu_seconds']:.1f} s of CPU), {fill:.2%} filled, {peak / 1e9:.2f} GB at most"
    )
    kinds: list[Kind] = ["caption", "interleaved", "text", "mixed"]
    found = {kind: compare(corpus(kind, compared)) for kind in kinds}
    print(f"\nfilled, of {compared:,} documents each (in brackets: documents cut that would have fitted)")
    table(
        ["", *kinds],
        [
            [way, *(f"{f.fill:.2%}" + (f" ({f.cut:.1%})" if f.cut else "") for f in (found[k][way] for k in kinds))]
            for way in found["mixed"]
        ],
    )
    usual = found["mixed"]["first fit"].fill
    finish(
        "packing",
        (100 * fill, f"% filled, {totals['seconds']:.1f} s, {peak / 1e9:.2f} GB"),
        (100 * usual, "% by first fit"),
        f"at least 99% filled, {DOCUMENTS:,} documents in 60 s and 2 GB on one core",
        fill >= 0.99 and totals["seconds"] <= 60 and peak < 2e9,
        {
            "documents": documents, "totals": totals, "peak_bytes": peak, "fill": fill, "compared_documents": compared,
            "compared": {kind: {way: f._asdict() for way, f in ways.items()} for kind, ways in found.items()},
        },
        [],
        given.smoke,
    )  # fmt: skip


if __name__ == "__main__":
    main()
