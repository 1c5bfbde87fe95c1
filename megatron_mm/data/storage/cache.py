"""Local copies of a remote source's small files: fetched once a node, checked against the manifest, mapped by all.

    captions.3f2a…91.text.idx            named by its digest: another source of the same name has other files
    captions.3f2a…91.text.idx.verified   its size and time of change when its digest was last checked; also the lock

A copy that was touched since is digested anew, and fetched anew if it is damaged. The folder may be removed whenever no
run uses it.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from megatron_mm.errors import UserError

_log = logging.getLogger(__name__)
_TOLD_EVERY = 10.0  # seconds of a long download


def cached(path: Path, size: int, sha256: str, fetch: Callable[[], Iterator[memoryview]], name: str) -> Path:
    """`path`, which holds these contents afterwards. Several processes may do so at once: one of them fetches.

    Args:
        fetch: the contents, from the first byte on.
        name: of the remote file.
    Raises:
        UserError: the remote contents have another digest, or the cache cannot be written.
    """
    stamp = path.with_name(path.name + ".verified")
    if _is_stamped(path, stamp, size):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with stamp.open("a+b") as lock:
            locked = _lock(lock)
            if _is_stamped(path, stamp, size):  # another process was first
                return path
            if not _holds(path, size, sha256):
                # Under the lock a download that was killed is overwritten.
                owner = platform.node() if locked else f"{platform.node()}-{os.getpid()}"
                _download(path, path.with_name(f"{path.name}.{owner}.partial"), size, sha256, fetch, name)
            lock.truncate(0)
            lock.write(json.dumps(_state(path)).encode())
    except OSError as error:
        raise UserError(
            "cannot write the cache of a remote source", where=str(path), found=error.strerror,
            do="make room, or set data.cache_dir to a folder that can be written",
        ) from None  # fmt: skip
    return path


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: several fetch the same, and one name wins
        return False
    return True


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _is_stamped(path: Path, stamp: Path, size: int) -> bool:
    try:
        state = _state(path)
        return state[0] == size and json.loads(stamp.read_bytes()) == state
    except (OSError, ValueError):
        return False


def _holds(path: Path, size: int, sha256: str) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def _download(
    path: Path, partial: Path, size: int, sha256: str, fetch: Callable[[], Iterator[memoryview]], name: str
) -> None:
    hash_, done, started = hashlib.sha256(), 0, time.monotonic()
    told = started
    try:
        with partial.open("wb") as file:
            for block in fetch():
                file.write(block)
                hash_.update(block)
                done += len(block)
                if (now := time.monotonic()) - told >= _TOLD_EVERY:
                    rate, told = done / (now - started), now
                    _log.warning(
                        "%s: %.1f of %.1f GB fetched, %.0f MB/s, %.0f s left",
                        name, done / 1e9, size / 1e9, rate / 1e6, (size - done) / rate,
                    )  # fmt: skip
            file.flush()
            os.fsync(file.fileno())
        if hash_.hexdigest() != sha256:
            raise UserError(
                "the file is not the one that the manifest describes", where=name,
                found=f"sha256 {hash_.hexdigest()}", allowed=f"sha256 {sha256}", do="upload the source again",
            )  # fmt: skip
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
