"""Records from JSON Lines, one a line, in a plain file or one compressed by gzip or Zstandard.

    caption      {"image": IMAGE, "text": "…"}
    interleaved  {"content": [{"image": IMAGE} | {"text": "…"}, …]}
    text         {"text": "…"}

IMAGE is a path relative to the file's folder ("a.jpg" or {"path": "a.jpg"}) or {"base64": "…"}; beside "path" or
"base64" may stand the "url" that it came from, for filters. Other fields are ignored. The text is taken as it is: the
space between a picture and its caption is the user's to write.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mm.config import Kind
from megatron_mm.data.ingest import CHUNK_BYTES, BadRecord, Chunk, Part, Picture, Record, Text
from megatron_mm.data.ingest.fields import FieldError, json_object, local_path, records, text_field, url_field
from megatron_mm.data.ingest.lines import first_lines, line_chunks, read_lines
from megatron_mm.data.ingest.parquet import Parquet

_TEXT_SHARE = 4  # text alone is cut that finer: tokenizing takes longer, byte for byte, than decoding pictures


class JSONLines:
    """The format above. A chunk is a range of bytes."""

    name = "jsonl"
    kinds: tuple[Kind, ...] = ("caption", "interleaved", "text")

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes

    def chunks(self, paths: Sequence[Path]) -> list[Chunk]:
        return [chunk for path in paths for chunk in line_chunks([path], self._size(path), _pictures_elsewhere)]

    def _size(self, path: Path) -> int:
        """By a file's first lines."""
        return self.chunk_bytes if any(map(_images, first_lines(path))) else max(1, self.chunk_bytes // _TEXT_SHARE)

    def read(self, chunk: Chunk, kind: Kind) -> Iterator[Record | BadRecord]:
        return records(read_lines(chunk), lambda line: _parts(json_object(line), kind, chunk.path.parent))


def _images(line: bytes) -> list[Any]:
    """What a line gives as images, unchecked."""
    try:
        record = json_object(line)
    except FieldError:
        return []
    content = record.get("content")
    items = [item.get("image") for item in content if isinstance(item, dict)] if isinstance(content, list) else []
    return [image for image in (record.get("image"), *items) if image is not None]


def _pictures_elsewhere(line: bytes) -> int:
    return sum(isinstance(image, str) or (isinstance(image, dict) and "path" in image) for image in _images(line))


def _image(value: Any, folder: Path) -> Picture:
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, dict) or len({"path", "base64"} & value.keys()) != 1:
        raise FieldError('"image" is missing' if value is None else '"image" has neither one "path" nor one "base64"')
    url = url_field(value.get("url"))
    if "path" in value:
        return Picture(local_path(value["path"], folder), url)
    try:
        return Picture(base64.b64decode(text_field(value["base64"], "base64"), validate=True), url)
    except (binascii.Error, ValueError) as error:
        raise FieldError(f'"base64" does not decode: {error}') from None


def _part(item: Any, folder: Path) -> Part:
    if not isinstance(item, dict) or len({"text", "image"} & item.keys()) != 1:
        raise FieldError('a part of "content" has neither one "text" nor one "image"')
    return Text(text_field(item["text"])) if "text" in item else _image(item["image"], folder)


def _parts(record: dict[str, Any], kind: Kind, folder: Path) -> tuple[Part, ...]:
    if kind == "interleaved":
        content = record.get("content")
        if not isinstance(content, list):
            raise FieldError('"content" is missing' if content is None else '"content" is no list')
        parts: tuple[Part, ...] = tuple(_part(item, folder) for item in content)
    elif kind == "caption":
        parts = (_image(record.get("image"), folder), Text(text_field(record.get("text"))))
    else:
        parts = (Text(text_field(record.get("text"))),)
    if not any(isinstance(part, Text) and part.text for part in parts):
        raise FieldError("no text")
    return parts


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """The texts of files of any of the three kinds, told apart line by line; what cannot be read is left out.

    Of a Parquet file, the texts of its column "text", else its captions.
    """
    tables = Parquet()
    chunks = [
        (path, chunk) for path in paths for chunk in (tables.chunks if _is_parquet(path) else line_chunks)([path])
    ]
    for path, chunk in chunks:
        if _is_parquet(path):
            yield from tables.texts(chunk)
            continue
        for line in read_lines(chunk):
            if not isinstance(line, BadRecord):
                yield from _texts(line[1], path.parent)


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _texts(line: bytes, folder: Path) -> Iterator[str]:
    for kind in ("interleaved", "text"):
        try:
            parts = _parts(json_object(line), kind, folder)
        except FieldError:
            continue
        yield from (part.text for part in parts if isinstance(part, Text))
        return
