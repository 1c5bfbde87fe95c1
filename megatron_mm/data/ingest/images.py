"""Encoded pictures to pixels, and encoded pictures to stored ones.

`decode_rgb` is the one reading of a picture: upright (EXIF orientation applied), opaque (transparency over white), RGB,
8 bits. Ingest stores only what every decoder reads so: JPEG, PNG or WebP, gray or RGB, one frame, upright and opaque.
Anything else is written anew, without loss unless the original was lossy itself.
"""

import hashlib
import io
import zlib
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import (  # the readers of `_READ`, which register themselves
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageOps,
    Jpeg2KImagePlugin,  # noqa: F401
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

FORMATS = ("", "JPEG", "PNG", "WEBP")  # of stored pictures, by the number in a source's meta
# What is read at all. Pillow knows forty more, some of which decode while they are opened (ICO) or run programs (EPS).
_READ = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000")
TRANSCODED = 1  # a flag in a source's meta: the stored bytes are not the original's
_LOSSY = frozenset(("JPEG", "MPO", "AVIF", "WEBP", "JPEG2000"))
_ORIENTATION = 0x0112  # the EXIF tag
_MAX_SIDE = 65535  # a source's meta holds sides in 16 bits


class BadImageError(ValueError):
    """The bytes are no picture that we take; the message says why, for a person."""


class StoredImage(NamedTuple):
    """What a source keeps of one picture."""

    data: bytes
    width: int  # pixels, upright
    height: int
    format: int  # of FORMATS
    orientation: int  # the original's EXIF value, 1 to 8; the stored bytes are upright
    flags: int
    crc32: int  # of data
    hash: int  # 64-bit BLAKE2b of the original bytes


def read_header(data: bytes | memoryview, max_pixels: int | None = None) -> Image.Image:
    """Opens a picture without decoding it. Raises BadImageError, also when its header claims more than `max_pixels`."""
    image = _open(data)
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise BadImageError(f"too large: {width}×{height} = {width * height} pixels, allowed are {max_pixels}")
    return image


def _open(data: bytes | memoryview) -> Image.Image:
    """As Image.open does, but for its bound: that warns of what our own refuses, and only a whole process can lift it.

    None of these readers decodes a pixel here.
    """
    start = bytes(data[:16])
    for name in _READ:
        reader, accepts = Image.OPEN[name]
        if accepts is None or accepts(start) is not True:  # a string says why Pillow lacks a decoder
            continue
        try:
            return reader(io.BytesIO(data), "")
        except Exception as error:  # Pillow's parsers raise many types on damaged headers
            raise BadImageError(f"damaged header: {error or type(error).__name__}") from None
    raise BadImageError(f"no picture in a known format: {len(data)} bytes")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is no damaged picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _is_opaque(image: Image.Image) -> bool:
    return not ("A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info)


def _pillow_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):  # Pillow would clip these to 255
        deep = np.asarray(image, dtype=np.float64)
        scale = 257.0 if image.mode != "F" else 1.0
        return np.repeat(np.clip(deep / scale, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if not _is_opaque(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))


def _pixels(image: Image.Image, data: bytes | memoryview, tolerant: bool) -> np.ndarray:
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        try:
            # strict: the only setting of the decoders at hand that notices flipped bits in a JPEG's body.
            return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError:
            if not tolerant:
                raise
    return _pillow_rgb(image)


def decode_rgb(data: bytes | memoryview, max_pixels: int | None = None, tolerant: bool = True) -> np.ndarray:
    """Pixels of a picture, uint8 [height, width, 3].

    Args:
        max_pixels: refuse from the header what claims more.
        tolerant: a JPEG that the strict decoder refuses is tried with Pillow too.
    Raises:
        BadImageError: the bytes do not decode, or exceed the cap.
    """
    return _decode(read_header(data, max_pixels), data, tolerant)


def _decode(image: Image.Image, data: bytes | memoryview, tolerant: bool) -> np.ndarray:
    orientation = _orientation(image)
    try:
        pixels = _pixels(image, data, tolerant)
        if orientation != 1:
            turn = Image.Exif()
            turn[_ORIENTATION] = orientation
            upright = Image.fromarray(pixels)
            upright.info["exif"] = turn.tobytes()
            pixels = np.asarray(ImageOps.exif_transpose(upright))
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, … on damaged bodies
        raise BadImageError(f"does not decode: {error}") from None
    return pixels


def is_plain(image: Image.Image) -> bool:
    """Whether every decoder reads this picture, and reads it as `decode_rgb` does."""
    return (
        image.format in FORMATS
        and _orientation(image) == 1
        and getattr(image, "n_frames", 1) == 1
        and image.mode in (("L", "RGB") if image.format != "PNG" else ("1", "L", "P", "RGB"))
        and _is_opaque(image)
    )


def store(data: bytes, max_pixels: int) -> StoredImage:
    """Checks a picture by decoding it once, and returns what to keep. Raises BadImageError."""
    image = read_header(data, max_pixels)
    if max(image.size) > _MAX_SIDE:
        raise BadImageError(f"too large: {image.size[0]}×{image.size[1]}, allowed are {_MAX_SIDE} a side")
    original, orientation, simple = image.format or "", _orientation(image), is_plain(image)
    pixels = _decode(image, data, tolerant=False)
    stored, name = (data, original) if simple else _encode(pixels, lossy=original in _LOSSY)
    height, width = pixels.shape[:2]
    return StoredImage(
        data=stored,
        width=width,
        height=height,
        format=FORMATS.index(name),
        orientation=orientation,
        flags=0 if simple else TRANSCODED,
        crc32=zlib.crc32(stored),
        hash=int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"),
    )


def _encode(pixels: np.ndarray, lossy: bool) -> tuple[bytes, str]:
    out, name = io.BytesIO(), "JPEG" if lossy else "PNG"
    options = {"quality": 95, "subsampling": 0} if lossy else {}
    Image.fromarray(pixels).save(out, format=name, **options)
    return out.getvalue(), name
