"""Reads a page of `tools/inspect_data.py show` back: only what a browser would make of it."""

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

# Everything that a page may consist of. A tag or attribute that text or a name smuggled in is not among it.
TAGS = set(
    "html head meta title style body h1 h2 p pre div span i b section svg rect article header figure img figcaption br"
    .split()
)  # fmt: skip
ATTRIBUTES = set(
    "lang charset http-equiv content name class id viewbox preserveaspectratio x y width height alt src "
    "data-document data-start data-end data-first data-tokens data-trained data-padding".split()
)


@dataclass
class Part:
    """A run of tokens on the page."""

    kind: str  # words, special, picture
    first: int
    tokens: int
    trained: bool
    text: str = ""
    src: str = ""


@dataclass
class Article:
    document: int
    start: int
    end: int
    parts: list[Part] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its words, a picture as ▣."""
        return "".join({"words": p.text, "picture": "▣"}.get(p.kind, "") for p in self.parts)


@dataclass
class Section:
    facts: str = ""
    padding: int = 0
    articles: list[Article] = field(default_factory=list)


class Page(HTMLParser):
    """Sections of a page, and all that it says outside of style and documents."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: list[Section] = []
        self.policy, self.said = "", ""
        self._open: list[tuple[str, str]] = []  # tag, class
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        assert tag in TAGS, tag
        assert set(values) <= ATTRIBUTES, values
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        if tag == "section":
            self.sections.append(Section())
        elif tag == "article":
            self.sections[-1].articles.append(
                Article(int(values["data-document"]), int(values["data-start"]), int(values["data-end"]))
            )
        elif "data-first" in values:
            kind = "picture" if tag == "figure" else "special" if "special" in values["class"] else "words"
            self.parts.append(
                Part(kind, int(values["data-first"]), int(values["data-tokens"]), values["data-trained"] == "1")
            )
        elif "data-padding" in values:
            self.sections[-1].padding = int(values["data-padding"])
        elif tag == "img":
            self.parts[-1].src = values["src"]
        if tag not in ("meta", "img", "br"):
            self._open.append((tag, values.get("class", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag == "rect"

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if "article" in tags and "header" not in tags:
            if ("span", "cut") not in self._open and self.parts:
                self.parts[-1].text += data
        elif "section" in tags and tags[-1] == "p" and self._open[-1][1] == "facts":
            self.sections[-1].facts += data
        elif "style" not in tags:
            self.said += data

    @property
    def parts(self) -> list[Part]:
        return self.sections[-1].articles[-1].parts


def pixels(src: str) -> np.ndarray:
    """uint8 [height, width, 3] of a data URI."""
    head, _, body = src.partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body, validate=True))).convert("RGB"))
