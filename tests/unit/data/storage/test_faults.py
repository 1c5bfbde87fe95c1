"""Every fault of a network: what passes is tried again, what does not is told."""

import time
from pathlib import Path

import pytest

from megatron_mm.data.source import Source
from megatron_mm.data.storage import local_base
from megatron_mm.data.storage.s3 import S3Storage
from megatron_mm.errors import UserError
from tests.unit.data.storage import s3_server
from tests.unit.data.storage.s3_server import Asked, put, upload
from tests.unit.data.storage.talks import SMALL, everything


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


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_tried_again(proxy, remote, local, tmp_path, fault):
    """Each request that the fault can befall fails once: sizes, small files, ranges."""
    how, befalls = FAULTS[fault]
    proxy.fault = lambda request, before: how if not before and befalls(request) else None
    assert everything(Source(remote, tmp_path)) == everything(local)
    assert len(proxy.asked) == sum(1 + befalls(request) for request in set(proxy.asked))


def test_stalls_are_tried_again(proxy, remote, local, cache, opened):
    storage = S3Storage(remote, local_base(remote, cache), read_timeout=0.5)
    size = storage.size("text.bin")
    proxy.fault = lambda request, before: s3_server.stall if before < 2 else None
    started = time.monotonic()
    content = storage.ranges("text.bin", size)(10, size)
    assert bytes(content) == Path(f"{local.prefix}.text.bin").read_bytes()[10:]
    assert 1 < time.monotonic() - started < 10


def test_giving_up_is_a_clear_error(proxy, remote, cache, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    source = Source(remote, cache)
    proxy.clear()
    proxy.fault = lambda request, before: s3_server.reset_within
    with pytest.raises(
        UserError, match=r"s3://training-data/mixes/talks.image.bin: .*\n.*bytes \d+-\d+/\d+: .*tried 3 times"
    ):
        source.images([(4, 0, 9)])
    assert len(proxy.asked) == 3


def test_one_failure_among_many_stops_the_others(proxy, remote, cache, monkeypatch):
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
def test_a_refusal_is_not_tried_again(proxy, remote, cache, code, error):
    proxy.fault = lambda request, before: s3_server.status(code, error)
    with pytest.raises(UserError, match=rf"talks.manifest.json: object storage refuses\n.*{error}"):
        Source(remote, cache)
    assert len(proxy.asked) == 1


@pytest.mark.parametrize("part", ["text.bin", "image.bin", *SMALL])
def test_a_missing_file(proxy, remote, cache, part):
    proxy.fault = lambda request, before: s3_server.status(404, "NoSuchKey") if request.key.endswith(part) else None
    with pytest.raises(UserError, match=f"talks.{part}: a file of the source is (missing|gone)"):
        Source(remote, cache)


def test_no_such_source_bucket_or_credentials(proxy, remote, cache, monkeypatch):
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


def test_not_completed(proxy, local, cache):
    put("half.text.bin", b"x")
    with pytest.raises(UserError, match=r"half.manifest.json: the source has no manifest"):
        Source("s3://training-data/half", cache)


@pytest.mark.parametrize("part", ["text.bin", "image.bin"])
def test_a_file_of_another_size(proxy, local, cache, part):
    bad = upload(Path(local.prefix), "short")
    put(f"short.{part}", Path(f"{local.prefix}.{part}").read_bytes()[:-1])
    with pytest.raises(UserError, match=f"short.{part}: .*truncated"):
        Source(bad, cache)


def test_a_file_replaced_while_in_use(proxy, local, cache):
    """The same size, other bytes: the index would cut it at the wrong places."""
    source = Source(upload(Path(local.prefix), "moving"), cache)
    source.text(0)
    put("moving.text.bin", Path(f"{local.prefix}.text.bin").read_bytes()[::-1])
    with pytest.raises(UserError, match=r"moving.text.bin: .*changed since it was opened"):
        source.text(0)
