"""Questions about images, MM1's few-shot prompts, and the controls that tell seeing from guessing."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mm.data.tokenizer import IMAGE_PIECE
from megatron_mm.errors import UserError
from megatron_mm.evaluation.generate import Prompt


@dataclass(frozen=True)
class Question:
    id: str
    image: Path
    text: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The most frequent answer; of equally frequent ones the first."""
        return Counter(self.answers).most_common(1)[0][0]


def read_questions(path: str | Path) -> list[Question]:
    """Read JSONL: {"image": path, "question": text, "answers": [text, …], "id": …}, paths relative to the file."""
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError("cannot read the questions", where=str(path), found=error.strerror) from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image, text, answers = path.parent / record["image"], record["question"], record["answers"]
            listed = isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)
            if not isinstance(text, str) or not listed:
                raise TypeError("question is text, answers a list of at least one text")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                "not a question", where=f"{path}:{number}", found=f"{type(error).__name__}: {error}",
                allowed='{"image": path, "question": text, "answers": [text, …], "id": …}',
            ) from None  # fmt: skip
        questions.append(Question(str(record.get("id", number)), image, text, tuple(answers)))
    if not questions:
        raise UserError("there are no questions", where=str(path))
    return questions


def query_text(question: Question) -> str:
    return f"{IMAGE_PIECE} Question: {question.text} Short answer:"


def demonstration_text(question: Question) -> str:
    return f"{query_text(question)} {question.answer}\n"


def few_shot_prompt(query: Question, shots: Sequence[Question], image: Path | None = None) -> Prompt:
    """Demonstrations, then the query (about `image` instead of its own, where given)."""
    text = "".join(map(demonstration_text, shots)) + query_text(query)
    return Prompt(text, (*(shot.image for shot in shots), image or query.image))


def shot_sampler(train: Sequence[Question], seed: int) -> Callable[[Question, int], list[Question]]:
    """Answers with a function that draws demonstrations for a query.

    A query's draw depends on the seed and its id alone. Questions about the query's own image are never drawn.
    """
    per_image = Counter(question.image for question in train)

    def draw(query: Question, count: int) -> list[Question]:
        eligible = len(train) - per_image[query.image]
        if eligible < count:
            raise UserError(
                "too few questions for the demonstrations", where="--train",
                found=f"{eligible} about other images than that of question {query.id}", allowed=f"at least {count}",
            )  # fmt: skip
        rng = random.Random(f"{seed}/{query.id}")
        chosen: dict[int, Question] = {}
        while len(chosen) < count:
            i = rng.randrange(len(train))
            if train[i].image != query.image:
                chosen[i] = train[i]
        return list(chosen.values())

    return draw


def shuffled_images(questions: Sequence[Question], seed: int) -> list[Path]:
    """Each question's image in the control: the same images in all, none with a question of its own.

    Questions are lined up image by image and each takes the image that stands as far on as the most questions any
    image has, so it is always another one.
    """
    by_image: dict[Path, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        by_image[question.image].append(i)
    step = max(map(len, by_image.values()))
    if 2 * step > len(questions):
        raise UserError(
            "cannot give every question another image", where="--test",
            found=f"{step} of {len(questions)} questions are about one image", allowed="at most half",
        )  # fmt: skip
    images = list(by_image)
    random.Random(seed).shuffle(images)
    line = [i for image in images for i in by_image[image]]
    taken = [Path()] * len(line)
    for place, i in enumerate(line):
        taken[i] = questions[line[(place + step) % len(line)]].image
    return taken


def question_only_guesses(train: Sequence[Question], questions: Sequence[Question]) -> list[str]:
    """What one answers without the image: the commonest training answer to the question, else to any question."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        by_text[question.text][question.answer] += 1
    overall = Counter(question.answer for question in train)
    return [(by_text.get(q.text) or overall).most_common(1)[0][0] for q in questions]
