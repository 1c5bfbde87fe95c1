"""What every backend's pictures go through: checksums before, and after a failure the stand-in, the log, the limit."""

import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_mm.data.ingest.images import BadImageError
from megatron_mm.errors import UserError

_log = logging.getLogger(__name__)
RATE_AFTER = 100  # images, before the rate of bad ones can stop the run


class EncodedImage(NamedTuple):
    data: bytes | memoryview
    crc32: int | None = None  # that the bytes had when they were stored; None: not checked
    name: str = "image"  # for the log


class Backend(Protocol):
    @property
    def device(self) -> torch.device:
        """Of the pixels."""

    def __call__(self, images: Mapping[int, bytes | memoryview], out: Tensor) -> dict[int, BadImageError]:
        """Decode the picture at each row into that row of `out`, uint8 [n, 3, size, size].

        Returns:
            why, for each row that did not decode; what stands there then does not matter.
        """


class Decoder:
    """Decodes stored pictures and never fails one of them: a bad one becomes the mean colour, is counted and logged.

    Neither the order of samples nor any shape depends on a picture's bytes; its text keeps its loss.

    Args:
        image_size: pixels a side of the result.
        mean: colour of the stand-in, of 1; the normalisation's mean, so that the encoder sees zeros.
        max_bad_rate: of the images so far; above it (after the first 100) a UserError ends the run.
    """

    def __init__(
        self,
        backend: Backend,
        image_size: int,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        max_bad_rate: float = 1.0,
    ) -> None:
        self.backend, self.image_size, self.max_bad_rate = backend, image_size, max_bad_rate
        self._colour = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8)[:, None, None]
        self.images = self.bad = 0  # so far

    def __call__(self, images: Sequence[EncodedImage], out: Tensor | None = None) -> Tensor:
        """uint8 [n, 3, image_size, image_size], on the backend's device; in `out` where one is given."""
        if out is None:
            shape = (len(images), 3, self.image_size, self.image_size)
            out = torch.empty(shape, dtype=torch.uint8, device=self.backend.device)
        bad: dict[int, BadImageError] = {}
        whole = {}
        for row, image in enumerate(images):
            if is_unchanged(image):
                whole[row] = image.data
            else:
                bad[row] = BadImageError("the bytes have changed since ingest")
        bad |= self.backend(whole, out)
        for row, image in enumerate(images):
            self.images += 1
            if row in bad:
                self.bad += 1
                out[row] = self._colour.to(out.device)
                _log.warning("%s: %s; the mean colour stands in", image.name, bad[row])
                self._check_rate(image.name, bad[row])
        return out

    def _check_rate(self, name: str, error: BadImageError) -> None:
        if self.images >= RATE_AFTER and self.bad > self.max_bad_rate * self.images:
            raise UserError(
                "too many images do not decode", where="data.max_bad_image_rate",
                found=f"{self.bad} of {self.images}; the last: {name}: {error}",
                allowed=f"at most {self.max_bad_rate:.2%}",
                do="run tools/inspect_data.py verify on the sources",
            )  # fmt: skip


def is_unchanged(image: EncodedImage) -> bool:
    return image.crc32 is None or zlib.crc32(image.data) == image.crc32
