"""One record to one document: text encoded, pictures checked and filtered."""

import os
import stat
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_mm.data.ingest import BadRecord, Picture, Record, Text
from megatron_mm.data.ingest.filters import Filters, url_hash
from megatron_mm.data.ingest.images import BadImageError, StoredImage, read_header, store
from megatron_mm.data.tokenizer import Tokenizer

NO_FILTERS = Filters()


@dataclass(frozen=True)
class Document:
    """What a source keeps of a record, as `SourceWriter.add` takes it."""

    id: str
    tokens: list[int]
    images: list[StoredImage]
    loss: list[tuple[int, int]] | None = None
    urls: list[int] = field(default_factory=list)  # `url_hash` of each picture
    dropped: Counter[str] = field(default_factory=Counter)  # pictures filtered, by reason


def make_document(
    record: Record, tokenizer: Tokenizer, max_pixels: int, filters: Filters = NO_FILTERS
) -> Document | BadRecord:
    """Tokens and stored pictures of a record, or why there are none.

    The end of the document is trained on when its last text is.
    """
    document = Document(record.id, [tokenizer.bos_id], [])
    trained: list[tuple[int, int]] = []
    page: set[object] = set()  # URLs and hashes of the pictures kept
    last = everything = True
    try:
        for part in record.parts:
            if isinstance(part, Text):
                start = len(document.tokens)
                document.tokens.extend(tokenizer.encode(part.text))
                last, everything = part.trained, everything and part.trained
                if part.trained:
                    _append(trained, start, len(document.tokens))
            elif fault := _take(part, document, page, max_pixels, filters):
                document.dropped[fault] += 1
            else:
                document.tokens.append(tokenizer.image_id)
    except _BadPictureError as error:
        return BadRecord(record.id, str(error))
    except UnicodeEncodeError:
        return BadRecord(record.id, "text holds half a surrogate pair")
    document.tokens.append(tokenizer.eos_id)
    if last:
        _append(trained, len(document.tokens) - 1, len(document.tokens))
    if everything:
        return document
    if not trained:
        return BadRecord(record.id, "no text is trained on")
    return replace(document, loss=trained)


def _append(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """One more range of tokens; empty ones are left out, neighbours joined."""
    if start == end:
        return
    if ranges and ranges[-1][1] == start:
        start = ranges.pop()[0]
    ranges.append((start, end))


class _BadPictureError(ValueError):
    """A picture that puts its document into quarantine."""


def _take(picture: Picture, document: Document, page: set[object], max_pixels: int, filters: Filters) -> str:
    """Add a picture to the document, or answer with the filter's reason that it goes."""
    if fault := filters.url_fault(picture.url):
        return fault
    if filters.first_on_page and picture.url and picture.url in page:
        return "URL repeated in its document"
    data, name = picture.content, f"image {len(document.images)}"
    try:
        if isinstance(data, Path):
            name = f"image {data}"
            data = _read(data)
        if filters.looks_at_size and (fault := filters.size_fault(*read_header(data, max_pixels).size)):
            return fault
        image = store(data, max_pixels)
    except OSError as error:
        raise _BadPictureError(f"{error.strerror}: {name}") from None
    except BadImageError as error:
        if filters.drop_corrupt_images:
            return f"corrupt, {str(error).partition(':')[0]}"
        raise _BadPictureError(f"{error}: {name}") from None
    if filters.first_on_page and image.hash in page:
        return "bytes repeated in their document"
    page.update((picture.url, image.hash))
    document.images.append(image)
    document.urls.append(url_hash(picture.url))
    return ""


def _read(path: Path) -> bytes:
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a pipe could last for ever
        raise OSError(0, "No regular file")
    return path.read_bytes()
