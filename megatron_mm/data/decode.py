"""Encoded pictures to the encoder's input: uint8 [3, size, size]. They become floats on the device, not here.

The resize squashes to a square with torch's antialiased bicubic on uint8: within 2 of 255 of Pillow's, and the fastest
exact one on a CPU.
"""

import logging
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mm.data.ingest.images import BadImageError, decode_rgb
from megatron_mm.errors import UserError

_log = logging.getLogger(__name__)
RATE_AFTER = 100  # images, before the rate of bad ones can stop the run


def decode_image(data: bytes | memoryview, max_pixels: int | None = None) -> Tensor:
    """An encoded picture as uint8 [3, height, width]: upright, RGB, over white where it is transparent.

    Raises:
        BadImageError: it does not decode, or its header claims more than `max_pixels`.
    """
    pixels = decode_rgb(data, max_pixels)
    if not pixels.flags.writeable:
        pixels = pixels.copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize(image: Tensor, size: int) -> Tensor:
    """uint8 [3, height, width] → uint8 [3, size, size]."""
    if image.shape[1:] == (size, size):
        return image.contiguous()
    return F.interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0].contiguous()


class Decoder:
    """Decodes stored pictures and never fails one of them: a bad one becomes the mean colour, is counted and logged.

    Neither the order of samples nor any shape depends on a picture's bytes; its text keeps its loss.

    Args:
        image_size: pixels a side of the result.
        max_pixels: refused from the header.
        mean: colour of the stand-in, of 1; the normalisation's mean, so that the encoder sees zeros.
        max_bad_rate: of the images so far; above it (after the first 100) a UserError ends the run.
    """

    def __init__(
        self, image_size: int, max_pixels: int, mean: Sequence[float] = (0.5, 0.5, 0.5), max_bad_rate: float = 1.0
    ) -> None:
        self.image_size, self.max_pixels, self.max_bad_rate = image_size, max_pixels, max_bad_rate
        colour = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8)
        self._stand_in = colour[:, None, None].expand(3, image_size, image_size)
        self.images = self.bad = 0  # so far

    def __call__(self, data: bytes | memoryview, crc32: int | None = None, name: str = "image") -> Tensor:
        """uint8 [3, image_size, image_size].

        Args:
            crc32: that the bytes had when they were stored.
            name: for the log.
        """
        self.images += 1
        try:
            if crc32 is not None and zlib.crc32(data) != crc32:
                raise BadImageError("the bytes have changed since ingest")
            return resize(decode_image(data, self.max_pixels), self.image_size)
        except BadImageError as error:
            self.bad += 1
            _log.warning("%s: %s; the mean colour stands in", name, error)
            self._check_rate(name, error)
            return self._stand_in.clone()

    def _check_rate(self, name: str, error: BadImageError) -> None:
        if self.images >= RATE_AFTER and self.bad > self.max_bad_rate * self.images:
            raise UserError(
                "too many images do not decode", where="data.max_bad_image_rate",
                found=f"{self.bad} of {self.images}; the last: {name}: {error}",
                allowed=f"at most {self.max_bad_rate:.2%}",
                do="run tools/inspect_data.py verify on the sources",
            )  # fmt: skip
