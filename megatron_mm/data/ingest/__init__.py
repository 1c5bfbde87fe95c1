"""Raw records to a source: one small reader a format (`jsonl`), pictures made safe (`images`), the loop (`build`).

A record that cannot be used is quarantined with its reason; it never stops the build, unless there are too many.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_mm.config import Kind


@dataclass(frozen=True)
class ImageFile:
    """A picture that lies beside the records."""

    path: Path


@dataclass(frozen=True)
class Record:
    """One document: text and pictures in reading order.

    `id` tells a person where it stood (`FILE:LINE`); a picture is a file or its encoded bytes.
    """

    id: str
    kind: Kind
    parts: tuple[str | ImageFile | bytes, ...]


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read, and why."""

    id: str
    reason: str
