"""From a record's fields to the record: text, URLs, paths and JSON checked; what fails gets its reason."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from megatron_mm.data.ingest import BadRecord, Part, Record

T = TypeVar("T")


class FieldError(ValueError):
    """A record cannot be used; the message is the reason that its quarantine tells."""


def text_field(value: Any, name: str = "text") -> str:
    """A string that can be encoded. Raises FieldError."""
    if not isinstance(value, str):
        raise FieldError(f'"{name}" is missing' if value is None else f'"{name}" is no string')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FieldError(f'"{name}" holds half a surrogate pair') from None
    return value


def url_field(value: Any) -> str:
    """A URL, or "" for what is none: URLs serve filters alone, no record is lost for one."""
    try:
        return text_field(value)
    except FieldError:
        return ""


def local_path(value: Any, folder: Path) -> Path:
    """A file named relative to a folder. Raises FieldError."""
    path = text_field(value, "path")
    if not path or "\0" in path:
        raise FieldError('"path" is no path')
    return folder / path


def json_object(data: bytes | str) -> dict[str, Any]:
    """Raises FieldError for anything but one JSON object."""
    try:
        value = json.loads(data)
    except ValueError as error:  # not JSON, or not UTF-8
        raise FieldError(f"not JSON: {error}") from None
    except RecursionError:
        raise FieldError("not JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise FieldError("not a JSON object")
    return value


def records(
    items: Iterable[tuple[str, T] | BadRecord], parts: Callable[[T], tuple[Part, ...]]
) -> Iterator[Record | BadRecord]:
    """Records of items with their ids; what could not be read, or what `parts` raises FieldError for, in its place."""
    for item in items:
        if isinstance(item, BadRecord):
            yield item
            continue
        where, content = item
        try:
            yield Record(where, parts(content))
        except FieldError as error:
            yield BadRecord(where, str(error))
