"""Which pieces share a sequence: both limits, positions and images, used up at once.

Sequences are filled one after the other. The first piece of each is the largest left. Then, again and again, the
largest piece that goes in and leaves room for the images that the sequence should still get:

    share     images left / sequences still needed: all sequences then end with about the same number, and none is full
              of images while half of its positions are free, nor the other way round
    room      positions left
    price     positions kept free for each image of the share that is still missing

A piece with m images goes in if its positions are at most room - (share - m) · price; when none does, the price is
forgotten. The price is a little above what the cheapest image left costs with its text, so that large pieces and small
ones are used up together and those of middle size, which fill exactly, come last. While sequences end without their
share it rises towards the mean of all images left, and falls back otherwise.

Pieces of equal size are taken several at a time, so the work goes with the number of different sizes in a sequence.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from megatron_mm.data.pieces import Limits

_STEPS = 64  # of the price, from the cheapest image to the mean


@dataclass
class _Stock:
    """Pieces that are left with `images` images each: by their positions, ascending."""

    images: int
    sizes: list[int]
    first: list[int]  # of each size: place of the next piece in the sorted order
    left: list[int]  # of each size: pieces

    def take(self, i: int, count: int) -> int:
        """Place of the first of `count` pieces of size number i."""
        place = self.first[i]
        self.first[i] += count
        self.left[i] -= count
        if not self.left[i]:
            del self.sizes[i], self.first[i], self.left[i]
        return place


def fit(positions: np.ndarray, images: np.ndarray, limits: Limits) -> tuple[np.ndarray, int]:
    """The sequence of each piece, int32 in the order given, and the number of sequences."""
    order = np.lexsort((positions, images))
    stocks = _stocks(positions[order], images[order], limits)
    taken: list[tuple[int, int, int]] = []  # place in the order, pieces, sequence
    positions_left, images_left = int(positions.sum()), int(images.sum())
    number = step = 0
    while stocks:
        room, room_images = limits.positions, limits.images
        needed = max(-(-positions_left // limits.positions), -(-images_left // limits.images))
        share = -(-images_left // needed)
        cheapest = min((stock.sizes[0] // stock.images + 1 for stock in stocks if stock.images), default=0)
        mean = positions_left // images_left if images_left else 0
        then = cheapest + max(0, mean - cheapest) * step // _STEPS
        price = 0  # for the first piece
        while True:
            best = 0
            for candidate in stocks:
                m = candidate.images
                if m > room_images:
                    break
                most = room - (share - m) * price if m < share else room
                if most > best:
                    i = bisect_right(candidate.sizes, most) - 1
                    if i >= 0 and candidate.sizes[i] > best:
                        best, place, stock = candidate.sizes[i], i, candidate
            if not best:
                if not price:
                    break
                then = price = 0
                continue
            m, count = stock.images, stock.left[place]
            if count > 1:
                # After a piece that is cheaper than what is kept free for its images larger ones may go in.
                alone = room == limits.positions or best < price * min(m, share)
                count = 1 if alone else _count(count, best, m, room, room_images, share, price)
            taken.append((stock.take(place, count), count, number))
            if not stock.sizes:
                stocks.remove(stock)
            room, room_images, share = room - count * best, room_images - count * m, share - count * m
            positions_left, images_left = positions_left - count * best, images_left - count * m
            price = then
        step = min(_STEPS, step + 1) if share > 0 else max(0, step - 1)
        number += 1
    return _spread(order, taken), number


def _count(count: int, size: int, m: int, room: int, room_images: int, share: int, price: int) -> int:
    """How many of `count` equal pieces, the first of which goes in, go in one after the other."""
    count = min(count, room // size)
    if m:
        count = min(count, room_images // m)
    if m < share and size > m * price:
        # Piece number n goes in while n · size ≤ room - (share - n · m) · price, or when the share is reached with it.
        most = (room - share * price) // (size - m * price)
        if (most + 1) * m < share:
            count = min(count, most)
    return count


def _stocks(positions: np.ndarray, images: np.ndarray, limits: Limits) -> list[_Stock]:
    """Args: sorted by images, then positions."""
    changes = (np.diff(positions, prepend=-1) != 0) | (np.diff(images, prepend=-1) != 0)
    first = np.flatnonzero(changes)
    left = np.diff(first, append=len(positions))
    stocks = []
    for m in range(limits.images + 1):
        here = slice(*np.searchsorted(images[first], (m, m + 1)))
        if here.start < here.stop:
            stocks.append(_Stock(m, positions[first[here]].tolist(), first[here].tolist(), left[here].tolist()))
    return stocks


def _spread(order: np.ndarray, taken: list[tuple[int, int, int]]) -> np.ndarray:
    """The sequence of each piece from the runs taken of the sorted order."""
    places, counts, numbers = np.array(taken, dtype=np.int64).reshape(-1, 3).T
    within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    sequence = np.empty(len(order), dtype=np.int32)
    sequence[order[np.repeat(places, counts) + within]] = np.repeat(numbers, counts)
    return sequence
