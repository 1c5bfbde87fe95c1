"""Leave in shared libraries the device code of one GPU architecture alone: slim.py ARCH LIBRARY… (90 is sm_90, sm_90a).

CUDA libraries carry machine code for many architectures in "fat binaries": containers of entries, one an architecture.
Entries of the wanted one move up behind the container's header, the header is told their size, what is left over
becomes zeros, which compress to nothing. Containers stay at their addresses and entries are NVIDIA's byte for byte. A
container without such an entry stays as it is.
"""

import mmap
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

_SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
_CONTAINER = 0xBA55ED50  # magic number; version, header size, data size follow
_MACHINE_CODE = 2  # kind of an entry; 1 is PTX


def _sections(elf: mmap.mmap) -> Iterator[tuple[int, int]]:
    """(offset, size) of those that hold fat binaries, in a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        if elf[start : elf.find(b"\0", start)] in _SECTIONS:
            yield offset, length


def _entries(elf: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(kind, architecture, offset, size) of each entry of a container."""
    while start < end:
        kind, _, header, payload = struct.unpack_from("<HHIQ", elf, start)
        yield kind, struct.unpack_from("<I", elf, start + 28)[0], start, header + payload
        start += header + payload
    if start != end:
        raise ValueError(f"fat binary ends at {start:#x}, not at {end:#x}")


def slim(library: Path, arch: int) -> tuple[int, int]:
    """Bytes of device code (kept, dropped); a file that is no ELF is left alone."""
    kept = dropped = 0
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as elf:
        if elf[:5] != b"\x7fELF\x02":
            return 0, 0
        for offset, length in _sections(elf):
            at, end = offset, offset + length
            while at + 16 <= end:
                magic, _, header, size = struct.unpack_from("<IHHQ", elf, at)
                if magic != _CONTAINER:
                    at += 8
                    continue
                first, last = at + header, at + header + size
                found = list(_entries(elf, first, last))
                wanted = b"".join(elf[o : o + n] for kind, a, o, n in found if kind == _MACHINE_CODE and a == arch)
                if wanted:
                    elf[first:last] = wanted + bytes(size - len(wanted))
                    struct.pack_into("<Q", elf, at + 8, len(wanted))
                    kept, dropped = kept + len(wanted), dropped + size - len(wanted)
                at = (last + 7) // 8 * 8
    return kept, dropped


def main() -> None:
    for name in sys.argv[2:]:
        kept, dropped = slim(Path(name), int(sys.argv[1]))
        if kept or dropped:
            print(f"{Path(name).name}: {kept >> 20} MiB of device code kept, {dropped >> 20} MiB dropped", flush=True)


if __name__ == "__main__":
    main()
