"""Initial weights that depend on the seed and on the parameter's global name alone.

So a run starts from the same model in every layout, and a change of the layout is no change of the experiment.
Matrices are normal with `init_std`; those that write into the residual stream (attention and FFN outputs) with
`init_std / sqrt(2 · layers)`, as in GPT-2 and Megatron-LM; norms are one, biases zero.
The connector draws its own (`Connector.reset_parameters`).
"""

import math

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


def _draw(piece: Piece, config: RunConfig, out: torch.Tensor) -> None:
    """Draw the whole matrix on the CPU and keep this rank's box of it."""
    name = piece.name
    for index in piece.offset[: piece.leading]:
        name += f"#{index}"
    whole = normal(config.training.seed, name, tuple(piece.global_shape[piece.leading :]), _std(config, piece.name))
    box = tuple(
        slice(o, o + n) for o, n in zip(piece.offset[piece.leading :], piece.shape[piece.leading :], strict=True)
    )
    out.copy_(whole[box].view(out.shape))


@torch.no_grad()
def initialize_weights(model: MultimodalModel, config: RunConfig) -> None:
    """Fill every parameter in place."""
    for piece in pieces(model):
        if piece.name.startswith("connector."):
            continue
        target = piece.view(piece.parameter.view(-1))
        if piece.name.endswith("bias"):
            target.zero_()
        elif "norm" in piece.name or ".ln_p" in piece.name:
            target.fill_(1.0)
        else:
            _draw(piece, config, target)
    if model.connector is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(config.training.seed, "connector"))
            drawn = build_connector(
                config.model.connector, config.model.vision.hidden_size, config.model.vision.grid,
                config.model.decoder.hidden_size, config.model.init_std,
            )  # fmt: skip
        model.connector.load_state_dict(drawn.state_dict())
