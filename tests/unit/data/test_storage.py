"""Sources in a bucket: the same bytes as local ones, few requests, every fault of a network, and the local copies."""

import collections
import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mm.data.ingest.images import StoredImage
from megatron_mm.data.loader import TrainingData
from megatron_mm.data.source import Source, SourceWriter, verify_source
from megatron_mm.data.storage import local_base
from megatron_mm.data.storage.coalesce import coalesce
from megatron_mm.data.storage.s3 import S3Storage
from megatron_mm.errors import UserError
from tests.unit.data import s3_server
from tests.unit.data.conftest import run_config
from tests.unit.data.s3_server import Asked, Proxy, put, upload
from tests.unit.data.test_ingest import ROOT
from tests.unit.data.test_loader import same

SMALL = ["image.idx", "loss.bin", "loss.idx", "meta.npy", "text.idx"]
PICTURES = [0, 3, 0, 1, 9, 2, 1, 1, 1, 4] * 3  # of each document


@pytest.fixture(scope="module")
def proxy():
    with s3_server.s3_server() as port, pytest.MonkeyPatch.context() as patch:
        between = Proxy(port)
        s3_server.environment(patch, between.port)
        yield between
        between.close()


@pytest.fixture(autouse=True)
def quiet(request):
    if "proxy" in request.fixturenames:
        request.getfixturevalue("proxy").clear()


def make(prefix: Path, tokenizer, seed: int = 0) -> Path:
    """Documents with and without pictures (of random bytes: nothing decodes them here) and with loss ranges."""
    rng = random.Random(seed)
    with SourceWriter(prefix, "conversation", tokenizer) as writer:
        for count in PICTURES:
            ids = [rng.randrange(5, 320) for _ in range(rng.randint(1, 60))]
            blobs = [rng.randbytes(rng.choice((1, 400, 30_000))) for _ in range(count)]
            pictures = [StoredImage(b, 8, 8, 1, 1, 0, zlib.crc32(b), rng.getrandbits(60)) for b in blobs]
            tokens = [tokenizer.bos_id, *[tokenizer.image_id] * count, *ids, tokenizer.eos_id]
            writer.add(tokens, pictures, [(count + 1, len(tokens))])
        writer.finish({"seed": seed})
    return prefix


@pytest.fixture(scope="module")
def local(tmp_path_factory, tokenizer):
    return Source(make(tmp_path_factory.mktemp("local") / "talks", tokenizer))


@pytest.fixture(scope="module")
def remote(proxy, local):
    return upload(Path(local.prefix), "mixes/talks")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def opened(remote, cache):
    return Source(remote, cache)


def everything(source: Source) -> list[object]:
    documents = range(len(source))
    return [
        [t.tolist() for t in source.texts(documents)],
        [[(bytes(b), c) for b, c in p] for p in source.images([(d, 0, PICTURES[d]) for d in documents])],
        [source.loss(d).tolist() for d in documents],
        source.all_meta.tolist(), source.lengths.tolist(), source.image_counts.tolist(), source.digest,
    ]  # fmt: skip


class TestReading:
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_equals_the_local_source(self, data, local, opened):
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

    def test_one_by_one(self, local, opened):
        for d in range(10):
            np.testing.assert_array_equal(local.text(d), opened.text(d))
            np.testing.assert_array_equal(local.loss(d), opened.loss(d))
            assert [bytes(b) for b in opened.image_bytes(d)] == [bytes(b) for b in local.image_bytes(d)]
            for i in range(PICTURES[d]):
                data, crc32 = opened.image(d, i)
                assert zlib.crc32(data) == crc32 == local.image(d, i)[1]
        assert everything(opened) == everything(local)

    def test_without_pictures_and_loss_ranges(self, tmp_path, proxy, tokenizer):
        with SourceWriter(tmp_path / "words", "text", tokenizer) as writer:
            writer.add([2, 9, 9, 3])
            writer.finish({})
        source = Source(upload(tmp_path / "words", "words"), tmp_path / "cache")
        assert source.text(0).tolist() == [2, 9, 9, 3]
        assert source.loss(0) is None
        assert source.images([(0, 0, 0)]) == [[]]
        assert source.image_bytes(0) == []

    def test_opening_costs_a_few_small_requests(self, proxy, remote, tmp_path):
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

    def test_a_documents_pictures_are_one_request(self, proxy, opened):
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

    def test_requests_run_in_parallel(self, proxy, opened, monkeypatch):
        monkeypatch.setattr("megatron_mm.data.storage.coalesce.coalesce.__defaults__", (0, 1))  # nothing is merged
        meeting = threading.Barrier(8, timeout=20)

        def together(connection: socket.socket, answer: bytes) -> None:
            meeting.wait()
            connection.sendall(answer)

        proxy.fault = lambda request, before: together
        with_pictures = [d for d in range(len(opened)) if PICTURES[d]][::2][:8]
        assert len(opened.images([(d, 0, 1) for d in with_pictures])) == len(proxy.asked) == 8

    def test_in_a_forked_process(self, local, opened):
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

    def test_verify(self, proxy, remote, cache, local, tmp_path):
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

    def test_inspection_from_a_bucket(self, proxy, remote, cache):
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "verify", remote]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert f"{len(PICTURES)} documents" in done.stdout + done.stderr


def any_request(request: Asked) -> bool:
    return True


def with_a_body(request: Asked) -> bool:
    return request.method == "GET"


def with_a_range(request: Asked) -> bool:
    return request.range is not None


FAULTS = {
    "503": (s3_server.status(503, "ServiceUnavailable"), any_request),
    "slow down": (s3_server.status(503, "SlowDown"), any_request),
    "500": (s3_server.status(500, "InternalError"), any_request),
    "429": (s3_server.status(429, "TooManyRequests"), any_request),
    "request timeout": (s3_server.status(400, "RequestTimeout"), with_a_body),
    "reset": (s3_server.reset, any_request),
    "reset within": (s3_server.reset_within, with_a_body),
    "truncated": (s3_server.truncate, with_a_body),
    "truncated quietly": (s3_server.truncate_quietly, with_a_body),
    "other bytes": (s3_server.other_bytes, with_a_range),
}


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_are_tried_again(self, proxy, remote, local, tmp_path, fault):
        """Each request that the fault can befall fails once: sizes, small files, ranges."""
        how, befalls = FAULTS[fault]
        proxy.fault = lambda request, before: how if not before and befalls(request) else None
        assert everything(Source(remote, tmp_path)) == everything(local)
        assert len(proxy.asked) == sum(1 + befalls(request) for request in set(proxy.asked))

    def test_stalls_are_tried_again(self, proxy, remote, local, cache, opened):
        storage = S3Storage(remote, local_base(remote, cache), read_timeout=0.5)
        size = storage.size("text.bin")
        proxy.fault = lambda request, before: s3_server.stall if before < 2 else None
        started = time.monotonic()
        content = storage.ranges("text.bin", size)(10, size)
        assert bytes(content) == Path(f"{local.prefix}.text.bin").read_bytes()[10:]
        assert 1 < time.monotonic() - started < 10

    def test_giving_up_is_a_clear_error(self, proxy, remote, cache, monkeypatch):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
        source = Source(remote, cache)
        proxy.clear()
        proxy.fault = lambda request, before: s3_server.reset_within
        with pytest.raises(
            UserError, match=r"s3://training-data/mixes/talks.image.bin: .*\n.*bytes \d+-\d+/\d+: .*tried 3 times"
        ):
            source.images([(4, 0, 9)])
        assert len(proxy.asked) == 3

    def test_one_failure_among_many_stops_the_others(self, proxy, remote, cache, monkeypatch):
        """They would wait for minutes otherwise, and the interpreter for them."""
        monkeypatch.setattr("megatron_mm.data.storage.coalesce.coalesce.__defaults__", (0, 1))
        source = Source(remote, cache)
        proxy.clear()
        end = int(source.lengths[:12].sum()) * 2  # of document 11's tokens, 16 bits each
        proxy.fault = lambda request, before: (
            s3_server.status(403, "AccessDenied")
            if request.range and request.range[1] == end
            else s3_server.status(503, "SlowDown")
        )
        started = time.monotonic()
        with pytest.raises(UserError, match=r"mixes/talks.text.bin: object storage refuses\n.*AccessDenied"):
            source.texts(range(12))
        source.storage._pool.shutdown()  # as the interpreter's end does
        assert time.monotonic() - started < 20

    @pytest.mark.parametrize(
        ("code", "error"), [(403, "AccessDenied"), (400, "InvalidRequest"), (403, "SignatureDoesNotMatch")]
    )
    def test_a_refusal_is_not_tried_again(self, proxy, remote, cache, code, error):
        proxy.fault = lambda request, before: s3_server.status(code, error)
        with pytest.raises(UserError, match=rf"talks.manifest.json: object storage refuses\n.*{error}"):
            Source(remote, cache)
        assert len(proxy.asked) == 1

    @pytest.mark.parametrize("part", ["text.bin", "image.bin", *SMALL])
    def test_a_missing_file(self, proxy, remote, cache, part):
        proxy.fault = lambda request, before: s3_server.status(404, "NoSuchKey") if request.key.endswith(part) else None
        with pytest.raises(UserError, match=f"talks.{part}: a file of the source is (missing|gone)"):
            Source(remote, cache)

    def test_no_such_source_bucket_or_credentials(self, proxy, remote, cache, monkeypatch):
        with pytest.raises(UserError, match=r"s3://training-data/nowhere.manifest.json: there is no such source"):
            Source("s3://training-data/nowhere", cache)
        with pytest.raises(UserError, match=r"there is no such source\n.*no such bucket"):
            Source("s3://no-such-bucket/nowhere", cache)
        for wrong in ("s3://training-data", "s3://training-data/", "s3:///x"):
            with pytest.raises(UserError, match=r"s3://BUCKET"):
                Source(wrong, cache)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        with pytest.raises(UserError, match=r"cannot ask object storage\n.*NoCredentialsError"):
            Source(remote, cache)
        monkeypatch.setenv("AWS_PROFILE", "absent")
        with pytest.raises(UserError, match=r"cannot be set up\n.*absent"):
            Source(remote, cache)

    def test_not_completed(self, proxy, local, cache):
        put("half.text.bin", b"x")
        with pytest.raises(UserError, match=r"half.manifest.json: the source has no manifest"):
            Source("s3://training-data/half", cache)

    @pytest.mark.parametrize("part", ["text.bin", "image.bin"])
    def test_a_file_of_another_size(self, proxy, local, cache, part):
        bad = upload(Path(local.prefix), "short")
        put(f"short.{part}", Path(f"{local.prefix}.{part}").read_bytes()[:-1])
        with pytest.raises(UserError, match=f"short.{part}: .*truncated"):
            Source(bad, cache)

    def test_a_file_replaced_while_in_use(self, proxy, local, cache):
        """The same size, other bytes: the index would cut it at the wrong places."""
        source = Source(upload(Path(local.prefix), "moving"), cache)
        source.text(0)
        put("moving.text.bin", Path(f"{local.prefix}.text.bin").read_bytes()[::-1])
        with pytest.raises(UserError, match=r"moving.text.bin: .*changed since it was opened"):
            source.text(0)


def gets(proxy: Proxy) -> list[str]:
    """The small files that were fetched."""
    parts = [r.key.split(".", 1)[1] for r in proxy.asked if r.method == "GET"]
    return sorted(part for part in parts if part in SMALL)


class TestCache:
    def one(self, cache: Path, part: str) -> Path:
        (path,) = cache.glob(f"talks.*.{part}")
        return path

    @pytest.mark.parametrize("part", ["text.idx", "meta.npy"])
    @pytest.mark.parametrize("how", ["flipped", "truncated", "removed", "stamp"])
    def test_a_damaged_copy_is_fetched_anew(self, proxy, remote, local, tmp_path, part, how):
        Source(remote, tmp_path)
        proxy.clear()
        path = self.one(tmp_path, part)
        content = bytearray(path.read_bytes())
        if how == "flipped":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
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

    def test_a_new_source_of_the_same_name_uses_no_old_copy(self, proxy, tokenizer, tmp_path):
        for seed in (1, 2):
            here = Source(make(tmp_path / f"{seed}/talks", tokenizer, seed))
            there = Source(upload(Path(here.prefix), "again/talks"), tmp_path / "cache")
            assert everything(there) == everything(here)

    def test_a_file_that_is_not_the_manifests(self, proxy, local, tmp_path):
        bad = upload(Path(local.prefix), "mixed/talks")
        content = bytearray(Path(f"{local.prefix}.text.idx").read_bytes())
        content[50] ^= 1
        put("mixed/talks.text.idx", bytes(content))
        with pytest.raises(UserError, match=r"s3://.*/mixed/talks.text.idx: .*not the one that the manifest describes"):
            Source(bad, tmp_path)
        assert list(tmp_path.glob("*.text.idx")) + list(tmp_path.glob("*.partial")) == []

    def test_many_processes_at_once_fetch_once(self, proxy, remote, local, tmp_path):
        script = (
            "import sys; from megatron_mm.data.source import Source; sys.stdin.read();"
            "s = Source(sys.argv[1], sys.argv[2]); print(s.digest, int(s.lengths.sum()))"
        )
        command = [sys.executable, "-c", script, remote, str(tmp_path)]
        openers = [
            subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        with ThreadPoolExecutor(4) as pool:
            told = list(pool.map(lambda opener: opener.communicate(timeout=120)[0], openers))
        assert told == [f"{local.digest} {local.lengths.sum()}\n"] * 4
        assert gets(proxy) == sorted(SMALL)
        assert list(tmp_path.glob("*.partial")) == []

    def test_a_killed_download_is_no_obstacle(self, proxy, remote, local, tmp_path):
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

    def test_a_folder_that_cannot_be_written(self, proxy, remote, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cannot write the cache of a remote source(.|\n)*data.cache_dir"):
            Source(remote, tmp_path / "file")

    def test_a_full_disk(self, proxy, remote, tmp_path):
        """/dev/full answers every write with ENOSPC."""
        part, digest = "text.idx", json.loads(S3Storage(remote, tmp_path / "talks").read("manifest.json"))
        name = f"talks.{digest['files'][part]['sha256'][:16]}.{part}"
        (tmp_path / f"{name}.{os.uname().nodename}.partial").symlink_to("/dev/full")
        with pytest.raises(UserError, match="No space left on device"):
            Source(remote, tmp_path)

    def test_where_it_is(self, monkeypatch, tmp_path):
        assert local_base("data/talks") == Path("data/talks")
        assert local_base("data/talks", "/cache") == Path("/cache/talks")
        assert local_base("s3://bucket/mixes/talks", "/cache") == Path("/cache/talks")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert local_base("s3://bucket/mixes/talks") == tmp_path / "megatron_mm/talks"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/home/somebody")
        assert local_base("s3://bucket/mixes/talks") == Path("/home/somebody/.cache/megatron_mm/talks")


ranges = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 300)).map(lambda p: (p[0], p[0] + p[1])), max_size=40)


@given(wanted=ranges, gap=st.integers(0, 100), limit=st.integers(1, 700))
def test_coalesce(wanted, gap, limit):
    spans = coalesce(wanted, gap, limit)
    served = [number for span in spans for number in span.ranges]
    assert sorted(served) == [i for i, (start, end) in enumerate(wanted) if start < end]
    for span in spans:
        mine = [wanted[i] for i in span.ranges]
        assert span.start == min(start for start, _ in mine)
        assert span.end == max(end for _, end in mine)
        assert span.end - span.start <= limit or any(m == (span.start, span.end) for m in mine)
        covered = np.zeros(span.end - span.start, dtype=bool)
        for start, end in mine:
            covered[start - span.start : end - span.start] = True
        holes = "".join("x" if c else " " for c in covered).split("x")
        assert max(map(len, holes)) <= gap
    for a, b in itertools.pairwise(spans):  # neighbours are apart for a reason
        assert a.start <= b.start
        assert b.start > a.end + gap or (b.ranges and wanted[b.ranges[0]][1] - a.start > limit)


class TestTraining:
    @pytest.fixture
    def config(self, proxy, sources, tokenizer, tmp_path):
        for name in ("captions", "pages", "words"):
            upload(sources / name, f"runs/{name}")
        weights = {"captions": 45.0, "pages": 45.0, "words": 10.0}
        where = [{"path": f"s3://{s3_server.BUCKET}/runs/{name}", "weight": w} for name, w in weights.items()]

        def make_config(**data):
            return run_config(sources, tokenizer, sources=where, cache_dir=str(tmp_path / "cache"), **data)

        return make_config

    @pytest.fixture
    def fresh_workers(self):
        """The server of workers has the environment of the test that started it."""
        server = multiprocessing.forkserver._forkserver
        server._stop()
        yield
        server._stop()

    @pytest.mark.parametrize("workers", [0, 2])
    def test_same_microbatches_as_from_local_sources(self, config, sources, tokenizer, fresh_workers, workers):
        here = TrainingData.open(run_config(sources, tokenizer))
        remote = config(num_workers=workers)
        TrainingData.prepare(remote)
        there = TrainingData.open(remote)
        assert there.source_names == here.source_names
        with contextlib.closing(there.train_loader(1, 0, 2, (0, 1))) as batches:
            for a, b in itertools.islice(zip(here.train_loader(1, 0, 2, (0, 1)), batches, strict=False), 12):
                assert same(a, b)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_storage_that_fails_stops_the_run(self, proxy, config, fresh_workers, monkeypatch, workers):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        data = TrainingData.open(config(num_workers=workers))
        with contextlib.closing(data.train_loader(0, 0, 1, (0, 1))) as batches:
            next(batches)
            proxy.fault = lambda request, before: s3_server.status(503, "SlowDown")
            with pytest.raises(UserError, match=r"object storage does not answer\n.*SlowDown.*tried 2 times"):
                for _ in itertools.islice(batches, 200):
                    pass

    @pytest.mark.parametrize("path", ["s3://bucket", "s3://bucket/", "s3:///x", "gs://bucket/x", "https://host/x"])
    def test_wrong_prefix_in_a_config(self, sources, tokenizer, path):
        with pytest.raises(UserError, match=r"data.sources.0.path: (.|\n)*s3://BUCKET"):
            run_config(sources, tokenizer, sources=[{"path": path, "weight": 1.0}])
