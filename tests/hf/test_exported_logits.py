"""Invariant I5: what was trained is what is exported, against transformers as the oracle, and back bit for bit."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import megatron_mm.hf  # noqa: F401 (registers the classes)
from megatron_mm.training.checkpoint_files import latest, read_tensors
from tests.ranks import ROOT, run_ranks
from tests.tiny import tiny_run, tool

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
EP2_TP2 = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True}
MOE = {"num_experts": 4, "topk": 2, "layer_freq": 2}

RUNS = {
    "qwen3-dp2": (2, {}, {}),
    "llama-tp2-pp2": (
        4,
        {"parallel": TP2_PP2},
        {
            "model__decoder__family": "llama",
            "model__vision__family": "siglip",
            "model__vision__num_layers": 2,
            "model__vision__feature_layer": -2,
            "model__connector__kind": "attention_pool",
        },
    ),
    "qwen3-moe-ep2-tp2": (
        4,
        {"parallel": EP2_TP2},
        {
            "model__decoder__moe": MOE,
            "model__vision__family": "dinov2",
            "model__connector__kind": "pixel_shuffle_mlp",
        },
    ),
}


@pytest.fixture(scope="module", params=RUNS, ids=RUNS)
def exported(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the run's folder, the exported model's folder)."""
    world, sections, overrides = RUNS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_run(folder, data, training__steps=4, **sections, **overrides)
    run_ranks(world, ["-m", "megatron_mm.train", "--config", str(config)], folder / "train")
    tool("convert_checkpoint.py", "to-hf", "--checkpoint", folder / "run", "--output", folder / "hf")
    whole = yaml.safe_load(config.read_text()) | {"parallel": {}}
    (folder / "one-rank.yaml").write_text(yaml.safe_dump(whole))
    script = str(ROOT / "tests/hf/megatron_logits.py")
    run_ranks(1, [script, str(folder / "one-rank.yaml"), str(folder / "logits.safetensors")], folder / "logits")
    return folder, folder / "hf"


def test_logits_equal_the_trained_ones(exported: tuple[Path, Path]) -> None:
    """On packed rows through a block-diagonal mask, and on each document alone."""
    folder, hf = exported
    model = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(hf)
    stored = load_file(folder / "logits.safetensors")
    per_image = model.config.tokens_per_image
    seen_images = alone = 0
    for source in range(3):
        tokens, documents, images, expected = (
            stored[f"{source}.{k}"] for k in ("tokens", "documents", "images", "logits")
        )
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1)
            for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
        )
        pixels = (images.float() / 255 - mean) / std
        same = documents.unsqueeze(1) == documents.unsqueeze(2)
        allowed = (same & torch.ones_like(same).tril()).unsqueeze(1)
        has_images = {"pixel_values": pixels} if len(pixels) else {}
        with torch.no_grad():
            packed = model(input_ids=tokens, attention_mask=allowed, **has_images).logits
        real = documents >= 0
        torch.testing.assert_close(packed[real], expected[real], atol=1e-4, rtol=0)
        first_image = 0
        for row in range(len(tokens)):
            for number in range(int(documents[row].max()) + 1):
                where = documents[row] == number
                ids = tokens[row][where].unsqueeze(0)
                count = int((ids == model.config.image_token_id).sum()) // per_image
                mine = pixels[first_image : first_image + count]
                first_image += count
                with torch.no_grad():
                    logits = model(input_ids=ids, **({"pixel_values": mine} if count else {})).logits
                torch.testing.assert_close(logits[0], expected[row][where], atol=1e-4, rtol=0)
                alone += 1
        seen_images += first_image
        assert first_image == len(images)
    assert seen_images > 4
    assert alone > 10


def test_parameters_come_back_bit_exact(exported: tuple[Path, Path]) -> None:
    folder, hf = exported
    back = folder / "back"
    tool(
        "convert_checkpoint.py", "from-hf", "--model", hf, "--config", folder / "one-rank.yaml", "--output", back
    )  # fmt: skip
    newest = latest(folder / "run" / "checkpoints")
    assert newest is not None
    first, second = read_tensors(newest), read_tensors(back)
    assert sorted(first.keys()) == sorted(second.keys())
    assert all(torch.equal(first.tensor(k), second.tensor(k)) for k in first.keys())  # noqa: SIM118 (no dict)


def test_generation_uses_the_cache(exported: tuple[Path, Path], data: Path) -> None:
    from PIL import Image

    _, hf = exported
    model = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(hf)
    inputs = processor(
        images=[Image.open(data / "image3.jpg")],
        text=["<image> Question: what is it? Short answer:"],
        return_tensors="pt",
    )
    made = [model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(made[0], made[1])
    assert made[0].shape[1] > inputs["input_ids"].shape[1]
