"""The exported model's configuration: three parts, each described by the library's own class where it has one."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PreTrainedConfig

from megatron_mm.config import ConnectorConfig


@strict
class MegatronMMConfig(PreTrainedConfig):
    """Configuration of `MegatronMMForConditionalGeneration`.

    Args:
        vision_config: a `CLIPVisionConfig`.
        text_config: a `Qwen3Config`, `Qwen3MoeConfig`, `LlamaConfig` or `MixtralConfig`.
        image_token_id: the placeholder; an image takes `tokens_per_image` of them in a row.
        tokens_per_image: C-Abstractor's outputs, a square number.
        connector_hidden_size: C-Abstractor's width.
        connector_depth: blocks in each of its two stages.
    """

    model_type = "megatron_mm"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": AutoConfig}  # noqa: RUF012 (as in the base class)

    vision_config: Any = None  # given as a configuration or as the dict of one
    text_config: Any = None
    image_token_id: int = 4
    tokens_per_image: int = 144
    connector_hidden_size: int = 1024
    connector_depth: int = 3
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = CLIPVisionConfig(**(self.vision_config or {}))
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
            num_tokens=self.tokens_per_image, hidden_size=self.connector_hidden_size, depth=self.connector_depth
        )
