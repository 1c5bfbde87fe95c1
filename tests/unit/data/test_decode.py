"""A bad picture is a gray square, a count and a log line, whatever decodes; too many are an error."""

import logging
import os
import sys
import zlib

import pytest
import torch
from PIL import Image

from megatron_mm.data.decode import CpuBackend, DaliBackend, Decoder, EncodedImage, check_dali, decode_image, resize
from megatron_mm.data.decode.dali import is_for_gpu
from megatron_mm.data.decode.device import DeviceDecoder, left_to_device
from megatron_mm.errors import UserError
from tests.unit.data.conftest import picture
from tests.unit.data.test_images import encoded, huge_png

MEAN = (0.5, 0.25, 1.0)
BACKENDS = {"cpu": CpuBackend, "dali": DaliBackend}
NAMES = ("0.jpg", "1.png", "2.webp")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


def decoder(backend, rate=1.0, max_pixels=10_000):
    return Decoder(backend(max_pixels), 16, MEAN, rate)


def is_stand_in(image):
    return image.flatten(1).tolist() == [[128] * 256, [64] * 256, [255] * 256]


def is_near(image, data):
    """To the exact backend, nearer than to any other picture; test_decode_parity has the bounds."""
    return (image.int() - resize(decode_image(data), 16).int()).abs().float().mean() <= 2


def test_good_ones(images, backend):
    d = decoder(backend)
    for name in NAMES:
        data = (images / name).read_bytes()
        out = d([EncodedImage(data, zlib.crc32(data)), EncodedImage(memoryview(data))])
        assert (out.shape, out.dtype) == ((2, 3, 16, 16), torch.uint8)
        assert is_near(out[0], data)
        assert torch.equal(out[0], out[1])
    assert (d.images, d.bad) == (6, 0)


def test_any_number_at_once(images, backend):
    """As each alone, into the memory that is given."""
    d = decoder(backend)
    pool = [(images / f"{i}.{('jpg', 'png', 'webp')[i % 3]}").read_bytes() for i in range(12)]
    for n in (0, 1, 2, 3, 5, 16, 70):
        some = [EncodedImage(pool[i % 12]) for i in range(n)]
        out = torch.full((n, 3, 16, 16), 7, dtype=torch.uint8)
        assert d(some, out) is out
        assert all(is_near(image, given.data) for image, given in zip(out, some, strict=True))
        assert torch.equal(out[: n // 2], d(some[: n // 2]))


def test_large_ones_are_not_decoded_together(monkeypatch, backend):
    """DALI keeps the memory of its largest call."""
    monkeypatch.setattr("megatron_mm.data.decode.dali._PIXELS_AT_ONCE", 2000)
    data = encoded(Image.fromarray(picture(3, 30, 40)), "JPEG")  # 1200 pixels
    called = []
    made = backend(10_000)
    if hasattr(made, "_decode"):
        inner = made._decode
        monkeypatch.setattr(made, "_decode", lambda some, size: called.append(len(some)) or inner(some, size))
    out = Decoder(made, 16)([EncodedImage(data)] * 5)
    assert all(is_near(image, data) for image in out)
    assert called in ([], [1] * 5)


BAD = {
    "empty": b"",
    "text": b"hello",
    "html": b"<html><body>404</body></html>",
    "only a header": None,  # of the good JPEG, see below
    "too large": huge_png(9000),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_bad_one_leaves_its_neighbours_right(images, backend, caplog, name, place):
    """Each keeps its own place: the good ones differ, and are what they are alone."""
    good = [(images / f"{i}.jpg").read_bytes() for i in (0, 3, 6, 9)]
    some = [EncodedImage(data, name=f"good {i}") for i, data in enumerate(good)]
    some.insert(place, EncodedImage(BAD[name] if BAD[name] is not None else good[0][:200], name="the bad one"))
    d = decoder(backend)
    with caplog.at_level(logging.WARNING):
        out = d(some)
    assert [is_stand_in(image) for image in out] == [i == place for i in range(5)]
    kept = [i for i in range(5) if i != place]
    assert all(is_near(out[i], data) for i, data in zip(kept, good, strict=True))
    assert len({out[i].numpy().tobytes() for i in kept}) == 4
    assert (d.images, d.bad) == (5, 1)
    assert [line.startswith("the bad one: ") for line in caplog.messages if "stands in" in line] == [True]
    # and what comes after is as if nothing had been
    again = d([EncodedImage(data) for data in good])
    assert torch.equal(again, out[kept])


def test_why_they_are_bad(images, backend, caplog):
    data = (images / "0.jpg").read_bytes()
    flipped = data[:300] + bytes([data[300] ^ 1]) + data[301:]
    cases = [(b"", None), (b"hello", None), (data[:100], None), (flipped, zlib.crc32(data)), (huge_png(9000), None)]
    d = decoder(backend)
    with caplog.at_level(logging.WARNING):
        out = d([EncodedImage(bad, crc, f"sample {i}") for i, (bad, crc) in enumerate(cases)])
    assert all(map(is_stand_in, out))
    assert (d.images, d.bad) == (5, 5)
    lines = [line for line in caplog.messages if "stands in" in line]
    assert [f"sample {i}" in line for i, line in enumerate(lines)] == [True] * 5
    assert "changed since ingest" in lines[3]
    assert "too large: 9000×9000" in lines[4]


def test_rate(images, backend):
    good, bad = EncodedImage((images / "1.png").read_bytes()), EncodedImage(b"")
    d = decoder(backend, rate=0.02)
    d([bad if i < 2 else good for i in range(97)])
    d([bad])  # the 98th: 3 bad are more than 2%, but fewer than 100 were seen
    d([good])
    with pytest.raises(UserError, match=r"data.max_bad_image_rate: .*\n.*4 of 100; the last: sample 7"):
        d([EncodedImage(b"", None, "sample 7")])
    allowed = decoder(backend, rate=0.02)
    allowed([bad if i % 50 == 49 else good for i in range(300)])
    assert allowed.bad == 6


def test_what_dali_does_not_read_is_read_all_the_same(images):
    """By the CPU's decoders, to the very same pixels."""
    image, turned = Image.fromarray(picture(5)), Image.Exif()
    turned[0x0112] = 6
    others = [
        encoded(image, "GIF"),
        encoded(image, "AVIF"),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image.convert("RGBA"), "PNG"),
        encoded(image, "JPEG", exif=turned),
        encoded(image, "WEBP", icc_profile=b"a WebP file of several parts"),
    ]
    out = decoder(DaliBackend)([EncodedImage(data) for data in others])
    assert torch.equal(out, decoder(CpuBackend)([EncodedImage(data) for data in others]))


@pytest.mark.parametrize("hidden", ["nvidia", "nvidia.dali"])
def test_dali_is_not_installed(monkeypatch, hidden):
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(UserError, match=r"data.decode_backend: .*\n.*\n.*megatron-mm\[dali-cu13\]"):
        check_dali()


def test_dali_is_never_forked(images):
    d = decoder(DaliBackend)
    some = [EncodedImage((images / "0.jpg").read_bytes())]
    d(some)
    child = os.fork()
    if not child:
        try:
            d(some)
        except AssertionError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


class TestLeftToADevice:
    """What a GPU decodes, and that both halves of a microbatch come together; here its part is played by a CPU."""

    def some(self, images):
        """Pictures that stay with the worker at 1, 2, 4 and 6."""
        jpegs = [(images / f"{i}.jpg").read_bytes() for i in (0, 3, 6)]
        png, webp = ((images / name).read_bytes() for name in ("1.png", "2.webp"))
        exif = Image.Exif()
        exif[0x0112] = 3
        turned = encoded(Image.fromarray(picture(6)), "JPEG", exif=exif)
        data = [jpegs[0], png, webp, jpegs[1], turned, jpegs[2], b"bad"]
        return [EncodedImage(d, zlib.crc32(d), f"picture {i}") for i, d in enumerate(data)]

    def test_only_plain_whole_jpegs_are(self, images):
        some = self.some(images)
        assert left_to_device(some, 10_000) == [0, 3, 5]
        assert left_to_device(some, 1000) == []
        changed = some[3]._replace(crc32=1)
        assert left_to_device([*some[:3], changed, *some[4:]], 10_000) == [0, 5]
        assert not is_for_gpu(encoded(Image.fromarray(picture(1)), "JPEG", keep_rgb=True), 10_000)
        assert is_for_gpu(encoded(Image.fromarray(picture(1)[..., 0]), "JPEG", progressive=True), 10_000)

    @pytest.mark.parametrize("keep", [range(7), [0, 3, 5], [1, 2], []])
    def test_the_halves_come_together(self, images, keep):
        all_ = self.some(images)
        some = [all_[i] for i in keep]
        left = left_to_device(some, 10_000)
        others = decoder(CpuBackend)([image for i, image in enumerate(some) if i not in left])
        d = DeviceDecoder(decoder(DaliBackend))
        out = d(left, [some[i]._replace(crc32=None) for i in left], others)
        assert out.shape == (len(some), 3, 16, 16)
        for i, (image, pixels) in enumerate(zip(some, out, strict=True)):
            assert is_stand_in(pixels) if image.data == b"bad" else is_near(pixels, image.data), i

    def test_one_that_the_device_fails_on(self, images, caplog):
        good = (images / "0.jpg").read_bytes()
        d = DeviceDecoder(decoder(DaliBackend))
        some = [EncodedImage(good), EncodedImage(good[:250], name="sample 3"), EncodedImage(good)]
        with caplog.at_level(logging.WARNING):
            out = d([0, 1, 2], some, torch.empty((0, 3, 16, 16), dtype=torch.uint8))
        assert [is_stand_in(image) for image in out] == [False, True, False]
        assert is_near(out[2], good)
        assert any(line.startswith("sample 3: ") for line in caplog.messages)
