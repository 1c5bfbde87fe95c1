"""Pieces tile documents, sequences keep both limits, memory stays flat, and the cache is what a fresh packing gives."""

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.config import SequenceLayout
from megatron_mm.data import packing
from megatron_mm.data.fit import fit
from megatron_mm.data.packing import PackedSource, pack
from megatron_mm.data.pieces import BLOCK, Limits, cut, documents_of, windows
from megatron_mm.data.source import Source
from megatron_mm.errors import UserError
from tests.unit.data.test_ingest import ROOT

LAYOUT = SequenceLayout(
    seq_length=64, max_images=5, tokens_per_image=4, image_size=16, image_token_id=4, bos_token_id=2, eos_token_id=3,
    pad_token_id=0,
)  # fmt: skip
MM1 = Limits(positions=4096, images=16, tokens_per_image=144)


class Documents:
    """As the packer sees them: lengths and image places, which are spread evenly over the document."""

    def __init__(self, lengths: np.ndarray, images: np.ndarray) -> None:
        self.lengths = lengths.astype(np.int32)
        self.image_starts = np.concatenate([[0], np.cumsum(images, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.lengths)

    def meta(self, document: int) -> dict[str, np.ndarray]:
        count = int(self.image_starts[document + 1] - self.image_starts[document])
        return {"offset": 1 + np.arange(count) * ((int(self.lengths[document]) - 2) // count)}


class Placed(Documents):
    """With image places as given."""

    def __init__(self, documents: list[tuple[int, list[int]]]) -> None:
        super().__init__(np.array([n for n, _ in documents]), np.array([len(places) for _, places in documents]))
        self._places = [np.array(places, dtype="<u4") for _, places in documents]

    def meta(self, document: int) -> dict[str, np.ndarray]:
        return {"offset": self._places[document]}


def corpus(kind: str, n: int, seed: int = 0) -> Documents:
    """Of MM1's three kinds, or all of them in its shares."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(["caption", "interleaved", "text"], n, p=[0.45, 0.45, 0.1])
    is_caption, is_text = (
        (kinds == "caption", kinds == "text") if kind == "mixed" else (kind == "caption", kind == "text")
    )
    words = np.where(is_caption, rng.integers(20, 201, n), rng.lognormal(6.2, 1, n).astype(np.int64) + 1)
    images = np.where(is_caption, 1, np.where(is_text, 0, rng.geometric(1 / 3, n)))
    return Documents(2 + words + images, images)


def packed_arrays(source, limits, window, folder, split="train", fraction=0.0):
    totals = pack(folder, source, split, fraction, limits, window)
    arrays = [np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("pieces", "offsets", "images")]
    assert (totals["sequences"], totals["pieces"]) == (len(arrays[2]), len(arrays[0]))
    assert totals["images"] == arrays[2].sum()
    return totals, *arrays


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


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=100, deadline=None)
@given(
    docs=documents(),
    limits=limits_,
    size=st.integers(1, 40),
    block=st.integers(1, 12),
    fraction=st.sampled_from([0, 0.3]),
)
def test_windows_are_the_same_pieces_whatever_is_read_at_once(docs, limits, size, block, fraction):
    source = Placed(docs)
    whole = [
        tuple(row) for pieces, _ in windows(source, "train", fraction, limits, 10**6) for row in pieces.rows.tolist()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_mm.data.pieces.BLOCK", block)
        parts = list(windows(source, "train", fraction, limits, size))
    assert [tuple(row) for pieces, _ in parts for row in pieces.rows.tolist()] == whole
    assert all(len(pieces) == size for pieces, _ in parts[:-1])
    assert all(0 < read <= len(docs) for _, read in parts)
    expected = [
        (d, start, end)
        for d in documents_of("train", range(len(docs)), fraction).tolist()
        for start, end in naive_pieces(*docs[d], limits)
    ]
    assert whole == expected


def naive_pieces(n: int, places: list[int], limits: Limits) -> list[tuple[int, int]]:
    if n - 1 + len(places) * (limits.tokens_per_image - 1) <= limits.positions and len(places) <= limits.images:
        return [(0, n - 1)]
    return naive_cut(n, places, limits)


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


def naive_fit(pieces: list[tuple[int, int]], limits: Limits) -> list[int]:
    """Piece by piece, over all that are left: what fit's docstring says, with nothing sorted and nothing counted."""
    sequence, step = [-1] * len(pieces), 0
    left = dict(enumerate(pieces))
    number = 0
    while left:
        positions, images = map(sum, zip(*left.values(), strict=True))
        needed = max(-(-positions // limits.positions), -(-images // limits.images))
        share = -(-images // needed)
        cheapest = min((min(p for p, n in left.values() if n == m) // m + 1 for _, m in left.values() if m), default=0)
        mean = positions // images if images else 0
        price = cheapest + max(0, mean - cheapest) * step // 64
        room, room_images, reserved, first = limits.positions, limits.images, True, True
        while True:
            reserve = price if reserved and not first else 0
            fitting = [
                (-p, m, i) for i, (p, m) in left.items() if p <= room - max(0, share - m) * reserve and m <= room_images
            ]
            if fitting:
                size, m, i = min(fitting)
                sequence[i] = number
                del left[i]
                room, room_images, share, first = room + size, room_images - m, share - m, False
            elif reserved and not first:
                reserved = False
            else:
                break
        step = min(64, step + 1) if share > 0 else max(0, step - 1)
        number += 1
    return sequence


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=60))
def test_fit_is_the_naive_one(items):
    limits = Limits(positions=40, images=5, tokens_per_image=1)
    sequence, count = fit(*np.array(items).T, limits)
    assert sequence.tolist() == naive_fit(items, limits)
    assert count == max(sequence) + 1


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
        "from tests.unit.data.test_packing import MM1, Documents, pack;"
        "rng = np.random.default_rng(0);"
        f"sources = {sources};"
        "peak = lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); peak();"
        "[(pack(Path(sys.argv[1]), source, 'train', 0.001, MM1), peak()) for source in sources]"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=240
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


def test_split_by_document_number():
    train, held_out = (documents_of(split, range(20_000), 0.05) for split in ("train", "validation"))
    assert sorted([*train, *held_out]) == list(range(20_000))
    assert abs(len(held_out) - 1000) < 100
    parts = [documents_of("validation", range(i, i + 6000), 0.05) for i in range(0, 30_000, 6000)]
    longer = np.concatenate(parts)
    assert longer[longer < 20_000].tolist() == held_out.tolist()
    assert documents_of("validation", range(100), 0.0).size == 0


def opened(sources: Path, cache, layout=LAYOUT, split="train", fraction=0.15):
    return PackedSource.open(Source(sources / "pages"), split, layout, fraction, cache)


def test_cache(sources, tmp_path):
    first = opened(sources, tmp_path)
    files = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.glob("*/*.npy")}
    assert len(files) == 3
    key = json.loads(next(tmp_path.glob("*/packing.json")).read_text())["key"]
    assert key["source"] == Source(sources / "pages").digest
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


@pytest.mark.parametrize("name", ["pieces.npy", "offsets.npy", "images.npy", "packing.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "short", "pickle"])
def test_damaged_cache_is_told(sources, tmp_path, name, damage):
    opened(sources, tmp_path)
    (path,) = tmp_path.glob(f"*/{name}")
    if damage == "gone":
        path.unlink()
    elif damage == "pickle":
        with path.open("wb") as file:
            np.save(file, np.array([{}], dtype=object), allow_pickle=True)
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


def test_full_disk(sources, tmp_path):
    """A limit on the size of files stands in for it."""
    script = (
        "import resource, signal, sys; from pathlib import Path; from tests.unit.data.test_packing import opened;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200));"
        "opened(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, sources, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "UserError" in done.stderr
    assert "cannot write the packing" in done.stderr
    assert not list(tmp_path.iterdir())


def test_opening_reads_nothing_but_totals(tmp_path):
    """Ten million sequences: a sparse packing, of which no page is there."""
    totals = {"sequences": 10_000_000, "pieces": 40_000_000, "images": 7, "positions": 640_000_000}
    for name, rows, dtype in (
        ("pieces", totals["pieces"], packing.PIECE), ("offsets", totals["sequences"] + 1, "<i8"),
        ("images", totals["sequences"], "<i4"),
    ):  # fmt: skip
        array = np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", dtype, (rows,))
        if name == "offsets":
            array[-1] = totals["pieces"]
    (tmp_path / "packing.json").write_text(json.dumps({"totals": totals}))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    packed = PackedSource(tmp_path, LAYOUT)
    assert (len(packed), packed.images, packed.fill) == (10_000_000, 7, 1.0)
    assert packed.pieces(5_000_000) == []
    assert time.perf_counter() - started < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


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
