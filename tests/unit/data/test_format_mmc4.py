"""Multimodal C4: pictures before their sentences, holes left out, damage told."""

import base64
import gzip
import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.ingest import BadRecord, Picture, Record, Text
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.mmc4 import MMC4
from megatron_mm.errors import UserError
from tests.unit.data.conftest import write_jsonl
from tests.unit.data.format_checks import damaged, parts_of, read_all, read_damaged, reason
from tests.unit.data.spoiled import spoiled

FORM = MMC4()


def picture(name: str, index: int, **more: object) -> dict:
    return {"image_name": name, "matched_text_index": index, "raw_url": f"http://host/{name}", **more}


def line(sentences: list[str], *pictures: dict) -> dict:
    return {"text_list": sentences, "image_info": list(pictures), "similarity_matrix": [[0.5]], "url": "http://host/"}


RECORD = line(["One.", "Two.", "Three."], picture("b.jpg", 2), picture("a.jpg", 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list's folder. Readers look at pictures' names alone: an empty file will do."""
    folder = tmp_path_factory.mktemp("set") / "lists"
    (folder / "images").mkdir(parents=True)
    for name in "abc":
        (folder / "images" / f"{name}.jpg").touch()
    return folder


def test_pictures_stand_before_the_sentences_that_they_match(folder):
    a, b, c = (Picture(folder / "images" / f"{n}.jpg", f"http://host/{n}.jpg") for n in "abc")
    cases = [
        (RECORD, (Text("One.\n"), a, Text("\nTwo.\n"), b, Text("\nThree."))),
        (line(["One.", " Two. ", "Three."], picture("a.jpg", 0)), (a, Text("\nOne. Two. Three."))),
        (line(["One.", "Two."], picture("b.jpg", 1), picture("a.jpg", 1)), (Text("One.\n"), b, a, Text("\nTwo."))),
        (line(["One.", "", "Two."], picture("c.jpg", 1)), (Text("One.\n"), c, Text("\nTwo."))),
        (line(["One.", "Two."], picture("gone.jpg", 1)), (Text("One. Two."),)),  # a dead link
        (line(["One."]), (Text("One."),)),
    ]
    path = write_jsonl(folder / "order.jsonl", [record for record, _ in cases])
    records = read_all(FORM, [path], "interleaved")
    assert parts_of(records) == [parts for _, parts in cases]
    assert [record.id for record in records] == [f"{path}:{i}" for i in range(1, len(cases) + 1)]


def test_pictures_within_the_list(folder):
    record = line(["One."], {"matched_text_index": 0, "image_base64": base64.b64encode(b"picture").decode()})
    path = write_jsonl(folder / "within.jsonl", [record])
    assert parts_of(read_all(FORM, [path], "interleaved")) == [(Picture(b"picture"), Text("\nOne."))]


@pytest.mark.parametrize("where", [".", "images", "shard_7", "..", "../images", "../shard_7", "../images/train2017"])
def test_where_pictures_may_lie(tmp_path, where):
    path = tmp_path / "lists" / "shard_7.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps(RECORD).encode()))
    place = path.parent / where
    place.mkdir(parents=True, exist_ok=True)
    (place / "a.jpg").touch()
    (parts,) = parts_of(read_all(FORM, [path], "interleaved"))
    (found,) = [part.content for part in parts if isinstance(part, Picture)]
    assert found.samefile(place / "a.jpg")


def test_no_picture_at_all_is_told_before_any_work(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [RECORD])
    with pytest.raises(UserError, match=r"cannot be found(.|\n)*b\.jpg"):
        FORM.chunks([path])


def test_as_published(folder):
    """A zip archive that holds one JSONL file; the chunk's share is the archive's."""
    path = folder / "shard_0_v2.jsonl.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("shard_0_v2.jsonl", "".join(json.dumps(line([f"{i}."])) + "\n" for i in range(500)))
    (chunk,) = FORM.chunks([path])
    assert chunk.bytes == path.stat().st_size
    assert parts_of(list(FORM.read(chunk, "interleaved"))) == [(Text(f"{i}."),) for i in range(500)]
    whole = path.read_bytes()
    for data, told in ((whole[:-200], "damaged zip"), (b"PK" + whole[:100], "no .zip file")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=told):
            FORM.chunks([path])
    path.write_bytes(whole.replace(whole[300:310], b"0123456789"))  # found by the sum of the file only
    *_, last = FORM.read(chunk, "interleaved")
    assert isinstance(last, BadRecord)
    assert last.damaged_input
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.jsonl", "{}")
        archive.writestr("2.jsonl", "{}")
    with pytest.raises(UserError, match="holds 2"):
        FORM.chunks([path])


def test_chunks_count_the_pictures_beside_the_list(folder):
    path = write_jsonl(folder / "beside.jsonl", [line([f"{i}."], picture("a.jpg", 0)) for i in range(100)])
    chunks = MMC4(10 * PICTURE_BYTES).chunks([path])
    assert 9 <= len(chunks) <= 11
    assert sum(chunk.bytes for chunk in chunks) == pytest.approx(100 * PICTURE_BYTES, rel=0.01)


def test_chunks_tile_the_input(folder):
    path = write_jsonl(folder / "many.jsonl", [line([f"{i}."], picture("a.jpg", 0)) for i in range(100)])
    chunks = MMC4(1000).chunks([path, path])
    assert len(chunks) > 20
    places = [(chunk.start, chunk.end) for chunk in chunks]
    assert places[: len(places) // 2] == places[len(places) // 2 :]
    records = [record for chunk in chunks for record in FORM.read(chunk, "interleaved")]
    assert parts_of(records) == parts_of(read_all(FORM, [path], "interleaved")) * 2


BAD = {
    "not JSON": "{",
    "not a JSON object": "[]",
    '"text_list" is missing': {"image_info": []},
    '"text_list" is no list': {"text_list": "One.", "image_info": []},
    '"text_list" is no string': {"text_list": [1], "image_info": []},
    "half a surrogate": {"text_list": ["\ud800"], "image_info": []},
    '"image_info" is missing': {"text_list": ["One."]},
    "is no object": {"text_list": ["One."], "image_info": ["a.jpg"]},
    "of 1 sentences": line(["One."], picture("a.jpg", 1)),
    "no index": line(["One."], picture("a.jpg", -1)),
    '"matched_text_index"': line(["One."], {"image_name": "a.jpg", "matched_text_index": True}),
    '"image_name" is missing': line(["One."], {"matched_text_index": 0}),
    '"image_base64" does not decode': line(["One."], {"matched_text_index": 0, "image_base64": "@"}),
    '"image_base64" is no string': line(["One."], {"matched_text_index": 0, "image_base64": None, "image_name": 3}),
    "no text": line([" "], picture("a.jpg", 0)),
}


@pytest.mark.parametrize("told", BAD)
def test_bad_records(folder, told):
    path = folder / "bad.jsonl"
    path.write_text(BAD[told] if isinstance(BAD[told], str) else json.dumps(BAD[told]))
    if told == '"image_base64" is no string':
        told = '"image_base64" is missing'
    assert told in reason(read_all(FORM, [path], "interleaved"))


@settings(max_examples=300)
@given(spoiled(RECORD))
def test_any_types_anywhere(folder, record):
    path = write_jsonl(folder / "spoiled.jsonl", [RECORD, record, RECORD])
    records = read_damaged(FORM, path, "interleaved")
    assert records is not None
    assert len(records) == 3
    assert isinstance(records[0], Record)
    assert records[0].parts == records[2].parts


@settings(max_examples=200)
@given(st.data())
def test_damaged_files(folder, data):
    whole = "".join(json.dumps(record) + "\n" for record in [RECORD] * 3).encode()
    if data.draw(st.booleans()):
        path = folder / "damaged.jsonl"
    else:
        path = folder / "damaged.jsonl.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo("damaged.jsonl"), whole)
        whole = path.read_bytes()
    path.write_bytes(data.draw(damaged(whole)))
    read_damaged(FORM, path, "interleaved")
