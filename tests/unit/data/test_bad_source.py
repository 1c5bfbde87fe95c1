"""Damaged, mixed-up and wrongly made source files: whoever opens, verifies, merges or trains on them gets a UserError
or the right contents; never a crash, and never a source that verifies but is wrong."""

import hashlib
import io
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_mm.config import SequenceLayout
from megatron_mm.data.batch import assemble
from megatron_mm.data.ingest.images import StoredImage, store
from megatron_mm.data.packing import PackedSource
from megatron_mm.data.source import Source, SourceWriter, verify_source
from megatron_mm.data.source_merge import merge_sources
from megatron_mm.errors import UserError
from tests.unit.data.conftest import picture
from tests.unit.data.spoiled import spoiled


@dataclass(frozen=True)
class Words:
    """A vocabulary without a tokenizer."""

    hash: str = "0" * 64
    vocab_size: int = 300
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 0
    image_id: int = 3


WIDE = Words(hash="1" * 64, vocab_size=70_000)  # its tokens take 32 bits
FILES = ("text.bin", "text.idx", "image.bin", "image.idx", "loss.bin", "loss.idx", "meta.npy")
LAYOUT = SequenceLayout(
    seq_length=32, max_images=2, tokens_per_image=4, image_size=8,
    image_token_id=3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def jpeg(seed: int) -> StoredImage:
    out = io.BytesIO()
    Image.fromarray(picture(seed, 10, 9)).save(out, "JPEG")
    return store(out.getvalue(), 1000)


def write(prefix: Path, words: Words, seed: int) -> None:
    """A dozen documents, some longer than a sequence. Files of sources of different seeds have the same sizes."""
    shape, rng = random.Random(0), random.Random(seed)
    pictures = [jpeg(i) for i in range(4)]
    documents = [(shape.randint(2, 60), shape.choices(pictures, k=shape.randint(0, 4)), d % 3 == 0) for d in range(12)]
    rng.shuffle(documents)
    with SourceWriter(prefix, "conversation", words) as writer:
        for length, images, in_parts in documents:
            body = [rng.randrange(4, words.vocab_size) for _ in range(length)]
            for _ in images:
                body.insert(rng.randint(0, len(body)), words.image_id)
            end = len(body) + 2
            writer.add([1, *body, 2], images, [(1, 2), (end - 1, end)] if in_parts else [(1, end)])
        writer.finish({"seed": seed})


@dataclass(frozen=True)
class Files:
    """Files of a source, and where they are put after some of them were changed."""

    whole: dict[str, bytes] = field(repr=False)
    prefix: Path

    @property
    def digest(self) -> str:
        self.put()
        return Source(self.prefix).digest

    def put(self, **changed: bytes) -> None:
        parts = {name.replace("_", "."): content for name, content in changed.items()}
        for part, content in (self.whole | parts).items():
            Path(f"{self.prefix}.{part}").write_bytes(content)

    def signed(self, part: str, content: bytes) -> dict[str, bytes]:
        """The changed file and a manifest that vouches for it: a writer's mistake, not damage."""
        manifest = json.loads(self.whole["manifest.json"])
        manifest["files"][part] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return {part.replace(".", "_"): content, "manifest_json": json.dumps(manifest).encode()}


@pytest.fixture(scope="module", params=[Words(), WIDE], ids=["uint16", "int32"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("bad")
    write(folder / "x", request.param, 0)
    return Files({part: (folder / f"x.{part}").read_bytes() for part in (*FILES, "manifest.json")}, folder / "x")


def damages() -> st.SearchStrategy[tuple[str, int, float, int]]:
    """What is done, how much of it, where, and with which bits."""
    how = st.sampled_from(["flip", "cut", "grow", "zeros", "noise"])
    return st.tuples(how, st.integers(1, 40), st.floats(0, 1), st.integers(1, 255))


def damage(content: bytes, how: str, amount: int, place: float, bits: int) -> bytes:
    at = int(place * (len(content) - 1))
    if how == "cut":
        return content[:at]
    if how == "grow":
        return content + bytes([bits]) * amount
    changed = bytearray(content)
    if how == "flip":
        changed[at] ^= bits
    else:
        end = min(at + amount, len(content))
        changed[at:end] = random.Random(bits).randbytes(end - at) if how == "noise" else bytes(end - at)
    return bytes(changed)


def train(prefix: Path, cache: Path) -> Iterator[np.ndarray]:
    """The sequences' tokens, as a run reads them; their pictures too. Packs anew: the key is the manifest's."""
    source = Source(prefix)
    for split in ("train", "validation"):
        packed = PackedSource.open(source, split, LAYOUT, 0.2, cache)
        for i in range(len(packed)):
            sequence = assemble(source, packed.pieces(i), LAYOUT, True)
            assert 0 <= sequence.tokens.min() <= sequence.tokens.max() < source.vocab_size
            pictures = source.images([(image.document, image.number, image.number + 1) for image in sequence.images])
            assert [len(picture) for picture in pictures] == [1] * len(sequence.images)
            yield sequence.tokens


@settings(max_examples=60)
@given(part=st.sampled_from(FILES), what=damages())
def test_damage_is_found_and_crashes_nobody(files: Files, tmp_path_factory, part, what):
    content = damage(files.whole[part], *what)
    assume(content != files.whole[part])
    files.put(**{part.replace(".", "_"): content})
    with pytest.raises(UserError):
        verify_source(files.prefix)
    merged = files.prefix.with_name("merged")
    with pytest.raises(UserError):
        merge_sources([files.prefix], merged)
    assert not list(merged.parent.glob("merged*"))
    with suppress(UserError):  # not all damage can be seen without reading everything
        list(train(files.prefix, tmp_path_factory.mktemp("cache")))


@settings(max_examples=60)
@given(part=st.sampled_from(FILES), what=damages())
def test_what_verifies_can_be_trained_on(files: Files, tmp_path_factory, part, what):
    """Files that were wrong when their digests were taken."""
    files.put(**files.signed(part, damage(files.whole[part], *what)))
    try:
        verify_source(files.prefix)
    except UserError:
        with suppress(UserError):
            list(train(files.prefix, tmp_path_factory.mktemp("cache")))
    else:
        assert list(train(files.prefix, tmp_path_factory.mktemp("cache")))


@settings(max_examples=100)
@given(data=st.data())
def test_wrong_manifests(files: Files, data):
    manifest = json.loads(files.whole["manifest.json"])
    wrong = data.draw(spoiled(manifest))
    files.put(manifest_json=json.dumps(wrong).encode())
    with suppress(UserError):
        verify_source(files.prefix)
        labels: dict[str, Any] = {"made": {}, "kind": ""}  # which change nothing that is read
        assert {**wrong, **labels} == {**manifest, **labels}
    merged = files.prefix.with_name("merged")
    with suppress(UserError):
        merge_sources([files.prefix], merged)
        assert verify_source(merged).digest == files.digest


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"schema": 1e999}', b'{"schema": 1, "documents": 1e999}'])
def test_manifests_that_break_parsers(files: Files, content):
    files.put(manifest_json=content)
    for read in (verify_source, lambda prefix: merge_sources([prefix], prefix.with_name("merged"))):
        with pytest.raises(UserError, match="manifest"):
            read(files.prefix)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"files": 3}', b"\xff"])
def test_what_a_killed_writer_left_is_damaged(files: Files, content):
    files.put()
    left = Path(f"{files.prefix}.manifest.json.next")
    left.write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.json.next: .*damaged"):
        Source(files.prefix)
    left.unlink()
    verify_source(files.prefix)


@pytest.mark.parametrize("part", ["text.bin", "text.idx", "image.idx", "loss.idx", "meta.npy", "manifest.json"])
def test_files_of_two_sources_exchanged(files: Files, tmp_path, part):
    """They have the same sizes, so that opening alone cannot tell."""
    words = WIDE if b'"int32"' in files.whole["manifest.json"] else Words()
    write(tmp_path / "y", words, seed=1)
    content = (tmp_path / f"y.{part}").read_bytes()
    assert content != files.whole[part]
    assert len(content) == len(files.whole[part])
    files.put(**{part.replace(".", "_"): content})
    with pytest.raises(UserError, match="contents have changed"):
        verify_source(files.prefix)


def test_ids_past_the_vocabulary(files: Files, tmp_path):
    """A source that says it has fewer ids than it uses: an embedding would be read past its end."""
    manifest = json.loads(files.whole["manifest.json"])
    manifest["tokenizer"]["vocab_size"] = 250
    files.put(manifest_json=json.dumps(manifest).encode())
    with pytest.raises(UserError, match="ids outside the vocabulary"):
        verify_source(files.prefix)
    with pytest.raises(UserError, match="a file of the source is damaged"):
        list(train(files.prefix, tmp_path))
