"""A tokenizer, pictures, and small sources of the three kinds, made once a session."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_mm.config import Kind, RunConfig, config_from_dict
from megatron_mm.data.ingest.build import build_source
from megatron_mm.data.ingest.workers import Processes
from megatron_mm.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

WORDS = "red green blue black circle square small large left right above below one two three".split()


def picture(seed: int, width: int = 48, height: int = 40, colours: int = 3) -> np.ndarray:
    """uint8 [height, width, colours]: smooth, so that JPEG keeps it nearly."""
    ramp = np.add.outer(np.arange(height), np.arange(width))
    return ((ramp[..., None] * (1 + np.arange(colours)) * 2 + 37 * seed) % 256).astype(np.uint8)


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sentence(rng: random.Random, words: int) -> str:
    return "".join(" " + rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    rng = random.Random(0)
    train_tokenizer((sentence(rng, 8) + "\n" for _ in range(300)), path, 320, seed=0)
    return open_tokenizer(path)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 0.jpg, 1.png, 2.webp, 3.jpg, … 11.webp."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(12):
        Image.fromarray(picture(i, 30 + i, 50 - i)).save(folder / f"{i}.{('jpg', 'png', 'webp')[i % 3]}", quality=90)
    return folder


def image_name(i: int) -> str:
    return f"{i % 12}.{('jpg', 'png', 'webp')[i % 3]}"


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, images: Path, tokenizer: Tokenizer) -> Path:
    """A folder with the sources captions, pages (0 to 9 pictures a document, some longer than a sequence), words."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(1)
    records: dict[Kind, list[Any]] = {"caption": [], "interleaved": [], "text": []}
    for i in range(90):
        records["caption"].append({"image": image_name(i), "text": sentence(rng, rng.randint(1, 12))})
        content: list[Any] = [{"text": sentence(rng, rng.randint(1, 40))}]
        for k in range(i % 10):
            content += [{"image": image_name(i + k)}, {"text": sentence(rng, rng.randint(1, 6)) + "\n"}]
        records["interleaved"].append({"content": content})
        records["text"].append({"text": sentence(rng, rng.randint(1, 120))})
    for (kind, rows), name in zip(records.items(), ("captions", "pages", "words"), strict=True):
        build_source([write_jsonl(images / f"{name}.jsonl", rows)], folder / name, kind, tokenizer, team=Processes(2))
    return folder


def run_config(sources: Path, tokenizer: Tokenizer, /, **data: Any) -> RunConfig:
    """8 sequences of 64 positions a step, 4 positions and at most 5 pictures each; fields of `data` as given."""
    training = {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "validation_batches": 2}
    training |= data.pop("training", {})
    return config_from_dict(
        {
            "run_dir": str(sources / "run"),
            "model": {
                "vision": {
                    "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "ffn_hidden_size": 8,
                    "patch_size": 8, "image_size": 16,
                },
                "connector": {"num_tokens": 4, "hidden_size": 8, "depth": 1},
                "decoder": {
                    "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_query_groups": 1,
                    "ffn_hidden_size": 8, "vocab_size": 320,
                },
            },
            "data": {
                "tokenizer": tokenizer.path, "seq_length": 64, "max_images": 5, "validation_fraction": 0.15,
                "sources": [
                    {"path": str(sources / "captions"), "weight": 45.0},
                    {"path": str(sources / "pages"), "weight": 45.0},
                    {"path": str(sources / "words"), "weight": 10.0},
                ],
                "num_workers": 0,
            } | data,
            "training": training,
        }
    )  # fmt: skip
