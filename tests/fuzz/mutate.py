"""Damaged files made of real ones: by a cut download, a broken disk, another program, or somebody with intentions.

Everything follows from a `random.Random`, so that one seed makes the same file again.
"""

import json
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random, Sequence[bytes]], bytes]

LENGTHS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    1 << 20,
    1 << 30,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    0x7FFFFFFFFFFFFFFF,
    0xFFFFFFFFFFFFFFFF,
)
DEEP = "[" * 5_000 + "]" * 5_000
TEXTS = (
    "",
    " ",
    "x" * 100_000,
    "\x1b[31mred\n\nerror: forged",
    "../../foreign/planted",
    "/foreign",
    "é\u202e\ud800",
    "*",
    "[ab]",
    "'; drop table artifacts; --",
    '"',
    "\0",
    "~",
    "file:///dev/zero",
    "nan",
    "1e999",
    "-1",
)
NUMBERS = (0, -1, 1, 2, 1.5, 1e308, -1e308, 1 << 31, 1 << 63, -(1 << 63), 10**30, float("nan"), float("inf"), 300_000)
VALUES: tuple[Any, ...] = (
    *TEXTS,
    *NUMBERS,
    None,
    True,
    False,
    [],
    {},
    [None],
    [[]],
    {"": None},
    [1e308] * 3,
    ["x"] * 3,
)


def mutated_bytes(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Return `data` after one to eight random changes; `others` are files of which pieces come in."""
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        data = random.choice(MUTATIONS)(data, random, others)
    return data


def _place(data: bytes, random: Random) -> int:
    """Return a place in a file: half of them near its beginning or end, where formats have their headers."""
    near = min(len(data), 256)
    return random.choice((random.randrange(len(data) + 1), random.randrange(near + 1), len(data) - near))


def _chunk(data: bytes, random: Random) -> tuple[int, int]:
    start = _place(data, random)
    return start, min(len(data), start + random.choice((1, 2, 4, 16, 64, 512, 4096)))


def _flip_bits(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 2, 8, 32)) if data else 0):
        changed[min(_place(data, random), len(data) - 1)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    place = _place(data, random)
    return data[place:] if random.random() < 0.2 else data[:place]


def _remove(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    start, stop = _chunk(data, random)
    return data[:start] + data[stop:]


def _insert(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    place = _place(data, random)
    return data[:place] + random.randbytes(random.choice((1, 4, 64, 1024))) + data[place:]


def _repeat(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    start, stop = _chunk(data, random)
    return data[:start] + data[start:stop] * random.choice((2, 3, 50)) + data[stop:]


def _swap(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    cuts = sorted(random.randrange(len(data) + 1) for _ in range(4))
    a, b, c, d = cuts
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _zero(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    start, stop = _chunk(data, random)
    return data[:start] + random.choice((b"\0", b"\xff")) * (stop - start) + data[stop:]


def _set_length(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Put an extreme number in place of one, two, four or eight bytes."""
    size, place = random.choice((1, 2, 4, 4, 8)), _place(data, random)
    number = (random.choice(LENGTHS) & ((1 << 8 * size) - 1)).to_bytes(size, random.choice(("little", "big")))
    return data[:place] + number + data[place + size :]


def _mix(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Put a piece of another file in, or its whole rest in place of the own."""
    other = random.choice(others)
    start, stop = _chunk(other, random)
    place = _place(data, random)
    if random.random() < 0.3:
        return data[:place] + other[start:]
    return data[:place] + other[start:stop] + data[place + random.choice((0, stop - start)) :]


MUTATIONS: tuple[Mutation, ...]
MUTATIONS = (_flip_bits, _flip_bits, _cut, _remove, _insert, _repeat, _swap, _zero, _set_length, _set_length, _mix)


def with_right_checksums(data: bytes) -> bytes:
    """Return a PNG whose chunks have the right checksums, or else its reader would stop at the first."""
    at, done = 8, [data[:8]]
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        body = data[at + 4 : at + 8 + length]
        done.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(done)


def mutated_json(text: str, random: Random) -> str:
    """Return JSON in which a value somewhere is missing, of another type, extreme or far too deep; or no JSON."""
    value = json.loads(text)
    for _ in range(random.choice((1, 1, 2))):
        value = _changed(value, random)
    changed = json.dumps(value)
    if random.random() < 0.1:
        changed = re.sub(r"-?\d+", lambda found: DEEP if random.random() < 0.3 else found.group(), changed)
    return changed


def _changed(value: Any, random: Random) -> Any:
    if isinstance(value, dict | list) and value and random.random() < 0.9:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        changed: Any = value.copy()
        match random.randrange(8):
            case 0:
                del changed[key]
            case 1 if isinstance(value, dict):
                changed[random.choice(("x", "", "id", str(key).upper()))] = changed.pop(key)
            case 1:
                changed += changed
            case _:
                changed[key] = _changed(value[key], random)
        return changed
    return random.choice(VALUES)


def mutated_safetensors(data: bytes, random: Random) -> bytes:
    """Return weights whose header, a JSON object, is changed."""
    length = struct.unpack("<Q", data[:8])[0]
    header = mutated_json(data[8 : 8 + length].decode(), random).encode("utf-8", "replace")
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutated_lines(data: bytes, random: Random) -> bytes:
    """Return a text of which a line, or what stands behind its `=`, is another."""
    lines = data.decode().splitlines()
    at = random.randrange(len(lines))
    new = str(random.choice(VALUES)).encode("utf-8", "replace").decode()
    match random.randrange(6):
        case 0:
            lines[at] = mutated_json(lines[at], random) if lines[at].startswith("{") else new
        case 1:
            lines.insert(at, lines[random.randrange(len(lines))])
        case 2:
            del lines[at]
        case _:
            key, sign, _ = lines[at].partition("=")
            lines[at] = mutated_json(lines[at], random) if lines[at].startswith("{") else f"{key}{sign} {new}"
    return "\n".join([*lines, ""]).encode("utf-8", "replace")


def mutated_file(name: str, data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Return a file changed by its kind, or byte by byte."""
    suffix = name.rpartition(".")[2]
    if not data or random.random() < 0.3:
        return mutated_bytes(data, random, others)
    if suffix == "json":
        return mutated_json(data.decode(), random).encode("utf-8", "replace")
    if suffix == "safetensors":
        return mutated_safetensors(data, random)
    if suffix in ("jsonl", "toml", "txt", "paths"):
        return mutated_lines(data, random)
    if suffix == "png" and random.random() < 0.7:
        return with_right_checksums(mutated_bytes(data, random, others))
    return mutated_bytes(data, random, others)
