"""Parquet of pictures and captions, or of text: columns found by name, rows in bounded memory, damage told."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.ingest import BadRecord, Picture, Record, Text
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.jsonl import read_texts
from megatron_mm.data.ingest.parquet import Parquet
from megatron_mm.errors import UserError
from tests.unit.data.format_checks import HTML, damaged, parts_of, read_all, read_damaged

ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parquet")


def write(path: Path, columns: Any, types: dict[str, pa.DataType] | None = None, **options: Any) -> Path:
    schema = pa.schema(list(types.items())) if types else None
    pq.write_table(pa.table(columns, schema=schema), path, **options)
    return path


def read_one(path: Path, columns: Any, kind: Any = "caption", types: dict[str, pa.DataType] | None = None) -> Any:
    return read_all(Parquet(), [write(path, columns, types)], kind)


def img2dataset(rows: int = ROWS) -> dict[str, list[Any]]:
    """As its Parquet output: failed downloads are rows too."""
    failed = [i % 5 == 3 for i in range(rows)]
    return {
        "key": [f"{i:09d}" for i in range(rows)],
        "jpg": [None if failed[i] else b"picture %d" % i * 40 for i in range(rows)],
        "txt": [None if failed[i] else f"caption {i}" for i in range(rows)],
        "caption": [f"caption {i}" for i in range(rows)],
        "url": [f"https://x/{i}.jpg" for i in range(rows)],
        "status": ["failed_to_download" if failed[i] else "success" for i in range(rows)],
        "width": [64] * rows,
    }


def parts(i: int) -> tuple[Picture, Text]:
    return Picture(b"picture %d" % i * 40, f"https://x/{i}.jpg"), Text(f" caption {i}")


def test_img2dataset(folder):
    path = write(folder / "00000.parquet", img2dataset(), row_group_size=7)
    good = [i for i in range(ROWS) if i % 5 != 3]
    records = read_all(Parquet(), [path], "caption")
    assert parts_of(records) == [parts(i) for i in good]
    assert [record.id for record in records] == [f"{path}:row {i}" for i in good]


@settings(max_examples=40)
@given(st.integers(1, 4000), st.integers(1, ROWS + 5), st.sampled_from(("NONE", "SNAPPY", "ZSTD")))
def test_any_cut_gives_the_same_records(folder, chunk_bytes, group, compression):
    path = write(folder / "cut.parquet", img2dataset(), row_group_size=group, compression=compression)
    form = Parquet(chunk_bytes)
    chunks = form.chunks([path])
    assert [chunk.start for chunk in chunks] == [0, *(chunk.end for chunk in chunks)][:-1]
    assert chunks[-1].end == -(-ROWS // group)
    assert sum(chunk.bytes for chunk in chunks) == pytest.approx(path.stat().st_size, abs=len(chunks))
    assert [r for chunk in chunks for r in form.read(chunk, "caption")] == read_all(Parquet(), [path], "caption")


def test_a_struct_whose_paths_are_all_none(folder):
    """Its column of paths has no type but null."""
    columns = {"image": [{"bytes": b"a", "path": None}, {"bytes": None, "path": None}], "text": ["x", "y"]}
    good, bad = read_one(folder / "null.parquet", columns)
    assert good.parts == (Picture(b"a"), Text(" x"))
    assert bad.reason == "no picture"


HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS: dict[str, tuple[dict[str, Any], dict[str, pa.DataType]]] = {
    "upper case": ({"IMAGE": [b"x"], "TEXT": [" a "], "URL": ["u"]}, {}),
    "hugging face": ({"image": [{"bytes": b"x", "path": "x.jpg"}], "text": ["a"], "url": ["u"]}, {"image": HF}),
    "large types": (
        {"image_bytes": [b"x"], "caption": ["a"], "url": ["u"]},
        {"image_bytes": pa.large_binary(), "caption": pa.large_string(), "url": pa.large_string()},
    ),
    "views": (
        {"image_bytes": [b"x"], "caption": ["a"], "url": ["u"]},
        {"image_bytes": pa.binary_view(), "caption": pa.string_view(), "url": pa.string_view()},
    ),
    "categories": (
        {"image": [b"x"], "caption": pa.array(["a"]).dictionary_encode(), "url": pa.array(["u"]).dictionary_encode()},
        {},
    ),
    "the first of several": ({"image": [b"y"], "jpg": [b"x"], "text": ["b"], "caption": ["a"], "url": ["u"]}, {}),
    "a name of another type": ({"jpg": [3], "image": [b"x"], "caption": [["b"]], "txt": ["a"], "url": ["u"]}, {}),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_by_name_and_type(folder, case):
    columns, types = COLUMNS[case]
    table = pa.table(columns)
    for name, kind in types.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(columns[name], kind))
    pq.write_table(table, folder / "columns.parquet")
    records = read_all(Parquet(), [folder / "columns.parquet"], "caption")
    assert parts_of(records) == [(Picture(b"x", "u"), Text(" a"))]


def test_local_pictures_and_missing_urls(folder):
    values = [{"bytes": None, "path": "b/x.jpg"}, {"bytes": b"x", "path": None}, {"bytes": b"", "path": "x.jpg"}]
    records = read_one(
        folder / "local.parquet", {"image": values, "text": ["a"] * 3}, types={"image": HF, "text": pa.string()}
    )
    assert parts_of(records) == [
        (Picture(content), Text(" a")) for content in (folder / "b/x.jpg", b"x", b"")
    ]  # fmt: skip
    path = write(folder / "local.parquet", {"image": ["x.jpg"], "text": ["a"], "url": [None]})
    assert Parquet().chunks([path])[0].bytes == path.stat().st_size + PICTURE_BYTES
    records = read_all(Parquet(), [path], "caption")
    assert parts_of(records) == [(Picture(folder / "x.jpg"), Text(" a"))]


def test_bad_rows(folder):
    pictures = [b"x", None, b"x", b"x", {"bytes": None, "path": None}, b"x"]
    values = [p if isinstance(p, dict) else p and {"bytes": p, "path": None} for p in pictures]
    texts = ["a", "a", None, " \n", "a", "b"]
    records = read_one(
        folder / "bad.parquet", {"image": values, "text": texts}, types={"image": HF, "text": pa.string()}
    )
    assert [record.id for record in records] == [f"{folder}/bad.parquet:row {i}" for i in range(6)]
    reasons = [record.reason if isinstance(record, BadRecord) else "" for record in records]
    assert reasons == ["", "no picture", '"text" is missing', "no text", "no picture", ""]
    for path in ("", "a\0b"):
        (bad,) = read_one(folder / "bad.parquet", {"image": [path], "text": ["a"]})
        assert bad.reason == '"path" is no path'


@pytest.mark.parametrize("kind", ["caption", "text"])
def test_text_that_is_no_utf8_spoils_its_row_alone(folder, kind):
    raw = pa.array([b"a", b"\xff\xfe", b"\xed\xa0\x80", b"b"])
    text = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2])
    records = read_one(folder / "utf8.parquet", {"image": [b"x"] * 4, "text": text}, kind)
    assert [isinstance(record, Record) for record in records] == [True, False, False, True]
    assert [record.reason.partition(":")[0] for record in records if isinstance(record, BadRecord)] == ["not UTF-8"] * 2


def test_text(folder):
    texts = ["one\n two  ", "", None, "é"]
    path = write(folder / "text.parquet", {"id": range(4), "Text": texts})
    records = read_all(Parquet(), [path], "text")
    assert parts_of([records[0], records[3]]) == [(Text("one\n two  "),), (Text("é"),)]
    assert [r.reason for r in records if isinstance(r, BadRecord)] == ["no text", '"text" is missing']
    captions = write(folder / "captions.parquet", img2dataset(3))
    assert list(read_texts([path, captions])) == ["one\n two  ", "é", "caption 0", "caption 1", "caption 2"]


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"url": ["a"], "TEXTS": ["a"]}, "caption"),
        ({"jpg": [3], "text": [3]}, "caption"),
        ({"image": [["x"]], "content": ["a"]}, "text"),
        ({"text": ["a"]}, "caption"),  # good for text alone
        ({"image": [b"x"], "caption": ["a"]}, "text"),
    ],
)
def test_columns_that_are_not_there_are_told_with_those_that_are(folder, columns, kind):
    path = write(folder / "wrong.parquet", columns)
    with pytest.raises(UserError) as raised:
        read_all(Parquet(), [path], kind)
    for field in pq.read_schema(path):
        assert f"{field.name} ({field.type})" in str(raised.value)
    assert "a column of strings named" in str(raised.value)


@pytest.mark.parametrize("content", [b"", HTML, b"PAR1", b"PAR1" * 3, b"PAR1" + HTML + b"PAR1"])
def test_what_is_no_parquet_file(folder, content):
    path = folder / "none.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no Parquet file"):
        Parquet().chunks([path])


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.parquet"):
        with pytest.raises(UserError, match="cannot read the input"):
            Parquet().chunks([path])


def test_without_pyarrow_the_extra_is_named(folder, monkeypatch):
    path = write(folder / "x.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"megatron-mm\[ingest\]"):
        Parquet().chunks([path])


def test_no_rows(folder):
    types = {"image": pa.binary(), "text": pa.string()}
    assert read_one(folder / "empty.parquet", {"image": [], "text": []}, types=types) == []


CHECKED = {"compression": "NONE", "use_dictionary": False, "write_page_checksum": True}


def test_a_damaged_row_group_is_told_and_the_others_are_read(folder):
    path = write(folder / "group.parquet", img2dataset(), row_group_size=20, **CHECKED)
    whole = read_all(Parquet(), [path], "caption")
    group = pq.read_metadata(path).row_group(1)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "jpg")
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    records = read_all(Parquet(), [path], "caption")
    (bad,) = [record for record in records if isinstance(record, BadRecord)]
    assert bad.id == f"{path}:rows 20 to 39"
    assert bad.reason.startswith("damaged row group: ")
    assert bad.damaged_input
    assert [record for record in records if record != bad] == [*whole[:16], *whole[32:]]


WHOLE: dict[str, bytes] = {}


@settings(max_examples=250)
@given(st.data(), st.sampled_from(("NONE", "SNAPPY")), st.sampled_from(("caption", "text")))
def test_damaged_files(folder, data, compression, kind):
    if compression not in WHOLE:
        columns = img2dataset(20) | {"text": [f"text {i}" for i in range(20)]}
        path = write(folder / "whole.parquet", columns, row_group_size=6, compression=compression)
        WHOLE[compression] = path.read_bytes()
    path = folder / "damaged.parquet"
    path.write_bytes(data.draw(damaged(WHOLE[compression])))
    read_damaged(Parquet(), path, kind)


def test_a_large_row_group_is_read_in_bounded_memory(folder):
    """120 MB of pictures in one row group, as Hugging Face's writer may leave them."""
    picture = bytes(range(256)) * 400
    path = folder / "large.parquet"
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    rows = 1200
    options = {"compression": "NONE", "use_dictionary": False, "data_page_size": 1 << 20, "write_batch_size": 8}
    with pq.ParquetWriter(path, schema, **options) as writer:
        writer.write_table(pa.table({"image": [picture] * rows, "text": ["a"] * rows}, schema=schema))
    before, most = pa.total_allocated_bytes(), 0
    records = 0
    for chunk in Parquet().chunks([path]):
        for record in Parquet().read(chunk, "caption"):
            assert isinstance(record, Record)
            records += 1
            most = max(most, pa.total_allocated_bytes() - before)
    assert records == rows
    assert most < 50 << 20
    assert pq.read_metadata(path).num_row_groups == 1


def test_chunks_of_several_files_keep_their_order(folder):
    paths = [write(folder / f"{i}.parquet", {"text": [f"{i} {k}" for k in range(5)]}, row_group_size=2) for i in (2, 1)]
    texts = [parts[0].text for parts in parts_of(read_all(Parquet(1), paths, "text")) if isinstance(parts[0], Text)]
    assert texts == [f"{i} {k}" for i, k in itertools.product((2, 1), range(5))]
