"""Results of several calls and machines in one folder, and one file that holds them all."""

import json
import tarfile
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit import write


def merge(results: Path, earlier: Sequence[Path]) -> None:
    """Take over what other folders, or archives of them, have and `results` lacks: case by case, a finished one for a
    failed one. Of two finished ones the folder's own stays."""
    for source in earlier:
        with tempfile.TemporaryDirectory() as name:
            folder = source
            if source.is_file():
                folder = Path(name)
                with tarfile.open(source) as archive:
                    archive.extractall(folder, filter="data")
            for path in sorted(folder.glob("gpu-*.json")):
                _merge_one(results / path.name, json.loads(path.read_text()))


def _merge_one(path: Path, other: dict[str, Any]) -> None:
    if not path.exists():
        write(path, other)
        return
    record = json.loads(path.read_text())
    merged = {**other["cases"], **record["cases"]}
    for name, case in other["cases"].items():
        if not _finished(merged[name]) and _finished(case):
            merged[name] = case
    if merged != record["cases"]:
        write(path, record | {"cases": merged, "machine": record.get("machine") or other.get("machine")})


def _finished(case: dict[str, Any]) -> bool:
    return "failed" not in case and case.get("outcome", "passed") == "passed"


class Archive:
    """`with Archive(results, file):` keeps one file with the folder's results, at most some seconds old, so that a kill
    loses no more than what is being measured."""

    def __init__(self, results: Path, file: Path | None, seconds: float = 5) -> None:
        self.results, self.file, self.seconds = results, file, seconds
        self._held: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> "Archive":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._write()

    def _keep(self) -> None:
        while not self._stop.wait(self.seconds):
            self._write()

    def _write(self) -> None:
        if self.file is None:
            return
        # A .part is about to be renamed: it may be gone at any time.
        found = [path for path in sorted(self.results.glob("gpu-*.*")) if path.suffix != ".part"]
        held = {path.name: path.stat().st_mtime_ns for path in found}
        if held == self._held:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(self.file.name + ".part")
        with tarfile.open(part, "w:gz") as archive:
            for name in held:
                with (self.results / name).open("rb") as file:  # the same file to the end, also if it is replaced
                    archive.addfile(archive.gettarinfo(arcname=name, fileobj=file), file)
        part.replace(self.file)
        self._held = held
