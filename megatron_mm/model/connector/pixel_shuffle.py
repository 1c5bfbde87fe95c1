"""Pixel shuffle and an MLP, as InternVL (arXiv 2312.14238) and MM1's successors have it: no patch is averaged away."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mm.errors import UserError
from megatron_mm.model.connector.base import Connector, ConnectorShape, init_linear

NORM_EPSILON = 1e-6


class PixelShuffleMLP(Connector):
    """Each r × r square of patches becomes one token of r² times the width, then LayerNorm, Linear, GELU, Linear.

    Reads num_tokens; r = grid / √num_tokens must be whole. Initialisation: normal with `init_std`, biases zero.
    """

    def __init__(
        self, config: ConnectorShape, vision_hidden: int, grid: int, output_size: int, init_std: float = 0.02
    ) -> None:
        super().__init__(config, vision_hidden, grid, output_size, init_std)
        self.ratio, rest = divmod(grid, self.side)
        if rest or not self.ratio:
            sides = [side for side in range(1, grid + 1) if grid % side == 0]
            raise UserError(
                "pixel shuffle needs whole squares of patches", where="connector.num_tokens",
                found=f"{config.num_tokens} tokens from a grid of {grid} × {grid}",
                allowed=", ".join(str(side * side) for side in sides),
            )  # fmt: skip
        width = self.ratio**2 * vision_hidden
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.fc1 = nn.Linear(width, output_size)
        self.fc2 = nn.Linear(output_size, output_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        for linear in (self.fc1, self.fc2):
            init_linear(linear, self.init_std)

    def forward(self, features: Tensor) -> Tensor:
        # [n, side, r, side, r, c] → [n, side, side, r, r, c]: a square's patches row by row, each with its channels.
        squares = features.view(len(features), self.side, self.ratio, self.side, self.ratio, -1).transpose(2, 3)
        return self.fc2(F.gelu(self.fc1(self.norm(squares.flatten(3).flatten(1, 2)))))
