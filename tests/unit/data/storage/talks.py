"""The source that the tests of storage put into a bucket."""

import random
import zlib
from pathlib import Path

from megatron_mm.data.ingest.images import StoredImage
from megatron_mm.data.source import Source, SourceWriter

SMALL = ["image.idx", "loss.bin", "loss.idx", "meta.npy", "text.idx"]
PICTURES = [0, 3, 0, 1, 9, 2, 1, 1, 1, 4] * 3  # of each document


def make(prefix: Path, tokenizer, seed: int = 0) -> Path:
    """Documents with and without pictures (of random bytes: nothing decodes them here) and with loss ranges."""
    rng = random.Random(seed)
    with SourceWriter(prefix, "conversation", tokenizer) as writer:
        for count in PICTURES:
            ids = [rng.randrange(5, 320) for _ in range(rng.randint(1, 60))]
            blobs = [rng.randbytes(rng.choice((1, 400, 30_000))) for _ in range(count)]
            pictures = [StoredImage(b, 8, 8, 1, 1, 0, zlib.crc32(b), rng.getrandbits(60)) for b in blobs]
            tokens = [tokenizer.bos_id, *[tokenizer.image_id] * count, *ids, tokenizer.eos_id]
            writer.add(tokens, pictures, [(count + 1, len(tokens))])
        writer.finish({"seed": seed})
    return prefix


def everything(source: Source) -> list[object]:
    documents = range(len(source))
    return [
        [t.tolist() for t in source.texts(documents)],
        [[(bytes(b), c) for b, c in p] for p in source.images([(d, 0, PICTURES[d]) for d in documents])],
        [source.loss(d).tolist() for d in documents],
        source.all_meta.tolist(), source.lengths.tolist(), source.image_counts.tolist(), source.digest,
    ]  # fmt: skip
