"""Documents to sequences, once, before anything is mixed or shuffled.

    lengths, image places ──pieces──▶ windows of WINDOW pieces ──fit──▶ sequences of at most `seq_length` positions and
                                                                       `max_images` images

It is a pure function of the source and the limits, its memory does not grow with the source, and it is kept on disk
under a key of everything that it depends on:

    NAME.packed-KEY-SPLIT/pieces.npy     rows of document, start, end; sequence after sequence, in the documents' order
                          offsets.npy    int64 [sequences + 1]; sequence i holds pieces[offsets[i]:offsets[i + 1]]
                          images.npy     int32 [sequences]
                          packing.json   totals, and the key in full
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_mm.config import SequenceLayout
from megatron_mm.data.fit import fit
from megatron_mm.data.pieces import PIECE, Documents, Limits, Piece, Pieces, Split, splitmix64, windows
from megatron_mm.data.source import Source
from megatron_mm.data.storage import local_base
from megatron_mm.errors import UserError

__all__ = ["Limits", "PackedSource", "Piece", "Split", "pack"]

VERSION = 4  # of the algorithm; part of the key
WINDOW = 1 << 16  # pieces packed together
_ARRAYS = {"pieces": PIECE, "offsets": np.dtype("<i8"), "images": np.dtype("<i4")}
_QUIET = 3.0  # seconds before progress is shown


class _Column:
    """A one-dimensional .npy that is written as it grows: its length enters the header at the end."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype, self.rows = dtype, 0
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
        self._write_header()
        self._start = self._file.tell()

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.rows,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def add(self, rows: np.ndarray) -> None:
        self._file.write(rows.astype(self.dtype, copy=False).tobytes())
        self.rows += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()  # numpy leaves room in it for a length of any size
        assert self._file.tell() == self._start
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class _Progress:
    """A line on stderr, once packing takes longer than a moment; rewritten on a terminal, now and then elsewhere."""

    def __init__(self, name: str, documents: int) -> None:
        self.name, self.documents, self.started = name, documents, time.monotonic()
        self.interval = 0.5 if sys.stderr.isatty() else 10.0
        self.shown = self.started + _QUIET - self.interval

    def show(self, read: int, sequences: int) -> None:
        now = time.monotonic()
        if now - self.shown < self.interval:
            return
        self.shown = now
        rate = read / (now - self.started)
        line = (
            f"packing {self.name}: {read / self.documents:.1%}, {read} documents ({rate:.0f}/s) in {sequences} "
            f"sequences, {(self.documents - read) / rate / 60:.1f} min left"
        )
        sys.stderr.write(f"\r{line}\x1b[K" if sys.stderr.isatty() else line + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        if sys.stderr.isatty() and self.shown > self.started + _QUIET:
            sys.stderr.write("\r\x1b[K")


def pack(
    folder: Path,
    source: Documents,
    split: Split,
    validation_fraction: float,
    limits: Limits,
    window: int = WINDOW,
    name: str = "",
) -> dict[str, int]:
    """Lay the documents of a split into sequences, and write all but packing.json into the folder.

    Args:
        name: of the source, for progress.
    Returns:
        totals: sequences, pieces, images, positions.
    """
    columns = {column: _Column(folder / f"{column}.npy", dtype) for column, dtype in _ARRAYS.items()}
    columns["offsets"].add(np.zeros(1, dtype=np.int64))
    images = positions = 0
    progress = _Progress(name, len(source))
    for pieces, read in windows(source, split, validation_fraction, limits, window):
        sequence, count = _fit_apart(pieces, limits)
        ends = columns["pieces"].rows + np.cumsum(np.bincount(sequence, minlength=count))
        columns["pieces"].add(pieces.rows[np.argsort(sequence, kind="stable")])
        columns["offsets"].add(ends)
        columns["images"].add(np.bincount(sequence, weights=pieces.images, minlength=count))
        images += int(pieces.images.sum())
        positions += int(pieces.positions.sum())
        progress.show(read, columns["images"].rows)
    progress.end()
    for column in columns.values():
        column.close()
    rows = {"sequences": columns["images"].rows, "pieces": columns["pieces"].rows}
    return rows | {"images": images, "positions": positions}


def _fit_apart(pieces: Pieces, limits: Limits) -> tuple[np.ndarray, int]:
    """`fit`, with neighbours parted: it takes pieces of one size as they come, and sources often hold related documents
    one after the other, which would then fill whole sequences."""
    shuffled = np.argsort(splitmix64(np.arange(len(pieces), dtype=np.uint64)))
    found, count = fit(pieces.positions[shuffled], pieces.images[shuffled], limits)
    sequence = np.empty_like(found)
    sequence[shuffled] = found
    return sequence, count


class PackedSource:
    """The sequences of one split of a source. Opening it reads a few bytes, however many there are.

    Attributes:
        image_counts: int32 [sequences], mapped.
        images: of all sequences.
    """

    def __init__(self, folder: Path, layout: SequenceLayout) -> None:
        try:
            totals = json.loads((folder / "packing.json").read_bytes())["totals"]
            sequences, pieces, self.images, self._positions = (
                int(totals[name]) for name in ("sequences", "pieces", "images", "positions")
            )
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r" if pieces else None, allow_pickle=False)
                for name in _ARRAYS
            }
            shapes = {"pieces": (pieces,), "offsets": (sequences + 1,), "images": (sequences,)}
            whole = all(arrays[n].shape == shapes[n] and arrays[n].dtype == dtype for n, dtype in _ARRAYS.items())
            whole = whole and int(arrays["offsets"][-1]) == pieces
        except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
            raise self._damaged(folder, str(error)) from None
        if not whole:
            raise self._damaged(folder, "files that do not belong together")
        # Plain arrays over the maps: their elements are faster to get at.
        self._pieces, self._offsets, self.image_counts = (arrays[name].view(np.ndarray) for name in _ARRAYS)
        self._layout = layout

    @staticmethod
    def _damaged(folder: Path, found: str) -> UserError:
        return UserError("the packing is damaged", where=str(folder), found=found, do="delete this folder")

    @classmethod
    def open(
        cls,
        source: Source,
        split: Split,
        layout: SequenceLayout,
        validation_fraction: float,
        cache_dir: str | Path | None = None,
    ) -> "PackedSource":
        """Open the packing of a split, made first if it is not there yet. Several processes may do so at once.

        Args:
            cache_dir: folder of the packings; None: beside the source.
        """
        limits = Limits(layout.seq_length, layout.max_images, layout.tokens_per_image)
        key = {
            "version": VERSION,
            "window": WINDOW,
            "source": source.digest,
            "split": split,
            "fraction": validation_fraction,
            "limits": [limits.positions, limits.images, limits.tokens_per_image],
        }
        base = local_base(source.prefix, cache_dir)
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        folder = base.with_name(f"{base.name}.packed-{digest}-{split}")
        if not folder.exists():
            try:
                _build(folder, source, split, validation_fraction, limits, key)
            except OSError as error:
                raise UserError(
                    "cannot write the packing", where=str(folder), found=error.strerror,
                    do="make room, or set data.cache_dir to a folder that can be written",
                ) from None  # fmt: skip
        return cls(folder, layout)

    def __len__(self) -> int:
        return len(self.image_counts)

    def pieces(self, i: int) -> list[Piece]:
        """Pieces of sequence i, in the documents' order."""
        return [Piece(*row) for row in self._pieces[int(self._offsets[i]) : int(self._offsets[i + 1])].tolist()]

    def image_count(self, i: int) -> int:
        return int(self.image_counts[i])

    @property
    def fill(self) -> float:
        """Share of the positions that are not padding, 0 to 1."""
        return self._positions / max(1, len(self) * self._layout.seq_length)


def _build(
    folder: Path, source: Source, split: Split, validation_fraction: float, limits: Limits, key: dict[str, Any]
) -> None:
    """Under a temporary name, then renamed; whoever comes second drops its own, which is the same."""
    source.check_indices()  # a damaged index could ask for pieces without end
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        totals = pack(temporary, source, split, validation_fraction, limits, name=f"{source.prefix} ({split})")
        with (temporary / "packing.json").open("w") as file:
            json.dump({"totals": totals, "key": key}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
