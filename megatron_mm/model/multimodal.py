"""The whole model: image embeddings stand in the decoder's input at their placeholders.

    first stage                                                     every stage                  last stage
    pixels ─ VisionEncoder ─ connector ──── gather ──────┐
    tokens ─ word embeddings ─────────────────────────────┴ merge ─ GPTModel's layers ─ … ─ output layer ─ loss

Each tensor- and context-parallel rank encodes its share of the microbatch's images. The shares are gathered along the
batch, so encoder and connector exchange nothing else; their gradients are summed over the tensor-parallel group by
`finalize_gradients`, and over context-parallel ranks, as all gradients, with those of data parallelism.
A rank without a share encodes one blank image whose output is dropped; a microbatch without images encodes nothing,
and the encoder's parameters are given a gradient of zero. So every rank runs the same collectives and every parameter
gets a gradient, which overlapped reduction waits for.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_mm.config import RunConfig, SequenceLayout
from megatron_mm.model.attention import attention_mask, document_starts, packed_documents
from megatron_mm.model.connector import Connector, build_connector
from megatron_mm.model.decoder import build_decoder, transformer_config
from megatron_mm.model.kernels import uses_transformer_engine, vision_tile
from megatron_mm.parallel.backend import import_megatron
from megatron_mm.parallel.context import own_positions

import_megatron()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402

from megatron_mm.model.vision import VisionEncoder  # noqa: E402

if TYPE_CHECKING:
    from megatron_mm.data.batch import Microbatch


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

    `forward` takes a `Microbatch` on this rank's device. Returns the loss of each position, fp32 [b, s/cp], on the last
    stage (the logits [b, s/cp, vocab/tp] with `return_logits`), and the hidden states [s/cp, b, h] on the others.
    Which positions a rank has is told by `own_positions`.
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
        # Attention is told the documents' borders instead of a mask; without context parallelism, which cuts each row,
        # the rows are then laid end to end.
        self.borders = uses_transformer_engine(config)
        self.context = mpu.get_context_parallel_group()
        self.images_dealt = not config.parallel.vision_tensor_parallel  # over the tensor-parallel group too
        self.image_sharers = config.parallel.image_sharers
        self.vision: VisionEncoder | None = None
        self.connector: Connector | None = None
        if pre_process:
            split, tile = config.parallel.vision_tensor_parallel, vision_tile(config)
            self.vision = VisionEncoder(v, self.transformer, split, self.borders, tile)
            self.connector = build_connector(c, v.hidden_size, v.grid, d.hidden_size, config.model.init_std)
            self.connector.to(self.transformer.params_dtype)
        self.language_model = build_decoder(config, self.transformer, pre_process, post_process, chunk)

    @property
    def packed(self) -> bool:
        """Whether the rows of a microbatch are laid end to end, as one of b · s positions."""
        return self.borders and self.context.size() == 1

    def own_positions(self, x: Tensor) -> Tensor:
        """[b, s, …] → [b, s/cp, …]: what this context-parallel rank holds of the sequences."""
        return own_positions(x, self.context.rank(), self.context.size())

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
        share = max(1, -(-num_images // self.image_sharers))
        missing = share - len(images)
        if missing:
            blank = images.new_zeros((missing, 3, self.image_size, self.image_size))
            images = torch.cat([images, blank])
        embeddings = self.connector(self.vision(images))
        if self.images_dealt:
            # What follows is computed alike on all tensor-parallel ranks, so each has the whole gradient of its share.
            embeddings = gather_from_sequence_parallel_region(embeddings, False, mpu.get_tensor_model_parallel_group())
        # Context-parallel ranks use the images in different positions: their gradients are summed on the way back.
        embeddings = gather_from_sequence_parallel_region(embeddings, True, self.context)
        return embeddings[:num_images]

    def _merge(self, tokens: Tensor, batch: "Microbatch", layout: SequenceLayout) -> Tensor:
        """Of this rank's tokens [b, s/cp], the decoder's input [s/cp, b, h], or [s/cp/tp, b, h] under sequence
        parallelism."""
        embeddings = self.language_model.embedding(tokens, None)  # [s/cp, b, h]
        if batch.num_images:
            rows = self.encode_images(batch.images, batch.num_images).to(embeddings.dtype).flatten(0, 1)
            # Which row of the embeddings stands where. An index for every position, used or not: to pick the positions
            # out by their mask would make the host wait for the device.
            numbers = (batch.tokens == layout.image_token_id).flatten().cumsum(0).sub(1).clamp(min=0)
            numbers = self.own_positions(numbers.view_as(batch.tokens)).reshape(tokens.shape)
            placeholders = (tokens == layout.image_token_id).t().unsqueeze(-1)  # [s/cp, b, 1]
            merged = torch.where(placeholders, rows[numbers.t().contiguous()], embeddings).contiguous()
        else:
            modules = [m for m in (self.vision, self.connector) if m is not None]
            merged = _Unused.apply(embeddings, *(p for m in modules for p in m.parameters() if p.requires_grad))
        if self.transformer.sequence_parallel:
            merged = scatter_to_sequence_parallel_region(merged)
        return merged

    def _padding(self, batch: "Microbatch") -> Tensor:
        """Where this rank's hidden states are padding's, bool in the form of its tokens: [b, s/cp], or [b, s/cp/tp]
        under sequence parallelism."""
        padding = self.own_positions(batch.documents) < 0
        if self.packed:
            padding = padding.view(1, -1)
        if self.transformer.sequence_parallel:
            shares = padding.chunk(mpu.get_tensor_model_parallel_world_size(), dim=1)
            padding = shares[mpu.get_tensor_model_parallel_rank()]
        return padding

    def forward(self, batch: "Microbatch", layout: SequenceLayout, return_logits: bool = False) -> Tensor:
        b, s = batch.tokens.shape
        tokens, labels = self.own_positions(batch.tokens), self.own_positions(batch.labels)
        if self.packed:
            tokens, labels = tokens.view(1, b * s), labels.view(1, b * s)
        given: dict[str, Any] = {"attention_mask": None}
        if self.borders:
            starts = document_starts(batch.documents)
            given["packed_seq_params"] = packed_documents(starts, s, "thd" if self.packed else "sbhd")
        else:
            given["attention_mask"] = attention_mask(batch.documents)
        if self.transformer.num_moe_experts is not None:
            given["padding_mask"] = self._padding(batch)
        output = self.language_model(
            input_ids=tokens,
            position_ids=None,
            decoder_input=self._merge(tokens, batch, layout) if self.pre_process else None,
            labels=None if return_logits else labels,
            **given,
        )
        return output.view(b, s, *output.shape[2:]) if self.packed and self.post_process else output
