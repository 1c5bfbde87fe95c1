"""What the training loop sees of the data: checked sources, and microbatches of any step on any rank.

The state of the data is the number of the step: nothing else is saved. A loader for step n on rank r of any
data-parallel size gives what a run from the start would have given there.
"""

import functools
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from megatron_mm.config import RunConfig, SequenceLayout, source_name
from megatron_mm.data.ahead import ahead
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.decode import CpuBackend, DaliBackend, Decoder, check_dali
from megatron_mm.data.decode.device import DeviceDecoder
from megatron_mm.data.handover import Parcel, Slots
from megatron_mm.data.microbatches import ImageShare, Microbatches
from megatron_mm.data.mixture import Mixture
from megatron_mm.data.packing import PackedSource
from megatron_mm.data.source import Source
from megatron_mm.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm.data.workers import alive, end_with_parent, worker_context
from megatron_mm.errors import UserError
from megatron_mm.parallel.backend import device, on_gpu

_FOREVER = 1 << 62


def sequence_layout(config: RunConfig, tokenizer: Tokenizer) -> SequenceLayout:
    return SequenceLayout(
        seq_length=config.data.seq_length,
        max_images=config.data.max_images,
        tokens_per_image=config.model.connector.num_tokens,
        image_size=config.model.vision.image_size,
        image_token_id=tokenizer.image_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


class TrainingData:
    """The sources of a run, packed and mixed. Use `prepare` on one process a node, then `open` on all.

    Attributes:
        source_names: in the order of data.sources; `source_ids` of microbatches count along it.
    """

    def __init__(self, config: RunConfig) -> None:
        d = config.data
        self.config = config
        if d.decode_backend == "dali":
            check_dali()
        self.device_decoder: DeviceDecoder | None = None  # None: pictures are decoded by the workers
        self.tokenizer = open_tokenizer(d.tokenizer)
        if self.tokenizer.vocab_size > config.model.decoder.vocab_size:
            raise UserError(
                "the tokenizer has more ids than the decoder", where="model.decoder.vocab_size",
                found=config.model.decoder.vocab_size, allowed=f"at least {self.tokenizer.vocab_size}",
            )  # fmt: skip
        self.layout = sequence_layout(config, self.tokenizer)
        self.source_names = [source_name(source) for source in d.sources]
        self.sources = [Source(source.path, d.cache_dir) for source in d.sources]
        for source in self.sources:
            source.check_tokenizer(self.tokenizer)
        self.train, self.validation = (
            [PackedSource.open(s, split, self.layout, d.validation_fraction, d.cache_dir) for s in self.sources]
            for split in ("train", "validation")
        )
        weights = [source.weight for source in d.sources]
        self.mixture = Mixture([len(packed) for packed in self.train], weights, config.training.seed)

    @classmethod
    def prepare(cls, config: RunConfig) -> None:
        """Check the sources and the tokenizer against the config, and fill the packing caches.

        Raises:
            UserError: a source is missing, damaged, empty or of another tokenizer; the cache cannot be written.
        """
        cls(config)

    @classmethod
    def open(cls, config: RunConfig) -> "TrainingData":
        """The same checks; packings are read from the caches, or made where absent. With `dali`, where there is a GPU,
        this process's decodes for all its loaders."""
        data = cls(config)
        if config.data.decode_backend == "dali" and on_gpu():
            data.device_decoder = DeviceDecoder(data.decoder("dali", device()))
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        """A loader's worker process opens the files itself; no data crosses over."""
        return TrainingData, (self.config,)

    def decoder(self, backend: str, device: torch.device | None = None) -> Decoder:
        d, vision = self.config.data, self.config.model.vision
        decode = DaliBackend(d.max_image_pixels, device) if backend == "dali" else CpuBackend(d.max_image_pixels)
        return Decoder(decode, vision.image_size, vision.image_mean, d.max_bad_image_rate)

    def report(self) -> str:
        """A line a source: what it holds, how well it packs, how often the run goes through it, and when it repeats."""
        t = self.config.training
        samples = t.steps * t.global_batch_size
        epochs, counts = self.mixture.epochs(samples), self.mixture.counts(samples)
        lines = [f"{samples} sequences of {self.layout.seq_length} positions in {t.steps} steps:"]
        for k, name in enumerate(self.source_names):
            source, packed = self.sources[k], self.train[k]
            repeat = self.mixture.first_repeat(k, samples)
            step = 0 if repeat is None else repeat // t.global_batch_size + 1  # as the log counts them
            repeats = f"repeats from step {step} on" if step else "no sequence twice"
            lines.append(
                f"  {name} ({source.kind}): {len(source)} documents in {len(packed)} sequences, "
                f"{packed.fill:.1%} filled, {packed.images / max(1, len(packed)):.1f} images each; "
                f"{counts[k] / samples:.1%} of the run, "
                f"seen {epochs[k]:.2f} times over, {repeats}; {len(self.validation[k])} sequences held out"
            )
        return "\n".join(lines)

    def train_loader(
        self, start_step: int, dp_rank: int, dp_size: int, image_share: ImageShare
    ) -> Iterator[Microbatch]:
        """This rank's microbatches of step `start_step` (from 0) and all after it, without end.

        Each step has global_batch_size / (micro_batch_size · dp_size) of them.

        Args:
            image_share: (rank, size) of the group that shares out each microbatch's pictures; None decodes none.
        """
        return self._iterate(None, dp_rank, dp_size, image_share, start_step, _FOREVER)

    def validation_loader(
        self, source: int, dp_rank: int, dp_size: int, image_share: ImageShare
    ) -> Iterator[Microbatch]:
        """This rank's microbatches of a source's held-out documents: `validation_batches` global batches or as many as
        there are, always the same. The last is filled up with empty sequences without loss (sample id -1)."""
        held_out, t = len(self.validation[source]), self.config.training
        batches = min(t.validation_batches, -(-held_out // t.global_batch_size))
        return self._iterate(source, dp_rank, dp_size, image_share, 0, batches)

    def _iterate(
        self, held_out: int | None, dp_rank: int, dp_size: int, image_share: ImageShare, first: int, last: int
    ) -> Generator[Microbatch, None, None]:
        """Microbatches of the global batches first to last - 1."""
        d, on_device = self.config.data, self.device_decoder
        microbatches = Microbatches(
            self, held_out, dp_rank, dp_size, image_share, leave_to_device=on_device is not None
        )
        numbers = range(first * microbatches.per_batch, last * microbatches.per_batch)
        if not numbers:
            return
        parcels = _received(microbatches, numbers, d.num_workers, d.prefetch)
        if on_device is None:
            yield from (parcel.microbatch() for parcel in parcels)
            return
        # As many are decoded before they are asked for as the workers hold ready.
        decoded = ahead(parcels, functools.partial(_decoded, on_device), max(1, d.num_workers * d.prefetch))
        try:
            for microbatch in decoded:
                if microbatch.images.is_cuda:  # made on another stream: its memory is kept until this one is through
                    microbatch.images.record_stream(torch.cuda.current_stream(microbatch.images.device))
                yield microbatch
        finally:
            decoded.close()


def _decoded(decoder: DeviceDecoder, parcel: Parcel) -> Microbatch:
    microbatch = parcel.microbatch()
    return replace(microbatch, images=decoder(*parcel.encoded(), microbatch.images))


def _received(
    microbatches: Microbatches, numbers: range, num_workers: int, prefetch: int
) -> Generator[Parcel, None, None]:
    """Read in this process, or by workers."""
    if not num_workers:
        yield from map(microbatches.parcel, numbers)
        return
    # The workers are asked for a microbatch as one is received that comes num_workers · prefetch before it, and which
    # has not been copied yet.
    microbatches.slots = Slots(num_workers * prefetch + 1, microbatches.most_bytes)
    loader: DataLoader[Any] = DataLoader(
        microbatches,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        multiprocessing_context=worker_context(),
        worker_init_fn=end_with_parent,
    )
    for item in alive(iter(loader)):
        if isinstance(item, UserError):
            raise item
        yield microbatches.slots.receive(item, page_locked=on_gpu())
