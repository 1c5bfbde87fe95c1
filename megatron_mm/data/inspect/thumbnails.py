"""Small copies of a source's pictures for a page, as data URIs. A picture that does not decode gives its reason."""

import base64
import io
import zlib

from PIL import Image

from megatron_mm.data.ingest.images import BadImageError, decode_rgb

SIDE = 224  # pixels, at most
PAGE_BYTES = 24 << 20  # of thumbnails in a page: browsers open that at once


class Thumbnails:
    """Makes thumbnails until the page is full."""

    def __init__(self, page_bytes: int = PAGE_BYTES) -> None:
        self._left = page_bytes

    def uri(self, data: bytes | memoryview, crc32: int) -> str:
        """`data:image/…;base64,…`. Raises BadImageError with the reason when there is none to show."""
        if self._left <= 0:
            raise BadImageError("left out: the page is full")
        if zlib.crc32(data) != crc32:
            raise BadImageError("the bytes have changed since ingest")
        kind, content = thumbnail(data)
        self._left -= len(content)
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(data: bytes | memoryview) -> tuple[str, bytes]:
    """`png` or `jpeg`, whichever is smaller, and the encoded picture of at most SIDE × SIDE pixels."""
    image = Image.fromarray(decode_rgb(data))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88, "subsampling": 0})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        encoded.append((kind, stream.getvalue()))
    return min(encoded, key=lambda item: len(item[1]))
