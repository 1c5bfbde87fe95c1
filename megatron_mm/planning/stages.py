"""Which decoder layers each pipeline stage holds, and in what order a stage works through its microbatches.

Megatron-Core's rules, written down so that a plan can be made without building anything (tests hold both together).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mm.config import RunConfig
from megatron_mm.model.decoder import moe_layer_pattern


@dataclass(frozen=True)
class Chunk:
    """What one virtual stage holds (a whole stage, without virtual pipeline parallelism)."""

    dense: int  # layers with an ordinary FFN
    moe: int  # layers with experts
    first: bool  # encoder, connector and token embeddings
    last: bool  # output layer and loss

    @property
    def layers(self) -> int:
        return self.dense + self.moe


Stage = tuple[Chunk, ...]


def stages(config: RunConfig) -> list[Stage]:
    """The pipeline's stages, each with its virtual stages."""
    d, p = config.model.decoder, config.parallel
    pp, vpp = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size
    has_experts = moe_layer_pattern(d.num_layers, d.moe.layer_freq) if d.moe else [0] * d.num_layers
    first = p.first_pipeline_stage_layers
    counts = [d.num_layers // pp] * pp if first is None else [first] + [(d.num_layers - first) // (pp - 1)] * (pp - 1)
    chunks: list[list[Chunk]] = [[] for _ in range(pp)]
    at = 0
    for v in range(vpp):
        for stage in range(pp):
            share = counts[stage] // vpp
            moe = sum(has_experts[at : at + share])
            at += share
            chunks[stage].append(Chunk(share - moe, moe, first=v == stage == 0, last=v == vpp - 1 and stage == pp - 1))
    return [tuple(stage) for stage in chunks]


def order(stage: int, pp: int, vpp: int, microbatches: int) -> Iterator[tuple[bool, int]]:
    """The stage's work in 1F1B's order, interleaved where vpp > 1: (is it a forward pass, of which virtual stage)."""
    forwards = [
        v for start in range(0, microbatches, pp) for v in range(vpp) for _ in range(min(pp, microbatches - start))
    ]
    later = pp - stage - 1
    warm_up = min(later if vpp == 1 else 2 * later + (vpp - 1) * pp, len(forwards))
    for v in forwards[:warm_up]:
        yield True, v
    done = 0
    for v in forwards[warm_up:]:
        yield True, v
        yield False, vpp - 1 - forwards[done]
        done += 1
    for v in forwards[done:]:
        yield False, vpp - 1 - v
