"""Documents or sequences as one HTML page that opens anywhere.

Text and names in a source were written by strangers: all of it is escaped, and the page forbids every script and every
fetch, so that a browser would not run one that slipped through.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from megatron_mm.data.ingest.images import FORMATS, BadImageError
from megatron_mm.data.inspect.style import STYLE
from megatron_mm.data.inspect.thumbnails import Thumbnails
from megatron_mm.data.inspect.view import Fragment, Run, Shown, Special, Words, counts
from megatron_mm.data.inspect.words import to_html
from megatron_mm.data.source import Source
from megatron_mm.errors import UserError

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LEGEND = """<div class="legend">
<span><i class="key words"></i>trained on</span>
<span><i class="key untrained"></i><span class="untrained-words">given, not trained on</span></span>
<span><i class="key picture"></i>picture</span>
<span><i class="key padding"></i>padding</span>
<span><span class="special">bos</span><span class="special trained">eos</span> special tokens</span>
<span><i class="newline"></i> line end</span><span><i class="spaces">   </i> spaces</span>
<span><i class="tab">\t</i> tab</span>
</div>"""


@dataclass(frozen=True)
class Section:
    """One document or one sequence."""

    title: str
    facts: str  # "" for none
    source: Source
    fragments: list[Fragment]
    positions: int  # of the sequence, padding counted


def write_page(path: Path, title: str, about: Sequence[str], report: str, sections: Iterable[Section]) -> int:
    """Write the page atomically. Returns its size in bytes.

    Args:
        about: paragraphs on top.
        report: shown as it is, below them; "" for none.
    Raises:
        UserError: the file cannot be written.
    """
    thumbnails = Thumbnails()
    parts = [_section(number, section, thumbnails) for number, section in enumerate(sections)]
    page = "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *(f'<p class="facts">{escape(line)}</p>' for line in about),
            f"<pre>{escape(report)}</pre>" if report else "",
            _LEGEND,
            *parts,
            "</body></html>\n",
        ]
    )
    content = page.encode("utf-8", "replace")
    temporary = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError("cannot write the page", where=str(path), found=error.strerror) from None
    return len(content)


def _section(number: int, section: Section, thumbnails: Thumbnails) -> str:
    used = section.fragments[-1].positions.stop if section.fragments else 0
    padding = section.positions - used
    parts = [
        f'<section id="s{number}"><h2>{escape(section.title)}</h2>',
        f'<p class="facts">{escape(section.facts)}</p>' if section.facts else "",
        _bar(section),
        *(_fragment(i, fragment, section.source, thumbnails) for i, fragment in enumerate(section.fragments)),
        f'<p class="rest" data-padding="{padding}">{padding} positions of padding, without loss</p>' if padding else "",
        "</section>",
    ]
    return "\n".join(parts)


def _bar(section: Section) -> str:
    """The sequence's positions from left to right: what they hold, and where documents meet."""
    out = [f'<svg class="bar" viewBox="0 0 {section.positions} 10" preserveAspectRatio="none">']
    for fragment in section.fragments:
        for run in fragment.runs:
            if run.positions:
                kind = "picture" if isinstance(run, Shown) else "words" if run.trained else "untrained"
                out.append(
                    f'<rect class="{kind}" x="{run.positions.start}" y="0" width="{len(run.positions)}" height="10"/>'
                )
    line = section.positions / 500
    for fragment in section.fragments[1:]:
        out.append(f'<rect class="border" x="{fragment.positions.start - line / 2:g}" width="{line:g}" height="10"/>')
    return "".join(out) + "</svg>"


def _fragment(number: int, fragment: Fragment, source: Source, thumbnails: Thumbnails) -> str:
    whole = len(fragment.tokens) == fragment.length
    tokens = f"{fragment.length} tokens" if whole else f"tokens {_span(fragment.tokens)} of {fragment.length}"
    facts = [f"document {fragment.document}", tokens, counts([fragment]), f"positions {_span(fragment.positions)}"]
    return (
        f'<article class="fragment {("even", "odd")[number % 2]}" data-document="{fragment.document}" '
        f'data-start="{fragment.tokens.start}" data-end="{fragment.tokens.stop}">'
        f'<header>{" · ".join(facts)}</header><div class="body">'
        + ('<span class="cut">… </span>' if fragment.tokens.start else "")
        + "".join(_run(run, source, thumbnails) for run in fragment.runs)
        + ('<span class="cut"> …</span>' if fragment.tokens.stop < fragment.length else "")
        + "</div></article>"
    )


def _run(run: Run, source: Source, thumbnails: Thumbnails) -> str:
    place = f'data-first="{run.first}" data-tokens="{run.tokens}" data-trained="{int(run.trained)}"'
    if isinstance(run, Shown):
        return _picture(run, place, source, thumbnails)
    if isinstance(run, Special):
        return f'<span class="special{" trained" * run.trained}" {place}>{escape(run.name)}</span>'
    assert isinstance(run, Words)
    kind = "words" if run.trained else "untrained-words"
    return f'<span class="{kind}" {place}>{to_html(run.text)}</span>'


def _picture(run: Shown, place: str, source: Source, thumbnails: Thumbnails) -> str:
    meta = source.meta(run.image.document)[run.image.number]
    data, crc32 = source.image(run.image.document, run.image.number)
    try:
        shown = f'<img alt="" src="{thumbnails.uri(data, crc32)}">'
    except BadImageError as error:
        shown = f'<span class="none">{escape(str(error))}</span>'
    positions = f"position{'s' * (len(run.positions) > 1)} {_span(run.positions)}"
    form = FORMATS[meta["format"]] if meta["format"] < len(FORMATS) else "?"
    return (
        f"<figure {place}>{shown}<figcaption>picture {run.image.number}: {meta['width']}×{meta['height']} {form}, "
        f"{int(meta['nbytes']) / 1000:.1f} kB<br>{positions}</figcaption></figure>"
    )


def _span(numbers: range) -> str:
    return f"{numbers.start}" if len(numbers) == 1 else f"{numbers.start}–{numbers.stop - 1}"
