"""Samples a CPU-second, from files to pixels: 640×480 JPEGs of 66 KB to 378², in one process without workers.

A sample is one picture with its caption. What each gives:

    ours         whole microbatches: packed sequences of token ids, labels, loss masks, positions, and pixels in uint8;
                 random access over the whole source, every picture's checksum verified
    energon      megatron-energon: picture as a uint8 tensor and the caption's text, from its indexed shards, with its
                 shuffle buffer of 100
    webdataset   WebDataset: the same from the same shards, read in order, with its shuffle buffer of 100

Pillow decodes and resizes (bicubic), as both competitors document it; "our decoder" is megatron_mm.data.decode's in its
place. No competitor turns text to ids here, nor packs. CPU time is that of all threads; data lies in the page cache.
"""

import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import functools
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made
import numpy as np
import torch
from common import COMPETITORS, Stopwatch, finish, import_competitors, options, table, take_turns
from PIL import Image
from torch import Tensor

from megatron_mm.data.decode import decode_image, resize
from megatron_mm.data.loader import TrainingData

SIZE = 378
DOCUMENTS, MEASURED = 2048, 800  # samples in all, and in a round


def pillow(image: Image.Image) -> Tensor:
    """A decoded picture to uint8 [3, 378, 378]."""
    return torch.from_numpy(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def ours(data: bytes) -> Tensor:
    return resize(decode_image(data), SIZE)


def our_samples(config: Any) -> Iterator[int]:
    """Pictures of each microbatch."""
    for microbatch in TrainingData.open(config).train_loader(0, 0, 1, (0, 1)):
        yield len(microbatch.images)


def webdataset(shards: list[Path], decode: Callable[[Any], Tensor]) -> Iterator[int]:
    import webdataset as wds

    found = wds.WebDataset([str(path) for path in shards], shardshuffle=False).repeat().shuffle(100)
    found = found.decode("pilrgb") if decode is pillow else found
    for sample in found.map(lambda s: (decode(s["jpg"]), s["txt"])):
        assert sample[0].shape == (3, SIZE, SIZE)
        yield 1


def prepare_energon(folder: Path) -> None:
    """Index the shards: `energon prepare`."""
    command = [
        sys.executable, "-W", "ignore", "-m", "megatron.energon.cli.main", "prepare", str(folder), "--non-interactive",
        "--no-progress", "--num-workers", "1", "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample",
        "--field-map", '{"image": "jpg", "caption": "txt"}',
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(COMPETITORS)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def energon(folder: Path, decode: Callable[[Any], Tensor]) -> Iterator[int]:
    from megatron import energon
    from megatron.energon.savable_loader import BasicDataLoader

    class Encoder(energon.DefaultTaskEncoder[Any, Any, Any, Any]):
        decoder = energon.SampleDecoder(image_decode="pilrgb") if decode is pillow else None

        def __init__(self) -> None:
            super().__init__()

        @energon.stateless
        def encode_sample(self, sample: Any) -> Any:
            return energon.CaptioningSample.derive_from(sample, image=decode(sample.image), caption=sample.caption)

    dataset = energon.get_train_dataset(
        folder,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    # Its garbage collection every ten samples would be charged for all that this process holds.
    for sample in BasicDataLoader(dataset, gc_collect_every_n_steps=0):
        assert len(sample.image)
        yield 1


def rate(counts: Iterator[int], measured: int) -> float:
    """Samples a CPU-second of the next `measured` samples."""
    done = 0
    with Stopwatch() as watch:
        while done < measured:
            done += next(counts)
    return done / watch.cpu


def main() -> None:
    given = options(__doc__ or "", rounds=5)
    import_competitors()
    warnings.simplefilter("ignore")
    logging.getLogger("megatron.energon").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    documents, measured, pictures = (32, 8, 8) if given.smoke else (DOCUMENTS, MEASURED, made.PICTURES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = made.samples(pictures)
        print(f"{documents} samples of {np.mean([len(s.jpeg) for s in found]) / 1000:.1f} KB in the mean", flush=True)
        tokenizer = made.tokenizer(folder)
        made.write_source(folder / "captions", found, documents, tokenizer)
        shards = made.write_shards(folder / "shards", found, documents)
        prepare_energon(folder / "shards")
        competitors = {
            "ours": our_samples(made.run_config(folder / "captions", folder / "tokenizer.model")),
            "energon, Pillow": energon(folder / "shards", pillow),
            "energon, our decoder": energon(folder / "shards", ours),
            "webdataset, Pillow": webdataset(shards, pillow),
            "webdataset, our decoder": webdataset(shards, ours),
        }
        for counts in competitors.values():  # started, and once through the page cache
            rate(counts, documents if not given.smoke else measured)
        rates = take_turns({n: functools.partial(rate, c, measured) for n, c in competitors.items()}, given.rounds)
    mine = rates["ours"].median
    ratios = {name: mine / figure.median for name, figure in rates.items()}
    targets = {
        "energon, Pillow": 2.5,
        "webdataset, Pillow": 2.2,
        "energon, our decoder": 1.0,
        "webdataset, our decoder": 1.0,
    }
    table(
        ["", "samples a CPU-second", "ours is", "target"],
        [[n, figure, f"{ratios[n]:.2f} ×", f"{targets[n]} ×" if n in targets else ""] for n, figure in rates.items()],
    )
    finish(
        "loader",
        (mine, "samples a CPU-second"),
        (rates["energon, Pillow"].median, "by megatron-energon with Pillow"),
        "at least 2.5; 2.2 to WebDataset with Pillow; above 1 to each with our decoder",
        all(ratios[name] >= target for name, target in targets.items()),
        {"samples_per_cpu_second": rates, "ratios": ratios},
        ["torch", "pillow", "simplejpeg", "megatron-energon", "webdataset"],
        given.smoke,
    )


if __name__ == "__main__":
    main()
