"""Which sequence sample i of a run is: a pure function of weights, sizes, seed and i, without any table.

Which source: the sources stand in a row; the first takes sample i when floor((i + 1) w₀/W) > floor(i w₀/W), else the
sample is number i - floor(i w₀/W) among the rest, which is shared out in the same way. Integers throughout, so the
count of each source among the first n samples is within `number of sources` of its share, for any n.

Which of its sequences: its k-th sample is place k mod size of epoch k div size, and an epoch is a permutation of its
own: a Feistel network over the next power of two, keyed by seed, source and epoch, walked until it falls inside.
"""

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from megatron_mm.data.pieces import splitmix64
from megatron_mm.errors import UserError

_ROUNDS = 6
_MAX_TOTAL = 1 << 30  # of integer weights: its square must fit into 63 bits


def _integer_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the very ratio of the weights as written (0.1 is a tenth); beyond 30 bits, the nearest."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(f.denominator for f in exact))
    whole = [int(f * scale) for f in exact]
    total = sum(whole)
    if total > _MAX_TOTAL:
        whole = [max(1, w * _MAX_TOTAL // total) if w else 0 for w in whole]
    return whole


def permute(place: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """The permutation of range(size) that `key` (uint64 [n]) names, at the places (int64 [n]); int64 [n]."""
    bits = max(2, (size - 1).bit_length())
    low = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    x = place.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right, keys = x[todo] >> low, x[todo] & low_mask, key[todo]
        for _ in range(_ROUNDS):
            keys = splitmix64(keys)
            left = left ^ (splitmix64(right ^ keys) & high_mask)
            right = right ^ (splitmix64(left + keys) & low_mask)
        x[todo] = left << low | right
        todo = todo[x[todo] >= np.uint64(size)]
    return x.astype(np.int64)


class Mixture:
    """Samples of several sources in exact shares.

    Args:
        sizes: sequences of each source.
        weights: relative, 0 or more.
        seed: of the order within each source.
    Raises:
        UserError: a source with a weight is empty, or no source has one.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            if weight < 0:
                raise UserError("out of range", where=f"data.sources.{i}.weight", found=weight, allowed="0 or more")
            if weight and not size:
                raise UserError(
                    "a source with a weight has no sequence to train on", where=f"data.sources.{i}",
                    found="0 sequences",
                    do="give it documents, lower data.validation_fraction, or leave it out",
                )  # fmt: skip
        self.sizes, self.seed = list(sizes), seed % (1 << 64)
        self._weights = _integer_weights(weights)
        if not sum(self._weights):
            raise UserError("no source has a weight", where="data.sources", found=list(weights))
        # The shares are taken one after the other: entry k is (weight of k, weight of k and all after it).
        self._shares = [(w, sum(self._weights[k:])) for k, w in enumerate(self._weights)]

    @staticmethod
    def _taken(n: np.ndarray, weight: int, total: int) -> np.ndarray:
        """floor(n · weight / total), for any n in 62 bits."""
        whole, rest = np.divmod(n, total)
        return whole * weight + rest * weight // total

    def locate_all(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and sequence within it of each sample, int64 [n] each. Samples are 0 or more."""
        rank = samples.astype(np.int64)  # number of the sample among those of the sources not yet decided on
        source = np.full(len(rank), -1, dtype=np.int64)
        for k, (weight, total) in enumerate(self._shares):
            if not weight:
                continue
            open_ = source < 0
            before = self._taken(rank, weight, total)
            takes = open_ & (self._taken(rank + 1, weight, total) > before)
            source[takes] = k
            rank = np.where(takes, before, np.where(open_, rank - before, rank))
        index = np.empty_like(rank)
        for k, size in enumerate(self.sizes):
            mine = source == k
            if mine.any():
                epoch, place = np.divmod(rank[mine], size)
                keys = np.full(len(epoch), self.seed, dtype=np.uint64)
                for part in (np.uint64(k), epoch.astype(np.uint64)):
                    keys = splitmix64(keys) + part
                index[mine] = permute(place, size, keys)
        return source, index

    def locate(self, i: int) -> tuple[int, int]:
        """Source and sequence within it of sample i."""
        source, index = self.locate_all(np.array([i]))
        return int(source[0]), int(index[0])

    def counts(self, n: int) -> list[int]:
        """Samples of each source among the first n."""
        left, counts = np.array([n]), []
        for weight, total in self._shares:
            taken = self._taken(left, weight, total) if weight else np.zeros_like(left)
            counts.append(int(taken[0]))
            left = left - taken
        return counts

    def epochs(self, n: int) -> list[float]:
        """How often each source is gone through by n samples."""
        return [count / size if size else 0.0 for count, size in zip(self.counts(n), self.sizes, strict=True)]

    def first_repeat(self, source: int, n: int) -> int | None:
        """The first of n samples that shows a sequence of the source for the second time; None: no sample does."""
        size = self.sizes[source]
        if self.counts(n)[source] <= size:
            return None
        return bisect_left(range(n), size + 1, key=lambda sample: self.counts(sample + 1)[source])
