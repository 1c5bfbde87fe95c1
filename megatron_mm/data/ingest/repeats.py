"""Which pictures are seen too often in the whole input, counted over all shards in bounded memory.

Hashes are spread evenly over 64 bits, and each shard holds its own in ascending order: so a range of hashes is a slice
of every shard, read and counted by itself.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_mm.data.ingest.shards import SEEN

_AT_ONCE = 1 << 24  # entries of a range, about: 256 MiB, and some more to sort them


def find_repeated(seen: Sequence[Path], max_repeats: int, output: Path) -> np.ndarray:
    """Hashes with a sum of counts above `max_repeats`, ascending, uint64, mapped from the file `output`.

    Args:
        seen: `.npy` files of SEEN, each ascending by hash.
    """
    with output.open("wb") as file:
        for hashes, counts in _ranges(seen):
            file.write(hashes[counts > max_repeats].tobytes())
    if not output.stat().st_size:  # an empty file cannot be mapped
        return np.zeros(0, dtype="<u8")
    return np.memmap(output, dtype="<u8", mode="r")


def _ranges(seen: Sequence[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All hashes, ascending, with their counts, one range after the other."""
    parts = max(1, -(-sum(path.stat().st_size for path in seen) // (SEEN.itemsize * _AT_ONCE)))
    positions = [0] * len(seen)
    for part in range(1, parts + 1):
        slices = [np.zeros(0, dtype=SEEN)]
        for i, path in enumerate(seen):
            entries = np.load(path, mmap_mode="r", allow_pickle=False)
            end = bisect_left(entries["hash"], part * 2**64 // parts) if part < parts else len(entries)
            slices.append(np.array(entries[positions[i] : end]))
            positions[i] = end
        joined = np.concatenate(slices)
        hashes, owners = np.unique(joined["hash"], return_inverse=True)
        counts = np.zeros(len(hashes), dtype=np.int64)
        np.add.at(counts, owners, joined["count"])
        yield hashes, counts


def is_among(hashes: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which of the hashes are there, bool."""
    if not len(ascending):
        return np.zeros(len(hashes), dtype=bool)
    places = np.minimum(np.searchsorted(ascending, hashes), len(ascending) - 1)
    return ascending[places] == hashes
