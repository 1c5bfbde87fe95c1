"""The one parity test of the backends: decoded and resized as Pillow does, whatever the picture's form."""

import io

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_mm.data.decode import CpuBackend, DaliBackend

LIMITS = {"cpu": (2, 0.3), "dali": (8, 0.3)}  # of 255: at most, and on average over each picture
BACKENDS = {"cpu": CpuBackend, "dali": DaliBackend}
FORMS = [
    ("JPEG", "RGB", {"quality": 90, "subsampling": 0}),
    ("JPEG", "RGB", {"quality": 75, "subsampling": 1}),
    ("JPEG", "RGB", {"quality": 85, "subsampling": 2}),
    ("JPEG", "RGB", {"quality": 95, "subsampling": 2, "progressive": True}),
    ("JPEG", "RGB", {"quality": 90, "keep_rgb": True}),
    ("JPEG", "L", {"quality": 80}),
    ("JPEG", "L", {"quality": 80, "progressive": True}),
    ("PNG", "RGB", {}),
    ("PNG", "L", {}),
    ("PNG", "P", {}),
    ("WEBP", "RGB", {"quality": 80}),
    ("WEBP", "RGB", {"lossless": True}),
]


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Smooth patches of colour under a little noise, as photographs are."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (max(2, height // 20), max(2, width // 20), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8))


def encode(image: Image.Image, name: str, mode: str, options: dict) -> bytes:
    out = io.BytesIO()
    image = image.quantize(256, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)
    image.save(out, format=name, **options)
    return out.getvalue()


def pillow(data: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("name", BACKENDS)
@given(
    pictures=st.lists(
        st.tuples(st.integers(0, 999), st.integers(64, 500), st.floats(1 / 3, 3), st.sampled_from(FORMS)), max_size=5
    ),
    size=st.sampled_from([112, 224, 378]),
)
# A counter-example is told as it was found: making it smaller takes minutes.
@settings(max_examples=20, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_as_pillow(name, pictures, size):
    shapes = [(width, min(500, max(64, round(width * tall)))) for _, width, tall, _ in pictures]
    encoded = [encode(photo(p[0], *shape), *p[3]) for p, shape in zip(pictures, shapes, strict=True)]
    out = torch.empty((len(encoded), 3, size, size), dtype=torch.uint8)
    assert BACKENDS[name](10**6)(dict(enumerate(encoded)), out) == {}
    at_most, on_average = LIMITS[name]
    for data, image, how in zip(encoded, out, pictures, strict=True):
        apart = np.abs(image.numpy().astype(int) - pillow(data, size))
        assert apart.max() <= at_most, how
        assert apart.mean() <= on_average, how


@pytest.mark.parametrize(("name", "at_most"), [("cpu", 6), ("dali", 15)])
def test_sharp_edges_too(name, at_most):
    """What overshoots at an edge is cut off after each direction, as Pillow does."""
    pixels = (np.random.default_rng(0).integers(0, 2, (150, 200)) * 255).astype(np.uint8)
    data = encode(Image.fromarray(pixels), "PNG", "L", {})
    for size in (56, 224):
        out = torch.empty((1, 3, size, size), dtype=torch.uint8)
        BACKENDS[name](10**6)({0: data}, out)
        assert np.abs(out[0].numpy().astype(int) - pillow(data, size)).max() <= at_most
