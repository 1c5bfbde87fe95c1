"""Captions of COCO: one JSON object, read whole into memory.

    {"images": [{"id": 9, "file_name": "x.jpg", "coco_url": …}, …], "annotations": [{"image_id": 9, "caption": …}, …]}

A document is a picture and one of its captions, as in caption training: five annotations of a picture make five
documents. Files are looked for in folders beside the JSON (see `beside`): annotations/captions_train2017.json finds
train2017/. Other fields are ignored.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mm.config import Kind
from megatron_mm.data.ingest import CHUNK_BYTES, BadRecord, Chunk, Part, Picture, Record
from megatron_mm.data.ingest.beside import PICTURE_BYTES, check_pictures, find_picture, picture_folders
from megatron_mm.data.ingest.fields import FieldError, records, text_field, url_field
from megatron_mm.data.ingest.wording import caption_parts
from megatron_mm.errors import UserError

_ALLOWED = '{"images": [{"id": …, "file_name": …}, …], "annotations": [{"image_id": …, "caption": …}, …]}'
_Id = int | str


class COCO:
    """The format above. A chunk is a range of annotations."""

    name = "coco"
    kinds: tuple[Kind, ...] = ("caption",)

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes

    def chunks(self, paths: Sequence[Path]) -> list[Chunk]:
        chunks: list[Chunk] = []
        step = max(1, self.chunk_bytes // PICTURE_BYTES)
        for path in paths:
            captions = _open(path)
            check_pictures(path, (name for name, _ in captions.images.values() if isinstance(name, str)))
            total = len(captions.annotations)
            for start in range(0, total, step):
                end = min(start + step, total)
                chunks.append(Chunk(path, start, end, (end - start) * PICTURE_BYTES))
        return chunks

    def read(self, chunk: Chunk, kind: Kind) -> Iterator[Record | BadRecord]:
        captions, folders = _open(chunk.path), picture_folders(chunk.path)
        annotations = (
            (f"{chunk.path}:annotations[{number}]", captions.annotations[number])
            for number in range(chunk.start, chunk.end)
        )
        return records(annotations, lambda annotation: _parts(annotation, captions.images, folders))


class _Captions(NamedTuple):
    """What is kept of a file; values are as they came, to be checked a record at a time."""

    images: dict[_Id, tuple[Any, Any]]  # id → file's name, URL
    annotations: list[tuple[Any, Any] | None]  # image's id, caption; None: no object


def _parts(
    annotation: tuple[Any, Any] | None, images: dict[_Id, tuple[Any, Any]], folders: Sequence[Path]
) -> tuple[Part, ...]:
    if annotation is None:
        raise FieldError("the annotation is no object")
    image_id, caption = annotation
    if not _is_id(image_id):
        raise FieldError('"image_id" is missing' if image_id is None else '"image_id" is no id')
    if image_id not in images:
        raise FieldError(f'"image_id" is no image\'s: {ascii(image_id)[:40]}')
    name, url = images[image_id]
    path = find_picture(text_field(name, "file_name"), folders)
    if not path:
        raise FieldError(f"no picture beside the list: {name[:200]!a}")
    if not text_field(caption, "caption").strip():
        raise FieldError("no text")
    return caption_parts(Picture(path, url_field(url)), caption)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _open(path: Path) -> _Captions:
    """A worker that reads several chunks of a file parses it once."""
    try:
        status = path.stat()
        return _parse(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise UserError("cannot read the input", where=str(path), found=error.strerror) from None


@lru_cache(maxsize=1)
def _parse(path: Path, modified: int, size: int) -> _Captions:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError("not JSON", where=str(path), found=error, allowed=_ALLOWED) from None
    except RecursionError:
        raise UserError("not JSON: nested too deeply", where=str(path), allowed=_ALLOWED) from None
    images, annotations = (content.get(n) if isinstance(content, dict) else None for n in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UserError('no COCO captions: no lists "images" and "annotations"', where=str(path), allowed=_ALLOWED)
    captions = _Captions(
        {}, [(a.get("image_id"), a.get("caption")) if isinstance(a, dict) else None for a in annotations]
    )
    if not any(annotation and annotation[1] is not None for annotation in captions.annotations):
        raise UserError(
            'no COCO captions: no annotation has a "caption"', where=str(path), allowed=_ALLOWED,
            do="take captions_*.json, not instances_*.json or another task's",
        )  # fmt: skip
    for image in images:
        if isinstance(image, dict) and _is_id(image.get("id")):
            file = image.get("file_name"), image.get("coco_url")
            if captions.images.setdefault(image["id"], file)[0] != file[0]:
                raise UserError("two images have one id", where=str(path), found=ascii(image["id"]))
    return captions
