"""The exported model computes what Megatron's weights mean, in all the ways in which it may be called."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import megatron_mm.hf  # noqa: F401 (registers the classes)
from megatron_mm.config import ConnectorConfig
from megatron_mm.errors import UserError
from megatron_mm.hf import MegatronMMConfig, MegatronMMForConditionalGeneration
from tests.unit.hf import reference
from tests.unit.hf.sample import VARIANTS, megatron_tensors, run_config

IMAGE = 4
PER_IMAGE = 9


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def model(variant, exported):
    return AutoModelForImageTextToText.from_pretrained(exported(variant)).eval()


def sequence(images: int, words: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with `words` random ones before, between and after the images, and pixels."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.tensor([2])]
    for _ in range(images):
        parts += [torch.randint(5, 300, (words,), generator=generator), torch.full((PER_IMAGE,), IMAGE)]
    parts.append(torch.randint(5, 300, (words,), generator=generator))
    return torch.cat(parts), torch.randn(images, 3, 28, 28, generator=generator)


@torch.no_grad()
def test_logits_are_those_of_the_megatron_weights(variant, model):
    """(fp32 against float64; the library computes norms and rotations in fp32 whatever the type.)"""
    run = run_config(variant)
    for images in (0, 2):
        tokens, pixels = sequence(images, 5, seed=images)
        wanted = reference.logits(run, megatron_tensors(run), tokens, pixels, IMAGE)
        found = model(input_ids=tokens[None], pixel_values=pixels if images else None).logits[0]
        assert wanted.std() > 1
        torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_unpacked(model, attention):
    """Both forms of packing: a 4-D mask, and positions that restart."""
    model.set_attn_implementation(attention)
    pieces = [sequence(images, words, seed) for images, words, seed in [(1, 4, 0), (0, 7, 1), (2, 3, 2)]]
    alone = torch.cat(
        [
            model(input_ids=tokens[None], pixel_values=pixels if len(pixels) else None).logits[0]
            for tokens, pixels in pieces
        ]
    )
    tokens, pixels = torch.cat([t for t, _ in pieces]), torch.cat([p for _, p in pieces])
    numbers = torch.cat([torch.full((len(t),), i) for i, (t, _) in enumerate(pieces)])
    mask = (numbers[:, None] == numbers) & torch.ones(len(numbers), len(numbers), dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(len(t)) for t, _ in pieces])[None]
    packed = model(
        input_ids=tokens[None], pixel_values=pixels, attention_mask=mask[None, None], position_ids=positions
    ).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    restarting = model(input_ids=tokens[None], pixel_values=pixels, position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(restarting, alone, atol=1e-4, rtol=1e-4)
    crossing = model(input_ids=tokens[None], pixel_values=pixels).logits[0]
    assert (crossing - alone).abs().max() > 0.1


def padded(*sequences: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with padding on the left."""
    longest = max(len(tokens) for tokens, _ in sequences)
    return {
        "input_ids": torch.stack([torch.cat([t.new_zeros(longest - len(t)), t]) for t, _ in sequences]),
        "attention_mask": torch.stack(
            [torch.cat([t.new_zeros(longest - len(t)), torch.ones_like(t)]) for t, _ in sequences]
        ),
        "pixel_values": torch.cat([pixels for _, pixels in sequences]),
    }


def test_generation(model):
    """With a cache, without, alone, and in a batch with others: the same words."""
    sequences = [sequence(1, 6, 3), sequence(2, 2, 4), sequence(0, 9, 5)]
    batch = padded(*sequences)
    length = batch["input_ids"].shape[1]
    cached = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=-1)[:, length:]
    assert len(set(map(tuple, cached.tolist()))) == 3
    uncached = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=-1, use_cache=False)
    assert torch.equal(uncached[:, length:], cached)
    for (tokens, pixels), wanted in zip(sequences, cached, strict=True):
        images = {"pixel_values": pixels} if len(pixels) else {}
        alone = model.generate(
            input_ids=tokens[None],
            attention_mask=torch.ones_like(tokens)[None],
            **images,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=-1,
        )
        assert torch.equal(alone[0, len(tokens) :], wanted)
        # And by hand, one full pass a word: no generation code of the library is involved.
        for _ in range(4):
            with torch.no_grad():
                scores = model(input_ids=tokens[None], **images).logits[0, -1]
            scores[model.generation_config.suppress_tokens] = -torch.inf
            tokens = torch.cat([tokens, scores.argmax()[None]])
        assert torch.equal(tokens[-4:], wanted[:4])


def test_special_tokens_are_never_generated(model):
    tokens, pixels = sequence(1, 4, 6)
    out = model.generate(
        input_ids=tokens[None], pixel_values=pixels, max_new_tokens=60, do_sample=True, temperature=9.0
    )
    words = out[0, len(tokens) :]
    assert not set(words.tolist()) & {0, 1, 2, IMAGE}
    assert words.max() < 336


def test_images_are_encoded_once(model, monkeypatch):
    calls = []
    encode = model.model.vision_tower.forward
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *a, **k: calls.append(1) or encode(*a, **k))
    tokens, pixels = sequence(2, 4, 7)
    both = model.generate(input_ids=tokens[None], pixel_values=pixels, max_new_tokens=5, do_sample=False)
    assert len(calls) == 1
    encoded = model.get_image_features(pixels)
    again = model.generate(
        input_ids=tokens[None], mm_encoder_outputs={"image": encoded}, max_new_tokens=5, do_sample=False
    )
    assert len(calls) == 2
    assert torch.equal(both, again)


def test_several_answers_a_prompt(model):
    """Two rows with different numbers of images, each copied: every copy keeps its own images."""
    batch = padded(sequence(1, 5, 8), sequence(2, 3, 9))
    greedy = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    copies = model.generate(**batch, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3, eos_token_id=-1)
    assert torch.equal(copies, greedy.repeat_interleave(3, dim=0))


@torch.no_grad()
def test_loss(model):
    tokens, pixels = sequence(1, 8, 10)
    labels = tokens.masked_fill(tokens == IMAGE, -100)[None]
    out = model(input_ids=tokens[None], pixel_values=pixels, labels=labels)
    scores = out.logits[0, :-1].log_softmax(-1)
    kept = labels[0, 1:] != -100
    wanted = -scores[kept, tokens[1:][kept]].mean()
    torch.testing.assert_close(out.loss, wanted)


def test_gradients_reach_every_parameter(model):
    tokens, pixels = sequence(2, 40, 11)
    model.zero_grad()
    model(input_ids=tokens[None], pixel_values=pixels, labels=tokens[None]).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all scores of a softmax alike: its gradient is zero but for rounding.
    assert [name for name in missing if "k_proj.bias" not in name and "experts" not in name] == []
    model.zero_grad()


@pytest.mark.parametrize("difference", ["token too few", "token too many", "image too few", "no image"])
def test_image_tokens_must_agree_with_images(exported, difference):
    model = AutoModelForImageTextToText.from_pretrained(exported("qwen3"))
    tokens, pixels = sequence(2, 4, 12)
    if difference == "token too few":
        tokens = tokens[tokens.tolist().index(IMAGE) + 1 :]
    elif difference == "token too many":
        tokens = torch.cat([tokens, torch.tensor([IMAGE])])
    else:
        pixels = pixels[:1] if difference == "image too few" else None
    with pytest.raises(UserError) as caught:
        model(input_ids=tokens[None], pixel_values=pixels)
    if pixels is not None:
        found = f"{int((tokens == IMAGE).sum())} image tokens and {len(pixels)} images of 9 tokens"
        assert found in str(caught.value)
    else:
        assert "without images" in str(caught.value)


def test_embeddings_instead_of_ids(exported):
    model = AutoModelForImageTextToText.from_pretrained(exported("qwen3")).eval()
    tokens, pixels = sequence(1, 4, 13)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens[None])
        by_embedding = model(inputs_embeds=embedded, pixel_values=pixels).logits
        assert torch.equal(by_embedding, model(input_ids=tokens[None], pixel_values=pixels).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=tokens[None], inputs_embeds=embedded, pixel_values=pixels)


def test_model_from_a_bare_configuration(exported):
    """Its weights are drawn as CAbstractor and the library say; the connector's are not overwritten."""
    config = MegatronMMConfig.from_pretrained(exported("qwen3"))
    model = MegatronMMForConditionalGeneration(config)
    connector = model.model.connector
    depthwise = connector.stage2[0].conv2.weight
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.25)
    assert connector.fc2.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert config.connector == ConnectorConfig(num_tokens=9, hidden_size=16, depth=2)


def test_processor_and_model_together(exported):
    """What the README shows: two prompts, three pictures, words out."""
    folder = exported("qwen3 gqa")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    pictures = [torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8) for _ in range(3)]
    prompts = ["<image> Question: what color? Short answer:", "<image> and <image>"]
    inputs = processor(images=pictures, text=prompts, return_tensors="pt", padding=True)
    answers = processor.batch_decode(
        model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :],
        skip_special_tokens=True,
    )
    assert len(answers) == 2
    assert all(answers)
