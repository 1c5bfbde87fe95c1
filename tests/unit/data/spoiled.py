"""JSON with one value in it replaced by whatever JSON can say, and by what only Python's parser takes."""

import copy
from typing import Any

from hypothesis import strategies as st

VALUES: list[Any] = [
    None, True, False, 0, -1, 2, 10**30, 0.5, float("nan"), "", " ", "text", "\ud800", "a\0b", "x" * 5000, "<image>",
    "/", "../..", [], [None], [[]], ["x"], {}, {"x": [[[[[[]]]]]]},
]  # fmt: skip


@st.composite
def spoiled(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a JSON value with one or two of its values, at any depth, replaced or taken out."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        place, parent, key = value, None, None
        while isinstance(place, (dict, list)) and place and (parent is None or draw(st.booleans())):
            parent, key = place, draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            place = parent[key]
        new = copy.deepcopy(VALUES[draw(st.integers(0, len(VALUES) - 1))])
        if parent is None:
            return new
        if draw(st.booleans()):
            parent[key] = new
        else:
            del parent[key]
    return value
