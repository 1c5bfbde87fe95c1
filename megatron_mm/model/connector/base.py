"""What every connector is: patch features in, a fixed number of decoder embeddings out."""

import math
from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from megatron_mm.errors import UserError


class ConnectorShape(Protocol):
    """What is read of `megatron_mm.config.ConnectorConfig`, or of the exported model's configuration."""

    @property
    def kind(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def depth(self) -> int: ...


class Connector(nn.Module, ABC):
    """[n, grid², vision_hidden] patch features, row by row and without class token → [n, num_tokens, output_size].

    Args:
        config: what the kinds read of it, their docstrings say.
        vision_hidden: width of the patch features.
        grid: patches along one side.
        output_size: width of the decoder.
        init_std: of linear layers, positions and queries.
    """

    def __init__(
        self, config: ConnectorShape, vision_hidden: int, grid: int, output_size: int, init_std: float = 0.02
    ) -> None:
        super().__init__()
        self.grid, self.side, self.init_std = grid, square_side(config.num_tokens), init_std

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the initial weights anew from torch's generator, always in the same order."""

    def as_grid(self, features: Tensor) -> Tensor:
        """[n, grid², c] seen as [n, c, grid, grid], in channels-last memory: nothing is copied."""
        return features.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def square_side(num_tokens: int) -> int:
    """√num_tokens. Raises UserError where that is no whole number."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise UserError(
            "must be a square number", where="connector.num_tokens", found=num_tokens,
            allowed=f"for example {side**2} or {(side + 1) ** 2}",
        )  # fmt: skip
    return side


def init_linear(linear: nn.Linear, std: float) -> None:
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
