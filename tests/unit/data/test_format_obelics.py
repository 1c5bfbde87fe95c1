"""OBELICS: documents in order, with pictures as bytes, as files, or as URLs that a manifest maps to files."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.ingest import BadRecord, Part, Picture, Text
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.obelics import Obelics
from megatron_mm.errors import UserError
from tests.unit.data.conftest import write_jsonl
from tests.unit.data.format_checks import HTML, damaged, parts_of, read_all, read_damaged, reason

TEXTS = pa.list_(pa.string())
BYTES = pa.list_(pa.binary())
NAMES = pa.list_(pa.string())
HF = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
A, B = "https://x/a.jpg", "http://y/b"

Row = tuple[Any, Any] | tuple[Any, Any, str]  # images, texts, metadata


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("obelics")


def write(path: Path, images: pa.DataType, rows: list[Row], **options: Any) -> Path:
    columns = {
        "images": pa.array([row[0] for row in rows], images),
        "metadata": pa.array([row[2] if len(row) > 2 else None for row in rows], pa.string()),
        "general_metadata": pa.array(["{}"] * len(rows)),
        "texts": pa.array([row[1] for row in rows], TEXTS),
    }
    pq.write_table(pa.table(columns), path, **options)
    return path


def read(path: Path, images: pa.DataType, *rows: Row) -> list[Any]:
    return read_all(Obelics(), [write(path, images, list(rows))], "interleaved")


def test_bytes_and_where_they_came_from(folder):
    path = folder / "bytes.parquet"
    about = json.dumps([None, {"src": A, "alt_text": "x"}, None])
    rows: list[Row] = [
        ([None, b"a", None], [" one ", None, "two\n\nthree"], about),
        ([b"a", b"b", None, None], [None, None, "x", "y"], "[]"),
        ([None], ["no picture"], "[" * 10_000),
    ]
    expected: list[tuple[Part, ...]] = [
        (Text("one\n"), Picture(b"a", A), Text("\ntwo\n\nthree")),
        (Picture(b"a"), Picture(b"b"), Text("\nx\ny")),
        (Text("no picture"),),
    ]
    records = read(path, BYTES, *rows)
    assert parts_of(records) == expected
    assert [record.id for record in records] == [f"{path}:row {i}" for i in range(3)]
    assert parts_of(read(path, pa.list_(pa.large_binary()), *rows)) == expected
    structs: list[Row] = [
        ([image and {"bytes": image, "path": "x"} for image in images], *more) for images, *more in rows
    ]
    assert parts_of(read(path, HF, *structs)) == expected


@pytest.mark.parametrize(
    "about", ["", "x", "3", "null", "{}", '[{"src": 3}, 4]', '[{"src": "\\ud800"}, {}]', "[{}, {}, {}]"]
)
def test_metadata_that_cannot_be_read_loses_the_urls_alone(folder, about):
    records = read(folder / "about.parquet", BYTES, ([b"a", None], [None, "x"], about))
    assert parts_of(records) == [(Picture(b"a"), Text("\nx"))]


def test_local_files(folder):
    path = folder / "local.parquet"
    assert parts_of(read(path, NAMES, (["b/a.jpg", None], [None, "x"]))) == [(Picture(folder / "b/a.jpg"), Text("\nx"))]
    row = ([{"bytes": None, "path": "a.jpg"}, {"bytes": b"a", "path": A}, None], [None, None, "x"])
    assert parts_of(read(path, HF, row)) == [(Picture(folder / "a.jpg"), Picture(b"a", A), Text("\nx"))]


@pytest.mark.parametrize("name", ["train.images.jsonl", "images.jsonl"])
def test_urls_by_a_manifest(tmp_path, name):
    """A picture that could not be fetched is left out; one that the manifest doesn't know spoils its document."""
    write_jsonl(tmp_path / name, [{"url": A, "path": "00/a.jpg"}, {"url": B, "path": None, "status": "failed"}])
    if name != "images.jsonl":  # the nearer one counts
        write_jsonl(tmp_path / "images.jsonl", [{"url": A, "path": "other.jpg"}])
    row: Row = ([A, None, B, None], [None, "x", None, "y"])
    known, unknown = read(tmp_path / "train.parquet", NAMES, row, ([A + "2", None], [None, "x"]))
    assert parts_of([known]) == [(Picture(tmp_path / "00/a.jpg", A), Text("\nx\ny"))]
    assert reason([unknown]) == f"no picture: the manifest does not know {A}2"


def test_chunks_count_the_pictures_that_lie_elsewhere(tmp_path):
    write_jsonl(tmp_path / "images.jsonl", [{"url": A, "path": "a.jpg"}])
    rows: list[Row] = [([A, None, A], [None, "x", None])] * 60
    chunks = Obelics(40 * PICTURE_BYTES).chunks([write(tmp_path / "x.parquet", NAMES, rows, row_group_size=5)])
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(0, 4), (4, 8), (8, 12)]
    assert sum(chunk.bytes for chunk in chunks) == pytest.approx(120 * PICTURE_BYTES, rel=0.01)


def test_urls_without_a_manifest_are_told_before_any_work(tmp_path):
    rows: list[Row] = [([None], ["x"]), ([None, A], ["x", None])]
    with pytest.raises(UserError, match="no manifest") as raised:
        Obelics().chunks([write(tmp_path / "train.parquet", NAMES, rows)])
    assert "train.images.jsonl" in str(raised.value)
    assert A in str(raised.value)


@pytest.mark.parametrize(
    "line", [b"[]", HTML, b'{"url": 3, "path": "a"}', b'{"url": "a://b", "path": 3}', b'{"url": "a://b", "path": ""}']
)
def test_a_manifest_that_cannot_be_read(tmp_path, line):
    (tmp_path / "images.jsonl").write_bytes(b'{"url": "a://c", "path": "c"}\n' + line)
    path = write(tmp_path / "train.parquet", NAMES, [([A, None], [None, "x"])])
    with pytest.raises(UserError, match=r"images\.jsonl:2: not a manifest's line"):
        read_all(Obelics(), [path], "interleaved")


BAD: dict[str, Row] = {
    "lists of two lengths: 2 images, 1 texts": ([b"a", None], ["x"]),
    "a picture and a text at one place": ([b"a"], ["x"]),
    "no text": ([b"a", None], [None, " \n"]),
    '"images" is missing': (None, ["x"]),
    '"texts" is missing': ([b"a"], None),
}


@pytest.mark.parametrize("told", BAD)
def test_bad_rows(folder, told):
    good: Row = ([b"a", None], [None, "x"])
    first, bad, last = read(folder / "bad.parquet", BYTES, good, BAD[told], good)
    assert reason([bad]) == told
    assert len(parts_of([first, last])) == 2


def test_empty_lists_and_no_rows(folder):
    assert reason(read(folder / "empty.parquet", BYTES, ([], []))) == "no text"
    assert read(folder / "empty.parquet", BYTES) == []


def test_text_that_is_no_utf8(folder):
    raw = pa.array([b"a", b"\xff", b"b"])
    values = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    texts = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), values)
    pq.write_table(pa.table({"images": pa.array([[None, None], [None]], BYTES), "texts": texts}), folder / "u.parquet")
    bad, good = read_all(Obelics(), [folder / "u.parquet"], "interleaved")
    assert reason([bad]).startswith("not UTF-8")
    assert parts_of([good]) == [(Text("b"),)]


@pytest.mark.parametrize(
    "columns",
    [
        {"text": ["a"]},
        {"images": ["a"], "texts": ["a"]},
        {"images": [[3]], "texts": [["a"]]},
        {"images": [[b"a"]]},
    ],
)
def test_other_columns(folder, columns):
    pq.write_table(pa.table(columns), folder / "wrong.parquet")
    with pytest.raises(UserError, match="not in the form of OBELICS") as raised:
        Obelics().chunks([folder / "wrong.parquet"])
    assert all(name in str(raised.value) for name in columns)


ROWS: list[Row] = [
    ([b"p%d" % i * 9, None] * (i % 4) + [None], [None, f"text {i}"] * (i % 4) + ["end"], json.dumps([{"src": A}] * 3))
    for i in range(40)
]


@settings(max_examples=30)
@given(st.integers(1, 5000), st.integers(1, 45))
def test_any_cut_gives_the_same_records(folder, chunk_bytes, group):
    path = write(folder / "cut.parquet", BYTES, ROWS, row_group_size=group)
    records = read_all(Obelics(), [path], "interleaved")
    assert len(parts_of(records)) == len(ROWS)
    assert read_all(Obelics(chunk_bytes), [path], "interleaved") == records


@settings(max_examples=150)
@given(st.data())
def test_damaged_files(folder, data):
    whole = write(folder / "whole.parquet", BYTES, ROWS, row_group_size=15).read_bytes()
    path = folder / "damaged.parquet"
    path.write_bytes(data.draw(damaged(whole)))
    records = read_damaged(Obelics(), path, "interleaved")
    assert records is None or sum(r.damaged_input for r in records if isinstance(r, BadRecord)) <= 3
