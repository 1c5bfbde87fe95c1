"""Best fit is what its docstring says, piece by piece."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_mm.data.fit import fit
from megatron_mm.data.pieces import Limits


def naive_fit(pieces: list[tuple[int, int]], limits: Limits) -> list[int]:
    """Piece by piece, over all that are left: what fit's docstring says, with nothing sorted and nothing counted."""
    sequence, step = [-1] * len(pieces), 0
    left = dict(enumerate(pieces))
    number = 0
    while left:
        positions, images = map(sum, zip(*left.values(), strict=True))
        needed = max(-(-positions // limits.positions), -(-images // limits.images))
        share = -(-images // needed)
        cheapest = min((min(p for p, n in left.values() if n == m) // m + 1 for _, m in left.values() if m), default=0)
        mean = positions // images if images else 0
        price = cheapest + max(0, mean - cheapest) * step // 64
        room, room_images, reserved, first = limits.positions, limits.images, True, True
        while True:
            reserve = price if reserved and not first else 0
            fitting = [
                (-p, m, i) for i, (p, m) in left.items() if p <= room - max(0, share - m) * reserve and m <= room_images
            ]
            if fitting:
                size, m, i = min(fitting)
                sequence[i] = number
                del left[i]
                room, room_images, share, first = room + size, room_images - m, share - m, False
            elif reserved and not first:
                reserved = False
            else:
                break
        step = min(64, step + 1) if share > 0 else max(0, step - 1)
        number += 1
    return sequence


def pieces(largest: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.integers(1, largest), st.integers(0, 5)), min_size=1, max_size=60)


@settings(max_examples=600)
@given(pieces(40) | pieces(8))  # small ones, of which several are equal and go in together
@example([(4, 0), (4, 1), (4, 1), (32, 0)])
def test_fit_is_the_naive_one(items):
    limits = Limits(positions=40, images=5, tokens_per_image=1)
    sequence, count = fit(*np.array(items).T, limits)
    assert sequence.tolist() == naive_fit(items, limits)
    assert count == max(sequence) + 1
