"""Sources in a bucket are the same bytes as local ones, read by few requests."""

import collections
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mm.data.source import Source, SourceWriter, verify_source
from megatron_mm.errors import UserError
from tests.unit.data.storage.s3_server import put, upload
from tests.unit.data.storage.talks import PICTURES, SMALL, everything
from tests.unit.data.test_ingest import ROOT


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_the_local_source(data, local, opened):
    documents = data.draw(st.lists(st.integers(0, len(local) - 1), max_size=12))
    for here, there in zip(local.texts(documents), opened.texts(documents), strict=True):
        assert here.dtype == there.dtype
        np.testing.assert_array_equal(here, there)
    requests = []
    for d in documents:
        first = data.draw(st.integers(0, PICTURES[d]))
        requests.append((d, first, data.draw(st.integers(first, PICTURES[d]))))
    assert [[(bytes(b), c) for b, c in p] for p in opened.images(requests)] == [
        [(bytes(b), c) for b, c in p] for p in local.images(requests)
    ]


def test_one_by_one(local, opened):
    for d in range(10):
        np.testing.assert_array_equal(local.text(d), opened.text(d))
        np.testing.assert_array_equal(local.loss(d), opened.loss(d))
        assert [bytes(b) for b in opened.image_bytes(d)] == [bytes(b) for b in local.image_bytes(d)]
        for i in range(PICTURES[d]):
            data, crc32 = opened.image(d, i)
            assert zlib.crc32(data) == crc32 == local.image(d, i)[1]
    assert everything(opened) == everything(local)


def test_without_pictures_and_loss_ranges(tmp_path, proxy, tokenizer):
    with SourceWriter(tmp_path / "words", "text", tokenizer) as writer:
        writer.add([2, 9, 9, 3])
        writer.finish({})
    source = Source(upload(tmp_path / "words", "words"), tmp_path / "cache")
    assert source.text(0).tolist() == [2, 9, 9, 3]
    assert source.loss(0) is None
    assert source.images([(0, 0, 0)]) == [[]]
    assert source.image_bytes(0) == []


def test_opening_costs_a_few_small_requests(proxy, remote, tmp_path):
    Source(remote, tmp_path)
    parts = [*SMALL, "image.bin", "text.bin"]
    counted = collections.Counter((r.method, r.key) for r in proxy.asked)
    wanted = {("GET", "mixes/talks.manifest.json"): 1}
    wanted |= {("HEAD", f"mixes/talks.{part}"): 1 for part in parts}
    wanted |= {("GET", f"mixes/talks.{part}"): 1 for part in SMALL}
    assert counted == wanted
    proxy.clear()
    Source(remote, tmp_path)  # the small files are there now
    assert {r.key for r in proxy.asked if r.method == "GET"} == {"mixes/talks.manifest.json"}


def test_a_documents_pictures_are_one_request(proxy, opened):
    opened.images([(4, 0, 9)])
    assert [r.key for r in proxy.asked] == ["mixes/talks.image.bin"]
    proxy.clear()
    opened.images([(4, 2, 7), (5, 0, 2), (1, 0, 3), (4, 0, 9)])  # near each other in the file
    assert len(proxy.asked) == 1
    proxy.clear()
    opened.texts(range(len(opened)))
    assert len(proxy.asked) == 1
    proxy.clear()
    opened.images([(0, 0, 0), (4, 3, 3)])
    assert proxy.asked == []


def test_requests_run_in_parallel(proxy, opened, monkeypatch):
    monkeypatch.setattr("megatron_mm.data.storage.coalesce.coalesce.__defaults__", (0, 1))  # nothing is merged
    meeting = threading.Barrier(8, timeout=60)

    def together(connection: socket.socket, answer: bytes) -> None:
        meeting.wait()
        connection.sendall(answer)

    proxy.fault = lambda request, before: together
    with_pictures = [d for d in range(len(opened)) if PICTURES[d]][::2][:8]
    assert len(opened.images([(d, 0, 1) for d in with_pictures])) == len(proxy.asked) == 8


def test_in_a_forked_process(local, opened):
    """Which must share neither connections nor threads with its parent."""
    opened.texts([0, 4])
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send([bytes(b) for b in opened.image_bytes(4)]))
    child.start()
    assert here.poll(60)
    assert here.recv() == [bytes(b) for b in local.image_bytes(4)]
    child.join(60)
    assert child.exitcode == 0
    assert [bytes(b) for b in opened.image_bytes(5)] == [bytes(b) for b in local.image_bytes(5)]


def test_verify(proxy, remote, cache, local, tmp_path):
    assert verify_source(remote, cache).digest == local.digest
    content = bytearray(Path(f"{local.prefix}.image.bin").read_bytes())
    at = int(local.all_meta["nbytes"][:8].sum()) + 5  # in picture 4 of document 4
    content[at] ^= 1
    bad = upload(Path(local.prefix), "bad")
    put("bad.image.bin", bytes(content))
    row = int(np.searchsorted(np.cumsum(local.all_meta["nbytes"]), at, side="right"))
    document = int(np.searchsorted(np.cumsum(local.image_counts), row, side="right"))
    number = row - int(local.image_counts[:document].sum())
    with pytest.raises(UserError, match=rf"bad.image.bin: .*changed\n.*document {document}, picture {number}: "):
        verify_source(bad, cache)


def test_inspection_from_a_bucket(proxy, remote, cache):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "verify", remote]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"{len(PICTURES)} documents" in done.stdout + done.stderr
