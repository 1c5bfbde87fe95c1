"""Text and pictures reach the exported model as training saw them."""

import io
import random

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from megatron_mm.data.decode import CpuBackend, Decoder, EncodedImage, decode_image
from megatron_mm.data.tokenizer import open_tokenizer
from megatron_mm.errors import UserError
from megatron_mm.hf import MegatronMMImageProcessor, MegatronMMProcessor, MegatronMMTokenizer

ALPHABETS = [
    "abcdefgh ij  klm\n",
    " \t\n\r  \u00a0\u2003\u200b\u3000\ufeff",
    "<>/s image|[]{}<0x0A>▁",
    "äöüßéñçøå αβγδ жзийк ",
    "日本語漢字かなカナ한국어",
    "\u0301\u0308\ufb01½²①Ω\u212b",  # combining marks, compatibility forms
    "😀👩‍👩‍👧🏽🇩🇪",
    "".join(map(chr, range(0x01, 0x20))) + "\x7f\x85\ue000\U0010ffff\U000e0001",
]
FIXED = [
    "", " ", "  ", "\n", "\n\n", "a\nb", "a  b", " leading", "trailing ", "tab\tcr\r\n", "<s>", "</s>",
    "<pad>", "<unk>", "<0x41>", "▁", "▁▁ x", "</s> Question: what color is shown? Short answer: yes\n",
    "e\u0301 é", "ﬁ ½", "\u0000",
]  # fmt: skip


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    texts = list(FIXED)
    for _ in range(count):
        alphabet = "".join(rng.sample(ALPHABETS, rng.randint(1, 3)))
        texts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60))))
        texts.append(
            "".join(chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(9))
        )
    return texts


@pytest.fixture(scope="module")
def pair(tokenizer_file, tmp_path_factory):
    """The tokenizer of training, and the exported one as it comes back from disk."""
    saved = tmp_path_factory.mktemp("saved")
    MegatronMMTokenizer(str(tokenizer_file)).save_pretrained(saved)
    return open_tokenizer(tokenizer_file), MegatronMMTokenizer.from_pretrained(saved)


def test_ids_are_those_of_training_on_any_text(pair):
    trained, exported = pair
    sp = sentencepiece.SentencePieceProcessor(model_file=trained.path)
    for text in random_texts(1500):
        if "<image>" in text:
            continue
        wanted = trained.encode(text)
        assert exported(text)["input_ids"] == [trained.bos_id, *wanted], repr(text)
        assert exported(text, add_special_tokens=False)["input_ids"] == wanted
        assert exported.decode(wanted) == text
        assert exported.decode([trained.bos_id, *wanted, trained.eos_id], skip_special_tokens=True) == text
        if "▁" not in text:  # a letter that SentencePiece itself would turn into a space
            assert sp.encode(text) == wanted


def test_image_token_in_text(pair):
    trained, exported = pair
    for left, right in zip(random_texts(100, 1), random_texts(100, 2), strict=True):
        ids = exported(f"{left}<image>{right}<image>")["input_ids"]
        wanted = [*trained.encode(left), trained.image_id, *trained.encode(right), trained.image_id]
        assert ids == [trained.bos_id, *wanted], repr((left, right))
        assert exported.decode(ids) == f"<s>{left}<image>{right}<image>"
    plain = exported("a<image>b", split_special_tokens=True)["input_ids"]
    assert plain == [trained.bos_id, *trained.encode("a<image>b")]
    assert trained.image_id not in plain


def test_ids_past_the_tokenizer_have_no_text(pair):
    trained, exported = pair
    assert exported.decode([*trained.encode(" blue"), trained.vocab_size + 3]) == " blue"


def test_batches_are_padded_on_the_left(pair):
    trained, exported = pair
    batch = exported([" red", " red blue"], padding=True, return_tensors="pt")
    red = trained.encode(" red")
    padding = batch["input_ids"].shape[1] - len(red) - 1
    assert padding > 0
    assert batch["attention_mask"][0].tolist() == [0] * padding + [1] * (len(red) + 1)
    assert batch["input_ids"][0].tolist() == [trained.pad_id] * padding + [trained.bos_id, *red]


def test_tokenizer_without_image_token(tmp_path):
    (tmp_path / "text.txt").write_text("some words for it\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "plain"), vocab_size=280, byte_fallback=True,
        hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=2, eos_id=3, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="has no <image> id"):
        MegatronMMTokenizer(str(tmp_path / "plain.model"))
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        MegatronMMTokenizer(str(tmp_path / "broken.model"))


@pytest.fixture(scope="module")
def processor(exported):
    return AutoProcessor.from_pretrained(exported("qwen3"))


def test_auto_classes(exported):
    assert isinstance(AutoProcessor.from_pretrained(exported("qwen3")), MegatronMMProcessor)
    assert isinstance(AutoTokenizer.from_pretrained(exported("qwen3")), MegatronMMTokenizer)


def test_prompt_is_expanded(processor):
    trained = processor.tokenizer.trained
    pictures = [torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8) for _ in range(3)]
    texts = ["<image> Question: a?", "x<image><image>"]
    batch = processor(images=pictures, text=texts)
    image = [trained.image_id] * 9
    assert batch["input_ids"] == [
        [trained.bos_id, *image, *trained.encode(" Question: a?")],
        [trained.bos_id, *trained.encode("x"), *image, *image],
    ]
    assert texts == ["<image> Question: a?", "x<image><image>"]
    assert processor(text="no picture")["input_ids"] == [[trained.bos_id, *trained.encode("no picture")]]


@pytest.mark.parametrize(("text", "count"), [("<image> a", 0), ("<image> a", 2), ("a", 1), (["<image>", "<image>"], 1)])
def test_prompts_and_images_must_agree(processor, text, count):
    pictures = [torch.zeros(3, 28, 28, dtype=torch.uint8)] * count or None
    placeholders = "".join(text).count("<image>")
    with pytest.raises(UserError, match="prompts and images disagree") as caught:
        processor(images=pictures, text=text)
    assert f"{placeholders} <image> in the text and {count} images" in str(caught.value)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colour with noise and a sharp edge."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 255 / width, y * 255 / height, np.where(x > width / 2, 255, 0)], -1)
    return Image.fromarray((base * 0.8 + rng.uniform(0, 50, base.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (28, 28), (200, 31), (9, 120), (28, 29), (1, 1)])
def test_pixels_follow_the_training_rule(processor, width, height):
    image = picture(width, height)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(pixels[None], size=(28, 28), mode="bicubic", antialias=True)
    assert torch.equal(processor.image_processor.resized([image]), resized)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    found = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (resized / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_forms_of_an_image(processor):
    """PIL, arrays and tensors, either channel order; EXIF turns a picture."""
    image = picture(40, 20)
    array = np.asarray(image)
    wanted = processor.image_processor.resized([image])
    for form in (array, torch.from_numpy(array.copy()), array.transpose(2, 0, 1)):
        assert torch.equal(processor.image_processor.resized([form]), wanted)
    grey = image.convert("L")
    assert torch.equal(
        processor.image_processor.resized([grey]), processor.image_processor.resized([grey.convert("RGB")])
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    turned = processor.image_processor.resized([Image.open(file)])
    assert torch.equal(turned, processor.image_processor.resized([image.rotate(-90, expand=True)]))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "palette with transparency", "turned"])
def test_files_by_pillow_and_by_the_training_decoder(processor, mode):
    image, options = picture(40, 24), {}
    if mode == "RGBA":
        image.putalpha(image.convert("L"))
    elif mode == "palette with transparency":
        image, options = image.quantize(16), {"transparency": 3}
    elif mode == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 8
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    trained = Decoder(CpuBackend(10_000), 28)([EncodedImage(file.getvalue())])[0]
    assert torch.equal(processor.image_processor.resized([Image.open(file)])[0], trained)
    assert torch.equal(processor.image_processor.resized([decode_image(file.getvalue())])[0], trained)


def test_jpeg_files(processor):
    """Pillow's JPEG decoder may differ a little from training's; through `decode_image` nothing does."""
    file = io.BytesIO()
    picture(50, 40).save(file, "JPEG", quality=90)
    trained = Decoder(CpuBackend(10_000), 28)([EncodedImage(file.getvalue())])[0]
    assert torch.equal(processor.image_processor.resized([decode_image(file.getvalue())])[0], trained)
    by_pillow = processor.image_processor.resized([Image.open(file)])[0]
    assert (by_pillow.int() - trained.int()).abs().max() <= 3


def test_not_an_image(processor):
    deep = Image.fromarray(np.zeros((8, 8), np.uint16))
    for wrong in (np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8), deep):
        with pytest.raises(UserError, match="not an image of 8 bits"):
            processor.image_processor([wrong])


def test_processor_keeps_its_settings(tokenizer_file, tmp_path):
    images = MegatronMMImageProcessor(56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    MegatronMMProcessor(images, MegatronMMTokenizer(str(tokenizer_file)), tokens_per_image=16).save_pretrained(tmp_path)
    loaded = MegatronMMProcessor.from_pretrained(tmp_path)
    assert loaded.tokens_per_image == 16
    assert loaded.image_processor.image_size == 56
    assert loaded.image_processor.image_mean == [0.1, 0.2, 0.3]
    assert loaded.image_processor.image_std == [0.4, 0.5, 0.6]
