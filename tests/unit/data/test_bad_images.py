"""Odd and bad pictures through the ingest tool: what is kept reads as it should, the rest is told, and nothing else is
printed."""

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from megatron_mm.data.decode import CpuBackend, DaliBackend, Decoder, EncodedImage
from megatron_mm.data.ingest.images import FORMATS, TRANSCODED, BadImageError, decode_rgb, store
from megatron_mm.data.source import verify_source
from tests.unit.data.conftest import picture, write_jsonl
from tests.unit.data.test_images import encoded, huge_png
from tests.unit.data.test_ingest import preprocess

PHOTO = Image.fromarray(picture(3))
FRAMES = [Image.fromarray(picture(i)) for i in range(3)]
GRAY16 = picture(3, colours=1).squeeze().astype(np.uint16) * 257
CLEAR = PHOTO.copy()
CLEAR.putalpha(Image.fromarray(picture(5, colours=1).squeeze()))

# The picture, the format it is stored in, and whether that is its own bytes.
ODD = {
    "gray16.png": (encoded(Image.fromarray(GRAY16), "PNG"), "PNG", False),
    "cmyk.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG"), "JPEG", False),
    "palette.png": (encoded(PHOTO.quantize(16), "PNG"), "PNG", True),
    "clear_palette.png": (encoded(PHOTO.quantize(16), "PNG", transparency=3), "PNG", False),
    "clear.webp": (encoded(CLEAR, "WEBP"), "JPEG", False),
    "bits.png": (encoded(PHOTO.convert("1"), "PNG"), "PNG", True),
    "moving.gif": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "PNG", False),
    "moving.webp": (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "JPEG", False),
    "moving.png": (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "PNG", False),
    "progressive.jpg": (encoded(PHOTO, "JPEG", progressive=True), "JPEG", True),
    "one_pixel.png": (encoded(PHOTO.crop((0, 0, 1, 1)), "PNG"), "PNG", True),
}  # fmt: skip


def claims(data: bytes, at: int, form: str, width: int, height: int) -> bytes:
    """The picture with another size in its header."""
    changed = bytearray(data)
    struct.pack_into(form, changed, at, width, height)
    return bytes(changed)


def huge_jpeg(side: int) -> bytes:
    data = encoded(PHOTO, "JPEG")
    return claims(data, data.index(b"\xff\xc0") + 5, ">HH", side, side)


def small_icon_of(png: bytes) -> bytes:
    """An icon that claims 16×16 and holds the PNG. Pillow decodes icons while it opens them."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


PAGE = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body><h1>Not Found</h1></body></html>"
BAD = {
    "empty.jpg": (b"", "no picture in a known format: 0 bytes"),
    "page.jpg": (PAGE, "no picture in a known format"),
    "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "no picture in a known format"),
    "icon.ico": (small_icon_of(encoded(PHOTO, "PNG")), "no picture in a known format"),
    "bomb.png": (huge_png(30_000), "too large: 30000×30000"),
    "bomb.jpg": (huge_jpeg(30_000), "too large: 30000×30000"),
    "bomb.gif": (claims(encoded(PHOTO.quantize(16), "GIF"), 6, "<HH", 30_000, 30_000), "too large: 30000×30000"),
    "bomb.bmp": (claims(encoded(PHOTO, "BMP"), 18, "<ii", 30_000, 30_000), "too large: 30000×30000"),
    # Between Pillow's own two bounds it would print a warning, from any worker at any time.
    "large.png": (huge_png(10_000), "too large: 10000×10000"),
    "large.jpg": (huge_jpeg(10_000), "too large: 10000×10000"),
    "no_size.png": (huge_png(0), ""),
    "cut.gif": (encoded(FRAMES[0], "GIF")[:-400], "does not decode"),
    "cut.webp": (encoded(PHOTO, "WEBP")[:-40], ""),
    "cut_header.jpg": (encoded(PHOTO, "JPEG")[:30], ""),
}


def test_an_ingest_of_odd_and_bad_pictures(tmp_path, tokenizer):
    for name, (data, *_) in {**ODD, **BAD}.items():
        (tmp_path / name).write_bytes(data)
    lines = write_jsonl(tmp_path / "x.jsonl", [{"image": name, "text": f" {name}"} for name in {**ODD, **BAD}])
    done = preprocess("caption", lines, tmp_path / "x", tokenizer, "--max-bad-rate", "0.9", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    told = [json.loads(line) for line in (tmp_path / "x.quarantine.jsonl").read_text().splitlines()]
    for row, number, (name, (_, reason)) in zip(told, range(len(ODD) + 1, 99), BAD.items(), strict=False):
        assert row["record"] == f"{lines}:{number}"
        assert reason in row["reason"]
        assert name in row["reason"]
    assert len(told) == len(BAD)

    source = verify_source(tmp_path / "x")
    assert len(source) == len(ODD)
    for d, (name, (data, kind, as_it_is)) in enumerate(ODD.items()):
        [kept], [row] = source.image_bytes(d), source.meta(d)
        assert FORMATS[row["format"]] == kind, name
        assert (bytes(kept) == data, row["flags"] & TRANSCODED) == (as_it_is, 0 if as_it_is else TRANSCODED), name
        expected = decode_rgb(data).astype(int)
        assert (row["height"], row["width"]) == expected.shape[:2]
        assert np.abs(decode_rgb(kept).astype(int) - expected).mean() < 3


@pytest.mark.parametrize("backend", [CpuBackend, DaliBackend])
def test_training_reads_what_ingest_keeps(backend):
    kept = [store(data, 10**6) for data, *_ in ODD.values()]
    images = [EncodedImage(image.data, image.crc32, "x") for image in kept]
    decoder = Decoder(backend(10**6), 32)
    decoder(images)
    assert (decoder.images, decoder.bad) == (len(ODD), 0)


def test_nothing_is_decoded_before_the_size_is_known():
    """The picture that the icon holds has 49 million pixels, and the icon says 256 (16 × 16)."""
    stream = io.BytesIO()
    Image.new("1", (7000, 7000)).save(stream, "PNG")
    with pytest.raises(BadImageError, match="no picture in a known format"):
        store(small_icon_of(stream.getvalue()), 1_000_000)
