"""VQA accuracy against cases worked out from the challenge's rules."""

import pytest

from megatron_mm.evaluation.metrics import normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes", "yes"),
        (" blue ", "blue"),
        ("A dog", "dog"),
        ("the an a", ""),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("Ten", "10"),
        ("dont know", "don't know"),
        ("its", "its"),  # may be right as it is
        ("well", "well"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("o'clock", "o'clock"),
        ("red.", "red"),
        ("2.5", "2.5"),
        ("3.", "3"),
        ("u.s.a.", "usa"),
        ("left/right", "left right"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("1,000", "1000"),
        ("1,000 left/right", "1000 leftright"),  # with a number like this all marks are dropped
        ("(maybe)", "maybe"),
        ("is it? yes!", "is it yes"),
        ("t-shirt", "t shirt"),
        ("t - shirt", "t shirt"),
        ("line\nbreak\ttab", "line break tab"),
        ("two\nThe", "2"),
        ("", ""),
    ],
)
def test_normalization(text, wanted):
    assert normalize_answer(text) == wanted


def test_normalization_is_stable():
    for text in ("The Two dogs, dont!", "couldnt've (maybe)", "a.b.c 1,000"):
        once = normalize_answer(text)
        assert normalize_answer(once) == once


@pytest.mark.parametrize(
    ("equal", "wanted"),
    # Left out one by one: an equal answer leaves equal - 1, another leaves all.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)],
)
def test_ten_answers(equal, wanted):
    answers = ["red"] * equal + [f"other {i}" for i in range(10 - equal)]
    assert vqa_accuracy("Red.", answers) == pytest.approx(wanted)


def test_few_answers():
    assert vqa_accuracy("The Circle", ["circle"]) == 1
    assert vqa_accuracy("circles", ["circle"]) == 0
    assert vqa_accuracy("", ["circle"]) == 0
    assert vqa_accuracy("2", ["one", "two"]) == 1
