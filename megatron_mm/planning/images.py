"""How many images the sequences of a run hold, as far as it can be known before they are packed."""

import functools
import json
from pathlib import Path

import numpy as np

from megatron_mm.config import RunConfig
from megatron_mm.data.batch import deal
from megatron_mm.data.source_files import MANIFEST, file_of


def expected_images(config: RunConfig) -> tuple[float, str]:
    """(mean images of a sequence, where the figure comes from)."""
    data, width = config.data, config.model.connector.num_tokens
    manifests = [file_of(source.path, MANIFEST) for source in data.sources]
    if not all(Path(path).is_file() for path in manifests):
        return float(data.max_images), "the most a sequence may hold: the sources are not on this disk"
    mean = 0.0
    for source, path in zip(data.sources, manifests, strict=True):
        manifest = json.loads(Path(path).read_text())
        positions = manifest["tokens"] + manifest["images"] * (width - 1)
        mean += source.weight * min(data.max_images, data.seq_length * manifest["images"] / max(1, positions))
    return mean / sum(source.weight for source in data.sources), "the sources' images and tokens"


@functools.lru_cache
def microbatch_images(
    mean: float, most: int, global_batch_size: int, micro_batch_size: int, dp: int
) -> tuple[float, ...]:
    """Images of the fullest rank's microbatch in each microbatch of a step, after the batch was dealt.

    Sequences hold all images that they may or none, in the shares that give the mean: no data of that mean is harder
    to deal evenly.
    """
    counts = np.zeros(global_batch_size, dtype=np.int64)
    images = round(mean * global_batch_size)
    counts[: images // most] = most
    if images % most:
        counts[images // most] = images % most
    bins = counts[deal(counts, global_batch_size // micro_batch_size)].sum(axis=1)
    return tuple(float(n) for n in bins.reshape(-1, dp).max(axis=1))
