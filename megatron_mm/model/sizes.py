"""Parameters and floating-point operations of a model, from its configuration alone.

Counts equal what the built modules hold (tests/parallel/test_sizes.py). A multiply-add is two operations. Attention is
counted by true document lengths: a causal document of n positions has n (n + 1) / 2 pairs, whatever it is packed with.
The backward pass costs twice the forward pass, less of what is frozen (`passes`); recomputation is not counted (it is
no useful work).
"""

import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.config import DecoderConfig, ModelConfig, VisionConfig
from megatron_mm.model.connector import Connector, build_connector


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    vision: int
    connector: int
    embedding: int  # token embeddings and output layer, which are not tied
    dense: int  # of the decoder's layers, routers and norms among them, experts left out
    experts: int  # of all experts
    experts_active: int  # of those that a token passes through

    @property
    def total(self) -> int:
        return self.vision + self.connector + self.embedding + self.dense + self.experts

    @property
    def active(self) -> int:
        return self.total - self.experts + self.experts_active


@dataclass(frozen=True)
class Flops:
    """Of a forward pass, or with its backward pass (`training`)."""

    vision: float
    connector: float
    decoder: float  # matrix products of layers and output layer
    attention: float  # of the decoder, scores and weighted values

    @property
    def total(self) -> float:
        return self.vision + self.connector + self.decoder + self.attention

    def training(self, frozen: Collection[str] = ()) -> "Flops":
        """Of forward and backward pass, where these are of the forward pass. `frozen`: as in `passes`."""
        n = passes(frozen)
        return Flops(
            vision=n.vision * self.vision,
            connector=n.connector * self.connector,
            decoder=n.decoder * self.decoder,
            attention=n.attention * self.attention,
        )


@dataclass(frozen=True)
class Passes:
    """How often forward and backward pass together do the work that the forward pass does once, of each of `Flops`."""

    vision: int
    connector: int
    decoder: int
    attention: int


def passes(frozen: Collection[str] = ()) -> Passes:
    """Where these parts (`training.frozen`) keep their weights.

    Three for a part that is trained: forward, gradients of activations, gradients of weights. A frozen part has none of
    weights, and those of activations only where a part before it is trained; before the decoder one always is, else
    nothing would be trained. The decoder's attention has no weights: both its factors' gradients are activations'.
    """
    vision, connector, decoder = (part not in frozen for part in ("vision", "connector", "decoder"))
    return Passes(
        vision=3 if vision else 1,
        connector=1 + (vision or connector) + connector,
        decoder=2 + decoder,
        attention=3,
    )


def moe_layers(d: DecoderConfig) -> int:
    """How many layers hold experts."""
    return d.num_layers // d.moe.layer_freq if d.moe else 0


def _attention_matrices(d: DecoderConfig) -> int:
    return d.hidden_size * d.head_dim * (2 * d.num_attention_heads + 2 * d.num_query_groups)


def vision_parameters(v: VisionConfig) -> int:
    h, f, shape = v.hidden_size, v.ffn_hidden_size, v.shape
    layer = 4 * h * h + 4 * h + 2 * h * f + f + h + 4 * h  # attention, FFN, two norms
    stem = 3 * v.patch_size**2 * h + h * shape.patch_bias + h * shape.class_token + v.num_positions * h
    return stem + v.built_layers * layer + 2 * h * (shape.pre_norm + v.has_final_norm)


def _connector_module(m: ModelConfig) -> Connector:
    with torch.device("meta"):
        return build_connector(m.connector, m.vision.hidden_size, m.vision.grid, m.decoder.hidden_size)


def parameters(m: ModelConfig) -> Parameters:
    """Of a whole model."""
    d = m.decoder
    h, f, sparse = d.hidden_size, d.ffn_hidden_size, moe_layers(d)
    norms = 2 * h + (2 * d.head_dim if d.family == "qwen3" else 0)
    dense = d.num_layers * (_attention_matrices(d) + norms) + h  # and the last norm
    dense += (d.num_layers - sparse) * 3 * h * f
    experts = active = 0
    if d.moe:
        expert = 3 * h * (d.moe.ffn_hidden_size or f)
        dense += sparse * h * d.moe.num_experts  # routers
        experts, active = (sparse * n * expert for n in (d.moe.num_experts, d.moe.topk))
    return Parameters(
        vision=vision_parameters(m.vision),
        connector=sum(p.numel() for p in _connector_module(m).parameters()),
        embedding=2 * d.vocab_size * h,
        dense=dense,
        experts=experts,
        experts_active=active,
    )


def document_pairs(lengths: Iterable[int]) -> float:
    """Query-key pairs of causal documents of these many positions."""
    return sum(n * (n + 1) / 2 for n in lengths)


@functools.cache
def image_flops(m: ModelConfig) -> tuple[float, float]:
    """Encoder and connector, forward, one image."""
    v = m.vision
    h, n = v.hidden_size, v.num_positions
    layer = 2 * n * (4 * h * h + 2 * h * v.ffn_hidden_size) + 4 * n * n * h
    vision = v.built_layers * layer + 2 * v.grid**2 * 3 * v.patch_size**2 * h
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _connector_module(m)(torch.empty(1, v.grid**2, h, device="meta"))
    return float(vision), float(counter.get_total_flops())


def flops(m: ModelConfig, positions: float, pairs: float, images: float) -> Flops:
    """Of a forward pass.

    Args:
        positions: of the sequences, image positions and padding among them: all pass through the matrices.
        pairs: query-key pairs of the decoder's attention (`document_pairs`).
        images: that are encoded.
    """
    d = m.decoder
    sparse = moe_layers(d)
    matrices = d.num_layers * _attention_matrices(d) + (d.num_layers - sparse) * 3 * d.hidden_size * d.ffn_hidden_size
    if d.moe:
        width = d.moe.ffn_hidden_size or d.ffn_hidden_size
        matrices += sparse * d.hidden_size * (d.moe.topk * 3 * width + d.moe.num_experts)
    matrices += d.vocab_size * d.hidden_size
    vision, connector = image_flops(m)
    return Flops(
        vision=images * vision,
        connector=images * connector,
        decoder=2.0 * matrices * positions,
        attention=4.0 * d.num_layers * d.num_attention_heads * d.head_dim * pairs,
    )
