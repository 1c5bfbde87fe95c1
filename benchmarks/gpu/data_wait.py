"""How long a step of MM1-3B waits for its data: the real TrainingData over sources of real JPEGs, the real Trainer.

45/45/10 of captions, interleaved documents and text, 8 sequences a step, read and packed as a run does, from files in
the page cache. The wait is what the training loop reports: the time until the step's microbatches are at hand.
"""

import functools
import itertools
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from cases import Case, Ratio, at_most, run
from kit import Figures, has_gpu

SEQUENCES, STEPS = 8, 12


def _write_sources(folder: Path, smoke: bool) -> Path:
    """Three sources and their tokenizer; documents as long as those of benchmarks/corpora.py, in words."""
    import made

    from megatron_mm.data.ingest.images import store
    from megatron_mm.data.source import SourceWriter

    tokenizer = made.tokenizer(folder)
    samples = made.samples(4 if smoke else 64)
    pictures = [store(sample.jpeg, max_pixels=1 << 20) for sample in samples]
    words = [tokenizer.encode(sample.caption) for sample in samples]
    rng = random.Random(0)
    sources: list[tuple[str, Any, int, int]] = [
        ("captions", "caption", 1, 1), ("interleaved", "interleaved", 3, 7), ("text", "text", 0, 10)
    ]  # fmt: skip
    for name, kind, images, texts in sources:
        with SourceWriter(folder / name, kind, tokenizer) as writer:
            for _ in range(40 if smoke else 4000):
                ids = [tokenizer.bos_id] + [tokenizer.image_id] * images
                for _ in range(texts):
                    ids += rng.choice(words)[: 5 if smoke else None]
                writer.add([*ids, tokenizer.eos_id], [rng.choice(pictures) for _ in range(images)])
            writer.finish(made={"by": "benchmarks/gpu/data_wait.py"})
    return Path(tokenizer.path)


def measured(backend: str, workers: int, smoke: bool) -> Figures:
    from workload import recipe, synchronize, trainer_of

    from megatron_mm.data.loader import TrainingData

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = _write_sources(folder, smoke)
        sources = ", ".join(
            f"{{path: {folder / s}, weight: {w}}}" for s, w in (("interleaved", 45), ("captions", 45), ("text", 10))
        )
        config = recipe(
            "mm1-3b", smoke, f"data.tokenizer={tokenizer}", f"data.sources=[{sources}]", "data.validation_fraction=0",
            f"data.num_workers={min(1, workers) if smoke else workers}", f"data.decode_backend={backend}",
            f"training.global_batch_size={2 if smoke else SEQUENCES}",
        )  # fmt: skip
        with trainer_of(config, sources=3) as trainer:
            data = TrainingData.open(config)
            trainer.layout = data.layout
            loader = data.train_loader(0, 0, 1, (0, 1))
            waits, seconds, images = [], [], 0
            for step in range(3 if smoke else 3 + STEPS):
                start = time.perf_counter()
                batches = list(itertools.islice(loader, trainer.microbatches_per_step))
                waited = time.perf_counter() - start
                images += sum(batch.num_images for batch in batches)
                trainer.train_step(batches, step)
                synchronize()
                waits.append(waited)
                seconds.append(time.perf_counter() - start)
            loader.close()  # type: ignore[attr-defined]
    first = 1 if smoke else 3  # the workers' start, and the kernels'
    total = sum(seconds[first:])
    return {
        "wait_share": round(sum(waits[first:]) / total, 5), "seconds_per_step": round(total / len(seconds[first:]), 4),
        "longest_wait_s": round(max(waits[first:]), 4), "images_per_step": round(images / len(seconds), 1),
        "workers": workers, "on_device": has_gpu() and backend == "dali",
    }  # fmt: skip


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    lines = []
    for name, figures in found.items():
        step = figures["seconds_per_step"]
        wait = figures["wait_share"] * step
        lines.append(at_most(f"data wait, {name}", wait, "s a step", step, "s of the step", 0.01))
    return lines


CASES = [
    Case("cpu-8-workers", functools.partial(measured, "cpu", 8)),
    Case("dali-4-workers", functools.partial(measured, "dali", 4)),
    Case("cpu-2-workers", functools.partial(measured, "cpu", 2)),
]

if __name__ == "__main__":
    run("data_wait", __doc__ or "", CASES, ratios)
