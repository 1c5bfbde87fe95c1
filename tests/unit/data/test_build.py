"""The same source, byte for byte, from any number of workers, after kills and under MPI; and how builds end."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.data.ingest.progress import Progress
from megatron_mm.data.ingest.shards import Report, Tally
from megatron_mm.data.source import Source, verify_source
from tests.ranks import rank_environment
from tests.unit.data.conftest import picture, sentence, write_jsonl

RUN = Path(__file__).with_name("ingest_run.py")
MPIEXEC = Path(sys.executable).parent / "mpiexec"
CHUNK = 8 * PICTURE_BYTES  # about eight records
RECORDS = 96
BAD = (3, 50, 51, 89)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of captions in some 12 chunks, whose pictures take some 10 ms each; a few records are bad."""
    folder, rng = tmp_path_factory.mktemp("lines"), random.Random(0)
    for i in range(8):
        Image.fromarray(picture(i, 900, 800)).save(folder / f"{i}.png", compress_level=1)
    records = [{"image": f"{i % 8}.png", "text": sentence(rng, 1 + i % 20)} for i in range(RECORDS)]
    for i in BAD:
        records[i] = {"image": "none.png", "text": " x"}
    return write_jsonl(folder / "captions.jsonl", records)


def command(lines: Path, output: Path, tokenizer, *more: str | int, chunk: int = CHUNK) -> list[str]:
    arguments = ["--kind", "caption", "--input", lines, "--output", output, "--tokenizer", tokenizer.path, *more]
    return [str(word) for word in (sys.executable, RUN, chunk, *arguments)]


def finish(words: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=rank_environment(**environment), capture_output=True, text=True, timeout=300)


def content(prefix: Path) -> dict[str, bytes]:
    """Everything that a build leaves under its prefix."""
    return {p.name.removeprefix(prefix.name): p.read_bytes() for p in prefix.parent.glob(f"{prefix.name}.*")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, lines: Path, tokenizer) -> dict[str, bytes]:
    """What one worker makes of them in one shard."""
    prefix = tmp_path_factory.mktemp("expected") / "x"
    done = finish(command(lines, prefix, tokenizer, "--workers", 1, chunk=1 << 30))
    assert done.returncode == 0, done.stderr
    assert len(verify_source(prefix)) == RECORDS - len(BAD)
    rows = [json.loads(line) for line in Path(f"{prefix}.quarantine.jsonl").read_text().splitlines()]
    assert [row["record"] for row in rows] == [f"{lines}:{i + 1}" for i in BAD]
    assert f"{len(BAD)} bad records" in done.stdout
    return content(prefix)


def same(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Records of a later chunk are named by their byte, those of a first chunk by their line."""

    def plain(files: dict[str, bytes]) -> dict[str, object]:
        reasons = [json.loads(line)["reason"] for line in files[".quarantine.jsonl"].splitlines()]
        return {**files, ".quarantine.jsonl": reasons}

    return plain(found) == plain(expected)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_bytes_for_any_number_of_workers(tmp_path, lines, tokenizer, expected, workers):
    done = finish(command(lines, tmp_path / "x", tokenizer, "--workers", workers))
    assert done.returncode == 0, done.stderr
    assert same(content(tmp_path / "x"), expected)


def test_same_bytes_from_mpi_ranks(tmp_path, lines, tokenizer, expected):
    done = finish([str(MPIEXEC), "-n", "3", *command(lines, tmp_path / "x", tokenizer)])
    assert done.returncode == 0, done.stderr
    assert same(content(tmp_path / "x"), expected)
    assert done.stdout.count("documents") == 1


def shards_done(prefix: Path) -> int:
    return len(list(prefix.parent.glob(f"{prefix.name}.shards/*.done.json")))


Started = tuple[subprocess.Popen[str], list[psutil.Process]]


def start(words: list[str], enough: Callable[[], bool]) -> Started:
    """A run that has come to where it is `enough`, and its processes."""
    run = subprocess.Popen(words, env=rank_environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not enough():
        assert run.poll() is None, run.communicate()
        time.sleep(0.005)
    return run, psutil.Process(run.pid).children(recursive=True)


def are_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_killed_runs_continue_at_the_shard(tmp_path, lines, tokenizer, expected):
    prefix = tmp_path / "x"
    for number, workers in ((2, 2), (5, 1), (8, 3)):
        words = command(lines, prefix, tokenizer, "--workers", workers)
        run, children = start(words, lambda number=number: shards_done(prefix) >= number)
        run.kill()
        run.communicate()
        assert are_gone(children)
    kept = shards_done(prefix)
    assert not list(tmp_path.glob("x.manifest.json"))
    done = finish(command(lines, prefix, tokenizer, "--workers", 2))
    assert done.returncode == 0, done.stderr
    assert f"{kept} of " in done.stderr
    assert same(content(prefix), expected)


def test_a_worker_that_is_killed_ends_the_run(tmp_path, lines, tokenizer, expected):
    prefix = tmp_path / "x"
    run, children = start(command(lines, prefix, tokenizer, "--workers", 2), lambda: shards_done(prefix) >= 2)
    worker = next(child for child in children if "spawn_main" in " ".join(child.cmdline()))
    worker.kill()
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "a worker died" in errors
    assert "killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert are_gone(children)
    assert shards_done(prefix) >= 2
    assert finish(command(lines, prefix, tokenizer)).returncode == 0
    assert same(content(prefix), expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop(tmp_path, lines, tokenizer, number, code):
    prefix = tmp_path / "x"
    run, children = start(command(lines, prefix, tokenizer, "--workers", 2), lambda: shards_done(prefix) >= 1)
    asked = time.monotonic()
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert time.monotonic() - asked < 5
    assert run.returncode == code
    assert "finished shards are kept" in errors
    assert "Traceback" not in errors
    assert are_gone(children)
    assert {p.name for p in tmp_path.iterdir()} <= {"x.shards", "x.quarantine.jsonl"}
    names = {p.name.split(".")[0] for p in prefix.with_name("x.shards").iterdir()}
    assert len(names) == shards_done(prefix)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_asked_to_stop(tmp_path, lines, tokenizer, number):
    prefix = tmp_path / "x"
    words = [str(MPIEXEC), "-n", "3", *command(lines, prefix, tokenizer)]
    run, children = start(words, lambda: shards_done(prefix) >= 1)
    run.send_signal(number)
    run.communicate(timeout=60)
    assert run.returncode != 0
    assert are_gone(children)


def test_a_rank_that_is_killed_ends_the_run(tmp_path, lines, tokenizer):
    prefix = tmp_path / "x"
    words = [str(MPIEXEC), "-n", "3", *command(lines, prefix, tokenizer)]
    run, children = start(words, lambda: shards_done(prefix) >= 2)
    next(child for child in children if child.environ().get("PMI_RANK") == "2").kill()
    run.communicate(timeout=120)
    assert run.returncode != 0
    assert are_gone(children)
    assert shards_done(prefix) >= 2


@pytest.mark.parametrize("launcher", [[], [str(MPIEXEC), "-n", "3"]])
def test_an_error_in_a_worker_ends_all_and_is_told_once(tmp_path, lines, tokenizer, launcher):
    """A limit on the size of files stands for the full disk: no shard fits, then all do but not together."""
    prefix = tmp_path / "x"
    workers = [] if launcher else ["--workers", 2]

    def limited(size: int) -> subprocess.CompletedProcess:
        return finish([*launcher, *command(lines, prefix, tokenizer, *workers)], FILE_SIZE_LIMIT=str(size))

    picture_size = (lines.parent / "0.png").stat().st_size
    done = limited(3 * picture_size)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert "finished shards are kept" in done.stderr
    assert "Traceback" not in done.stderr
    if not launcher:  # ranks are ended before they can tidy up
        assert {p.name for p in tmp_path.iterdir()} <= {"x.quarantine.jsonl"}
    done = limited(40 * picture_size)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    kept = shards_done(prefix)
    assert kept >= 12
    assert [p.name for p in tmp_path.glob("x.*.partial")] == []
    done = finish(command(lines, prefix, tokenizer))
    assert done.returncode == 0, done.stderr
    assert f"{kept} of {kept} shards were finished before" in done.stderr
    assert len(verify_source(prefix)) == RECORDS - len(BAD)


def test_shards_of_other_input_or_options_are_made_anew(tmp_path, lines, tokenizer):
    """They stay when the rate of bad records stops a build at its end."""
    copy, prefix = tmp_path / "lines.jsonl", tmp_path / "x"
    copy.write_text(lines.read_text().replace('"image": "', f'"image": "{lines.parent}/'))

    def build(*more: str | int) -> str:
        done = finish(command(copy, prefix, tokenizer, "--workers", 1, *more, chunk=20 * PICTURE_BYTES))
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "too many bad records" in build("--max-bad-rate", 0)
    total = shards_done(prefix)
    assert total > 3
    assert f"{total} of {total} shards were finished" in build("--max-bad-rate", 0)
    assert "were finished" not in build("--max-bad-rate", 0, "--max-image-pixels", 30_000_000)
    damaged = prefix.with_name("x.shards") / "000001.image.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = build("--max-bad-rate", 0, "--max-image-pixels", 30_000_000)
    assert f"{total - 1} of {total} shards were finished" in again
    os.utime(copy, (1, 1))
    assert "were finished" not in build("--max-image-pixels", 30_000_000)
    assert not prefix.with_name("x.shards").exists()
    assert Source(prefix).manifest["made"]["bad"] == {"No such file or directory": len(BAD)}


def test_a_damaged_shard_is_no_part_of_a_source(tmp_path, lines, tokenizer):
    prefix = tmp_path / "x"
    assert finish(command(lines, prefix, tokenizer, "--max-bad-rate", 0)).returncode == 2
    damaged = prefix.with_name("x.shards") / "000002.text.bin"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\x07\x00\x03\x00")
    done = finish(command(lines, prefix, tokenizer))
    assert done.returncode == 2
    assert "000002.text.bin" in done.stderr
    assert "contents have changed" in done.stderr


def test_damaged_inputs_are_named_one_by_one(tmp_path, tokenizer):
    lines = b"".join(json.dumps({"text": f" red {i * 7919 % 1000}"}).encode() + b"\n" for i in range(400))
    for name in ("a", "b", "c"):
        data = gzip.compress(lines)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(data if name != "b" else data[: len(data) // 2])
    words = [sys.executable, str(RUN), "1", "--kind", "text", "--output", str(tmp_path / "x")]
    words += ["--input", str(tmp_path / "*.gz"), "--tokenizer", tokenizer.path, "--workers", "2"]
    done = finish(words)
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stdout.splitlines() if "damaged, read up to here" in line]
    assert str(tmp_path / "b.jsonl.gz") in told
    source = verify_source(tmp_path / "x")
    assert 800 < len(source) < 1200
    assert len(source.manifest["made"]["damaged"]) == 1
    assert finish([*words, "--max-bad-rate", "0"]).returncode == 2
    done = finish([*words[:-4], "--input", str(tmp_path / "*.tar"), "--tokenizer", tokenizer.path])
    assert done.returncode == 2
    assert "no file matches" in done.stderr


def test_progress_tells_rate_and_time_left(monkeypatch):
    stream, now = io.StringIO(), 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress("x", stream, size=4_000_000_000, shards=4)
    progress.reuse(Tally(documents=1000, bytes=1_000_000_000))
    now += 60
    progress.hear(Report(1, Tally(documents=300, images=600, bytes=500_000_000, bad=Counter({"y": 2})), done=False))
    now += 60
    progress.hear(Report(1, Tally(documents=600, images=1200, bytes=1_000_000_000, bad=Counter({"y": 5})), done=True))
    assert stream.getvalue().splitlines() == [
        "x: 37.5% of 4.00 GB, 1 of 4 shards, 1300 documents (5/s), 600 images (10/s), 2 bad, 5.0 min left",
        "x: 50.0% of 4.00 GB, 2 of 4 shards, 1600 documents (5/s), 1200 images (10/s), 5 bad, 4.0 min left",
    ]


def test_two_builds_of_one_source(tmp_path, lines, tokenizer, expected):
    prefix = tmp_path / "x"
    words = command(lines, prefix, tokenizer, "--workers", 2)
    run, _ = start(words, lambda: shards_done(prefix) >= 1)
    run.send_signal(signal.SIGSTOP)  # or it may be done before the other looks
    try:
        other = finish(words)
    finally:
        run.send_signal(signal.SIGCONT)
    assert other.returncode == 2
    assert "another process is writing this source" in other.stderr
    run.communicate(timeout=180)
    assert run.returncode == 0
    assert same(content(prefix), expected)


def test_wrong_arguments_under_mpi_end_all_ranks(tmp_path, tokenizer):
    words = command(tmp_path / "none.jsonl", tmp_path / "x", tokenizer)
    done = finish([str(MPIEXEC), "-n", "3", *words])
    assert done.returncode == 2
    assert done.stderr.count("none.jsonl: cannot read the input") == 1
    assert list(tmp_path.iterdir()) == []
    done = finish([str(MPIEXEC), "-n", "2", *words, "--workers", "2"])
    assert done.returncode == 2
    assert "--workers: is for one process" in done.stderr


def test_ranks_that_cannot_speak_to_each_other(tmp_path, lines, tokenizer):
    words = command(lines, tmp_path / "x", tokenizer)
    environment = rank_environment(
        RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1"
    )
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2
    assert "mpiexec" in done.stderr
