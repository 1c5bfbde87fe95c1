"""Records from JSON Lines, one a line.

    caption      {"image": IMAGE, "text": "…"}
    interleaved  {"content": [{"image": IMAGE} | {"text": "…"}, …]}
    text         {"text": "…"}

IMAGE is a path relative to the file's folder ("a.jpg" or {"path": "a.jpg"}) or {"base64": "…"}. Other fields are
ignored. The text is taken as it is: the space between a picture and its caption is the user's to write.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_mm.config import Kind
from megatron_mm.data.ingest import BadRecord, Part, Picture, Record, Text
from megatron_mm.errors import UserError

Progress = Callable[[int, int], None]  # bytes read, bytes in all


class _BadError(ValueError):
    pass


def _text(value: Any, name: str = "text") -> str:
    if not isinstance(value, str):
        raise _BadError(f'"{name}" is missing' if value is None else f'"{name}" is no string')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadError(f'"{name}" holds half a surrogate pair') from None
    return value


def _image(value: Any, folder: Path) -> Picture:
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, dict) or len({"path", "base64"} & value.keys()) != 1:
        raise _BadError('"image" is missing' if value is None else '"image" has neither one "path" nor one "base64"')
    if "path" in value:
        path = _text(value["path"], "path")
        if not path or "\0" in path:
            raise _BadError('"path" is no path')
        return Picture(folder / path)
    try:
        return Picture(base64.b64decode(_text(value["base64"], "base64"), validate=True))
    except (binascii.Error, ValueError) as error:
        raise _BadError(f'"base64" does not decode: {error}') from None


def _part(item: Any, folder: Path) -> Part:
    if not isinstance(item, dict) or len({"text", "image"} & item.keys()) != 1:
        raise _BadError('a part of "content" has neither one "text" nor one "image"')
    return Text(_text(item["text"])) if "text" in item else _image(item["image"], folder)


def _parts(line: bytes, kind: Kind, folder: Path) -> tuple[Part, ...]:
    try:
        record = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise _BadError(f"not JSON: {error}") from None
    except RecursionError:
        raise _BadError("not JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise _BadError("not a JSON object")
    if kind == "interleaved":
        content = record.get("content")
        if not isinstance(content, list):
            raise _BadError('"content" is missing' if content is None else '"content" is no list')
        parts: tuple[Part, ...] = tuple(_part(item, folder) for item in content)
    elif kind == "caption":
        parts = (_image(record.get("image"), folder), Text(_text(record.get("text"))))
    else:
        parts = (Text(_text(record.get("text"))),)
    if not any(isinstance(part, Text) and part.text for part in parts):
        raise _BadError("no text")
    return parts


def _open_all(paths: list[Path]) -> int:
    """Size of all files in bytes. Raises UserError for the first that cannot be read: before any work is done."""
    total = 0
    for path in paths:
        try:
            with path.open("rb"):
                total += path.stat().st_size
        except OSError as error:
            raise UserError("cannot read the input", where=str(path), found=error.strerror) from None
    return total


def read_records(paths: list[Path], kind: Kind, progress: Progress | None = None) -> Iterator[Record | BadRecord]:
    """All records of the files in order, bad ones in their place. Empty lines are no records."""
    total = _open_all(paths)
    done = 0
    for path in paths:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                done += len(line)
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    yield Record(where, _parts(line, kind, path.parent))
                except _BadError as error:
                    yield BadRecord(where, str(error))
                if progress:
                    progress(done, total)


def read_texts(paths: list[Path]) -> Iterable[str]:
    """The texts of files of any of the three kinds, told apart line by line; what cannot be read is left out."""
    _open_all(paths)
    for path in paths:
        with path.open("rb") as lines:
            for line in lines:
                for kind in ("interleaved", "text"):
                    try:
                        parts = _parts(line, kind, path.parent)
                    except _BadError:
                        continue
                    yield from (part.text for part in parts if isinstance(part, Text))
                    break
