"""DALI on a GPU: the pixels of the CPU's decoders, a bad picture's neighbours, the loader. `make test-gpu`.

Not yet run on a GPU (docs/status.md). All but the device itself is tested on a CPU in tests/unit/data.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_mm.data.decode import DaliBackend, Decoder, EncodedImage
from megatron_mm.data.decode.device import DeviceDecoder, left_to_device
from megatron_mm.data.loader import TrainingData
from tests.unit.data.conftest import images, run_config, sources, tokenizer  # noqa: F401 - fixtures
from tests.unit.data.test_decode_parity import FORMS, LIMITS, encode, photo, pillow
from tests.unit.data.test_loader import same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none here")
ALL = (0, 1)


def device_decoder(size: int) -> DeviceDecoder:
    return DeviceDecoder(Decoder(DaliBackend(10**8, torch.device("cuda", torch.cuda.current_device())), size))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_as_pillow(form) -> None:  # type: ignore[no-untyped-def]
    """Whatever the form: what the GPU does not decode, DALI's CPU decoders do, then the GPU resizes."""
    encoded = [encode(photo(seed, 200 + 31 * seed, 400 - 17 * seed), *form) for seed in range(16)]
    decoder = device_decoder(224)
    nothing = torch.empty((0, 3, 224, 224), dtype=torch.uint8)
    at_most, on_average = LIMITS["dali"]
    for n in (0, 1, 5, 16):
        out = decoder(range(n), [EncodedImage(data) for data in encoded[:n]], nothing)
        assert (out.shape, out.device) == ((n, 3, 224, 224), decoder.device)
        for pixels, data in zip(out.cpu().numpy().astype(int), encoded, strict=False):
            apart = np.abs(pixels - pillow(data, 224))
            assert apart.max() <= at_most
            assert apart.mean() <= on_average


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_bad_one_leaves_its_neighbours_right(place: int) -> None:
    encoded = [encode(photo(seed, 300, 200), *FORMS[2]) for seed in range(8)]
    decoder = device_decoder(112)
    nothing = torch.empty((0, 3, 112, 112), dtype=torch.uint8)
    good = decoder(range(8), [EncodedImage(data) for data in encoded], nothing)
    broken = [*encoded[:place], encoded[place][: len(encoded[place]) // 3], *encoded[place + 1 :]]
    out = decoder(range(8), [EncodedImage(data) for data in broken], nothing)
    again = decoder(range(8), [EncodedImage(data) for data in encoded], nothing)
    assert torch.equal(again, good)
    kept = [i for i in range(8) if i != place]
    assert (out[kept].int() - good[kept].int()).abs().max() <= 1


def test_memory_is_taken_once() -> None:
    """DALI's and torch's: flat once the largest pictures were seen."""
    encoded = [EncodedImage(encode(photo(s, 500, 500), *FORMS[0])) for s in range(16)]
    decoder = device_decoder(224)
    nothing = torch.empty((0, 3, 224, 224), dtype=torch.uint8)

    def free_after(calls: int) -> int:
        for i in range(calls):
            decoder(range(1 + i % 16), encoded[: 1 + i % 16], nothing)
        return torch.cuda.mem_get_info()[0]

    assert abs(free_after(100) - free_after(300)) <= 64 << 20


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(sources, tokenizer, workers) -> None:  # type: ignore[no-untyped-def] # noqa: F811
    """Texts bit by bit, pictures nearly, in the same order, already on the GPU; the rest is page-locked."""
    exact = TrainingData.open(run_config(sources, tokenizer))
    near = TrainingData.open(run_config(sources, tokenizer, num_workers=workers, decode_backend="dali"))
    assert near.device_decoder is not None
    pictures = 0
    for a, b in itertools.islice(
        zip(exact.train_loader(3, 0, 2, ALL), near.train_loader(3, 0, 2, ALL), strict=True), 40
    ):
        assert b.images.is_cuda
        assert b.tokens.is_pinned() or not workers
        assert same(a, replace(b, images=a.images))
        assert (a.images.int() - b.images.cpu().int()).abs().float().mean() <= 2
        pictures += len(a.images)
    assert pictures > 100


def test_some_are_left_to_it(images) -> None:  # type: ignore[no-untyped-def] # noqa: F811
    some = [EncodedImage((images / f"{i}.{('jpg', 'png', 'webp')[i % 3]}").read_bytes()) for i in range(12)]
    assert left_to_device(some, 10**6) == [0, 3, 6, 9]
