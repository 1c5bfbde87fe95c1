"""The exported model's configuration: three parts, each described by the library's own class where it has one."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from megatron_mm.config import ConnectorConfig


@strict
class MegatronMMConfig(PreTrainedConfig):
    """Configuration of `MegatronMMForConditionalGeneration`.

    Args:
        vision_config: a `CLIPVisionConfig`, `SiglipVisionConfig` or `Dinov2Config` of the layers that are there.
        vision_final_norm: whether features pass through the encoder's last norm.
        text_config: a `Qwen3Config`, `Qwen3MoeConfig`, `LlamaConfig` or `MixtralConfig`.
        image_token_id: the placeholder; an image takes `tokens_per_image` of them in a row.
        tokens_per_image: the connector's outputs, a square number.
        connector_kind: see `megatron_mm.config.ConnectorConfig`, also for the next two.
        connector_hidden_size: its width.
        connector_depth: blocks in each of C-Abstractor's two stages.
    """

    model_type = "megatron_mm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (as in the base class)

    vision_config: Any = None  # given as a configuration or as the dict of one
    text_config: Any = None
    image_token_id: int = 4
    tokens_per_image: int = 144
    vision_final_norm: bool = False
    connector_kind: str = "c_abstractor"
    connector_hidden_size: int = 1024
    connector_depth: int = 3
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            vision = dict(self.vision_config or {})
            self.vision_config = CONFIG_MAPPING[vision.pop("model_type", "clip_vision_model")](**vision)
        if not isinstance(self.text_config, PreTrainedConfig):
            text = dict(self.text_config or {})
            self.text_config = CONFIG_MAPPING[text.pop("model_type", "qwen3")](**text)
        super().__post_init__(**kwargs)

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def connector(self) -> ConnectorConfig:
        return ConnectorConfig(
            kind=self.connector_kind,  # type: ignore[arg-type]
            num_tokens=self.tokens_per_image,
            hidden_size=self.connector_hidden_size,
            depth=self.connector_depth,
        )
