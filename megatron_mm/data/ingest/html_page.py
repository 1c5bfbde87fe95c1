"""What a reader sees of an HTML page: its text and its pictures, in order, without the page's furniture.

Text is laid out as a browser's `innerText` does: white space collapses but in <pre>, blocks start on new lines, cells
are set off by tabs. Blank lines stand around headings, paragraphs, lists, tables and code. Where a page says what its
main part is (<main>, role="main"), that part alone is read.

The parser tells of tags as they come; no tree is built, so that nesting costs nothing.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_mm.data.ingest import Part, Picture, Text
from megatron_mm.errors import UserError

FindPicture = Callable[[str], Picture | None]  # by its `src`; None: it is left out

# Parts of a page that are no part of what it says. Not <form>: some sites wrap whole pages in one; its controls go.
_FURNITURE = frozenset(
    "head title script style noscript template nav footer dialog button input select datalist textarea label "
    "svg canvas audio video iframe object embed annotation annotation-xml".split()
)
_FURNITURE_ROLES = frozenset("navigation banner contentinfo search menu menubar toolbar dialog".split())
# What generators of documentation (DocBook, Sphinx, its gallery) put beside the text, and what is kept from print.
_FURNITURE_CLASSES = frozenset(
    "navheader navfooter toc headerlink viewcode-link breadcrumb breadcrumbs noprint no-print d-print-none "
    "sphx-glr-download-link-note sphx-glr-timing sphx-glr-footer sphx-glr-signature".split()
)
_CLASSIFIER = "classifier"  # Docutils: a type behind its term, for which the style sheet writes the colon between
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none", re.IGNORECASE)
_SECTIONS = frozenset("main article section".split())  # a <header> in one of these is a heading, not the page's banner

_LISTS = frozenset("ul ol dl menu".split())
_ITEMS = frozenset("li dt dd".split())
_CELLS = frozenset("td th".split())
_BLANK_LINE = _LISTS | frozenset(
    "p h1 h2 h3 h4 h5 h6 pre blockquote table figure hr section article main details address fieldset".split()
)
_NEW_LINE = _ITEMS | frozenset("div tr caption figcaption summary body header aside form center legend".split())

_SPACE = re.compile("[ \t\r\n\f\xa0]+")
_INVISIBLE = dict.fromkeys((0x00AD, 0x200B, 0xFEFF))  # soft hyphen, zero-width space, byte order mark


def read_page(html: str, find_picture: FindPicture) -> tuple[Part, ...]:
    """Text and pictures of a page in reading order.

    Raises:
        UserError: the parser is not installed.
        ValueError: the parser gives up.
    """
    etree = load_parser()
    page = _Page(find_picture)
    parser = etree.HTMLParser(target=page, encoding="utf-8", huge_tree=True)
    try:
        parser.feed(html.encode("utf-8", errors="replace"))
        parser.close()
    except etree.LxmlError as error:
        raise ValueError(str(error)) from None
    return tuple(page.parts)


def load_parser() -> Any:
    try:
        from lxml import etree
    except ImportError:
        raise UserError("reading HTML needs the package lxml", do="pip install 'megatron-mm[ingest]'") from None
    return etree


class _Page:
    """The parser's target: tags and text in, pieces of text and pictures out.

    White space is owed until more text comes: so there is none at a page's ends, and of two neighbouring blocks the
    larger distance counts.
    """

    def __init__(self, find_picture: FindPicture) -> None:
        self.find_picture = find_picture
        self.parts: list[Part] = []
        self.words: list[str] = []  # of the text that is being gathered
        self.depth = 0
        self.skipped_from = 0  # depth of the furniture that is being skipped, or 0
        self.main_from = 0  # depth of the main part that is being read, or 0
        self.has_main = False
        self.sections = self.items = self.pre = 0  # that are open
        self.row_has_cell = False
        self._owe_nothing()
        self.fresh = False  # nothing stands yet in this cell, item or code: new lines at its start do not count

    def _owe_nothing(self) -> None:
        self.lines = self.tabs = 0
        self.space = False

    # Called by the parser.

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self.depth += 1
        if self.skipped_from:
            return
        if self._is_furniture(tag, attributes):
            self.skipped_from = self.depth
            return
        if (tag == "main" or attributes.get("role") == "main") and not self.main_from:
            if not self.has_main:
                self.parts.clear()
                self.words.clear()
                self._owe_nothing()
            self.main_from, self.has_main = self.depth, True
        self.sections += tag in _SECTIONS
        self._open(tag)
        if tag == "img" and (picture := self.find_picture(attributes.get("src", ""))):
            self._write(picture)
        elif _CLASSIFIER in attributes.get("class", "").split():
            self.space = True
            self._write(":")
            self.space = True

    def end(self, tag: str) -> None:
        if not self.skipped_from:
            self._close(tag)
            self.sections -= tag in _SECTIONS
            if self.depth == self.main_from:
                self.main_from = 0
        elif self.skipped_from == self.depth:
            self.skipped_from = 0
        self.depth -= 1

    def data(self, text: str) -> None:
        if self.skipped_from:
            return
        text = text.translate(_INVISIBLE)
        if self.pre:
            self._code(text)
            return
        text = _SPACE.sub(" ", text)
        words = text.strip(" ")
        self.space |= text.startswith(" ")
        if words:
            self._write(words)
            self.space = text.endswith(" ")

    def close(self) -> None:
        self._end_text()

    # How they lay the page out.

    def _is_furniture(self, tag: str, attributes: Mapping[str, str]) -> bool:
        if tag in _FURNITURE or (tag == "header" and not self.sections):
            return True
        if not attributes:
            return False
        return (
            attributes.get("role") in _FURNITURE_ROLES
            or not _FURNITURE_CLASSES.isdisjoint(attributes.get("class", "").split())
            or "hidden" in attributes
            or attributes.get("aria-hidden") == "true"
            or _HIDDEN_STYLE.search(attributes.get("style", "")) is not None
        )

    def _open(self, tag: str) -> None:
        self._new_lines(tag)
        if tag == "br" and not self.fresh:
            self.lines = self.lines + 1 if self.pre else min(self.lines + 1, 2)
        elif tag == "tr":
            self.row_has_cell = False
        elif tag in _CELLS:
            self.tabs += self.row_has_cell
            self.row_has_cell = self.fresh = True
        elif tag in _ITEMS:
            self.items += 1
            self.fresh = True
        elif tag == "pre":
            self.pre += 1
            self.fresh = True

    def _close(self, tag: str) -> None:
        if tag in _CELLS:
            if not self.fresh:
                self.lines = 0
            self.fresh = False
            self.row_has_cell = True  # also when a table stood in it
        elif tag in _ITEMS:
            self.items -= 1
            self.lines = min(self.lines, 1)
            self.fresh = False
        elif tag == "pre":
            self.pre -= 1
            self.lines = 0 if not self.fresh else self.lines
            self.fresh = False
        elif tag == "tr":
            self.tabs = 0
        self._new_lines(tag)

    def _new_lines(self, tag: str) -> None:
        if self.fresh:
            return
        if tag in _BLANK_LINE:
            self.lines = max(self.lines, 1 if tag in _LISTS and self.items else 2)
        elif tag in _NEW_LINE:
            self.lines = max(self.lines, 1)

    def _code(self, text: str) -> None:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        code = text.strip("\n")
        if not code:
            self.lines += 0 if self.fresh else len(text)
            return
        if not self.fresh:
            self.lines += len(text) - len(text.lstrip("\n"))
        self._write(code)
        self.lines = len(text) - len(text.rstrip("\n"))

    def _write(self, piece: str | Picture) -> None:
        if self.has_main and not self.main_from:
            return
        if self.parts or self.words:
            self.words.append("\n" * self.lines + "\t" * self.tabs or " " * self.space)
        if isinstance(piece, Picture):
            self._end_text()
            self.parts.append(piece)
        else:
            self.words.append(piece)
        self._owe_nothing()
        self.fresh = False

    def _end_text(self) -> None:
        if text := "".join(self.words):
            self.parts.append(Text(text))
        self.words.clear()
