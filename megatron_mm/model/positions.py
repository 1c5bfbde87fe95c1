"""Learned positions, one a patch: what of the weights follows the resolution of the images.

All else fits any resolution, so weights of one start a model of another: these are interpolated.

    encoder    vision.position_embeddings.weight  [class token + grid², h]
    connector  connector.position_embedding       [1, grid², h]            c_abstractor and attention_pool
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mm.config import VisionConfig

_ENCODER, _CONNECTOR = "vision.position_embeddings.weight", "connector.position_embedding"


def interpolate_positions(positions: Tensor, grid: int, class_token: bool) -> Tensor:
    """Position embeddings [class token + old grid², h] for another grid: bicubic, as transformers'
    `interpolate_pos_encoding`; the class token's stays."""
    first, patches = positions[: int(class_token)], positions[int(class_token) :]
    old = math.isqrt(len(patches))
    if old == grid:
        return positions
    square = patches.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    scaled = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, scaled[0].flatten(1).T.to(positions.dtype)])


def grid_of(name: str, shape: tuple[int, ...], vision: VisionConfig) -> int | None:
    """The grid that positions of this shape belong to; None where the tensor is none of positions."""
    if name not in (_ENCODER, _CONNECTOR):
        return None
    patches = shape[-2] - int(name == _ENCODER and vision.shape.class_token)
    grid = math.isqrt(max(0, patches))
    return grid if grid and grid * grid == patches else None


def fit_grid(name: str, value: Tensor, vision: VisionConfig) -> Tensor:
    """The tensor as an encoder of this resolution has it: positions interpolated, any other as it is."""
    if name == _ENCODER:
        return interpolate_positions(value, vision.grid, vision.shape.class_token)
    if name == _CONNECTOR:
        return interpolate_positions(value[0], vision.grid, class_token=False)[None]
    return value
