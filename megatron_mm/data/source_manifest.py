"""A source's manifest, read and checked: whoever holds one may rely on the type and range of every field it names."""

import json
import re
from typing import Any

from megatron_mm.config import KINDS
from megatron_mm.data.source_files import MANIFEST, SCHEMA
from megatron_mm.data.storage import Storage
from megatron_mm.errors import UserError

REBUILD = "make the source anew with tools/preprocess_data.py"
_MOST = 1 << 62
_LEAST = {"documents": 1, "images": 0, "tokens": 2}
_PAIRS = ("text", "image", "loss")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_manifest(storage: Storage) -> dict[str, Any]:
    """Raises UserError: there is none, or it is damaged or of another version."""
    where = storage.where(MANIFEST)
    try:
        manifest = json.loads(storage.read(MANIFEST))
    except FileNotFoundError as error:
        there = any(_is_there(storage, part) for part in ("text.bin", "text.idx"))
        raise UserError(
            "there is no such source" if not there else "the source has no manifest: it was not completed",
            where=where, found=error.strerror, do="check the path" if not there else REBUILD,
        ) from None  # fmt: skip
    except OSError as error:
        raise UserError("cannot read the manifest", where=where, found=error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise UserError("the manifest is damaged", where=where, found=str(error), do=REBUILD) from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise UserError(
            "a manifest of another version", where=where, found=f"schema {found}", allowed=f"schema {SCHEMA}",
            do=REBUILD,
        )  # fmt: skip
    if fault := _fault(manifest):
        raise UserError("the manifest is damaged", where=where, found=fault, do=REBUILD)
    return manifest


def _is_there(storage: Storage, part: str) -> bool:
    try:
        storage.size(part)
    except OSError:
        return False
    return True


def _fault(manifest: dict[str, Any]) -> str:
    """The first field that is not as the writer writes it; "" if all are."""
    tokenizer, ids, files = (_object(manifest, name) for name in ("tokenizer", "ids", "files"))
    vocab_size = tokenizer.get("vocab_size")
    sound = {
        "kind": manifest.get("kind") in KINDS,
        **{name: _is_count(manifest.get(name), least) for name, least in _LEAST.items()},
        "dtype": manifest.get("dtype") in ("uint16", "int32"),
        "tokenizer": _is_digest(tokenizer.get("sha256")) and _is_count(vocab_size, 1),
        "ids": _is_count(vocab_size, 1)
        and all(_is_count(ids.get(name)) and ids[name] < vocab_size for name in ("bos", "eos", "image")),
        "files": bool(files) and all(_is_file(entry) for entry in files.values()),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            return f"{name}: {manifest[name]!r:.200}" if name in manifest else f"{name} is missing"
    wanted = {"meta.npy"}
    for pair, there in zip(_PAIRS, (True, manifest["images"], "loss.bin" in files), strict=True):
        wanted |= {f"{pair}.bin", f"{pair}.idx"} if there else set()
    return "" if files.keys() == wanted else f"files: {sorted(files)}, not {sorted(wanted)}"


def _object(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    value = manifest.get(name)
    return value if isinstance(value, dict) else {}


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < _MOST  # a bool is an int too


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_file(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_count(entry.get("bytes")) and _is_digest(entry.get("sha256"))
