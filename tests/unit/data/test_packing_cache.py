"""The cache is what a fresh packing gives, by many processes, and its damage is told."""

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mm.data import packing
from megatron_mm.data.packing import PackedSource
from megatron_mm.data.source import Source
from megatron_mm.errors import UserError
from tests.unit.data.documents import LAYOUT
from tests.unit.data.test_ingest import ROOT


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
        "import sys; from pathlib import Path; from tests.unit.data.test_packing_cache import opened;"
        "print(len(opened(Path(sys.argv[1]), Path(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", script, sources, tmp_path]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lengths = {process.communicate(timeout=300)[0] for process in running}
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
        "import resource, signal, sys; from pathlib import Path; from tests.unit.data.test_packing_cache import opened;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200));"
        "opened(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, sources, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
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
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    packed = PackedSource(tmp_path, LAYOUT)
    assert (len(packed), packed.images, packed.fill) == (10_000_000, 7, 1.0)
    assert packed.pieces(5_000_000) == []
    assert time.process_time() - started < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
