"""Prompts word for word, demonstrations that never show the query, and controls."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_mm.errors import UserError
from megatron_mm.evaluation.fewshot import (
    Question,
    few_shot_prompt,
    question_only_guesses,
    read_questions,
    shot_sampler,
    shuffled_images,
)


def question(number: int, image: str = "", text: str = "what color?", *answers: str) -> Question:
    return Question(str(number), Path(image or f"{number}.png"), text, answers or ("red",))


TRAIN = [question(i, f"{i // 3}.png", f"question {i}?", f"answer {i}") for i in range(60)]


def test_prompt_without_demonstrations():
    prompt = few_shot_prompt(question(1, "x.png", "what shape is shown?"), [])
    assert prompt.text == "<image> Question: what shape is shown? Short answer:"
    assert prompt.images == (Path("x.png"),)


def test_prompt_with_demonstrations():
    shots = [question(1, "a.png", "is it red?", "no", "yes", "yes"), question(2, "b.png", "what color?", "light blue")]
    prompt = few_shot_prompt(question(3, "c.png", "is it a circle?"), shots)
    assert prompt.text == (
        "<image> Question: is it red? Short answer: yes\n"
        "<image> Question: what color? Short answer: light blue\n"
        "<image> Question: is it a circle? Short answer:"
    )
    assert prompt.images == (Path("a.png"), Path("b.png"), Path("c.png"))


def test_prompt_about_another_image():
    assert few_shot_prompt(question(3, "c.png"), [], Path("d.png")).images == (Path("d.png"),)


def test_query_is_never_among_its_shots():
    """Also with the training questions themselves as queries, and with all that is left taken."""
    draw = shot_sampler(TRAIN, seed=0)
    for query in TRAIN:
        for count in (4, 57):
            shots = draw(query, count)
            assert len(set(shots)) == count
            assert query not in shots
            assert query.image not in {shot.image for shot in shots}
    with pytest.raises(UserError, match="too few questions") as caught:
        draw(TRAIN[0], 58)
    assert "57 about other images" in str(caught.value)


def test_shots_depend_on_seed_and_query_alone():
    first, second = shot_sampler(TRAIN, seed=0), shot_sampler(TRAIN, seed=0)
    queries = [question(1000 + i) for i in range(40)]
    forwards = [first(query, 8) for query in queries]
    assert forwards == [second(query, 8) for query in reversed(queries)][::-1]
    assert forwards[0] != forwards[1]
    assert forwards[0] != shot_sampler(TRAIN, seed=1)(queries[0], 8)
    assert forwards[0][:4] == first(queries[0], 4)
    drawn = Counter(shot for shots in forwards for shot in shots)
    assert len(drawn) > 55  # of 60: 320 draws, not the same few again


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [1] * 9, [5, 1, 3, 1], [7, 7, 1], [1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("seed", range(5))
def test_shuffled_images_are_a_derangement(sizes, seed):
    questions = [question(10 * i + j, f"{i}.png") for i, size in enumerate(sizes) for j in range(size)]
    taken = shuffled_images(questions, seed)
    assert all(image != q.image for image, q in zip(taken, questions, strict=True))
    assert Counter(taken) == Counter(q.image for q in questions)
    assert taken == shuffled_images(questions, seed)


def test_shuffling_needs_other_images():
    with pytest.raises(UserError, match="another image") as caught:
        shuffled_images([question(i, "same.png") for i in range(3)] + [question(9)], 0)
    assert "3 of 4 questions" in str(caught.value)


def test_question_only_guesses():
    train = [
        question(0, "", "what color?", "blue"),
        question(1, "", "what color?", "red"),
        question(2, "", "what color?", "red"),
        question(3, "", "is it?", "no"),
        question(4, "", "was it?", "no"),
        question(5, "", "will it?", "no"),
    ]
    asked = [question(6, "", "what color?"), question(7, "", "is it?"), question(8, "", "never asked?")]
    assert question_only_guesses(train, asked) == ["red", "no", "no"]


def test_reading(tmp_path):
    records = [
        {"image": "images/0.png", "question": "what?", "answers": ["a", "b"], "id": 17},
        {"image": "/abs/1.png", "question": "why?", "answers": ["c"]},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert read_questions(file) == [
        Question("17", tmp_path / "images/0.png", "what?", ("a", "b")),
        Question("2", Path("/abs/1.png"), "why?", ("c",)),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"image": "x", "question": "?"}',
        '{"image": "x", "question": "?", "answers": []}',
        '{"image": "x", "question": "?", "answers": "red"}',
        '{"image": 3, "question": "?", "answers": ["red"]}',
        '{"image": "x", "question": null, "answers": ["red"]}',
    ],
)
def test_bad_questions_are_named(line, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"image": "x", "question": "?", "answers": ["red"]}\n' + line + "\n")
    with pytest.raises(UserError, match=r"q\.jsonl:2: not a question"):
        read_questions(file)


def test_no_questions(tmp_path):
    with pytest.raises(UserError, match="cannot read the questions"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="there are no questions"):
        read_questions(tmp_path / "empty.jsonl")
