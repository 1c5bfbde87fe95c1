"""A merged source is the one that a single writer would have made of all documents, or none."""

import json
import tempfile
import zlib
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data import source_merge
from megatron_mm.data.ingest.images import StoredImage
from megatron_mm.data.source import Source, SourceWriter, verify_source
from megatron_mm.data.source_blocks import Block, thin
from megatron_mm.data.source_files import META
from megatron_mm.data.source_merge import SourceStream, merge_sources
from megatron_mm.errors import UserError


def stored(number: int) -> StoredImage:
    """Bytes of no picture: a merge does not decode."""
    data = bytes([number]) * number
    return StoredImage(data, 10 + number, 20, 1, 1, 0, zlib.crc32(data), number)


Document = tuple[list[int], list[StoredImage], list[tuple[int, int]] | None]


@st.composite
def documents(draw: st.DrawFn) -> Document:
    inner = draw(st.lists(st.sampled_from([4, 7, 8, 300]), max_size=6))
    ids = [2, *inner, 3]
    images = [stored(draw(st.integers(1, 9))) for _ in range(inner.count(4))]
    if draw(st.booleans()):
        return ids, images, None
    # Ranges as ingest writes them: apart, and never of pictures alone.
    trained = [i for i, token in enumerate(ids) if i and token != 4 and draw(st.booleans())] or [len(ids) - 1]
    ranges: list[tuple[int, int]] = []
    for i in trained:
        ranges = [*ranges[:-1], (ranges[-1][0], i + 1)] if ranges and ranges[-1][1] == i else [*ranges, (i, i + 1)]
    return ids, images, ranges


def write(prefix: Path, tokenizer, content: list[Document], kind: str = "conversation") -> Path:
    with SourceWriter(prefix, kind, tokenizer) as writer:
        for document in content:
            writer.add(*document)
        writer.finish({})
    return prefix


def files(prefix: Path) -> dict[str, bytes]:
    """All but the manifest."""
    found = {p.name.removeprefix(prefix.name): p.read_bytes() for p in prefix.parent.glob(f"{prefix.name}.*")}
    return {name: data for name, data in found.items() if not name.endswith(".json")}


@settings(max_examples=25)
@given(
    shares=st.lists(st.lists(documents(), min_size=1, max_size=6), min_size=1, max_size=4),
    at_once=st.sampled_from([1, 3, 1 << 16]),
    size=st.sampled_from([1, 30, 1 << 25]),
)
def test_the_merged_source_is_that_of_one_writer(tokenizer, shares, at_once, size):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_merge, "_DOCUMENTS", at_once)
        patch.setattr(source_merge, "_BYTES", size)
        folder = Path(name)
        whole = write(folder / "whole", tokenizer, [document for share in shares for document in share])
        parts = [write(folder / f"part{i}", tokenizer, share) for i, share in enumerate(shares)]
        done: list[tuple[int, int]] = []
        merge_sources(parts, folder / "merged", progress=lambda *now: done.append(now))
        assert files(folder / "merged") == files(whole)
        verify_source(folder / "merged")
        assert done[-1][0] == done[-1][1]
        if len(parts) > 2:
            merge_sources(parts[:2], folder / "first")
            merge_sources([folder / "first", *parts[2:]], folder / "again")
            assert files(folder / "again") == files(whole)


def one_block(prefix: Path) -> Block:
    (block,) = SourceStream(prefix).blocks()
    return block


@settings(max_examples=40)
@given(content=st.lists(documents(), min_size=1, max_size=6), choice=st.randoms(use_true_random=False))
def test_thinned_documents_are_those_that_never_had_the_pictures(tokenizer, content, choice):
    keep_documents = [choice.random() < 0.7 for _ in content]
    keep_images = [[choice.random() < 0.6 for _ in images] for _, images, _ in content]
    expected: list[Document] = []
    for (ids, images, loss), stays, keeps in zip(content, keep_documents, keep_images, strict=True):
        if not stays:
            continue
        places = iter(keeps)
        kept = [token != 4 or next(places) for token in ids]
        trained = [any(a <= i < b for a, b in loss or [(1, len(ids))]) for i in range(len(ids))]
        left = [t for t, k in zip(trained, kept, strict=True) if k]
        edges = np.flatnonzero(np.diff([0, *left, 0])).reshape(-1, 2).tolist()
        expected.append(
            (
                [token for token, k in zip(ids, kept, strict=True) if k],
                [image for image, k in zip(images, keeps, strict=True) if k],
                None if loss is None else [tuple(edge) for edge in edges],
            )
        )
    with tempfile.TemporaryDirectory() as name:
        block = one_block(write(Path(name) / "x", tokenizer, content))
        block = thin(block, np.array(list(chain.from_iterable(keep_images)), dtype=bool), np.array(keep_documents))
        block.check()
        if not expected:
            assert len(block.lengths) == 0
            return
        has_loss = any(loss is not None for _, _, loss in content)
        whole = [(ids, images, loss or [(1, len(ids))]) for ids, images, loss in expected] if has_loss else expected
        with SourceWriter(Path(name) / "thin", "conversation", tokenizer) as writer:
            writer.add_block(block)
            writer.finish({})
        assert files(Path(name) / "thin") == files(write(Path(name) / "y", tokenizer, whole))


def test_blocks_that_do_not_add_up_are_refused(tmp_path, tokenizer):
    block = Block(np.array([2, 7, 3], "<u2"), np.array([3], "<i4"), np.array([0]), np.zeros(0, META), [])
    wrong = [
        replace(block, lengths=np.array([4], "<i4")),
        replace(block, tokens=block.tokens.astype("<i4")),
        replace(block, image_counts=np.array([1])),
        replace(block, pictures=[b"x"]),
        replace(block, loss=np.array([[1, 3]], "<i4")),
    ]
    with SourceWriter(tmp_path / "x", "text", tokenizer) as writer:
        for one in wrong:
            with pytest.raises(ValueError, match="tokens"):
                writer.add_block(one)
        writer.add_block(block)
        writer.finish({})
    assert verify_source(tmp_path / "x").text(0).tolist() == [2, 7, 3]


def test_sources_that_do_not_fit(tmp_path, tokenizer):
    write(tmp_path / "a", tokenizer, [([2, 7, 3], [], None)], "text")
    write(tmp_path / "b", tokenizer, [([2, 7, 3], [], None)], "interleaved")
    with pytest.raises(UserError, match=r"b: .*not the same kind"):
        merge_sources([tmp_path / "a", tmp_path / "b"], tmp_path / "x")
    path = write(tmp_path / "c", tokenizer, [([2, 7, 3], [], None)], "text").with_name("c.manifest.json")
    manifest = json.loads(path.read_text())
    for change, told in (
        ({"tokenizer": manifest["tokenizer"] | {"sha256": "0" * 64}}, "tokenizer's sha256"),
        ({"ids": manifest["ids"] | {"image": 5}}, "image id"),
        ({"tokenizer": manifest["tokenizer"] | {"vocab_size": 321}}, "vocabulary size"),
        ({"dtype": "int32"}, "text.idx"),
        ({"documents": 2}, "text.idx"),
        ({"files": {}}, "manifest is damaged"),
    ):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=told):
            merge_sources([tmp_path / "a", tmp_path / "c"], tmp_path / "x")
    for missing, told in (([], "no source to merge"), ([tmp_path / "none"], "no such source"), (["s3://a/b"], "local")):
        with pytest.raises(UserError, match=told):
            merge_sources(missing, tmp_path / "x")
    assert list(tmp_path.glob("x*")) == []


@pytest.mark.parametrize("part", ["text.bin", "text.idx", "image.bin", "image.idx", "meta.npy", "loss.bin", "loss.idx"])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_damaged_source_is_not_merged(tmp_path, tokenizer, part, place):
    """Else the result would verify. An older source of that name stays."""
    content: list[Document] = [([2, 4, 7, 4, 3], [stored(3), stored(5)], [(2, 3), (4, 5)])] * 3
    for name in ("a", "b"):
        write(tmp_path / name, tokenizer, content)
    older = files(write(tmp_path / "x", tokenizer, content[:1]))
    path = tmp_path / f"b.{part}"
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x04
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"b.{part}: the file's contents have changed"):
        merge_sources([tmp_path / "a", tmp_path / "b"], tmp_path / "x")
    assert files(tmp_path / "x") == older
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"b.{part}"):
        merge_sources([tmp_path / "a", tmp_path / "b"], tmp_path / "x")


def test_into_one_of_them(tmp_path, tokenizer):
    content: list[Document] = [([2, 7, 8, 3], [], None)]
    write(tmp_path / "a", tokenizer, content)
    merge_sources([tmp_path / "a", tmp_path / "a"], tmp_path / "a")
    source = verify_source(tmp_path / "a")
    assert len(source) == 2
    assert [m["documents"] for m in source.manifest["made"]["merged"]] == [1, 1]


def test_pictures_are_found_in_the_merged_source(tmp_path, sources):
    merge_sources([sources / "pages", sources / "pages"], tmp_path / "x")
    whole, half = verify_source(tmp_path / "x"), Source(sources / "pages")
    assert len(whole) == 2 * len(half)
    for d in (1, 57):
        assert whole.image_bytes(len(half) + d) == half.image_bytes(d)
