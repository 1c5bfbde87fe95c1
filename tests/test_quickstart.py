"""The quickstart's every step, at a scale of seconds: what `make quickstart` does, on fewer pictures and steps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def quickstart(output: Path) -> str:
    done = subprocess.run(
        [sys.executable, "examples/quickstart/run.py", "--smoke", "--output", str(output)],
        cwd=ROOT, env=os.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.mark.timeout(1200)
def test_quickstart_takes_every_step_and_again(tmp_path: Path) -> None:
    output = tmp_path / "quickstart"
    told = quickstart(output)
    assert "reusing" not in told

    scores = json.loads((output / "scores.json").read_text())
    assert scores["n"] == 20
    assert list(scores["vqa_accuracy"]) == ["0", "4", "8"]
    for value in (
        *scores["vqa_accuracy"].values(),
        scores["vqa_accuracy_shuffled"],
        scores["vqa_accuracy_question_only"],
    ):
        assert 0 <= value <= 1
    assert scores["vqa_accuracy_question_only"] > 0  # the majority answer needs no training
    assert scores["resumed_at_step"] in (6, 9, 12)
    assert f"resumed after step {scores['resumed_at_step']}" in told

    # Every step counts once, though some were done twice.
    metrics = [json.loads(line) for line in (output / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 13))
    assert {"validation/captions", "validation/interleaved", "validation/text"} <= set().union(*metrics)

    config = yaml.safe_load((output / "train" / "config.yaml").read_text())
    assert [s["weight"] for s in config["data"]["sources"]] == [45, 45, 10]
    assert (output / "model" / "config.json").exists()
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 20
    assert f">{scores['vqa_accuracy']['0']:.1%}<" in page

    made = (output / "data" / "captions.manifest.json").stat().st_mtime_ns
    assert "reusing" in quickstart(output)
    assert (output / "data" / "captions.manifest.json").stat().st_mtime_ns == made


def test_documents_have_the_form_of_the_prompt(tmp_path: Path) -> None:
    """Interleaved turns read exactly as the few-shot prompt; no test picture is in any training file."""
    command = [sys.executable, "examples/quickstart/prepare.py", "--output", str(tmp_path), "--limit", "40"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    questions = lines("train_vqa.jsonl")
    expected = {(q["image"], f" Question: {q['question']} Short answer: {q['answers'][0]}\n") for q in questions}
    turns = []
    for document in lines("interleaved.jsonl"):
        content = document["content"]
        images, texts = content[0::2], content[1::2]
        assert 1 <= len(images) == len(texts) <= 9
        turns += [(i["image"], t["text"]) for i, t in zip(images, texts, strict=True)]
    assert len(turns) == len(questions)  # each once
    assert set(turns) == expected

    captions = {c["image"]: c["text"] for c in lines("captions.jsonl")}
    assert captions["images/train/0.png"] == " a blue rectangle"
    for question in questions:
        if question["image"] in captions and question["answers"][0] not in ("yes", "no"):
            assert question["answers"][0] in captions[question["image"]].split()

    test_images = {q["image"] for q in lines("test_vqa.jsonl")}
    assert all(i.startswith("images/test/") and (tmp_path / i).exists() for i in test_images)
