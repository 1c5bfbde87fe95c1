"""WebDataset's tar shards: whole ones as Python's tarfile sees them, of damaged ones all that is good."""

import gzip
import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.ingest import BadRecord, Picture, Record, Text, webdataset
from megatron_mm.data.ingest.tar import BLOCK, TarError, members
from megatron_mm.data.ingest.webdataset import WebDataset
from megatron_mm.errors import UserError
from tests.unit.data.format_checks import HTML, damaged, parts_of, read_all, read_damaged, reason

Files = list[tuple[str, bytes | tarfile.TarInfo]]


def tar(files: Files, form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in files:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                archive.addfile(info)
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def sample(i: int, **about: Any) -> Files:
    """As img2dataset writes them."""
    about = {"caption": f"caption {i}", "url": f"https://x/{i}.jpg", "key": f"{i:09d}", "status": "success"} | about
    return [
        (f"{i:09d}.jpg", b"picture %d" % i * (50 + 30 * i)),
        (f"{i:09d}.json", json.dumps(about, indent=4).encode()),
        (f"{i:09d}.txt", f"caption {i}".encode()),
    ]


def parts(i: int) -> tuple[Picture, Text]:
    return Picture(b"picture %d" % i * (50 + 30 * i), f"https://x/{i}.jpg"), Text(f" caption {i}")


SHARD = tar([file for i in range(8) for file in sample(i)])
with tarfile.open(fileobj=io.BytesIO(SHARD)) as archive:
    STARTS = [info.offset_data for info in archive.getmembers() if info.name.endswith(".jpg")]  # of a sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("webdataset")


def write(path: Path, files: Files, **more: Any) -> Path:
    path.write_bytes(tar(files, **more))
    return path


def test_a_shard(folder):
    paths = [folder / "00000.tar", folder / "00001.tar"]
    for path in paths:
        path.write_bytes(SHARD)
    records = read_all(WebDataset(), paths, "caption")
    assert parts_of(records) == [parts(i) for i in range(8)] * 2
    assert [record.id for record in records][8:] == [f"{paths[1]}!{i:09d}" for i in range(8)]
    assert [chunk.bytes for chunk in WebDataset().chunks(paths)] == [len(SHARD)] * 2


NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda name: name.strip() and name != "."
)


PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
KINDS = st.sampled_from(("plain", "dir", "link"))


@settings(max_examples=150)
@given(
    st.lists(st.tuples(PATHS, st.integers(0, 2000), KINDS), max_size=6),
    st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
)
def test_members_are_those_of_tarfile(rows, form):
    files: Files = []
    for name, size, kind in rows:
        if kind == "plain":
            files.append((name, b"x" * size))
        else:
            files.append(link(name, "y" * size if kind == "link" else "", {"dir": b"5", "link": b"2"}[kind]))
    data = tar(files, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [
            (info.name, info.isfile(), info.offset_data, info.size) for info in archive.getmembers() if not info.isdir()
        ]
    found = [(m.name.decode(), m.plain, m.offset, m.size) for m in members(io.BytesIO(data))]
    assert [(name.rstrip("/"), *rest) for name, *rest in found] == expected


def test_ustar_names_with_a_prefix_and_several_tars_in_one():
    name = "/".join(["folder" * 6] * 5) + "/a.jpg"
    assert len(name) > 100
    data = tar([(name, b"abc")])
    assert [(m.name.decode(), m.size) for m in members(io.BytesIO(data * 3))] == [(name, 3)] * 3


def test_a_truncated_shard_gives_its_good_samples_then_tells(folder):
    path = folder / "cut.tar"
    end = -(-len(SHARD.rstrip(b"\0")) // BLOCK) * BLOCK  # of the last member
    for cut in sorted({*range(0, end, 97), *range(0, end + BLOCK, BLOCK)}):
        path.write_bytes(SHARD[:cut])
        records = read_damaged(WebDataset(), path, "caption")
        if cut < BLOCK:
            assert records is None
            continue
        assert records is not None
        last = records.pop()
        assert isinstance(last, BadRecord)
        assert last.damaged_input
        assert last.reason.startswith("truncated: ")
        assert parts_of(records) == [parts(i) for i in range(len(records))]
        assert len(records) == max(0, sum(start <= cut for start in STARTS) - 1)  # the last may lack more than is seen
        assert last.id == f"{path}!{len(records):09d}"
    path.write_bytes(SHARD[: end + BLOCK])  # one block of zeros does
    assert parts_of(read_all(WebDataset(), [path], "caption")) == [parts(i) for i in range(8)]


@settings(max_examples=300)
@given(st.data())
def test_damaged_shards(folder, data):
    path = folder / "damaged.tar"
    path.write_bytes(data.draw(damaged(SHARD)))
    records = read_damaged(WebDataset(), path, "caption")
    if records:
        assert not any(record.damaged_input for record in records[:-1] if isinstance(record, BadRecord))


BAD: dict[str, Files] = {
    "no picture: members json, txt": sample(1)[1:],
    "no caption: members jpg": sample(1)[:1],
    "no caption: members jpg, json": [sample(1)[0], ("000000001.json", b'{"caption": null}')],
    "no text": [sample(1)[0], ("000000001.txt", b" \n")],
    "more than one picture: members jpg, png, txt": [*sample(1)[::2], ("000000001.png", b"x")],
    "a member stands there twice: .txt": [*sample(1), ("000000001.txt", b"x")],
    "a member stands there twice: .jpg": [sample(1)[0], *sample(1)],
    "caption is not UTF-8": [sample(1)[0], ("000000001.txt", b"\xff\xfe")],
    '"caption" holds half a surrogate pair': [sample(1)[0], ("000000001.json", b'{"caption": "\\ud800"}')],
    '"caption" is no string': [sample(1)[0], ("000000001.json", b'{"caption": ["x"]}')],
    "not JSON": [sample(1)[0], ("000000001.json", b"[" * 100_000)],
    "not a JSON object": [sample(1)[0], ("000000001.json", b"3"), sample(1)[2]],
    "a member is no plain file: .jpg": [link("000000001.jpg", "/etc/passwd"), *sample(1)[1:]],
    "a member is no plain file: .txt": [sample(1)[0], link("000000001.txt", "../../x", tarfile.LNKTYPE)],
    "a member is no plain file: .png": [link("000000001.png", "", tarfile.FIFOTYPE), *sample(1)[1:]],
}  # fmt: skip


@pytest.mark.parametrize("told", BAD)
def test_bad_samples(folder, told):
    path = write(folder / "bad.tar", [*sample(0), *BAD[told], *sample(2)])
    first, bad, last = read_all(WebDataset(), [path], "caption")
    assert parts_of([first, last]) == [parts(0), parts(2)]
    assert bad.id == f"{path}!000000001"
    assert reason([bad]).startswith(told)


def test_odd_samples_that_are_fine(folder):
    files: Files = [
        *[("a/../../b\n.PNG", b"png"), ("a/../../b\n.Txt", " “two\n lines” \r\n".encode())],
        *[("./c.cls", b"3"), ("./c.webp", b"webp"), ("./c.json", b'{"caption": " x ", "url": 3}')],
        ("./._c.webp", b"mac"),
        (".DS_Store", b"mac"),
        *[("./d.jpg", b"jpg"), ("./d.txt", b"d"), ("./d.json", b'{"url": "\\udc00", "caption": 3}')],
    ]  # fmt: skip
    records = read_all(WebDataset(), [write(folder / "odd.tar", files)], "caption")
    assert parts_of(records) == [
        (Picture(b"png"), Text(" “two\n lines”")),
        (Picture(b"webp"), Text(" x")),
        (Picture(b"jpg"), Text(" d")),
    ]


def test_a_name_that_is_no_utf8(folder):
    data = tar([("000000000.jpg", b"x"), ("000000000.txt", b"y")])
    for block in (0, 2 * BLOCK):
        header = bytearray(data[block : block + BLOCK])
        header[0] = 0xFF
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
        data = data[:block] + header + data[block + BLOCK :]
    path = folder / "name.tar"
    path.write_bytes(data)
    (record,) = read_all(WebDataset(), [path], "caption")
    assert record.id == f"{path}!�00000000"
    assert isinstance(record, Record)


def with_size(field: bytes, kind: bytes = b"0") -> bytes:
    """The header of a picture that claims a size."""
    header = bytearray(tarfile.TarInfo("000000005.jpg").tobuf())
    header[124:136], header[156:157] = field.ljust(12, b"\0"), kind
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    return bytes(header)


def without_end(files: Files) -> bytes:
    data = tar(files)
    return data[: -(-len(data.rstrip(b"\0")) // BLOCK) * BLOCK]


def read_in_little_memory(path: Path) -> list[Record | BadRecord]:
    tracemalloc.start()
    try:
        records = read_all(WebDataset(), [path], "caption")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    return records


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"K", b"S"])
@pytest.mark.parametrize("size", [b"77777777777", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12, b"9z", b"-1"])
def test_headers_that_claim_absurd_sizes(folder, kind, size):
    path = folder / "absurd.tar"
    path.write_bytes(without_end([*sample(0), *sample(1)]) + with_size(size, kind) * 3)
    *good, bad = read_in_little_memory(path)
    assert isinstance(bad, BadRecord)
    assert bad.damaged_input
    assert parts_of(good) in ([parts(0)], [parts(0), parts(1)])  # where the header tells that no member of 1 follows


@pytest.mark.parametrize("kind", [b"0", b"x"])
def test_large_members_are_not_read(folder, kind):
    """One of 9 GB that is there, in a file with a hole: a picture, or an extended header."""
    path, size = folder / "large.tar", 9 << 30
    with path.open("wb") as file:
        file.write(without_end([*sample(0), *sample(1)]) + with_size(b"\x80" + size.to_bytes(11, "big"), kind))
        file.seek(size, io.SEEK_CUR)
        file.write(without_end([("000000005.txt", b"x")]) + tar(sample(6)))
    records = read_in_little_memory(path)
    path.unlink()
    if kind == b"x":
        assert parts_of(records[:1]) == [parts(0)]
        assert reason(records[1:]).startswith("damaged: an extended header of 9663676416 bytes")
    else:
        assert parts_of([*records[:2], records[3]]) == [parts(0), parts(1), parts(6)]
        assert reason(records[2:3]).startswith("a member is too large: .jpg, 9663676416 bytes")


def test_a_member_just_too_large(folder, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_MEMBER_BYTES", 5)
    path = write(folder / "size.tar", [("0.jpg", b"12345"), ("0.txt", b"a"), ("1.jpg", b"123456"), ("1.txt", b"a")])
    good, bad = read_all(WebDataset(), [path], "caption")
    assert isinstance(good, Record)
    assert reason([bad]) == "a member is too large: .jpg, 6 bytes, allowed are 5"


@pytest.mark.parametrize("content", [b"", HTML, HTML * 20, gzip.compress(SHARD), b"PAR1" * 300, SHARD[:511]])
def test_what_is_no_tar_file(folder, content):
    path = folder / "none.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no tar file"):
        WebDataset().chunks([path])


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.tar"):
        with pytest.raises(UserError, match="cannot read the input"):
            WebDataset().chunks([path])
    path = tmp_path / "x.tar"
    path.write_bytes(SHARD)
    (chunk,) = WebDataset().chunks([path])
    path.unlink()
    assert reason(list(WebDataset().read(chunk, "caption"))).startswith("cannot read the input: No such file")


def test_an_empty_shard(folder):
    assert read_all(WebDataset(), [write(folder / "empty.tar", [])], "caption") == []


def test_extended_headers_that_lie():
    for content in (
        b"5 path=a\n",
        b"99 path=a\n",
        b"path",
        b"9 path=a\n9",
        b"11 size=-1\n",
        b"12 size=1e9\n",
        b"\xff" * 60,
    ):
        info = with_size(b"%o" % len(content), b"x") + content.ljust(BLOCK, b"\0")
        with pytest.raises(TarError, match="damaged"):
            list(members(io.BytesIO(info + SHARD)))
