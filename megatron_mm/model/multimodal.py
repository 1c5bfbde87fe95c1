"""The whole model: image embeddings stand in the decoder's input at their placeholders.

    first stage                                                     every stage                  last stage
    pixels ─ VisionEncoder ─ connector ── gather over TP ┐
    tokens ─ word embeddings ─────────────────────────────┴ merge ─ GPTModel's layers ─ … ─ output layer ─ loss

Each tensor-parallel rank encodes its share of the microbatch's images. The shares are gathered along the batch, so
encoder and connector exchange nothing else; their gradients are summed over the group by `finalize_gradients`.
A rank without a share encodes one blank image whose output is dropped; a microbatch without images encodes nothing,
and the encoder's parameters are given a gradient of zero. So every rank runs the same collectives and every parameter
gets a gradient, which overlapped reduction waits for.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.config import RunConfig, SequenceLayout
from megatron_mm.model.attention import attention_mask, document_starts, packed_documents
from megatron_mm.model.connector import Connector, build_connector
from megatron_mm.model.decoder import build_decoder, transformer_config
from megatron_mm.model.kernels import uses_transformer_engine, vision_tile
from megatron_mm.parallel.backend import import_megatron

import_megatron()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.transformer.enums import ModelType  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402

from megatron_mm.model.vision import VisionEncoder  # noqa: E402

if TYPE_CHECKING:
    from megatron_mm.data.batch import Microbatch


class _GatherImages(torch.autograd.Function):
    """[c, …] of each tensor-parallel rank → [tp·c, …] on all. Backward: the slice that came from here.

    Everything after the gather is computed alike on all ranks of the group (or made whole again in its own backward,
    as sequence parallelism's scatter does), so the incoming gradient is complete and equal on each of them.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = local.new_empty((group.size() * len(local), *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        share = len(grads[0]) // ctx.group.size()
        start = ctx.group.rank() * share
        return grads[0][start : start + share].contiguous(), None


class _Unused(torch.autograd.Function):
    """The first argument as it is. Backward: zeros for the others, parameters that had no part in it."""

    @staticmethod
    def forward(ctx: Any, used: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return used.view_as(used)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (grads[0], *(p.new_zeros(()).expand_as(p) for p in ctx.saved_tensors))


class MultimodalModel(MegatronModule):
    """This rank's pipeline stage of the model, or one of its virtual stages.

    `forward` takes a `Microbatch` on this rank's device. Returns the loss of each position, fp32 [b, s], on the last
    stage (the logits [b, s, vocab/tp] with `return_logits`), and the hidden states [s, b, h] on the others.
    """

    def __init__(self, config: RunConfig, pre_process: bool, post_process: bool, chunk: int | None = None) -> None:
        self.transformer = transformer_config(config)
        super().__init__(config=self.transformer)
        v, c, d = config.model.vision, config.model.connector, config.model.decoder
        self.pre_process, self.post_process = pre_process, post_process
        # What Megatron-Core's schedules and gradient finalisation read from the top module.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.image_size = v.image_size
        self.packed = uses_transformer_engine(config)  # rows laid end to end, attention told the documents' borders
        self.images_dealt = not config.parallel.vision_tensor_parallel  # over the tensor-parallel group
        self.vision: VisionEncoder | None = None
        self.connector: Connector | None = None
        if pre_process:
            split, tile = config.parallel.vision_tensor_parallel, vision_tile(config)
            self.vision = VisionEncoder(v, self.transformer, split, self.packed, tile)
            self.connector = build_connector(c, v.hidden_size, v.grid, d.hidden_size, config.model.init_std)
            self.connector.to(self.transformer.params_dtype)
        self.language_model = build_decoder(config, self.transformer, pre_process, post_process, chunk)

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> None:
        return None

    def replicated_parameters(self) -> list[torch.nn.Parameter]:
        """Encoder's and connector's where images are dealt: whole on every tensor-parallel rank, with a part of the
        gradient on each. (An encoder split over the group sees all images on each rank: its gradients are complete.)"""
        if not self.images_dealt:
            return []
        modules = [m for m in (self.vision, self.connector) if m is not None]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def encode_images(self, images: Tensor, num_images: int) -> Tensor:
        """This rank's share, uint8 [c, 3, H, W] or fewer → all embeddings, [num_images, tokens, hidden]."""
        assert self.vision is not None
        assert self.connector is not None
        group = mpu.get_tensor_model_parallel_group()
        sharers = group.size() if self.images_dealt else 1
        share = max(1, -(-num_images // sharers))
        missing = share - len(images)
        if missing:
            blank = images.new_zeros((missing, 3, self.image_size, self.image_size))
            images = torch.cat([images, blank])
        embeddings = self.connector(self.vision(images))
        if sharers > 1:
            embeddings = _GatherImages.apply(embeddings, group)
        return embeddings[:num_images]

    def _merge(self, tokens: Tensor, batch: "Microbatch", layout: SequenceLayout) -> Tensor:
        """Decoder input [s, b, h], or [s/tp, b, h] under sequence parallelism."""
        embeddings = self.language_model.embedding(tokens, None)  # [s, b, h]
        if batch.num_images:
            images = self.encode_images(batch.images, batch.num_images).to(embeddings.dtype)
            placeholders = (tokens == layout.image_token_id).unsqueeze(-1)  # [b, s, 1]
            merged = embeddings.transpose(0, 1).masked_scatter(placeholders, images.flatten(0, 1))
            merged = merged.transpose(0, 1).contiguous()
        else:
            modules = [m for m in (self.vision, self.connector) if m is not None]
            merged = _Unused.apply(embeddings, *(p for m in modules for p in m.parameters() if p.requires_grad))
        if self.transformer.sequence_parallel:
            merged = tensor_parallel.scatter_to_sequence_parallel_region(merged)
        return merged

    def forward(self, batch: "Microbatch", layout: SequenceLayout, return_logits: bool = False) -> Tensor:
        b, s = batch.tokens.shape
        tokens, labels = batch.tokens, batch.labels
        attention: dict[str, Any] = {}
        if self.packed:  # one row of b · s positions
            tokens, labels = tokens.view(1, b * s), labels.view(1, b * s)
            attention["attention_mask"] = None
            attention["packed_seq_params"] = packed_documents(document_starts(batch.documents), s)
        else:
            attention["attention_mask"] = attention_mask(batch.documents)
        output = self.language_model(
            input_ids=tokens,
            position_ids=None,
            decoder_input=self._merge(tokens, batch, layout) if self.pre_process else None,
            labels=None if return_logits else labels,
            **attention,
        )
        return output.view(b, s, *output.shape[2:]) if self.packed and self.post_process else output
