"""The models and batches that are measured: MM1's recipes on one GPU, sequences drawn on the spot, the real Trainer."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from kit import ROOT, Figures, has_gpu, spread

from megatron_mm.config import RunConfig, SequenceLayout, load_config
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.sizes import document_pairs, flops
from megatron_mm.parallel.backend import device, on_gpu
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import initialize, shut_down
from megatron_mm.planning.hardware import GPUS

Kind = Literal["one document", "text", "caption", "interleaved", "images"]
_IMAGE, _BOS, _EOS, _PAD = 4, 2, 3, 0


def sequences(counts: dict[Kind, int]) -> list[Kind]:
    """Of each kind that many."""
    return [kind for kind, n in counts.items() for _ in range(n)]


# MM1's final mix, 45/45/10, as whole sequences of one kind each.
MIX = sequences({"caption": 9, "interleaved": 9, "text": 2})

# Toy sizes that FP8's tiles of 128 divide.
_TOY = [f"model.decoder.{field}" for field in (
    "hidden_size=256", "num_attention_heads=4", "num_query_groups=4", "ffn_hidden_size=512"
)]  # fmt: skip


def recipe(name: str, smoke: bool, *overrides: str) -> RunConfig:
    """examples/mm1/NAME.yaml on one GPU; smoke: its tiny twin, on a CPU by the local layers."""
    path = ROOT / "examples/mm1" / ("tiny" if smoke else "") / f"{name}.yaml"
    alone = [
        "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
        "parallel.expert_model_parallel_size=1", "parallel.overlap_grad_reduce=false",
        "training.micro_batch_size=1", "training.global_batch_size=1",
    ]  # fmt: skip
    if smoke:
        alone += _TOY
    if has_gpu():  # no silent fall back to the local layers where Transformer Engine is missing
        alone += ["training.layers=transformer_engine", "training.precision=bf16"]
    return load_config(path, alone + list(overrides))


def layout_of(config: RunConfig) -> SequenceLayout:
    return SequenceLayout(
        seq_length=config.data.seq_length, max_images=config.data.max_images,
        tokens_per_image=config.model.connector.num_tokens, image_size=config.model.vision.image_size,
        image_token_id=_IMAGE, bos_token_id=_BOS, eos_token_id=_EOS, pad_token_id=_PAD,
    )  # fmt: skip


def _documents(kind: Kind, layout: SequenceLayout, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(images, words) of each document of a sequence, of the lengths of benchmarks/corpora.py at 4096 positions; the
    last one is cut to what is left."""
    s, m, scale = layout.seq_length, layout.tokens_per_image, layout.seq_length / 4096
    if kind == "one document":
        return [(0, s)]
    if kind == "images":  # as many images as a sequence holds, in four documents
        each = layout.max_images // 4
        return [(each, s // 4 - each * m)] * 4
    found: list[tuple[int, int]] = []
    room, images_left = s, layout.max_images
    while room > 8 * scale:
        images = {"caption": 1, "interleaved": int(rng.geometric(1 / 3)), "text": 0}[kind]
        images = min(images, images_left, max(0, room - 1) // m)
        words = rng.integers(20, 201) if kind == "caption" else math.exp(rng.normal(6.2 + 0.1 * (kind == "text")))
        if kind != "text" and not images:
            break
        found.append((images, min(max(1, round(words * scale)), room - images * m)))
        room -= images * m + found[-1][1]
        images_left -= images
    return found


def documents_of(config: RunConfig) -> list[tuple[int, int]]:
    """(images, words) of the documents of one interleaved sequence."""
    return _documents("interleaved", layout_of(config), np.random.default_rng(0))


def microbatch(config: RunConfig, kinds: Sequence[Kind], seed: int) -> tuple[Microbatch, list[int]]:
    """A microbatch of a sequence of each kind, on this process's device; the lengths of its documents."""
    layout = layout_of(config)
    s, m = layout.seq_length, layout.tokens_per_image
    rng = np.random.default_rng(seed)
    tokens = np.full((len(kinds), s), _PAD)
    labels, positions = tokens.copy(), np.zeros_like(tokens)
    mask = np.zeros((len(kinds), s), dtype=np.float32)
    numbers = np.full((len(kinds), s), -1, dtype=np.int32)
    lengths: list[int] = []
    images = 0
    for row, kind in enumerate(kinds):
        at = 0
        for number, (pictures, words) in enumerate(_documents(kind, layout, rng)):
            n = pictures * m + words
            ids = rng.integers(5, config.model.decoder.vocab_size, n + 1)
            for i in range(pictures):  # evenly among the words
                start = i * m + i * words // max(1, pictures)
                ids[start : start + m] = _IMAGE
            here = slice(at, at + n)
            tokens[row, here], labels[row, here] = ids[:-1], ids[1:]
            positions[row, here], numbers[row, here] = np.arange(n), number
            mask[row, here] = ids[1:] != _IMAGE
            at, images = at + n, images + pictures
            lengths.append(n)
    fixed = torch.Generator().manual_seed(seed)
    shape = (images, 3, layout.image_size, layout.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=fixed)
    batch = Microbatch(
        tokens=torch.from_numpy(tokens), labels=torch.from_numpy(labels), loss_mask=torch.from_numpy(mask),
        documents=torch.from_numpy(numbers), position_ids=torch.from_numpy(positions), images=pixels,
        source_ids=torch.zeros(len(kinds), dtype=torch.int64), sample_ids=torch.arange(len(kinds)), num_images=images,
    )  # fmt: skip
    return batch.to(device()), lengths


def batches(config: RunConfig, kinds: Sequence[Kind]) -> tuple[list[Microbatch], list[int]]:
    """Of a step, `micro_batch_size` of the kinds together."""
    size = config.training.micro_batch_size
    found = [microbatch(config, kinds[i : i + size], seed=i) for i in range(0, len(kinds), size)]
    return [batch for batch, _ in found], [n for _, lengths in found for n in lengths]


@torch.no_grad()
def _quick_weights(model: torch.nn.Module, config: RunConfig, names: object = None) -> None:
    """In the place of `initialize_weights`, which draws billions of numbers on the CPU so that they do not depend on
    the layout: here the same distributions, drawn where they are."""
    torch.manual_seed(config.training.seed)  # of the device too: every case of a shape starts alike
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1 or "norm" in name or ".ln_p" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, config.model.init_std)


@contextlib.contextmanager
def alone(config: RunConfig) -> Iterator[Any]:
    """A world of one rank; its topology."""
    topology = initialize(config, launch())
    try:
        yield topology
    finally:
        shut_down()


@contextlib.contextmanager
def trainer_of(config: RunConfig, sources: int = 1) -> Iterator[Any]:
    """The real Trainer over the real model, in a world of one rank."""
    with alone(config) as topology:
        from megatron_mm.model import build
        from megatron_mm.training.step import Trainer

        exact, build.initialize_weights = build.initialize_weights, _quick_weights
        try:
            yield Trainer(config, topology, layout_of(config), sources)
        finally:
            build.initialize_weights = exact


@contextlib.contextmanager
def with_fields(fields: dict[str, Any]) -> Iterator[None]:
    """Models built inside have these fields of Megatron-Core's TransformerConfig, in decoder and encoder: what is tried
    out here and is no field of a run."""
    from megatron_mm.model import multimodal

    plain = multimodal.transformer_config

    def changed(config: RunConfig) -> Any:
        transformer = plain(config)
        for name, value in fields.items():
            assert hasattr(transformer, name), name
            setattr(transformer, name, value)
        return transformer

    multimodal.transformer_config = changed
    try:
        yield
    finally:
        multimodal.transformer_config = plain


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def peak_gib() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu() else None


def nominal_peak(fp8: bool = False) -> float | None:
    """FLOP/s of the data sheet; None for a GPU that the planner does not know, and without one."""
    name = torch.cuda.get_device_name().lower() if on_gpu() else ""
    gpu = next((gpu for key, gpu in GPUS.items() if key in name), None)
    if gpu is None:
        return None
    return gpu.fp8 if fp8 else gpu.bf16


def train_figures(
    config: RunConfig,
    kinds: Sequence[Kind],
    smoke: bool,
    steps: int,
    profiled: bool = False,
    prepare: Callable[[Any], None] | None = None,
) -> Figures:
    """Steps of a sequence of each kind: tokens/s, FLOP/s, share of the data sheet's peak, memory.

    Args:
        profiled: a step of 4 microbatches more, under the profiler.
        prepare: what is done to the trainer before its first step.
    """
    training = dataclasses.replace(config.training, global_batch_size=len(kinds))
    config = dataclasses.replace(config, training=training)
    with trainer_of(config) as trainer:
        if prepare is not None:
            prepare(trainer)
        given, lengths = batches(config, kinds)
        for step in range(2):
            last = trainer.train_step(given, step)
        seconds = []
        for step in range(1 if smoke else steps):
            synchronize()
            start = time.perf_counter()
            last = trainer.train_step(given, step)
            synchronize()
            seconds.append(time.perf_counter() - start)
        found = step_figures(config, seconds, len(kinds), lengths, last.images)
        found |= {"loss": last.loss, "peak_gib": peak_gib(), "transformer_engine": trainer.chunks[0].packed}
        if profiled:
            try:
                found["profile"] = profile(lambda: trainer.train_step(given[:4], 0))
            except Exception as error:  # a tool's fault does not take the figures with it
                found["profile"] = f"failed: {error!r}"
                if smoke:
                    raise
    return found


def step_figures(
    config: RunConfig, seconds: Sequence[float], sequences: int, documents: Sequence[int], images: int
) -> Figures:
    each = spread(seconds)
    positions = sequences * config.data.seq_length
    forward = flops(config.model, positions, document_pairs(documents), images)
    work = forward.training(config.training.frozen)
    rate = work.total / each["median"]
    peak = nominal_peak()
    return {
        "seconds_per_step": each,
        "sequences": sequences,
        "tokens_per_s": round(positions / each["median"], 1),
        "images_per_s": round(images / each["median"], 1),
        "filled": round(sum(documents) / positions, 4),
        "tflops": round(rate / 1e12, 4),
        "mfu": peak and round(rate / peak, 4),  # of the data sheet's bf16 peak, whatever the precision
        "flops": dataclasses.asdict(work),
        "decoder_layers": config.model.decoder.num_layers,
    }


def profile(step: Callable[[], Any]) -> list[Figures]:
    """The kernels that take most of a step: share of the GPU's busy time; and how much of the step the GPU is busy. On
    a CPU its operators."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    # Not both: watching the CPU slows it down, and the GPU would wait for it.
    watched = ProfilerActivity.CUDA if on_gpu() else ProfilerActivity.CPU
    synchronize()
    with profiler(activities=[watched]) as seen:
        start = time.perf_counter()
        step()
        synchronize()
        wall = time.perf_counter() - start
    kernels: list[tuple[float, str, int]] = []
    for event in seen.key_averages():
        micros = event.self_device_time_total if on_gpu() else event.self_cpu_time_total
        if micros and event.device_type.name == ("CUDA" if on_gpu() else "CPU"):
            kernels.append((micros, event.key, event.count))
    kernels.sort(reverse=True)
    busy = sum(micros for micros, _, _ in kernels)
    listed = [{"kernel": name[:120], "share": round(t / busy, 4), "calls": calls} for t, name, calls in kernels[:60]]
    return [{"busy_s": round(busy / 1e6, 4), "wall_s": round(wall, 4)}, *listed]
