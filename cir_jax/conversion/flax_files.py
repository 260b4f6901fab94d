"""The files of `flax.serialization.to_bytes`: MessagePack of nested dictionaries of arrays, perhaps pickled as bytes.

Flax's own `msgpack_restore` runs nothing of a file either, but holds the file and all arrays in memory; here a tensor
is read when it is asked for, as from every other format. Read is what `to_bytes` writes of parameters, no more.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from cir_jax.conversion.pickles import DTYPES, MOST_AXES, Storage, Tensor, damaged, refused
from cir_jax.conversion.torch_files import Bytes
from cir_jax.files import shown

MOST_VALUES = 100_000
MOST_DEPTH = 64
MOST_TEXT = 1000  # bytes of a name
# The kinds of MessagePack: short ones hold a count themselves, behind others it has so many bytes.
DICTIONARIES = range(0x80, 0x90)
LONG_DICTIONARIES = {0xDE: 2, 0xDF: 4}
TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
NUMBERS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
SHORT_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
ARRAYS = (1, 3)  # flax's extensions of arrays and of numpy's scalars
# How a pickle puts bytes: the instruction and how many bytes count them.
PICKLED = {b"C": 1, b"B": 4, b"\x8e": 8}


def pickled_bytes(file: Bytes) -> tuple[int, int] | None:
    """Where the bytes lie in a pickle that is nothing but bytes; None for any other file.

    ValueError: the file ends within them, or something follows.
    """
    head = file.read(0, min(32, file.size)).tobytes()
    found = re.match(rb"\x80[\x03-\x05](?:\x95.{8})?([CB\x8e])", head, re.DOTALL)
    if found is None:
        return None
    start = found.end() + PICKLED[found[1]]
    stop = start + int.from_bytes(head[found.end() : start], "little")
    if stop > file.size:
        raise damaged(f"its pickle has bytes up to {stop}, the file ends at {file.size}")
    tail = file.read(stop, min(stop + 32, file.size)).tobytes()
    if not re.fullmatch(rb"(?:\x95.{8})?(?:\x94|q.|r.{4})?\.", tail, re.DOTALL):
        raise refused("it is a pickle of bytes and of more than that")
    return start, stop


def begins_dictionary(start: bytes) -> bool:
    """True for how a file of flax begins."""
    return bool(start) and (start[0] in DICTIONARIES[1:] or start[0] in LONG_DICTIONARIES)


def read_flax(file: Bytes, start: int, stop: int) -> dict:
    """Nested dictionaries of `Tensor` from the MessagePack in bytes `start` to `stop`.

    ValueError: anything else in it than dictionaries, their names and arrays.
    """
    cursor = Cursor(file, start, stop)
    made = _dictionary(cursor, cursor.number(1), 0)
    if cursor.at != stop:
        raise damaged(f"its dictionary ends at byte {cursor.at}, expected {stop}")
    return made


@dataclass
class Cursor:
    """A place in a file that must not pass `stop`, and the number of values read."""

    file: Bytes
    at: int
    stop: int
    values: int = 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        start = self.skip(size)
        return self.file.read(start, self.at).tobytes()

    def skip(self, size: int) -> int:
        """Pass over bytes and return where they begin."""
        if size > self.stop - self.at:
            raise damaged(f"{size} bytes should lie at byte {self.at} of {self.stop}")
        self.at += size
        return self.at - size

    def number(self, size: int) -> int:
        """The next bytes as one number."""
        return int.from_bytes(self.take(size), "big")

    def count(self) -> None:
        self.values += 1
        if self.values > MOST_VALUES:
            raise refused(f"it holds more than {MOST_VALUES:,} values")


def _dictionary(cursor: Cursor, kind: int, depth: int) -> dict:
    if depth > MOST_DEPTH:
        raise damaged(f"its dictionaries are nested deeper than {MOST_DEPTH}")
    if kind in DICTIONARIES:
        entries = kind & 15
    elif kind in LONG_DICTIONARIES:
        entries = cursor.number(LONG_DICTIONARIES[kind])
    else:
        raise refused(f"it has a value of MessagePack's kind {kind:#04x}, no dictionary or array")
    made = {}
    for _ in range(entries):
        cursor.count()
        name = _text(cursor)
        if name in made:
            raise damaged(f"two entries are called {shown(name)}")
        if name == "__msgpack_chunked_array__":
            raise refused("it has an array in pieces, as flax writes those above 1 GiB")
        made[name] = _value(cursor, depth)
    return made


def _value(cursor: Cursor, depth: int) -> Any:
    kind = cursor.number(1)
    if kind in SHORT_EXTENSIONS:
        return _array(cursor, SHORT_EXTENSIONS[kind])
    if kind in EXTENSIONS:
        return _array(cursor, cursor.number(EXTENSIONS[kind]))
    return _dictionary(cursor, kind, depth + 1)


def _array(cursor: Cursor, size: int) -> Tensor:
    """The array in the next extension, whose bytes without the mark of its kind are `size`."""
    kind = cursor.number(1)
    if kind not in ARRAYS:
        raise refused(f"it has an extension of kind {kind}, no array")
    stop = cursor.at + size
    if cursor.number(1) != 0x93:
        raise damaged("an array has not shape, dtype and bytes")
    shape = _shape(cursor)
    name = _text(cursor)
    if name not in DTYPES:
        raise refused(f"it has an array of dtype {shown(name)}")
    length = _size(cursor, BYTES, "the bytes of an array")
    start, dtype = cursor.skip(length), DTYPES[name]
    if length != math.prod(shape) * dtype.itemsize or cursor.at != stop:
        raise damaged(f"an array of {shown(list(shape))} {dtype} has {length} bytes")
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Tensor(Storage(length, dtype, start, cursor.file), dtype, 0, shape, strides)


def _shape(cursor: Cursor) -> tuple[int, ...]:
    axes = cursor.number(1) - 0x90
    if not 0 <= axes <= min(15, MOST_AXES):
        raise damaged("an array has no shape")
    return tuple(_whole(cursor) for _ in range(axes))


def _whole(cursor: Cursor) -> int:
    kind = cursor.number(1)
    value = kind if kind < 0x80 else None
    if kind in NUMBERS:
        value = cursor.number(NUMBERS[kind])
    if value is None or value >= 2**48:
        raise damaged("an array has a shape that is no list of numbers")
    return value


def _text(cursor: Cursor) -> str:
    kind = cursor.number(1)
    size = kind & 31 if 0xA0 <= kind < 0xC0 else _size(cursor, TEXTS, "a name", kind)
    if size > MOST_TEXT:
        raise damaged(f"a name has {size} bytes")
    try:
        return cursor.take(size).decode()
    except UnicodeError:
        raise damaged("a name is no UTF-8") from None


def _size(cursor: Cursor, kinds: dict, what: str, kind: int | None = None) -> int:
    kind = cursor.number(1) if kind is None else kind
    if kind not in kinds:
        raise damaged(f"{what} should stand at byte {cursor.at}")
    return cursor.number(kinds[kind])
