"""Files in an S3 bucket, read by ranges with botocore.

Endpoint, region and credentials are found as the aws command finds them: AWS_PROFILE, AWS_ENDPOINT_URL_S3,
~/.aws/config, a role of the machine, …

Why botocore (what boto3 itself asks with): it knows every way to credentials. Of the others, s3fs must not be forked
and pins its own botocore, multi-storage-client wraps boto3 in a second configuration, obstore reads no AWS profiles.
"""

import errno
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from megatron_mm.data.storage.cache import cached
from megatron_mm.data.storage.coalesce import Span, coalesce
from megatron_mm.data.storage.files import blocks
from megatron_mm.errors import UserError

try:
    import botocore.config
    import botocore.exceptions
    import botocore.loaders
    import botocore.session

    from megatron_mm.data.storage.retries import ATTEMPTS, ShortAnswerError, describe, with_retries
except ImportError:
    raise UserError(
        "reading from s3:// needs botocore", found="not installed", do="pip install 'megatron-mm[s3]'"
    ) from None

T = TypeVar("T")
THREADS = 16  # requests in flight, of a source in a process
CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 20.0  # seconds without a byte
_CHECK = "check data.sources, the endpoint (AWS_ENDPOINT_URL_S3) and the credentials (AWS_PROFILE, …)"


@functools.cache
def _descriptions(folder: str | None) -> Any:
    """botocore's descriptions of S3: kept, as reading them is most of what a client costs."""
    return botocore.loaders.create_loader(folder)


class S3Storage:
    """Objects `KEY.part` of a bucket. Client and threads are made at the first request, anew in a forked process.

    Args:
        prefix: s3://BUCKET/KEY.
        base: prefix of the local copies of small files.
        read_timeout: seconds without a byte, after which a request is tried again.
    """

    def __init__(self, prefix: str, base: Path, read_timeout: float = READ_TIMEOUT) -> None:
        self.prefix, self.base, self.read_timeout = prefix, base, read_timeout
        self.bucket, _, self.key = prefix.removeprefix("s3://").partition("/")
        if not self.bucket or not self.key or self.key.endswith("/"):
            raise UserError("not the prefix of a source", where=prefix, allowed="s3://BUCKET/FOLDER/NAME")
        self._etags: dict[str, str] = {}
        self._process = -1
        self._client: Any = None
        self._attempts = ATTEMPTS
        self._pool: ThreadPoolExecutor

    def _open_client(self) -> Any:
        if self._process == os.getpid():
            return self._client
        config = botocore.config.Config(
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=self.read_timeout,
            max_pool_connections=THREADS,
            tcp_keepalive=True,
            retries={"total_max_attempts": 1},  # see `retries`
        )
        try:
            session = botocore.session.Session()
            session.register_component("data_loader", _descriptions(session.get_config_variable("data_path")))
            self._client = session.create_client("s3", config=config)
            self._attempts = max(1, int(session.get_config_variable("max_attempts") or ATTEMPTS))
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise UserError(
                "object storage cannot be set up", where=self.prefix, found=describe(error), do=_CHECK
            ) from None
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="s3")
        self._process = os.getpid()
        return self._client

    def where(self, part: str) -> str:
        return f"{self.prefix}.{part}"

    def read(self, part: str) -> bytes:
        def request() -> bytes:
            return self._client.get_object(Bucket=self.bucket, Key=f"{self.key}.{part}")["Body"].read()

        return self._ask(part, "all of it", request, threading.Event())

    def size(self, part: str) -> int:
        def request() -> dict[str, Any]:
            return self._client.head_object(Bucket=self.bucket, Key=f"{self.key}.{part}")

        answer = self._ask(part, "its size", request, threading.Event())
        self._etags[part] = answer["ETag"]
        return int(answer["ContentLength"])

    def mapped(self, part: str, size: int, sha256: str) -> Path:
        path = self.base.with_name(f"{self.base.name}.{sha256[:16]}.{part}")
        return cached(path, size, sha256, lambda: blocks(self.ranges(part, size), size), self.where(part))

    def ranges(self, part: str, size: int) -> "S3Ranges":
        return S3Ranges(self, part, size)

    def get(self, part: str, spans: Sequence[Span], size: int) -> list[bytes]:
        """The bytes of the spans, asked for at the same time."""
        self._open_client()
        stop = threading.Event()
        if len(spans) == 1:
            return [self._get(part, spans[0], size, stop)]
        futures = [self._pool.submit(self._get, part, span, size, stop) for span in spans]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # the first failure, not that of the first span
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise

    def _get(self, part: str, span: Span, size: int, stop: threading.Event) -> bytes:
        wanted = f"bytes {span.start}-{span.end - 1}/{size}"

        def request() -> bytes:
            answer = self._client.get_object(
                Bucket=self.bucket,
                Key=f"{self.key}.{part}",
                Range=f"bytes={span.start}-{span.end - 1}",
                IfMatch=self._etags[part],  # never bytes of another file than the one that was opened
            )
            body = answer["Body"]
            if (told := answer.get("ContentRange", "no range")) != wanted:
                body.close()
                raise ShortAnswerError(f"the answer holds {told}")
            content = body.read()
            if len(content) != span.end - span.start:
                raise ShortAnswerError(f"the answer has {len(content)} bytes")
            return content

        try:
            return self._ask(part, wanted, request, stop)
        except FileNotFoundError as error:
            raise UserError("a file of the source is gone", where=self.where(part), found=error.strerror) from None

    def _ask(self, part: str, found: str, request: Callable[[], T], stop: threading.Event) -> T:
        self._open_client()
        try:
            return with_retries(request, self.where(part), found, self._attempts, stop)
        except botocore.exceptions.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("404", "NoSuchKey", "NoSuchBucket"):
                name = "no such bucket" if code == "NoSuchBucket" else "no such object"
                raise FileNotFoundError(errno.ENOENT, name, self.where(part)) from None
            if code in ("412", "PreconditionFailed"):
                raise UserError(
                    "a file of the source has changed since it was opened", where=self.where(part),
                    do="start again; write a changed source under another name",
                ) from None  # fmt: skip
            raise UserError(
                "object storage refuses", where=self.where(part), found=describe(error), do=_CHECK
            ) from None


class S3Ranges:
    """The bytes of an object; ranges near each other share a request (see `coalesce`)."""

    def __init__(self, storage: S3Storage, part: str, size: int) -> None:
        self._storage, self._part, self._size = storage, part, size

    def __call__(self, start: int, end: int) -> memoryview:
        return self.many([(start, end)])[0]

    def many(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        spans = coalesce(ranges)
        out = [memoryview(b"")] * len(ranges)
        for span, content in zip(spans, self._storage.get(self._part, spans, self._size), strict=True):
            view = memoryview(content)
            for number in span.ranges:
                start, end = ranges[number]
                out[number] = view[start - span.start : end - span.start]
        return out
