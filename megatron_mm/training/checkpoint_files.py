"""A checkpoint on disk: safetensors and one JSON index. Read from anywhere, without torch.distributed or Megatron.

    step-00000100/
      index.json            every global tensor: type, shape, and where its boxes lie; every file: bytes and SHA-256
      rank-00000.safetensors, rank-00001.safetensors, …
      config.yaml           the run's configuration
      tokenizer.model       the tokenizer that it was trained with; of Hugging Face ones the folder tokenizer/

Global tensors carry layout-free names (see `model/sharding.py`); optimizer state lies beside them as `exp_avg/NAME`,
`exp_avg_sq/NAME` and, for fp32 masters, `main/NAME`. A box is a rectangular part of a global tensor, so any layout
reads what any other has written. Nothing is pickled.

Why not Megatron-Core's `torch_dist` files: they hold pickles (`.metadata`, `common.pt`, extra state), and their form
changes between releases. What lies where is still Megatron-Core's `sharded_state_dict`.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mm.config import RunConfig, dump_yaml, load_config
from megatron_mm.data.tokenizer import copy_tokenizer
from megatron_mm.errors import UserError

FORMAT = "megatron_mm checkpoint 1"
OPTIMIZER_PREFIXES = ("exp_avg/", "exp_avg_sq/", "main/")
_STEP = re.compile(r"step-(\d{8,})$")


def step_directory(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(directory: Path) -> int:
    match = _STEP.search(directory.name)
    return int(match.group(1)) if match else -1


def complete(root: Path) -> list[Path]:
    """Whole checkpoints under `root`, newest first. Unfinished ones carry another name and are passed over."""
    if not root.is_dir():
        return []
    found = [d for d in root.iterdir() if _STEP.fullmatch(d.name) and (d / "index.json").is_file()]
    return sorted(found, key=step_of, reverse=True)


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint whose files have their recorded sizes."""
    for directory in complete(Path(root)):
        if not size_faults(directory):
            return directory
    return None


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Write a small text file and wait for the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one safetensors file durably, read it back, and answer with its size and digest."""
    save_file(dict(tensors), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    with safe_open(path, framework="pt") as written:
        if set(written.keys()) != set(tensors):
            raise OSError(f"{path}: read back other tensors than were written")
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def read_index(directory: Path) -> dict[str, Any]:
    try:
        index = json.loads((directory / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            "not a checkpoint", where=str(directory), found=f"index.json: {error}",
            do="name a folder like RUN_DIR/checkpoints/step-00001000",
        ) from None  # fmt: skip
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError("not a checkpoint of this format", where=str(directory / "index.json"), allowed=FORMAT)
    return index


def size_faults(directory: Path) -> list[str]:
    """Files that are missing or of another size than the index says."""
    try:
        files = read_index(directory)["files"]
    except UserError as error:
        return [str(error)]
    faults = []
    for name, record in files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != record["bytes"]:
            faults.append(f"{name}: {'missing' if size is None else f'{size} bytes'}, expected {record['bytes']}")
    return faults


def digest_faults(directory: Path, names: Iterable[str]) -> list[str]:
    """Files among `names` whose content is not what was written."""
    files = read_index(directory)["files"]
    return [f"{n}: digest differs" for n in names if file_digest(directory / n) != files[n]["sha256"]]


class CheckpointReader:
    """Random access to the global tensors of one checkpoint."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.index = read_index(self.directory)
        faults = size_faults(self.directory)
        if faults:
            raise UserError(
                "a file of the checkpoint is damaged", where=str(self.directory), found="; ".join(faults),
                do="use an older checkpoint of the run",
            )  # fmt: skip
        self._open: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.index["step"])

    @property
    def extra(self) -> dict[str, Any]:
        """Small facts beside the tensors: `samples` consumed, the `tokenizer`'s name, the special token `ids`."""
        return dict(self.index["extra"])

    @property
    def config(self) -> RunConfig:
        return load_config(self.directory / "config.yaml")

    def keys(self) -> list[str]:
        """Names of the model's tensors, without optimizer state."""
        return [k for k in self.index["tensors"] if not k.startswith(OPTIMIZER_PREFIXES)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def __contains__(self, name: str) -> bool:
        return name in self.index["tensors"]

    def tensor(self, name: str) -> Tensor:
        """The full, unsharded tensor."""
        shape = self.shape(name)
        return self.box(name, (0,) * len(shape), shape)

    def box(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The part of tensor `name` that starts at `offset` and has `shape`."""
        entry = self._entry(name)
        out = torch.empty(shape, dtype=getattr(torch, entry["dtype"]))
        missing = out.numel()
        for part in entry["boxes"]:
            low = [max(a, b) for a, b in zip(offset, part["offset"], strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, part["offset"], part["shape"], strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, part["offset"], strict=True))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            found = self._slice(part["file"], part["key"])
            out[target] = found[source] if source else found[:]
            missing -= out[target].numel()
        if missing:
            raise UserError(
                "a part of a tensor is missing", where=f"{self.directory}: {name}", found=f"{missing} elements short"
            )
        return out

    def _entry(self, name: str) -> dict[str, Any]:
        try:
            return self.index["tensors"][name]
        except KeyError:
            raise UserError("the checkpoint has no such tensor", where=str(self.directory), found=name) from None

    def _slice(self, file: str, key: str) -> Any:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.directory / file, framework="pt").__enter__()
            return self._open[file].get_slice(key)
        except (OSError, SafetensorError) as error:
            raise UserError(
                "a file of the checkpoint cannot be read", where=str(self.directory / file), found=str(error)
            ) from None


def read_tensors(directory: str | Path) -> CheckpointReader:
    """Open a checkpoint folder."""
    return CheckpointReader(directory)


def build_index(
    step: int, tensors: dict[str, dict[str, Any]], files: dict[str, dict[str, Any]], extra: dict[str, Any]
) -> dict[str, Any]:
    return {"format": FORMAT, "step": step, "extra": extra, "files": files, "tensors": tensors}


def tensor_entry(tensor_dtype: torch.dtype, shape: Iterable[int]) -> dict[str, Any]:
    return {"dtype": str(tensor_dtype).removeprefix("torch."), "shape": list(shape), "boxes": []}


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            "the checkpoint could not be written", where=str(directory), found=error,
            do="see that there is space and permission",
        ) from None  # fmt: skip


def write_tensors(
    directory: str | Path,
    config: RunConfig,
    tensors: Iterator[tuple[str, Tensor]] | Mapping[str, Tensor],
    extra: dict[str, Any] | None = None,
    tokenizer: Path | None = None,
    max_file_bytes: int = 4 << 30,
    step: int = 0,
) -> None:
    """Write global tensors, for instance imported ones, as a checkpoint. One process; atomic.

    Raises:
        UserError: the folder is there already, or cannot be written.
    """
    directory = Path(directory)
    if directory.exists():
        raise UserError("already there", where=str(directory), do="remove it, or name another folder")
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    if temporary.exists():
        raise UserError("already there", where=str(temporary), do="remove it: a process that was killed left it")
    with _writing(temporary):
        temporary.mkdir(parents=True)
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    entries: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"rank-{len(files):05d}.safetensors"
        with _writing(temporary):
            files[name] = write_tensor_file(temporary / name, held)
        held.clear()

    try:
        for name, tensor in items:
            if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > max_file_bytes:
                flush()
            entries[name] = tensor_entry(tensor.dtype, tensor.shape)
            box = {"file": f"rank-{len(files):05d}.safetensors", "key": name, "offset": [0] * tensor.ndim}
            entries[name]["boxes"].append({**box, "shape": list(tensor.shape)})
            held[name] = tensor.contiguous()
        flush()
        with _writing(temporary):
            finish(temporary, directory, build_index(step, entries, files, extra or {}), config, tokenizer)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def finish(temporary: Path, directory: Path, index: dict[str, Any], config: RunConfig, tokenizer: Path | None) -> None:
    """Write what is small, wait for the disk, and give the checkpoint its name: from then on it exists."""
    write_durably(temporary / "config.yaml", dump_yaml(config))
    if tokenizer is not None:
        index["extra"]["tokenizer"] = copy_tokenizer(tokenizer, temporary)
    write_durably(temporary / "index.json", json.dumps(index))
    sync_directory(temporary)
    os.replace(temporary, directory)
    sync_directory(directory.parent)
