"""Sequences keep both limits and are full, each target once; memory stays flat."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data import packing
from megatron_mm.data.packing import pack
from megatron_mm.data.pieces import BLOCK, Limits
from tests.unit.data.documents import MM1, Documents, Placed, corpus, documents, limits_
from tests.unit.data.test_ingest import ROOT


def packed_arrays(source, limits, window, folder, split="train", fraction=0.0):
    totals = pack(folder, source, split, fraction, limits, window)
    arrays = [np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("pieces", "offsets", "images")]
    assert (totals["sequences"], totals["pieces"]) == (len(arrays[2]), len(arrays[0]))
    assert totals["images"] == arrays[2].sum()
    return totals, *arrays


@settings(max_examples=300)
@given(docs=documents(), limits=limits_, window=st.integers(1, 40))
def test_every_target_once_and_both_limits_kept(tmp_path_factory, docs, limits, window):
    folder = tmp_path_factory.mktemp("packed")
    totals, pieces, offsets, images = packed_arrays(Placed(docs), limits, window, folder)
    assert offsets[0] == 0
    assert offsets[-1] == len(pieces)
    seen = {d: [] for d in range(len(docs))}
    used = 0
    for i in range(len(images)):
        rows = pieces[offsets[i] : offsets[i + 1]].tolist()
        assert rows == sorted(rows)
        assert rows
        positions = pictures = 0
        for d, start, end in rows:
            inside = sum(start <= p < end for p in docs[d][1])
            positions += end - start + inside * (limits.tokens_per_image - 1)
            pictures += inside
            seen[d].append((start, end))
        assert positions <= limits.positions
        assert pictures == images[i] <= limits.images
        used += positions
    assert used == totals["positions"]
    for d, (n, places) in enumerate(docs):
        runs = sorted(seen[d])
        # They tile [0, n - 1): each input once, so each target (the token after it) once.
        assert [start for start, _ in runs] + [n - 1] == [0] + [end for _, end in runs]
        whole = n - 1 + len(places) * (limits.tokens_per_image - 1)
        if whole <= limits.positions and len(places) <= limits.images:
            assert len(runs) == 1


@pytest.mark.parametrize("kind", ["mixed", "interleaved", "text"])
def test_sequences_are_full(kind, tmp_path):
    totals, *_ = packed_arrays(corpus(kind, 60_000), MM1, packing.WINDOW, tmp_path)
    assert totals["positions"] / totals["sequences"] / 4096 > 0.99


@pytest.mark.parametrize("words", [(5, 60), (20, 200), (40, 200), (60, 300)])
def test_captions_are_as_full_as_their_images_allow(words, tmp_path):
    """Short captions reach the limit of images first; where both limits bind, both are nearly reached."""
    lengths = np.random.default_rng(0).integers(*words, 60_000) + 3
    totals, *_ = packed_arrays(Documents(lengths, np.ones(60_000)), MM1, packing.WINDOW, tmp_path)
    needed = max(totals["positions"] / MM1.positions, totals["images"] / MM1.images)
    assert needed / totals["sequences"] > 0.99


def peaks(tmp_path: Path, sources: str) -> list[int]:
    """Bytes that a process has held at most after packing each of some sources, and at first."""
    script = (
        "import resource, sys; from pathlib import Path; import numpy as np;"
        "from megatron_mm.data.packing import pack; from tests.unit.data.documents import MM1, Documents;"
        "rng = np.random.default_rng(0);"
        f"sources = {sources};"
        "peak = lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); peak();"
        "[(pack(Path(sys.argv[1]), source, 'train', 0.001, MM1), peak()) for source in sources]"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_memory_does_not_grow_with_documents(tmp_path):
    # Of text of few lengths, which is quick to fit: what matters here is the number of documents.
    lengths = "Documents(rng.integers(800, 1000, {n}), np.zeros({n}))"
    first, few, many = peaks(tmp_path, f"[{lengths.format(n=200_000)}, {lengths.format(n=2_000_000)}]")
    assert few - first < 100e6
    assert many - few < 10e6


def test_long_documents_do_not_fill_memory(tmp_path):
    """Books: each is hundreds of pieces."""
    first, peak = peaks(tmp_path, f"[Documents(np.full({BLOCK}, 400_000), np.zeros({BLOCK}))]")
    assert peak - first < 400e6


def test_neighbours_are_parted(tmp_path):
    """Documents of one length: a sequence is no run of them, as related documents often stand one after the other."""
    source = Documents(np.full(2000, 33), np.zeros(2000))
    pack(tmp_path, source, "train", 0.0, Limits(256, 4, 16))
    pieces, offsets = (np.load(tmp_path / f"{name}.npy") for name in ("pieces", "offsets"))
    spans = [np.ptp(pieces["document"][a:b].astype(np.int64)) for a, b in pairwise(offsets)]
    assert np.diff(offsets).tolist() == [8] * 250
    assert np.median(spans) > 1000


def test_progress_is_shown_when_it_takes_long(tmp_path, capfd, monkeypatch):
    source = Documents(np.full(40_000, 100), np.zeros(40_000))
    pack(tmp_path, source, "train", 0.0, MM1, window=1000, name="words")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(packing, "_QUIET", 0.0)
    pack(tmp_path, source, "train", 0.0, MM1, window=1000, name="words")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("packing words: ")
    assert "documents (" in line
    assert line.endswith("min left")
