"""Seconds of a step by a roofline: work over what the GPU reaches of its peaks, messages over what its links carry.

A stage's time for one microbatch is the sum of its matrix products, memory-bound work and exposed messages. A step is
paced by the slowest stage of each microbatch; filling and draining the pipeline, the reduction of gradients and the
optimizer come on top. docs/planning.md lists what is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_mm.config import RunConfig
from megatron_mm.model.sizes import document_pairs, flops, image_flops, passes, vision_parameters
from megatron_mm.planning.estimate import parameters
from megatron_mm.planning.hardware import ASSUMPTIONS, Assumptions, Gpu
from megatron_mm.planning.images import microbatch_images
from megatron_mm.planning.stages import Chunk, Stage, stages


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what the ranks of the slowest stage do. Their sum is the step's."""

    decoder: float  # matrix products and attention of decoder and output layer
    encoder: float  # of encoder and connector
    memory_bound: float  # norms, rotations, SwiGLU, sums of gradients
    tensor_parallel: float  # messages inside tensor- and context-parallel groups that nothing hides
    expert_parallel: float  # tokens to experts and back
    pipeline_messages: float  # activations to the next stage and gradients to the one before
    imbalance: float  # the wait for microbatches with more images than the mean
    bubble: float  # the pipeline's filling and draining
    data_parallel: float  # what is exposed of reducing gradients and gathering parameters
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class _StageSeconds:
    """One microbatch, forward and backward."""

    decoder: float
    memory_bound: float
    tensor_parallel: float
    expert_parallel: float
    pipeline_messages: float
    image: float  # of each image of the microbatch, encoder and connector
    image_messages: float

    def at(self, images: float) -> float:
        work = self.decoder + self.memory_bound + self.tensor_parallel + self.expert_parallel
        return work + self.pipeline_messages + images * (self.image + self.image_messages)


def step_time(
    config: RunConfig, world_size: int, gpu: Gpu, images_per_sequence: float, assumed: Assumptions = ASSUMPTIONS
) -> StepTime:
    """Of a layout that `check_layout` has accepted. `images_per_sequence` is the mean over the data."""
    p, t = config.parallel, config.training
    vpp = p.virtual_pipeline_model_parallel_size
    dp = world_size // p.model_parallel_size
    microbatches = t.global_batch_size // (t.micro_batch_size * dp)
    cut = stages(config)
    links = _Links(gpu, assumed)
    seconds = [_stage_seconds(config, stage, gpu, links, assumed) for stage in cut]
    mean = images_per_sequence * t.micro_batch_size
    once = [s.at(mean) for s in seconds]
    slowest = max(once)
    pace = seconds[once.index(slowest)]
    counts = microbatch_images(images_per_sequence, config.data.max_images, t.global_batch_size, t.micro_batch_size, dp)
    longer = sum(max(s.at(n) for s in seconds) - slowest for n in counts)
    ends = [_end_of_step(config, stage, world_size, gpu, links, assumed, once[i]) for i, stage in enumerate(cut)]
    reduction, update = max(ends, key=sum)
    return StepTime(
        decoder=microbatches * pace.decoder,
        encoder=microbatches * mean * pace.image,
        memory_bound=microbatches * pace.memory_bound,
        tensor_parallel=microbatches * (pace.tensor_parallel + mean * pace.image_messages),
        expert_parallel=microbatches * pace.expert_parallel,
        pipeline_messages=microbatches * pace.pipeline_messages,
        imbalance=max(0.0, longer),  # a mean that is no whole number of images may be rounded down
        bubble=(sum(once) - slowest) / vpp,
        data_parallel=reduction,
        optimizer=update,
    )


class _Links:
    """Seconds of collectives by the bytes that one rank holds of the whole result."""

    def __init__(self, gpu: Gpu, assumed: Assumptions) -> None:
        self.node, self.message = gpu.gpus_per_node, assumed.message
        self.nvlink, self.network = gpu.nvlink * assumed.links, gpu.network * assumed.links

    def gather(self, size: float, ranks: int, stride: int) -> float:
        """An all-gather whose result has `size` bytes, or a reduce-scatter of as many, over `ranks` ranks that lie
        `stride` apart. Across nodes the group's members in a node share the result's way in."""
        if ranks == 1:
            return 0.0
        inside = min(ranks, max(1, self.node // stride))
        if inside == ranks:
            return self.message + size * (ranks - 1) / ranks / self.nvlink
        nodes = ranks / inside
        return 2 * self.message + size * max(
            (nodes - 1) / nodes / inside / self.network, 1 / self.nvlink * (inside > 1)
        )

    def exchange(self, size: float, ranks: int, stride: int) -> float:
        """An all-to-all in which each rank sends `size` bytes in all."""
        if ranks == 1:
            return 0.0
        inside = min(ranks, max(1, self.node // stride))
        away = size * (ranks - inside) / ranks / self.network
        return 2 * self.message + max(away, size * (inside - 1) / ranks / self.nvlink)

    def send(self, size: float) -> float:
        """To the next pipeline stage, which lies in another node."""
        return self.message + size / self.network


def _stage_seconds(config: RunConfig, stage: Stage, gpu: Gpu, links: _Links, assumed: Assumptions) -> _StageSeconds:
    d, p, t = config.model.decoder, config.parallel, config.training
    tp, cp, b = p.tensor_model_parallel_size, p.context_parallel_size, t.micro_batch_size
    whole = config.data.seq_length
    s = whole // cp
    dense, moe = sum(c.dense for c in stage), sum(c.moe for c in stage)
    first, last = stage[0].first, stage[-1].last
    layers = dense + moe
    sweeps = 3.0 if t.recompute else 2.0  # through the layers: forward, again, backward
    work, again = passes(t.frozen), sweeps - 2
    wide = 2 if t.precision == "bf16" else 4
    # Matrix products and attention.
    matrices, experts = _layer_flops(config)
    full = gpu.bf16 if t.precision == "bf16" else gpu.fp32
    peak = gpu.fp8 * assumed.fp8_matmul if t.fp8 else full * assumed.matmul
    imbalance = assumed.expert_imbalance if p.expert_model_parallel_size > 1 else 1.0
    products = (work.decoder + again) * (layers * matrices[0] + dense * matrices[1] + moe * experts * imbalance) / peak
    # The output layer is not recomputed.
    products += work.decoder * last * matrices[2] / (full * assumed.matmul)
    fused = t.layers != "local"
    pairs = b * (document_pairs([whole]) if fused else whole * whole)
    scores = (work.attention + again) * layers * 4.0 * d.num_attention_heads * d.head_dim / (tp * cp) * pairs
    scores /= full * (assumed.attention if fused else assumed.local_attention)
    # Memory: two norms, two sums and the rotation on the stream; the FFN's gate; fp32 sums of gradients.
    bandwidth = gpu.bandwidth * assumed.memory_bandwidth
    q, k = d.num_attention_heads * d.head_dim, d.num_query_groups * d.head_dim
    width = (d.moe.ffn_hidden_size or d.ffn_hidden_size) * d.moe.topk * imbalance if d.moe else 0.0
    shared = tp if p.sequence_parallel else 1
    traffic = (
        layers * (10 * d.hidden_size / shared + 4 * (q + k) / tp) + 3 * (dense * d.ffn_hidden_size + moe * width) / tp
    )
    weights = _trained_parameters(config, stage)
    memory_bound = (
        (sweeps + 1) * wide * b * s * traffic + (2 * wide + 8) * weights + last * 24 * b * s * d.vocab_size / tp
    ) / bandwidth
    # Messages. Forward: gather before and scatter after attention and FFN. Backward: as many for the gradients, of
    # which Megatron-Core hides those behind the column-parallel products.
    stream = wide * b * s * d.hidden_size
    one = links.gather(stream, tp, 1)
    exposed = (sweeps - 1) * 4 + 2
    tensor = (layers * exposed - moe * exposed / 2 + 2 * first + 2 * last) * one
    # Queries, keys and values to the ranks of their heads, what attention gives back to those of its positions.
    there, back = (wide * b * s * n / tp for n in (q + 2 * k, q))
    exchanges = links.exchange(there, cp, tp) + links.exchange(back, cp, tp)
    tensor += layers * sweeps * exchanges
    expert = 0.0
    if moe and d.moe:
        routed = stream / tp * d.moe.topk
        expert = 2 * links.exchange(routed * imbalance, p.expert_model_parallel_size, p.expert_tp)
        expert += 2 * links.gather(routed * p.expert_tp * imbalance, p.expert_tp, 1)
        expert *= moe * sweeps
    pp, vpp = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size
    # Interleaved, the messages run beside the work.
    sent = 2 * links.send(stream / shared) if pp > 1 and vpp == 1 else 0.0
    image = image_messages = 0.0
    if first:
        image, image_messages = _image_seconds(config, gpu, links, assumed)
    return _StageSeconds(products + scores, memory_bound, tensor, expert, sent, image, image_messages)


def _layer_flops(config: RunConfig) -> tuple[tuple[float, float, float], float]:
    """Forward, one microbatch, one rank: (attention's matrices, a dense FFN, the output layer), a layer's experts."""
    d, p = config.model.decoder, config.parallel
    h = d.hidden_size
    positions = 2.0 * config.training.micro_batch_size * config.data.seq_length
    positions /= p.tensor_model_parallel_size * p.context_parallel_size
    attention = 2 * h * d.head_dim * (d.num_attention_heads + d.num_query_groups)
    experts = d.moe.topk * 3 * h * (d.moe.ffn_hidden_size or d.ffn_hidden_size) if d.moe else 0
    return (
        positions * attention,
        positions * 3 * h * d.ffn_hidden_size,
        positions * d.vocab_size * h,
    ), positions * experts


def _trained_parameters(config: RunConfig, stage: Sequence[Chunk]) -> float:
    """Of one rank whose gradients are summed in every microbatch."""
    return sum(
        count for chunk in stage for part, count, _ in parameters(config, chunk) if part not in config.training.frozen
    )


def _image_seconds(config: RunConfig, gpu: Gpu, links: _Links, assumed: Assumptions) -> tuple[float, float]:
    """Of each image of a microbatch, forward and backward, dealt over the tensor-parallel group or split over it, and
    dealt over the context-parallel one."""
    m, t, p, tp = config.model, config.training, config.parallel, config.parallel.tensor_model_parallel_size
    cp = p.context_parallel_size
    vision, connector = image_flops(m)
    if t.fp8_vision:  # its products gain what the decoder's do, its attention nothing
        v = m.vision
        attention = 4.0 * v.built_layers * v.num_positions**2 * v.hidden_size
        vision = attention + (vision - attention) * gpu.bf16 * assumed.matmul / (gpu.fp8 * assumed.fp8_matmul)
    work, trained = passes(t.frozen), "vision" not in t.frozen
    vision *= work.vision + (t.recompute and trained)
    connector *= work.connector
    seconds = (vision / assumed.encoder + connector / assumed.connector * (tp if p.vision_tensor_parallel else 1)) / (
        (gpu.bf16 if t.precision == "bf16" else gpu.fp32) * tp * cp
    )
    wide = 2 if t.precision == "bf16" else 4
    size = wide * m.connector.num_tokens * m.decoder.hidden_size
    near = 1 if p.image_sharers > cp else tp  # how far apart they lie
    messages = links.gather(size, p.image_sharers, near) - links.message * (p.image_sharers > 1)
    if p.vision_tensor_parallel:
        tokens = wide * m.vision.num_positions * m.vision.hidden_size / cp
        messages += m.vision.built_layers * 4 * (1 + trained) * (links.gather(tokens, tp, 1) - links.message * (tp > 1))
    return seconds, messages


def _end_of_step(
    config: RunConfig, stage: Stage, world_size: int, gpu: Gpu, links: _Links, assumed: Assumptions, microbatch: float
) -> tuple[float, float]:
    """Seconds that are exposed of reducing a stage's gradients and gathering its parameters, and of the update.

    Args:
        microbatch: seconds of the stage's forward and backward pass.
    """
    p, frozen = config.parallel, config.training.frozen
    tp, wide = p.tensor_model_parallel_size, 2 if config.training.precision == "bf16" else 4
    ranks = world_size // p.pipeline_model_parallel_size
    scatter = gather = state = 0.0
    for chunk in stage:
        for part, count, experts in parameters(config, chunk):
            if part in frozen:
                continue
            stride = p.expert_tp * p.expert_model_parallel_size if experts else tp
            scatter += links.gather(4.0 * count, ranks // stride, stride)
            gather += links.gather((wide if p.distributed_optimizer else 4.0) * count, ranks // stride, stride)
            state += count / (ranks // stride if p.distributed_optimizer else 1)
    if p.overlap_grad_reduce:  # beside the last backward pass, two thirds of a microbatch; its last bucket is late
        scatter = max(0.1 * scatter, scatter - microbatch * 2 / 3)
    if stage[0].first and not p.vision_tensor_parallel and "vision" not in frozen:
        scatter += 2 * links.gather(4.0 * vision_parameters(config.model.vision), tp, 1)
    # Gradient, master and two moments are read, all but the gradient written, and the parameter.
    return scatter + gather, 30 * state / (gpu.bandwidth * assumed.memory_bandwidth)


def model_flops(config: RunConfig, images_per_sequence: float) -> float:
    """Useful operations of a step: forward and backward, less what frozen parts spare, whole sequences of one document,
    nothing recomputed."""
    t, s = config.training, config.data.seq_length
    found = flops(
        config.model, t.global_batch_size * s, t.global_batch_size * document_pairs([s]),
        t.global_batch_size * images_per_sequence,
    )  # fmt: skip
    return found.training(t.frozen).total
