"""What the training loop sees of the data: checked sources, and microbatches of any step on any rank.

The state of the data is the number of the step: nothing else is saved. A loader for step n on rank r of any
data-parallel size gives what a run from the start would have given there.
"""

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_mm.config import RunConfig, SequenceLayout, source_name
from megatron_mm.data.batch import Assembled, ImageRef, Microbatch, assemble, deal, share_of
from megatron_mm.data.decode import Decoder
from megatron_mm.data.mixture import Mixture, permute
from megatron_mm.data.packing import PackedSource
from megatron_mm.data.source import Source
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import UserError

_FOREVER = 1 << 62
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ImageShare = tuple[int, int] | None  # rank and size of the group that shares out a microbatch's pictures


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
        self.tokenizer = Tokenizer(d.tokenizer)
        if self.tokenizer.vocab_size > config.model.decoder.vocab_size:
            raise UserError(
                "the tokenizer has more ids than the decoder", where="model.decoder.vocab_size",
                found=config.model.decoder.vocab_size, allowed=f"at least {self.tokenizer.vocab_size}",
            )  # fmt: skip
        self.layout = sequence_layout(config, self.tokenizer)
        self.source_names = [source_name(source) for source in d.sources]
        self.sources = [Source(source.path) for source in d.sources]
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
        """The same checks; packings are read from the caches, or made where absent."""
        return cls(config)

    def __reduce__(self) -> tuple[Any, ...]:
        """A loader's worker process opens the files itself; no data crosses over."""
        return TrainingData, (self.config,)

    def report(self) -> str:
        """A line a source: what it holds, how well it packs, how often the run goes through it."""
        t = self.config.training
        samples = t.steps * t.global_batch_size
        epochs, counts = self.mixture.epochs(samples), self.mixture.counts(samples)
        lines = [f"{samples} sequences of {self.layout.seq_length} positions in {t.steps} steps:"]
        for k, name in enumerate(self.source_names):
            source, packed = self.sources[k], self.train[k]
            lines.append(
                f"  {name} ({source.kind}): {len(source)} documents in {len(packed)} sequences, "
                f"{packed.fill:.1%} filled, {packed.images / max(1, len(packed)):.1f} images each; "
                f"{counts[k] / samples:.1%} of the run, "
                f"{epochs[k]:.2f} epochs; {len(self.validation[k])} sequences held out"
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
        microbatches = _Microbatches(self, None, dp_rank, dp_size, image_share)
        return _iterate(microbatches, range(start_step * microbatches.per_batch, _FOREVER))

    def validation_loader(
        self, source: int, dp_rank: int, dp_size: int, image_share: ImageShare
    ) -> Iterator[Microbatch]:
        """This rank's microbatches of a source's held-out documents: `validation_batches` global batches or as many as
        there are, always the same. The last is filled up with empty sequences without loss (sample id -1)."""
        microbatches = _Microbatches(self, source, dp_rank, dp_size, image_share)
        held_out, t = len(self.validation[source]), self.config.training
        batches = min(t.validation_batches, -(-held_out // t.global_batch_size))
        return _iterate(microbatches, range(batches * microbatches.per_batch))


class _Microbatches(Dataset[Microbatch | UserError]):
    """A rank's microbatch of any number, of training or of the held-out part of one source.

    Number n is microbatch `n mod per_batch` of global batch `n div per_batch`.
    """

    def __init__(
        self, data: TrainingData, held_out: int | None, dp_rank: int, dp_size: int, image_share: ImageShare
    ) -> None:
        d, t = data.config.data, data.config.training
        self.data, self.held_out, self.dp_rank, self.dp_size = data, held_out, dp_rank, dp_size
        self.image_share = image_share
        self.batch_size, self.micro_size = t.global_batch_size, t.micro_batch_size
        self.per_batch, rest = divmod(self.batch_size, self.micro_size * dp_size)
        if rest:
            raise ValueError(f"a batch of {self.batch_size} does not divide by {self.micro_size} × {dp_size}")
        mean = data.config.model.vision.image_mean
        self.decoder = Decoder(data.layout.image_size, d.max_image_pixels, mean, d.max_bad_image_rate)
        self._batch = -1  # the one whose samples are known, as neighbours mostly ask for the same
        self._dealt = self._sources = self._sequences = np.zeros(0, dtype=np.int64)

    def _packed(self, source: int) -> PackedSource:
        return (self.data.train if self.held_out is None else self.data.validation)[source]

    def _locate(self, batch: int) -> None:
        """Sources and sequences of a global batch, -1 for fillers, and its samples dealt into microbatches."""
        if batch == self._batch:
            return
        samples = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        if self.held_out is None:
            self._sources, self._sequences = self.data.mixture.locate_all(samples)
        else:
            # Packing leaves the largest documents in front: take a fair choice of the sequences.
            size = len(self._packed(self.held_out))
            there = samples < size
            order = permute(samples[there], size, np.zeros(int(there.sum()), dtype=np.uint64))
            self._sources = np.full(self.batch_size, self.held_out)
            self._sequences = np.concatenate([order, np.full(int((~there).sum()), -1)])
        counts = np.zeros(self.batch_size, dtype=np.int64)
        for source in np.unique(self._sources).tolist():
            mine = (self._sources == source) & (self._sequences >= 0)
            counts[mine] = self._packed(source).image_counts[self._sequences[mine]]
        self._dealt = deal(counts, self.batch_size // self.micro_size)
        self._batch = batch

    def __getitem__(self, number: int) -> Microbatch | UserError:
        """An error that the user can mend is handed over as a value: raised in a worker, it would lose its form."""
        try:
            return self._microbatch(number)
        except UserError as error:
            return error

    def _microbatch(self, number: int) -> Microbatch:
        batch, place = divmod(number, self.per_batch)
        self._locate(batch)
        rows: list[Assembled] = []
        images: list[tuple[int, ImageRef, int]] = []  # source, picture, sample
        mine = self._dealt[place * self.dp_size + self.dp_rank]
        samples = np.where(self._sequences[mine] >= 0, mine + batch * self.batch_size, -1)
        for row, sample in zip(mine.tolist(), samples.tolist(), strict=True):
            source, sequence = int(self._sources[row]), int(self._sequences[row])
            pieces = self._packed(source).pieces(sequence) if sequence >= 0 else []
            block = self.data.config.data.block_attention
            rows.append(assemble(self.data.sources[source], pieces, self.data.layout, block))
            images += [(source, image, sample) for image in rows[-1].images]
        share = images[share_of(len(images), *self.image_share)] if self.image_share else []
        size = self.data.layout.image_size
        pixels = [self._decode(*image) for image in share]

        def stack(name: str) -> torch.Tensor:
            return torch.from_numpy(np.stack([getattr(row, name) for row in rows]))

        return Microbatch(
            tokens=stack("tokens"),
            labels=stack("labels"),
            loss_mask=stack("loss_mask"),
            documents=stack("documents"),
            position_ids=stack("position_ids"),
            source_ids=torch.from_numpy(self._sources[mine]),
            images=torch.stack(pixels) if pixels else torch.zeros((0, 3, size, size), dtype=torch.uint8),
            num_images=len(images),
            sample_ids=torch.from_numpy(samples),
        )

    def _decode(self, source: int, image: ImageRef, sample: int) -> torch.Tensor:
        holder = self.data.sources[source]
        name = f"sample {sample} ({self.data.source_names[source]}, document {image.document}, image {image.number})"
        data, crc32 = holder.image(image.document, image.number)
        return self.decoder(data, crc32, name)


def _iterate(microbatches: _Microbatches, numbers: range) -> Iterator[Microbatch]:
    d = microbatches.data.config.data
    if not numbers:
        return
    if not d.num_workers:
        for number in numbers:
            yield _raised(microbatches[number])
        return
    context = _worker_context()
    loader: DataLoader[Any] = DataLoader(
        microbatches,
        batch_size=None,
        sampler=numbers,
        num_workers=d.num_workers,
        prefetch_factor=d.prefetch,
        multiprocessing_context=context,
        worker_init_fn=_end_with_parent,
    )
    for item in _alive(loader):
        # Copied out of shared memory: a tensor there keeps a file open, and a step may hold hundreds of microbatches.
        yield _raised(item).map(torch.clone)


def _alive(loader: DataLoader[Any]) -> Iterator[Microbatch | UserError]:
    """The loader's items; one error for all the ways in which a worker's death shows."""
    items: Any = iter(loader)
    # At the interpreter's end workers are asked by SIGTERM, which they hold back, and then waited for: end them first.
    finalizer = multiprocessing.util.Finalize(None, _kill, args=(items._workers,), exitpriority=100)
    try:
        yield from items
    except (OSError, EOFError) as error:  # it died while it handed a microbatch over
        raise RuntimeError("a data worker exited unexpectedly (killed, or out of memory?)") from error
    finally:
        items._shutdown_workers()
        _kill(items._workers)  # those that are left: torch shuts none down while the interpreter ends
        finalizer.cancel()


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()


def _end_with_parent(_: int) -> None:
    """In a worker: end when the training process is gone, however it went. Its death shows to nobody else: the server
    process lives as long as its workers do, and they hold each other."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _worker_context() -> Any:
    """Workers come from a server process: forked from the training process they would inherit its threads and devices.

    The server imports torch once for all of them. Signals that ask a run to stop often go to all of its processes;
    server and workers hold them back, so that the training process can finish its step and write a checkpoint.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_mm.data.loader"])
    resource_tracker.ensure_running()  # first, as it would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _raised(item: Microbatch | UserError) -> Microbatch:
    if isinstance(item, UserError):
        raise item
    return item
