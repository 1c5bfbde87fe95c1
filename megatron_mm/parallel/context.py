"""Context parallelism's cut: which positions of a sequence a rank of the group holds.

Of 2·cp equal chunks, rank r holds chunk r and chunk 2·cp − 1 − r (Megatron-Core's cut, which its rotary embeddings
follow): under causal attention early chunks cost little and late ones much, so every rank gets one of each.
"""

import torch
from torch import Tensor


def own_positions(x: Tensor, rank: int, size: int) -> Tensor:
    """[b, s, …] → [b, s/size, …], the positions of `rank` in a group of `size`."""
    if size == 1:
        return x
    chunks = x.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[-1 - rank]], dim=1)


def in_order(x: Tensor) -> Tensor:
    """[size, s/size, …], every rank's positions one rank after the other → [s, …] in the sequence's order."""
    halves = x.unflatten(1, (2, -1))  # [size, 2, chunk, …]
    return torch.cat([halves[:, 0], halves[:, 1].flip(0)]).flatten(0, 1)


def by_rank(x: Tensor, size: int) -> Tensor:
    """[s, …] in the sequence's order → [size, s/size, …]: what `in_order` undoes."""
    chunks = x.unflatten(0, (2 * size, -1))
    return torch.stack([chunks[:size], chunks[size:].flip(0)], dim=1).flatten(1, 2)
