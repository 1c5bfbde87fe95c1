"""Work done ahead keeps the order, stays within its bound, and ends with its consumer."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.ahead import ahead


def count(n, log=None):
    for i in range(n):
        if log is not None:
            log.append(i)
        yield i


@given(st.integers(0, 30), st.integers(1, 8))
@settings(max_examples=40)
def test_in_order(n, depth):
    assert list(ahead(count(n), lambda i: i * i, depth)) == [i * i for i in range(n)]


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 3])
def test_bound(depth):
    begun: list[int] = []
    results = ahead(count(50, begun), lambda i: i, depth)
    for taken in range(1, 10):
        assert next(results) == taken - 1
        wait_until(lambda taken=taken: len(begun) == taken + depth)
        time.sleep(0.02)
        assert len(begun) == taken + depth
    results.close()


def test_errors_come_in_their_place():
    def work(i):
        if i == 3:
            raise ValueError("the fourth")
        return i

    results = ahead(count(10), work, 8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(results)

    def failing():
        yield 0
        raise KeyError("of the items")

    results = ahead(failing(), lambda i: i, 8)
    assert next(results) == 0
    with pytest.raises(KeyError, match="of the items"):
        next(results)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_it_ends_with_its_consumer(taken):
    ended = []

    def items():
        try:
            yield from count(1000)
        finally:
            ended.append(True)

    before = threading.active_count()
    results = ahead(items(), lambda i: i, 4)
    for _ in range(taken):
        next(results)
    results.close()
    assert threading.active_count() == before
    assert ended == ([True] if taken else [])
