"""The local copies of a remote source's small files."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_mm.data.source import Source
from megatron_mm.data.storage import local_base
from megatron_mm.data.storage.s3 import S3Storage
from megatron_mm.errors import UserError
from tests.unit.data.storage import s3_server
from tests.unit.data.storage.s3_server import Proxy, put, upload
from tests.unit.data.storage.talks import SMALL, everything, make
from tests.unit.data.test_ingest import ROOT


def gets(proxy: Proxy) -> list[str]:
    """The small files that were fetched."""
    parts = [r.key.split(".", 1)[1] for r in proxy.asked if r.method == "GET"]
    return sorted(part for part in parts if part in SMALL)


def one(cache: Path, part: str) -> Path:
    (path,) = cache.glob(f"talks.*.{part}")
    return path


@pytest.mark.parametrize("part", ["text.idx", "meta.npy"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "removed", "stamp"])
def test_a_damaged_copy_is_fetched_anew(proxy, remote, local, tmp_path, part, how):
    Source(remote, tmp_path)
    proxy.clear()
    path = one(tmp_path, part)
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
        changed = path.stat().st_mtime_ns + 1
        path.write_bytes(content)
        os.utime(path, ns=(changed, changed))  # the clock of the file system may not have gone on since
    elif how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "removed":
        path.unlink()
    else:  # which alone costs a digest, no download
        path.with_name(path.name + ".verified").write_bytes(b"{")
    assert everything(Source(remote, tmp_path)) == everything(local)
    assert gets(proxy) == ([] if how == "stamp" else [part])
    proxy.clear()
    Source(remote, tmp_path)
    assert gets(proxy) == []


def test_a_new_source_of_the_same_name_uses_no_old_copy(proxy, tokenizer, tmp_path):
    for seed in (1, 2):
        here = Source(make(tmp_path / f"{seed}/talks", tokenizer, seed))
        there = Source(upload(Path(here.prefix), "again/talks"), tmp_path / "cache")
        assert everything(there) == everything(here)


def test_a_file_that_is_not_the_manifests(proxy, local, tmp_path):
    bad = upload(Path(local.prefix), "mixed/talks")
    content = bytearray(Path(f"{local.prefix}.text.idx").read_bytes())
    content[50] ^= 1
    put("mixed/talks.text.idx", bytes(content))
    with pytest.raises(UserError, match=r"s3://.*/mixed/talks.text.idx: .*not the one that the manifest describes"):
        Source(bad, tmp_path)
    assert list(tmp_path.glob("*.text.idx")) + list(tmp_path.glob("*.partial")) == []


def test_many_processes_at_once_fetch_once(proxy, remote, local, tmp_path):
    script = (
        "import sys; from megatron_mm.data.source import Source; sys.stdin.read();"
        "s = Source(sys.argv[1], sys.argv[2]); print(s.digest, int(s.lengths.sum()))"
    )
    command = [sys.executable, "-c", script, remote, str(tmp_path)]
    openers = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda opener: opener.communicate(timeout=300)[0], openers))
    assert told == [f"{local.digest} {local.lengths.sum()}\n"] * 4
    assert gets(proxy) == sorted(SMALL)
    assert list(tmp_path.glob("*.partial")) == []


def test_a_killed_download_is_no_obstacle(proxy, remote, local, tmp_path):
    proxy.fault = lambda request, before: (
        s3_server.stall if request.key.endswith("text.idx") and request.method == "GET" else None
    )
    script = "import sys; from megatron_mm.data.source import Source; Source(sys.argv[1], sys.argv[2])"
    opener = subprocess.Popen([sys.executable, "-c", script, remote, str(tmp_path)], cwd=ROOT)
    while not list(tmp_path.glob("*.text.idx.*.partial")):
        assert opener.poll() is None
        time.sleep(0.02)
    opener.kill()
    opener.wait()
    proxy.clear()
    assert everything(Source(remote, tmp_path)) == everything(local)
    assert list(tmp_path.glob("*.partial")) == []


def test_a_folder_that_cannot_be_written(proxy, remote, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the cache of a remote source(.|\n)*data.cache_dir"):
        Source(remote, tmp_path / "file")


def test_a_full_disk(proxy, remote, tmp_path):
    """/dev/full answers every write with ENOSPC."""
    part, digest = "text.idx", json.loads(S3Storage(remote, tmp_path / "talks").read("manifest.json"))
    name = f"talks.{digest['files'][part]['sha256'][:16]}.{part}"
    (tmp_path / f"{name}.{os.uname().nodename}.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        Source(remote, tmp_path)


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert local_base("data/talks") == Path("data/talks")
    assert local_base("data/talks", "/cache") == Path("/cache/talks")
    assert local_base("s3://bucket/mixes/talks", "/cache") == Path("/cache/talks")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_base("s3://bucket/mixes/talks") == tmp_path / "megatron_mm/talks"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_base("s3://bucket/mixes/talks") == Path("/home/somebody/.cache/megatron_mm/talks")
