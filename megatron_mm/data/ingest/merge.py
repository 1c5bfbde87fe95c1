"""Finished shards to the source: documents in the input's order, without what is seen too often in the whole input."""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_mm.data.ingest.filters import Filters
from megatron_mm.data.ingest.progress import Progress
from megatron_mm.data.ingest.repeats import find_repeated, is_among
from megatron_mm.data.ingest.shards import Tally
from megatron_mm.data.source_blocks import Block, thin
from megatron_mm.data.source_files import file_of
from megatron_mm.data.source_merge import SourceStream
from megatron_mm.data.source_writer import SourceWriter
from megatron_mm.errors import UserError


def merge_shards(shards: Sequence[Path], writer: SourceWriter, filters: Filters, progress: Progress) -> Tally:
    """Write the documents of all shards. Returns what the filters took out on the way.

    Args:
        shards: prefixes of those that hold documents.
    """
    streams = [SourceStream(shard) for shard in shards]
    size, done, started = sum(stream.bytes for stream in streams), 0, time.monotonic()
    repeats = None
    if filters.max_image_repeats is not None:
        repeats = _Repeats(shards, filters)
    else:
        _check_room(Path(writer.prefix).parent, size)
    for shard, stream in zip(shards, streams, strict=True):
        urls = np.load(file_of(shard, "urls.npy"), mmap_mode="r", allow_pickle=False) if repeats else None
        image = 0
        for block in stream.blocks():
            done += block.bytes
            images = len(block.meta)
            writer.add_block(block if repeats is None or urls is None else repeats.thin(block, urls[image:][:images]))
            image += images
            progress.merge(done, size, started)
    return repeats.dropped if repeats else Tally()


def _check_room(folder: Path, needed: int) -> None:
    """All but certain, and sooner than by a write that fails hours later."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            "no room to put the shards together", where=str(folder), found=f"{free / 1e9:.1f} GB free",
            allowed=f"{needed / 1e9:.1f} GB, beside the shards",
            do="make room, then run the same command again: all shards are finished and kept",
        )  # fmt: skip


class _Repeats:
    """Takes out pictures that are seen too often, then documents for what they have left.

    Attributes:
        dropped: what went so far.
    """

    def __init__(self, shards: Sequence[Path], filters: Filters) -> None:
        assert filters.max_image_repeats is not None
        self.filters, self.dropped = filters, Tally()
        self.repeated = np.zeros(0, dtype="<u8")
        if shards:
            seen = [file_of(shard, "seen.npy") for shard in shards]
            self.repeated = find_repeated(seen, filters.max_image_repeats, shards[0].parent / "repeated")

    def thin(self, block: Block, urls: np.ndarray) -> Block:
        by_url = is_among(urls, self.repeated)
        by_bytes = is_among(block.meta["hash"], self.repeated) & ~by_url
        keep = ~(by_url | by_bytes)
        of_image = np.repeat(np.arange(len(block.lengths)), block.image_counts)
        left = np.bincount(of_image[keep], minlength=len(block.lengths))
        counts, number = np.unique(left, return_inverse=True)
        faults = [self.filters.document_fault(count) for count in counts.tolist()]
        stays = np.array([not fault for fault in faults])[number]
        often = f"seen over {self.filters.max_image_repeats} times"
        # Adding leaves out what is zero.
        self.dropped.filtered_images += Counter({f"URL {often}": int(by_url.sum())})
        self.dropped.filtered_images += Counter({f"bytes {often}": int(by_bytes.sum())})
        self.dropped.filtered_documents += Counter(faults[i] for i in number[~stays].tolist())
        return block if keep.all() and stays.all() else thin(block, keep, stays)
