"""Ranges joined into few requests."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm.data.storage.coalesce import coalesce

ranges = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 300)).map(lambda p: (p[0], p[0] + p[1])), max_size=40)


@given(wanted=ranges, gap=st.integers(0, 100), limit=st.integers(1, 700))
def test_coalesce(wanted, gap, limit):
    spans = coalesce(wanted, gap, limit)
    served = [number for span in spans for number in span.ranges]
    assert sorted(served) == [i for i, (start, end) in enumerate(wanted) if start < end]
    for span in spans:
        mine = [wanted[i] for i in span.ranges]
        assert span.start == min(start for start, _ in mine)
        assert span.end == max(end for _, end in mine)
        assert span.end - span.start <= limit or any(m == (span.start, span.end) for m in mine)
        covered = np.zeros(span.end - span.start, dtype=bool)
        for start, end in mine:
            covered[start - span.start : end - span.start] = True
        holes = "".join("x" if c else " " for c in covered).split("x")
        assert max(map(len, holes)) <= gap
    for a, b in itertools.pairwise(spans):  # neighbours are apart for a reason
        assert a.start <= b.start
        assert b.start > a.end + gap or (b.ranges and wanted[b.ranges[0]][1] - a.start > limit)
