"""COCO's captions: one document an annotation, however the list is cut."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.ingest import BadRecord, Picture, Record, Text
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.coco import COCO
from megatron_mm.errors import UserError
from tests.unit.data.format_checks import damaged, parts_of, read_all, read_damaged
from tests.unit.data.spoiled import spoiled

FORM = COCO()
CONTENT = {
    "info": {"year": 2017},
    "images": [
        {"id": 9, "file_name": "9.jpg", "coco_url": "http://host/9.jpg", "width": 640},
        {"id": "7", "file_name": "7.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "A cat.\n"},
        {"id": 2, "image_id": "7", "caption": " A dog. "},
        {"id": 3, "image_id": 9, "caption": "Two cats."},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As COCO unpacks: annotations/ beside train2017/ and val2017/."""
    folder = tmp_path_factory.mktemp("coco")
    for name in ("annotations", "train2017", "val2017"):
        (folder / name).mkdir()
    (folder / "train2017" / "9.jpg").touch()
    (folder / "val2017" / "7.jpg").touch()
    return folder


def write(folder: Path, content: object, name: str = "captions.json") -> Path:
    path = folder / "annotations" / name
    path.write_text(json.dumps(content))
    return path


def test_a_document_an_annotation(folder):
    path = write(folder, CONTENT)
    records = read_all(FORM, [path], "caption")
    cat, dog = Picture(folder / "train2017/9.jpg", "http://host/9.jpg"), Picture(folder / "val2017/7.jpg")
    assert parts_of(records) == [(cat, Text(" A cat.")), (dog, Text(" A dog.")), (cat, Text(" Two cats."))]
    assert [record.id for record in records] == [f"{path}:annotations[{i}]" for i in range(3)]


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 12))
def test_chunks_tile_the_list(folder, annotations, step):
    content = CONTENT | {"annotations": [{"image_id": 9, "caption": str(i)} for i in range(annotations)]}
    path = write(folder, content, "tiles.json")
    form = COCO(step * PICTURE_BYTES)
    chunks = form.chunks([path])
    assert [n for chunk in chunks for n in range(chunk.start, chunk.end)] == list(range(annotations))
    assert max(chunk.end - chunk.start for chunk in chunks) <= step
    captions = [parts[1] for parts in parts_of(read_all(form, [path], "caption"))]
    assert captions == [Text(f" {i}") for i in range(annotations)]


def test_a_changed_file_is_read_anew(folder):
    path = write(folder, CONTENT, "changing.json")
    assert len(read_all(FORM, [path], "caption")) == 3
    write(folder, CONTENT | {"annotations": CONTENT["annotations"][:2]}, "changing.json")
    assert len(read_all(FORM, [path], "caption")) == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], '"images" and "annotations"'),
        ({"images": []}, '"images" and "annotations"'),
        ({"images": {}, "annotations": []}, '"images" and "annotations"'),
        (CONTENT | {"annotations": [{"image_id": 9, "bbox": [1, 2, 3, 4]}]}, "instances_"),
        (CONTENT | {"annotations": []}, 'no annotation has a "caption"'),
        (CONTENT | {"images": [{"id": 9, "file_name": "none.jpg"}]}, r"none\.jpg(.|\n)*train2017"),
        (CONTENT | {"images": [{"id": 9, "file_name": "9.jpg"}, {"id": 9, "file_name": "7.jpg"}]}, "one id"),
    ],
)
def test_wrong_inputs_are_told_before_any_work(folder, content, told):
    with pytest.raises(UserError, match=told):
        FORM.chunks([write(folder, content, "wrong.json")])


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b'{"images": "\xff"}', json.dumps(CONTENT).encode()[:-9]])
def test_what_is_no_json(folder, data):
    path = folder / "annotations" / "no.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"no\.json: not JSON"):
        FORM.chunks([path])
    with pytest.raises(UserError, match="cannot read"):
        FORM.chunks([folder / "none.json"])


BAD = {
    "is no object": 3,
    '"image_id" is missing': {"caption": "A cat."},
    '"image_id" is no id': {"image_id": [9], "caption": "A cat."},
    "is no image's: 8": {"image_id": 8, "caption": "A cat."},
    '"caption" is missing': {"image_id": 9},
    '"caption" is no string': {"image_id": 9, "caption": ["A cat."]},
    "half a surrogate": {"image_id": 9, "caption": "\udfff"},
    "no text": {"image_id": 9, "caption": "\n"},
    "no picture beside the list: 'gone.jpg'": {"image_id": 1, "caption": "A cat."},
    '"file_name" is missing': {"image_id": 2, "caption": "A cat."},
}


def test_bad_annotations_stand_in_their_place(folder):
    images = [*CONTENT["images"], {"id": 1, "file_name": "gone.jpg"}, {"id": 2}, 3, {"id": {}}]
    good = CONTENT["annotations"][0]
    annotations = [annotation for bad in BAD.values() for annotation in (good, bad)]
    records = read_all(FORM, [write(folder, {"images": images, "annotations": annotations}, "bad.json")], "caption")
    assert all(isinstance(record, Record) for record in records[::2])
    for told, record in zip(BAD, records[1::2], strict=True):
        assert isinstance(record, BadRecord)
        assert told in record.reason


@settings(max_examples=300)
@given(spoiled(CONTENT))
def test_any_types_anywhere(folder, content):
    read_damaged(FORM, write(folder, content, "spoiled.json"), "caption")


@settings(max_examples=100)
@given(damaged(json.dumps(CONTENT).encode()))
def test_damaged_files(folder, data):
    path = folder / "annotations" / "damaged.json"
    path.write_bytes(data)
    read_damaged(FORM, path, "caption")
