"""Which byte ranges share a request: an answer costs tens of milliseconds before its first byte comes."""

from collections.abc import Sequence
from dataclasses import dataclass

GAP = 1 << 18  # bytes read for nothing rather than ask twice: a connection carries as many in a few milliseconds
LIMIT = 1 << 23  # bytes of a merged request; above it several in parallel are faster


@dataclass
class Span:
    """One request, and the numbers of the ranges that it serves."""

    start: int
    end: int
    ranges: list[int]


def coalesce(ranges: Sequence[tuple[int, int]], gap: int = GAP, limit: int = LIMIT) -> list[Span]:
    """Spans in ascending order that cover all ranges [start, end) but the empty ones, each range inside one span.

    Neighbours with at most `gap` bytes between them are merged up to `limit` bytes; a single range is never split.
    """
    spans: list[Span] = []
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        start, end = ranges[number]
        if start == end:
            continue
        last = spans[-1] if spans else None
        if last and start <= last.end + gap and (end <= last.end or end - last.start <= limit):
            last.end = max(last.end, end)
            last.ranges.append(number)
        else:
            spans.append(Span(start, end, [number]))
    return spans
