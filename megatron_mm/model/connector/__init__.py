"""Connectors: patch features to decoder embeddings. Plain torch, shared by the trained and by the exported model."""

from megatron_mm.model.connector.base import Connector, ConnectorShape
from megatron_mm.model.connector.c_abstractor import CAbstractor
from megatron_mm.model.connector.pixel_shuffle import PixelShuffleMLP
from megatron_mm.model.connector.pooling import AttentionPool, AveragePool

__all__ = [
    "CONNECTORS",
    "AttentionPool",
    "AveragePool",
    "CAbstractor",
    "Connector",
    "PixelShuffleMLP",
    "build_connector",
]

CONNECTORS: dict[str, type[Connector]] = {
    "c_abstractor": CAbstractor,
    "average_pool": AveragePool,
    "attention_pool": AttentionPool,
    "pixel_shuffle_mlp": PixelShuffleMLP,
}


def build_connector(
    config: ConnectorShape, vision_hidden: int, grid: int, output_size: int, init_std: float = 0.02
) -> Connector:
    """The connector that `config.kind` names."""
    return CONNECTORS[config.kind](config, vision_hidden, grid, output_size, init_std)
