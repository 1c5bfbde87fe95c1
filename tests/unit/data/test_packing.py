"""Pieces tile documents, sequences keep both limits, and the cache is what a fresh packing gives."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.config import SequenceLayout
from megatron_mm.data.packing import Limits, PackedSource, best_fit, cut, documents_of, pack
from megatron_mm.data.source import Source
from megatron_mm.errors import UserError
from tests.unit.data.test_ingest import ROOT

LAYOUT = SequenceLayout(
    seq_length=64, max_images=5, tokens_per_image=4, image_size=16, image_token_id=4, bos_token_id=2, eos_token_id=3,
    pad_token_id=0,
)  # fmt: skip


class Lengths:
    """Documents as the packer sees them: lengths and image places."""

    def __init__(self, documents: list[tuple[int, list[int]]]) -> None:
        self.lengths = np.array([n for n, _ in documents], dtype=np.int32)
        self.image_counts = np.array([len(places) for _, places in documents], dtype=np.int32)
        self._places = [np.array(places, dtype="<u4") for _, places in documents]

    def meta(self, document: int) -> dict[str, np.ndarray]:
        return {"offset": self._places[document]}


@st.composite
def documents(draw):
    """Lengths and image places: bos is no image, eos is none; runs of images occur."""
    found = []
    for _ in range(draw(st.integers(1, 30))):
        n = draw(st.integers(2, 90))
        places = draw(st.lists(st.integers(1, n - 2), unique=True, max_size=25)) if n > 2 else []
        found.append((n, sorted(places)))
    return found


limits_ = st.builds(Limits, positions=st.integers(12, 80), images=st.integers(1, 6), tokens_per_image=st.integers(1, 9))


@settings(max_examples=400, deadline=None)
@given(documents(), limits_, st.integers(1, 40))
def test_every_target_once_and_both_limits_kept(docs, limits, window):
    pieces, offsets, images = pack(Lengths(docs), np.arange(len(docs)), limits, window)
    assert offsets[0] == 0
    assert offsets[-1] == len(pieces)
    seen = {d: [] for d in range(len(docs))}
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
    for d, (n, places) in enumerate(docs):
        runs = sorted(seen[d])
        # They tile [0, n - 1): each input once, so each target (the token after it) once.
        assert [start for start, _ in runs] + [n - 1] == [0] + [end for _, end in runs]
        whole = n - 1 + len(places) * (limits.tokens_per_image - 1)
        if whole <= limits.positions and len(places) <= limits.images:
            assert len(runs) == 1


def naive_cut(n: int, places: list[int], limits: Limits) -> list[tuple[int, int]]:
    """Token by token: as far as both limits allow, then back over pictures that would part from their text."""
    pieces, start = [], 0
    while start < n - 1:
        end, positions, pictures = start, 0, 0
        while end < n - 1:
            is_image = end in places
            positions += limits.tokens_per_image if is_image else 1
            pictures += is_image
            if positions > limits.positions or pictures > limits.images:
                break
            end += 1
        back = end
        while end < n - 1 and back > start and back - 1 in places:
            back -= 1
        end = back if back > start + 1 else end
        pieces.append((start, end))
        start = end
    return pieces


@settings(max_examples=400, deadline=None)
@given(documents(), limits_)
def test_cuts_are_the_naive_ones(docs, limits):
    for n, places in docs:
        assert cut(n, places, limits) == naive_cut(n, places, limits)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=60))
def test_best_fit_is_the_naive_one(items):
    """Against a search of all open sequences: the tightest that holds the piece, largest piece first."""
    limits = Limits(positions=40, images=5, tokens_per_image=1)
    cost, images = np.array(items).T
    sequence, count = best_fit(cost, images, limits)
    order = sorted(range(len(items)), key=lambda i: (-max(items[i][0] * 5, items[i][1] * 40), i))
    open_: list[list[int]] = []  # positions and images left
    for i in order:
        size, pictures = items[i]
        fitting = [left for left, m in open_ if left >= size and m >= pictures]
        own = sequence[i]
        if fitting:
            assert open_[own][0] == min(fitting)
        else:
            assert own == len(open_)
            open_.append([40, 5])
        open_[own][0] -= size
        open_[own][1] -= pictures
        assert min(open_[own]) >= 0
    assert count == len(open_)


def test_fill_is_good():
    rng = np.random.default_rng(0)
    docs = [(int(n), []) for n in np.clip(rng.lognormal(5, 1, 4000), 2, 3000)]
    limits = Limits(1024, 16, 144)
    pieces, _, images = pack(Lengths(docs), np.arange(len(docs)), limits)
    assert (pieces["end"] - pieces["start"]).sum() / (len(images) * 1024) > 0.99


def test_split_by_document_number():
    train, held_out = documents_of("train", 20_000, 0.05), documents_of("validation", 20_000, 0.05)
    assert sorted([*train, *held_out]) == list(range(20_000))
    assert abs(len(held_out) - 1000) < 100
    longer = documents_of("validation", 30_000, 0.05)
    assert longer[longer < 20_000].tolist() == held_out.tolist()
    assert documents_of("validation", 100, 0.0).size == 0


def opened(sources, cache, layout=LAYOUT, split="train", fraction=0.15):
    return PackedSource.open(Source(sources / "pages"), split, layout, fraction, cache)


def test_cache(sources, tmp_path):
    first = opened(sources, tmp_path)
    files = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.glob("*/*.npy")}
    assert len(files) == 3
    again = opened(sources, tmp_path)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.glob("*/*.npy")} == files
    assert [first.pieces(i) for i in range(len(first))] == [again.pieces(i) for i in range(len(again))]
    assert all(first.image_count(i) <= 5 for i in range(len(first)))
    assert 0.8 < first.fill <= 1
    # Anything else it depends on is another packing.
    for change in ({"seq_length": 65}, {"max_images": 4}, {"tokens_per_image": 5}):
        opened(sources, tmp_path, replace(LAYOUT, **change))
    opened(sources, tmp_path, fraction=0.2)
    opened(sources, tmp_path, split="validation")
    assert len(list(tmp_path.iterdir())) == 6


def test_train_and_validation_share_no_document(sources, tmp_path):
    seen = [
        {piece.document for i in range(len(packed)) for piece in packed.pieces(i)}
        for packed in (opened(sources, tmp_path, split=split) for split in ("train", "validation"))
    ]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(90))
    assert seen[1]


def test_many_processes_at_once(sources, tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.unit.data.test_packing import opened;"
        "print(len(opened(Path(sys.argv[1]), Path(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", script, sources, tmp_path]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lengths = {process.communicate(timeout=120)[0] for process in running}
    assert lengths == {f"{len(opened(sources, tmp_path))}\n"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["pieces", "offsets", "images"])
@pytest.mark.parametrize("damage", ["gone", "empty", "short", "pickle"])
def test_damaged_cache_is_told(sources, tmp_path, name, damage):
    opened(sources, tmp_path)
    (path,) = tmp_path.glob(f"*/{name}.npy")
    if damage == "gone":
        path.unlink()
    elif damage == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -8])
    with pytest.raises(UserError, match="the packing is damaged"):
        opened(sources, tmp_path)


def test_empty_split_can_be_opened(sources, tmp_path):
    packed = opened(sources, tmp_path, split="validation", fraction=0.0)
    assert (len(packed), packed.images, packed.fill) == (0, 0, 0.0)


def test_cache_that_cannot_be_written(sources):
    with pytest.raises(UserError, match=r"data.cache_dir"):
        opened(sources, "/dev/null/cache")
