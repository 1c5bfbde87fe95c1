"""The one reading of a picture, what ingest keeps of it, and what it refuses."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mm.data.decode import decode_image, resize
from megatron_mm.data.ingest.images import FORMATS, TRANSCODED, BadImageError, decode_rgb, store
from tests.unit.data.conftest import picture

CAP = 1_000_000


def encoded(image: Image.Image, name: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format=name, **options)
    return out.getvalue()


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("colours", [1, 3])
def test_plain_pictures_are_kept_as_they_are(name, colours):
    pixels = picture(1, colours=colours).squeeze()
    if name == "WEBP" and colours == 1:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    data = encoded(Image.fromarray(pixels), name)
    kept = store(data, CAP)
    assert kept.data == data
    assert (kept.width, kept.height, FORMATS[kept.format], kept.flags) == (48, 40, name, 0)
    assert kept.crc32 == zlib.crc32(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_rgb(data), expected)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(picture(2, 64, 32)), "JPEG", exif=exif, quality=95)
    upright = decode_rgb(data)
    assert upright.shape[:2] == ((64, 32) if orientation >= 5 else (32, 64))
    kept = store(data, CAP)
    assert (kept.orientation, kept.flags) == (orientation, TRANSCODED)
    assert (kept.height, kept.width) == upright.shape[:2]
    assert 0x0112 not in Image.open(io.BytesIO(kept.data)).getexif()
    assert np.abs(decode_rgb(kept.data).astype(int) - upright).mean() < 3


def test_transparency_lies_over_white():
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:2, :, 3] = 255  # black above, nothing below
    data = encoded(Image.fromarray(pixels), "PNG")
    assert decode_rgb(data)[:2].max() == 0
    assert decode_rgb(data)[2:].min() == 255
    kept = store(data, CAP)
    assert Image.open(io.BytesIO(kept.data)).mode == "RGB"
    np.testing.assert_array_equal(decode_rgb(kept.data), decode_rgb(data))


@pytest.mark.parametrize(
    ("image", "name", "becomes"),
    [
        (Image.fromarray(picture(3)).convert("CMYK"), "JPEG", "JPEG"),
        (Image.fromarray(picture(3)).quantize(16), "GIF", "PNG"),
        (Image.fromarray(picture(3)), "BMP", "PNG"),
        (Image.fromarray(picture(3)), "TIFF", "PNG"),
        (Image.fromarray(picture(3)), "AVIF", "JPEG"),
        (Image.fromarray(picture(3, colours=1).squeeze().astype(np.uint16) * 257), "PNG", "PNG"),
    ],
)
def test_what_not_every_decoder_reads_is_written_anew(image, name, becomes):
    data = encoded(image, name)
    kept = store(data, CAP)
    assert (FORMATS[kept.format], kept.flags) == (becomes, TRANSCODED)
    assert np.abs(decode_rgb(kept.data).astype(int) - decode_rgb(data)).max() <= (0 if becomes == "PNG" else 24)


def test_sixteen_bits_are_scaled_not_clipped():
    gray = picture(3, colours=1).squeeze()
    data = encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")
    np.testing.assert_array_equal(decode_rgb(data)[..., 0], gray)


def huge_png(side: int) -> bytes:
    """A valid PNG header that claims side×side pixels, without them."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_pixel_cap_is_told_from_the_header():
    with pytest.raises(BadImageError, match="too large: 1001×1001"):
        store(huge_png(1001), CAP)
    with pytest.raises(BadImageError, match="too large"):  # Pillow's own bound comes first
        store(huge_png(30000), CAP)
    jpeg = encoded(Image.fromarray(picture(0, 1001, 1000)), "JPEG")
    with pytest.raises(BadImageError, match="too large: 1001×1000"):
        decode_image(jpeg, CAP)
    assert decode_image(jpeg, 1001 * 1000).shape == (3, 1000, 1001)


def test_flipped_bits_in_a_jpeg_are_noticed():
    data = bytearray(encoded(Image.fromarray(picture(5, 200, 200)), "JPEG", quality=95))
    noticed = 0
    for place in range(700, len(data) - 50, 97):
        damaged = data.copy()
        damaged[place] ^= 0xFF
        try:
            store(bytes(damaged), CAP)
        except BadImageError:
            noticed += 1
    assert noticed >= 10  # a flip that leaves a valid Huffman stream cannot be seen by any decoder


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_any_truncation_is_refused(name):
    data = encoded(Image.fromarray(picture(4)), name)
    for length in (0, 1, 10, len(data) // 3, len(data) // 2, len(data) - 40):
        with pytest.raises(BadImageError):
            store(data[:length], CAP)


def test_resize_stays_close_to_pillows():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    ours = resize(decode_image(encoded(image, "PNG")), 37)
    theirs = torch.from_numpy(np.array(image.resize((37, 37), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    assert (ours.int() - theirs.int()).abs().max() <= 2
