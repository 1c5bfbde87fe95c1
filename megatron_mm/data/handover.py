"""A microbatch on its way from a worker to the training process.

    worker            training process
    parcel ─▶ slot ═══▶ copy ─▶ Microbatch      the copy is page-locked where there is a GPU

All that a microbatch holds lies in one buffer. Slots are shared memory, taken once and filled in turn: what a process
takes anew is cleared page by page, which costs as much as decoding two pictures for every sixteen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_mm.data.batch import Microbatch
from megatron_mm.data.decode import EncodedImage
from megatron_mm.errors import UserError

_ALIGNMENT = 64  # bytes; of each array's start
_DTYPES = {np.dtype(t): getattr(torch, t) for t in ("uint8", "int32", "int64", "float32")}
_FIELDS = {f.name for f in fields(Microbatch)}
Shape = tuple[np.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Label:
    """What is in a parcel.

    Attributes:
        shapes: of the arrays, in their order: the fields of a Microbatch, and the pictures that are left to a device,
            `encoded`, `encoded_ends` (the byte after each) and `encoded_places` (their numbers in the microbatch).
        num_images: of the whole microbatch.
        left: names of the pictures that are left to a device, for its log.
    """

    shapes: Mapping[str, Shape]
    num_images: int
    left: Sequence[str] = ()

    def spans(self) -> Iterator[tuple[str, Shape, int, int]]:
        """Name, shape, first byte and the byte after the last one, of each array."""
        end = 0
        for name, (dtype, shape) in self.shapes.items():
            start = _aligned(end)
            end = start + prod(shape) * dtype.itemsize
            yield name, (dtype, shape), start, end

    @property
    def bytes(self) -> int:
        return max((end for *_, end in self.spans()), default=0)


@dataclass(frozen=True)
class Parcel:
    label: Label
    buffer: Tensor  # uint8 [label.bytes]

    def arrays(self) -> dict[str, np.ndarray]:
        """Views of the buffer."""
        data = self.buffer.numpy()
        return {
            name: data[start:end].view(dtype).reshape(shape) for name, (dtype, shape), start, end in self.label.spans()
        }

    def microbatch(self) -> Microbatch:
        """Views of the buffer; the pictures are those that the worker decoded."""
        # Cut out by torch, which then knows how long a copy to a device needs the buffer.
        own = {
            name: self.buffer[start:end].view(_DTYPES[dtype]).view(shape)
            for name, (dtype, shape), start, end in self.label.spans()
            if name in _FIELDS
        }
        return Microbatch(num_images=self.label.num_images, **own)

    def encoded(self) -> tuple[list[int], list[EncodedImage]]:
        """Numbers and contents of the pictures that are left to a device."""
        arrays = self.arrays()
        data, ends = arrays["encoded"].data, arrays["encoded_ends"].tolist()
        starts = [0, *ends][: len(ends)]
        images = [
            EncodedImage(data[start:end], name=name)
            for start, end, name in zip(starts, ends, self.label.left, strict=True)
        ]
        return arrays["encoded_places"].tolist(), images


class Sent(NamedTuple):
    """What goes through the queue for a parcel."""

    number: int  # of the microbatch
    label: Label
    own: Tensor | None  # memory of its own, where it did not fit into its slot


class Slots:
    """Microbatch n travels in slot n modulo `count`: it must have been received before n + count is filled.

    Raises:
        UserError: there is no room in shared memory.
    """

    def __init__(self, count: int, size: int) -> None:
        size = _aligned(size) + _ALIGNMENT  # a slot begins with the number of what it holds
        try:
            storage = torch.UntypedStorage._new_shared(count * size)
        except RuntimeError as error:
            raise UserError(
                "no room in shared memory for the data workers", where="data.num_workers, data.prefetch",
                found=f"{count * size / 2**20:.0f} MiB asked for: {error}",
                do="lower one of them, or give /dev/shm more room (docker run --shm-size=…)",
            ) from None  # fmt: skip
        self._slots = torch.empty(0, dtype=torch.uint8).set_(storage).view(count, size)

    def _number(self, number: int) -> Tensor:
        return self._slots[number % len(self._slots), :8].view(torch.int64)

    def parcel(self, number: int, label: Label) -> Parcel:
        """To be filled by the worker."""
        self._number(number)[0] = number
        size, room = label.bytes, self._slots[number % len(self._slots), _ALIGNMENT:]
        return Parcel(label, room[:size] if size <= len(room) else torch.empty(size, dtype=torch.uint8).share_memory_())

    def send(self, number: int, parcel: Parcel) -> Sent:
        lies_here = parcel.buffer.untyped_storage().data_ptr() == self._slots.untyped_storage().data_ptr()
        return Sent(number, parcel.label, None if lies_here else parcel.buffer)

    def receive(self, sent: Sent, page_locked: bool) -> Parcel:
        """A copy, which stays. Raises AssertionError when the slot has been filled again."""
        size = sent.label.bytes
        there = self._slots[sent.number % len(self._slots), _ALIGNMENT:][:size] if sent.own is None else sent.own
        copy = torch.empty(size, dtype=torch.uint8, pin_memory=page_locked).copy_(there)
        if (found := int(self._number(sent.number))) != sent.number:
            raise AssertionError(f"microbatch {sent.number} was overwritten by {found}")
        return Parcel(sent.label, copy)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
