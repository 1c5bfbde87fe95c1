"""VQA accuracy by number of shots, with both controls, in one run."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mm.errors import UserError
from megatron_mm.evaluation.fewshot import (
    Question,
    few_shot_prompt,
    question_only_guesses,
    read_questions,
    shot_sampler,
    shuffled_images,
)
from megatron_mm.evaluation.generate import VQA_STOPS, Generator, Prompt
from megatron_mm.evaluation.metrics import vqa_accuracy

StageProgress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class VQAResult:
    """`scores`: n, vqa_accuracy {shots: x}, n_by_shots, vqa_accuracy_shuffled (at 0 shots),
    vqa_accuracy_question_only, seconds. `records`, one a question and stage: stage ("0-shot", "shuffled", …), id,
    image, question, answer, prediction, correct (0 to 1)."""

    scores: dict[str, Any]
    records: list[dict[str, Any]]


def load_generator(folder: str | Path, **options: Any) -> Generator:
    """An exported model with its processor, on a GPU if there is one."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import megatron_mm.hf  # noqa: F401 (registers the classes)
    from megatron_mm.hf.importer import read_config

    read_config(folder)  # a clear error where the folder is none of ours
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", local_files_only=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Generator(model.to(device), AutoProcessor.from_pretrained(folder, local_files_only=True), **options)


def evaluate_vqa(
    generator: Generator,
    train_file: str | Path,
    test_file: str | Path,
    shots: Sequence[int] = (0, 4, 8),
    limit: int | None = None,
    few_shot_limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 6,
    progress: StageProgress = lambda stage, done, total: None,
) -> VQAResult:
    """Evaluate on a random sample of `test_file`.

    Args:
        train_file: questions for demonstrations and for the question-only guess.
        shots: numbers of demonstrations.
        limit: questions at 0 shots and for both controls; None: all.
        few_shot_limit: the first so many of these with demonstrations; None: the same.
    """
    start = time.monotonic()
    train, test = read_questions(train_file), read_questions(test_file)
    for name, value in (("limit", limit), ("few_shot_limit", few_shot_limit)):
        if value is not None and value < 1:
            raise UserError("must be at least 1", where=name, found=value)
    if min(shots, default=0) < 0:
        raise UserError("must be 0 or more", where="shots", found=list(shots))
    test = random.Random(seed).sample(test, min(limit or len(test), len(test)))
    draw = shot_sampler(train, seed)
    records: list[dict[str, Any]] = []

    def score(stage: str, questions: Sequence[Question], predictions: Sequence[str], images: Sequence[Path]) -> float:
        found = [vqa_accuracy(p, q.answers) for q, p in zip(questions, predictions, strict=True)]
        for question, prediction, image, correct in zip(questions, predictions, images, found, strict=True):
            about = {"id": question.id, "image": str(image), "question": question.text, "answer": question.answer}
            records.append({"stage": stage, **about, "prediction": prediction, "correct": correct})
        return sum(found) / len(found)

    def run(stage: str, questions: Sequence[Question], prompts: list[Prompt]) -> float:
        predictions = generator(prompts, max_new_tokens, VQA_STOPS, lambda done, total: progress(stage, done, total))
        return score(stage, questions, predictions, [prompt.images[-1] for prompt in prompts])

    accuracy, counts = {}, {}
    for count in sorted(set(shots)):
        asked = test if count == 0 else test[: few_shot_limit or len(test)]
        prompts = [few_shot_prompt(question, draw(question, count)) for question in asked]
        accuracy[str(count)], counts[str(count)] = run(f"{count}-shot", asked, prompts), len(asked)
    swapped = shuffled_images(test, seed)
    shuffled = [few_shot_prompt(question, [], image) for question, image in zip(test, swapped, strict=True)]
    guesses = question_only_guesses(train, test)
    scores = {
        "n": len(test),
        "vqa_accuracy": accuracy,
        "n_by_shots": counts,
        "vqa_accuracy_shuffled": run("shuffled", test, shuffled),
        "vqa_accuracy_question_only": score("question only", test, guesses, [q.image for q in test]),
        "seconds": round(time.monotonic() - start, 1),
    }
    return VQAResult(scores, records)
