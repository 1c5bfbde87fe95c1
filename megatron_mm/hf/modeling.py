"""The exported model in plain transformers: a ViT, a connector, and a Qwen3, Llama or Mixtral decoder.

    pixel_values [n, 3, H, W] ─ vision tower ─ connector ─┐ [n, tokens_per_image, hidden]
    input_ids [b, s] ─ word embeddings ───────────────────┴ in place of the image tokens ─ decoder ─ lm_head

Images of a batch come in one tensor, in the order of their placeholders, row by row. Nothing here needs Megatron.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from megatron_mm.errors import UserError
from megatron_mm.hf.configuration import MegatronMMConfig
from megatron_mm.hf.vision import build_vision_tower, first_patch
from megatron_mm.model.connector import CONNECTORS, Connector, build_connector


@dataclass
class MegatronMMModelOutput(BaseModelOutputWithPast):
    """`image_hidden_states` [n, tokens_per_image, hidden]: the connector's outputs, where images were given."""

    image_hidden_states: Tensor | None = None


@dataclass
class MegatronMMOutput(CausalLMOutputWithPast):
    """`image_hidden_states` [n, tokens_per_image, hidden]: the connector's outputs, where images were given."""

    image_hidden_states: Tensor | None = None


class MegatronMMPreTrainedModel(PreTrainedModel):
    config_class = MegatronMMConfig
    config: MegatronMMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [kind.__name__ for kind in CONNECTORS.values()]  # noqa: RUF012 (as in the base class)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Connector):
            # Comes after its parts had the library's rule. Loaded values stay: the caller guards torch.nn.init.
            module.reset_parameters()
        else:
            super()._init_weights(module)


class MegatronMMModel(MegatronMMPreTrainedModel):
    """Encoder, connector and decoder without the language-model head."""

    def __init__(self, config: MegatronMMConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_tower = build_vision_tower(vision, config.vision_final_norm)
        self.connector = build_connector(
            config.connector, vision.hidden_size, config.grid, text.hidden_size, text.initializer_range
        )
        self.language_model = AutoModel.from_config(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Normalised pixels [n, 3, H, W] → `pooler_output` [n, tokens_per_image, hidden]."""
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        outputs.pooler_output = self.connector(outputs.last_hidden_state[:, first_patch(self.config.vision_config) :])
        return outputs

    def _place_images(self, input_ids: Tensor | None, inputs_embeds: Tensor, features: Tensor) -> Tensor:
        image_token = self.config.image_token_id
        if input_ids is not None:
            mask = input_ids == image_token
        else:
            embedding = self.get_input_embeddings()(torch.tensor(image_token, device=inputs_embeds.device))
            mask = (inputs_embeds == embedding).all(-1)
        placeholders, given = int(mask.sum()), features.shape[0] * features.shape[1]
        if placeholders != given:
            raise UserError(
                "image tokens and images disagree", where="input_ids, pixel_values",
                found=f"{placeholders} image tokens and {len(features)} images of {features.shape[1]} tokens",
                allowed=f"{given} image tokens (id {image_token}) for these images",
                do="let the processor expand <image>, and do not truncate its output",
            )  # fmt: skip
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), features.to(inputs_embeds))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> MegatronMMModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError("give either pixel_values or mm_encoder_outputs")
            encoded = self.get_image_features(pixel_values, return_dict=True)
        features: Tensor | None = None
        if encoded is not None:
            features = encoded.pooler_output
            # Generation with several sequences a prompt hands the images back as a list.
            features = torch.stack(list(features)) if not isinstance(features, Tensor) else features
            inputs_embeds = self._place_images(input_ids, inputs_embeds, features)
        elif input_ids is not None and bool((input_ids == self.config.image_token_id).any()):
            raise UserError(
                "image tokens without images", where="pixel_values", found="None",
                allowed="one image for each <image> of the prompts", do="pass what the processor returned",
            )  # fmt: skip
        if attention_mask is not None and attention_mask.ndim == 4 and attention_mask.dtype == torch.bool:
            # Eager attention adds its mask; sdpa takes either form.
            lowest = torch.finfo(inputs_embeds.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=inputs_embeds.dtype).masked_fill(
                ~attention_mask, lowest
            )
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MegatronMMModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )


class MegatronMMForConditionalGeneration(MegatronMMPreTrainedModel, GenerationMixin):
    """The whole model; `generate` encodes images once and then works from its key-value cache."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012 (as in the base class)

    def __init__(self, config: MegatronMMConfig) -> None:
        super().__init__(config)
        self.model = MegatronMMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Normalised pixels [n, 3, H, W] → `pooler_output` [n, tokens_per_image, hidden]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> MegatronMMOutput:
        """One pass.

        Args:
            input_ids: [b, s]; every image as `tokens_per_image` image tokens.
            pixel_values: [n, 3, H, W], normalised, all images of the batch in the order of their tokens.
            attention_mask: [b, s], 0 at padding; or, for packed sequences, bool [b, 1, s, s], True where a position
                (second last axis) may attend to another (last axis), or the same as a float mask to be added.
            position_ids: [b, s]. Restarting at 0 within a row, and without an attention mask, they also tell the
                decoder where packed documents begin.
            labels: [b, s], as in the library: shifted inside, -100 carries no loss.
            logits_to_keep: compute logits only for that many last positions (0: all).
            mm_encoder_outputs: {"image": what `get_image_features` returned}, in place of pixel_values.
        Returns:
            logits [b, s, vocab], loss where labels were given, past_key_values, image_hidden_states.
        Raises:
            UserError: the image tokens and the images disagree.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return MegatronMMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
