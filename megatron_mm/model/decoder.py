"""The language decoder: Megatron-Core's GPTModel, configured. The one factory that the rest of the package calls."""

import functools
from typing import TYPE_CHECKING, Any

import torch

from megatron_mm.config import RunConfig
from megatron_mm.model.kernels import fusions, uses_transformer_engine
from megatron_mm.parallel.backend import import_megatron
from megatron_mm.parallel.versions import set_router

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig


def transformer_config(config: RunConfig) -> "TransformerConfig":
    """Megatron-Core's configuration of the decoder's layers, with the run's layout."""
    import_megatron()
    from megatron.core.transformer.transformer_config import TransformerConfig

    d, p = config.model.decoder, config.parallel
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    options: dict[str, Any] = dict(
        num_layers=d.num_layers,
        hidden_size=d.hidden_size,
        num_attention_heads=d.num_attention_heads,
        num_query_groups=d.num_query_groups,
        kv_channels=d.head_dim,
        ffn_hidden_size=d.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=d.layernorm_epsilon,
        qk_layernorm=d.family == "qwen3",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        # Weights come from `initialization.py`, which makes them independent of the layout.
        perform_initialization=False,
        use_cpu_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=p.pipeline_model_parallel_size,
        context_parallel_size=p.context_parallel_size,
        expert_model_parallel_size=p.expert_model_parallel_size,
        expert_tensor_parallel_size=p.expert_tp,
        sequence_parallel=p.sequence_parallel,
        **fusions(config),
    )
    if p.virtual_pipeline_model_parallel_size > 1:
        options["virtual_pipeline_model_parallel_size"] = p.virtual_pipeline_model_parallel_size
        # With two stages the batched form gives wrong gradients, silently.
        options.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    if p.first_pipeline_stage_layers is not None:
        options["num_layers_in_first_pipeline_stage"] = p.first_pipeline_stage_layers
    if config.training.recompute:
        options.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if d.moe is not None:
        options.update(
            num_moe_experts=d.moe.num_experts,
            moe_router_topk=d.moe.topk,
            moe_layer_freq=moe_layer_pattern(d.num_layers, d.moe.layer_freq),
            moe_ffn_hidden_size=d.moe.ffn_hidden_size or d.ffn_hidden_size,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=d.moe.load_balance_coeff,
            moe_z_loss_coeff=d.moe.z_loss_coeff,
            moe_token_dispatcher_type="alltoall",
            moe_router_dtype="fp32",  # in bf16 many experts' scores would tie
        )
    return TransformerConfig(**options)


def moe_layer_pattern(num_layers: int, layer_freq: int) -> list[int]:
    """1 where a layer holds experts: every `layer_freq`-th, counted so that the last of each period does."""
    return [int((i + 1) % layer_freq == 0) for i in range(num_layers)]


def build_decoder(
    config: RunConfig, transformer: "TransformerConfig", pre_process: bool, post_process: bool, chunk: int | None
) -> "GPTModel":
    """This rank's part of the decoder, or virtual stage `chunk` of it.

    Embeddings come in merged, so the scatter for sequence parallelism is ours.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_mm.model.context_parallel import ContextParallelAttention
    from megatron_mm.model.router import Router

    d = config.model.decoder
    spec = get_gpt_decoder_block_spec(
        transformer, uses_transformer_engine(config), normalization="RMSNorm", vp_stage=chunk
    )
    for layer in spec.layer_specs:
        set_router(layer, Router)
    if config.parallel.context_parallel_size > 1:
        # Layers alike share one specification.
        attentions = [layer.submodules.self_attention.submodules for layer in spec.layer_specs]
        for attention in {id(attention): attention for attention in attentions}.values():
            attention.core_attention = functools.partial(ContextParallelAttention, inner=attention.core_attention)
    return GPTModel(
        transformer,
        spec,
        vocab_size=d.vocab_size,
        max_sequence_length=config.data.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=d.rotary_base,  # annotated int; used as a float
        scatter_embedding_sequence_parallel=False,
        vp_stage=chunk,
    )
