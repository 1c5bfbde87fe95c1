"""What must hold between the fields of a run, and between a run and the number of its ranks."""

import dataclasses
import math
import re
from typing import Any

from megatron_mm.config.fp8 import check_fp8
from megatron_mm.config.schema import ConnectorConfig, RunConfig, source_name
from megatron_mm.errors import UserError


def _positive(config: Any, prefix: str, zero_allowed: frozenset[str]) -> None:
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            _positive(value, name + ".", zero_allowed)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    _positive(item, f"{name}.{i}.", zero_allowed)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if name == "model.vision.feature_layer":
                continue  # counts from the end
            least_ok = value >= 0 if name in zero_allowed else value > 0
            if not least_ok or value != value or value == float("inf"):
                bound = "0 or more" if name in zero_allowed else "more than 0"
                raise UserError("out of range", where=name, found=value, allowed=bound)


_ZERO_ALLOWED = frozenset(
    (
        "training.seed training.validation_interval checkpoint.keep optimizer.warmup_steps optimizer.weight_decay "
        "optimizer.min_lr_ratio optimizer.clip_grad optimizer.beta1 optimizer.beta2 data.validation_fraction "
        "data.num_workers data.max_bad_image_rate model.decoder.moe.load_balance_coeff model.decoder.moe.z_loss_coeff"
    ).split()
)


def _multiple(value: int, of: int, where: str, what: str) -> None:
    if value % of:
        below, above = value - value % of, value + of - value % of
        near = f"{below} or {above}" if below else str(above)
        raise UserError(f"must be a multiple of {what} ({of})", where=where, found=value, allowed=f"for example {near}")


def _check_stages(c: RunConfig) -> None:
    """How the decoder's layers are cut into pipeline stages, and stages into virtual ones."""
    layers, p = c.model.decoder.num_layers, c.parallel
    pp, vpp = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size
    pp_name, first_name = "parallel.pipeline_model_parallel_size", "parallel.first_pipeline_stage_layers"
    vpp_name = "parallel.virtual_pipeline_model_parallel_size"
    if vpp > 1 and pp == 1:
        raise UserError("needs more than one pipeline stage", where=vpp_name, found=f"{vpp}, with {pp_name} = 1")
    first = p.first_pipeline_stage_layers
    if first is None:
        cut = f"{pp_name} × {vpp_name}" if vpp > 1 else pp_name
        _multiple(layers, pp * vpp, "model.decoder.num_layers", cut)
        return
    if pp == 1:
        raise UserError("needs more than one pipeline stage", where=first_name, found=f"{pp_name} = 1")
    allowed = [n for n in range(vpp, layers, vpp) if (layers - n) % ((pp - 1) * vpp) == 0]
    if first not in allowed:
        virtual = f", in {vpp} virtual stages each," if vpp > 1 else ""
        raise UserError(
            f"the other {pp - 1} stages{virtual} must share the other layers evenly", where=first_name,
            found=f"{first} of {layers} layers",
            allowed=", ".join(map(str, allowed)) or f"none: change {pp_name}" + (f" or {vpp_name}" if vpp > 1 else ""),
        )  # fmt: skip


def _check_connector(connector: ConnectorConfig, grid: int) -> None:
    side = math.isqrt(connector.num_tokens)
    if side * side != connector.num_tokens:
        raise UserError(
            "must be a square number", where="model.connector.num_tokens", found=connector.num_tokens,
            allowed=f"for example {side**2} or {(side + 1) ** 2}",
        )  # fmt: skip
    if connector.kind == "pixel_shuffle_mlp" and grid % side:
        raise UserError(
            f"pixel shuffle needs whole squares of the {grid} × {grid} patches", where="model.connector.num_tokens",
            found=connector.num_tokens, allowed=", ".join(str(n * n) for n in range(1, grid + 1) if grid % n == 0),
        )  # fmt: skip
    if connector.kind == "attention_pool" and connector.hidden_size > 64:
        _multiple(connector.hidden_size, 64, "model.connector.hidden_size", "the width of an attention head")


def _check_experts(c: RunConfig) -> None:
    d, p = c.model.decoder, c.parallel
    tp, ep, moe = p.tensor_model_parallel_size, p.expert_model_parallel_size, d.moe
    ep_name, expert_tp_name = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"
    if moe is None:
        for name, value, alone in ((ep_name, ep, 1), (expert_tp_name, p.expert_tensor_parallel_size, None)):
            if value != alone:
                raise UserError(
                    "there are no experts to share out", where=name, found=value, allowed=str(alone or "null"),
                    do="set model.decoder.moe, or leave this out",
                )  # fmt: skip
        return
    _multiple(moe.num_experts, ep, "model.decoder.moe.num_experts", ep_name)
    expert_ffn = "model.decoder.moe.ffn_hidden_size" if moe.ffn_hidden_size else "model.decoder.ffn_hidden_size"
    _multiple(moe.ffn_hidden_size or d.ffn_hidden_size, p.expert_tp, expert_ffn, expert_tp_name)
    if not 2 <= moe.topk <= moe.num_experts:
        raise UserError(
            # The gates are a softmax over a token's experts: of one expert it is 1, and the router learns nothing.
            "experts a token", where="model.decoder.moe.topk", found=moe.topk, allowed=f"2 to {moe.num_experts}",
        )  # fmt: skip
    if moe.layer_freq > d.num_layers:
        raise UserError(
            "no layer would hold experts", where="model.decoder.moe.layer_freq", found=moe.layer_freq,
            allowed=f"1 to {d.num_layers} (the decoder's layers)",
        )  # fmt: skip
    if tp > 1 and not p.sequence_parallel:
        raise UserError(
            "experts under tensor parallelism need sequence parallelism", where="parallel.sequence_parallel",
            found=False, do="set parallel.sequence_parallel=true",
        )  # fmt: skip
    if ep == 1 and p.expert_tp != tp:
        # Megatron-Core would reduce their gradients over the dense layers' ranks: copies drift apart, in silence.
        raise UserError(
            "needs expert parallelism to differ from tensor_model_parallel_size", where=expert_tp_name,
            found=f"{p.expert_tp}, with {ep_name} = 1 and tensor_model_parallel_size = {tp}",
            do=f"leave it out, or set {ep_name} to 2 or more",
        )  # fmt: skip


def check_ranges(c: RunConfig) -> None:
    """Each number by itself."""
    _positive(c, "", _ZERO_ALLOWED)


def check_consistency(c: RunConfig) -> None:
    """Everything that can be known without files and without a world."""
    check_ranges(c)
    v, d, p, t = c.model.vision, c.model.decoder, c.parallel, c.training
    _multiple(v.image_size, v.patch_size, "model.vision.image_size", "model.vision.patch_size")
    _multiple(v.hidden_size, v.num_attention_heads, "model.vision.hidden_size", "model.vision.num_attention_heads")
    if not -v.num_layers <= v.feature_layer <= -1:
        raise UserError(
            "counts the encoder's layers from the end", where="model.vision.feature_layer", found=v.feature_layer,
            allowed=f"{-v.num_layers} to -1",
        )  # fmt: skip
    _check_connector(c.model.connector, v.grid)
    if d.kv_channels is None:
        _multiple(d.hidden_size, d.num_attention_heads, "model.decoder.hidden_size", "num_attention_heads")
    _multiple(d.num_attention_heads, d.num_query_groups, "model.decoder.num_attention_heads", "num_query_groups")
    if d.head_dim % 2:
        raise UserError("RoPE needs an even head width", where="model.decoder.kv_channels", found=d.head_dim)
    tp, cp = p.tensor_model_parallel_size, p.context_parallel_size
    tp_name, cp_name = "parallel.tensor_model_parallel_size", "parallel.context_parallel_size"
    heads_cut = f"{tp_name} × {cp_name}" if cp > 1 else tp_name
    _multiple(d.num_query_groups, tp * cp, "model.decoder.num_query_groups", heads_cut)
    _multiple(d.ffn_hidden_size, tp, "model.decoder.ffn_hidden_size", tp_name)
    _multiple(d.vocab_size, tp, "model.decoder.vocab_size", tp_name)
    if cp > 1:
        _multiple(c.data.seq_length, 2 * cp, "data.seq_length", f"2 × {cp_name}")
    if p.sequence_parallel:
        _multiple(c.data.seq_length, tp * cp, "data.seq_length", heads_cut)
        if tp == 1:
            raise UserError(
                "sequence parallelism shares work among tensor-parallel ranks", where="parallel.sequence_parallel",
                found=f"true with {tp_name} = 1", do=f"set it to false, or {tp_name} to 2 or more",
            )  # fmt: skip
    _check_stages(c)
    if p.vision_tensor_parallel:
        _multiple(v.num_attention_heads, tp, "model.vision.num_attention_heads", tp_name)
        _multiple(v.ffn_hidden_size, tp, "model.vision.ffn_hidden_size", tp_name)
    _check_experts(c)
    if not c.data.sources:
        raise UserError("there is nothing to train on", where="data.sources", found="an empty list")
    if c.model.connector.num_tokens + 2 > c.data.seq_length:
        raise UserError(
            "one image does not fit into a sequence", where="data.seq_length", found=c.data.seq_length,
            allowed=f"at least {c.model.connector.num_tokens + 2} (one image's tokens and two words)",
        )  # fmt: skip
    for name in ("validation_fraction", "max_bad_image_rate"):
        if getattr(c.data, name) >= 1:
            raise UserError("is a share", where=f"data.{name}", found=getattr(c.data, name), allowed="0 to below 1")
    for name in ("beta1", "beta2"):
        if getattr(c.optimizer, name) >= 1:
            raise UserError(
                "out of range", where=f"optimizer.{name}", found=getattr(c.optimizer, name), allowed="below 1"
            )
    if c.optimizer.min_lr_ratio > 1:
        raise UserError(
            "is a share of the peak", where="optimizer.min_lr_ratio", found=c.optimizer.min_lr_ratio, allowed="0 to 1"
        )
    for i, source in enumerate(c.data.sources):
        scheme, separator, tail = source.path.partition("://")
        if separator and (scheme != "s3" or not re.fullmatch(r"[^/]+/(.*[^/])", tail)):
            raise UserError(
                "not the prefix of a source", where=f"data.sources.{i}.path", found=source.path,
                allowed="a local path, or s3://BUCKET/FOLDER/NAME",
            )  # fmt: skip
    names = [source_name(s) for s in c.data.sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError("two sources share a name", where="data.sources", found=name, do="set data.sources.N.name")
    if len(set(t.frozen)) < len(t.frozen) or len(t.frozen) == 3:
        fault = "nothing would be trained" if len(set(t.frozen)) == 3 else "names a part twice"
        raise UserError(
            fault,
            where="training.frozen",
            found=", ".join(t.frozen),
            allowed="one or two of vision, connector, decoder",
        )
    _multiple(t.global_batch_size, t.micro_batch_size, "training.global_batch_size", "training.micro_batch_size")
    check_fp8(c)


def _check_interleaving(c: RunConfig, microbatches: int) -> None:
    """Megatron-Core's interleaved schedule works through groups of as many microbatches as there are stages."""
    pp, vpp = c.parallel.pipeline_model_parallel_size, c.parallel.virtual_pipeline_model_parallel_size
    if vpp > 1 and microbatches % pp:
        raise UserError(
            "virtual stages need microbatches in whole groups of the pipeline's size",
            where="training.global_batch_size", found=f"{microbatches} microbatches a rank, {pp} pipeline stages",
            allowed=f"a multiple of {pp} microbatches",
            do="change global_batch_size, micro_batch_size or the number of ranks",
        )  # fmt: skip


def check_layout(c: RunConfig, world_size: int) -> int:
    """Check the layout against the number of ranks; answers with the data-parallel size."""
    p, t = c.parallel, c.training
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    ep, whole = p.expert_model_parallel_size, p.model_parallel_size
    if world_size < 1:
        raise UserError("no ranks", where="parallel", found=world_size, allowed="1 or more")
    if world_size % whole:
        fits = 2 * world_size // whole * whole  # the largest up to twice as many; 0: none
        context = f" × context {cp}" if cp > 1 else ""
        raise UserError(
            f"the ranks do not divide into tensor × pipeline{' × context' if cp > 1 else ''} groups", where="parallel",
            found=f"{world_size} ranks, tensor {tp} × pipeline {pp}{context}",
            allowed=f"multiples of {whole}" + (f", for example {fits}" if fits else ""),
            do="start another number of ranks, or change the parallel sizes",
        )  # fmt: skip
    dp = world_size // whole
    stage = world_size // pp
    # Experts see a stage's ranks in another order: expert tensor × expert × expert data parallel.
    if stage % (ep * p.expert_tp):
        experts = c.model.decoder.moe.num_experts if c.model.decoder.moe else 1
        sizes = [n for n in range(1, experts + 1) if experts % n == 0 and stage % (n * p.expert_tp) == 0]
        raise UserError(
            "a pipeline stage's ranks do not divide into expert groups", where="parallel.expert_model_parallel_size",
            found=f"{ep} × expert tensor {p.expert_tp}, with {stage} ranks a stage",
            allowed=", ".join(map(str, sizes)) or "none with this expert tensor-parallel size",
        )  # fmt: skip
    if t.global_batch_size % (t.micro_batch_size * dp):
        step = t.micro_batch_size * dp
        raise UserError(
            "does not divide into microbatches over the data-parallel ranks", where="training.global_batch_size",
            found=f"{t.global_batch_size}, with micro_batch_size {t.micro_batch_size} × {dp} data-parallel ranks",
            allowed=f"a multiple of {step}, for example {max(step, t.global_batch_size // step * step)}",
        )  # fmt: skip
    _check_interleaving(c, t.global_batch_size // (t.micro_batch_size * dp))
    return dp
