"""MM1's filters: against a plain reading of the rules, and what a document without its pictures is."""

import base64
import io
import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_mm.data.ingest import BadRecord, Picture, Record, Text, shards
from megatron_mm.data.ingest.build import Summary, build_source
from megatron_mm.data.ingest.document import Document, make_document
from megatron_mm.data.ingest.filters import Filters
from megatron_mm.data.ingest.jsonl import JSONLines
from megatron_mm.data.ingest.repeats import find_repeated, is_among
from megatron_mm.data.ingest.workers import Processes
from megatron_mm.data.source import Source, verify_source
from megatron_mm.errors import UserError
from tests.unit.data.test_ingest import preprocess


@dataclass(frozen=True)
class Drawn:
    """A picture of a test's input, and what the rules ask of it."""

    content: bytes
    width: int
    height: int
    corrupt: bool = False
    url: str = ""


def draw(width: int, height: int, colour: int, cut: int = 0) -> Drawn:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 0, 0)).save(out, "PNG")
    content = out.getvalue()[: -cut or None]
    return Drawn(content, width, height, bool(cut))


SIZES = [(100, 100), (99, 120), (120, 99), (100, 200), (100, 201), (201, 100), (600, 300), (601, 400), (130, 110)]
PICTURES = [draw(*size, colour) for colour, size in enumerate(SIZES)] + [draw(120, 120, 99, cut=200)]
URLS = ["", "https://a.b/1.png", "https://a.b/LOGO/x.png", "https://a.b/2.png", "https://widgets.example/3.png", "b"]


def stays(picture: Drawn) -> bool:
    """MM1's rules for one picture; the largest side is 600, that a test decodes sooner than 10,000."""
    ratio = picture.width / picture.height
    return not (
        picture.corrupt
        or min(picture.width, picture.height) < 100
        or max(picture.width, picture.height) > 600
        or ratio < 0.5
        or ratio > 2
        or any(word in picture.url.lower() for word in ("logo", "button", "icon", "plugin", "widget"))
    )


Page = list[str | Drawn]


def oracle(pages: list[Page], most: int, repeats: int) -> list[Page]:
    """The pages that are left, without the pictures that go."""
    left = []
    for page in pages:
        kept: Page = []
        for part in page:
            if isinstance(part, Drawn):
                earlier = [p for p in kept if isinstance(p, Drawn)]
                again = any((p.url and p.url == part.url) or p.content == part.content for p in earlier)
                if again or not stays(part):
                    continue
            kept.append(part)
        left.append(kept)
    pictures = [p for page in left for p in page if isinstance(p, Drawn)]
    urls, contents = Counter(p.url for p in pictures if p.url), Counter(p.content for p in pictures)
    left = [
        [p for p in page if isinstance(p, str) or (urls[p.url] <= repeats and contents[p.content] <= repeats)]
        for page in left
    ]
    return [page for page in left if 1 <= sum(isinstance(p, Drawn) for p in page) <= most]


def write_pages(path: Path, pages: list[Page]) -> Path:
    def part(p: str | Drawn) -> dict:
        if isinstance(p, str):
            return {"text": p}
        return {"image": {"base64": base64.b64encode(p.content).decode(), "url": p.url}}

    path.write_text("".join(json.dumps({"content": [part(p) for p in page]}) + "\n" for page in pages))
    return path


def build(path: Path, prefix: Path, tokenizer, filters: Filters, chunk: int = 1 << 30) -> Summary:
    # One chunk a page or one for all: repeats are counted over all of them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", chunk)
        return build_source(
            [path], prefix, "interleaved", tokenizer, format=JSONLines(chunk), filters=filters, team=Processes(1),
            max_image_pixels=1 << 30, max_bad_rate=1.0,
        )  # fmt: skip


pages = st.lists(
    st.lists(
        st.one_of(
            st.sampled_from([" red", " green circle", "\n", " two three"]),
            st.tuples(st.sampled_from([*PICTURES[3:4], *PICTURES]), st.sampled_from(URLS)).map(
                lambda both: replace(both[0], url=both[1])
            ),
        ),
        max_size=6,
    ).map(lambda page: [*page, " end"]),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25)
@given(pages=pages, most=st.integers(1, 3), repeats=st.integers(1, 3), chunk=st.sampled_from([1, 1 << 30]))
def test_filters_do_what_the_rules_say(tmp_path_factory, tokenizer, pages, most, repeats, chunk):
    folder = tmp_path_factory.mktemp("filters")
    path = write_pages(folder / "pages.jsonl", pages)
    rules = replace(Filters.mm1(), max_image_side=600, max_document_images=most, max_image_repeats=repeats)
    expected = oracle(pages, most, repeats)
    if not expected:
        with pytest.raises(UserError, match="no document"):
            build(path, folder / "x", tokenizer, rules, chunk)
        return
    summary = build(path, folder / "x", tokenizer, rules, chunk)
    source = verify_source(folder / "x")
    found = [(source.text(d).tolist(), [bytes(data) for data in source.image_bytes(d)]) for d in range(len(source))]
    assert found == [
        (
            [
                tokenizer.bos_id,
                *itertools.chain.from_iterable(
                    [tokenizer.image_id] if isinstance(p, Drawn) else tokenizer.encode(p) for p in page
                ),
                tokenizer.eos_id,
            ],
            [p.content for p in page if isinstance(p, Drawn)],
        )
        for page in expected
    ]
    assert summary.documents + sum(summary.filtered_documents.values()) == len(pages)
    assert (summary.bad, summary.documents, summary.images) == (0, len(expected), source.manifest["images"])
    assert source.manifest["made"]["filtered_images"] == summary.filtered_images
    # The same files as from pages that never had what was filtered.
    write_pages(folder / "left.jsonl", expected)
    build(folder / "left.jsonl", folder / "y", tokenizer, Filters())
    assert Source(folder / "y").digest == source.digest


def test_pictures_lost_are_counted_by_reason(tmp_path, tokenizer):
    good, small, wide = draw(120, 120, 1), draw(50, 120, 2), draw(500, 120, 3)
    icon = replace(draw(120, 120, 4), url="http://a/ICON.png")
    named = replace(draw(120, 120, 5), url="http://a/b.png")
    often = [draw(120, 120, 100 + i) for i in range(2)]
    many: Page = [*[draw(120, 120, 10 + i) for i in range(31)], "x"]
    pages: list[Page] = [
        [good, "a", small, wide, icon, good, PICTURES[-1]],
        [named, "a", replace(good, url=named.url)],
        ["only text"],
        [small, "nothing left"],
        many,
    ]
    pages += [[often[0], "x", draw(120, 120, 200 + i)] for i in range(11)]
    pages += [[often[1], "x"] for _ in range(10)]
    path = write_pages(tmp_path / "p.jsonl", pages)
    for chunk in (1, 1 << 30):
        summary = build(path, tmp_path / "x", tokenizer, Filters.mm1(), chunk)
        assert summary.filtered_images == {
            "bytes seen over 10 times": 11, "side under 100 pixels": 2, "URL holds icon": 1,
            "URL repeated in its document": 1, "aspect over 2": 1, "bytes repeated in their document": 1,
            "corrupt, does not decode": 1,
        }  # fmt: skip
        assert summary.filtered_documents == {"no images": 2, "over 30 images": 1}
        assert summary.documents == len(pages) - 3
        assert list(tmp_path.glob("x.shards")) == []


def test_bounds_of_mm1():
    rules = Filters.mm1()
    for size, told in (
        ((100, 200), ""), ((200, 100), ""), ((10_000, 5_000), ""), ((99, 99), "under 100"), ((100, 201), "aspect"),
        ((10_001, 9_000), "over 10000"), ((9_000, 10_001), "over 10000"), ((201, 100), "aspect"),
    ):  # fmt: skip
        assert told in rules.size_fault(*size)
        assert bool(told) == bool(rules.size_fault(*size))
    assert [bool(rules.document_fault(n)) for n in (0, 1, 30, 31)] == [True, False, False, True]


def test_command_line(tmp_path, tokenizer):
    pages: list[Page] = [["a", draw(50, 50, 1)], ["b", draw(150, 150, 2)], ["c"]]
    path = write_pages(tmp_path / "p.jsonl", pages)

    def documents(*options: str) -> int:
        done = preprocess("interleaved", path, tmp_path / "x", tokenizer, *options)
        assert done.returncode == 0, done.stderr
        return len(verify_source(tmp_path / "x"))

    assert documents() == 3
    assert documents("--filter", "mm1") == 1
    assert Source(tmp_path / "x").manifest["made"]["filters"]["max_image_repeats"] == 10
    assert documents("--filter", "mm1", "--min-image-side", "none") == 2
    assert documents("--filter", "mm1", "--min-document-images", "0", "--no-drop-corrupt-images") == 3
    assert documents("--min-image-side", "100", "--min-document-images", "1") == 1
    for options, told in (
        (("--min-image-side", "-1"), "--min-image-side: out of range"),
        (("--max-image-aspect", "0.5"), "--max-image-aspect: out of range"),
        (("--max-image-aspect", "nan"), "--max-image-aspect: out of range"),
        (("--max-image-repeats", "x"), "invalid int value"),
    ):
        done = preprocess("interleaved", path, tmp_path / "y", tokenizer, *options)
        assert done.returncode == 2
        assert told in done.stderr
    done = preprocess("text", path, tmp_path / "y", tokenizer, "--filter", "mm1")
    assert done.returncode == 2
    assert "filters are for documents with images" in done.stderr
    assert not list(tmp_path.glob("y*"))


def test_a_corrupt_picture_puts_its_document_aside_without_filters(tmp_path, tokenizer):
    path = write_pages(tmp_path / "p.jsonl", [["a", PICTURES[-1]], ["b", draw(50, 50, 1)]])
    summary = build(path, tmp_path / "x", tokenizer, Filters())
    assert (summary.documents, summary.reasons) == (1, {"does not decode": 1})


parts = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["", " red", " green circle two"]), st.booleans()).map(lambda t: Text(*t)),
        st.sampled_from([Picture(PICTURES[0].content), Picture(PICTURES[1].content)]),
    ),
    min_size=1,
    max_size=8,
)


@given(parts=parts)
def test_a_dropped_picture_leaves_no_trace(tokenizer, parts):
    """Placeholder and loss ranges are those of a record without it; ranges name exactly the trained texts' tokens."""
    rules = Filters(min_image_side=100)
    found = make_document(Record("r", tuple(parts)), tokenizer, 10**6, rules)
    without = tuple(p for p in parts if p != Picture(PICTURES[1].content))
    expected = make_document(Record("r", without), tokenizer, 10**6)
    if isinstance(expected, BadRecord):
        assert found == expected
        return
    assert isinstance(found, Document)
    lost = len(parts) - len(without)
    assert found == replace(expected, dropped=Counter({"side under 100 pixels": lost} if lost else {}))
    trained = [False]
    for p in without:
        trained += [False] if isinstance(p, Picture) else [p.trained] * len(tokenizer.encode(p.text))
    texts = [p.trained for p in without if isinstance(p, Text)]
    trained.append(texts[-1] if texts else True)
    if all(texts):
        assert found.loss is None
    else:
        told = np.zeros(len(found.tokens), dtype=bool)
        for start, end in found.loss or []:
            told[start:end] = True
        assert told.tolist() == trained


hashes = st.integers(0, 2**64 - 1) | st.integers(0, 5)


@given(
    counts=st.lists(st.dictionaries(hashes, st.integers(1, 4), max_size=20), max_size=4),
    at_once=st.sampled_from([1, 7, 1 << 20]),
)
def test_repeats_are_counted_in_ranges(tmp_path_factory, counts, at_once):
    folder = tmp_path_factory.mktemp("repeats")
    files = []
    for i, shard in enumerate(counts):
        files.append(folder / f"{i}.npy")
        np.save(files[-1], np.array(sorted(shard.items()), dtype=shards.SEEN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_mm.data.ingest.repeats._AT_ONCE", at_once)
        found = find_repeated(files, 3, folder / "repeated")
    total = sum((Counter(shard) for shard in counts), Counter())
    assert found.tolist() == sorted(key for key, n in total.items() if n > 3)
    asked = np.array(sorted(total), dtype="<u8")
    assert is_among(asked, found).tolist() == [total[key] > 3 for key in sorted(total)]
