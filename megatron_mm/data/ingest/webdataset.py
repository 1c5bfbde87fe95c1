"""Pictures and captions from WebDataset's tar shards, in img2dataset's layout.

    00012.tar:  000120034.jpg  000120034.txt  000120034.json  000120035.jpg …

Members of a sample stand next to each other and share their name up to its first dot (folders count, the case of the
rest doesn't). The caption is the .txt, else "caption" of the .json; the picture's URL is "url" of the .json. Samples
without a picture or a caption are bad records. Hidden files and those of other types are not read, links are not
followed, nothing is unpacked to disk.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from megatron_mm.config import Kind
from megatron_mm.data.ingest import BadRecord, Chunk, Part, Picture, Record
from megatron_mm.data.ingest.fields import FieldError, json_object, text_field, url_field
from megatron_mm.data.ingest.tar import BLOCK, Member, TarError, is_header, members
from megatron_mm.data.ingest.wording import caption_parts
from megatron_mm.errors import UserError

MAX_MEMBER_BYTES = 256 << 20  # a larger member is no picture, caption or JSON: it would fill a worker's memory
_PICTURES = frozenset("avif bmp gif jp2 jpeg jpg png tif tiff webp".split())
_READ = _PICTURES | {"txt", "json"}
_Sample = dict[str, Member | None]  # suffix → member; None: it stands there twice


class WebDataset:
    """The format above. A tar file is a chunk."""

    name = "webdataset"
    kinds: tuple[Kind, ...] = ("caption",)

    def chunks(self, paths: Sequence[Path]) -> list[Chunk]:
        chunks = []
        for path in paths:
            try:
                with path.open("rb") as file:
                    start, size = file.read(BLOCK), os.fstat(file.fileno()).st_size
            except OSError as error:
                raise UserError("cannot read the input", where=str(path), found=error.strerror) from None
            if start != bytes(BLOCK) and not is_header(start):
                raise UserError(
                    "this is no tar file", where=str(path), found=f"{size} bytes, the first are {start[:16]!r}",
                    allowed="an uncompressed tar file", do="download or write it anew; gunzip a .tar.gz",
                )  # fmt: skip
            chunks.append(Chunk(path, 0, size, size))
        return chunks

    def read(self, chunk: Chunk, kind: Kind) -> Iterator[Record | BadRecord]:
        damage, end = "", f"{chunk.path}"
        try:
            with chunk.path.open("rb") as file:
                key, sample = b"", _Sample()
                try:
                    for member in members(file):
                        stem, suffix = _split(member.name)
                        if not stem.rpartition(b"/")[2]:  # .DS_Store, ._000120034.jpg and their like
                            continue
                        if stem != key and sample:
                            yield _record(_id(chunk, key), sample, file)
                            sample = {}
                        key = stem
                        sample[suffix] = None if suffix in sample else member
                except TarError as error:
                    damage = str(error)
                if damage:  # what the last sample held is not known
                    end = _id(chunk, key)
                elif sample:
                    yield _record(_id(chunk, key), sample, file)
        except OSError as error:
            damage = f"cannot read the input: {error.strerror}"
        if damage:
            yield BadRecord(end, damage, damaged_input=True)


def _split(name: bytes) -> tuple[bytes, str]:
    """`a/b.c.JPG` → `a/b`, `c.jpg`."""
    folder, slash, file = name.rpartition(b"/")
    stem, _, suffix = file.partition(b".")
    return folder + slash + stem, suffix.decode("utf-8", "replace").lower()


def _id(chunk: Chunk, key: bytes) -> str:
    return f"{chunk.path}!{key.decode('utf-8', 'replace')}"


def _record(where: str, sample: _Sample, file: IO[bytes]) -> Record | BadRecord:
    try:
        return Record(where, _parts(sample, file))
    except FieldError as error:
        return BadRecord(where, str(error))


def _parts(sample: _Sample, file: IO[bytes]) -> tuple[Part, ...]:
    found = f"members {', '.join(sorted(sample))}"
    pictures = [suffix for suffix in sample if suffix in _PICTURES]
    if len(pictures) != 1:
        raise FieldError(f"{'more than one' if pictures else 'no'} picture: {found}")
    content = {suffix: _read(suffix, member, file) for suffix, member in sample.items() if suffix in _READ}
    about = json_object(content["json"]) if "json" in content else {}
    if "txt" in content:
        try:
            caption = content["txt"].decode()
        except UnicodeDecodeError as error:
            raise FieldError(f"caption is not UTF-8: {error}") from None
    elif about.get("caption") is not None:
        caption = text_field(about["caption"], "caption")
    else:
        raise FieldError(f"no caption: {found}")
    if not caption.strip():
        raise FieldError("no text")
    return caption_parts(Picture(content[pictures[0]], url_field(about.get("url"))), caption)


def _read(suffix: str, member: Member | None, file: IO[bytes]) -> bytes:
    if member is None:
        raise FieldError(f"a member stands there twice: .{suffix}")
    if not member.plain:
        raise FieldError(f"a member is no plain file: .{suffix}")
    if member.size > MAX_MEMBER_BYTES:
        raise FieldError(f"a member is too large: .{suffix}, {member.size} bytes, allowed are {MAX_MEMBER_BYTES}")
    file.seek(member.offset)
    return file.read(member.size)
