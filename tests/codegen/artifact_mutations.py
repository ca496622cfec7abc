"""Random damage to artifact files: to bytes, to members, to the manifest, to the zip's headers."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from codegen import archive

Generator = np.random.Generator
Members = list[tuple[str, bytes]]

HUGE = (0xFFFFFFFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 1 << 20, 0, 1, 63, 64)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 63, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, "", "x", "../x", "forward", "step"),
    *("x" * 5000, "\x00", "é", [], {}, [[]], [None], [1, 2, 3], {"": 0}, {"name": "x", "shape": [], "dtype": "int32"}),
)
NUMBERED_LOCAL = (0, 4, 6, 8, 10, 12, 14, 18, 22, 26, 28)
NUMBERED_CENTRAL = (0, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 30, 32, 34, 36, 38, 42)
NUMBERED_END = (0, 4, 6, 8, 10, 12, 16, 20)


class _Pairs(Mapping[str, bytes]):
    """Members that may have a name twice, for `archive.pack`."""

    def __init__(self, pairs: Members) -> None:
        self._pairs = pairs

    def __getitem__(self, name: str) -> bytes:
        return dict(self._pairs)[name]

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, _ in self._pairs])

    def __len__(self) -> int:
        return len(self._pairs)

    def items(self) -> Any:
        return self._pairs

    def values(self) -> Any:
        return [data for _, data in self._pairs]


def unpack(data: bytes) -> Members:
    """Return the members of a file, in order."""
    entries = archive.parse(memoryview(data))
    return [(entry.name, data[entry.start : entry.end]) for entry in entries.values()]


def pack(members: Members) -> bytes:
    """Return a file of members with the digest that fits."""
    return b"".join(archive.pack(_Pairs(members)))


def digested(data: bytes, original: bytes) -> bytes:
    """Return bytes with the digest at their end made again, over what it covers in the original."""
    digest, done, body = hashlib.sha256(), 0, data[: -archive.DIGEST_CHARACTERS]
    for entry in archive.parse(memoryview(original)).values():
        covered = entry.name in (archive.MANIFEST, archive.SIGNATURE)
        digest.update(body[done : entry.end if covered else entry.start])
        done = entry.end
    digest.update(body[done:])
    return body + digest.hexdigest().encode()


def flip_bits(data: bytes, rng: Generator) -> bytes:
    """A few bits, near each other or not."""
    made = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        made[rng.integers(len(made))] ^= 1 << rng.integers(8)
    return bytes(made)


def set_bytes(data: bytes, rng: Generator) -> bytes:
    """A run of bytes, to one value or to noise."""
    made, start, count = bytearray(data), rng.integers(len(data)), rng.integers(1, 200)
    end = min(start + count, len(made))
    made[start:end] = rng.bytes(end - start) if rng.random() < 0.5 else bytes([rng.integers(256)]) * (end - start)
    return bytes(made)


def cut(data: bytes, rng: Generator) -> bytes:
    """The end is missing, or the beginning, or a piece of the middle."""
    start, end = sorted(rng.integers(0, len(data) + 1, 2))
    return [data[:start], data[end:], data[:start] + data[end:]][rng.integers(3)]


def insert(data: bytes, rng: Generator) -> bytes:
    """Some bytes more: zeros, noise, or a copy of others."""
    at, count = rng.integers(len(data) + 1), int(rng.integers(1, 300))
    copied = data[rng.integers(len(data)) :][:count]
    return data[:at] + [b"\0" * count, rng.bytes(count), copied][rng.integers(3)] + data[at:]


def change_headers(data: bytes, rng: Generator) -> bytes:
    """A field of the zip's own structures; the digest fits."""
    entries = list(archive.parse(memoryview(data)).values())
    made = bytearray(data)
    end = len(data) - archive.DIGEST_CHARACTERS - 22
    entry = entries[rng.integers(len(entries))]
    central = data.index(entry.name.encode(), entries[-1].end) - 46
    base, offsets = [(entry.header, NUMBERED_LOCAL), (central, NUMBERED_CENTRAL), (end, NUMBERED_END)][rng.integers(3)]
    at = base + int(rng.choice(offsets))
    value = int(rng.choice(HUGE)) if rng.random() < 0.6 else int(rng.integers(0, 70000))
    form = "<I" if rng.random() < 0.5 else "<H"
    struct.pack_into(form, made, at, value & (0xFFFFFFFF if form == "<I" else 0xFFFF))
    return digested(bytes(made), data)


def change_anything_digested(data: bytes, rng: Generator) -> bytes:
    """Damage anywhere, and a digest that fits."""
    damage = (flip_bits, set_bytes, cut, insert)[rng.integers(4)](data, rng)
    return digested(damage, data) if len(damage) > archive.DIGEST_CHARACTERS else damage


def change_members(data: bytes, rng: Generator) -> bytes:
    """Members swapped, removed, doubled, renamed, emptied, moved or damaged; the container fits."""
    members = unpack(data)
    one, other = (int(place) for place in rng.integers(0, len(members), 2))
    (name, content), (second, further) = members[one], members[other]
    how = rng.integers(7)
    if how == 0:
        members[one], members[other] = (name, further), (second, content)
    elif how == 1:
        members[one], members[other] = members[other], members[one]
    elif how == 2:
        del members[one]
    elif how == 3:
        members.insert(other, (name, content))
    elif how == 4:
        members[one] = (["x", "graph.json", "library.so", "A" * 200, "a/b.c"][rng.integers(5)], content)
    elif how == 5:
        members[one] = (name, b"")
    else:
        members[one] = (name, (flip_bits, set_bytes, cut, insert)[rng.integers(4)](content or b"\0", rng))
    return pack(members) if members else b""


def change_manifest(data: bytes, rng: Generator) -> bytes:
    """A value of the manifest replaced, removed or added; everything else fits."""
    members = unpack(data)
    manifest = json.loads(members[0][1])
    text = json.dumps(_changed(manifest, rng)).encode()
    if rng.random() < 0.05:
        text = text[:-1] + b"," + text[1:]  # every key twice
    return pack([(members[0][0], text), *members[1:]])


def change_member_and_checksum(data: bytes, rng: Generator) -> bytes:
    """Damage to a member, and checksums in the manifest that fit.

    Left out are the library, which is native code, and the numbers of weights and parameters: with checksums that fit
    those are another model, which a signature tells and nothing else can.
    """
    members = unpack(data)
    places = [place for place, (name, _) in enumerate(members) if place and name != "library.so" and "sign" not in name]
    place = int(rng.choice(places))
    name, content = members[place]
    headed, numbers = name.endswith(".safetensors"), name.startswith(("weights", "parameters"))
    if headed and (numbers or rng.random() < 0.7):
        length = 8 + int.from_bytes(content[:8], "little")
        damaged = (flip_bits, set_bytes)[rng.integers(2)](content[:length], rng) + content[length:]
    else:
        damaged = (flip_bits, set_bytes, cut, insert)[rng.integers(4)](content, rng)
    manifest = json.loads(members[0][1])
    digest = hashlib.sha256(damaged).hexdigest()
    manifest["members"][name] = {"bytes": len(damaged), "crc32": zlib.crc32(damaged), "sha256": digest}
    members[place] = name, damaged
    return pack([(members[0][0], json.dumps(manifest).encode()), *members[1:]])


MUTATIONS: tuple[Callable[[bytes, Generator], bytes], ...] = (
    flip_bits,
    set_bytes,
    cut,
    insert,
    change_headers,
    change_anything_digested,
    change_members,
    change_manifest,
    change_manifest,  # twice: it reaches deepest
    change_member_and_checksum,
)


def _changed(manifest: dict[str, Any], rng: Generator) -> dict[str, Any]:
    places = list(_places(manifest))
    made = copy.deepcopy(manifest)
    path = places[rng.integers(len(places))]
    parent: Any = made
    for key in path[:-1]:
        parent = parent[key]
    how = rng.integers(4)
    if how == 0:
        del parent[path[-1]]
    elif how == 1:
        other: Any = manifest
        for key in places[rng.integers(len(places))]:
            other = other[key]
        parent[path[-1]] = copy.deepcopy(other)
    elif how == 2 and isinstance(parent, list):
        parent.insert(0, VALUES[rng.integers(len(VALUES))])
    else:
        parent[path[-1]] = VALUES[rng.integers(len(VALUES))]
    return made


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from _places(item, (*path, key))
