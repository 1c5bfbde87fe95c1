"""Where a tokenizer lies in a checkpoint or an exported folder, and how it gets there.

tokenizer.model      a SentencePiece model
tokenizer/           a Hugging Face tokenizer in a checkpoint; in an exported folder its files lie at the top
"""

import os
import shutil
from pathlib import Path

from megatron_mm.errors import UserError

HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # the last may be absent


def find_tokenizer(folder: str | Path) -> Path:
    """The tokenizer of a checkpoint or of an exported model, for `open_tokenizer`."""
    folder = Path(folder)
    for path in (folder / "tokenizer.model", folder / "tokenizer"):
        if path.exists():
            return path
    if (folder / "tokenizer.json").is_file():
        return folder
    raise UserError(
        "the tokenizer is missing", where=str(folder), allowed="tokenizer.model, tokenizer/ or tokenizer.json",
        do="name a whole checkpoint or exported folder",
    )  # fmt: skip


def copy_tokenizer(path: str | Path, folder: Path) -> str:
    """Copy a tokenizer into a checkpoint's folder, wait for the disk, and answer with its name there."""
    path = Path(path)
    if path.is_dir():
        name, files = "tokenizer", [path / file for file in HUGGING_FACE_FILES if (path / file).is_file()]
        (folder / name).mkdir()
        targets = [folder / name / file.name for file in files]
    else:
        name, files = "tokenizer.model", [path]
        targets = [folder / name]
    for file, target in zip(files, targets, strict=True):
        shutil.copyfile(file, target)
    for written in {*targets, folder / name}:
        descriptor = os.open(written, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return name
