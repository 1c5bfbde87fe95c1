"""A bad picture is a gray square, a count and a log line; too many are an error."""

import logging
import zlib

import pytest
import torch

from megatron_mm.data.decode import Decoder
from megatron_mm.errors import UserError
from tests.unit.data.test_images import huge_png

MEAN = (0.5, 0.25, 1.0)


def decoder(rate=1.0, max_pixels=10_000):
    return Decoder(16, max_pixels, MEAN, rate)


def is_stand_in(image):
    return image.flatten(1).tolist() == [[128] * 256, [64] * 256, [255] * 256]


@pytest.mark.parametrize("name", ["0.jpg", "1.png", "2.webp"])
def test_good_ones(images, name):
    data = (images / name).read_bytes()
    d = decoder()
    for given in (data, memoryview(data)):
        image = d(given, zlib.crc32(data))
        assert (image.shape, image.dtype) == ((3, 16, 16), torch.uint8)
        assert not is_stand_in(image)
    assert (d.images, d.bad) == (2, 0)


def test_bad_ones(images, caplog):
    data = (images / "0.jpg").read_bytes()
    flipped = data[:300] + bytes([data[300] ^ 1]) + data[301:]
    d = decoder()
    cases = [(b"", None), (b"hello", None), (data[:100], None), (flipped, zlib.crc32(data)), (huge_png(9000), None)]
    with caplog.at_level(logging.WARNING):
        for i, (bad, crc) in enumerate(cases):
            assert is_stand_in(d(bad, crc, f"sample {i}"))
    assert (d.images, d.bad) == (5, 5)
    assert [f"sample {i}" in line for i, line in enumerate(caplog.messages)] == [True] * 5
    assert "changed since ingest" in caplog.messages[3]
    assert "too large: 9000×9000" in caplog.messages[4]


def test_rate(images):
    data = (images / "1.png").read_bytes()
    d = decoder(rate=0.02)
    for i in range(97):
        d(b"" if i < 2 else data)
    d(b"")  # the 98th: 3 bad are more than 2%, but fewer than 100 were seen
    d(data)
    with pytest.raises(UserError, match=r"data.max_bad_image_rate: .*\n.*4 of 100; the last: sample 7"):
        d(b"", None, "sample 7")
    allowed = decoder(rate=0.02)
    for i in range(300):
        allowed(b"" if i % 50 == 49 else data)
    assert allowed.bad == 6
