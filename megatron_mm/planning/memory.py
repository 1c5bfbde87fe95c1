"""Bytes of a rank: what a stage holds for good, what its microbatches in flight hold, and the most at any moment."""

from dataclasses import dataclass
from typing import Any

from megatron_mm.planning.stages import order


@dataclass(frozen=True)
class ChunkBytes:
    """Of one microbatch in one virtual stage."""

    kept: int  # from its forward to its backward pass: saved tensors, the stage's input and output
    forward_peak: int  # most at a time during the forward pass, from nothing
    backward_peak: int  # most at a time during the backward pass, `kept` counted in


@dataclass(frozen=True)
class StageBytes:
    """Of one rank of a pipeline stage."""

    parameters: int
    gradients: int
    optimizer: int  # fp32 masters and moments
    microbatch: int  # the inputs of one microbatch, pixels among them
    chunks: tuple[ChunkBytes, ...]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "StageBytes":
        return StageBytes(**{**data, "chunks": tuple(ChunkBytes(**chunk) for chunk in data["chunks"])})


@dataclass(frozen=True)
class StageMemory:
    """Of one rank of a pipeline stage over a whole step, bytes."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int  # kept for the backward passes of the microbatches in flight, at the fullest moment
    working: int  # above that at the fullest moment: a layer's temporaries, gradients of activations
    inputs: int  # all microbatches of a step are copied to the device at its start
    in_flight: int  # most microbatches (in virtual stages: parts of them) kept at a time

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working + self.inputs


def stage_memory(found: StageBytes, stage: int, pp: int, microbatches: int) -> StageMemory:
    """Go through the stage's schedule and look for the fullest moment."""
    vpp = len(found.chunks)
    kept = in_flight = most = 0
    fullest = (0, 0)  # bytes, and how many of them are kept for backward passes
    for forward, v in order(stage, pp, vpp, min(microbatches, 4 * pp)):  # later ones bring nothing new
        chunk = found.chunks[v]
        if forward:
            fullest = max(fullest, (kept + chunk.forward_peak, kept + chunk.kept))
            kept, in_flight = kept + chunk.kept, in_flight + 1
            most = max(most, in_flight)
        else:
            fullest = max(fullest, (kept - chunk.kept + chunk.backward_peak, kept))
            kept, in_flight = kept - chunk.kept, in_flight - 1
    return StageMemory(
        stage=stage,
        parameters=found.parameters,
        gradients=found.gradients,
        optimizer=found.optimizer,
        activations=fullest[1],
        working=fullest[0] - fullest[1],
        inputs=found.microbatch * microbatches,
        in_flight=most,
    )
