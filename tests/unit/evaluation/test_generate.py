"""Batched answers are those that the library's own generation gives one by one."""

import itertools

import pytest
import torch
from PIL import Image
from torch import nn

from megatron_mm.errors import UserError
from megatron_mm.evaluation.generate import Prompt
from megatron_mm.evaluation.vqa import load_generator


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    paths = []
    for i in range(6):
        paths.append(root / f"{i}.png")
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (20 + i, 30, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def prompts(images):
    """Of many lengths, with 0 to 3 images, some of them repeatedly."""
    texts = ["<image> Question: what?", " no image at all", "<image> x <image> y", "<image><image><image>", "<image>"]
    return [
        Prompt(f"{text} number {i}", tuple(images[(i + j) % len(images)] for j in range(text.count("<image>"))))
        for i in range(4)
        for text in texts
    ]


@pytest.fixture
def generator(folder):
    return load_generator(folder)


def by_the_library(generator, prompt, max_new_tokens):
    processor = generator.features.processor
    pictures = [Image.open(path) for path in prompt.images]
    inputs = processor(images=pictures or None, text=prompt.text, return_tensors="pt")
    out = generator.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(("batch_size", "batch_positions"), [(64, 1 << 14), (3, 1 << 14), (64, 100), (1, 1)])
def test_answers_are_the_librarys(folder, prompts, batch_size, batch_positions):
    generator = load_generator(folder, batch_size=batch_size, batch_positions=batch_positions)
    seen = []
    answers = generator(prompts, 5, [], lambda done, total: seen.append((done, total)))
    assert answers == [by_the_library(generator, prompt, 5).strip() for prompt in prompts]
    assert len(set(answers)) > len(prompts) // 2
    assert seen == sorted(seen)
    assert seen[-1] == (len(prompts), len(prompts))
    if batch_size == 3:
        assert all(b[0] - a[0] <= 3 for a, b in itertools.pairwise(seen))


def test_stops_cut_the_answer(generator, prompts):
    whole = generator(prompts, 8, [])
    cut = generator(prompts, 8, ["e", "q", " "])
    raw = [by_the_library(generator, prompt, 8) for prompt in prompts]
    expected = [text[: min((at for at in map(text.find, "eq ") if at >= 0), default=len(text))].strip() for text in raw]
    assert cut == expected
    assert cut != whole


def test_end_of_text_ends_the_answer(generator, prompts):
    """One pass a batch when every row ends at once, whatever else they were given to write."""
    head = nn.Linear(32, 336)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head.bias.data[generator.tokenizer.eos_token_id] = 1
    generator.model.lm_head = head
    passes = []
    head.register_forward_hook(lambda *_: passes.append(1))
    assert generator(prompts, 50, []) == [""] * len(prompts)
    assert len(passes) == 1


def test_every_image_is_encoded_once(generator, prompts, images):
    counts = []
    generator.model.model.vision_tower.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    first = generator(prompts, 3, [])
    assert sum(counts) == len(images)
    assert generator(prompts, 3, []) == first
    assert sum(counts) == len(images)


def test_features_are_dropped_past_the_limit(generator, prompts, images):
    wanted = generator(prompts, 3, [])
    features = generator.features
    features._kept.clear()
    features.max_bytes = 2 * features(images[:1]).nbytes
    assert generator(prompts, 3, []) == wanted
    assert len(features._kept) == 2
    features(images[:1])
    features(images[1:3])
    assert list(features._kept) == images[1:3]


def test_prompt_without_its_image(generator, images):
    with pytest.raises(UserError, match="prompt and images disagree") as caught:
        generator([Prompt("<image> a <image>", (images[0],))], 3, [])
    assert "2 <image> and 1 images" in str(caught.value)


def test_unreadable_image(generator, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name in ("bad.png", "none.png"):
        with pytest.raises(UserError, match=f"{name}: cannot read an image"):
            generator([Prompt("<image>", (tmp_path / name,))], 3, [])
