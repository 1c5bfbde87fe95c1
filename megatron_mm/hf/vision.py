"""The exported model's encoder: the library's own, without what patch features never pass through."""

from typing import Any

from torch import nn
from transformers import CLIPVisionModel, Dinov2Model, PreTrainedModel, SiglipVisionModel


class CLIPTower(CLIPVisionModel):
    """CLIP's last norm serves its pooled output only: it has no part here."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.post_layernorm = nn.Identity()


class Dinov2Tower(Dinov2Model):
    """Layer scales are folded into the weights before them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.encoder.layer:
            layer.layer_scale1 = layer.layer_scale2 = nn.Identity()


def build_vision_tower(config: Any, final_norm: bool) -> PreTrainedModel:
    """The tower for a vision configuration; without `final_norm`, its features are the last layer's as they are."""
    if config.model_type == "clip_vision_model":
        return CLIPTower(config)
    if config.model_type == "siglip_vision_model":
        tower: Any = SiglipVisionModel(config)
        last = "post_layernorm"
    else:
        tower = Dinov2Tower(config)
        last = "layernorm"
    if not final_norm:
        setattr(tower, last, nn.Identity())
    return tower


def first_patch(config: Any) -> int:
    """How many tokens stand before the patches: the class token, where there is one."""
    return int(config.model_type != "siglip_vision_model")
