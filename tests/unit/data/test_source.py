"""The files: what stock Megatron-Core reads, what the writer refuses, what the reader notices."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from megatron_mm.data.ingest.images import store
from megatron_mm.data.source import Source, SourceWriter, verify_source
from megatron_mm.data.source_files import META
from megatron_mm.data.tokenizer import open_tokenizer
from megatron_mm.errors import UserError
from megatron_mm.parallel.backend import import_megatron
from tests.unit.data.test_ingest import ROOT

import_megatron()
from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402


def write(prefix, tokenizer, texts, images=()):
    """A source of documents with `images[d]` pictures before the text."""
    with SourceWriter(prefix, "interleaved", tokenizer) as writer:
        for d, text in enumerate(texts):
            pictures = images[d] if d < len(images) else []
            ids = [tokenizer.bos_id, *[tokenizer.image_id] * len(pictures), *tokenizer.encode(text), tokenizer.eos_id]
            writer.add(ids, pictures)
        return writer.finish({"test": 1})


@pytest.mark.parametrize("mmap", [True, False])
def test_stock_megatron_reads_it_byte_for_byte(tmp_path, images, tokenizer, mmap):
    stored = [store((images / name).read_bytes(), 10**6) for name in ("0.jpg", "1.png", "2.webp")]
    pictures = [[stored[0]], [], stored, [], []]
    write(tmp_path / "x", tokenizer, ["red", "blue", "green", "", "two"], pictures)
    source = Source(tmp_path / "x")
    text = IndexedDataset(str(tmp_path / "x.text"), mmap=mmap)
    image = IndexedDataset(str(tmp_path / "x.image"), multimodal=True, mmap=mmap)
    assert len(text) == len(text.document_indices) - 1 == 5
    assert image.document_indices.tolist() == [0, 1, 1, 4, 4, 4]
    assert image.index.sequence_modes.tolist() == [1, 1, 1, 1]
    for d in range(5):
        np.testing.assert_array_equal(text[d], source.text(d))
        assert text[d].dtype == np.uint16
        owned = range(image.document_indices[d], image.document_indices[d + 1])
        assert [image[i][0].tobytes() for i in owned] == [p.data for p in pictures[d]]
        assert [bytes(b) for b in source.image_bytes(d)] == [p.data for p in pictures[d]]
    assert source.lengths.tolist() == [len(text[d]) for d in range(5)]
    assert source.image_counts.tolist() == [1, 0, 3, 0, 0]
    assert META.itemsize == 28
    row = source.meta(2)[1]
    assert (row["width"], row["height"]) == (stored[1].width, stored[1].height)
    assert (row["offset"], row["crc32"], row["nbytes"]) == (2, zlib.crc32(stored[1].data), len(stored[1].data))
    np.testing.assert_array_equal(np.load(tmp_path / "x.meta.npy", allow_pickle=False), source.all_meta)


def test_loss_ranges_are_kept_and_filled_in(tmp_path, tokenizer):
    """From the first document with ranges on every document has them; stock Megatron-Core reads the pair."""
    with SourceWriter(tmp_path / "x", "conversation", tokenizer) as writer:
        writer.add([2, 7, 8, 3])
        writer.add([2, 7, 8, 9, 3], loss=[(2, 3), (4, 5)])
        writer.add([2, 3])
        writer.finish({})
    source = verify_source(tmp_path / "x")
    assert [source.loss(d).tolist() for d in range(3)] == [[[1, 4]], [[2, 3], [4, 5]], [[1, 2]]]
    stock = IndexedDataset(str(tmp_path / "x.loss"))
    assert [stock[d].tolist() for d in range(3)] == [[1, 4], [2, 3, 4, 5], [1, 2]]
    write(tmp_path / "x", tokenizer, ["red"])
    assert verify_source(tmp_path / "x").loss(0) is None
    assert list(tmp_path.glob("x.loss.*")) == []


@pytest.mark.parametrize("loss", [[], [(0, 2)], [(1, 5)], [(2, 2)], [(2, 4), (1, 2)], [(1, 3), (2, 4)], [(3, 2)]])
def test_writer_refuses_wrong_loss_ranges(tmp_path, tokenizer, loss):
    with SourceWriter(tmp_path / "x", "text", tokenizer) as writer, pytest.raises(ValueError, match="loss ranges"):
        writer.add([2, 7, 8, 3], loss=loss)


def test_large_vocabulary_is_stored_in_32_bits(tmp_path, tokenizer):
    model = sentencepiece_model_pb2.ModelProto.FromString(Path(tokenizer.path).read_bytes())
    for i in range(model.trainer_spec.vocab_size, 70_000):
        model.pieces.add(piece=f"piece{i}", score=-1e6)
    (tmp_path / "large.model").write_bytes(model.SerializeToString())
    with SourceWriter(tmp_path / "x", "text", open_tokenizer(tmp_path / "large.model")) as writer:
        writer.add([2, 69_999, 65_536, 3])
        writer.finish({})
    stock = IndexedDataset(str(tmp_path / "x.text"))  # its arrays die with it
    assert stock[0].tolist() == [2, 69_999, 65_536, 3]
    assert verify_source(tmp_path / "x").text(0).dtype == np.int32


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([2, 320, 3], "token ids from 2 to 320"),
        ([2, 70_000, 3], "token ids"),
        ([2, -1, 3], "token ids from -1"),
        ([2, 5], "bos, tokens, eos"),
        ([5, 3], "bos, tokens, eos"),
        ([2], "bos, tokens, eos"),
        ([2, 3, 3], "inside a document"),
        ([2, 0, 3], "inside a document"),
        ([2, 4, 3], "1 image ids for 0 pictures"),
    ],
)
def test_writer_refuses_wrong_documents(tmp_path, tokenizer, tokens, told):
    with SourceWriter(tmp_path / "x", "text", tokenizer) as writer, pytest.raises(ValueError, match=told):
        writer.add(tokens)
    assert list(tmp_path.iterdir()) == []


def test_abandoned_writer_leaves_nothing_and_keeps_the_older(tmp_path, tokenizer):
    write(tmp_path / "x", tokenizer, ["red"])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with SourceWriter(tmp_path / "x", "text", tokenizer) as writer:
        writer.add([2, 7, 3])
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_killed_writer_leaves_the_older_source_and_is_no_obstacle(tmp_path, tokenizer):
    write(tmp_path / "x", tokenizer, ["red"])
    digest = Source(tmp_path / "x").digest
    script = (
        "import os, signal, sys; from megatron_mm.data.source import SourceWriter;"
        "from megatron_mm.data.tokenizer import open_tokenizer;"
        "w = SourceWriter(sys.argv[1], 'text', open_tokenizer(sys.argv[2]));"
        "[w.add([2, 7, 3]) for _ in range(1000)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "x", tokenizer.path], cwd=ROOT, timeout=180)
    assert done.returncode == -signal.SIGKILL
    assert verify_source(tmp_path / "x").digest == digest
    write(tmp_path / "x", tokenizer, ["blue", "green"])
    assert len(verify_source(tmp_path / "x")) == 2
    assert list(tmp_path.glob("*.partial")) == []


def test_two_writers_of_one_source(tmp_path, tokenizer):
    with SourceWriter(tmp_path / "x", "text", tokenizer) as first:
        first.add([2, 7, 3])
        with pytest.raises(UserError, match="another process"):
            SourceWriter(tmp_path / "x", "text", tokenizer)
        first.finish({})
    assert len(verify_source(tmp_path / "x")) == 1


@pytest.mark.parametrize("part", ["text.bin", "text.idx", "image.bin", "image.idx", "meta.npy", "manifest.json"])
def test_full_disk(tmp_path, images, tokenizer, part):
    """/dev/full answers every write with ENOSPC."""
    picture = [store((images / "0.jpg").read_bytes(), 10**6)]
    write(tmp_path / "x", tokenizer, ["red"], [picture])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / f"x.{part}.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path / "x", tokenizer, ["blue"] * 3, [picture] * 3)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


FILES = ["text.bin", "text.idx", "image.bin", "image.idx", "meta.npy", "manifest.json"]


@pytest.fixture
def copy(tmp_path, sources):
    for path in sources.glob("pages.*"):
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    return tmp_path / "pages"


@pytest.mark.parametrize("part", FILES)
def test_missing_file(copy, part):
    os.unlink(f"{copy}.{part}")
    with pytest.raises(UserError, match=f"pages.{part}: .*(missing|no manifest)"):
        Source(copy)


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("change", [-2, -100, 1])
def test_truncated_or_extended_file(copy, part, change):
    path = Path(f"{copy}.{part}")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"x")
    with pytest.raises(UserError, match=f"pages.{part}: .*(truncated|too long|damaged)"):
        Source(copy)


@pytest.mark.parametrize("part", FILES[:5])
def test_flipped_byte_is_found_by_verify(copy, part):
    path = Path(f"{copy}.{part}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"pages.{part}: the file's contents have changed"):
        verify_source(copy)


@pytest.mark.parametrize("part", ["text.idx", "image.idx", "meta.npy"])
def test_damaged_header_is_found_at_open(copy, part):
    path = Path(f"{copy}.{part}")
    content = bytearray(path.read_bytes())
    content[17] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=part):
        Source(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 99}, {"documents": 89}, {"images": 1}, {"images": 0}, {"documents": "many"}, {"dtype": "float32"},
        {"files": {}}, {"files": 3}, {"tokenizer": None}, {"documents": 0},
    ],
)  # fmt: skip
def test_manifest_that_does_not_fit(copy, change):
    path = Path(f"{copy}.manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError):
        Source(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"3"])
def test_manifest_that_is_none(copy, content):
    Path(f"{copy}.manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="manifest"):
        Source(copy)


def test_pickle_in_meta_is_refused(copy):
    """An object array would be unpickled by a careless reader."""
    path = Path(f"{copy}.meta.npy")
    size = path.stat().st_size
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    with pytest.raises(UserError, match=r"meta.npy"):
        Source(copy)


def test_an_index_that_points_outside_is_no_silent_wrong_document(copy):
    """Its digest is right: only a writer's mistake, or somebody's own tool, makes such a file."""
    manifest_path, path = Path(f"{copy}.manifest.json"), Path(f"{copy}.text.idx")
    content, manifest = bytearray(path.read_bytes()), json.loads(manifest_path.read_text())
    pointers = 34 + 4 * manifest["documents"]  # header, lengths
    content[pointers + 8 * 3 + 7] = 0x40  # the highest byte of document 3's
    path.write_bytes(content)
    manifest["files"]["text.idx"]["sha256"] = hashlib.sha256(content).hexdigest()
    manifest_path.write_text(json.dumps(manifest))
    for read in (lambda: Source(copy).text(3), lambda: Source(copy).texts([1, 3]), lambda: verify_source(copy)):
        with pytest.raises(UserError, match=r"pages.text.idx: the index (points outside|does not fit) its .bin"):
            read()
