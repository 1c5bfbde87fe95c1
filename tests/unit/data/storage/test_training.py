"""Training from sources in a bucket."""

import contextlib
import itertools
import multiprocessing
import multiprocessing.forkserver

import pytest

from megatron_mm.data.loader import TrainingData
from megatron_mm.errors import UserError
from tests.unit.data.conftest import run_config
from tests.unit.data.storage import s3_server
from tests.unit.data.storage.s3_server import upload
from tests.unit.data.test_loader import same


@pytest.fixture
def config(proxy, sources, tokenizer, tmp_path):
    for name in ("captions", "pages", "words"):
        upload(sources / name, f"runs/{name}")
    weights = {"captions": 45.0, "pages": 45.0, "words": 10.0}
    where = [{"path": f"s3://{s3_server.BUCKET}/runs/{name}", "weight": w} for name, w in weights.items()]

    def make_config(**data):
        return run_config(sources, tokenizer, sources=where, cache_dir=str(tmp_path / "cache"), **data)

    return make_config


@pytest.fixture
def fresh_workers():
    """The server of workers has the environment of the test that started it."""
    server = multiprocessing.forkserver._forkserver
    server._stop()
    yield
    server._stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_same_microbatches_as_from_local_sources(config, sources, tokenizer, fresh_workers, workers):
    here = TrainingData.open(run_config(sources, tokenizer))
    remote = config(num_workers=workers)
    TrainingData.prepare(remote)
    there = TrainingData.open(remote)
    assert there.source_names == here.source_names
    with contextlib.closing(there.train_loader(1, 0, 2, (0, 1))) as batches:
        for a, b in itertools.islice(zip(here.train_loader(1, 0, 2, (0, 1)), batches, strict=False), 12):
            assert same(a, b)


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_fails_stops_the_run(proxy, config, fresh_workers, monkeypatch, workers):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    data = TrainingData.open(config(num_workers=workers))
    with contextlib.closing(data.train_loader(0, 0, 1, (0, 1))) as batches:
        next(batches)
        proxy.fault = lambda request, before: s3_server.status(503, "SlowDown")
        with pytest.raises(UserError, match=r"object storage does not answer\n.*SlowDown.*tried 2 times"):
            for _ in itertools.islice(batches, 200):
                pass


@pytest.mark.parametrize("path", ["s3://bucket", "s3://bucket/", "s3:///x", "gs://bucket/x", "https://host/x"])
def test_wrong_prefix_in_a_config(sources, tokenizer, path):
    with pytest.raises(UserError, match=r"data.sources.0.path: (.|\n)*s3://BUCKET"):
        run_config(sources, tokenizer, sources=[{"path": path, "weight": 1.0}])
