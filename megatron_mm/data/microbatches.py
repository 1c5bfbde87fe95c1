"""A rank's microbatch of any number, read and decoded: what a worker does.

number → global batch and place in it → samples → sequences → pieces → tokens and pictures
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_mm.data.batch import Assembled, assemble, back_and_forth, deal, share_of
from megatron_mm.data.decode import EncodedImage
from megatron_mm.data.decode.device import left_to_device
from megatron_mm.data.handover import Label, Parcel, Sent, Slots
from megatron_mm.data.mixture import permute
from megatron_mm.data.packing import PackedSource
from megatron_mm.errors import UserError

if TYPE_CHECKING:
    from megatron_mm.data.loader import TrainingData

_U8, _I32, _I64, _F32 = (np.dtype(t) for t in ("uint8", "int32", "int64", "float32"))
ImageShare = tuple[int, int] | None  # rank and size of the group that shares out a microbatch's pictures


class _Picture(NamedTuple):
    source: int
    document: int
    number: int  # within the document
    sample: int  # that shows it


class Microbatches(Dataset[Sent | UserError]):
    """Microbatches of training, or of the held-out part of one source.

    Number n is microbatch `n mod per_batch` of global batch `n div per_batch`. Indexing is for the workers of a torch
    loader, once `slots` is set.

    Args:
        held_out: the source; None: training.
        leave_to_device: hand the pictures that a GPU decodes over as they are stored.
    """

    def __init__(
        self,
        data: "TrainingData",
        held_out: int | None,
        dp_rank: int,
        dp_size: int,
        image_share: ImageShare,
        leave_to_device: bool,
    ) -> None:
        d, t = data.config.data, data.config.training
        self.data, self.held_out, self.dp_rank, self.dp_size = data, held_out, dp_rank, dp_size
        self.image_share, self.leave_to_device = image_share, leave_to_device
        self.batch_size, self.micro_size = t.global_batch_size, t.micro_batch_size
        self.per_batch, rest = divmod(self.batch_size, self.micro_size * dp_size)
        if rest:
            raise ValueError(f"a batch of {self.batch_size} does not divide by {self.micro_size} × {dp_size}")
        self.decoder = data.decoder("cpu" if leave_to_device else d.decode_backend)
        self.slots: Slots | None = None
        self._batch = -1  # the one whose samples are known, as neighbours mostly ask for the same
        self._dealt = self._sources = self._sequences = np.zeros(0, dtype=np.int64)

    def _packed(self, source: int) -> PackedSource:
        return (self.data.train if self.held_out is None else self.data.validation)[source]

    def _locate(self, batch: int) -> None:
        """Sources and sequences of a global batch, -1 for fillers, and its samples dealt into microbatches."""
        if batch == self._batch:
            return
        samples = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        if self.held_out is None:
            self._sources, self._sequences = self.data.mixture.locate_all(samples)
        else:
            # Packing leaves the largest documents in front: take a fair choice of the sequences.
            size = len(self._packed(self.held_out))
            there = samples < size
            order = permute(samples[there], size, np.zeros(int(there.sum()), dtype=np.uint64))
            self._sources = np.full(self.batch_size, self.held_out)
            self._sequences = np.concatenate([order, np.full(int((~there).sum()), -1)])
        counts = np.zeros(self.batch_size, dtype=np.int64)
        for source in np.unique(self._sources).tolist():
            mine = (self._sources == source) & (self._sequences >= 0)
            counts[mine] = self._packed(source).image_counts[self._sequences[mine]]
        self._dealt = back_and_forth(deal(counts, self.batch_size // self.micro_size), self.dp_size)
        self._batch = batch

    @property
    def most_bytes(self) -> int:
        """Of a parcel, where pictures that are left to a device are no larger encoded than decoded."""
        layout, share = self.data.layout, self.image_share
        most = share_of(self.micro_size * layout.max_images, 0, share[1]).stop if share else 0
        return self._label(self.micro_size, most, most, (), 0).bytes

    def __getitem__(self, number: int) -> Sent | UserError:
        """An error that the user can mend is handed over as a value: raised in a worker, it would lose its form."""
        assert self.slots
        try:
            return self.slots.send(number, self.parcel(number))
        except UserError as error:
            return error

    def parcel(self, number: int) -> Parcel:
        batch, place = divmod(number, self.per_batch)
        self._locate(batch)
        mine = self._dealt[place, self.dp_rank]
        samples = np.where(self._sequences[mine] >= 0, mine + batch * self.batch_size, -1)
        rows: list[Assembled] = []
        pictures: list[_Picture] = []
        for row, sample in zip(mine.tolist(), samples.tolist(), strict=True):
            source, sequence = int(self._sources[row]), int(self._sequences[row])
            pieces = self._packed(source).pieces(sequence) if sequence >= 0 else []
            block = self.data.config.data.block_attention
            rows.append(assemble(self.data.sources[source], pieces, self.data.layout, block))
            pictures += [_Picture(source, *image, sample) for image in rows[-1].images]
        share = pictures[share_of(len(pictures), *self.image_share)] if self.image_share else []
        return self._fill(number, rows, self._sources[mine], samples, self._read(share), len(pictures))

    def _read(self, pictures: Sequence[_Picture]) -> list[EncodedImage]:
        """In their order; those of one source are asked for at once."""
        found: dict[int, list[tuple[memoryview, int]]] = {}
        for source in {picture.source for picture in pictures}:
            requests: list[tuple[int, int, int]] = []  # document, first, last: neighbours in one
            for p in pictures:
                if p.source != source:
                    continue
                if requests and requests[-1][::2] == (p.document, p.number):
                    requests[-1] = (p.document, requests[-1][1], p.number + 1)
                else:
                    requests.append((p.document, p.number, p.number + 1))
            found[source] = [image for images in self.data.sources[source].images(requests) for image in images]
        in_order = {source: iter(images) for source, images in found.items()}
        names = self.data.source_names
        return [
            EncodedImage(
                *next(in_order[p.source]),
                f"sample {p.sample} ({names[p.source]}, document {p.document}, image {p.number})",
            )
            for p in pictures
        ]

    def _label(self, rows: int, images: int, num_images: int, left: Sequence[str], encoded_bytes: int) -> Label:
        s, size = self.data.layout.seq_length, self.data.layout.image_size
        shapes = {
            "tokens": (_I64, (rows, s)),
            "labels": (_I64, (rows, s)),
            "loss_mask": (_F32, (rows, s)),
            "documents": (_I32, (rows, s)),
            "position_ids": (_I64, (rows, s)),
            "source_ids": (_I64, (rows,)),
            "sample_ids": (_I64, (rows,)),
            "images": (_U8, (images, 3, size, size)),
            "encoded": (_U8, (encoded_bytes,)),
            "encoded_ends": (_I64, (len(left),)),
            "encoded_places": (_I64, (len(left),)),
        }
        return Label(shapes, num_images, left)

    def _fill(
        self,
        number: int,
        rows: Sequence[Assembled],
        sources: np.ndarray,
        samples: np.ndarray,
        images: Sequence[EncodedImage],
        num_images: int,
    ) -> Parcel:
        left = left_to_device(images, self.data.config.data.max_image_pixels) if self.leave_to_device else []
        others = sorted(set(range(len(images))).difference(left))
        ends = np.cumsum([len(images[i].data) for i in left], dtype=np.int64)
        names = [images[i].name for i in left]
        label = self._label(len(rows), len(others), num_images, names, int(ends[-1]) if left else 0)
        if self.slots:
            parcel = self.slots.parcel(number, label)
        else:
            parcel = Parcel(label, torch.empty(label.bytes, dtype=torch.uint8))
        arrays = parcel.arrays()
        for i, row in enumerate(rows):
            for name in ("tokens", "labels", "loss_mask", "documents", "position_ids"):
                arrays[name][i] = getattr(row, name)
        arrays["source_ids"][:], arrays["sample_ids"][:] = sources, samples
        arrays["encoded_ends"][:], arrays["encoded_places"][:] = ends, left
        for i, end in zip(left, ends.tolist(), strict=True):
            data = images[i].data
            arrays["encoded"].data[end - len(data) : end] = data
        self.decoder([images[i] for i in others], out=torch.from_numpy(arrays["images"]))
        return parcel
