"""A whole tiny run for tests: three sources made by the tools from drawn images, a tokenizer, and a config.

The data takes a few seconds to make; `tiny_data` makes it once a folder, and `tiny_run` writes configs that use it.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from tests.ranks import ROOT, rank_environment

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "black": (10, 10, 10)}
SHAPES = ("circle", "square")


def tool(name: str, *arguments: str | Path) -> str:
    """Run `python tools/NAME ARGUMENTS…`; fails with its output."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def draw(colour: str, shape: str, path: Path, size: int) -> None:
    image = Image.new("RGB", (size, size), (255, 255, 255))
    box = (size // 5, size // 5, size - size // 5, size - size // 5)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=COLOURS[colour])
    image.save(path, quality=95)


def tiny_data(folder: Path, documents: int = 120) -> Path:
    """FOLDER/tokenizer.model and the sources FOLDER/captions, FOLDER/pages and FOLDER/words. Made once."""
    if (folder / "words.manifest.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pick = random.Random(0)
    records: dict[str, list[dict[str, Any]]] = {"caption": [], "interleaved": [], "text": []}
    pictures = []
    for i in range(24):
        colour, shape = pick.choice(list(COLOURS)), pick.choice(SHAPES)
        path = folder / f"image{i}.{'jpg' if i % 2 else 'png'}"
        draw(colour, shape, path, 40 + i)
        pictures.append((path.name, f"{colour} {shape}"))
    for i in range(documents):
        name, words = pick.choice(pictures)
        records["caption"].append({"image": name, "text": f" a {words}"})
        content: list[dict[str, Any]] = []
        for _ in range(pick.randint(1, 3)):
            name, words = pick.choice(pictures)
            content += [{"image": name}, {"text": f" Question: what is it? Short answer: {words}\n"}]
        records["interleaved"].append({"content": content})
        records["text"].append({"text": " ".join(pick.choice([*COLOURS, *SHAPES]) for _ in range(5 + i % 20))})
    for kind, rows in records.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    inputs = [folder / f"{kind}.jsonl" for kind in records]
    tool("train_tokenizer.py", "--input", *inputs, "--output", folder / "tokenizer.model", "--vocab-size", "320")
    for kind, prefix in (("caption", "captions"), ("interleaved", "pages"), ("text", "words")):
        tool(
            "preprocess_data.py", "--kind", kind, "--input", folder / f"{kind}.jsonl", "--output", folder / prefix,
            "--tokenizer", folder / "tokenizer.model",
        )  # fmt: skip
    return folder


def tiny_run(folder: Path, data: Path | None = None, **overrides: Any) -> Path:
    """FOLDER/config.yaml: 12 steps in fp32 into FOLDER/run. Overrides are fields with dots written as double
    underscores, for instance `training__steps=3`. Data is made in FOLDER/data unless given."""
    data = tiny_data(data or folder / "data")
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {
            "vision": {
                "num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64, "patch_size": 8,
                "image_size": 32,
            },
            "connector": {"num_tokens": 4, "hidden_size": 32, "depth": 1},
            "decoder": {
                "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
                "ffn_hidden_size": 128, "vocab_size": 384,
            },
        },
        "data": {
            "tokenizer": str(data / "tokenizer.model"),
            "sources": [
                {"path": str(data / "captions"), "weight": 45},
                {"path": str(data / "pages"), "weight": 45},
                {"path": str(data / "words"), "weight": 10},
            ],
            "seq_length": 64, "max_images": 4, "validation_fraction": 0.1, "num_workers": 0,
        },
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "training": {
            "steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "validation_interval": 6,
            "validation_batches": 1,
        },
        "checkpoint": {"interval": 4},
    }  # fmt: skip
    for name, value in overrides.items():
        node = config
        *parents, last = name.split("__")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
