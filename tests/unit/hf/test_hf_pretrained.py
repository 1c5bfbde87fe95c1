"""Open weights into a run: what the run's model computes is what the library's own classes compute."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import megatron_mm.hf  # noqa: F401 (registers the classes)
from megatron_mm.config import RunConfig, config_from_dict, config_to_dict
from megatron_mm.errors import UserError
from megatron_mm.hf.exporter import export_tensors
from megatron_mm.hf.pretrained import import_pretrained
from tests.unit.hf.sample import DictSource, megatron_tensors, run_config

VISION = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 20, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 40, "vocab_size": 310, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "tie_word_embeddings": False,
}  # fmt: skip


def change(run: RunConfig, **parts: dict[str, object]) -> RunConfig:
    data = config_to_dict(run)
    for part, fields in parts.items():
        data["model"][part].update(fields)
    return config_from_dict(data)


def save(model: torch.nn.Module, folder: Path) -> Path:
    """With weights that differ, norms, biases and layer scales among them."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)  # type: ignore[operator]
    return folder


def exported(run: RunConfig, folder: Path, tokenizer_file: Path, tmp_path: Path) -> torch.nn.Module:
    """The exported model of the run that starts from the folder; what it does not give is random."""
    tensors = megatron_tensors(run)
    given = dict(import_pretrained(folder, run.model))
    assert given.keys() <= tensors.keys()
    assert all(given[name].shape == tensors[name].shape for name in given)
    export_tensors(DictSource(run, tensors | given), tokenizer_file, tmp_path / "exported")
    return AutoModelForImageTextToText.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()


ENCODERS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(**VISION, intermediate_size=40, hidden_act="quick_gelu")),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**VISION, intermediate_size=40, vision_use_head=False)),
    "dinov2": (Dinov2Model, Dinov2Config(**VISION, mlp_ratio=2)),
}


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("size", [20, 28])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_of_any_family_layer_and_resolution(family, size, layer, tokenizer_file, tmp_path):
    build, config = ENCODERS[family]
    theirs = build(config)
    folder = save(theirs, tmp_path / "theirs")
    vision = {
        "family": family, "feature_layer": layer, "num_layers": 3, "image_size": size, "activation": None,
        "ffn_hidden_size": 48 if family == "dinov2" else 40, "layernorm_epsilon": None,
    }  # fmt: skip
    run = change(run_config(), vision={k: v for k, v in vision.items() if v is not None} | {"activation": {
        "clip": "quick_gelu", "siglip": "gelu_tanh", "dinov2": "gelu"}[family],
        "layernorm_epsilon": 1e-5 if family == "clip" else 1e-6}, connector={"num_tokens": 9})  # fmt: skip
    model = exported(run, folder, tokenizer_file, tmp_path)
    pixels = torch.randn(2, 3, size, size)
    interpolate = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    outputs = theirs(pixels, output_hidden_states=True, **interpolate)
    wanted = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    found = model.model.vision_tower(pixels).last_hidden_state
    assert wanted.std() > 0.3
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_encoder_inside_clip(tokenizer_file, tmp_path):
    """A whole CLIP model, as most releases are."""
    clip = CLIPModel(
        CLIPConfig(
            vision_config=ENCODERS["clip"][1].to_dict(),
            text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        )
    )
    folder = save(clip, tmp_path / "theirs")
    run = change(run_config(), vision={"num_layers": 3, "image_size": 20})
    given = dict(import_pretrained(folder, run.model))
    assert torch.equal(given["vision.ln_pre.weight"], clip.vision_model.pre_layrnorm.weight)
    assert len(given) == len([n for n in megatron_tensors(run) if n.startswith("vision.")])


MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2}
DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TEXT), {"family": "llama"}),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**{**TEXT, "tie_word_embeddings": True}), {"family": "llama"}),
    "mistral": (MistralForCausalLM, MistralConfig(**TEXT, sliding_window=None), {"family": "llama"}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**TEXT), {}),
    "qwen3 moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**TEXT, **MOE, norm_topk_prob=True),
        {"moe": {"num_experts": 3, "layer_freq": 2, "ffn_hidden_size": 16}},
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**TEXT, num_local_experts=3, sliding_window=None),
        {"family": "llama", "moe": {"num_experts": 3, "layer_freq": 1}},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_decoder_of_any_family(family, tokenizer_file, tmp_path):
    build, config, fields = DECODERS[family]
    theirs = build(config)
    folder = save(theirs, tmp_path / "theirs")
    run = change(run_config(), decoder={"num_query_groups": 2, "kv_channels": 8, "vocab_size": 336, **fields})
    model = exported(run, folder, tokenizer_file, tmp_path)
    tokens = torch.randint(5, 310, (2, 20), generator=torch.Generator().manual_seed(1))
    wanted, found = theirs(tokens).logits, model(tokens).logits
    assert wanted.std() > 0.5
    torch.testing.assert_close(found[..., :310], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[..., 310:], wanted.mean(-1, keepdim=True).expand(-1, -1, 26), atol=1e-4, rtol=1e-4)


def refused(folder: Path, run: RunConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        list(import_pretrained(folder, run.model))
    return caught.value


def test_another_model_is_refused_by_field(tmp_path):
    llama = save(LlamaForCausalLM(LlamaConfig(**TEXT)), tmp_path / "llama")
    run = change(run_config(), decoder={"family": "llama", "num_query_groups": 2, "kv_channels": 8})
    assert "num_key_value_heads: 2 in the folder, 4 in the config" in str(
        refused(llama, change(run, decoder={"num_query_groups": 4}))
    )
    assert refused(llama, change(run, decoder={"family": "qwen3"})).where.startswith("model.decoder.family")
    assert "rope_theta" in str(refused(llama, change(run, decoder={"rotary_base": 7.0})))
    assert refused(llama, change(run, decoder={"vocab_size": 300})).where == "model.decoder.vocab_size"
    clip = save(CLIPVisionModel(ENCODERS["clip"][1]), tmp_path / "clip")
    assert refused(clip, change(run, vision={"family": "siglip"})).where == "model.vision.family"
    assert "model.vision.num_layers" in str(refused(clip, run))
    assert "patch_size" in str(refused(clip, change(run, vision={"num_layers": 3, "patch_size": 7})))


def test_a_folder_that_is_no_model(tmp_path):
    assert "not a Hugging Face model" in str(refused(tmp_path, run_config()))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "bert" in str(refused(tmp_path, run_config()))


def test_unsupported_decoders_are_refused(tmp_path):
    run = change(run_config(), decoder={"family": "llama", "num_query_groups": 2, "kv_channels": 8})
    biased = save(LlamaForCausalLM(LlamaConfig(**TEXT, attention_bias=True)), tmp_path / "biased")
    assert "biases" in str(refused(biased, run))
    sliding = save(MistralForCausalLM(MistralConfig(**TEXT, sliding_window=8)), tmp_path / "sliding")
    assert "sliding window" in str(refused(sliding, run))
