"""Assembly against a token-by-token oracle; dealing and sharing."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.batch import assemble, back_and_forth, deal, share_of
from megatron_mm.data.ingest.images import store
from megatron_mm.data.packing import PackedSource, Piece
from megatron_mm.data.source import Source, SourceWriter, verify_source
from tests.unit.data.documents import LAYOUT


def naive(source, pieces, layout, block_attention):
    """Rows of (token, label, mask, document, position), and pictures in order."""
    rows, pictures = [], []
    for number, (document, start, end) in enumerate(pieces):
        text = source.text(document).tolist()
        position = 0
        for at in range(start, end):
            token, label = text[at], text[at + 1]
            is_image = token == layout.image_token_id
            if is_image:
                pictures.append((document, text[:at].count(layout.image_token_id)))
            for k in range(layout.tokens_per_image if is_image else 1):
                inside = is_image and k < layout.tokens_per_image - 1
                target = layout.image_token_id if inside else label
                place = position if block_attention else len(rows)
                rows.append((token, target, float(target != layout.image_token_id), number * block_attention, place))
                position += 1
    rows += [(layout.pad_token_id, layout.pad_token_id, 0.0, -1, 0)] * (layout.seq_length - len(rows))
    return [list(column) for column in zip(*rows, strict=True)], pictures


@pytest.mark.parametrize("name", ["captions", "pages", "words"])
@pytest.mark.parametrize("block_attention", [True, False])
@pytest.mark.parametrize("layout", [LAYOUT, replace(LAYOUT, seq_length=33, tokens_per_image=9, max_images=2)])
def test_every_sequence_is_the_naive_one(sources, tmp_path, name, block_attention, layout):
    source = Source(sources / name)
    packed = PackedSource.open(source, "train", layout, 0.1, tmp_path)
    targets = 0
    for i in range(len(packed)):
        out = assemble(source, packed.pieces(i), layout, block_attention)
        columns, pictures = naive(source, packed.pieces(i), layout, block_attention)
        got = [out.tokens, out.labels, out.loss_mask, out.documents, out.position_ids]
        assert [column.tolist() for column in got] == columns
        assert [tuple(ref) for ref in out.images] == pictures
        assert len(pictures) == packed.image_count(i)
        assert (out.tokens == layout.image_token_id).sum() == len(pictures) * layout.tokens_per_image
        targets += int(out.loss_mask.sum())
    # Each text token of the split, eos among them, is a target exactly once (bos never is).
    documents = {piece.document for i in range(len(packed)) for piece in packed.pieces(i)}
    assert targets == sum(int((source.text(d)[1:] != layout.image_token_id).sum()) for d in documents)


def test_untrained_tokens_carry_no_loss(tmp_path, tokenizer, images):
    """Wherever a document is cut: a label has loss when its token is text inside the ranges."""
    rng, picture = np.random.default_rng(0), store((images / "0.jpg").read_bytes(), 10**6)
    documents = []
    with SourceWriter(tmp_path / "x", "conversation", tokenizer) as writer:
        for _ in range(40):
            ids = [2, *rng.choice([4, 7, 8, 9], rng.integers(1, 30)).tolist(), 3]
            edges = sorted(rng.integers(1, len(ids) + 1, 2 * rng.integers(1, 4)).tolist())
            ranges = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b] or [(1, 2)]
            documents.append((ids, [any(a <= i < b for a, b in ranges) for i in range(len(ids))]))
            writer.add(ids, [picture] * ids.count(4), ranges)
        writer.finish({})
    source = verify_source(tmp_path / "x")
    for d, (ids, trained) in enumerate(documents):
        cut = int(rng.integers(0, len(ids) - 1))
        pieces = [Piece(d, cut, len(ids) - 1)] + ([Piece(d, 0, cut)] if cut else [])
        out = assemble(source, pieces, replace(LAYOUT, seq_length=200, max_images=99), True)
        columns, _ = naive(source, pieces, replace(LAYOUT, seq_length=200, max_images=99), True)
        wanted = []
        for _, start, end in pieces:
            for at in range(start, end):
                inside = LAYOUT.tokens_per_image - 1 if ids[at] == LAYOUT.image_token_id else 0
                wanted += [0.0] * inside + [float(trained[at + 1] and ids[at + 1] != LAYOUT.image_token_id)]
        assert out.labels.tolist() == columns[1]
        assert out.loss_mask.tolist() == wanted + [0.0] * (200 - len(wanted))


def test_what_does_not_fit_is_an_error_of_ours(sources):
    source = Source(sources / "words")
    long = int(np.argmax(source.lengths))
    with pytest.raises(ValueError, match="positions in a sequence of 64"):
        assemble(source, [Piece(long, 0, 65)], LAYOUT, True)


def test_no_piece_is_padding(sources):
    out = assemble(Source(sources / "words"), [], LAYOUT, True)
    assert set(out.documents.tolist()) == {-1}
    assert not out.loss_mask.any()


@settings(max_examples=200)
@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_deal_is_a_partition_into_equal_bins(bins, room, data):
    counts = np.array(data.draw(st.lists(st.integers(0, 16), min_size=bins * room, max_size=bins * room)))
    dealt = deal(counts, bins)
    assert dealt.shape == (bins, room)
    assert sorted(dealt.ravel()) == list(range(bins * room))
    assert all(row.tolist() == sorted(row) for row in dealt)
    totals = counts[dealt].sum(axis=1)
    assert totals.tolist() == sorted(totals, reverse=True)
    # As even as whole samples allow.
    assert totals[0] - totals[-1] <= counts.max()


def test_deal_evens_out():
    counts = np.random.default_rng(0).integers(0, 17, 512)
    in_order = counts.reshape(128, 4).sum(axis=1)
    dealt = counts[deal(counts, 128)].sum(axis=1)
    assert in_order.max() - in_order.min() > 20
    assert dealt.max() - dealt.min() <= 2
    with pytest.raises(ValueError, match="do not divide"):
        deal(counts, 100)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_back_and_forth(rounds, ranks, room):
    bins = np.arange(rounds * ranks * room).reshape(-1, room)
    given = back_and_forth(bins, ranks)
    assert given.shape == (rounds, ranks, room)
    for number in range(rounds):
        in_turn = bins[number * ranks : (number + 1) * ranks].tolist()
        assert given[number].tolist() == (in_turn[::-1] if number % 2 else in_turn)


def test_back_and_forth_evens_out_whole_batches():
    """Counts that fall evenly: two turns give every rank the same."""
    bins = np.arange(64, 0, -1)[:, None]
    assert set(back_and_forth(bins, 8).sum(axis=(0, 2)).tolist()) == {260}
    assert np.ptp(bins.reshape(-1, 8).sum(axis=0)) == 56


@pytest.mark.parametrize("images", range(12))
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_shares_cover_each_picture_once(images, size):
    shares = [list(range(images))[share_of(images, rank, size)] for rank in range(size)]
    assert list(itertools.chain.from_iterable(shares)) == list(range(images))
    assert all(len(share) <= max(1, -(-images // size)) for share in shares)
