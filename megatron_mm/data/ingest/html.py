"""Interleaved documents from HTML pages that lie with their pictures in a folder: one document a page.

An input is a folder, of which all pages (.html, .htm, .xhtml) are read, or one page. What is read of a page tells
`html_page`. A picture is a file below the input's folder (below the page's, where the input is a page), named relative
to its page, or a data: URL. Left out, while the page stays, are pictures that are not at hand or not ours to take: of
other hosts, absolute paths and file: URLs, whatever lies outside the folder (also by ".." or through a link), files
that do not exist, and SVG drawings, which no decoder of ours reads. `alt` is not text.

Decoration (icons, logos) is known by its size and by how often it comes back: the build's filters drop it. For them a
picture's URL is its path below the folder, behind a number that stands for the folder: a filter for words must not look
at where a user keeps the pages.
"""

import base64
import binascii
import codecs
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from megatron_mm.config import Kind
from megatron_mm.data.ingest import CHUNK_BYTES, BadRecord, Chunk, Part, Picture, Record, Text
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.fields import FieldError, records
from megatron_mm.data.ingest.html_page import load_parser, read_page
from megatron_mm.errors import UserError

MAX_PAGE_BYTES = 64 << 20
_PAGES = (".html", ".htm", ".xhtml")
_DRAWINGS = (".svg", ".svgz")

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_DECLARED = re.compile(
    rb"""<(?:meta\b[^>]*?\bcharset|\?xml\b[^>]*?\bencoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE
)
_TRUSTED = re.compile(r"utf-8|cp\d+|iso8859-\d+|koi8-[ru]|big5.*|gb.*|euc_.*|shift_jis.*|iso2022_jp.*|mac-.*")
_LARGER = {  # what browsers take for it: pages often use more than they declare
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "gb2312": "gb18030", "gbk": "gb18030",
    "shift_jis": "cp932", "euc_kr": "cp949",
}  # fmt: skip
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
_MAX_CONTROLS = 0.01  # of a page's characters; binary data has more
_TAG = re.compile("<[a-zA-Z!?/]")


class HTML:
    """The format above. A chunk is a range of a folder's pages, in their order by name."""

    name = "html"
    kinds: tuple[Kind, ...] = ("interleaved",)

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes

    def chunks(self, paths: Sequence[Path]) -> list[Chunk]:
        load_parser()
        chunks: list[Chunk] = []
        for path in paths:
            pages = _pages(path)
            first, size = 0, 0
            for number, page in enumerate(pages):
                size += (page.stat().st_size if page.is_file() else 0) + PICTURE_BYTES
                if size >= self.chunk_bytes or number == len(pages) - 1:
                    chunks.append(Chunk(path, first, number + 1, size))
                    first, size = number + 1, 0
        return chunks

    def read(self, chunk: Chunk, kind: Kind) -> Iterator[Record | BadRecord]:
        folder = chunk.path if chunk.path.is_dir() else chunk.path.parent
        pages = ((_shown(page), page) for page in _pages(chunk.path)[chunk.start : chunk.end])
        return records(pages, lambda page: _parts(page, folder))


def _pages(path: Path) -> list[Path]:
    """The pages of an input in their order. Raises UserError where there is none."""
    if not path.is_dir():
        if not path.is_file():
            raise UserError("cannot read the input", where=_shown(path), found="neither a file nor a folder")
        return [path]

    def fail(error: OSError) -> None:
        raise UserError("cannot read the folder", where=str(error.filename), found=error.strerror)

    pages = [
        Path(folder, name)
        for folder, _, names in os.walk(path, onerror=fail)
        for name in names
        if name.lower().endswith(_PAGES)
    ]
    if not pages:
        raise UserError("there are no pages in this folder", where=str(path), allowed="files " + ", ".join(_PAGES))
    return sorted(pages, key=os.fsencode)


def _shown(path: Path) -> str:
    """A name that can be written down, whatever its bytes are."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _parts(page: Path, folder: Path) -> tuple[Part, ...]:
    try:
        if not page.is_file():  # a link that leads nowhere; a pipe, which one could wait for
            raise FieldError("cannot read the page: no file")
        with page.open("rb") as file:
            data = file.read(MAX_PAGE_BYTES + 1)
    except OSError as error:
        raise FieldError(f"cannot read the page: {error.strerror}") from None
    if len(data) > MAX_PAGE_BYTES:
        raise FieldError(f"page too large: more than {MAX_PAGE_BYTES >> 20} MiB")
    inside = os.path.realpath(folder)
    text = _decode(data)
    try:
        parts = read_page(text, lambda src: _picture(src.strip(), page, inside))
    except ValueError as error:
        raise FieldError(f"not HTML: {error}") from None
    if not any(isinstance(part, Text) and part.text.strip() for part in parts):
        raise FieldError("no text")
    return parts


def _decode(data: bytes) -> str:
    """A page's characters, by its byte order mark, its declaration, as UTF-8, or as browsers guess: Windows-1252."""
    declared = _DECLARED.search(data[:4096])
    for mark, name in _BOMS:
        if data.startswith(mark):
            text = data.decode(name, errors="replace")
            break
    else:
        try:
            text = data.decode(_codec(declared[1].decode()) if declared else "utf-8")
        except UnicodeDecodeError as error:
            text = data.decode("cp1252" if error.encoding == "utf-8" and not declared else error.encoding, "replace")
    if not text.strip():
        raise FieldError("no text: the page is empty")
    if len(_CONTROLS.findall(text)) > _MAX_CONTROLS * len(text):
        raise FieldError("not HTML: binary data")
    if not _TAG.search(text):
        raise FieldError("not HTML: no tag")
    return _CONTROLS.sub("", text)


def _codec(label: str) -> str:
    """Python's name for a declared encoding; UTF-8 for one that is unknown, or no encoding of text."""
    try:
        name = codecs.lookup(label).name
    except LookupError:
        return "utf-8"
    return _LARGER.get(name, name if _TRUSTED.fullmatch(name) else "utf-8")


def _picture(src: str, page: Path, inside: str) -> Picture | None:
    if src[:5].lower() == "data:":
        return _data_picture(src[5:])
    try:
        parts = urlsplit(src)
    except ValueError:
        return None
    path = unquote(parts.path)
    if parts.scheme or parts.netloc or not path or path.startswith("/") or "\0" in path:
        return None
    if path.lower().endswith(_DRAWINGS):
        return None
    file = os.path.realpath(page.parent / path)
    if os.path.commonpath((file, inside)) != inside or not os.path.isfile(file):
        return None
    return Picture(Path(file), f"{zlib.crc32(os.fsencode(inside)):08x}/{_shown(Path(file).relative_to(inside))}")


def _data_picture(url: str) -> Picture | None:
    head, comma, body = url.partition(",")
    form = head.lower().replace(" ", "")
    if not comma or not form.endswith(";base64") or form.startswith("image/svg"):
        return None
    try:
        return Picture(base64.b64decode(re.sub(rb"\s", b"", unquote_to_bytes(body)), validate=True))
    except binascii.Error:
        return None
