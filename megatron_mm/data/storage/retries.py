"""Requests that are tried again: what is worth a second try, how long to wait, when to give up.

botocore's own retries end when the answer's head has come: a connection that breaks within the body is not tried again
(boto/botocore#3132), and a process with many requests in flight spends their common allowance within seconds. So they
are off, and one loop covers a request from its start to its last byte.
"""

import logging
import random
import threading
from collections.abc import Callable
from typing import TypeVar

import urllib3.exceptions
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, HTTPClientError, IncompleteReadError

from megatron_mm.errors import UserError

_log = logging.getLogger(__name__)
T = TypeVar("T")
ATTEMPTS = 12  # a request, unless AWS_MAX_ATTEMPTS or the profile says otherwise: about a minute of waiting in all
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 20.0  # seconds; doubled each time, and half of it at random
_TOLD_FROM = 3  # attempt; a single hiccup is none of the user's business
_STATUSES = frozenset((408, 429))  # beside 5xx
_CODES = frozenset(("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"))


class ShortAnswerError(Exception):
    """Other bytes than asked for."""


# Connections that broke or fell silent, in the answer's head or in its body.
_BROKEN = (HTTPClientError, IncompleteReadError, FlexibleChecksumError, ShortAnswerError, urllib3.exceptions.HTTPError)


class Stopped(Exception):
    """A request that nobody waits for any more."""


def is_transient(error: Exception) -> bool:
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in _STATUSES or error.response.get("Error", {}).get("Code") in _CODES
    return isinstance(error, _BROKEN)


def with_retries(request: Callable[[], T], name: str, found: str, attempts: int, stop: threading.Event) -> T:
    """The answer of `request`.

    Args:
        name: of the object.
        found: what is asked of it.
        stop: set when the answer is no longer wanted.
    Raises:
        ClientError: the storage refuses, and would again.
        UserError: it still fails after all attempts, or cannot be tried (no credentials, …).
    """
    for attempt in range(1, attempts + 1):
        if stop.is_set():
            raise Stopped
        try:
            return request()
        except Exception as error:
            if not is_transient(error):
                if isinstance(error, BotoCoreError):
                    raise _cannot_ask(name, error) from None
                raise
            if attempt == attempts:
                raise UserError(
                    "object storage does not answer", where=name,
                    found=f"{found}: {describe(error)}; tried {attempts} times",
                    do="check the endpoint (AWS_ENDPOINT_URL_S3) and the network, then start again: a run resumes",
                ) from None  # fmt: skip
            wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            level = logging.WARNING if attempt >= _TOLD_FROM else logging.INFO
            told = describe(error)
            _log.log(level, "%s, %s: %s; attempt %d of %d, next in %.1f s", name, found, told, attempt, attempts, wait)
        stop.wait(wait)
    raise AssertionError("unreachable")


def describe(error: Exception) -> str:
    told = f"{type(error).__name__}: {error}".replace(" (reached max retries: 0)", "")  # botocore's, which are off
    return " ".join(told.split())


def _cannot_ask(name: str, error: BotoCoreError) -> UserError:
    return UserError(
        "cannot ask object storage", where=name, found=describe(error),
        do="set credentials as for the aws command (AWS_PROFILE, AWS_ACCESS_KEY_ID, …), see docs/data.md",
    )  # fmt: skip
