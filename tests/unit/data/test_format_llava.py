"""LLaVA's conversations: what is said, what of it is trained, and a big list read in shares."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.ingest import BadRecord, Picture, Record, Text, json_array
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.document import Document, make_document
from megatron_mm.data.ingest.json_array import find_borders
from megatron_mm.data.ingest.llava import LLaVA
from megatron_mm.errors import UserError
from tests.unit.data.conftest import write_jsonl
from tests.unit.data.format_checks import damaged, parts_of, read_all, read_damaged, reason
from tests.unit.data.spoiled import spoiled

FORM = LLaVA()


def talk(*values: str, image: object = None, system: str = "") -> dict:
    turns = [{"from": speaker, "value": value} for speaker, value in zip(itertools.cycle(("human", "gpt")), values)]
    record = {"id": "x", "conversations": [{"from": "system", "value": system}] * bool(system) + turns}
    return record | ({} if image is None else {"image": image})


RECORD = talk("<image>\nWhat is it?", "A cat.", "Its colour?", "Black.", image="coco/0.jpg", system="Be brief.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    (folder / "images").mkdir()
    (folder / "images" / "coco").symlink_to(images, target_is_directory=True)
    return folder


def write(folder: Path, records: list, name: str = "talks.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(records, indent=2))
    return path


def test_turns(folder):
    def says(text: str) -> Text:
        return Text(text, trained=False)

    zero, one = (Picture(folder / "images" / "coco" / name) for name in ("0.jpg", "1.png"))
    cases = [
        (
            RECORD,
            (says("Be brief.\nUSER:"), zero, says("\nWhat is it?\nASSISTANT:"), Text(" A cat.\nUSER:"),
             says(" Its colour?\nASSISTANT:"), Text(" Black.")),
        ),
        (talk(" Hi. \n", " Hello.\nYou? "), (says("USER: Hi.\nASSISTANT:"), Text(" Hello.\nYou?"))),
        (talk("What is it?\n<image>", "A cat.", image="coco/0.jpg"),
         (says("USER: What is it?\n"), zero, says("\nASSISTANT:"), Text(" A cat."))),
        (talk("<image> <image>\nWhich?", "This.", image=["coco/1.png", "coco/0.jpg"]),
         (says("USER:"), one, zero, says("\nWhich?\nASSISTANT:"), Text(" This."))),
        (talk("Hi.", "Look: <image>.", image=["coco/0.jpg"]),
         (says("USER: Hi.\nASSISTANT:"), Text(" Look:"), zero, Text("."))),
        (talk("", "Hello.", image=""), (says("USER:\nASSISTANT:"), Text(" Hello."))),
    ]  # fmt: skip
    path = write(folder, [record for record, _ in cases])
    records = read_all(FORM, [path], "conversation")
    assert parts_of(records) == [parts for _, parts in cases]
    assert [record.id for record in records] == [f"{path}:[{i}]" for i in range(len(cases))]
    lines = write_jsonl(folder / "talks.jsonl", [record for record, _ in cases])
    assert parts_of(read_all(FORM, [lines], "conversation")) == [parts for _, parts in cases]


def test_loss_is_on_answers_and_their_ends(folder, tokenizer):
    """Followed to the tokens: all of the answers, the marks that end them, eos; nothing else."""
    (record,) = read_all(FORM, [write(folder, [RECORD])], "conversation")
    assert isinstance(record, Record)
    document = make_document(record, tokenizer, 10**6)
    assert isinstance(document, Document)
    assert document.loss is not None
    trained = [document.tokens[start:end] for start, end in document.loss]
    assert trained == [tokenizer.encode(" A cat.\nUSER:"), [*tokenizer.encode(" Black."), tokenizer.eos_id]]
    assert document.tokens.count(tokenizer.image_id) == len(document.images) == 1


BAD = {
    "not a JSON object": 3,
    '"conversations" is missing': {"image": "coco/0.jpg"},
    '"conversations" is no list': {"conversations": {}},
    "a turn of": {"conversations": ["Hi."]},
    '"from" is missing': {"conversations": [{"value": "Hi."}]},
    '"from" is none of': {"conversations": [{"from": "bard", "value": "Hi."}]},
    '"value" is missing': {"conversations": [{"from": "human"}]},
    '"value" is no string': {"conversations": [{"from": "human", "value": 3}]},
    "half a surrogate": talk("\ud800", "Hello."),
    "do not alternate": talk("Hi.", "Hello.", "Bye."),
    "do not alternate, from a question": {"conversations": []},
    "an answer is empty": talk("Hi.", " "),
    "1 marks <image>, but 0 pictures": talk("<image>", "A cat."),
    "0 marks <image>, but 1 pictures": talk("Hi.", "Hello.", image="coco/0.jpg"),
    "1 marks <image>, but 2 pictures": talk("<image>", "A cat.", image=["coco/0.jpg", "coco/1.png"]),
    "no picture beside the list: 'gone.jpg'": talk("<image>", "A cat.", image="gone.jpg"),
    '"image" is no string': talk("<image>", "A cat.", image={"path": "coco/0.jpg"}),
    "only pictures are taken": talk("<image>", "A cat.", image="coco/0.jpg") | {"video": "x.mp4"},
}


def test_bad_records_stand_in_their_place(folder):
    records = read_all(FORM, [write(folder, [r for bad in BAD.values() for r in (RECORD, bad)])], "conversation")
    assert all(isinstance(record, Record) for record in records[::2])
    for told, record in zip(BAD, records[1::2], strict=True):
        assert isinstance(record, BadRecord)
        assert told in record.reason


def test_bytes_that_are_no_utf8_spoil_one_record(folder):
    path = write(folder, [RECORD, talk("Hi.", "X."), RECORD])
    path.write_bytes(path.read_bytes().replace(b"X.", b"\xff"))
    first, bad, last = read_all(FORM, [path], "conversation")
    assert reason([bad]).startswith("not JSON: 'utf-8'")
    assert isinstance(first, Record)
    assert isinstance(last, Record)


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([3, "é\n]}", [[]], {"a": '\\"]'}, {"b": {"c": [1, "x" * 300]}}, -1.5, None, True])),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
)
def test_borders_of_any_list(folder, records, indent, mark, block):
    """Also where a value spans many reads, and a number ends with one."""
    path = folder / "borders.json"
    text = json.dumps(records, indent=indent, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" * mark + b" \n" + text.encode() + b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_BLOCK", block)
        json_array._find.cache_clear()
        borders = find_borders(path)
    data = path.read_bytes()
    found = [json.loads(data[start:end]) for start, end in zip(*borders, strict=True)]
    assert found == records


def test_chunks_of_lines_count_the_pictures(folder):
    path = folder / "beside.jsonl"
    (folder / "x.jpg").touch()
    path.write_text("".join(json.dumps(talk("<image>", str(i), image="x.jpg")) + "\n" for i in range(100)))
    chunks = LLaVA(10 * PICTURE_BYTES).chunks([path])
    assert 9 <= len(chunks) <= 11
    assert sum(chunk.bytes for chunk in chunks) == pytest.approx(100 * PICTURE_BYTES, rel=0.01)


@settings(max_examples=50)
@given(st.integers(1, 30), st.integers(1, 10))
def test_chunks_tile_the_list(folder, records, step):
    path = write(folder, [talk(str(i), "x") for i in range(records)], "tiles.json")
    form = LLaVA(step * PICTURE_BYTES)
    chunks = form.chunks([path])
    assert [n for chunk in chunks for n in range(chunk.start, chunk.end)] == list(range(records))
    questions = [parts[0] for parts in parts_of(read_all(form, [path], "conversation"))]
    assert questions == [Text(f"USER: {i}\nASSISTANT:", trained=False) for i in range(records)]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"[1, 2", "byte 6: not JSON: it is cut off"),
        (b'[{"a": "b', "byte 2: not JSON, or cut off: Unterminated string"),
        (b"[1 2]", "byte 4: not JSON: ',' is expected, there is '2'"),
        (b"[1,]", "byte 4: not JSON"),
        (b"[1] 2", "byte 5: not JSON: more"),
        (b"[" * 100_000, "byte 2: not JSON: nested too deeply"),
        (b'[{"a": "' + b"x" * 5000 + b'"}]', "byte 2: a record of more than"),
    ],
)
def test_what_is_no_list(folder, monkeypatch, data, told):
    path = folder / "no.json"
    path.write_bytes(data)
    monkeypatch.setattr(json_array, "MAX_RECORD_BYTES", 1000 if b"xxx" in data else 10**6)
    monkeypatch.setattr(json_array, "_BLOCK", 100)
    json_array._find.cache_clear()
    with pytest.raises(UserError) as error:
        FORM.chunks([path])
    assert told in str(error.value)


def test_an_empty_file_and_none(folder):
    (folder / "empty.json").touch()
    assert FORM.chunks([folder / "empty.json", write(folder, [], "none.json")]) == []
    with pytest.raises(UserError, match="cannot read"):
        FORM.chunks([folder / "gone.json"])
    with pytest.raises(UserError, match="cannot be found"):
        FORM.chunks([write(folder, [talk("<image>", "A cat.", image="gone.jpg")], "gone.json")])


@settings(max_examples=300)
@given(spoiled(RECORD), st.booleans())
def test_any_types_anywhere(folder, record, lines):
    three = [RECORD, record, RECORD]
    path = write_jsonl(folder / "spoiled.jsonl", three) if lines else write(folder, three, "spoiled.json")
    records = read_damaged(FORM, path, "conversation")
    assert records is not None
    assert isinstance(records[0], Record)
    assert len(records) == 3
    assert records[2].parts == records[0].parts


@settings(max_examples=200)
@given(damaged(json.dumps([RECORD] * 3).encode()))
def test_damaged_files(folder, data):
    path = folder / "damaged.json"
    path.write_bytes(data)
    read_damaged(FORM, path, "conversation")
