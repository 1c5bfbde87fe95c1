"""Members of a tar file, one after the other, from files that may be damaged or hostile.

Python's own `tarfile` takes a damaged or missing header for the end of the file, and reads as much as a header claims.
Here damage raises, links and devices are told apart and never followed, and only headers are read: content is the
caller's to ask for.

    | header 512 | content, padded to 512 | header 512 | … | two blocks of zeros |
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = 512
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or extended header; they are read whole
_ZERO = bytes(BLOCK)
_PLAIN = (b"0", b"\0", b"7")  # types of a plain file
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes, whatever size they state


class TarError(ValueError):
    """The rest of the file cannot be read."""


@dataclass(frozen=True)
class Member:
    name: bytes  # as it stands there: any bytes
    plain: bool  # no link, folder or device
    offset: int  # of its content in the file
    size: int


def members(file: IO[bytes]) -> Iterator[Member]:
    """All members but folders, in order; several tar files written one after the other count as one.

    Raises:
        TarError: a header is damaged, a member or the end is missing. All members before were whole, but the last given
            may be the one that is cut short.
    """
    file_size, position, ended = file.seek(0, io.SEEK_END), 0, False
    name: bytes | None = None  # from an extension before the member
    size: int | None = None
    while position < file_size:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise TarError(f"truncated: within a header at byte {position}")
        if header == _ZERO:
            position, ended = position + BLOCK, True
            continue
        if not is_header(header):
            raise TarError(f"damaged: no header at byte {position}")
        ended, kind = False, header[156:157]
        length = _number(header[124:136], position) if size is None or kind in b"LKxg" else size
        if kind in _WITHOUT_CONTENT:
            length = 0
        offset = position + BLOCK
        if kind in b"LKxg":
            if length > _MAX_EXTENSION_BYTES:
                raise TarError(f"damaged: an extended header of {length} bytes at byte {position}")
            _check_there(offset, length, file_size)
            content = file.read(length)
            if kind == b"L":
                name = content.rstrip(b"\0")
            elif kind == b"x":
                fields = _pax_fields(content, position)
                name = fields.get(b"path", name)
                size = _decimal(fields[b"size"], position) if b"size" in fields else size
        else:
            if kind != b"5":
                yield Member(name or _name(header), kind in _PLAIN, offset, length)
            _check_there(offset, length, file_size)
            name, size = None, None
        position = offset + -(-length // BLOCK) * BLOCK
    if not ended:
        raise TarError("truncated: the mark of the end is missing")


def _check_there(offset: int, length: int, file_size: int) -> None:
    if offset + length > file_size:
        raise TarError(f"truncated: {length} bytes from byte {offset} on, of which {file_size - offset} are there")


def is_header(block: bytes) -> bool:
    """Whether a block's checksum is that of a header: the sum of its bytes, with blanks for the checksum itself."""
    try:
        stated = int(block[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return len(block) == BLOCK and stated == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _name(header: bytes) -> bytes:
    name, prefix = _string(header[:100]), _string(header[345:500])
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _string(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes, position: int) -> int:
    """Octal digits or, with the top bit set, the bytes of a large number."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
        if number < 1 << 62:
            return number
        raise TarError(f"damaged: a size of {number} at byte {position}")
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if not all(digit in b"01234567" for digit in digits):
        raise TarError(f"damaged: a size of {digits!r} at byte {position}")
    return int(digits, 8)


def _decimal(digits: bytes, position: int) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise TarError(f"damaged: a size of {digits[:40]!r} at byte {position}")
    return int(digits)


def _pax_fields(content: bytes, position: int) -> dict[bytes, bytes]:
    """Of records `LENGTH KEY=VALUE\\n`, where LENGTH counts the whole record."""
    fields = {}
    while content := content.lstrip(b"\0"):
        digits = content.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if not equals or length > len(content) or not value.endswith(b"\n"):
            raise TarError(f"damaged: an extended header at byte {position}")
        fields[key] = value[:-1]
        content = content[length:]
    return fields
