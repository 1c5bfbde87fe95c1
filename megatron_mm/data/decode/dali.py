"""The backend `dali`: NVIDIA DALI's operators, on a CPU or on a GPU (nvJPEG and the GPU's own JPEG engine).

Its calls are DALI's dynamic mode: each decodes what it is given and keeps nothing, so a picture that fails takes no
neighbour with it and moves none. The calls are the same on both devices, which lets a machine without a GPU test them.
On photographs pixels are within 2 of 255 of Pillow's bicubic, on sharp black and white within 15.

DALI must not be forked once it was used: it is imported and set up by the process, and the thread, that decodes.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_mm.data.decode.cpu import CpuBackend
from megatron_mm.data.ingest.images import BadImageError, is_plain, read_header
from megatron_mm.errors import UserError

_log = logging.getLogger(__name__)
_PIXELS_AT_ONCE = 1 << 26  # decoded together: DALI's memory stays at its high-water mark
_IMAGES_AT_ONCE = 32
_GPU_HELPERS = 4  # CPU threads of a decoder on a GPU: Huffman decoding of what the JPEG engine leaves


def _missing(found: str) -> UserError:
    return UserError(
        "NVIDIA DALI is not importable", where="data.decode_backend", found=found,
        do="pip install 'megatron-mm[dali-cu13]' (CUDA 12: [dali-cu12]), or set it to cpu",
    )  # fmt: skip


def check_dali() -> None:
    """Raises UserError where DALI is not installed. It is not imported yet: that takes a second."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        raise _missing("no package nvidia.dali")


@functools.cache
def _dynamic() -> Any:
    try:
        import nvidia.dali.experimental.dynamic as dynamic
    except ImportError as error:
        raise _missing(str(error)) from error
    return dynamic


def is_readable(header: Image.Image, data: bytes | memoryview) -> bool:
    """Whether DALI reads the picture as `decode_rgb` does."""
    return is_plain(header) and bytes(data[12:16]) != b"VP8X"  # a WebP file of several parts


def is_for_gpu(data: bytes | memoryview, max_pixels: int) -> bool:
    """Whether a GPU decodes the picture, and as `decode_rgb` does; DALI itself would leave the others to the CPU."""
    try:
        header = read_header(data, max_pixels)
    except BadImageError:
        return False
    return header.format == "JPEG" and is_plain(header) and header.info.get("adobe_transform") != 0  # not YCbCr


class DaliBackend:
    """See `decoder.Backend`. On a GPU it works on torch's current stream; call it from one thread at a time.

    What DALI does not read, or fails on, goes through the CPU's decoders.
    """

    def __init__(self, max_pixels: int, device: torch.device | None = None) -> None:
        self.max_pixels, self.device = max_pixels, device or torch.device("cpu")
        self._others = CpuBackend(max_pixels)
        self._context: Any = None
        self._process = 0

    def __call__(self, images: Mapping[int, bytes | memoryview], out: Tensor) -> dict[int, BadImageError]:
        bad: dict[int, BadImageError] = {}
        sizes: dict[int, int] = {}
        others = []
        for row, data in images.items():
            try:
                header = read_header(data, self.max_pixels)
            except BadImageError as error:
                bad[row] = error
                continue
            if is_readable(header, data):
                sizes[row] = header.width * header.height
            else:
                others.append(row)
        groups = list(_groups(sizes))
        while groups:
            rows = groups.pop()
            try:
                pixels = self._decode([images[row] for row in rows], out.shape[-1])
            except RuntimeError as error:  # one of them does not decode; DALI does not always say which
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # raises where the device itself has failed
                if len(rows) > 1:
                    groups += [[row] for row in rows]
                else:
                    _log.warning("a picture goes to the CPU's decoders: %s", str(error).splitlines()[0])
                    others += rows
            else:
                out[rows] = pixels.permute(0, 3, 1, 2)
        return bad | self._others({row: images[row] for row in others}, out)

    def _decode(self, encoded: Sequence[bytes | memoryview], size: int) -> Tensor:
        """uint8 [n, size, size, 3]. Raises RuntimeError unless all of them decode."""
        dynamic = _dynamic()
        from nvidia.dali import types

        with self._entered(dynamic), dynamic.EvalMode.sync_cpu:
            batch = dynamic.as_batch([np.frombuffer(data, dtype=np.uint8) for data in encoded])
            pixels = dynamic.decoders.image(
                batch,
                device="gpu" if self.device.type == "cuda" else "cpu",
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # chroma as the CPU's decoders have it
                adjust_orientation=False,  # is_readable: they are upright
            )
            # Across, then down, to 8 bits each time: as Pillow and torch do. In one call DALI keeps what overshoots
            # between the two, and sharp edges come out up to 31 levels apart.
            cubic = {"mode": "stretch", "interp_type": types.INTERP_CUBIC, "antialias": True}
            across = dynamic.resize(pixels, size=(0, size), **cubic)
            resized: Tensor = dynamic.resize(across, size=(size, 0), **cubic).torch()
        assert resized.shape == (len(encoded), size, size, 3)
        return resized

    def _entered(self, dynamic: Any) -> Any:
        if self._context is None:
            self._process = os.getpid()
            if self.device.type == "cuda":
                self._context = dynamic.EvalContext(
                    device_id=self.device.index,
                    cuda_stream=torch.cuda.current_stream(self.device),
                    num_threads=_GPU_HELPERS,
                )
            else:
                self._context = dynamic.EvalContext(num_threads=1)
        if self._process != os.getpid():
            raise AssertionError("forked after DALI was used")
        return self._context


def _groups(sizes: Mapping[int, int]) -> Iterator[list[int]]:
    """Rows that are decoded together, by their numbers of pixels."""
    rows: list[int] = []
    pixels = 0
    for row, size in sizes.items():
        if rows and (pixels + size > _PIXELS_AT_ONCE or len(rows) == _IMAGES_AT_ONCE):
            yield rows
            rows, pixels = [], 0
        rows.append(row)
        pixels += size
    if rows:
        yield rows
