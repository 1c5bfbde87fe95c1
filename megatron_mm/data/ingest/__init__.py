"""Raw records to a source: one small reader a format, pictures made safe (`images`), the engine (`build`).

A reader (`Format`) cuts its inputs into chunks, each of which one worker reads. The cut depends on the inputs alone, so
the source that comes out does not depend on the workers. A record that cannot be used is quarantined with its reason;
it never stops the build, unless there are too many.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_mm.config import Kind

CHUNK_BYTES = 256 << 20  # of input, about, where a format can be cut: minutes of a worker's time


@dataclass(frozen=True)
class Text:
    """Text as it will be encoded. Tokens of an untrained one (a user's turn) carry no loss."""

    text: str
    trained: bool = True


@dataclass(frozen=True)
class Picture:
    """An encoded picture, or the local file that holds it.

    `url` is where it came from, for filters; "" where that is unknown.
    """

    content: bytes | Path
    url: str = ""


Part = Text | Picture


@dataclass(frozen=True)
class Record:
    """One document: text and pictures in reading order.

    `id` tells a person where it stood: `FILE:LINE`, `FILE!MEMBER`, `FILE:row N`.
    """

    id: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read, and why: a short kind, then a colon and details."""

    id: str
    reason: str
    damaged_input: bool = False  # the rest of this chunk cannot be read either


@dataclass(frozen=True)
class Chunk:
    """The share of an input that one worker reads; start and end in the format's own units."""

    path: Path
    start: int
    end: int
    bytes: int  # of input, about; for progress


class Format(Protocol):
    """A reader. Stateless: workers get it by its name."""

    name: str
    kinds: tuple[Kind, ...]  # that it can give; the first is the default

    def chunks(self, paths: Sequence[Path]) -> list[Chunk]:
        """The inputs cut into chunks, in order: the same for the same inputs, whatever the machine.

        Raises:
            UserError: an input cannot be opened, or is none of this format.
        """

    def read(self, chunk: Chunk, kind: Kind) -> Iterator[Record | BadRecord]:
        """Records of a chunk in the input's order, bad ones in their place."""
