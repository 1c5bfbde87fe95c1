"""HTML pages: their layout as text, their furniture gone, their pictures kept within the folder."""

import base64
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.ingest import BadRecord, Picture, Record, Text
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.html import HTML
from megatron_mm.errors import UserError
from tests.unit.data.format_checks import damaged, parts_of, read_all, read_damaged, reason

FORM = HTML()


def read(folder: Path, page: str | bytes, name: str = "page.html") -> list[Record | BadRecord]:
    (folder / name).write_bytes(page.encode() if isinstance(page, str) else page)
    return read_all(FORM, [folder / name], "interleaved")


def text(folder: Path, page: str | bytes) -> str:
    """What a page says; "@" stands for a picture."""
    (parts,) = parts_of(read(folder, page))
    assert all(part.text for part in parts if isinstance(part, Text))
    return "".join(part.text if isinstance(part, Text) else "@" for part in parts)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.png, sub/b c.png, and pictures outside of it."""
    folder = tmp_path_factory.mktemp("web") / "site"
    (folder / "sub").mkdir(parents=True)
    for path in ("a.png", "sub/b c.png", "drawing.svg", "../outside.png", "../site2.png"):
        (folder / path).touch()
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "inner.png").symlink_to("a.png")
    return folder


LAYOUT = {
    "<p>One <b>two</b>\n three.</p>\n<p>Four&nbsp;&amp;&#8211;five.</p>": "One two three.\n\nFour &–five.",
    "<h1>Title</h1>text<h2>Part</h2><div>a</div><div>b</div>": "Title\n\ntext\n\nPart\n\na\nb",
    "<div><div><div>a</div></div></div> <span>b</span><span>c</span>": "a\nbc",
    "a<br>b<br/>\n<br><br>c": "a\nb\n\nc",
    "<p>List:<ul><li>a<li><p>b</p><li>c<ol><li>d</li></ol></ul>end": "List:\n\na\nb\nc\nd\n\nend",
    "<ul><li><p>a</p><p>b</p></li><li>c</li></ul>": "a\n\nb\nc",
    "<dl><dt>term</dt><dd>meaning</dd><dt>x<dd><p>y</dl>": "term\nmeaning\nx\ny",
    "<table><tr><th>a</th><th>b</th></tr><tr><td><p>1</p></td><td>\n2</td></tr></table>after": "a\tb\n1\t2\n\nafter",
    "<table><tr><td></td><td>b</td></tr><tr><td></td><td>c</td><td></td></tr></table>": "b\n\tc",
    "x<pre>\n  def f():\r\n\treturn  1\n\n\n<b>f()</b>\n</pre>y": "x\n\n  def f():\n\treturn  1\n\n\nf()\n\ny",
    "<ul><li><pre>a\nb</pre><li>c</ul>": "a\nb\nc",
    "<p>before<img src=a.png>after</p>": "before@after",
    "<p>before <img src=a.png> after</p>": "before @ after",
    "<p>above</p><figure><img src=a.png><figcaption>what</figcaption></figure><p>below": "above\n\n@\nwhat\n\nbelow",
    "<p>a <img src=gone.png> b</p>": "a b",
    "<img src=a.png><img src=a.png><p>x</p><img src=a.png>": "@@\n\nx\n\n@",
    "<p>soft&shy;hyphen &#x200b;zero</p><!-- no --><![CDATA[no]]>": "softhyphen zero",
    "<dt>n<span class='classifier'>int</span></dt>": "n : int",
    "&lt;p&gt; &bogus; &#xD800; &#0;<p>x": "<p> &bogus; \N{REPLACEMENT CHARACTER}",
}


@pytest.mark.parametrize("page", LAYOUT)
def test_layout(site, page):
    wanted = LAYOUT[page]
    found = text(site, page)
    assert found == wanted if "bogus" not in page else found.startswith("<p> &bogus;")


FURNITURE = [
    "<title>no</title>", "<script>var no = '<p>no</p>'</script>", "<style>no {}</style>", "<nav>no <p>no</nav>",
    "<header><h1>no</h1></header>", "<footer>no</footer>", "<noscript>no</noscript>", "<template><p>no</template>",
    "<form action=x><label>no</label><input value=no><select><option>no</select><textarea>no</textarea></form>",
    "<button>no</button>", "<svg><text>no</text></svg>", "<iframe>no</iframe>", "<video>no</video>",
    "<div role=navigation>no<div>no</div>no</div>", "<div class='x navheader'>no<img src=a.png></div>",
    "<a class=headerlink>no</a>", "<div hidden>no</div>", "<p style='color:red; DISPLAY : none'>no</p>",
    "<span aria-hidden=true>no</span>", "<nav><nav>no</nav>no<header>no</header></nav>", "<img alt=no src=gone.png>",
    "<object data=no>no<img src=a.png></object>",
]  # fmt: skip


@pytest.mark.parametrize("furniture", FURNITURE)
def test_furniture_goes_and_nothing_else(site, furniture):
    assert text(site, f"<body>a {furniture}<p>b</p>{furniture} c") == "a\n\nb\n\nc"


def test_the_main_part_alone_is_read_where_a_page_has_one(site):
    page = "<div>menu<img src=a.png></div>{}<p>far <b>below</b></p>"
    assert text(site, page.format("<main><header><h1>T</h1></header>x</main>")) == "T\n\nx"
    assert text(site, page.format("<div role=main>x<p>y</div><main>z</main>")) == "x\n\ny\n\nz"
    assert text(site, page.format("<article><header>T</header>x</article>")) == "menu@\n\nT\nx\n\nfar below"
    assert text(site, "<form><p>x</p></form>") == "x"  # some sites wrap all in one


PICTURES = {
    "a.png": "a.png",
    " ./sub/../a.png ": "a.png",
    "sub/b%20c.png?size=1#top": "sub/b c.png",
    "../site/a.png": "a.png",
    "inner.png": "a.png",
    "a.png/": "a.png",  # <img src=a.png/>
    "link.png": None,
    "../outside.png": None,
    "../site2.png": None,
    "sub/../../outside.png": None,
    "%2e%2e/outside.png": None,
    "/a.png": None,
    "file:a.png": None,
    "//host/a.png": None,
    "https://host/a.png": None,
    "HTTP://[": None,
    "drawing.svg": None,
    "sub": None,
    ".": None,
    "": None,
    "?x": None,
    "a.png%00": None,
    "x" * 5000: None,
}


@pytest.mark.parametrize("src", PICTURES)
def test_pictures_stay_within_the_folder(site, src):
    (parts,) = parts_of(read(site, f'text <img src="{src}">'))
    pictures = [part for part in parts if isinstance(part, Picture)]
    if PICTURES[src] is None:
        assert pictures == []
        return
    (picture,) = pictures
    assert picture.content == (site / PICTURES[src]).resolve()
    assert picture.url.split("/", 1)[1] == PICTURES[src]


def test_absolute_paths_and_file_urls(site):
    page = f'x<img src="{site / "a.png"}"><img src="{(site / "a.png").as_uri()}">'
    assert text(site, page) == "x"


def test_a_pages_own_folder_is_the_border_unless_the_input_is_a_folder_above(site):
    (site / "sub" / "p.html").write_text("x <img src=../a.png>")
    (site / "page.html").write_text("y <img src='sub/b c.png'>")
    assert parts_of(read_all(FORM, [site / "sub/p.html"], "interleaved")) == [(Text("x"),)]
    whole = read_all(FORM, [site], "interleaved")
    assert [record.id for record in whole] == [str(site / "page.html"), str(site / "sub" / "p.html")]
    assert [sum(isinstance(part, Picture) for part in parts) for parts in parts_of(whole)] == [1, 1]


def test_data_urls(site):
    def pictures(src: str) -> list[bytes | Path]:
        (parts,) = parts_of(read(site, f"x<img src='{src}'>"))
        return [part.content for part in parts if isinstance(part, Picture)]

    big = os.urandom(12 << 20)  # longer than what the parser takes by default
    for data in (b"\x89PNG", big):
        assert pictures("data:image/png;base64," + base64.b64encode(data).decode()) == [data]
    assert pictures("DATA:image/png; charset=x;base64,aGVs\n bG8%3D") == [b"hello"]
    for src in ("data:", "data:image/png,abc", "data:image/svg+xml;base64,aGVsbG8=", "data:image/png;base64,@@@"):
        assert pictures(src) == []


@pytest.mark.parametrize(
    "page",
    [
        "<p>Größe – 人</p>".encode(),
        "\ufeff<p>Größe – 人</p>".encode(),
        "<p>Größe – 人</p>".encode("utf-16"),
        "\ufeff<p>Größe – 人</p>".encode("utf-16-be"),
        "<meta charset=gb2312><p>Größe – 人</p>".encode("gb18030"),
        b"<meta charset='no-such'>" + "<p>Größe – 人</p>".encode(),
        b"<meta charset='unicode_escape'>" + "<p>Größe – 人</p>".encode(),
        b"<?xml version='1.0' encoding='ISO-2022-JP'?>" + "<p>人</p>".encode("iso2022_jp"),
    ],
)
def test_encodings(site, page):
    assert text(site, page) in ("Größe – 人", "人")


def test_encodings_of_the_west(site):
    body = "<p>Größe – “x”</p>".encode("cp1252")
    for head in (b"", b"<META HTTP-EQUIV='Content-Type' CONTENT='text/html; charset=iso-8859-1'>"):
        assert text(site, head + body) == "Größe – “x”"


def test_pages_of_a_folder_are_cut_into_chunks(site, tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.{('html', 'HTM', 'xhtml', 'txt')[i % 4]}").write_text(f"<p>{i}</p>")
    (tmp_path / os.fsdecode(b"20\xff.html")).write_text("<p>20</p>")
    os.mkfifo(tmp_path / "21.html")
    (tmp_path / "22.html").symlink_to("gone.html")
    form = HTML(3 * PICTURE_BYTES)
    chunks = form.chunks([tmp_path, site / "page.html"])
    places = [(chunk.start, chunk.end) for chunk in chunks]
    assert places == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15), (15, 18), (0, 1)]
    records = [record for chunk in chunks[:-1] for record in form.read(chunk, "interleaved")]
    assert parts_of(records[:16]) == [(Text(str(i)),) for i in range(21) if i % 4 != 3]
    assert records[15].id == f"{tmp_path}/20\\xff.html"
    assert [bad.reason for bad in records[16:] if isinstance(bad, BadRecord)] == ["cannot read the page: no file"] * 2


def test_wrong_inputs(tmp_path):
    with pytest.raises(UserError, match="no pages"):
        FORM.chunks([tmp_path])
    with pytest.raises(UserError, match="cannot read"):
        FORM.chunks([tmp_path / "none.html"])


@pytest.mark.parametrize(
    ("page", "told"),
    [
        (b"", "no text: the page is empty"),
        (b" \n", "no text: the page is empty"),
        (b"<html><body></body></html>", "no text"),
        (b"<p><img src=a.png>", "no text"),
        (b"<script>", "no text"),
        (b"<!-- x -->", "no text"),
        (b"just words", "not HTML: no tag"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, "not HTML: binary data"),
        (b"<p>\0\0\0\0", "not HTML: binary data"),
    ],
)
def test_bad_pages(site, page, told):
    assert reason(read(site, page)).startswith(told)


def test_a_page_that_is_too_large(site, monkeypatch):
    monkeypatch.setattr("megatron_mm.data.ingest.html.MAX_PAGE_BYTES", 1 << 20)
    assert reason(read(site, b"<p>" + b"x" * (1 << 20))).startswith("page too large")


@pytest.mark.parametrize("tag", ["div", "b", "ul", "table", "pre", "nav", "a", "p", "x-y"])
def test_nesting_costs_nothing(site, tag):
    """Neither deep nor unclosed: thousands of tags are read in a moment, and what comes after them is there."""
    start = time.monotonic()
    page = f"<{tag}>" * 50_000 + "deep" + f"</{tag}>" * 50_000
    records = read(site, page + "<p>after</p>")
    assert isinstance(records[0], Record)
    read(site, f"<{tag} x=1><i>" * 20_000 + "x")
    assert time.monotonic() - start < 20


def test_repeated_attributes_entities_and_comments_cost_nothing(site):
    start = time.monotonic()
    for part in (
        "<!--",
        "<p " + "a=b " * 9,
        "&amp",
        "<img src=http://host>",
        "</p>",
        "<![CDATA[",
        "<a href='",
        "<td>",
        "\n" * 9,
    ):
        read(site, "<p>x" + part * 30_000)
    assert time.monotonic() - start < 30


GOOD = (
    "<!DOCTYPE html><html><head><meta charset=utf-8><title>t</title></head><body><nav><a href=x>n</a></nav><main>"
    "<h1>Größe</h1><p>One <b>two</b> &amp; <img src='a.png' alt='x'> three</p><ul><li>a<li>b</ul><pre>\n x\n</pre>"
    "<table><tr><td>1<td>2</table><img src='data:image/png;base64,aGVsbG8='></main><footer>f</footer></body></html>"
).encode()


@settings(max_examples=200)
@given(damaged(GOOD))
def test_damaged_pages(site, data):
    (site / "damaged.html").write_bytes(data)
    records = read_damaged(FORM, site / "damaged.html", "interleaved")
    assert records is not None
    assert len(records) == 1


_TAGS = "p div b table tr td li ul pre main nav header section img br script svg form dd html body head x".split()
_PIECES = st.sampled_from([
    "<", ">", "</", "/>", "<!--", "-->", "<![CDATA[", "]]>", "&", "&#x", "&nbsp;", "'", '"', "=", " ", "\n", "\t", "\r",
    "a", "é", "\0", "\x01", "\ufffd", "\U0001f600", "src=a.png", " role=main", " hidden", " class=toc",
    *(f"<{tag}>" for tag in _TAGS), *(f"</{tag}>" for tag in _TAGS),
])  # fmt: skip


@settings(max_examples=250)
@given(st.lists(_PIECES | st.text(max_size=3)))
def test_any_soup(site, pieces):
    """Text of whatever page starts and ends with words, and never has three line ends in a row outside of code."""
    soup = "".join(pieces).encode("utf-8", "replace")
    (record,) = read(site, soup)
    if isinstance(record, BadRecord):
        return
    said = "".join(part.text if isinstance(part, Text) else "@" for part in record.parts)
    assert said.encode()
    if b"<pre" not in soup:
        assert said == said.strip(" \n\t")
        assert "\n\n\n" not in said
        assert "  " not in said


@settings(max_examples=100)
@given(st.binary(max_size=400))
def test_any_bytes(site, data):
    assert len(read(site, data)) == 1
