"""From what teams have to what training reads: pictures a second and megabytes of text a second, on one core.

Pictures: a JSONL of captions beside 640×480 JPEGs of 64 KB (benchmarks/made.py).

    ours                 tools/preprocess_data.py's engine: every picture decoded once and checked, text to ids, sizes,
                         checksums and digests, verified and merged to a source
    shards and energon   pictures and captions copied into tars by WebDataset's ShardWriter, then `energon prepare`
                         indexes these; nothing is decoded, checked or turned to ids

Text: the Python standard library's modules, a JSONL line each, by one SentencePiece tokenizer of 4,000 ids.

    ours                 the same engine
    megatron-lm's way    a line parsed, encoded and added to an IndexedDatasetBuilder, as its preprocess_data.py does

All run in one process and thread; CPU time, that of the `energon` command included, that of starting it not. What
limits ours is found by running its parts alone on the same data: decoding, the tokenizer, and writing as many bytes to
the disk (by the clock, to the medium).
"""

import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import functools
import importlib
import io
import itertools
import json
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import loader
import made
import numpy as np
from common import COMPETITORS, finish, import_competitors, options, table, take_turns

from megatron_mm.config import Kind
from megatron_mm.data.ingest.build import build_source
from megatron_mm.data.ingest.images import store
from megatron_mm.data.ingest.workers import Processes
from megatron_mm.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

IMAGES, TEXT = 2048, 24_000_000  # pictures, and bytes of text
VOCABULARY = 4000
_numbers = itertools.count()


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def rate(work: Callable[[Path], float | None], amount: float, folder: Path) -> float:
    """Amount a CPU-second of work in a fresh folder. The work may answer with seconds that are not its own."""
    fresh = folder / f"run{next(_numbers)}"
    fresh.mkdir()
    before = cpu_seconds()
    not_its_own = work(fresh) or 0.0
    spent = cpu_seconds() - before - not_its_own
    shutil.rmtree(fresh)
    return amount / spent


def ours(records: Path, kind: Kind, tokenizer: Tokenizer, folder: Path) -> None:
    build_source([records], folder / "source", kind, tokenizer, team=Processes(1), stream=io.StringIO())


def shards_and_energon(records: Path, folder: Path) -> float:
    """Answers with the seconds of starting the command, twice: once as it is used, once as it is measured."""
    import webdataset as wds

    with wds.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=1000, verbose=0) as writer:
        for number, line in enumerate(records.open()):
            record = json.loads(line)
            picture = (records.parent / record["image"]["path"]).read_bytes()
            writer.write({"__key__": f"{number:08d}", "jpg": picture, "txt": record["text"]})
    loader.prepare_energon(folder)
    return 2 * starting_energon()


def starting_energon() -> float:
    """CPU seconds of the command that does nothing."""
    before = cpu_seconds()
    command = [sys.executable, "-W", "ignore", "-m", "megatron.energon.cli.main", "prepare", "--help"]
    environment = os.environ | {"PYTHONPATH": str(COMPETITORS)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return cpu_seconds() - before


def megatron_lm(records: Path, tokenizer: Tokenizer, folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for line in records.open():
        ids = [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_id]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(folder / "text.idx"))


def decode(pictures: list[bytes], folder: Path) -> None:
    for picture in pictures:
        store(picture, max_pixels=40_000_000)


def encode(texts: list[str], tokenizer: Tokenizer, folder: Path) -> None:
    for text in texts:
        tokenizer.encode(text)


def disk(folder: Path, size: int) -> float:
    """Bytes a second, by the clock."""
    block = os.urandom(1 << 22)
    begun = time.perf_counter()
    with (folder / "disk").open("wb") as file:
        for _ in range(max(1, size >> 22)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return max(1, size >> 22) * len(block) / (time.perf_counter() - begun)


def write_pictures(folder: Path, found: list[made.Sample], count: int) -> Path:
    folder.mkdir()
    lines = []
    for i in range(count):
        (folder / f"{i:06d}.jpg").write_bytes(found[i % len(found)].jpeg)
        lines.append(json.dumps({"image": {"path": f"{i:06d}.jpg"}, "text": found[i % len(found)].caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "captions.jsonl"


def modules(size: int) -> list[str]:
    """The standard library's, repeated to about `size` bytes."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    found, read = [], 0
    for path in itertools.cycle(path for path in paths if "site-packages" not in path.parts):
        text = path.read_text(errors="replace")
        found.append(text)
        read += len(text)
        if read >= size:
            return found
    return found


def main() -> None:
    given = options(__doc__ or "", rounds=3)
    import_competitors()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    for package in ("megatron.core.datasets.indexed_dataset", "webdataset"):
        importlib.import_module(package)  # now, and not while it is measured

    images, size = (24, 400_000) if given.smoke else (IMAGES, TEXT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = made.samples(8 if given.smoke else made.PICTURES)
        caption_tokenizer = made.tokenizer(folder)
        captions = write_pictures(folder / "pictures", found, images)
        pictures = [found[i % len(found)].jpeg for i in range(images)]
        texts = modules(size)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        few = texts[:: max(1, len(texts) // 100)]
        train_tokenizer(
            (line for text in few for line in text.splitlines(True)), folder / "text.model", VOCABULARY, seed=0
        )
        tokenizer = open_tokenizer(folder / "text.model")
        runs: dict[str, tuple[Callable[[Path], float | None], float]] = {
            "pictures: ours": (functools.partial(ours, captions, "caption", caption_tokenizer), images),
            "pictures: shards and energon": (functools.partial(shards_and_energon, captions), images),
            "pictures: decoding alone": (functools.partial(decode, pictures), images),
            "text: ours": (functools.partial(ours, folder / "text.jsonl", "text", tokenizer), megabytes),
            "text: megatron-lm's way": (functools.partial(megatron_lm, folder / "text.jsonl", tokenizer), megabytes),
            "text: tokenizer alone": (functools.partial(encode, texts, tokenizer), megabytes),
        }
        rates = take_turns(
            {n: functools.partial(rate, work, amount, folder) for n, (work, amount) in runs.items()}, given.rounds
        )
        to_disk = disk(folder, sum(map(len, pictures)))
        bytes_a_picture = sum(map(len, pictures)) / images
    median = {name: figure.median for name, figure in rates.items()}
    # Of the time that ours takes, what the part alone takes.
    decoder_share = median["pictures: ours"] / median["pictures: decoding alone"]
    tokenizer_share = median["text: ours"] / median["text: tokenizer alone"]
    cores_of_disk = to_disk / (median["pictures: ours"] * bytes_a_picture)
    print()
    units = {"pictures": "pictures a CPU-second", "text": "MB of text a CPU-second"}
    table(["", "rate", ""], [[name, figure, units[name.split(":")[0]]] for name, figure in rates.items()])
    print(f"decoding is {decoder_share:.0%} of the pictures' time, the tokenizer {tokenizer_share:.0%} of the text's;")
    print(f"the disk takes {to_disk / 1e6:.0f} MB/s, which is the pictures of {cores_of_disk:.1f} cores")
    limit = "decoder" if cores_of_disk > 1 else "disk"
    finish(
        "ingest",
        (median["text: ours"], f"MB of text a CPU-second ({median['pictures: ours']:.0f} pictures)"),
        (median["text: megatron-lm's way"], f"({median['pictures: shards and energon']:.0f}, none decoded)"),
        f"nothing but tokenizer, decoder or disk limits: the tokenizer is {tokenizer_share:.0%} of the text's time, "
        f"the decoder {decoder_share:.0%} of the pictures', whose limit is the {limit}",
        tokenizer_share > 0.5 and (decoder_share > 0.5 or cores_of_disk <= 1),
        {
            "rates": rates, "decoder_share": decoder_share, "tokenizer_share": tokenizer_share,
            "disk_bytes_a_second": to_disk, "bytes_a_picture": bytes_a_picture, "text_megabytes": megabytes,
        },
        ["torch", "pillow", "simplejpeg", "sentencepiece", "megatron-core", "megatron-energon", "webdataset"],
        given.smoke,
    )  # fmt: skip


if __name__ == "__main__":
    main()
