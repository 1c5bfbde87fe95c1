"""easy-VQA as a multimodal pre-training corpus: the package's pictures and questions → JSONL of the three kinds.

    python examples/quickstart/prepare.py --output runs/quickstart/data

    images/{train,test}/N.png   the package's pictures, 64×64
    captions.jsonl              one line a training picture: " a blue rectangle"
    interleaved.jsonl           1 to 9 pictures a line, each followed by one question and its answer
    text.jsonl                  questions and answers without pictures
    train_vqa.jsonl             all training questions, for few-shot demonstrations
    test_vqa.jsonl              all test questions, shuffled, about pictures that no other file shows

Captions are derived from the package's own questions and answers; a picture whose colour or shape none of them tells
gets no caption. Question turns have the very form of the evaluation's prompt.
"""

import argparse
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import easy_vqa

COLORS = frozenset("black blue brown gray green red teal yellow".split())
SHAPES = frozenset("circle rectangle triangle".split())
MAX_IMAGES = 9  # in an interleaved document: an 8-shot prompt is then no new kind of sequence


def image_path(split: str, number: int) -> str:
    return f"images/{split}/{number}.png"


class Question(NamedTuple):
    image: int  # the package's number, within its split
    text: str
    answer: str


def turn(question: Question) -> str:
    return f" Question: {question.text} Short answer: {question.answer}\n"


def told_by(question: Question) -> set[str]:
    """The colours and shapes that a question with its answer says are in the picture."""
    words = question.text.rstrip("?").split()
    named = {w for w in words if w in COLORS or w in SHAPES}
    if question.answer in ("yes", "no"):
        negated = "not" in words or "no" in words
        return named if (question.answer == "yes") != negated else set()
    return named | {question.answer}


def captions(questions: list[Question]) -> dict[int, str]:
    """Image number → caption, for the images whose one colour and one shape are told."""
    told: dict[int, set[str]] = defaultdict(set)
    for question in questions:
        told[question.image] |= told_by(question)
    found = {}
    for image, words in sorted(told.items()):
        colors, shapes = words & COLORS, words & SHAPES
        if len(colors) == len(shapes) == 1:
            found[image] = f" a {colors.pop()} {shapes.pop()}"
    return found


def grouped(questions: list[Question], rng: random.Random) -> Iterable[list[Question]]:
    """Every question once, in groups of 1 to MAX_IMAGES with as many different pictures (as far as they go)."""
    shuffled = rng.sample(questions, len(questions))
    while shuffled:
        size = rng.randint(1, MAX_IMAGES)
        group: dict[int, Question] = {}
        while shuffled and len(group) < size and shuffled[-1].image not in group:
            question = shuffled.pop()
            group[question.image] = question
        yield list(group.values())


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(record) + "\n" for record in records]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(lines))
    temporary.replace(path)
    print(f"  {path}: {len(lines)} lines", flush=True)


def load(split: str, limit: int | None) -> tuple[dict[int, Path], list[Question]]:
    """One split of the package, or its first `limit` pictures."""
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    texts, answers, numbers = getattr(easy_vqa, f"get_{split}_questions")()
    kept = sorted(paths)[:limit]
    questions = [Question(n, t, a) for n, t, a in zip(numbers, texts, answers, strict=True) if n in set(kept)]
    return {n: Path(paths[n]) for n in kept}, questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder, made if absent")
    parser.add_argument("--limit", type=int, help="pictures a split (default: all 4000 and 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the documents' composition and order")
    args = parser.parse_args()
    out, rng = args.output, random.Random(args.seed)

    train_images, train = load("train", args.limit)
    test_images, test = load("test", args.limit)
    for split, images in (("train", train_images), ("test", test_images)):
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        for number, path in images.items():
            shutil.copyfile(path, out / image_path(split, number))

    write_jsonl(
        out / "captions.jsonl",
        ({"image": image_path("train", number), "text": text} for number, text in captions(train).items()),
    )
    write_jsonl(
        out / "interleaved.jsonl",
        (
            {"content": [part for q in group for part in ({"image": image_path("train", q.image)}, {"text": turn(q)})]}
            for group in grouped(train, rng)
        ),
    )
    write_jsonl(out / "text.jsonl", ({"text": "".join(map(turn, group))} for group in grouped(train, rng)))
    for split, questions in (("train", train), ("test", rng.sample(test, len(test)))):
        write_jsonl(
            out / f"{split}_vqa.jsonl",
            (
                {"image": image_path(split, q.image), "question": q.text, "answers": [q.answer], "id": f"{split}-{i}"}
                for i, q in enumerate(questions)
            ),
        )


if __name__ == "__main__":
    main()
