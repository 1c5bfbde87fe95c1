"""Bytes by formula: what a search sorts thousands of layouts with. The few that are left are then built (`probe.py`).

Per position of a decoder layer of width h with queries q, keys and values k and an FFN of f, bf16, everything that is
kept for the backward pass, each over the tensor-parallel size under sequence parallelism:

    norm     x 2h, normed 2h        attention   qkv 2(q + 2k), rotated 2(q + k), output 2q
    norm     x 2h, normed 2h        SwiGLU      gate and up 4f, product 2f
"""

import functools

import torch

from megatron_mm.config import ModelConfig, RunConfig
from megatron_mm.model.connector import build_connector
from megatron_mm.model.sizes import vision_parameters
from megatron_mm.planning.live import LiveBytes
from megatron_mm.planning.memory import ChunkBytes, StageBytes, StageMemory, stage_memory
from megatron_mm.planning.stages import Chunk, stages

_SCORE = 6  # bytes that the local attention keeps of each score: fp32 softmax and its bf16 copy
_LOGIT = 4  # bytes kept of each logit: fp32 softmax


def estimate(config: RunConfig, world_size: int, imbalance: float) -> list[StageMemory]:
    """Of one rank of each stage; within some percent of the built modules (see the tests)."""
    p, t = config.parallel, config.training
    pp = p.pipeline_model_parallel_size
    dp = world_size // p.model_parallel_size
    microbatches = t.global_batch_size // (t.micro_batch_size * dp)
    return [
        stage_memory(_stage_bytes(config, stage, dp, imbalance), number, pp, microbatches)
        for number, stage in enumerate(stages(config))
    ]


def _stage_bytes(config: RunConfig, stage: tuple[Chunk, ...], dp: int, imbalance: float) -> StageBytes:
    p, t, size = config.parallel, config.training, config.model.vision.image_size
    tp, cp, ep = p.tensor_model_parallel_size, p.context_parallel_size, p.expert_model_parallel_size
    held, trained, trained_experts = 0.0, 0.0, 0.0
    for chunk in stage:
        for part, count, experts in parameters(config, chunk):
            held += count
            if part not in t.frozen:
                trained += 0 if experts else count
                trained_experts += count if experts else 0
    width = 2 if t.precision == "bf16" else 4
    state = 12 if t.precision == "bf16" else 8  # fp32 moments and, beside bf16, fp32 masters
    shards, expert_shards = (dp * cp, tp * cp * dp // (ep * p.expert_tp)) if p.distributed_optimizer else (1, 1)
    images = config.data.max_images * t.micro_batch_size if stage[0].first else 0
    share = -(-images // p.image_sharers)
    return StageBytes(
        parameters=round(width * held),
        gradients=round(4 * (trained + trained_experts)),
        optimizer=round(state * (trained / shards + trained_experts / expert_shards)),
        microbatch=t.micro_batch_size * config.data.seq_length * 32 + share * 3 * size**2,
        chunks=tuple(_chunk_bytes(config, chunk, imbalance) for chunk in stage),
    )


def parameters(config: RunConfig, chunk: Chunk) -> list[tuple[str, float, bool]]:
    """On one rank: (part of the model, parameters, whether they are experts')."""
    m, d, p = config.model, config.model.decoder, config.parallel
    h, tp = d.hidden_size, p.tensor_model_parallel_size
    attention = 2 * h * d.head_dim * (d.num_attention_heads + d.num_query_groups) / tp + 2 * h
    found = [("decoder", chunk.layers * attention + chunk.dense * 3 * h * d.ffn_hidden_size / tp, False)]
    if d.moe and chunk.moe:
        local = d.moe.num_experts / p.expert_model_parallel_size
        found.append(("decoder", chunk.moe * h * d.moe.num_experts, False))
        width = d.moe.ffn_hidden_size or d.ffn_hidden_size
        found.append(("decoder", chunk.moe * local * 3 * h * width / p.expert_tp, True))
    if chunk.first:
        found.append(("vision", vision_parameters(m.vision) / (tp if p.vision_tensor_parallel else 1), False))
        found.append(("connector", _connector(m)[0], False))
    found += [("decoder", d.vocab_size * h / tp, False)] * (chunk.first + chunk.last)
    return found


@functools.lru_cache
def _connector(m: ModelConfig) -> tuple[int, int]:
    """(parameters, bytes kept of one image in bf16)."""
    with torch.device("meta"):
        connector = build_connector(m.connector, m.vision.hidden_size, m.vision.grid, m.decoder.hidden_size).bfloat16()
        features = torch.empty(1, m.vision.grid**2, m.vision.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with LiveBytes([p.data for p in connector.parameters()]) as held:
        kept = connector(features)
        bytes_kept = held.now
    del kept
    return sum(p.numel() for p in connector.parameters()), bytes_kept


def _chunk_bytes(config: RunConfig, chunk: Chunk, imbalance: float) -> ChunkBytes:
    d, p, t = config.model.decoder, config.parallel, config.training
    wide = 1 if t.precision == "bf16" else 2
    b, h, tp = t.micro_batch_size, d.hidden_size, p.tensor_model_parallel_size
    s = config.data.seq_length // p.context_parallel_size
    q, k = (n * d.head_dim / tp for n in (d.num_attention_heads, d.num_query_groups))
    stream = 2 * wide * h * b * s / (tp if p.sequence_parallel else 1)  # the residual stream
    attention = 2 * stream + 2 * wide * b * s * (q + 2 * k + q + k + q)
    if t.layers == "local":
        attention += _SCORE * wide * b * d.num_attention_heads / tp * s * config.data.seq_length
    product = 6 if t.layers != "local" else 8  # the local layers keep the gate after its SiLU as well
    dense = attention + 2 * stream + product * wide * b * s * d.ffn_hidden_size / tp
    moe = 0.0
    if d.moe:
        routed = b * s / tp * d.moe.topk * (imbalance if p.expert_model_parallel_size > 1 else 1)
        width = d.moe.ffn_hidden_size or d.ffn_hidden_size
        experts = wide * routed * p.expert_tp * (2 * h + product * width / p.expert_tp)
        moe = attention + 2 * stream + experts + 4 * b * s / tp * d.moe.num_experts * 4
    layers = chunk.layers * stream if t.recompute else chunk.dense * dense + chunk.moe * moe
    again = max(dense if chunk.dense else 0.0, moe if chunk.moe else 0.0) if t.recompute else 0.0
    encoder, encoder_again = _encoder_bytes(config) if chunk.first else (0.0, 0.0)
    logits = b * s * d.vocab_size / tp if chunk.last else 0.0
    head = _LOGIT * wide * logits + 2 * stream * chunk.last
    ends = 2 * stream  # the stage's input and output
    kept = encoder + layers + head + ends
    # The backward pass lets go of the head, then of the layers, then of the encoder.
    peak = max(kept + 2 * wide * logits, kept - head + again + 4 * stream, encoder + ends + encoder_again)
    return ChunkBytes(kept=round(kept), forward_peak=round(kept + 2 * stream), backward_peak=round(peak))


def _encoder_bytes(config: RunConfig) -> tuple[float, float]:
    """Of encoder and connector: kept, and of a layer's that is computed again."""
    v, p, t = config.model.vision, config.parallel, config.training
    cut = p.tensor_model_parallel_size if p.vision_tensor_parallel else 1
    images = config.data.max_images * t.micro_batch_size
    share = -(-images // p.image_sharers)
    wide, h = (1 if t.precision == "bf16" else 2), v.hidden_size
    activation = {"quick_gelu": 6}.get(v.activation, 4)  # bytes of the FFN's width: before, gate, after
    layer = v.num_positions * wide * (8 * h + (8 * h + activation * v.ffn_hidden_size) / cut)
    if t.layers == "local":
        layer += _SCORE * wide * v.num_attention_heads / cut * v.num_positions**2
    decoded = config.model.connector.num_tokens * 2 * wide * config.model.decoder.hidden_size * images
    rest = share * (wide * _connector(config.model)[1] + v.num_positions * 8 * wide * h) + 2 * decoded
    if "vision" in t.frozen:
        return rest, 0.0
    if t.recompute:
        return rest + share * v.built_layers * v.num_positions * 2 * wide * h, share * layer
    return rest + share * v.built_layers * layer, 0.0
