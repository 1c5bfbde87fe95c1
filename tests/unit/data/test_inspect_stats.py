"""`inspect_data.py stats`, `verify` and `merge`: figures as text, plots as a PNG, the whole as a command."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mm.data.inspect.plots import _edges, plot
from megatron_mm.data.inspect.progress import ByteProgress
from megatron_mm.data.inspect.stats import stats
from megatron_mm.data.source import Source, verify_source
from megatron_mm.errors import UserError

ROOT = Path(__file__).parents[3]


def tool(*arguments: str | Path, code: int = 0) -> str:
    command = [sys.executable, "tools/inspect_data.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_figures_are_the_sources(sources: Path) -> None:
    source = Source(sources / "pages")
    text = stats(source)
    assert f"{len(source)} documents, {source.image_counts.sum()} images, {source.lengths.sum():,} tokens" in text
    assert f"tokens a document: mean {source.lengths.mean():,.1f}," in text
    assert f"largest {source.image_counts.max()}" in text
    formats = re.findall(r"(\d+) (?:JPEG|PNG|WEBP)", text)
    assert len(formats) == 3
    assert sum(map(int, formats)) == source.image_counts.sum()
    assert "images a document" not in stats(Source(sources / "words"))


@pytest.mark.parametrize("names", [["captions", "pages", "words"], ["pages"], ["words"]])
def test_plots(sources: Path, tmp_path: Path, names: list[str]) -> None:
    output = tmp_path / "new" / "plots.png"
    plot([Source(sources / name) for name in names], output)
    with Image.open(output) as image:
        assert image.format == "PNG"
        image.load()
    pixels = np.asarray(image.convert("RGB")).astype(int)
    bars = (np.abs(pixels - (0x2F, 0x6D, 0xB3)).sum(axis=2) < 12).sum()
    assert bars > 2000, "no histogram is drawn"
    assert [path.name for path in output.parent.iterdir()] == ["plots.png"]
    if len(names) == 3:  # side by side: each column has its own
        columns = np.array_split((np.abs(pixels - (0x2F, 0x6D, 0xB3)).sum(axis=2) < 12), 3, axis=1)
        assert all(column.sum() > 500 for column in columns)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 3), (64, 64), (2, 100), (1, 1e6), (7, 131072), (500, 501)])
def test_every_value_falls_into_a_bin(low: float, high: float, log: bool, whole: bool) -> None:
    edges = _edges(low, high, log, whole)
    assert np.all(np.diff(edges) > 0)
    values = np.unique(np.geomspace(low, high, 200).round() if whole else np.geomspace(low, high, 200).clip(low, high))
    assert np.histogram(values, edges)[0].sum() == len(values)
    assert not log or edges[0] > 0
    if whole:
        assert not np.any(edges == edges.round())


def test_a_plot_that_cannot_be_written(sources: Path) -> None:
    with pytest.raises(UserError, match="cannot write the plot"):
        plot([Source(sources / "words")], Path("/proc/nowhere/x.png"))


def test_commands(sources: Path, tmp_path: Path) -> None:
    told = tool("stats", sources / "captions", sources / "words", "--plot", tmp_path / "x.png")
    assert f"{sources}/captions: caption" in told
    assert (tmp_path / "x.png").stat().st_size > 10_000
    told = tool("verify", sources / "captions", sources / "pages")
    assert f"{sources}/pages: whole; 90 documents" in told
    assert "stats | verify | show | merge" in tool("--help")
    assert "no such source" in tool("verify", tmp_path / "nothing", code=2)


def test_merge_command(sources: Path, tmp_path: Path) -> None:
    told = tool("merge", sources / "captions", sources / "captions", "--output", tmp_path / "both")
    one, both = Source(sources / "captions"), Source(tmp_path / "both")
    assert f"{2 * len(one)} documents" in told
    assert np.array_equal(both.lengths, np.tile(one.lengths, 2))
    assert both.image_bytes(len(one) + 5) == one.image_bytes(5)
    tool("verify", tmp_path / "both")
    assert "error:" in tool("merge", sources / "captions", sources / "words", "--output", tmp_path / "mix", code=2)


def test_verify_tells_how_far_it_is(sources: Path) -> None:
    for name in ("pages", "words"):
        told: list[tuple[int, int]] = []
        verify_source(sources / name, progress=lambda done, size, told=told: told.append((done, size)))
        done = [one for one, _ in told]
        assert done == sorted(done)
        assert told[-1][0] == told[-1][1]
        assert len({size for _, size in told}) == 1


def test_progress_tells_rate_and_time_left(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress = ByteProgress("x", stream)
    progress(10, 100)
    assert stream.getvalue() == "", "short work says nothing"
    clock[0] += 30
    progress(25_000_000, 100_000_000)
    assert stream.getvalue() == "x: 25.0%, 1 MB/s, 1.5 min left\n"
