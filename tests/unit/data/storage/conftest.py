"""An S3 server with one source in it, for all tests of this folder."""

from pathlib import Path

import pytest

from megatron_mm.data.source import Source
from tests.unit.data.storage import s3_server
from tests.unit.data.storage.s3_server import Proxy, upload
from tests.unit.data.storage.talks import make


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def local(tmp_path_factory, tokenizer):
    return Source(make(tmp_path_factory.mktemp("local") / "talks", tokenizer))


@pytest.fixture(scope="package")
def remote(proxy, local):
    return upload(Path(local.prefix), "mixes/talks")


@pytest.fixture(scope="package")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="package")
def opened(remote, cache):
    return Source(remote, cache)
