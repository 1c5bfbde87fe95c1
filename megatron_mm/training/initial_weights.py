"""A new run from the weights of other checkpoints (`checkpoint.init_from`), in any layout, precision and resolution.

Weights and fp32 masters are read as global tensors by name. The masters come from what holds most digits: the other
run's masters, or weights in fp32. Where the images have another resolution than the other run's, positions are
interpolated (see `model/positions.py`); any other difference of shape is refused.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.config import VisionConfig
from megatron_mm.errors import UserError
from megatron_mm.model.positions import fit_grid, grid_of
from megatron_mm.training.checkpoint import Box, model_boxes, state_boxes, stored_name, together
from megatron_mm.training.checkpoint_files import CheckpointReader, read_tensors

if TYPE_CHECKING:
    from megatron_mm.training.step import Trainer


@dataclass
class InitialWeights:
    """What became of the model's tensors, by name; the same on every rank."""

    directories: tuple[str, ...]
    at_random: set[str] = field(default_factory=set)  # no checkpoint holds them
    interpolated: dict[str, str] = field(default_factory=dict)  # from which grid to which

    def report(self) -> str:
        text = f"weights from {', '.join(self.directories)}; {len(self.at_random)} tensors start at random"
        for name, grids in sorted(self.interpolated.items()):
            text += f"; {name} interpolated from a grid of {grids}"
        return text


def load_weights(trainer: "Trainer", directories: tuple[str, ...]) -> InitialWeights:
    """Fill the model's weights and the optimizer's masters; every rank calls it. What several checkpoints hold comes
    from the last of them; what none holds stays as it is, or is drawn where the trainer has no weights yet."""
    own = InitialWeights(directories)
    together(lambda: _load(trainer, own))
    everyone: list[InitialWeights] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for other in everyone:
        own.at_random |= other.at_random
        own.interpolated |= other.interpolated
    return own


@torch.no_grad()
def _load(trainer: "Trainer", found: InitialWeights) -> None:
    readers = [read_tensors(d) for d in found.directories]
    pieces = list(trainer.pieces())
    for box in model_boxes(pieces):
        holding = [r for r in readers if box.name in r]
        if holding:
            box.tensor.copy_(_value(holding[-1], box, box.name, trainer.config.model.vision, found))
        else:
            found.at_random.add(box.name)
    # And masters, for what no checkpoint holds.
    trainer.draw_weights(() if trainer.has_weights else found.at_random)
    for box in state_boxes(trainer, pieces):
        name = box.name.removeprefix("main/")
        holding = [r for r in readers if name in r]
        if name != box.name and holding:
            box.tensor.copy_(_value(holding[-1], box, name, trainer.config.model.vision, found))


def _value(reader: CheckpointReader, box: Box, name: str, vision: VisionConfig, found: InitialWeights) -> Tensor:
    """The box of the weight `name`, or of its master."""
    shape = reader.shape(name)
    if shape == box.global_shape:
        return reader.box(stored_name(reader, name, box.tensor.dtype), box.offset, tuple(box.tensor.shape))
    old, new = grid_of(name, shape, vision), grid_of(name, box.global_shape, vision)
    if old is None or new is None or (*shape[:-2], shape[-1]) != (*box.global_shape[:-2], box.global_shape[-1]):
        raise UserError(
            "the weights have another shape", where=f"checkpoint.init_from: {reader.directory}: {name}",
            found=shape, allowed=str(box.global_shape),
            do="make the model's config match the weights; of what shapes them only model.vision.image_size may differ",
        )  # fmt: skip
    found.interpolated[name] = f"{old} × {old} to {new} × {new}"
    # In fp32 for weights too, so that they are their masters, rounded once.
    whole = fit_grid(name, reader.tensor(stored_name(reader, name, torch.float32)).float(), vision)
    return whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.tensor.shape, strict=True))]
