"""What a sample costs besides decoding, memory over a million samples, and how long resuming takes.

A sample is one document: a caption of 97 tokens and its picture of 64 KB, in random order out of a source in the page
cache. Sixteen of them make a packed sequence of 4096 positions. CPU time of one process without workers.

    ours, whole       microbatches without decoding: which sequence, its pieces, tokens, pictures as views of the map,
                      and the packed sequence's ids, labels, loss mask, documents and positions
    ours, raw         a document's tokens and its picture, copied, as the others give them
    megatron-core     the same from the same files by two IndexedDatasets, picture copied, without any check
    webdataset        samples of tar shards in order, nothing decoded, shuffle buffer of 100
    energon           the same from the same shards by megatron-energon, nothing decoded, shuffle buffer of 100

Resuming: a source of 10M captions, packed before; from opening it to the first microbatch (without its pictures) of the
first, a middle and a late step, in a fresh process that has imported everything.
"""

import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loader
import made
import numpy as np
import torch
from common import Stopwatch, finish, import_competitors, in_child, memory, options, table, take_turns

from megatron_mm.config import RunConfig
from megatron_mm.data.loader import TrainingData
from megatron_mm.data.source import Source, SourceWriter
from megatron_mm.data.source_blocks import Block
from megatron_mm.data.source_files import META

DOCUMENTS, MEASURED, LONG, RESUMED = 4096, 16_000, 1_000_000, 10_000_000  # samples
_BLOCK = 1 << 16  # documents written at once


class Undecoded(TrainingData):
    """Pictures are read and left as they are."""

    def decoder(self, backend: str, device: Any = None) -> Any:
        return lambda images, out: out


def whole(config: RunConfig) -> Iterator[int]:
    """Samples of each microbatch."""
    for microbatch in Undecoded.open(config).train_loader(0, 0, 1, (0, 1)):
        yield microbatch.num_images


def random_order(documents: int) -> Iterator[int]:
    rng = np.random.default_rng(0)
    while True:
        yield from rng.permutation(documents).tolist()


def raw(source: Source) -> Iterator[int]:
    for document in random_order(len(source)):
        tokens, picture = source.text(document), bytes(source.image(document, 0)[0])
        assert len(tokens)
        assert len(picture)
        yield 1


def megatron_core(prefix: Path) -> Iterator[int]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    text = IndexedDataset(f"{prefix}.text")
    pictures = IndexedDataset(f"{prefix}.image", multimodal=True)
    for document in random_order(len(text)):
        tokens, picture = text[document], pictures[document][0].tobytes()
        assert len(tokens)
        assert len(picture)
        yield 1


def unchanged(data: Any) -> Any:
    return data


def webdataset(shards: list[Path]) -> Iterator[int]:
    import webdataset as wds

    for sample in wds.WebDataset([str(path) for path in shards], shardshuffle=False).repeat().shuffle(100):
        assert sample["jpg"]
        assert sample["txt"]
        yield 1


def energon(folder: Path) -> Iterator[int]:
    return loader.energon(folder, unchanged)


def microseconds(counts: Iterator[int], measured: int) -> float:
    """Of CPU a sample, over the next `measured` samples."""
    return 1e6 / loader.rate(counts, measured)


def run_long(config: RunConfig, samples: int) -> dict[str, Any]:
    """In a child process: bytes held after the first tenth of many samples, and after all of them."""
    torch.set_num_threads(1)
    counts, done, held = whole(config), 0, []
    with Stopwatch() as watch:
        for stop in (samples // 10, samples):
            while done < stop:
                done += next(counts)
            held.append(memory())
    (own_before, all_before), (own_after, all_after) = held
    return {
        "samples": done, "cpu_seconds": watch.cpu, "own_before": own_before, "own_after": own_after,
        "all_before": all_before, "all_after": all_after,
    }  # fmt: skip


def write_many(prefix: Path, tokenizer: Any, documents: int) -> None:
    """Captions of 21 tokens; the pictures are a hundred bytes that no decoder would take, and none is asked to."""
    ids = np.array([tokenizer.bos_id, tokenizer.image_id, *tokenizer.encode(" red" * 20)[:20], tokenizer.eos_id])
    row = np.zeros(1, dtype=META)
    row["width"], row["height"], row["format"], row["nbytes"], row["offset"] = 640, 480, 1, 100, 1
    with SourceWriter(prefix, "caption", tokenizer) as writer:
        for first in range(0, documents, _BLOCK):
            n = min(_BLOCK, documents - first)
            lengths = np.full(n, len(ids), dtype="<i4")
            ones = np.ones(n, dtype="<i8")
            writer.add_block(
                Block(np.tile(ids, n).astype(writer.dtype), lengths, ones, np.repeat(row, n), [bytes(100 * n)])
            )
        writer.finish(made={"by": "benchmarks/reader.py"})


def resume(config: RunConfig, steps: list[int]) -> list[float]:
    """In a child process: seconds from opening to the first microbatch, of each step."""
    found = []
    for step in steps:
        with Stopwatch() as watch:
            microbatch = next(TrainingData.open(config).train_loader(step, 0, 1, None))
        assert microbatch.num_images
        found.append(watch.wall)
    return found


def measure_resuming(folder: Path, tokenizer: Any, documents: int) -> dict[str, float]:
    write_many(folder / "many", tokenizer, documents)
    config = made.run_config(folder / "many", folder / "tokenizer.model")
    with Stopwatch() as packing:
        sequences = len(TrainingData.open(config).train[0])
    epoch = max(3, sequences // config.training.global_batch_size)
    steps = [0, epoch // 2, 10 * epoch]
    seconds, _ = in_child(resume, config, steps)
    print(f"{documents:,} documents were packed in {packing.wall:.1f} s; resuming at step ", end="")
    print(", ".join(f"{step}: {s:.3f} s" for step, s in zip(steps, seconds, strict=True)))
    return {str(step): s for step, s in zip(steps, seconds, strict=True)} | {"packing": packing.wall}


def main() -> None:
    given = options(__doc__ or "", rounds=7)
    import_competitors()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    sizes = (64, 32, 320, 20_000) if given.smoke else (DOCUMENTS, MEASURED, LONG, RESUMED)
    documents, measured, long, resumed = sizes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = made.samples(8 if given.smoke else made.PICTURES)
        tokenizer = made.tokenizer(folder)
        made.write_source(folder / "captions", found, documents, tokenizer)
        shards = made.write_shards(folder / "shards", found, documents)
        loader.prepare_energon(folder / "shards")
        config = made.run_config(folder / "captions", folder / "tokenizer.model")
        competitors: dict[str, Iterator[int]] = {
            "ours, whole": whole(config),
            "ours, raw": raw(Source(folder / "captions")),
            "megatron-core": megatron_core(folder / "captions"),
            "webdataset": webdataset(shards),
            "energon": energon(folder / "shards"),
        }
        for counts in competitors.values():  # started, and once through the page cache
            loader.rate(counts, documents)
        runs: dict[str, Callable[[], float]] = {
            n: functools.partial(microseconds, counts, measured) for n, counts in competitors.items()
        }
        costs = take_turns(runs, given.rounds)
        print()
        table(["", "µs of CPU a sample"], [[name, figure] for name, figure in costs.items()])
        print(f"a packed sequence of 16 samples: {16 * costs['ours, whole'].median:.0f} µs")
        held, _ = in_child(run_long, config, long)
        grown = held["own_after"] - held["own_before"]
        print(
            f"{held['samples']:,} samples: {held['own_before'] / 1e6:.1f} MB of its own after a tenth, "
            f"{held['own_after'] / 1e6:.1f} MB at the end"
        )
        resuming = measure_resuming(folder, tokenizer, resumed)
    mine = costs["ours, whole"].median
    slowest = max(seconds for step, seconds in resuming.items() if step != "packing")
    finish(
        "reader",
        (mine, "µs a sample, packed and assembled"),
        (costs["energon"].median, "by megatron-energon, raw"),
        "at most 25 µs; memory flat over 1M samples; resuming in 1 s on 10M documents",
        mine <= 25 and grown < 5e6 and slowest < 1,
        {"microseconds_a_sample": costs, "memory": held, "resuming_seconds": resuming},
        ["torch", "megatron-core", "megatron-energon", "webdataset"],
        given.smoke,
    )


if __name__ == "__main__":
    main()
