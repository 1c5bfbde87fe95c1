"""Device code of other GPUs is dropped from what travels."""

import struct
from pathlib import Path

import slim


def elf_with(section: bytes) -> bytes:
    """A 64-bit ELF file with one section .nv_fatbin."""
    names = b"\0.nv_fatbin\0.shstrtab\0"
    data_at = 64
    names_at = data_at + len(section)
    table = names_at + len(names)
    header = b"\x7fELF\x02\x01\x01" + bytes(33) + struct.pack("<Q", table) + bytes(10) + struct.pack("<HHH", 64, 3, 2)
    entry = struct.Struct("<IIQQQQ24x")
    rows = [(0,) * 6, (1, 1, 0, 0, data_at, len(section)), (12, 3, 0, 0, names_at, len(names))]
    return header + section + names + b"".join(entry.pack(*row) for row in rows)


def container(*entries: tuple[int, int, bytes]) -> bytes:
    """(kind, architecture, code)."""
    body = b"".join(
        struct.pack("<HHIQ", kind, 0, 64, len(code)) + bytes(12) + struct.pack("<I", arch) + bytes(32) + code
        for kind, arch, code in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_only_the_wanted_architecture_stays(tmp_path: Path) -> None:
    ptx, old, new, newest = (1, 90, b"p" * 24), (2, 80, b"o" * 16), (2, 90, b"n" * 40), (2, 100, b"x" * 8)
    first, second = container(ptx, old, new, newest), container(old)
    section = first + second
    library = tmp_path / "library.so"
    library.write_bytes(elf_with(section))
    kept, dropped = slim.slim(library, 90)
    content = library.read_bytes()[64 : 64 + len(section)]
    alone = container(new)
    assert content[: len(alone)] == alone
    assert not content[len(alone) : len(first)].strip(b"\0")
    assert content[len(first) :] == second, "nothing to keep: left alone"
    assert kept == len(alone) - 16
    assert kept + dropped == len(first) - 16
    assert slim.slim(library, 90) == (kept, 0), "once is enough"


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for content in (b"#!/bin/sh\n" * 20, elf_with(b"no fat binary in here".ljust(64))):
        (tmp_path / "file").write_bytes(content)
        assert slim.slim(tmp_path / "file", 90) == (0, 0)
        assert (tmp_path / "file").read_bytes() == content
