"""Checkpoints of a running job: sharded, deduplicated, written in the background, resumed in any layout.

    save(step) ── every rank copies its boxes to host memory ── a thread writes rank-N.safetensors into step-….tmp
    poll()     ── once all ranks have written: rank 0 checks sizes, writes the index, renames, removes old ones
    load()     ── newest whole checkpoint; a damaged one is passed over with a warning; each rank reads its own boxes

Boxes that several ranks hold (replicas) are written by one of them, chosen so that ranks write alike.
"""

import functools
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.config import RunConfig
from megatron_mm.errors import UserError
from megatron_mm.model.sharding import Piece
from megatron_mm.parallel.topology import all_max
from megatron_mm.training.checkpoint_files import (
    CheckpointReader,
    build_index,
    complete,
    digest_faults,
    finish,
    latest,
    read_tensors,
    size_faults,
    step_directory,
    tensor_entry,
    write_durably,
    write_tensor_file,
    write_tensors,
)
from megatron_mm.training.optimizer import set_adam_step, state_parts
from megatron_mm.training.same_run import check_same_run

if TYPE_CHECKING:
    from megatron_mm.training.step import Trainer

__all__ = ["CheckpointReader", "Checkpointer", "latest", "read_tensors", "write_tensors"]


@dataclass(frozen=True)
class Box:
    """A live part of the training state and its place in a global tensor."""

    name: str
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    tensor: Tensor  # shaped like the box; writing into it restores

    @property
    def key(self) -> str:
        return f"{self.name}@{','.join(map(str, self.offset))}"


def flat_range_boxes(
    start: int, end: int, shape: tuple[int, ...]
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Elements [start, end) of a row-major array of `shape`, as boxes: (first element, offset, shape).

    The distributed optimizer cuts parameters at any element; a cut array of n axes is at most 2n - 1 boxes.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield start, (start,) * len(shape), (end - start,) * len(shape)
        return
    row = torch.Size(shape[1:]).numel()
    first, last = -(-start // row), end // row  # whole rows [first, last)
    if first > last:  # within one row
        for at, offset, box in flat_range_boxes(start - last * row, end - last * row, shape[1:]):
            yield at + last * row, (last, *offset), (1, *box)
        return
    for at, offset, box in flat_range_boxes(start - (first - 1) * row, row if start < first * row else 0, shape[1:]):
        yield at + (first - 1) * row, (first - 1, *offset), (1, *box)
    if first < last:
        yield first * row, (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    for at, offset, box in flat_range_boxes(0, end - last * row, shape[1:]):
        yield at + last * row, (last, *offset), (1, *box)


def model_boxes(model_pieces: list[Piece]) -> Iterator[Box]:
    for piece in model_pieces:
        yield Box(piece.name, piece.offset, piece.global_shape, piece.view(piece.parameter.data.view(-1)))


def state_boxes(trainer: "Trainer", model_pieces: list[Piece]) -> Iterator[Box]:
    by_parameter: dict[int, list[Piece]] = {}
    for piece in model_pieces:
        by_parameter.setdefault(id(piece.parameter), []).append(piece)
    for part in state_parts(trainer.optimizer):
        for piece in by_parameter[id(part.parameter)]:
            start, end = max(part.start, piece.start), min(part.end, piece.start + piece.numel)
            for at, offset, shape in flat_range_boxes(start - piece.start, end - piece.start, piece.shape):
                in_part = at + piece.start - part.start
                place = tuple(a + b for a, b in zip(piece.offset, offset, strict=True))
                count = torch.Size(shape).numel()
                for kind, tensor in part.tensors.items():
                    view = tensor[in_part : in_part + count].view(shape)
                    yield Box(f"{kind}/{piece.name}", place, piece.global_shape, view)


class Checkpointer:
    """Saves and resumes one run. All methods are collective: every rank calls them at the same step."""

    def __init__(self, config: RunConfig, trainer: "Trainer", tokenizer: Path) -> None:
        self.config, self.trainer, self.tokenizer = config, trainer, tokenizer
        self.root = Path(config.run_dir) / "checkpoints"
        self._plan: tuple[list[Box], dict[str, Any]] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pending_step = 0

    # ── saving ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _boxes(self) -> list[Box]:
        model_pieces = list(self.trainer.pieces())
        return [*model_boxes(model_pieces), *state_boxes(self.trainer, model_pieces)]

    def _make_plan(self) -> tuple[list[Box], dict[str, Any]]:
        """Which boxes this rank writes, and the index of all tensors. Made once: tensors stay in place in a run."""
        boxes = {box.key: box for box in self._boxes()}
        mine = [
            (b.key, b.name, b.offset, tuple(b.tensor.shape), b.global_shape, str(b.tensor.dtype))
            for b in boxes.values()
        ]
        everyone: list[list[tuple[Any, ...]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        holders: dict[str, tuple[list[int], tuple[Any, ...]]] = {}
        for rank, listed in enumerate(everyone):
            for key, *rest in listed:
                holders.setdefault(key, ([], tuple(rest)))[0].append(rank)
        load = [0] * len(everyone)
        tensors: dict[str, dict[str, Any]] = {}
        write: list[Box] = []
        for key, (ranks, (name, offset, shape, global_shape, dtype)) in sorted(holders.items()):
            writer = min(ranks, key=lambda r: load[r])
            load[writer] += torch.Size(shape).numel()
            entry = tensors.setdefault(name, tensor_entry(getattr(torch, dtype.removeprefix("torch.")), global_shape))
            entry["boxes"].append({"file": _file(writer), "key": key, "offset": list(offset), "shape": list(shape)})
            if writer == dist.get_rank():
                write.append(boxes[key])
        for name, entry in tensors.items():
            held = sum(torch.Size(b["shape"]).numel() for b in entry["boxes"])
            if held != torch.Size(entry["shape"]).numel():
                raise RuntimeError(f"{name}: boxes hold {held} elements of a tensor of shape {entry['shape']}")
        return write, tensors

    def save(self, step: int) -> None:
        """Start writing the state after `step` updates. Waits only for a save that is still under way."""
        self.wait()
        if self._plan is None:
            self._plan = self._make_plan()
        boxes, _ = self._plan
        final = step_directory(self.root, step)
        if agree(lambda: final.is_dir() and not size_faults(final)):
            return  # resumed at this very step and stopped before the next
        temporary = final.with_name(final.name + ".tmp")
        # A copy each, so that training may go on. Box views are contiguous copies: safetensors wants no strides.
        held = {box.key: box.tensor.detach().to("cpu", copy=True).contiguous() for box in boxes}
        needed = torch.tensor(sum(t.nbytes for t in held.values()), dtype=torch.int64, device=boxes[0].tensor.device)
        dist.all_reduce(needed)

        def prepare() -> None:
            if dist.get_rank() != 0:
                return
            for leftover in self.root.glob("step-*.tmp") if self.root.is_dir() else ():
                shutil.rmtree(leftover)  # of a run that was killed while it wrote
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
            if free < needed.item():
                shutil.rmtree(temporary)
                raise UserError(
                    "no space for a checkpoint", where=str(self.root), found=f"{free / 2**30:.2f} GiB free",
                    allowed=f"at least {needed.item() / 2**30:.2f} GiB",
                    do="free some space and start again: the run resumes from its newest checkpoint",
                )  # fmt: skip

        together(prepare)
        self._pending_step, self._error = step, None

        def write() -> None:
            try:
                record = write_tensor_file(temporary / _file(dist.get_rank()), held)
                write_durably(temporary / (_file(dist.get_rank()) + ".json"), json.dumps(record))
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
        self._thread.start()
        if not self.config.checkpoint.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Finish a save if all ranks have written their part. Cheap; call it every step."""
        if self._thread is not None and all_max(int(self._thread.is_alive())) == 0:
            self._finish()

    def wait(self) -> None:
        """Finish a save that is under way, waiting for it."""
        if self._thread is not None:
            self._thread.join()
            self._finish()

    def _finish(self) -> None:
        assert self._plan is not None
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        final = step_directory(self.root, self._pending_step)
        temporary = final.with_name(final.name + ".tmp")
        error, self._error = self._error, None

        def check_written() -> None:
            if error is not None:
                raise UserError(
                    "the checkpoint could not be written", where=str(temporary),
                    found=f"rank {dist.get_rank()}: {error}",
                    do="see that there is space and permission; earlier checkpoints are untouched",
                )  # fmt: skip

        try:
            together(check_written)
        except UserError:
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

        def name_it() -> None:
            if dist.get_rank() != 0:
                return
            assert self._plan is not None
            files = {}
            for rank in range(dist.get_world_size()):
                record = temporary / (_file(rank) + ".json")
                files[_file(rank)] = json.loads(record.read_text())
                record.unlink()
                if (temporary / _file(rank)).stat().st_size != files[_file(rank)]["bytes"]:
                    raise UserError("a file is shorter than it was written", where=str(temporary / _file(rank)))
            samples = self._pending_step * self.config.training.global_batch_size
            extra = {"samples": samples, "ids": self.trainer.layout.__dict__}
            index = build_index(self._pending_step, self._plan[1], files, extra)
            finish(temporary, final, index, self.config, self.tokenizer)
            keep = self.config.checkpoint.keep
            for old in complete(self.root)[keep:] if keep else []:
                shutil.rmtree(old)

        together(name_it)

    # ── resuming ────────────────────────────────────────────────────────────────────────────────────────────────

    def load_latest(self) -> int:
        """Restore the newest whole checkpoint; answers with its step, or 0 where there is none: then the trainer is as
        it was, without weights if they were not drawn.

        Every rank checks the digests of a share of the files. A damaged checkpoint is passed over, and said so.
        """
        for directory in complete(self.root):
            rank, world = dist.get_rank(), dist.get_world_size()
            faults = size_faults(directory)
            if not faults:
                names = sorted(read_tensors(directory).index["files"])
                faults = digest_faults(directory, names[rank::world])
            if faults:
                print(f"warning: {directory} is damaged and is passed over: {'; '.join(faults)}", file=sys.stderr)
            if all_max(len(faults)):
                continue
            reader = read_tensors(directory)
            together(functools.partial(self._check_same_run, reader))
            boxes = self._boxes()
            with torch.no_grad():
                for box in boxes:
                    name = stored_name(reader, box.name, box.tensor.dtype)
                    box.tensor.copy_(reader.box(name, box.offset, tuple(box.tensor.shape)))
            set_adam_step(self.trainer.optimizer, reader.step)
            self.trainer.has_weights = True
            return reader.step
        return 0

    def _check_same_run(self, reader: CheckpointReader) -> None:
        check_same_run(
            reader.config, self.config, fault="differs from the run that this folder holds",
            do=f"keep it, or set another run_dir (with checkpoint.init_from to start from {reader.directory})",
        )  # fmt: skip


def stored_name(reader: CheckpointReader, name: str, dtype: torch.dtype) -> str:
    """The tensor that a weight `NAME` or a master `main/NAME` of this type is read from: where fp32 is wanted the
    master if there is one, else the weight. So a run goes on in another precision without losing a digit."""
    plain = name.removeprefix("main/")
    return f"main/{plain}" if dtype == torch.float32 and f"main/{plain}" in reader else plain


def together(action: Any) -> None:
    """Run `action` on every rank; if it raises a UserError on any, raise one on all instead of hanging the others."""
    error: UserError | None = None
    try:
        action()
    except UserError as caught:
        error = caught
    except OSError as caught:
        error = UserError(str(caught))
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error))
    first = next((m for m in messages if m is not None), None)
    if first is not None:
        told = error if error is not None and str(error) == first else UserError(first)
        told.everywhere = True
        raise told


def agree(question: Any) -> bool:
    """Rank 0's answer, on every rank."""
    return bool(all_max(int(question()) if dist.get_rank() == 0 else 0))


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
