"""Random numbers that depend on the run's seed and on a name alone, never on the layout."""

import hashlib

import torch
from torch import Tensor


def seed_of(seed: int, name: str) -> int:
    """63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """fp32, on the CPU."""
    generator = torch.Generator().manual_seed(seed_of(seed, name))
    return torch.empty(shape).normal_(0, std, generator=generator)
