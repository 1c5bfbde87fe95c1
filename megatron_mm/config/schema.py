"""The fields of a run: typed, frozen dataclasses. Every default has its reason beside it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["caption", "interleaved", "text", "conversation"]
KINDS: tuple[Kind, ...] = ("caption", "interleaved", "text", "conversation")


@dataclass(frozen=True)
class VisionFamily:
    """How one line of encoders differs from another."""

    class_token: bool
    patch_bias: bool
    pre_norm: bool  # a LayerNorm before the first layer
    final_norm: bool  # a LayerNorm after the last layer, which patch features pass through
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"]
    layernorm_epsilon: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION_FAMILIES = {
    # OpenAI's releases and DFN-5B use quick-GELU; LAION's use gelu.
    "clip": VisionFamily(True, False, True, False, "quick_gelu", 1e-5, _CLIP_MEAN, _CLIP_STD),
    "siglip": VisionFamily(False, True, False, True, "gelu_tanh", 1e-6, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    # DINOv2's layer scales are folded into the weights before them when its weights are imported.
    "dinov2": VisionFamily(True, True, False, True, "gelu", 1e-6, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A pre-norm ViT with learned positions; its patch tokens are the features. Families differ as VISION_FAMILIES say.

    Fields that are None take the family's value.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    patch_size: int  # pixels
    image_size: int  # pixels, square; must be a multiple of patch_size
    family: Literal["clip", "siglip", "dinov2"] = "clip"  # MM1's
    # Whose output the features are, counted from the end; layers after it are not built. A family's final norm follows
    # the last layer only, as in the families' own classes.
    feature_layer: int = -1
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = None  # type: ignore[assignment]
    layernorm_epsilon: float = None  # type: ignore[assignment]
    image_mean: tuple[float, float, float] = None  # type: ignore[assignment]  # of 1
    image_std: tuple[float, float, float] = None  # type: ignore[assignment]  # of 1

    def __post_init__(self) -> None:
        for name in ("activation", "layernorm_epsilon", "image_mean", "image_std"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.shape, name))

    @property
    def shape(self) -> "VisionFamily":
        return VISION_FAMILIES[self.family]

    @property
    def built_layers(self) -> int:
        return self.num_layers + self.feature_layer + 1

    @property
    def has_final_norm(self) -> bool:
        return self.shape.final_norm and self.feature_layer == -1

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Tokens of an image inside the encoder: patches, and the class token where there is one."""
        return self.grid**2 + self.shape.class_token


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """From patch features to `num_tokens` embeddings.

    c_abstractor (Honeybee, arXiv 2312.06742): RegNet stage, adaptive pooling, RegNet stage, MLP.
    average_pool: adaptive pooling, one linear layer. attention_pool: learned queries, one cross-attention layer.
    pixel_shuffle_mlp (InternVL): squares of patches side by side, LayerNorm, MLP.
    """

    kind: Literal["c_abstractor", "average_pool", "attention_pool", "pixel_shuffle_mlp"] = "c_abstractor"  # MM1's final
    num_tokens: int = 144  # MM1's; a square number
    hidden_size: int = 1024  # of c_abstractor and attention_pool; Honeybee's, MM1's own is not published
    depth: int = 3  # of c_abstractor: blocks a RegNet stage; Honeybee's


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

    path: str  # prefix: data/captions, or s3://bucket/captions
    weight: float  # relative; MM1: captions 45, interleaved 45, text 10
    name: str | None = None  # in logs and metrics; None: the prefix's last part


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    tokenizer: str  # a SentencePiece .model, or a folder with a Hugging Face tokenizer.json
    sources: tuple[SourceConfig, ...]
    seq_length: int = 4096  # positions a sequence, image tokens counted
    max_images: int = 16  # a sequence, at most; MM1's
    block_attention: bool = True  # attention does not cross packed documents (MM1: critical for pairs)
    validation_fraction: float = 0.01  # of each source's documents, by a hash of their number; never trained on
    # For packings, and of s3:// sources the small files. None: beside each source; of s3:// ~/.cache/megatron_mm.
    cache_dir: str | None = None
    num_workers: int = 2  # decoding processes a rank; 0 decodes in the training process
    prefetch: int = 2  # microbatches each worker holds ready
    decode_backend: Literal["cpu", "dali"] = "cpu"  # dali decodes JPEGs on the GPU where there is one
    max_image_pixels: int = 40_000_000  # refused from the header, before decoding
    max_bad_image_rate: float = 0.01  # of the images decoded so far; above it the run stops


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Megatron-Core's names. Data parallelism is what is left of the world."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    # Chunks of layers a rank, dealt in turn (interleaved 1F1B): a shorter pipeline bubble for more messages.
    virtual_pipeline_model_parallel_size: int = 1
    # Parts that every sequence is cut into, for sequences too long for one GPU; attention exchanges them for heads.
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None  # of the experts' matrices; None: tensor_model_parallel_size
    # Encoder split over the tensor-parallel group like the decoder, instead of whole on each rank with a share of the
    # images: less memory, more messages.
    vision_tensor_parallel: bool = False
    sequence_parallel: bool = False
    distributed_optimizer: bool = True  # optimizer state and fp32 masters sharded over data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients during the backward pass
    first_pipeline_stage_layers: int | None = None  # decoder layers beside encoder and connector; None: an even split

    @property
    def expert_tp(self) -> int:
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on the same microbatch; data parallelism has the world over this."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def image_sharers(self) -> int:
        """Ranks that a microbatch's images are dealt to."""
        return self.context_parallel_size * (1 if self.vision_tensor_parallel else self.tensor_model_parallel_size)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as MM1 has it. Learning rates are peaks."""

    lr: float | None = None  # None: MM1's law, exp(-0.4214 ln N - 0.5535), N non-embedding decoder parameters
    connector_lr: float | None = 8e-5  # MM1: fixed at every size; None: the same as lr
    vision_lr_scale: float = 1.0  # of lr, for the encoder; MM1 trains it at the decoder's rate
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
    # Transformer Engine's layers have fused attention over packed documents, fused norms and grouped experts; auto
    # takes them on a GPU where they are installed.
    layers: Literal["auto", "local", "transformer_engine"] = "auto"
    # Decoder's matrix products in FP8 by this scaling recipe; None: in `precision`.
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    # The encoder's too, by the same recipe (any but delayed). Off: its effect on features is not measured yet.
    fp8_vision: bool = False
    log_interval: int = 1  # steps
    validation_interval: int = 1000  # steps; 0: never
    validation_batches: int = 8  # global batches a source
    recompute: bool = False  # full activation recomputation, layer by layer
    frozen: tuple[Literal["vision", "connector", "decoder"], ...] = ()  # parts that keep their weights; MM1: none


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


def source_name(source: SourceConfig) -> str:
    return source.name or Path(source.path).name
