"""Interleaved documents of Multimodal C4: JSON lines, plain, .gz, .zst or .zip (as published).

    {"text_list": [sentence, …], "image_info": [{"image_name": …, "matched_text_index": i, "raw_url": …}, …]}

A picture stands before the sentence that it was matched to, as in OpenFlamingo's and VILA's training; several at one
sentence in the list's order. Sentences are joined by a space. A picture is "image_base64" where an image has it
(OpenFlamingo's conversion), else the file "image_name" in a folder beside the list (see `beside`). Many of the set's
links are dead: a picture whose file is not there is left out, its document stays. Other fields are ignored.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mm.config import Kind
from megatron_mm.data.ingest import CHUNK_BYTES, BadRecord, Chunk, Part, Picture, Record, Text
from megatron_mm.data.ingest.beside import check_pictures, find_picture, picture_folders
from megatron_mm.data.ingest.fields import FieldError, json_object, records, text_field, url_field
from megatron_mm.data.ingest.lines import line_chunks, read_lines
from megatron_mm.data.ingest.wording import document_parts


class MMC4:
    """The format above. A chunk is a range of bytes."""

    name = "mmc4"
    kinds: tuple[Kind, ...] = ("interleaved",)

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes

    def chunks(self, paths: Sequence[Path]) -> list[Chunk]:
        chunks = line_chunks(paths, self.chunk_bytes, lambda line: len(list(_names_in(line))))
        for path, first in {chunk.path: chunk for chunk in reversed(chunks)}.items():
            check_pictures(path, _names(first))
        return chunks

    def read(self, chunk: Chunk, kind: Kind) -> Iterator[Record | BadRecord]:
        folders = picture_folders(chunk.path)
        return records(read_lines(chunk), lambda line: _parts(json_object(line), folders))


def _names(chunk: Chunk) -> Iterator[str]:
    """Files that the records of a chunk name; none from the first record on that holds its pictures itself."""
    for line in read_lines(chunk):
        if isinstance(line, BadRecord):
            continue
        if any("image_base64" in image for image in _images(line[1])):
            return
        yield from _names_in(line[1])


def _names_in(line: bytes) -> Iterator[str]:
    for image in _images(line):
        if "image_base64" not in image and isinstance(image.get("image_name"), str):
            yield image["image_name"]


def _images(line: bytes) -> list[dict[str, Any]]:
    """What a line gives as images, none where it is no record."""
    try:
        images = json_object(line).get("image_info")
    except FieldError:
        return []
    return [image for image in images if isinstance(image, dict)] if isinstance(images, list) else []


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise FieldError(f'"{name}" is missing' if value is None else f'"{name}" is no list')
    return value


def _parts(record: dict[str, Any], folders: Sequence[Path]) -> tuple[Part, ...]:
    sentences = [text_field(sentence, "text_list") for sentence in _list(record, "text_list")]
    before: list[list[Picture]] = [[] for _ in sentences]
    for image in _list(record, "image_info"):
        if not isinstance(image, dict):
            raise FieldError('an image of "image_info" is no object')
        index = image.get("matched_text_index")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(sentences):
            raise FieldError(f'"matched_text_index" is no index of "text_list": of {len(sentences)} sentences')
        if picture := _picture(image, folders):
            before[index].append(picture)
    blocks: list[Picture | str] = []
    run: list[str] = []
    for sentence, pictures in zip(sentences, before, strict=True):
        if pictures:
            blocks += [" ".join(run), *pictures]
            run = []
        if sentence.strip():
            run.append(sentence.strip())
    parts = document_parts([*blocks, " ".join(run)])
    if not any(isinstance(part, Text) for part in parts):
        raise FieldError("no text")
    return parts


def _picture(image: dict[str, Any], folders: Sequence[Path]) -> Picture | None:
    url = url_field(image.get("raw_url"))
    if "image_base64" in image:
        try:
            return Picture(base64.b64decode(text_field(image["image_base64"], "image_base64"), validate=True), url)
        except binascii.Error as error:
            raise FieldError(f'"image_base64" does not decode: {error}') from None
    path = find_picture(text_field(image.get("image_name"), "image_name"), folders)
    return Picture(path, url) if path else None
