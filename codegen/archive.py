"""Zip files of one shape: members stored as they are, each at a multiple of 64 bytes, and no second way to write them.

The last 64 bytes, the zip's comment, are the SHA-256 in hex of all bytes before them, less the data of members whose
checksums stand in the manifest. So every byte is under one checksum. Standard library only; `docs/artifact-format.md`
is the specification.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "signature.json"
ALIGNMENT_BYTES: Final = 64
"""Generated code loads whole vectors from its arguments; TVM's own kAllocAlignment."""
DIGEST_CHARACTERS: Final = 64
LARGEST_BYTES: Final = 2**32 - 1
"""Sizes and offsets in a plain zip have 32 bits."""
MOST_MEMBERS: Final = 4096

_DIGESTED: Final = (MANIFEST, SIGNATURE)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", re.ASCII)
_LONGEST_NAME: Final = 200
_LOCAL: Final = struct.Struct("<IHHHHHIIIHH")
_CENTRAL: Final = struct.Struct("<IHHHHHHIIIHHHHHII")
_END: Final = struct.Struct("<IHHHHIIH")
_LOCAL_MARK, _CENTRAL_MARK, _END_MARK = 0x04034B50, 0x02014B50, 0x06054B50
_VERSION_NEEDED, _MADE_BY = 10, 0x0314  # stored files; Unix, version 2.0
_FIRST_DATE, _FIRST_TIME = 0x0021, 0  # 1 January 1980: the same content gives the same bytes
_ATTRIBUTES: Final = 0o100644 << 16
_EXTRA_MARK: Final = 0xD935  # extra field that Android's zipalign pads with
_EXTRA_HEAD: Final = struct.Struct("<HHH")


class Malformed(ValueError):
    """The bytes are not those of such a file.

    Args:
        expected: What should be there.
        found: What is there.
    """

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class Entry:
    """One member.

    Attributes:
        name: Path inside the archive.
        size: Bytes of its data.
        crc32: The zip's own checksum of them.
        header: Byte at which its header begins.
        start: Byte at which its data begin.
    """

    name: str
    size: int
    crc32: int
    header: int
    start: int

    @property
    def end(self) -> int:
        """Byte after its data."""
        return self.start + self.size


def is_name(name: str) -> bool:
    """Tell whether a member may be called so: ASCII letters, digits, `.`, `_`, `-`, and `/` between parts."""
    return len(name) <= _LONGEST_NAME and _NAME.fullmatch(name) is not None


def pack(members: Mapping[str, Buffer]) -> Iterator[Buffer]:
    """Yield the pieces of an archive, in order.

    Raises:
        Malformed: It would be larger than such files can be, or a name is none.
    """
    entries = _place([(name, len(data), zlib.crc32(data)) for name, data in members.items()])
    digest = hashlib.sha256()
    for entry, data in zip(entries, members.values(), strict=True):
        header = _local_header(entry)
        digest.update(header)
        if entry.name in _DIGESTED:
            digest.update(data)
        yield header
        yield data
    directory = _directory(entries)
    digest.update(directory)
    yield directory
    yield digest.hexdigest().encode()


def parse(data: memoryview) -> dict[str, Entry]:
    """Read the members' places; whatever is not as `pack` writes it is refused.

    Only what the directory says is taken from the file. All headers are made again from it and compared, so no two
    programs can read the file differently.

    Raises:
        Malformed: The bytes are something else.
    """
    end = len(data) - _END.size - DIGEST_CHARACTERS
    if bytes(data[:4]) != _LOCAL_MARK.to_bytes(4, "little"):
        raise Malformed("a .nas file", "a file that starts otherwise" if len(data) else "an empty file")
    if end < 0 or len(data) > LARGEST_BYTES:
        raise Malformed("a .nas file", f"{len(data)} bytes")
    fields = _END.unpack_from(data, end)
    count, directory_start = fields[3], fields[6]
    if fields[0] != _END_MARK or not 0 < count <= MOST_MEMBERS or directory_start > end:
        raise Malformed("the directory of a zip file at the end", "something else")
    entries = _place(_listed(data[directory_start:end], count))
    names = [entry.name for entry in entries]
    if len(set(names)) != count or names[0] != MANIFEST:
        raise Malformed(f"{MANIFEST} first, and each member once", "other members")
    if entries[-1].end != directory_start or _directory(entries) != data[directory_start:-DIGEST_CHARACTERS]:
        raise Malformed("a directory that fits the members", "another one")
    for entry in entries:
        if _local_header(entry) != data[entry.header : entry.start]:
            raise Malformed(f"the directory's word on {entry.name} in its header", "another header")
    return {entry.name: entry for entry in entries}


def check_digest(data: memoryview, entries: Mapping[str, Entry]) -> None:
    """Check the checksum at the end.

    Raises:
        Malformed: It is not that of the bytes before it.
    """
    digest, done = hashlib.sha256(), 0
    for entry in entries.values():
        digest.update(data[done : entry.end if entry.name in _DIGESTED else entry.start])
        done = entry.end
    digest.update(data[done:-DIGEST_CHARACTERS])
    if digest.hexdigest().encode() != data[-DIGEST_CHARACTERS:]:
        raise Malformed("the checksum at its end to match its bytes", "another checksum")


def _place(members: Sequence[tuple[str, int, int]]) -> list[Entry]:
    """Give each member its place: headers are padded so that data begin at a multiple of `ALIGNMENT_BYTES`."""
    entries: list[Entry] = []
    offset = 0
    for name, size, crc32 in members:
        if not is_name(name):
            raise Malformed("names of ASCII letters, digits, dots and dashes", repr(name)[:80])
        least = offset + _LOCAL.size + len(name) + _EXTRA_HEAD.size
        start = -(-least // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        entries.append(Entry(name, size, crc32, offset, start))
        offset = start + size
        if offset > LARGEST_BYTES:
            raise Malformed("less than 4 GiB", f"{offset} bytes")
    return entries


def _listed(directory: memoryview, count: int) -> list[tuple[str, int, int]]:
    """Return name, size and CRC of each member as the directory has them, unchecked."""
    found: list[tuple[str, int, int]] = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory):
            raise Malformed(f"a directory of {count} members", f"{len(found)} members")
        fields = _CENTRAL.unpack_from(directory, at)
        crc32, size, length = fields[7], fields[9], fields[10]
        name = bytes(directory[at + _CENTRAL.size : at + _CENTRAL.size + length])
        found.append((name.decode("ascii", "replace"), size, crc32))
        at += _CENTRAL.size + length
    return found


def _local_header(entry: Entry) -> bytes:
    name = entry.name.encode()
    extra = entry.start - entry.header - _LOCAL.size - len(name)
    fixed = _LOCAL.pack(
        _LOCAL_MARK,
        *(_VERSION_NEEDED, 0, 0, _FIRST_TIME, _FIRST_DATE),
        *(entry.crc32, entry.size, entry.size, len(name), extra),
    )
    return fixed + name + _EXTRA_HEAD.pack(_EXTRA_MARK, extra - 4, ALIGNMENT_BYTES).ljust(extra, b"\0")


def _directory(entries: Sequence[Entry]) -> bytes:
    """Return the directory and the end of the file up to its digest."""
    records = b"".join(
        _CENTRAL.pack(
            _CENTRAL_MARK,
            *(_MADE_BY, _VERSION_NEEDED, 0, 0, _FIRST_TIME, _FIRST_DATE),
            *(entry.crc32, entry.size, entry.size, len(entry.name), 0, 0, 0, 0, _ATTRIBUTES, entry.header),
        )
        + entry.name.encode()
        for entry in entries
    )
    count, start = len(entries), entries[-1].end
    return records + _END.pack(_END_MARK, 0, 0, count, count, len(records), start, DIGEST_CHARACTERS)
