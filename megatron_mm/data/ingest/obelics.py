"""Interleaved documents from Parquet in the form of OBELICS: two lists of one length, `images` and `texts`, a row.

One of the two is set at a place: images [A, None, B], texts [None, "words", None] is A, words, B. Where both are None
a picture is not at hand, and left out. Pictures are what teams hold:

    bytes           images is a list of bytes, or of structs of "bytes" and "path" (Hugging Face)
    paths           strings without "://": files, relative to the Parquet file's folder
    URLs            strings with "://", as in the public set: a manifest beside NAME.parquet, NAME.images.jsonl or else
                    images.jsonl, says where each was stored: {"url": "https://…", "path": "00000/000000012.jpg"}, the
                    path relative to the manifest's folder; "path": null for one that could not be fetched, which is
                    left out. A URL that the manifest does not know makes a bad record.

A manifest is held in memory by each worker that reads its Parquet file: one a Parquet file suits large sets. Optional
column `metadata`: JSON, a list as long as images; its "src" is the URL of a picture that is given as bytes or a path.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_mm.config import Kind
from megatron_mm.data.ingest import CHUNK_BYTES, BadRecord, Chunk, Part, Picture, Record, Text
from megatron_mm.data.ingest.fields import FieldError, json_object, local_path, records, text_field, url_field
from megatron_mm.data.ingest.lines import line_chunks, read_lines
from megatron_mm.data.ingest.parquet import picture_of
from megatron_mm.data.ingest.parquet_file import find_column, open_parquet, read_rows, row_group_chunks, wrong_columns
from megatron_mm.data.ingest.wording import document_parts
from megatron_mm.errors import UserError

_Manifest = dict[str, Path | None]  # URL → file; None: it could not be fetched
_SAMPLE = 100  # rows at a file's start, to see what their pictures are
_COLUMNS = "images (a list of bytes, of structs with bytes, or of strings) and texts (a list of strings)"


class Obelics:
    """The format above. A chunk is a range of row groups."""

    name = "obelics"
    kinds: tuple[Kind, ...] = ("interleaved",)

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes

    def chunks(self, paths: Sequence[Path]) -> list[Chunk]:
        return row_group_chunks(paths, self.chunk_bytes, _check)

    def read(self, chunk: Chunk, kind: Kind) -> Iterator[Record | BadRecord]:
        with open_parquet(chunk.path) as file:
            columns = [name for name in _columns(chunk.path, file) if name]
            manifest = _read_manifest(_manifest_of(chunk.path))
            yield from records(read_rows(file, chunk, columns), lambda row: _parts(row, chunk.path.parent, manifest))


def _columns(path: Path, file: Any) -> tuple[str, str, str]:
    """Names of the columns of images, texts and, or "", of metadata."""
    schema = file.schema_arrow
    images = find_column(schema, ("images",), "list of picture")
    texts = find_column(schema, ("texts",), "list of string")
    if not images or not texts:
        raise wrong_columns(path, file, "not in the form of OBELICS", _COLUMNS)
    return images, texts, find_column(schema, ("metadata",), "string")


def _check(path: Path, file: Any) -> float:
    """How many pictures a row names that lie elsewhere, by the first rows. For URLs there must be a manifest."""
    images = _columns(path, file)[0]
    first = Chunk(path, 0, min(1, file.metadata.num_row_groups), 0)
    places: list[list[str]] = []  # of a row's pictures
    for row in islice(read_rows(file, first, [images]), _SAMPLE):
        given = [] if isinstance(row, BadRecord) else [_content(image) for image in row[1][0] or ()]
        if any(isinstance(image, bytes) for image in given):
            return 0.0
        places.append([image for image in given if image])
    url = next((place for row in places for place in row if _is_url(place)), None)
    if url and _manifest_of(path) is None:
        raise UserError(
            "the images are URLs, and no manifest says where they are stored", where=str(path), found=url,
            allowed=f'{path.stem}.images.jsonl or images.jsonl beside it: {{"url": …, "path": … or null}}',
            do="fetch the images (img2dataset does), write the manifest",
        )  # fmt: skip
    return sum(map(len, places)) / max(1, len(places))


def _content(image: Any) -> Any:
    """Bytes, a path or a URL; None for a hole."""
    return image["path" if image["bytes"] is None else "bytes"] if isinstance(image, dict) else image


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and "://" in value


def _manifest_of(path: Path) -> Path | None:
    places = (path.with_name(f"{path.stem}.images.jsonl"), path.with_name("images.jsonl"))
    return next((place for place in places if place.is_file()), None)


def _read_manifest(path: Path | None) -> _Manifest:
    manifest: _Manifest = {}
    for chunk in line_chunks([path]) if path else ():
        for line in read_lines(chunk):
            try:
                if isinstance(line, BadRecord):
                    raise FieldError(line.reason)
                entry = json_object(line[1])
                url, file = text_field(entry.get("url"), "url"), entry.get("path")
                manifest[url] = None if file is None else local_path(file, chunk.path.parent)
            except FieldError as error:
                where = line.id if isinstance(line, BadRecord) else line[0]
                raise UserError(
                    "not a manifest's line", where=where, found=error, allowed='{"url": …, "path": … or null}'
                ) from None
    return manifest


def _urls(metadata: list[Any]) -> list[str]:
    """Where a row's pictures came from, by their place; as far as its metadata can be read."""
    try:
        entries = json.loads(metadata[0])
        return [url_field(entry.get("src")) if isinstance(entry, dict) else "" for entry in entries]
    except (IndexError, TypeError, ValueError, RecursionError):
        return []


def _parts(row: Sequence[Any], folder: Path, manifest: _Manifest) -> tuple[Part, ...]:
    images, texts, *metadata = row
    if images is None or texts is None:
        raise FieldError('"images" is missing' if images is None else '"texts" is missing')
    if len(images) != len(texts):
        raise FieldError(f"lists of two lengths: {len(images)} images, {len(texts)} texts")
    urls = _urls(metadata)
    if len(urls) != len(images):
        urls = [""] * len(images)
    blocks: list[Picture | str] = []
    for image, text, url in zip(images, texts, urls, strict=True):
        if image is not None and text is not None:
            raise FieldError("a picture and a text at one place")
        if text is not None:
            blocks.append(text_field(text))
        elif image is not None and (picture := _picture(image, url, folder, manifest)):
            blocks.append(picture)
    parts = document_parts(blocks)
    if not any(isinstance(part, Text) for part in parts):
        raise FieldError("no text")
    return parts


def _picture(image: Any, url: str, folder: Path, manifest: _Manifest) -> Picture | None:
    if isinstance(image, dict):
        url = url or (image["path"] if _is_url(image.get("path")) else "")
        image = _content(image)
    if not _is_url(image):
        return picture_of(image, folder, url)
    if image not in manifest:
        raise FieldError(f"no picture: the manifest does not know {image}")
    file = manifest[image]
    return Picture(file, image) if file else None
