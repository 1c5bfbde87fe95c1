"""The image encoder: a ViT of the CLIP, SigLIP or DINOv2 family on Megatron-Core's transformer block.

    pixels uint8 [n, 3, H, W] ─ normalise ─ patches ─ (class token) ─ + positions ─ (norm) ─ block ─ (norm) ─ features

Megatron-Core's own CLIPViTModel fixes the resolution and returns what LLaVA needs; this one is the same network with
what MM1 needs, and its parameters keep Megatron's names. By default it is not tensor-parallel: each rank of the group
encodes its share of the images with a full copy (see `multimodal.py`), so any head count works and no activation is
exchanged.

The images are a batch, [positions, n, h] inside the block. FP8 wants whole tiles of 16, 32 or 128 rows, which 729 or
730 positions are not: then they lie end to end in one row, padded at its end only, and attention is told the borders
(`thd`, as for the decoder's documents). Padding each image, or the number of images, would waste more.
"""

import copy
import functools
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.config import VisionConfig
from megatron_mm.model.attention import image_starts, packed_documents
from megatron_mm.parallel.backend import import_megatron

import_megatron()

from megatron.core.models.vision.vit_layer_specs import (  # noqa: E402
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlock  # noqa: E402

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), as in OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
}


def vision_transformer_config(
    vision: VisionConfig, decoder: "TransformerConfig", tensor_parallel: bool, fp8: bool
) -> "TransformerConfig":
    """The decoder's configuration with the encoder's shape, and none of its experts or of its other parallelism."""
    config = copy.deepcopy(decoder)
    config.num_layers = vision.built_layers
    config.hidden_size = vision.hidden_size
    config.num_attention_heads = config.num_query_groups = vision.num_attention_heads
    config.kv_channels = vision.hidden_size // vision.num_attention_heads
    config.ffn_hidden_size = vision.ffn_hidden_size
    config.normalization = "LayerNorm"
    config.layernorm_epsilon = vision.layernorm_epsilon
    config.qk_layernorm = False
    config.gated_linear_unit = False
    config.activation_func = _ACTIVATIONS[vision.activation]
    config.add_bias_linear = True
    if not tensor_parallel:
        config.tensor_model_parallel_size = 1
    config.pipeline_model_parallel_size = config.expert_model_parallel_size = config.expert_tensor_parallel_size = 1
    config.virtual_pipeline_model_parallel_size = None
    config.context_parallel_size = 1
    config.sequence_parallel = False
    config.num_layers_in_first_pipeline_stage = None
    config.num_moe_experts = None
    config.moe_layer_freq = 1
    config.moe_grouped_gemm = False
    if not fp8:
        config.fp8 = None
    config.apply_rope_fusion = False
    config.bias_activation_fusion = False  # the fused one is the tanh form of GELU, whatever was asked for
    return config


def _groups(tensor_parallel: bool) -> ProcessGroupCollection:
    """Process groups for layers that lie on one stage, and whole on every rank unless tensor-parallel.

    An image is never cut by context parallelism.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    groups.pp = groups.cp = alone
    if not tensor_parallel:
        groups.tp = alone
    return groups


class VisionEncoder(MegatronModule):
    """uint8 [n, 3, image_size, image_size] → [n, grid², hidden_size] (the class token is dropped)."""

    def __init__(
        self,
        vision: VisionConfig,
        decoder: "TransformerConfig",
        tensor_parallel: bool = False,
        transformer_engine: bool = False,
        tile: int | None = None,  # FP8's (`kernels.vision_tile`): positions in one row of a multiple of it
    ) -> None:
        config = vision_transformer_config(vision, decoder, tensor_parallel, fp8=tile is not None)
        super().__init__(config=config)
        h, patch, shape = vision.hidden_size, vision.patch_size, vision.shape
        self.conv1 = torch.nn.Conv2d(3, h, patch, stride=patch, bias=shape.patch_bias)
        self.class_token = torch.nn.Parameter(torch.empty(1, 1, h)) if shape.class_token else None
        self.position_embeddings = torch.nn.Embedding(vision.num_positions, h)
        self.ln_pre = WrappedTorchNorm(config, h, eps=vision.layernorm_epsilon) if shape.pre_norm else None
        self.ln_post = WrappedTorchNorm(config, h, eps=vision.layernorm_epsilon) if vision.has_final_norm else None
        spec = get_vit_layer_with_transformer_engine_spec() if transformer_engine else get_vit_layer_with_local_spec()
        spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask  # the stock spec says causal
        self.decoder = TransformerBlock(
            config, spec, pre_process=True, post_process=False, pg_collection=_groups(tensor_parallel)
        )
        self.tile = tile
        # Not buffers: those would follow the module into bf16.
        self.mean = [255 * m for m in vision.image_mean]
        self.std = [255 * s for s in vision.image_std]
        self.to(decoder.params_dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        # Normalised in fp32, whatever the compute type: bf16 would round the mean and the levels.
        mean = torch.tensor(self.mean, device=pixels.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(1, 3, 1, 1)
        x = (pixels.float() - mean) / std
        x = self.conv1(x.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # [n, grid², h]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.position_embeddings.weight
        if self.ln_pre is not None:
            x = self.ln_pre(x)
        if self.tile is None:
            x = self.decoder(x.transpose(0, 1).contiguous(), attention_mask=None).transpose(0, 1)
        else:
            x = self._end_to_end(x, self.tile)
        if self.class_token is not None:
            x = x[:, 1:]
        if self.ln_post is not None:
            x = self.ln_post(x)
        return x.contiguous()

    def _end_to_end(self, x: Tensor, tile: int) -> Tensor:
        """The block on [n, positions, h] as one row [t, 1, h] of whole tiles; the padding's part is dropped."""
        n, positions, _ = x.shape
        length = n * positions
        padding = -length % tile
        row = torch.nn.functional.pad(x.flatten(0, 1), (0, 0, 0, padding)).unsqueeze(1)
        borders = packed_documents(image_starts(n, positions, tile, x.device), max(positions, padding))
        row = self.decoder(row, attention_mask=None, packed_seq_params=borders)
        return row[:length].reshape(x.shape)
