"""Where the files of a source lie: in a folder or in a bucket. Readers ask for byte ranges and never know which.

    open_storage("data/captions")                     LocalStorage: everything is mapped, nothing is copied
    open_storage("s3://bucket/captions", cache_dir)   S3Storage: range requests; small files are kept in a cache

`files.py` has the interface and the local form, `s3.py` the requests, `retries.py` when they are made again,
`coalesce.py` which ranges share one, `cache.py` the local copies.
"""

import os
from pathlib import Path

from megatron_mm.data.storage.files import LocalStorage, Ranges, Storage

__all__ = ["LocalStorage", "Ranges", "Storage", "is_remote", "local_base", "open_storage"]

_S3 = "s3://"


def is_remote(prefix: str | Path) -> bool:
    return str(prefix).startswith(_S3)


def local_base(prefix: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Prefix of the local files that belong to a source, as its packings: in `cache_dir`; without one beside a local
    source, and for one in a bucket in $XDG_CACHE_HOME/megatron_mm or ~/.cache/megatron_mm."""
    if cache_dir is None:
        if not is_remote(prefix):
            return Path(prefix)
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_mm"
    return Path(cache_dir) / Path(prefix).name


def open_storage(prefix: str | Path, cache_dir: str | Path | None = None) -> Storage:
    """The files `PREFIX.part`.

    Args:
        cache_dir: folder of local copies of a remote source's small files; None: see `local_base`.
    Raises:
        UserError: an s3:// prefix without a bucket or a name, or botocore is not installed.
    """
    if not is_remote(prefix):
        return LocalStorage(prefix)
    from megatron_mm.data.storage.s3 import S3Storage  # needs the extra s3

    return S3Storage(str(prefix), local_base(prefix, cache_dir))
