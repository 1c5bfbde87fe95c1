"""Putting a source's complete files in place of an older one's: killed at any moment, one of the two stands, whole.

A writer calls its files X.PART.partial until all bytes are on the disk. Then it gives the manifest the name
X.manifest.json.next: from there on the new source stands. The other names follow, the manifest's own comes last.
Whoever opens the source after a kill in between goes on where the writer was (`settle`).
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_mm.data.source_files import MANIFEST, file_of
from megatron_mm.errors import UserError

PARTIAL = ".partial"
_NEXT = MANIFEST + ".next"
_OPTIONAL = ("image.bin", "image.idx", "loss.bin", "loss.idx")


def put_in_place(prefix: str | Path, parts: Sequence[str]) -> None:
    """Let the files of these parts and the manifest, all complete on the disk, be the source."""
    os.replace(file_of(prefix, MANIFEST + PARTIAL), file_of(prefix, _NEXT))
    _change_names(prefix, parts)


def _change_names(prefix: str | Path, parts: Sequence[str], again: bool = False) -> None:
    """No manifest names a mix of two sources at any time: the older one goes first, the new one comes last.

    Args:
        again: after a kill, so that some names may have changed already.
    """
    _sync_names(prefix)
    file_of(prefix, MANIFEST).unlink(missing_ok=True)
    for part in _OPTIONAL:
        if part not in parts:
            file_of(prefix, part).unlink(missing_ok=True)
    for part in parts:
        try:
            os.replace(file_of(prefix, part + PARTIAL), file_of(prefix, part))
        except FileNotFoundError:
            if not again:
                raise
    os.replace(file_of(prefix, _NEXT), file_of(prefix, MANIFEST))
    _sync_names(prefix)


def same_file(file: BinaryIO) -> bool:
    """Whether the file's name still means this file."""
    try:
        return os.stat(file.name).st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _sync_names(prefix: str | Path) -> None:
    folder = os.open(Path(prefix).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def settle(prefix: str | Path) -> None:
    """Finish the work of a writer that was killed while it put its complete files in place; mostly there is none.

    Raises:
        UserError: there is, and these files may not be written.
    """
    path = file_of(prefix, _NEXT)
    try:
        file = path.open("rb")
    except OSError:  # there is no such file, or no such folder
        return
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # a living writer holds it, for a moment
        try:
            if same_file(file):  # else a living writer has just finished
                _change_names(prefix, list(json.load(file)["files"]), again=True)
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                "the manifest of the source that was to come is damaged", where=str(path), found=str(error),
                do="make the source anew with tools/preprocess_data.py, after removing this file",
            ) from None  # fmt: skip
        except OSError as error:
            raise UserError(
                "its writer was killed while it put the files in place, and they may not be renamed by you",
                where=str(path), found=error.strerror, do="open it once as a user who may, with inspect_data.py verify",
            ) from None  # fmt: skip
