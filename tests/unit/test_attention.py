"""The two ways to keep attention inside documents say the same; an encoder's images end to end in a row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.model.attention import attention_mask, document_starts, image_starts

ROWS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=100)
@given(ROWS, st.integers(0, 3), st.booleans())
def test_borders_and_mask_agree(rows: list[list[int]], padding: int, blocks: bool) -> None:
    """Document numbers start anew in each row, so the last of one row and the first of the next may be the same."""
    s = max(sum(lengths) for lengths in rows) + padding
    documents = torch.full((len(rows), s), -1, dtype=torch.int32)
    for row, lengths in zip(documents, rows, strict=True):
        at = 0
        for number, length in enumerate(lengths):
            row[at : at + length] = number if blocks else 0
            at += length
    starts = document_starts(documents)
    assert starts.dtype == torch.int32
    assert (starts[0], starts[-1]) == (0, documents.numel())
    numbers = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    flat = attention_mask(numbers.unsqueeze(0))[0, 0]
    assert (starts.diff() > 0).all()
    for row, mask in enumerate(attention_mask(documents)):
        inside = slice(row * s, (row + 1) * s)
        assert torch.equal(flat[inside, inside], mask[0])
        assert flat[inside, : inside.start].all()


@given(st.integers(1, 40), st.integers(1, 800), st.sampled_from([1, 16, 32, 128]))
def test_images_fill_whole_tiles(images: int, positions: int, tile: int) -> None:
    starts = image_starts(images, positions, tile, torch.device("cpu"))
    assert starts.dtype == torch.int32
    assert starts[-1] % tile == 0
    lengths = starts.diff().tolist()
    assert lengths[:images] == [positions] * images
    padding = lengths[images:]
    assert len(padding) == (images * positions % tile > 0)
    assert all(0 < length < tile for length in padding)
