"""Records from Parquet: a picture and its caption, or a text, a row.

    caption   a column of pictures and one of captions; if there is one, "url"
    text      a column "text"

Columns are found by name, upper or lower case alike; of several, the first named here whose type fits:

    picture   jpg, png, webp, image, image_bytes: bytes; a struct of "bytes" and "path" (Hugging Face); or a string, a
              path relative to the file's folder
    caption   caption, txt, text: strings

Rows that img2dataset marks as failed ("status" other than "success", no picture) are no records, as its tar shards do
not hold them either.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mm.config import Kind
from megatron_mm.data.ingest import CHUNK_BYTES, BadRecord, Chunk, Part, Picture, Record, Text
from megatron_mm.data.ingest.fields import FieldError, local_path, text_field, url_field
from megatron_mm.data.ingest.parquet_file import find_column, open_parquet, read_rows, row_group_chunks, wrong_columns
from megatron_mm.data.ingest.wording import caption_parts

_PICTURES = ("jpg", "png", "webp", "image", "image_bytes")
_CAPTIONS = ("caption", "txt", "text")
_TEXTS = ("text",)


class Parquet:
    """The format above. A chunk is a range of row groups."""

    name = "parquet"
    kinds: tuple[Kind, ...] = ("caption", "text")

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes

    def chunks(self, paths: Sequence[Path]) -> list[Chunk]:
        return row_group_chunks(paths, self.chunk_bytes, _check)

    def read(self, chunk: Chunk, kind: Kind) -> Iterator[Record | BadRecord]:
        with open_parquet(chunk.path) as file:
            columns = _columns(file.schema_arrow, kind)
            if columns is None:
                raise _no_columns(chunk.path, file, kind)
            names = [name for name in columns if name]
            for row in read_rows(file, chunk, names):
                if isinstance(row, BadRecord):
                    yield row
                    continue
                where, values = row
                given = dict(zip(names, values, strict=True))
                picture, text, url, status = (given.get(name) for name in columns)
                if kind == "caption" and picture is None and status not in (None, "success"):
                    continue
                try:
                    parts = _caption(picture, text, url, chunk.path.parent) if kind == "caption" else _text(text)
                    yield Record(where, parts)
                except FieldError as error:
                    yield BadRecord(where, str(error))

    def texts(self, chunk: Chunk) -> Iterator[str]:
        """What the rows say, without the pictures; what cannot be read is left out."""
        with open_parquet(chunk.path) as file:
            name = find_column(file.schema_arrow, ("text", *_CAPTIONS), "string")
            for row in read_rows(file, chunk, [name]) if name else ():
                if not isinstance(row, BadRecord) and row[1][0]:
                    yield row[1][0]


def picture_of(value: Any, folder: Path, url: str = "") -> Picture:
    """The picture that a column's value tells: bytes, {"bytes", "path"}, or a path. Raises FieldError."""
    if isinstance(value, dict):
        value = value["path" if value["bytes"] is None else "bytes"]
    if value is None:
        raise FieldError("no picture")
    return Picture(value if isinstance(value, bytes) else local_path(value, folder), url)


def _caption(picture: Any, text: Any, url: Any, folder: Path) -> tuple[Part, ...]:
    if not text_field(text).strip():
        raise FieldError("no text")
    return caption_parts(picture_of(picture, folder, url_field(url)), text)


def _text(text: Any) -> tuple[Part, ...]:
    if not text_field(text):
        raise FieldError("no text")
    return (Text(text),)


def _columns(schema: Any, kind: Kind) -> tuple[str, str, str, str] | None:
    """Names of the columns of picture, text, URL and status; "" for one that is not there or not needed."""
    text = find_column(schema, _CAPTIONS if kind == "caption" else _TEXTS, "string")
    picture = find_column(schema, _PICTURES, "picture")
    if kind == "text":
        return ("", text, "", "") if text else None
    if not text or not picture:
        return None
    return picture, text, find_column(schema, ("url",), "string"), find_column(schema, ("status",), "string")


def _check(path: Path, file: Any) -> float:
    """How many pictures a row names that lie elsewhere: one, should the column of pictures hold paths."""
    schema = file.schema_arrow
    if not any(_columns(schema, kind) for kind in Parquet.kinds):
        raise _no_columns(path, file, "caption")
    return (
        1.0 if find_column(schema, _PICTURES, "picture") == (find_column(schema, _PICTURES, "string") or None) else 0.0
    )


def _no_columns(path: Path, file: Any, kind: Kind) -> Exception:
    allowed = f"a column of strings named {' or '.join(_CAPTIONS if kind == 'caption' else _TEXTS)}"
    if kind == "caption":
        allowed = f"a column of pictures named {' or '.join(_PICTURES)}, and {allowed}"
    return wrong_columns(path, file, f"no columns of kind {kind}", allowed)
