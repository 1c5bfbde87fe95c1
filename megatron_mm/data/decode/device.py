"""Decoding on a GPU, in the training process: workers hand JPEGs over as they are stored, checked but encoded.

```
worker             read ─ check crc, header ─┬─ JPEG ──────── encoded bytes ─┐
                                             └─ others ─ CPU decodes: pixels ┴─ one page-locked buffer a microbatch
training process   a thread and a CUDA stream of their own: nvJPEG, resize ─ all pixels, on the GPU
```

Written against DALI's documentation; what only a GPU can show stands in tests/gpu.
"""

import contextlib
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mm.data.decode.dali import is_for_gpu
from megatron_mm.data.decode.decoder import Decoder, EncodedImage, is_unchanged


def left_to_device(images: Sequence[EncodedImage], max_pixels: int) -> list[int]:
    """Numbers of the pictures that a worker hands over encoded: those that a GPU decodes, whole and within the cap."""
    return [i for i, image in enumerate(images) if is_unchanged(image) and is_for_gpu(image.data, max_pixels)]


class DeviceDecoder:
    """Decodes what workers have left. One serves all loaders of a process: its memory is taken once.

    Args:
        decoder: with a DaliBackend of the device.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.device = decoder, decoder.backend.device
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, left: Sequence[int], encoded: Sequence[EncodedImage], others: Tensor) -> Tensor:
        """All pictures of a microbatch, uint8 [n, 3, size, size] on the device, complete when this returns.

        Args:
            left: numbers of those that the workers left, whose contents are in `encoded`.
            others: pixels of the rest, in order.
        """
        kept = sorted(set(range(len(left) + len(others))).difference(left))
        stream = self._stream
        with self._lock, torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            pixels = self.decoder(encoded)
            if kept:
                both = torch.empty((len(left) + len(kept), *pixels.shape[1:]), dtype=torch.uint8, device=self.device)
                both[list(left)] = pixels
                both[kept] = others.to(self.device)
                pixels = both
            if stream:
                stream.synchronize()
        return pixels
