"""Positions at another resolution, against transformers' own interpolation."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from megatron_mm.config import VisionConfig
from megatron_mm.model.positions import fit_grid, grid_of

ENCODER, CONNECTOR = "vision.position_embeddings.weight", "connector.position_embedding"
THEIRS = {
    "clip": (CLIPVisionEmbeddings, CLIPVisionConfig),
    "siglip": (SiglipVisionEmbeddings, SiglipVisionConfig),
    "dinov2": (Dinov2Embeddings, Dinov2Config),
}


def vision(family: str, grid: int) -> VisionConfig:
    return VisionConfig(
        family=family, num_layers=1, hidden_size=24, num_attention_heads=3, ffn_hidden_size=48, patch_size=4,
        image_size=4 * grid,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("old", "new"), [(5, 7), (7, 5), (3, 12), (6, 6)])
@pytest.mark.parametrize("family", THEIRS)
def test_encoder_as_transformers_does(family: str, old: int, new: int) -> None:
    build, config = THEIRS[family]
    theirs = build(config(hidden_size=24, num_attention_heads=3, patch_size=4, image_size=4 * old))
    held = theirs.position_embeddings if family == "dinov2" else theirs.position_embedding.weight
    held.copy_(torch.randn(held.shape, generator=torch.Generator().manual_seed(0)))
    ours = held.view(-1, 24).clone()
    tokens = torch.zeros(1, vision(family, new).num_positions, 24)
    wanted = theirs.interpolate_pos_encoding(tokens, 4 * new, 4 * new)[0]
    assert grid_of(ENCODER, tuple(ours.shape), vision(family, new)) == old
    assert torch.equal(fit_grid(ENCODER, ours, vision(family, new)), wanted)
    if old != new and family != "siglip":
        assert torch.equal(wanted[0], ours[0])  # the class token's


@pytest.mark.parametrize("family", THEIRS)
def test_connector_has_no_class_token(family: str) -> None:
    ours = torch.randn(1, 25, 24)
    assert grid_of(CONNECTOR, (1, 25, 24), vision(family, 7)) == 5
    square = ours.view(1, 5, 5, 24).permute(0, 3, 1, 2)
    wanted = F.interpolate(square, (7, 7), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, 49, 24)
    assert torch.equal(fit_grid(CONNECTOR, ours, vision(family, 7)), wanted)


def test_all_else_stays() -> None:
    """Also what has a square number of rows."""
    v = vision("clip", 7)
    for name in ("connector.queries", "vision.class_token", "connector.fc1.weight"):
        value = torch.randn(1, 25, 24)
        assert grid_of(name, (1, 25, 24), v) is None
        assert fit_grid(name, value, v) is value


def test_positions_of_another_family_have_no_grid() -> None:
    assert grid_of(ENCODER, (25, 24), vision("clip", 5)) is None
    assert grid_of(ENCODER, (26, 24), vision("siglip", 5)) is None
    assert grid_of(ENCODER, (1, 24), vision("clip", 5)) is None
