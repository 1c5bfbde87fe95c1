"""Initial weights that depend on the seed and on the parameter's global name alone.

So a run starts from the same model in every layout, and a change of the layout is no change of the experiment.
Matrices are normal with `init_std`; those that write into the residual stream (attention and FFN outputs) with
`init_std / sqrt(2 · layers)`, as in GPT-2 and Megatron-LM; norms are one, biases zero.
The connector draws its own (`Connector.reset_parameters`).
"""

import functools
import math
from collections.abc import Callable, Collection

import torch

from megatron_mm.config import RunConfig
from megatron_mm.model.connector import build_connector
from megatron_mm.model.multimodal import MultimodalModel
from megatron_mm.model.seeding import normal, seed_of
from megatron_mm.model.sharding import Piece, pieces


def _std(config: RunConfig, name: str) -> float:
    std = config.model.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        vision, decoder = config.model.vision, config.model.decoder
        std /= math.sqrt(2 * (vision.built_layers if name.startswith("vision.") else decoder.num_layers))
    return std


def _draw(piece: Piece, config: RunConfig, whole_matrix: Callable[..., torch.Tensor], out: torch.Tensor) -> None:
    """Draw the whole matrix on the CPU and keep this rank's box of it."""
    name = piece.name
    for index in piece.offset[: piece.leading]:
        name += f"#{index}"
    whole = whole_matrix(
        config.training.seed, name, tuple(piece.global_shape[piece.leading :]), _std(config, piece.name)
    )
    box = tuple(
        slice(o, o + n) for o, n in zip(piece.offset[piece.leading :], piece.shape[piece.leading :], strict=True)
    )
    out.copy_(whole[box].view(out.shape))


@torch.no_grad()
def initialize_weights(model: MultimodalModel, config: RunConfig, names: Collection[str] | None = None) -> None:
    """Fill every parameter in place, or those that are parts of the tensors `names`."""
    connector = None
    whole_matrix = functools.lru_cache(maxsize=1)(normal)  # gate and up projection are two pieces of one matrix
    for piece in pieces(model):
        if names is not None and piece.name not in names:
            continue
        if piece.name.startswith("connector."):
            connector = connector or _draw_connector(config)
            piece.parameter.copy_(connector[piece.name.removeprefix("connector.")])
            continue
        target = piece.view(piece.parameter.view(-1))
        if piece.name.endswith("bias"):
            target.zero_()
        elif "norm" in piece.name or ".ln_p" in piece.name:
            target.fill_(1.0)
        else:
            _draw(piece, config, whole_matrix, target)


def _draw_connector(config: RunConfig) -> dict[str, torch.Tensor]:
    """Its state: drawn as a whole, tensor after tensor, from one generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.training.seed, "connector"))
        drawn = build_connector(
            config.model.connector, config.model.vision.hidden_size, config.model.vision.grid,
            config.model.decoder.hidden_size, config.model.init_std,
        )  # fmt: skip
    return drawn.state_dict()
