"""What the tests of every reader share: reading whole inputs, and damaging them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import strategies as st

from megatron_mm.config import Kind
from megatron_mm.data.ingest import BadRecord, Format, Part, Picture, Record, Text
from megatron_mm.errors import UserError

HTML = b"<!DOCTYPE html>\n<html><body><h1>404 Not Found</h1></body></html>\n"


def read_all(form: Format, paths: Sequence[Path], kind: Kind) -> list[Record | BadRecord]:
    return [record for chunk in form.chunks(paths) for record in form.read(chunk, kind)]


def parts_of(records: Sequence[Record | BadRecord]) -> list[tuple[Part, ...]]:
    """Of records that must all be good."""
    assert [record for record in records if isinstance(record, BadRecord)] == []
    return [record.parts for record in records if isinstance(record, Record)]


def reason(records: Sequence[Record | BadRecord]) -> str:
    """Of the only record, which must be bad."""
    (bad,) = records
    assert isinstance(bad, BadRecord)
    return bad.reason


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file cut short, with bits flipped, with a stretch lost, doubled or overwritten; anything but the whole one."""
    data = bytearray(whole)
    start = draw(st.integers(0, len(data) - 1))
    end = min(len(data), start + draw(st.integers(1, 600)))
    match draw(st.sampled_from(("cut", "flip", "lose", "double", "overwrite"))):
        case "cut":
            del data[start:]
        case "flip":
            for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8)):
                data[place] ^= 1 << draw(st.integers(0, 7))
        case "lose":
            del data[start:end]
        case "double":
            data[start:start] = data[start:end]
        case "overwrite":
            data[start:end] = draw(st.sampled_from((b"\xff", b"\0", b"9"))) * (end - start)
    return bytes(data)


def read_damaged(form: Format, path: Path, kind: Kind) -> list[Record | BadRecord] | None:
    """What a damaged file gives; None for a UserError. Whatever it is, it can be told and encoded."""
    try:
        records = read_all(form, [path], kind)
    except UserError as error:
        return None if str(path.parent) in str(error) else pytest.fail(f"this doesn't tell the file: {error}")
    for record in records:
        assert record.id.startswith(str(path))
        if isinstance(record, BadRecord):
            assert record.reason.encode()
        else:
            assert all(part.text.encode() for part in record.parts if isinstance(part, Text))
            assert all(isinstance(part.content, (bytes, Path)) for part in record.parts if isinstance(part, Picture))
    return records
