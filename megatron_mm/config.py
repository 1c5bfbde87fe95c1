"""A run as typed data: the dataclasses, YAML in, dotted overrides, checks, YAML out.

    config = load_config("examples/quickstart/config.yaml", ["training.steps=10"])

Every field of a run lives here and nowhere else. `load_config` answers with a `RunConfig` that is known to be
consistent (types, divisibility, layout against world size by `check_layout`) or raises `UserError` that names
the field. Files are not looked at here: `data/` checks its own sources before training starts.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from megatron_mm.errors import UserError

Kind = Literal["caption", "interleaved", "text"]
KINDS: tuple[Kind, ...] = ("caption", "interleaved", "text")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A CLIP-shaped ViT (pre-norm, class token, learned positions); features are the last layer's patch tokens."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    patch_size: int  # pixels
    image_size: int  # pixels, square; must be a multiple of patch_size
    activation: Literal["gelu", "quick_gelu"] = "quick_gelu"  # the DFN-5B and OpenAI releases use quick-GELU
    layernorm_epsilon: float = 1e-5  # CLIP's
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of 1
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of 1

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """C-Abstractor (Honeybee, arXiv 2312.06742): RegNet stage, adaptive pooling, RegNet stage, MLP."""

    num_tokens: int = 144  # MM1's; a square number
    hidden_size: int = 1024  # Honeybee's; MM1's own is not published
    depth: int = 3  # blocks a RegNet stage; Honeybee's


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts in place of the decoder's FFNs (MM1 section 3.4; top-2, both losses from there)."""

    num_experts: int
    topk: int = 2
    layer_freq: int = 2  # every n-th layer is MoE: layer i (from 0) when (i + 1) % layer_freq == 0, as in Qwen3-MoE
    ffn_hidden_size: int | None = None  # of one expert; None: the dense FFN's, as in MM1
    load_balance_coeff: float = 0.01
    z_loss_coeff: float = 0.001


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder: RMSNorm, SwiGLU, RoPE, GQA, no biases. `qwen3` adds QK-norm, `llama` has none."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int  # at least the tokenizer's; a multiple of the tensor-parallel size
    family: Literal["qwen3", "llama"] = "qwen3"  # MM1 recipes use QK-norm
    kv_channels: int | None = None  # width of a head; None: hidden_size / num_attention_heads
    rotary_base: float = 10000.0
    layernorm_epsilon: float = 1e-6  # Qwen3's
    moe: MoEConfig | None = None

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    vision: VisionConfig
    connector: ConnectorConfig
    decoder: DecoderConfig
    init_std: float = 0.02  # normal initialisation of all matrices; output projections scale it by 1/sqrt(2 layers)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source on disk (`PREFIX.text.bin`, `PREFIX.manifest.json`, …) and its share of the sequences."""

    path: str  # prefix
    weight: float  # relative; MM1: captions 45, interleaved 45, text 10
    name: str | None = None  # in logs and metrics; None: the prefix's last part


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    tokenizer: str  # a SentencePiece .model
    sources: tuple[SourceConfig, ...]
    seq_length: int = 4096  # positions a sequence, image tokens counted
    max_images: int = 16  # a sequence, at most; MM1's
    block_attention: bool = True  # attention does not cross packed documents (MM1: critical for pairs)
    validation_fraction: float = 0.01  # of each source's documents, by a hash of their number; never trained on
    cache_dir: str | None = None  # for packings; None: beside each source
    num_workers: int = 2  # decoding processes a rank; 0 decodes in the training process
    prefetch: int = 2  # microbatches each worker holds ready
    decode_backend: Literal["cpu"] = "cpu"
    max_image_pixels: int = 40_000_000  # refused from the header, before decoding
    max_bad_image_rate: float = 0.01  # of the images decoded so far; above it the run stops


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Megatron-Core's names. Data parallelism is what is left of the world."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True  # optimizer state and fp32 masters sharded over data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients during the backward pass
    first_pipeline_stage_layers: int | None = None  # decoder layers beside encoder and connector; None: an even split


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as MM1 has it. Learning rates are peaks."""

    lr: float | None = None  # None: MM1's law, exp(-0.4214 ln N - 0.5535), N non-embedding decoder parameters
    connector_lr: float | None = 8e-5  # MM1: fixed at every size; None: the same as lr
    min_lr_ratio: float = 0.1  # the cosine ends at this share of the peak
    warmup_steps: int = 2000
    weight_decay: float = (
        0.1  # decoupled, multiplied by the learning rate in the step as in torch: equals MM1's λ = 0.1 η
    )
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    steps: int
    global_batch_size: int = 512  # sequences
    micro_batch_size: int = 1  # sequences
    seed: int = 0  # of the weights and of the data's order
    precision: Literal["fp32", "bf16"] = "bf16"  # of compute; masters and gradients are fp32
    log_interval: int = 1  # steps
    validation_interval: int = 1000  # steps; 0: never
    validation_batches: int = 8  # global batches a source
    recompute: bool = False  # full activation recomputation, layer by layer


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval: int = 1000  # steps; one is always written at the end and on a stop signal
    keep: int = 2  # the newest whole ones that stay; 0: all
    asynchronous: bool = True  # written by a thread while training goes on
    init_from: tuple[str, ...] = ()  # checkpoints whose weights start a new run (encoder, decoder); ignored on resume


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    run_dir: str  # checkpoints/, metrics.jsonl, tensorboard/, config.yaml
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """What data and model share: the shape of a sequence and the ids with a meaning."""

    seq_length: int
    max_images: int
    tokens_per_image: int
    image_size: int  # pixels
    image_token_id: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


class _Loader(yaml.SafeLoader):
    """YAML safe load that reads 1e-4 as a float (PyYAML follows YAML 1.1, where it is a string)
    and refuses a key written twice (PyYAML keeps the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise UserError("key written twice", where=f"line {key.start_mark.line + 1}", found=key.value)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), check, and return the run."""
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError("cannot read the config", where=str(path), found=error.strerror, do="check --config") from None
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError("not valid YAML", where=str(path), found=str(error)) from None
    if not isinstance(data, dict):
        raise UserError("a config is a mapping of fields", where=str(path), found=type(data).__name__)
    for override in overrides or []:
        _apply_override(data, override)
    return config_from_dict(data)


def _apply_override(data: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise UserError("an override is written a.b=value", where="command line", found=override)
    *parents, last = name.split(".")
    node: Any = data
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        parsed = yaml.load(value, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        if isinstance(node, list):
            node[int(last)] = parsed
        else:
            node[last] = parsed
    except (TypeError, ValueError, IndexError, AttributeError):
        raise UserError("the override does not lead to a field", where=name, found=override) from None


def config_from_dict(data: dict[str, Any]) -> RunConfig:
    """Validate types and names, then consistency."""
    adapter = pydantic.TypeAdapter(RunConfig)
    try:
        # JSON mode: strict about types, yet lists may fill tuples and whole numbers may fill floats.
        config = adapter.validate_json(json.dumps(data), strict=True, extra="forbid")
    except TypeError as error:
        raise UserError("a value is of a type that a config cannot hold", found=str(error)) from None
    except pydantic.ValidationError as error:
        raise _explain(error) from None
    _check(config)
    return config


def _fields_at(location: tuple[Any, ...]) -> str:
    node: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        node = next((f.type for f in dataclasses.fields(node) if f.name == part), None)
        candidates = [node, *getattr(node, "__args__", ())]
        node = next((c for c in candidates if dataclasses.is_dataclass(c)), None)
        if node is None:
            return ""
    return ", ".join(f.name for f in dataclasses.fields(node))


def _explain(error: pydantic.ValidationError) -> UserError:
    """All faults in one message, each with its field."""
    faults = error.errors(include_url=False)
    first = faults[0]
    where = ".".join(str(p) for p in first["loc"])
    more = "".join(f"\n  also:    {'.'.join(str(p) for p in f['loc'])}: {f['msg']}" for f in faults[1:])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return UserError(
            "unknown field", where=where, found=repr(first["input"]) + more, allowed=_fields_at(first["loc"][:-1])
        )
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return UserError("a required field is missing" + more, where=where, do="add it to the config")
    return UserError("wrong value", where=where, found=repr(first["input"]) + more, allowed=first["msg"])


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


def _check(c: RunConfig) -> None:
    """Everything that can be known without files and without a world."""
    _positive(c, "", _ZERO_ALLOWED)
    v, d, p, t = c.model.vision, c.model.decoder, c.parallel, c.training
    _multiple(v.image_size, v.patch_size, "model.vision.image_size", "model.vision.patch_size")
    _multiple(v.hidden_size, v.num_attention_heads, "model.vision.hidden_size", "model.vision.num_attention_heads")
    side = round(c.model.connector.num_tokens**0.5)
    if side * side != c.model.connector.num_tokens:
        raise UserError(
            "must be a square number", where="model.connector.num_tokens", found=c.model.connector.num_tokens,
            allowed=f"for example {side**2} or {(side + 1) ** 2}",
        )  # fmt: skip
    if d.kv_channels is None:
        _multiple(d.hidden_size, d.num_attention_heads, "model.decoder.hidden_size", "num_attention_heads")
    _multiple(d.num_attention_heads, d.num_query_groups, "model.decoder.num_attention_heads", "num_query_groups")
    if d.head_dim % 2:
        raise UserError("RoPE needs an even head width", where="model.decoder.kv_channels", found=d.head_dim)
    tp, pp, ep = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.expert_model_parallel_size
    tp_name, pp_name = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
    _multiple(d.num_query_groups, tp, "model.decoder.num_query_groups", tp_name)
    _multiple(d.ffn_hidden_size, tp, "model.decoder.ffn_hidden_size", tp_name)
    _multiple(d.vocab_size, tp, "model.decoder.vocab_size", tp_name)
    if p.sequence_parallel:
        _multiple(c.data.seq_length, tp, "data.seq_length", tp_name)
        if tp == 1:
            raise UserError(
                "sequence parallelism shares work among tensor-parallel ranks", where="parallel.sequence_parallel",
                found=f"true with {tp_name} = 1", do=f"set it to false, or {tp_name} to 2 or more",
            )  # fmt: skip
    if p.first_pipeline_stage_layers is None:
        _multiple(d.num_layers, pp, "model.decoder.num_layers", pp_name)
    else:
        where = "parallel.first_pipeline_stage_layers"
        rest = d.num_layers - p.first_pipeline_stage_layers
        if pp == 1:
            raise UserError("needs more than one pipeline stage", where=where, found=f"{pp_name} = 1")
        if rest < pp - 1 or rest % (pp - 1):
            raise UserError(
                f"the other {pp - 1} stages must share the other layers evenly", where=where,
                found=f"{p.first_pipeline_stage_layers} of {d.num_layers} layers",
                allowed=", ".join(str(n) for n in range(1, d.num_layers) if (d.num_layers - n) % (pp - 1) == 0),
            )  # fmt: skip
    if d.moe is None:
        if ep != 1:
            raise UserError(
                "there are no experts to share out", where="parallel.expert_model_parallel_size", found=ep, allowed="1",
                do="set model.decoder.moe, or this to 1",
            )  # fmt: skip
    else:
        _multiple(d.moe.num_experts, ep, "model.decoder.moe.num_experts", "parallel.expert_model_parallel_size")
        if d.moe.ffn_hidden_size:
            _multiple(d.moe.ffn_hidden_size, tp, "model.decoder.moe.ffn_hidden_size", tp_name)
        if d.moe.topk > d.moe.num_experts:
            raise UserError(
                "more experts a token than there are", where="model.decoder.moe.topk", found=d.moe.topk,
                allowed=f"1 to {d.moe.num_experts}",
            )  # fmt: skip
        if tp > 1 and not p.sequence_parallel:
            raise UserError(
                "experts under tensor parallelism need sequence parallelism", where="parallel.sequence_parallel",
                found=False, do="set parallel.sequence_parallel=true",
            )  # fmt: skip
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
    names = [source_name(s) for s in c.data.sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError("two sources share a name", where="data.sources", found=name, do="set data.sources.N.name")
    _multiple(t.global_batch_size, t.micro_batch_size, "training.global_batch_size", "training.micro_batch_size")


def source_name(source: SourceConfig) -> str:
    return source.name or Path(source.path).name


def check_layout(c: RunConfig, world_size: int) -> int:
    """Check the layout against the number of ranks; answers with the data-parallel size."""
    p, t = c.parallel, c.training
    tp, pp, ep = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.expert_model_parallel_size
    fits = [n for n in range(1, 2 * world_size + 1) if n % (tp * pp) == 0]
    if world_size % (tp * pp):
        raise UserError(
            "the ranks do not divide into tensor × pipeline groups", where="parallel",
            found=f"{world_size} ranks, tensor {tp} × pipeline {pp}",
            allowed=f"multiples of {tp * pp}" + (f", for example {fits[-1]}" if fits else ""),
            do="start another number of ranks, or change the parallel sizes",
        )  # fmt: skip
    dp = world_size // (tp * pp)
    # Experts are tensor-parallel as the dense layers are, so expert groups are cut out of data-parallel ranks.
    if dp % ep:
        raise UserError(
            "expert groups are cut out of the data-parallel ranks", where="parallel.expert_model_parallel_size",
            found=f"{ep}, with {dp} data-parallel ranks", allowed=f"a divisor of {dp}",
        )  # fmt: skip
    if t.global_batch_size % (t.micro_batch_size * dp):
        step = t.micro_batch_size * dp
        raise UserError(
            "does not divide into microbatches over the data-parallel ranks", where="training.global_batch_size",
            found=f"{t.global_batch_size}, with micro_batch_size {t.micro_batch_size} × {dp} data-parallel ranks",
            allowed=f"a multiple of {step}, for example {max(step, t.global_batch_size // step * step)}",
        )  # fmt: skip
    return dp


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain data that `config_from_dict` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)
