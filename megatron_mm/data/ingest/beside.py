"""Pictures that a list of records names, and that lie in a folder beside the list.

A published list (COCO, LLaVA, MMC4) holds names alone: where the pictures were put is the user's. They are looked for
in the list's folder and in the one above it, and in each of these two under

    images/                 also images/train2017/, …
    LIST/                   of the list's own name without its endings
    train2017/, val2014/    and other names of splits

The first that holds a picture gives it. An absolute name is taken as it is.
"""

import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from megatron_mm.errors import UserError

PICTURE_BYTES = 100_000  # one picture, about: chunks and progress don't look at each file
_LOOKED_AT = 100  # pictures of a list, before any work
_SPLIT = re.compile(r"(train|val|test|unlabeled)\d*")


def picture_folders(file: Path) -> list[Path]:
    """The folders above that exist, in the order in which they are tried."""
    folder = file.absolute().parent
    folders: list[Path] = []
    for base in (folder, folder.parent):
        splits = [base, base / "images"]
        folders += [base, base / "images", base / file.name.partition(".")[0]]
        for place in splits:
            folders += sorted(place / name for name in _names(place) if _SPLIT.fullmatch(name))
    return [place for place in dict.fromkeys(folders) if place.is_dir()]


def find_picture(name: str, folders: Sequence[Path]) -> Path | None:
    for folder in folders:
        path = folder / name
        if os.path.isfile(path):  # unlike Path's, it takes any name
            return path
    return None


def check_pictures(file: Path, names: Iterable[str]) -> None:
    """Looks for the first pictures of a list. Raises UserError when it names some, and none of them is there."""
    first = list(islice(names, _LOOKED_AT))
    folders = picture_folders(file)
    if first and not any(find_picture(name, folders) for name in first):
        raise UserError(
            "its pictures cannot be found", where=str(file),
            found=f"none of the first {len(first)}, such as {first[0]!a}",
            allowed="in " + ", ".join(map(str, folders)),
            do="put the pictures into one of these folders, or make a link images/ beside the list",
        )  # fmt: skip


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # not there, or no folder
        return []
