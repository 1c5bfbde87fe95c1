import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.mixture import Mixture, permute
from megatron_mm.errors import UserError

some_weights = st.lists(
    st.sampled_from([45.0, 10.0, 0.1, 0.3, 1 / 3, 1.0, 7.0, 1e-3, 0.0]), min_size=1, max_size=6
).filter(any)


@settings(max_examples=60)
@given(some_weights, st.integers(0, 10**12))
def test_counts_are_exact_within_the_number_of_sources(weights, offset):
    mixture = Mixture([11] * len(weights), weights, 0)
    share = np.array(weights) / sum(weights)
    source, _ = mixture.locate_all(np.arange(3000))
    taken = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)  # [n, sources]
    n = np.arange(1, 3001)[:, None]
    assert np.abs(taken - share * n).max() <= len(weights)
    assert mixture.counts(3000) == taken[-1].tolist()
    # The same holds far on, where 64-bit products would overflow.
    exact = max(abs(c - float(w) * offset) for c, w in zip(mixture.counts(offset), share, strict=True))
    assert exact <= len(weights) + 1e-8 * offset
    assert sum(mixture.counts(offset)) == offset


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 100, 257, 1000])
def test_every_epoch_is_another_permutation(size):
    mixture = Mixture([5, size], [1.0, 2.0], seed=3)
    epochs = 4
    source, index = mixture.locate_all(np.arange(3 * size * epochs))
    orders = index[source == 1][: size * epochs].reshape(epochs, size)
    for order in orders:
        assert sorted(order) == list(range(size))
    if size >= 7:
        assert len({tuple(order) for order in orders}) == epochs


def test_places_are_spread():
    """Every place goes everywhere about equally often over many keys (chi-square, 49 degrees a place)."""
    size, keys = 50, 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, np.full(size, key, dtype=np.uint64))] += 1
    expected = keys / size
    statistic = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert statistic.mean() == pytest.approx(size - 1, rel=0.1)
    assert statistic.max() < 110


def test_one_at_a_time_is_the_same_as_many():
    mixture = Mixture([13, 1, 100_000], [45, 10, 45], seed=9)
    samples = np.array([0, 1, 2, 999, 10**9, 7 * 10**13])
    source, index = mixture.locate_all(samples)
    assert [mixture.locate(int(i)) for i in samples] == list(zip(source.tolist(), index.tolist(), strict=True))


def test_seed_moves_the_order_but_not_the_sources():
    a, b = (Mixture([1000, 1000], [1, 1], seed).locate_all(np.arange(500)) for seed in (0, 1))
    np.testing.assert_array_equal(a[0], b[0])
    assert (a[1] != b[1]).mean() > 0.9


def test_epochs():
    assert Mixture([10, 20, 0], [1, 3, 0], 0).epochs(40) == [1.0, 1.5, 0.0]


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([45.0, 0.1, 1 / 3, 1.0, 7.0, 0.0])), min_size=1, max_size=5
    ).filter(lambda sources: any(weight for _, weight in sources)),
    st.integers(0, 400),
)
def test_first_repeat_is_that_of_a_walk(sources, n):
    sizes, weights = zip(*sources, strict=True)
    mixture = Mixture(sizes, weights, seed=5)
    seen, first = set(), {}
    for sample, shown in enumerate(zip(*mixture.locate_all(np.arange(n)), strict=True)):
        if shown in seen:
            first.setdefault(int(shown[0]), sample)
        seen.add(shown)
    assert [mixture.first_repeat(k, n) for k in range(len(sizes))] == [first.get(k) for k in range(len(sizes))]


def test_first_repeat_of_a_long_run():
    mixture = Mixture([10**10, 10**10], [1.0, 3.0], 0)
    assert mixture.first_repeat(0, 4 * 10**10) is None
    first = mixture.first_repeat(0, 10**12)
    assert [mixture.counts(first + more)[0] for more in (0, 1)] == [10**10, 10**10 + 1]


def test_a_weight_for_nothing():
    with pytest.raises(UserError, match=r"data.sources.1: .*no sequence"):
        Mixture([10, 0], [1.0, 0.5], 0)
    with pytest.raises(UserError, match="no source has a weight"):
        Mixture([10, 10], [0.0, 0.0], 0)
    with pytest.raises(UserError, match=r"data.sources.0.weight"):
        Mixture([10, 10], [-1.0, 1.0], 0)
