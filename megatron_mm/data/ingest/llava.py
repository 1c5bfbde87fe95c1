r"""Conversations in LLaVA's form: a JSON list of records, or one a line (.jsonl, also .gz, .zst).

    {"id": …, "image": "x.jpg" | ["x.jpg", …], "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                                 {"from": "gpt", "value": "A cat."}, …]}

Each "<image>" in the turns gives way to the next picture; their numbers must agree. "image" is absent where a
conversation is text alone. Files are looked for in folders beside the list (see `beside`). Other fields are ignored.

What becomes of it, where [ ] marks what the model is trained to say:

    system text
    USER: IMAGE
    What is it?
    ASSISTANT:[ A cat.
    USER:] And its colour?
    ASSISTANT:[ Black.][eos]

An answer's end is a part of it, so that the model learns to stop: eos after the last one, a new line and "USER:" after
the others, since a new line alone could as well go on with the answer.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mm.config import Kind
from megatron_mm.data.ingest import CHUNK_BYTES, BadRecord, Chunk, Part, Picture, Record, Text
from megatron_mm.data.ingest.beside import PICTURE_BYTES, check_pictures, find_picture, picture_folders
from megatron_mm.data.ingest.fields import FieldError, json_object, records, text_field
from megatron_mm.data.ingest.json_array import find_borders, is_array
from megatron_mm.data.ingest.lines import line_chunks, read_lines
from megatron_mm.errors import UserError

USER, ASSISTANT = "USER:", "\nASSISTANT:"
TURN_END = "\n"
MARK = "<image>"

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class LLaVA:
    """The format above. A chunk is a range of records of a list, or a range of bytes of lines."""

    name = "llava"
    kinds: tuple[Kind, ...] = ("conversation",)

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes

    def chunks(self, paths: Sequence[Path]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for path in paths:
            of_path = self._array_chunks(path) if _is_array(path) else self._line_chunks(path)
            if of_path:
                check_pictures(path, _names(of_path[0]))
            chunks += of_path
        return chunks

    def _line_chunks(self, path: Path) -> list[Chunk]:
        return line_chunks([path], self.chunk_bytes, lambda line: len(_names_in(line)))

    def _array_chunks(self, path: Path) -> list[Chunk]:
        chunks: list[Chunk] = []
        borders = find_borders(path)
        first, size = 0, 0
        for number, (start, end) in enumerate(zip(borders.starts, borders.ends, strict=True)):
            size += end - start + PICTURE_BYTES
            if size >= self.chunk_bytes or number == len(borders.starts) - 1:
                chunks.append(Chunk(path, first, number + 1, size))
                first, size = number + 1, 0
        return chunks

    def read(self, chunk: Chunk, kind: Kind) -> Iterator[Record | BadRecord]:
        folders = picture_folders(chunk.path)
        return records(_records(chunk), lambda record: _parts(json_object(record), folders))


def _is_array(path: Path) -> bool:
    try:
        return is_array(path)
    except OSError as error:
        raise UserError("cannot read the input", where=str(path), found=error.strerror) from None


def _records(chunk: Chunk) -> Iterator[tuple[str, bytes] | BadRecord]:
    if not _is_array(chunk.path):
        yield from read_lines(chunk)
        return
    borders = find_borders(chunk.path)
    with chunk.path.open("rb") as file:
        for number in range(chunk.start, chunk.end):
            file.seek(borders.starts[number])
            yield f"{chunk.path}:[{number}]", file.read(borders.ends[number] - borders.starts[number])


def _names(chunk: Chunk) -> Iterator[str]:
    """Files that the records of a chunk name."""
    for item in _records(chunk):
        if not isinstance(item, BadRecord):
            yield from _names_in(item[1])


def _names_in(record: bytes) -> list[str]:
    try:
        return _images(json_object(record))
    except FieldError:
        return []


def _images(record: dict[str, Any]) -> list[str]:
    value = record.get("image")
    if value is None or value == "":
        return []
    return [text_field(name, "image") for name in (value if isinstance(value, list) else [value])]


def _turns(record: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """What the system says ("" where it is silent), then questions with their answers."""
    turns = record.get("conversations")
    if not isinstance(turns, list):
        raise FieldError('"conversations" is missing' if turns is None else '"conversations" is no list')
    said: list[tuple[str, str]] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise FieldError('a turn of "conversations" is no object')
        speaker = text_field(turn.get("from"), "from")
        if speaker not in _ROLES:
            raise FieldError(f'"from" is none of {", ".join(_ROLES)}: {speaker[:40]!a}')
        said.append((_ROLES[speaker], text_field(turn.get("value"), "value").strip()))
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    if not said or [role for role, _ in said] != ["user", "assistant"] * (len(said) // 2):
        raise FieldError("turns do not alternate, from a question to an answer")
    if not all(text for role, text in said if role == "assistant"):
        raise FieldError("an answer is empty")
    return system, [(question[1], answer[1]) for question, answer in zip(said[::2], said[1::2], strict=True)]


def _parts(record: dict[str, Any], folders: Sequence[Path]) -> tuple[Part, ...]:
    if record.get("video") is not None:
        raise FieldError('a "video": only pictures are taken')
    names, (system, turns) = _images(record), _turns(record)
    pieces: list[Text] = [Text(system + TURN_END, trained=False)] if system else []
    for number, (question, answer) in enumerate(turns):
        last = number == len(turns) - 1
        before = "" if number else USER  # a later turn's USER: ends the answer before it
        pieces.append(Text(before + (f" {question}" if question else "") + ASSISTANT, trained=False))
        pieces.append(Text(f" {answer}" + ("" if last else TURN_END + USER)))
    marks = sum(piece.text.count(MARK) for piece in pieces)
    if marks != len(names):
        raise FieldError(f"{marks} marks {MARK}, but {len(names)} pictures")
    parts: list[Part] = []
    pictures = (_picture(name, folders) for name in names)
    for piece in pieces:
        texts = piece.text.split(MARK)
        for place, text in enumerate(texts):
            if place:
                parts.append(next(pictures))
            if place < len(texts) - 1:
                text = text.rstrip(" ")
            if not text:
                continue
            last_part = parts[-1] if parts else None
            if isinstance(last_part, Text) and last_part.trained == piece.trained:
                parts[-1] = Text(last_part.text + text, piece.trained)
            else:
                parts.append(Text(text, piece.trained))
    return tuple(parts)


def _picture(name: str, folders: Sequence[Path]) -> Picture:
    path = find_picture(name, folders)
    if not path:
        raise FieldError(f"no picture beside the list: {name[:200]!a}")
    return Picture(path)
