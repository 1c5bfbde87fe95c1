"""Rows of Parquet files, a row group at a time, in chunks of row groups that workers share.

A row's value is looked at by itself: one that cannot be read (text that is not UTF-8) spoils its row alone. A row group
that cannot be read is told as one bad record, with the rows it held.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mm.data.ingest import BadRecord, Chunk
from megatron_mm.data.ingest.beside import PICTURE_BYTES
from megatron_mm.errors import UserError

_BATCH_BYTES = 16 << 20  # of rows in memory at once, about
_BATCH_ROWS = 1024
_READ_AHEAD = 1 << 20  # bytes of a column; without it pyarrow holds a row group's whole column


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises UserError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading Parquet needs the package pyarrow", do="pip install 'megatron-mm[ingest]'") from None
    try:
        return pyarrow.parquet.ParquetFile(
            path, buffer_size=_READ_AHEAD, pre_buffer=False, page_checksum_verification=True
        )
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(
            "this is no Parquet file", where=str(path), found=str(error).partition("\n")[0],
            do="download or write it anew",
        ) from None  # fmt: skip
    except OSError as error:
        raise UserError("cannot read the input", where=str(path), found=error.strerror or error) from None


def row_group_chunks(paths: Sequence[Path], chunk_bytes: int, check: Callable[[Path, Any], float]) -> list[Chunk]:
    """Files cut at row groups, about `chunk_bytes` each.

    Args:
        check: is called with each opened file, and tells how many pictures a row names that lie elsewhere; they count
            too.
    """
    chunks: list[Chunk] = []
    for path in paths:
        with open_parquet(path) as file:
            pictures = check(path, file)
            # Of a group only numbers of its own are asked: pyarrow aborts the process on damaged ones of its columns.
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            stored = path.stat().st_size / max(1, sum(group.total_byte_size for group in groups))
            start, size = 0, 0.0
            for number, group in enumerate(groups, start=1):
                size += group.total_byte_size * stored + group.num_rows * pictures * PICTURE_BYTES
                if size >= chunk_bytes or number == len(groups):
                    chunks.append(Chunk(path, start, number, int(size)))
                    start, size = number, 0.0
    return chunks


def find_column(schema: Any, names: Sequence[str], holds: str) -> str:
    """The first column of these names, upper or lower case alike, whose values are as `holds` says; "" without one.

    Args:
        holds: "string", "picture" (bytes, a struct of bytes, or a string), or "list of …" of these.
    """
    return next((f.name for name in names for f in schema if f.name.lower() == name and _fits(f.type, holds)), "")


def _fits(kind: Any, holds: str) -> bool:
    from pyarrow import types

    if holds.startswith("list of "):
        lists = types.is_list(kind) or types.is_large_list(kind)
        return lists and _fits(kind.value_type, holds.removeprefix("list of "))
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return True
    if holds == "picture" and types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if not fields.keys() >= {"bytes", "path"}:
            return False
        no_paths = types.is_null(fields["path"])  # the type of a column whose every value is None
        return _is_binary(fields["bytes"]) and (no_paths or _fits(fields["path"], "string"))
    return holds == "picture" and _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def wrong_columns(path: Path, file: Any, what: str, allowed: str) -> UserError:
    found = ", ".join(f"{field.name} ({field.type})" for field in file.schema_arrow)
    return UserError(what, where=str(path), found=f"columns {found}", allowed=allowed)


def read_rows(file: Any, chunk: Chunk, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]] | BadRecord]:
    """Of each row, its id (FILE:row N, the first is 0) and the values of the columns."""
    first = sum(file.metadata.row_group(i).num_rows for i in range(chunk.start))
    for number in range(chunk.start, chunk.end):
        group = file.metadata.row_group(number)
        row, end = first, first + group.num_rows
        size = max(1, group.total_byte_size // max(1, group.num_rows))
        try:
            for batch in file.iter_batches(
                batch_size=max(1, min(_BATCH_ROWS, _BATCH_BYTES // size)), row_groups=[number],
                columns=list(columns), use_threads=False,
            ):  # fmt: skip
                arrays = [batch.column(name) for name in columns]
                for i in range(batch.num_rows):
                    yield _row(f"{chunk.path}:row {row}", [array[i] for array in arrays])
                    row += 1
            if row != end:
                raise ValueError(f"it holds {row - first} rows")
        except Exception as error:  # of damaged data pyarrow raises ArrowException, OSError, MemoryError and others
            where = f"{chunk.path}:rows {row} to {end - 1}"
            yield BadRecord(where, f"damaged row group: number {number}: {error}", damaged_input=True)
        first = end


def _row(where: str, scalars: list[Any]) -> tuple[str, list[Any]] | BadRecord:
    try:
        return where, [scalar.as_py() for scalar in scalars]
    except UnicodeDecodeError as error:
        return BadRecord(where, f"not UTF-8: {error}")
