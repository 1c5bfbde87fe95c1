"""Text as HTML that shows what stands there and can do nothing: escaped, whitespace and control letters visible."""

import re
from html import escape

# Spaces at an end or in a row, line ends, tabs, and letters that are invisible or turn the direction of writing.
_MARKED = re.compile(
    r"(?P<newline>\n)|(?P<tab>\t)|(?P<spaces>\A +| +\Z|  +| +(?=\n)|(?<=\n) +)"
    r"|(?P<control>[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff])"
)


def to_html(text: str) -> str:
    """The text's own letters, in order, are the page's; marks are drawn by its style sheet, control letters named."""
    out, done = [], 0
    for found in _MARKED.finditer(text):
        out.append(escape(text[done : found.start()]))
        out.append(_mark(found.lastgroup, found[0]))
        done = found.end()
    return "".join(out) + escape(text[done:])


def _mark(kind: str | None, letters: str) -> str:
    if kind == "newline":
        return '<i class="newline"></i>\n'
    if kind == "control":
        return f'<b class="control">U+{ord(letters):04X}</b>'
    return f'<i class="{kind}">{letters}</i>'
