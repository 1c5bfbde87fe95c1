"""Image–text data made for benchmarks: pictures, a source, tar shards and a configuration that reads them.

A picture is 640×480, noise with the spectrum of natural images (amplitude falls with frequency to the power of 1.5,
colour weaker than brightness), JPEG of quality 85 with 4:2:0 colour: 66 KB in the mean. PICTURES of them are repeated
to any number of documents; each stands with a caption of about 100 tokens.
"""

import io
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from megatron_mm.config import RunConfig, config_from_dict
from megatron_mm.data.ingest.images import store
from megatron_mm.data.source import SourceWriter
from megatron_mm.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

PICTURES = 128
VOCABULARY = 400  # ids
_WORDS = "red green blue black circle square small large left right above below one two three four".split()


class Sample(NamedTuple):
    jpeg: bytes
    caption: str


def jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(480)[:, None], np.fft.rfftfreq(640)[None])
    frequency[0, 0] = 1.0
    planes = []
    for contrast in (50, 15, 15):  # Y, Cb, Cr
        noise = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
        plane = np.fft.irfft2(noise / frequency**1.5, s=(480, 640))
        planes.append(128 + contrast * (plane - plane.mean()) / plane.std())
    pixels = np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "YCbCr").save(file, "JPEG", quality=85)
    return file.getvalue()


def samples(pictures: int = PICTURES) -> list[Sample]:
    rng = random.Random(0)
    return [Sample(jpeg(i), "".join(" " + rng.choice(_WORDS) for _ in range(97))) for i in range(pictures)]


def tokenizer(folder: Path) -> Tokenizer:
    """Of whole words: a caption's 97 words, its image, bos and eos are 100 tokens or few more."""
    rng = random.Random(1)
    path = folder / "tokenizer.model"
    train_tokenizer((" ".join(rng.choices(_WORDS, k=12)) + "\n" for _ in range(500)), path, VOCABULARY, seed=0)
    return open_tokenizer(path)


def write_source(prefix: Path, found: list[Sample], documents: int, tokens: Tokenizer) -> None:
    """Captions: one picture a document, and its text."""
    pictures = [store(sample.jpeg, max_pixels=1 << 20) for sample in found]
    ids = [[tokens.bos_id, tokens.image_id, *tokens.encode(s.caption), tokens.eos_id] for s in found]
    with SourceWriter(prefix, "caption", tokens) as writer:
        for i in range(documents):
            writer.add(ids[i % len(found)], [pictures[i % len(found)]])
        writer.finish(made={"by": "benchmarks/made.py"})


def write_shards(folder: Path, found: list[Sample], documents: int, size: int = 512) -> list[Path]:
    """WebDataset's: N.jpg and N.txt in tars of `size` samples."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for first in range(0, documents, size):
        paths.append(folder / f"shard-{first // size:06d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in _members(found, range(first, min(first + size, documents))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return paths


def _members(found: list[Sample], numbers: range) -> Iterator[tuple[str, bytes]]:
    for i in numbers:
        yield f"{i:08d}.jpg", found[i % len(found)].jpeg
        yield f"{i:08d}.txt", found[i % len(found)].caption.encode()


def run_config(prefix: Path, tokenizer_path: Path, batch: int = 16) -> RunConfig:
    """MM1's shape (4096 positions, 16 images of 378² to 144 tokens), one sequence a microbatch, read in this process.
    The model is as small as can be: nothing here runs it."""
    return config_from_dict(
        {
            "run_dir": str(prefix.parent / "run"),
            "model": {
                "vision": {
                    "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "ffn_hidden_size": 8,
                    "patch_size": 14, "image_size": 378,
                },
                "connector": {"num_tokens": 144, "hidden_size": 8, "depth": 1},
                "decoder": {
                    "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_query_groups": 1,
                    "ffn_hidden_size": 8, "vocab_size": VOCABULARY,
                },
            },
            "data": {
                "tokenizer": str(tokenizer_path), "sources": [{"path": str(prefix), "weight": 1.0}],
                "seq_length": 4096, "max_images": 16, "validation_fraction": 0.0, "num_workers": 0,
            },
            "training": {"steps": 1000, "global_batch_size": batch, "micro_batch_size": 1},
        }
    )  # fmt: skip
