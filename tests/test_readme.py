"""README and docs say what works: marked blocks run, every other command's options exist, every link leads somewhere.

A fenced block whose info string is `bash test` is run by bash from a folder that holds links to the repository's own
folders; the blocks of one page run in order in the same folder. Any other `bash` block is only looked at: each
`python …/x.py --option` must be an option of that script, each `make target` a target.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.tiny import tiny_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
BY_NAME = {str(page.relative_to(ROOT)): page for page in PAGES}


class Block(NamedTuple):
    info: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(i.strip(), t) for i, t in re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.M | re.S)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


RUNNABLE = [name for name, page in BY_NAME.items() if any(b.info == "bash test" for b in blocks(page))]


def test_there_is_something_to_run() -> None:
    assert "docs/quickstart.md" in RUNNABLE


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RUNNABLE)
def test_marked_blocks_run(name: str, tmp_path: Path) -> None:
    for folder in ("examples", "slurm", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for block in blocks(BY_NAME[name]):
        if block.info != "bash test":
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.text}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_the_readmes_road_for_a_cluster_user(data: Path, tmp_path: Path) -> None:
    """Its four steps as they are written, on a tiny team's files; only the vocabulary's size fits their few words."""
    for folder in ("slurm", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for image in [*data.glob("*.jpg"), *data.glob("*.png")]:
        shutil.copy(image, tmp_path)
    for kind, name in (("caption", "captions"), ("interleaved", "pages"), ("text", "text")):
        shutil.copy(data / f"{kind}.jsonl", tmp_path / f"{name}.jsonl")
    question = {"image": "image3.jpg", "question": "what is it?", "answers": ["red circle"]}
    for split in ("train", "test"):
        lines = [json.dumps(question | {"id": i, "image": f"image{i}.jpg"}) + "\n" for i in range(1, 24, 2)]
        (tmp_path / f"{split}_vqa.jsonl").write_text("".join(lines))
    run = yaml.safe_load(
        tiny_run(tmp_path / "recipe", data, training__steps=2, training__micro_batch_size=1).read_text()
    )
    run |= {"run_dir": "runs/mm1"}
    run["data"] |= {"tokenizer": "data/tokenizer.model"}
    for source, name in zip(run["data"]["sources"], ("captions", "pages", "text"), strict=True):
        source["path"] = f"data/{name}"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    train = "python -m megatron_mm.train --config run.yaml"
    page = BY_NAME["README.md"]
    assert f"`{train}`" in page.read_text()
    road = [b.text for b in blocks(page) if "tools/" in b.text or "slurm/" in b.text]
    assert len(road) == 3
    for text in (*road[:2], train, road[2]):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text.replace("--vocab-size 32000", "--vocab-size 320")],
            cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert json.loads((tmp_path / "scores.json").read_text())["n"] == 12
    assert not (tmp_path / "runs/mm1/slurm").exists(), "a dry run writes nothing"


@cache
def help_of(script: str, subcommand: str) -> str:
    command = [sys.executable, str(ROOT / script), *filter(None, [subcommand]), "--help"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def commands(page: Path) -> list[list[str]]:
    """Every command line of the page's bash blocks and of its `code` that starts with python, as words."""
    text = "\n".join(b.text for b in blocks(page) if b.info.startswith("bash")).replace("\\\n", " ")
    inline = re.findall(
        r"`((?:python|make|tools/)[^`]*)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    )
    lines = [line.strip() for line in [*text.splitlines(), *inline]]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(python|make|tools/)\b", line)]


@pytest.mark.parametrize("name", BY_NAME)
def test_options_and_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in commands(BY_NAME[name]):
        if command[0] == "make":
            assert {a for a in command[1:] if "=" not in a} <= targets, command
            continue
        arguments = command[1:] if command[0] == "python" else command
        if not arguments or not arguments[0].endswith(".py"):
            continue
        first = arguments[1] if len(arguments) > 1 and re.fullmatch(r"[a-z][a-z-]+", arguments[1]) else ""
        text = help_of(arguments[0], first)
        for option in (a for a in arguments[1:] if a.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", text), f"{arguments[0]} {first} has no {option}"


@pytest.mark.parametrize("name", BY_NAME)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", BY_NAME[name].read_text()):
        if "://" not in target:
            assert (BY_NAME[name].parent / target).exists(), f"{name}: {target}"
