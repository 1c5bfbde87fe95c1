"""Records to a source by the tool itself: good ones stored, bad ones quarantined, never half a source."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.data.ingest import BadRecord, Record
from megatron_mm.data.ingest.build import build_source
from megatron_mm.data.ingest.jsonl import JSONLines, read_texts
from megatron_mm.data.ingest.workers import Processes
from megatron_mm.data.source import Source, verify_source
from megatron_mm.errors import UserError
from tests.unit.data.conftest import image_name, write_jsonl
from tests.unit.data.format_checks import read_all
from tests.unit.data.test_images import huge_png

ROOT = Path(__file__).parents[3]


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


def preprocess(kind: str, path: Path, output: Path, tokenizer, *more: str) -> subprocess.CompletedProcess:
    return tool(
        "preprocess_data.py", "--kind", kind, "--input", path, "--output", output, "--tokenizer", tokenizer.path, *more
    )


def test_three_kinds(tmp_path, images, tokenizer):
    """Documents are bos, text with one image id a picture, eos; nothing is added and nothing lost."""
    raw = base64.b64encode((images / "1.png").read_bytes()).decode()
    cases = {
        "caption": ({"image": {"path": "0.jpg"}, "text": " red circle"}, ["0.jpg", " red circle"]),
        "interleaved": (
            {
                "content": [
                    {"text": "a"}, {"image": {"base64": raw}}, {"image": "0.jpg"}, {"text": " b\n"},
                    {"image": "2.webp"},
                ]
            },
            ["a", "1.png", "0.jpg", " b\n", "2.webp"],
        ),
        "text": ({"text": "one\n two  "}, ["one\n two  "]),
    }  # fmt: skip
    for kind, (record, parts) in cases.items():
        path = write_jsonl(images / f"kind-{kind}.jsonl", [record])
        done = preprocess(kind, path, tmp_path / kind, tokenizer)
        assert done.returncode == 0, done.stderr
        source = verify_source(tmp_path / kind)
        names = [p for p in parts if (images / p).is_file()]
        ids = [i for p in parts for i in ([tokenizer.image_id] if p in names else tokenizer.encode(p))]
        assert source.kind == kind
        assert source.text(0).tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id]
        assert [bytes(b) for b in source.image_bytes(0)] == [(images / n).read_bytes() for n in names]
        assert [bytes(source.image(0, i)[0]) for i in range(len(names))] == [(images / n).read_bytes() for n in names]
    assert not (tmp_path / "text.image.bin").exists()


BAD = {
    '{"image": "0.jpg", "text": "x"': "not JSON",
    "\x80\xff": "not JSON",
    "[" * 100_000: "not JSON",
    "[1, 2]": "not a JSON object",
    '{"text": "x"}': '"image" is missing',
    '{"image": "0.jpg"}': '"text" is missing',
    '{"image": "0.jpg", "text": 3}': '"text" is no string',
    '{"image": "0.jpg", "text": ""}': "no text",
    '{"image": "0.jpg", "text": "\\ud800"}': "surrogate",
    '{"image": "none.jpg", "text": "x"}': "No such file",
    '{"image": ".", "text": "x"}': "Is a directory",
    '{"image": "a\\u0000b", "text": "x"}': "no path",
    '{"image": {"base64": "@@@"}, "text": "x"}': '"base64" does not decode',
    '{"image": {"base64": "aGVsbG8="}, "text": "x"}': "no picture in a known format",
    '{"image": {"url": "x"}, "text": "x"}': 'neither one "path" nor one "base64"',
    '{"image": "huge.png", "text": "x"}': "too large: 9000×9000",
    '{"image": "cut.jpg", "text": "x"}': "does not decode",
}


def test_every_bad_record_is_quarantined_with_its_reason(tmp_path, images, tokenizer):
    (images / "huge.png").write_bytes(huge_png(9000))
    whole = (images / "0.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[:-40])
    good = json.dumps({"image": "0.jpg", "text": " red"})
    lines = [line.encode("latin-1") for bad in BAD for line in (good, bad)]
    path = images / "bad.jsonl"
    path.write_bytes(b"\n".join([*lines, b"", b"  ", good.encode()]))
    summary = build_source([path], tmp_path / "x", "caption", tokenizer, max_bad_rate=0.6)
    assert (summary.documents, summary.bad) == (len(BAD) + 1, len(BAD))
    assert sum(summary.reasons.values()) == len(BAD)
    rows = [json.loads(line) for line in (tmp_path / "x.quarantine.jsonl").read_text().splitlines()]
    for number, ((_, reason), row) in enumerate(zip(BAD.items(), rows, strict=True)):
        assert reason in row["reason"]
        assert row["record"] == f"{path}:{2 * number + 2}"
    assert len(verify_source(tmp_path / "x")) == len(BAD) + 1


def test_interleaved_parts_are_checked(tmp_path):
    lines = [
        {"content": "x"},
        {},
        {"content": []},
        {"content": [{"text": "a", "image": "b"}]},
        {"content": [{"image": "b"}]},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", [*lines, {"content": [{"text": "a"}]}])
    records = read_all(JSONLines(), [path], "interleaved")
    assert [type(r) for r in records] == [BadRecord] * 5 + [Record]


@pytest.mark.parametrize(("bad_ones", "good_ones"), [(3, 7), (30, 400)])
def test_too_many_bad_records_stop_and_keep_the_older_source(tmp_path, tokenizer, bad_ones, good_ones):
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "red"}] * 3)
    assert preprocess("text", good, tmp_path / "x", tokenizer).returncode == 0
    before = {p: p.read_bytes() for p in tmp_path.glob("x.*")}
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{}] * bad_ones + [{"text": "red"}] * good_ones)
    done = preprocess("text", mixed, tmp_path / "x", tokenizer, "--max-bad-rate", "0.01")
    assert done.returncode == 2
    assert "too many bad records" in done.stderr
    assert '"text" is missing' in done.stderr
    left = {p: p.read_bytes() for p in tmp_path.glob("x.*") if p.is_file()}
    assert left.pop(tmp_path / "x.quarantine.jsonl").count(b"\n") >= bad_ones  # the reasons stay, for the user
    assert left == before
    # Mended, it replaces source and quarantine.
    assert preprocess("text", mixed, tmp_path / "x", tokenizer, "--max-bad-rate", "0.5").returncode == 0
    assert len(Source(tmp_path / "x")) == good_ones
    assert preprocess("text", good, tmp_path / "x", tokenizer).returncode == 0
    assert {p: p.read_bytes() for p in tmp_path.glob("x.*")} == before


def test_order_does_not_depend_on_threads(tmp_path, images, tokenizer):
    records = [{"image": image_name(i), "text": f" {i}"} for i in range(60)]
    path = write_jsonl(images / "threads.jsonl", records)
    for threads in (1, 5):
        build_source([path], tmp_path / str(threads), "caption", tokenizer, team=Processes(threads))
    assert Source(tmp_path / "1").digest == Source(tmp_path / "5").digest


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--input", "none.jsonl"], "none.jsonl: cannot read the input"),
        (["--tokenizer", "none.model"], "none.model: cannot read the tokenizer"),
        (["--max-bad-rate", "3"], "--max-bad-rate"),
        (["--max-image-pixels", "0"], "--max-image-pixels"),
        (["--output", "/dev/null/x"], "cannot write the source"),
    ],
)
def test_wrong_arguments(tmp_path, tokenizer, arguments, told):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "red"}])
    done = preprocess("text", path, tmp_path / "x", tokenizer, *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("x*")) == []


def test_a_folder_stands_for_its_files(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / "in" / name, [{"text": name}])
    (tmp_path / "in" / "README").write_text("no JSON")
    done = preprocess("text", tmp_path / "in", tmp_path / "x", tokenizer)
    assert done.returncode == 0, done.stderr
    source = Source(tmp_path / "x")
    assert [tokenizer.decode(source.text(d).tolist()) for d in range(len(source))] == ["a.jsonl", "b.jsonl"]
    done = tool(
        "preprocess_data.py", "--format", "webdataset", "--input", tmp_path / "in", "--output", tmp_path / "y",
        "--tokenizer", tokenizer.path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "allowed: *.tar" in done.stderr


def test_a_tokenizer_that_cannot_be_written(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "red green blue"}] * 30)
    done = tool("train_tokenizer.py", "--input", path, "--output", "/dev/null/t.model", "--vocab-size", "275")
    assert done.returncode == 2, done.stderr
    assert "cannot write the tokenizer" in done.stderr


def test_nothing_but_empty_lines(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no document"):
        build_source([tmp_path / "a.jsonl"], tmp_path / "x", "text", tokenizer)
    assert list(tmp_path.glob("x*")) == []


def test_tokenizer_tool_reads_all_kinds(tmp_path):
    records = [
        {"image": "a", "text": "cap"},
        {"content": [{"text": "in"}, {"image": "x"}, {"text": "ter"}]},
        {"text": "te"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records * 30)
    assert list(read_texts([path]))[:4] == ["cap", "in", "ter", "te"]
    done = tool("train_tokenizer.py", "--input", path, "--output", tmp_path / "t.model", "--vocab-size", "275")
    assert done.returncode == 0, done.stderr
    assert "275 ids" in done.stdout
    done = tool("train_tokenizer.py", "--input", path, "--output", tmp_path / "u.model", "--vocab-size", "9999")
    assert done.returncode == 2
    assert "at most" in done.stderr


def test_inspect_tool(sources, tmp_path):
    done = tool("inspect_data.py", "stats", sources / "pages", sources / "words")
    assert done.returncode == 0, done.stderr
    assert "90 documents" in done.stdout
    assert "JPEG" in done.stdout
    assert tool("inspect_data.py", "verify", sources / "captions").returncode == 0
    missing = tool("inspect_data.py", "verify", tmp_path / "none")
    assert missing.returncode == 2
    assert "there is no such source" in missing.stderr
