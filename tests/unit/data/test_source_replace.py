"""A source that replaces another one: killed at any moment, the older or the newer stands, whole."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.data.ingest.images import store
from megatron_mm.data.source import Source, SourceWriter, verify_source
from megatron_mm.data.source_place import settle
from megatron_mm.errors import UserError
from tests.unit.data.test_ingest import ROOT
from tests.unit.data.test_source import write

SCRIPT = """
import os, signal, sys
from megatron_mm.data.source import SourceWriter
from megatron_mm.data.tokenizer import open_tokenizer

def killed_after(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

tokenizer = open_tokenizer(sys.argv[1])
replace, unlink, fsync = map(killed_after, (os.replace, os.unlink, os.fsync))
for number, prefix in enumerate(sys.argv[2:]):
    left = number
    if not (child := os.fork()):
        with SourceWriter(prefix, "interleaved", tokenizer) as writer:
            [writer.add([2, 7, 8, 3]) for _ in range(3)]
            os.replace, os.unlink, os.fsync = replace, unlink, fsync
            writer.finish({"newer": True})
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def replace_with_text(tokenizer, prefixes: list[Path]) -> list[int]:
    """Write another source, without pictures, to each prefix, by a process that is killed at its first, second, … call
    that changes a name or syncs a file. Returns their exit codes."""
    words = [sys.executable, "-c", SCRIPT, tokenizer.path, *map(str, prefixes)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_killed_at_any_moment(tmp_path, tokenizer, images):
    picture = [store((images / "0.jpg").read_bytes(), 10**6)]
    prefixes = [tmp_path / f"x{number}" for number in range(24)]
    for prefix in prefixes:
        write(prefix, tokenizer, ["red", "blue"], [picture, picture])
    digest = Source(prefixes[0]).digest
    codes = replace_with_text(tokenizer, prefixes)
    assert codes == sorted(codes)  # killed earlier and earlier, then not any more
    assert (codes[0], codes[-1]) == (-9, 0)
    newer = 0
    for prefix in prefixes:
        source = verify_source(prefix)
        if source.manifest["made"] == {"newer": True}:
            newer += 1
            assert len(source) == 3
            assert not list(tmp_path.glob(f"{prefix.name}.image.*"))
            assert not list(tmp_path.glob(f"{prefix.name}.*.partial"))
        else:
            assert newer == 0  # once decided, it stays so
            assert source.digest == digest
        write(prefix, tokenizer, ["green"])
        assert len(verify_source(prefix)) == 1
        assert {p.name for p in tmp_path.glob(f"{prefix.name}.*")} == {
            f"{prefix.name}.{part}" for part in ("text.bin", "text.idx", "meta.npy", "manifest.json")
        }
    assert codes.count(0) + 3 < newer < len(prefixes) - 3


@pytest.fixture
def prefix(tmp_path, tokenizer) -> Path:
    """A source whose writer was killed while it put the files in place."""
    replace_with_text(tokenizer, [tmp_path / f"x{number}" for number in range(24)])
    midway = next(p for p in tmp_path.glob("*.manifest.json.next") if not p.with_suffix("").exists())
    return midway.with_name(midway.name.removesuffix(".manifest.json.next"))


def test_a_writer_finishes_what_another_began(prefix, tokenizer):
    with SourceWriter(prefix, "text", tokenizer):
        pass
    assert len(verify_source(prefix)) == 3


def test_a_reader_that_may_not_write_is_told(prefix, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)  # the tests' user may write anything
    with pytest.raises(UserError, match="may not be renamed by you"):
        Source(prefix)


def test_a_living_writer_is_not_helped(prefix):
    """While it holds its lock it puts its files in place itself."""
    script = f"from megatron_mm.data.source_place import settle; settle({str(prefix)!r})"
    with Path(f"{prefix}.manifest.json.next").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(2)
        assert not Path(f"{prefix}.manifest.json").exists()
    assert waiting.wait(30) == 0
    settle(prefix)
    assert len(verify_source(prefix)) == 3
