"""JSON Lines, plain and compressed: however the file is cut, the same records in the same order."""

import gzip
import itertools
import json
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.ingest import BadRecord, Picture, Record, Text, lines
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.jsonl import JSONLines, read_texts
from megatron_mm.errors import UserError
from tests.unit.data.conftest import write_jsonl
from tests.unit.data.format_checks import HTML, damaged, parts_of, read_all, read_damaged, reason

TEXTS = [f"text {i} é" for i in range(40)]
PLAIN = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jsonl")


def compress(suffix: str, data: bytes) -> bytes:
    return gzip.compress(data, mtime=0) if suffix == ".gz" else zstandard.ZstdCompressor().compress(data)


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from((b"", b"  ", b'{"text": "a b"}', b'{"text": "\xc3\xa9"}', b"[", b"\xff", b"x" * 90))),
    st.sampled_from((b"\n", b"\r\n")),
    st.booleans(),
    st.integers(1, 120),
)
def test_any_cut_gives_the_same_records(folder, rows, end_of_line, last_ended, chunk_bytes):
    data = end_of_line.join(rows) + end_of_line * last_ended
    path = folder / "cut.jsonl"
    path.write_bytes(data)
    form = JSONLines(chunk_bytes)
    chunks = form.chunks([path, path])
    ranges = [(chunk.start, chunk.end) for chunk in chunks]
    tiles = ranges[: len(ranges) // 2]
    assert ranges == tiles * 2
    assert [start for start, _ in tiles] == [0, *(end for _, end in tiles)][: len(tiles)]
    assert sum(chunk.bytes for chunk in chunks) == 2 * len(data)
    records = [record for chunk in chunks for record in form.read(chunk, "text")]
    expected = [(i, row) for i, row in enumerate(data.split(b"\n"), start=1) if row.strip()] * 2
    assert len(records) == len(expected)
    for record, (number, row) in zip(records, expected, strict=True):
        assert isinstance(record, Record) == row.startswith(b"{")
        if isinstance(record, Record):
            assert record.parts == (Text(json.loads(row)["text"]),)
        place = record.id.removeprefix(f"{path}:")
        if place.startswith("byte "):
            assert data[int(place.removeprefix("byte ")) - 1 :].split(b"\n")[0] == row
        else:
            assert int(place) == number


def test_a_file_smaller_than_a_chunk_is_read_by_one_worker_and_numbered_by_lines(folder):
    path = folder / "small.jsonl"
    path.write_bytes(PLAIN)
    assert len(JSONLines().chunks([path])) == 1
    assert [record.id for record in read_all(JSONLines(), [path], "text")][-1] == f"{path}:{len(TEXTS)}"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files(folder, suffix):
    """Also of many members or frames, one cut within a line, and of none but a frame to skip."""
    path = folder / f"packed.jsonl{suffix}"
    written = [compress(suffix, PLAIN), b"".join(compress(suffix, PLAIN[i : i + 50]) for i in range(0, len(PLAIN), 50))]
    if suffix == ".zst":
        skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
        written.append(skipped + written[1] + skipped)
        written.append(zstandard.ZstdCompressor(write_content_size=False).compress(PLAIN))
    for data in written:
        path.write_bytes(data)
        (chunk,) = JSONLines(64).chunks([path])
        records = list(JSONLines(64).read(chunk, "text"))
        assert parts_of(records) == [(Text(text),) for text in TEXTS]
        assert [record.id for record in records] == [f"{path}:{i + 1}" for i in range(len(TEXTS))]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_cut_short_tell_so(folder, suffix):
    path = folder / f"cut.jsonl{suffix}"
    members = [compress(suffix, PLAIN[i : i + 200]) for i in range(0, len(PLAIN), 200)]
    whole = b"".join(members)
    ends = list(itertools.accumulate(len(member) for member in members))
    for cut in range(4, len(whole)):
        path.write_bytes(whole[:cut])
        records = read_damaged(JSONLines(), path, "text")
        assert records is not None
        if cut not in ends:  # there, nothing tells that more should follow
            assert isinstance(records[-1], BadRecord)
            assert records.pop().damaged_input
        good = [record.parts for record in records if isinstance(record, Record)]
        assert good == [(Text(text),) for text in TEXTS[: len(good)]]
        assert len(good) >= 0.8 * len(TEXTS) * max((end for end in ends if end <= cut), default=0) / len(whole) - 1


@settings(max_examples=150)
@given(st.data(), st.sampled_from(("", ".gz", ".zst")))
def test_damaged_files(folder, data, suffix):
    path = folder / f"damaged.jsonl{suffix}"
    path.write_bytes(data.draw(damaged(compress(suffix, PLAIN) if suffix else PLAIN)))
    records = read_damaged(JSONLines(chunk_bytes=300), path, "text")
    if records:
        assert all(record.damaged_input is False for record in records[:-1] if isinstance(record, BadRecord))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.jsonl", None, "cannot read the input"),
        ("x.jsonl.gz", HTML, "no .gz file"),
        ("x.jsonl.zst", b"", "no .zst file"),
        ("x.jsonl.zst", gzip.compress(PLAIN), None),  # what it is counts
    ],
)
def test_wrong_files(tmp_path, name, content, told):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if told:
        with pytest.raises(UserError, match=told):
            JSONLines().chunks([path])
    else:
        assert len(parts_of(read_all(JSONLines(), [path], "text"))) == len(TEXTS)
    with pytest.raises(UserError, match="cannot read the input"):
        JSONLines().chunks([tmp_path])


def test_a_file_that_shrinks_or_goes_away_after_the_build_began(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(PLAIN)
    (chunk,) = JSONLines().chunks([path])
    path.write_bytes(PLAIN[: PLAIN.index(b"\n") + 1])
    first, bad = JSONLines().read(chunk, "text")
    assert isinstance(first, Record)
    assert isinstance(bad, BadRecord)
    assert bad.damaged_input
    assert "truncated" in bad.reason
    path.unlink()
    assert "cannot read the input: No such file" in reason(list(JSONLines().read(chunk, "text")))


def test_without_zstandard_the_extra_is_named_before_any_work(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(compress(".zst", PLAIN))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r"megatron-mm\[ingest\]"):
        JSONLines().chunks([path])


def test_a_line_too_long_is_one_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(lines, "_BLOCK", 16)
    fits, long = '{"text": "%s"}\n' % ("a" * 37), '{"text": "%s"}\n' % ("b" * 500)
    assert len(fits) == 50
    path = tmp_path / "x.jsonl"
    for text in (fits + long + fits, fits + long, fits + long.strip(), long * 2 + fits):
        path.write_text(text)
        records = read_all(JSONLines(), [path], "text")
        bad = [number for number, line in enumerate(text.splitlines(), start=1) if "b" in line]
        assert [record.id for record in records if isinstance(record, BadRecord)] == [f"{path}:{i}" for i in bad]
        assert len(records) == len(text.splitlines())
        assert all("line too long" in record.reason for record in records if isinstance(record, BadRecord))


def test_files_that_name_pictures_elsewhere_are_cut_as_if_they_held_them(tmp_path):
    rows = [{"image": f"{i}.jpg", "text": "a"} for i in range(50)]
    rows += [{"content": [{"image": {"path": "a"}}, {"text": "b"}]} for i in range(50)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    chunks = JSONLines(10 * PICTURE_BYTES).chunks([path])
    assert 9 <= len(chunks) <= 12
    assert sum(chunk.bytes for chunk in chunks) == pytest.approx(100 * PICTURE_BYTES + path.stat().st_size, rel=1e-3)
    inside = write_jsonl(tmp_path / "y.jsonl", [{"image": {"base64": "YQ=="}, "text": "a"}, [], {"content": 3}])
    assert [chunk.bytes for chunk in JSONLines().chunks([inside])] == [inside.stat().st_size]


@pytest.mark.parametrize(
    ("row", "chunks"),
    [
        ({"text": "a" * 100}, 20),
        ({"content": [{"text": "a" * 100}]}, 20),
        ({"image": {"base64": "YWFh" * 20}, "text": "a"}, 5),
        ({"content": [{"text": "a"}, {"image": {"base64": "YWFh" * 20}}]}, 5),
    ],
)
def test_text_alone_is_cut_finer(tmp_path, row, chunks):
    path = write_jsonl(tmp_path / "x.jsonl", [row] * 1000)
    size = path.stat().st_size
    found = [chunk.end - chunk.start for chunk in JSONLines(size // 5 + 1).chunks([path])]
    assert sum(found) == size
    assert max(found) == pytest.approx(size / chunks, rel=0.05)


def test_urls_of_pictures_are_kept_for_filters(tmp_path):
    content = [{"image": {"path": "a.jpg", "url": "https://x/a.jpg"}}, {"image": {"base64": "YQ==", "url": 3}}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"content": [*content, {"text": "a"}]}])
    (parts,) = parts_of(read_all(JSONLines(), [path], "interleaved"))
    assert parts == (Picture(tmp_path / "a.jpg", "https://x/a.jpg"), Picture(b"a"), Text("a"))


def test_texts_for_the_tokenizer(tmp_path):
    """From plain and compressed lines; what is damaged is left out; a missing file is told before any is read."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"[\n" + PLAIN)
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(PLAIN))
    cut = tmp_path / "y.jsonl.zst"
    cut.write_bytes(compress(".zst", PLAIN)[:-3])
    texts = list(read_texts([path, packed, cut]))
    assert texts[: 2 * len(TEXTS)] == TEXTS * 2
    assert texts[2 * len(TEXTS) :] == TEXTS[: len(texts) - 2 * len(TEXTS)]
    with pytest.raises(UserError, match="cannot read the input"):
        next(read_texts([path, tmp_path / "none.jsonl"]))
