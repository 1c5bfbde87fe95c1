"""The whole evaluation, by its command, of a model that was taught to see colours: it sees, its controls do not."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import megatron_mm.hf  # noqa: F401 (registers the classes)
from megatron_mm.errors import UserError
from megatron_mm.evaluation.fewshot import demonstration_text, read_questions
from megatron_mm.evaluation.vqa import evaluate_vqa, load_generator

ROOT = Path(__file__).resolve().parents[3]
STEPS = 100
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """train.jsonl and test.jsonl: two questions a picture, one about its colour and one always answered "yes"."""
    root, rng = tmp_path_factory.mktemp("questions"), random.Random(0)
    for split, count in (("train", 60), ("test", 45)):
        lines = []
        for i in range(count):
            color = list(COLORS)[i % 3]
            shade = tuple(c + rng.randint(-20, 20) for c in COLORS[color])
            Image.new("RGB", (28, 28), shade).save(root / f"{split}{i}.png")
            for j, (text, answer) in enumerate((("what color is shown?", color), ("is shape shown?", "yes"))):
                record = {"image": f"{split}{i}.png", "question": text, "answers": [answer], "id": 2 * i + j}
                lines.append(json.dumps(record) + "\n")
        (root / f"{split}.jsonl").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def taught(folder, questions, tmp_path_factory):
    """The folder of a model that was trained on single questions."""
    torch.manual_seed(0)
    rng = random.Random(0)
    processor = AutoProcessor.from_pretrained(folder)
    exported = AutoModelForImageTextToText.from_pretrained(folder)
    exported.config.text_config.initializer_range = 0.15  # about 1/√width: these widths are tiny
    model = type(exported)(exported.config)
    model.generation_config = exported.generation_config
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    train = read_questions(questions / "train.jsonl")
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 10) * (1 - step / STEPS)
        batch = rng.sample(train, 32)
        pictures, texts = [Image.open(q.image) for q in batch], list(map(demonstration_text, batch))
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        ignored = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == processor.image_token_id)
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(ignored, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = tmp_path_factory.mktemp("taught") / "model"
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_command(taught, questions, tmp_path):
    done = evaluate(
        "--model", taught, "--train", questions / "train.jsonl", "--test", questions / "test.jsonl",
        "--shots", 0, 2, "--few-shot-limit", 20, "--output", tmp_path / "out/scores.json",
        "--records", tmp_path / "records.jsonl",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0-shot: 90/90 questions" in done.stdout
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["n"] == 90
    assert scores["n_by_shots"] == {"0": 90, "2": 20}
    assert scores["vqa_accuracy"]["0"] > 0.95
    assert 0 <= scores["vqa_accuracy"]["2"] <= 1
    # Half of the questions need no image. Of the others a third is right without it, fewer with a wrong one.
    assert scores["vqa_accuracy_question_only"] == pytest.approx(0.5 + 0.5 / 3)
    assert 0.5 <= scores["vqa_accuracy_shuffled"] < 0.8
    assert scores["seconds"] > 0
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    by_stage = {stage: [r for r in records if r["stage"] == stage] for stage in {r["stage"] for r in records}}
    assert {stage: len(rows) for stage, rows in by_stage.items()} == {
        "0-shot": 90, "2-shot": 20, "shuffled": 90, "question only": 90
    }  # fmt: skip
    for stage, name in (("shuffled", "vqa_accuracy_shuffled"), ("question only", "vqa_accuracy_question_only")):
        assert sum(r["correct"] for r in by_stage[stage]) / 90 == pytest.approx(scores[name])
    own = {r["id"]: r["image"] for r in by_stage["0-shot"]}
    assert all(r["image"] != own[r["id"]] for r in by_stage["shuffled"])
    assert all(set(r) == {"stage", "id", "image", "question", "answer", "prediction", "correct"} for r in records)


def test_limit_draws_at_random_and_repeats(taught, questions):
    files = (questions / "train.jsonl", questions / "test.jsonl")
    generator = load_generator(taught)
    first, again, other = (evaluate_vqa(generator, *files, [0], limit=30, seed=seed) for seed in (0, 0, 1))
    assert first.records == again.records
    assert first.scores["n"] == 30
    asked = [[r["id"] for r in result.records if r["stage"] == "0-shot"] for result in (first, other)]
    assert asked[0] != sorted(asked[0], key=int)
    assert set(asked[0]) != set(asked[1])


def test_model_that_is_none(questions, tmp_path):
    done = evaluate(
        "--model", tmp_path / "none", "--train", questions / "train.jsonl", "--test", questions / "test.jsonl",
        "--output", tmp_path / "scores.json",
    )  # fmt: skip
    assert done.returncode == 2
    assert "not an exported model" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_mistakes(folder, questions):
    generator, files = load_generator(folder), [questions / "train.jsonl", questions / "test.jsonl"]
    with pytest.raises(UserError, match="cannot read the questions"):
        evaluate_vqa(generator, files[0], questions / "none.jsonl")
    with pytest.raises(UserError, match=r"^limit: must be at least 1"):
        evaluate_vqa(generator, *files, limit=0)
    with pytest.raises(UserError, match="few_shot_limit: must be at least 1"):
        evaluate_vqa(generator, *files, few_shot_limit=-1)
    with pytest.raises(UserError, match="shots: must be 0 or more"):
        evaluate_vqa(generator, *files, shots=[0, -1])


def test_too_few_demonstrations(folder, questions):
    with pytest.raises(UserError, match="too few questions for the demonstrations"):
        evaluate_vqa(load_generator(folder), questions / "train.jsonl", questions / "test.jsonl", [200])
