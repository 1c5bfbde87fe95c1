"""`inspect_data.py show`: the page says what the source holds and what training is given, and text can do nothing."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_mm.config import dump_yaml
from megatron_mm.data.batch import assemble
from megatron_mm.data.ingest.images import decode_rgb, store
from megatron_mm.data.inspect import thumbnails, view, words
from megatron_mm.data.inspect.show import choose, show_documents, show_sequences
from megatron_mm.data.loader import TrainingData
from megatron_mm.data.source import Source, SourceWriter
from megatron_mm.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm.data.tokenizer.adapt import adapt_tokenizer
from megatron_mm.errors import UserError
from tests.unit.data.conftest import picture, run_config
from tests.unit.data.hf_tokenizers import FAMILIES, write_tokenizer
from tests.unit.data.pages import Article, Page, pixels

ROOT = Path(__file__).parents[3]
HOSTILE = (
    "<script>alert(1)</script>",
    "</style></span></article><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "&lt;b&gt; &amp;lt; <!-- <![CDATA[ ]]> -->",
    "  two  spaces \n\tand a tab \n",
    "right\u202eto left, \x07bell, \x00nul, \ufeffmark, \r\n",
    "<div style='position:fixed'>日本 🙂 ▁",
)


def encoded(seed: int, width: int = 48, height: int = 40, form: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(seed, width, height)).save(stream, form)
    return stream.getvalue()


def write(prefix: Path, tokenizer: Tokenizer, documents: list[list[str | bytes]]) -> Source:
    """A source of documents of text and encoded pictures."""
    with SourceWriter(prefix, "interleaved", tokenizer) as writer:
        for parts in documents:
            tokens, images = [tokenizer.bos_id], []
            for part in parts:
                tokens += tokenizer.encode(part) if isinstance(part, str) else [tokenizer.image_id]
                images += [] if isinstance(part, str) else [store(part, 10**6)]
            writer.add([*tokens, tokenizer.eos_id], images)
        writer.finish({})
    return Source(prefix)


def told(source: Source, article: Article, tokenizer: Tokenizer) -> str:
    """What the article should say, by the source: its tokens as text, pictures as ▣."""
    ids = source.text(article.document)[article.start : article.end].tolist()
    if ids[-1] == tokenizer.image_id:  # a label only: the picture comes with the next part
        ids.pop()
    runs: list[list[int]] = [[]]
    for number in ids:
        if number == tokenizer.image_id:
            runs.append([])
        else:
            runs[-1].append(number)
    return "▣".join(tokenizer.decode(run) for run in runs)


def resembles(src: str, data: bytes | memoryview) -> bool:
    """The page's picture is this one; those of the tests are smaller than a thumbnail may be, each of another size."""
    shown, expected = pixels(src).astype(int), decode_rgb(data)
    return shown.shape == expected.shape and np.abs(shown - expected).mean() < 5


def test_documents_in_words_and_pictures(sources: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, output = Source(sources / "pages"), tmp_path / "deep" / "page.html"
    size = show_documents(source, range(5, 25), tokenizer, output)
    assert size == output.stat().st_size
    page = Page(output)
    assert len(page.sections) == 20
    for document, section in zip(range(5, 25), page.sections, strict=True):
        [article] = section.articles
        assert article.document == document
        assert (article.start, article.end) == (0, source.lengths[document])
        assert article.text == told(source, article, tokenizer)
        assert True
        ids = source.text(document)
        covered = [n for part in article.parts for n in range(part.first, part.first + part.tokens)]
        assert covered == list(range(len(ids)))
        for part in article.parts:
            assert (part.kind == "picture") == (ids[part.first] == tokenizer.image_id)
            assert part.trained == (part.kind != "picture" and part.first > 0)
        shown = [part for part in article.parts if part.kind == "picture"]
        for part, data in zip(shown, source.image_bytes(document), strict=True):
            assert resembles(part.src, data)


def test_thumbnails_are_small_and_whole() -> None:
    kind, content = thumbnails.thumbnail(encoded(1, 3000, 500))
    image = Image.open(io.BytesIO(content))
    assert image.format == kind.upper()
    assert image.size == (224, 37)
    photograph = np.random.default_rng(0).integers(0, 255, (200, 224, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(photograph).save(stream, "png")
    assert thumbnails.thumbnail(stream.getvalue())[0] == "jpeg"  # much smaller than as PNG


def test_untrained_text_is_marked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    question, answer = tokenizer.encode(" red or green"), tokenizer.encode(" green")
    ids = [tokenizer.bos_id, *question, *answer, *question, *answer, tokenizer.eos_id]
    a = 1 + len(question)
    b = a + len(answer) + len(question)
    with SourceWriter(tmp_path / "x", "conversation", tokenizer) as writer:
        writer.add(ids, [], [(a, a + len(answer)), (b, len(ids))])
        writer.add(ids, [], [(a, a + len(answer))])
        writer.finish({})
    source = Source(tmp_path / "x")
    show_documents(source, [0, 1], tokenizer, tmp_path / "x.html")
    first, second = (section.articles[0].parts for section in Page(tmp_path / "x.html").sections)
    assert [(p.text, p.trained) for p in first] == [
        ("bos", False), (" red or green", False), (" green", True), (" red or green", False), (" green", True),
        ("eos", True),
    ]  # fmt: skip
    assert [p.trained for p in second] == [False, False, True, False, False]  # the rest is one run
    for document, parts in enumerate((first, second)):
        marked = {n for p in parts if p.trained for n in range(p.first, p.first + p.tokens)}
        ranges = source.loss(document)
        assert ranges is not None
        assert marked == {n for start, end in ranges.tolist() for n in range(start, end)}


def test_sequences_are_those_of_the_run(sources: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = run_config(sources, tokenizer)
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    show_sequences(path, range(3, 43), tmp_path / "page.html")
    page, data = Page(tmp_path / "page.html"), TrainingData.open(config)
    assert len(page.sections) == 40
    assert "80 sequences of 64 positions" in page.said  # the run's own report
    cut = padded = 0
    for sample, section in zip(range(3, 43), page.sections, strict=True):
        k, number = data.mixture.locate(sample)
        source, pieces = data.sources[k], data.train[k].pieces(number)
        expected = assemble(source, pieces, data.layout, True)
        used = int((expected.documents >= 0).sum())
        name = data.source_names[k]
        assert section.facts.startswith(
            f"step {sample // 8 + 1} · source {name} ({source.kind}), its sequence {number} "
        )
        assert f"{used} of 64 positions" in section.facts
        assert section.padding == 64 - used
        assert [(a.document, a.start, a.end - 1) for a in section.articles] == pieces
        for article in section.articles:
            assert article.text == told(source, article, tokenizer)
        parts = [part for article in section.articles for part in article.parts]
        assert sum(part.tokens for part in parts if part.trained) == expected.loss_mask.sum()
        shown = [part for part in parts if part.kind == "picture"]
        for part, (document, image) in zip(shown, expected.images, strict=True):
            assert resembles(part.src, source.image_bytes(document)[image])
        cut += any(article.start for article in section.articles)
        padded += section.padding > 0
    assert cut
    assert padded


@pytest.mark.parametrize("family", FAMILIES)
def test_words_of_hugging_face_tokenizers(tmp_path: Path, family: str) -> None:
    """Their tokens are bytes, word pieces, or pieces with a mark for the space; bos may be eos."""
    adapt_tokenizer(write_tokenizer(tmp_path / "old", family), tmp_path / "new")
    tokenizer = open_tokenizer(tmp_path / "new")
    texts = ["red circle, it's  12\n", " ein grüner Kreis 日本🙂", "\n(one)"]
    source = write(tmp_path / "x", tokenizer, [[texts[0], encoded(0), texts[1], encoded(1), texts[2]]])
    show_documents(source, [0], tokenizer, tmp_path / "x.html")
    [article] = Page(tmp_path / "x.html").sections[0].articles
    kept = [tokenizer.decode(tokenizer.encode(text)) for text in texts]  # one family drops a leading space
    assert article.text == "▣".join(kept)
    assert [text.strip(" ") for text in kept] == [text.strip(" ") for text in texts]
    names = [part.text for part in article.parts if part.kind == "special"]
    assert names == ["bos", "eos"]


def test_the_page_of_a_long_document_ends(tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(view, "SHOWN_TOKENS", 50)
    source = write(tmp_path / "x", tokenizer, [[" red green blue" * 100]])
    show_documents(source, [0], tokenizer, tmp_path / "x.html")
    [article] = Page(tmp_path / "x.html").sections[0].articles
    assert (article.start, article.end) == (0, 51)
    assert f"tokens 0–50 of {source.lengths[0]}" in (tmp_path / "x.html").read_text()


def test_hostile_text_is_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Reading the page back refuses every tag and attribute that is not ours."""
    prefix = tmp_path / "<img src=x onerror=alert(1)>\"'&"
    source = write(prefix, tokenizer, [[text, encoded(i)] for i, text in enumerate(HOSTILE)])
    output = tmp_path / "page.html"
    show_documents(source, range(len(HOSTILE)), tokenizer, output)
    page = Page(output)
    assert "default-src 'none'" in page.policy
    assert "script-src" not in page.policy
    assert str(prefix) in page.said
    for text, section in zip(HOSTILE, page.sections, strict=True):
        # HTML cannot hold control letters; the page names them.
        for letter in "\x00\x07\r\u202e\ufeff":
            text = text.replace(letter, f"U+{ord(letter):04X}")
        assert section.articles[0].text == text + "▣"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
def test_words_read_back(tmp_path_factory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "words.html"
    article = '<section><article data-document="0" data-start="0" data-end="1">'
    run = '<span class="words" data-first="0" data-tokens="1" data-trained="1">'
    path.write_text(f"{article}{run}{words.to_html(text)}</span></article></section>", encoding="utf-8")
    named = "".join(f"U+{ord(c):04X}" if words.to_html(c).startswith("<b") else c for c in text)
    assert Page(path).sections[0].articles[0].text == named


def test_a_damaged_picture_tells_its_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "x", tokenizer, [[" red", encoded(0), " green", encoded(1), " blue"]])
    content = bytearray((tmp_path / "x.image.bin").read_bytes())
    content[len(content) // 4] ^= 255
    (tmp_path / "x.image.bin").write_bytes(content)
    show_documents(Source(tmp_path / "x"), [0], tokenizer, tmp_path / "x.html")
    [article] = Page(tmp_path / "x.html").sections[0].articles
    broken, whole = (part for part in article.parts if part.kind == "picture")
    assert "the bytes have changed since ingest" in broken.text
    assert not broken.src
    assert np.array_equal(pixels(whole.src), decode_rgb(source.image_bytes(0)[1]))


def test_a_page_holds_only_so_many_bytes_of_pictures(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "x", tokenizer, [[encoded(i)] for i in range(3)])
    some = thumbnails.Thumbnails(page_bytes=1)
    data, crc32 = source.image(0, 0)
    assert some.uri(data, crc32).startswith("data:image/")
    with pytest.raises(ValueError, match="the page is full"):
        some.uri(data, crc32)


def test_choice_of_documents() -> None:
    assert choose(100, 3, None, None) == [0, 1, 2]
    assert choose(100, 3, 98, None) == [98, 99]
    drawn = choose(10_000, 50, None, 7)
    assert drawn == choose(10_000, 50, None, 7) == sorted(set(drawn))
    assert drawn != choose(10_000, 50, None, 8)
    assert choose(5, 50, None, 0) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="no such document"):
        choose(100, 3, 100, None)


def test_another_tokenizer_is_refused(sources: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = Source(sources / "words")
    source.tokenizer_hash = "0" * 64
    with pytest.raises(UserError, match="the tokenizer is not the one"):
        show_documents(source, [0], tokenizer, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_sequences_beyond_the_run_are_refused(sources: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run_config(sources, tokenizer)))
    with pytest.raises(UserError, match="allowed: START:END from 0 to 80"):
        show_sequences(path, range(78, 81), tmp_path / "x.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a source's PREFIX or --config"),
        (["{pages}", "--config", "run.yaml"], "either a source's PREFIX or --config"),
        (["{pages}"], "--tokenizer: is needed"),
        (["{pages}", "--tokenizer", "t", "--sequences", "0:4"], "--sequences: has no meaning with a PREFIX"),
        (["{pages}", "--tokenizer", "t", "--start", "1", "--random", "1"], "--start, --random: choose one"),
        (["--config", "run.yaml", "--documents", "3"], "--documents: has no meaning with --config"),
        (["--config", "run.yaml", "--sequences", "1-4"], "--sequences: not a range"),
        (["--config", "/nowhere/run.yaml"], "cannot read the config"),
        (["{pages}", "--tokenizer", "{tokenizer}", "--output", "/proc/nowhere/x.html"], "cannot write the page"),
    ],
)
def test_wrong_arguments(sources: Path, tokenizer: Tokenizer, arguments: list[str], message: str) -> None:
    filled = [a.format(pages=sources / "pages", tokenizer=tokenizer.path) for a in arguments]
    output = [] if "--output" in filled else ["--output", "x.html"]
    command = [sys.executable, "tools/inspect_data.py", "show", *filled, *output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
