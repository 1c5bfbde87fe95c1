"""A real S3 server (moto's, in a process of its own) and a proxy before it that counts requests and breaks them."""

import contextlib
import functools
import http.client
import http.server
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import botocore.session
import pytest

_SERVER = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the tests are gone, however they went
"""
BUCKET = "training-data"


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Its port. It holds the bucket BUCKET."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def environment(patch: pytest.MonkeyPatch, port: int) -> None:
    """Credentials and endpoint as a user gives them."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_CONFIG_FILE", os.devnull)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")


@functools.cache
def _client(endpoint: str) -> Any:
    return botocore.session.Session().create_client("s3", endpoint_url=endpoint)


def put(key: str, content: bytes) -> None:
    _client(os.environ["AWS_ENDPOINT_URL_S3"]).put_object(Bucket=BUCKET, Key=key, Body=content)


def upload(prefix: Path, key: str) -> str:
    """What `aws s3 cp` would: all files of a source. Answers with their s3:// prefix."""
    client = _client(os.environ["AWS_ENDPOINT_URL_S3"])
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=BUCKET)
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"{key}{path.name[len(prefix.name) :]}", Body=path.read_bytes())
    return f"s3://{BUCKET}/{key}"


@dataclass(frozen=True)
class Asked:
    """A request as it came in."""

    method: str
    key: str
    range: tuple[int, int] | None  # [start, end)


Fault = Callable[[socket.socket, bytes], None]  # is given the connection and the true answer


def status(code: int, error: str) -> Fault:
    """An S3 error."""
    body = f"<?xml version='1.0'?><Error><Code>{error}</Code><Message>injected</Message></Error>".encode()
    fields = f"Content-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    head = f"HTTP/1.1 {code} {error}\r\n{fields}\r\n\r\n".encode()
    return lambda connection, _: connection.sendall(head + body)


def reset(connection: socket.socket, _: bytes) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends RST


def reset_within(connection: socket.socket, answer: bytes) -> None:
    connection.sendall(answer[: len(answer) - 7])
    time.sleep(0.05)  # let the part arrive
    reset(connection, answer)


def truncate(connection: socket.socket, answer: bytes) -> None:
    """An orderly end before the last byte."""
    connection.sendall(answer[: len(answer) - 7])


def truncate_quietly(connection: socket.socket, answer: bytes) -> None:
    """The same without a length in the head, so that HTTP itself sees nothing amiss."""
    connection.sendall(re.sub(rb"Content-Length: \d+\r\n", b"", answer[: len(answer) - 7], flags=re.IGNORECASE))


def other_bytes(connection: socket.socket, answer: bytes) -> None:
    """A cache that ignores ranges: the right length, the wrong place."""
    connection.sendall(re.sub(rb"(content-range: bytes )\d+-\d+", rb"\g<1>0-9", answer, flags=re.IGNORECASE))


def stall(connection: socket.socket, answer: bytes) -> None:
    connection.sendall(answer[: len(answer) - 7])
    connection.settimeout(30)
    with contextlib.suppress(OSError):
        connection.recv(1)  # until the client gives up


class Proxy:
    """Hands requests on to the server, and answers some of them otherwise.

    Attributes:
        asked: all requests so far.
        fault: told a request and how often it came before; None answers truly.
    """

    def __init__(self, upstream: int) -> None:
        self.asked: list[Asked] = []
        self.fault: Callable[[Asked, int], Fault | None] = lambda request, before: None
        proxy, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                key = unquote(urlsplit(self.path).path).lstrip("/").removeprefix(f"{BUCKET}/")
                found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                request = Asked(self.command, key, (int(found[1]), int(found[2]) + 1) if found else None)
                with lock:
                    before = proxy.asked.count(request)
                    proxy.asked.append(request)
                    fault = proxy.fault(request, before)
                server = http.client.HTTPConnection("127.0.0.1", upstream, timeout=30)
                length = int(self.headers.get("Content-Length", 0))
                server.request(self.command, self.path, self.rfile.read(length), dict(self.headers))
                true = server.getresponse()
                head = [f"HTTP/1.1 {true.status} {true.reason}"]
                head += [f"{k}: {v}" for k, v in true.getheaders() if k.lower() not in ("connection", "keep-alive")]
                answer = "\r\n".join([*head, "Connection: close", "", ""]).encode() + true.read()
                server.close()
                self.close_connection = True
                with contextlib.suppress(OSError):  # the client is gone
                    (fault or socket.socket.sendall)(self.connection, answer)

            do_GET = do_HEAD = do_PUT = answer

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def shutdown_request(self, request: socket.socket) -> None:
                self.close_request(request)  # no orderly end: a fault may have asked for a reset

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def clear(self) -> None:
        self.asked.clear()
        self.fault = lambda request, before: None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
