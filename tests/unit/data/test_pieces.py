"""Pieces tile documents and are cut where a walk token by token would; the split is by document number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.pieces import Limits, cut, documents_of, windows
from tests.unit.data.documents import Placed, documents, limits_


@settings(max_examples=100)
@given(
    docs=documents(),
    limits=limits_,
    size=st.integers(1, 40),
    block=st.integers(1, 12),
    fraction=st.sampled_from([0, 0.3]),
)
def test_windows_are_the_same_pieces_whatever_is_read_at_once(docs, limits, size, block, fraction):
    source = Placed(docs)
    whole = [
        tuple(row) for pieces, _ in windows(source, "train", fraction, limits, 10**6) for row in pieces.rows.tolist()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_mm.data.pieces.BLOCK", block)
        parts = list(windows(source, "train", fraction, limits, size))
    assert [tuple(row) for pieces, _ in parts for row in pieces.rows.tolist()] == whole
    assert all(len(pieces) == size for pieces, _ in parts[:-1])
    assert all(0 < read <= len(docs) for _, read in parts)
    expected = [
        (d, start, end)
        for d in documents_of("train", range(len(docs)), fraction).tolist()
        for start, end in naive_pieces(*docs[d], limits)
    ]
    assert whole == expected


def naive_pieces(n: int, places: list[int], limits: Limits) -> list[tuple[int, int]]:
    if n - 1 + len(places) * (limits.tokens_per_image - 1) <= limits.positions and len(places) <= limits.images:
        return [(0, n - 1)]
    return naive_cut(n, places, limits)


def naive_cut(n: int, places: list[int], limits: Limits) -> list[tuple[int, int]]:
    """Token by token: as far as both limits allow, then back over pictures that would part from their text."""
    pieces, start = [], 0
    while start < n - 1:
        end, positions, pictures = start, 0, 0
        while end < n - 1:
            is_image = end in places
            positions += limits.tokens_per_image if is_image else 1
            pictures += is_image
            if positions > limits.positions or pictures > limits.images:
                break
            end += 1
        back = end
        while end < n - 1 and back > start and back - 1 in places:
            back -= 1
        end = back if back > start + 1 else end
        pieces.append((start, end))
        start = end
    return pieces


@settings(max_examples=400)
@given(documents(), limits_)
def test_cuts_are_the_naive_ones(docs, limits):
    for n, places in docs:
        assert cut(n, places, limits) == naive_cut(n, places, limits)


def test_split_by_document_number():
    train, held_out = (documents_of(split, range(20_000), 0.05) for split in ("train", "validation"))
    assert sorted([*train, *held_out]) == list(range(20_000))
    assert abs(len(held_out) - 1000) < 100
    parts = [documents_of("validation", range(i, i + 6000), 0.05) for i in range(0, 30_000, 6000)]
    longer = np.concatenate(parts)
    assert longer[longer < 20_000].tolist() == held_out.tolist()
    assert documents_of("validation", range(100), 0.0).size == 0
