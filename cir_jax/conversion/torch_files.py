"""The files that PyTorch writes: the zip of `torch.save` and `torch.jit.save`, and the stream of before 1.6.

Both hold a pickle (`pickles.py` reads it) and beside it the bytes of the tensors, which are read when they are asked
for: with plain reads and not through a memory map, because the pages of a map count as this process's memory, and a
file that somebody cuts short would end the process instead of raising an error.
"""

import io
import itertools
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cir_jax.conversion.pickles import (
    MOST_BYTES,
    SAVE_AGAIN,
    Name,
    Storage,
    damaged,
    load,
    refused,
)
from cir_jax.files import reported, shown

MAGIC = 0x1950A86A20F9469CFC6C
STREAM_VERSION = 1001
ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
MOST_LIST = 8 << 20  # bytes of the list of a zip's members; 46 and a name for each


@dataclass
class Bytes:
    """A file that stays as it was when it was found: its size is asked once, and every read compares."""

    path: Path
    size: int = field(init=False)
    stamp: tuple = field(init=False)

    def __post_init__(self):
        self.stamp = self._stamp(os.stat(self.path))
        self.size = self.stamp[0]

    @staticmethod
    def _stamp(stat: os.stat_result) -> tuple:
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def read(self, start: int, stop: int, crc: int | None = None) -> np.ndarray:
        """Bytes `start` to `stop`, uint8 (stop - start,); ValueError if they are not there or not of that CRC-32."""
        if not 0 <= start <= stop <= self.size:
            raise damaged(
                f"{self.path} ends at byte {self.size}, bytes {start} to {stop} are asked"
            )
        data = np.empty(stop - start, np.uint8)
        with reported(self.path, "read"), open(self.path, "rb") as file:
            changed = self._stamp(os.fstat(file.fileno())) != self.stamp
            file.seek(start)
            # A file object fills less than it is given only at the end of the file.
            if changed or file.readinto(data) != len(data):
                raise ValueError(f"{self.path} changed while it was being read; begin again")
        if crc is not None and zlib.crc32(data) != crc:
            raise damaged(f"{self.path}: bytes {start} to {stop} are not those that were written")
        return data


class Window(io.RawIOBase):
    """A file whose reads are bounded: never more than `most` bytes at once, never beyond `stop`."""

    def __init__(self, file: Any, stop: int, most: int = MOST_BYTES):
        self.file, self.stop, self.most = file, stop, most

    def read(self, size: int = -1) -> bytes:
        left = self.stop - self.file.tell()
        size = left if size is None or size < 0 else min(size, left)
        if size > self.most:
            raise damaged(f"{size} bytes should be read at once, expected up to {self.most}")
        return self.file.read(max(0, size))

    def readline(self, size: int = -1) -> bytes:
        return self.file.readline(4096)  # the longest are names

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True


def _typed_storage(name: Any, size: Any) -> np.dtype:
    """The dtype of a storage that a persistent id describes."""
    if type(name) is not Name or not name.path.endswith("Storage"):
        raise damaged("a storage has no type")
    if type(size) is not int or not 0 <= size < 2**48:
        raise damaged("a storage has no size")
    return name.means


# The zip.


def read_zip(file: Bytes) -> tuple[Any, str]:
    """The object of a zip that PyTorch wrote, and "torch zip" or "torchscript".

    Raises:
      ValueError: another zip; members that are doubled, overlap or lead out of it, needed ones that are compressed;
        see `pickles.load`.
    """
    members = _members(file)
    roots = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")]
    roots = [root for root in roots if root.count("/") == 1]
    if len(roots) != 1:
        raise ValueError(
            f"is a zip without the one data.pkl of PyTorch (it has {shown(sorted(members)[:4])}); "
            "expected a file of torch.save or torch.jit.save"
        )
    root = roots[0]
    order = bytes(members[root + "byteorder"].bytes(64)) if root + "byteorder" in members else b""
    if order not in (b"", b"little", b"big"):
        raise damaged(f"its byte order is {order!r}, expected little or big")

    def storage(identity: tuple) -> Storage:
        if len(identity) != 5 or identity[0] != "storage" or type(identity[2]) is not str:
            raise damaged("its pickle asks for something that is no storage")
        _, name, key, _, count = identity
        dtype = _typed_storage(name, count)
        member = members.get(f"{root}data/{key}")
        if member is None:
            raise damaged(f"the storage {shown(key)} is not in the archive")
        size = count * dtype.itemsize
        if member.check().size != size:
            raise damaged(f"the storage {shown(key)} has {member.size} bytes, expected {size}")
        return Storage(size, dtype, member.start, file, order == b"big", member.crc)

    pickled = bytes(members[root + "data.pkl"].bytes(MOST_BYTES))
    value = load(Window(io.BytesIO(pickled), len(pickled)), len(pickled), storage)
    script = root + "constants.pkl" in members or any(x.startswith(root + "code/") for x in members)
    return value, "torchscript" if script else "torch zip"


@dataclass(frozen=True)
class Member:
    """One member of a zip: where its bytes lie, and whether they are `stored` as they are."""

    file: Bytes
    name: str
    start: int
    size: int
    stored: bool
    crc: int | None

    def check(self) -> "Member":
        """The member itself; ValueError if its bytes would have to be unpacked."""
        if not self.stored:
            raise ValueError(
                f"{shown(self.name)} in it is compressed or encrypted, PyTorch stores it as it is; "
                "pack it again with zip -0"
            )
        return self

    def bytes(self, most: int) -> np.ndarray:
        """All its bytes, uint8 (size,); ValueError if there are more than `most`."""
        self.check()
        if self.size > most:
            raise refused(f"{shown(self.name)} has {self.size} bytes, expected up to {most}")
        return self.file.read(self.start, self.start + self.size, self.crc)


def _members(file: Bytes) -> dict[str, Member]:
    with reported(file.path, "read"), open(file.path, "rb") as opened:
        try:
            listed = zipfile.ZipFile(Window(opened, file.size, MOST_LIST)).infolist()
        # What zipfile raises for a damaged list of names is not only its own error.
        except Exception as error:
            if isinstance(error, OSError) and error.errno:
                raise
            why = (
                str(error) if isinstance(error, zipfile.BadZipFile) else "it is damaged or too long"
            )
            raise damaged(f"its list of archive members cannot be read ({why})") from None
        members = [_member(file, opened, info) for info in listed if info.filename[-1:] != "/"]
    members.sort(key=lambda member: member.start)
    for before, after in itertools.pairwise(members):
        if after.start < before.start + before.size:
            raise damaged(f"the members {shown(before.name)} and {shown(after.name)} overlap")
    by_name = {member.name: member for member in members}
    if len(by_name) < len(members):
        raise damaged("two of its members have the same name")
    return by_name


def _member(file: Bytes, opened: Any, info: zipfile.ZipInfo) -> Member:
    name = shown(info.orig_filename)
    path = PurePosixPath(info.filename)
    if path.is_absolute() or ".." in path.parts or set("\\:\0") & set(info.orig_filename):
        raise damaged(f"the member {name} leads out of the archive")
    opened.seek(min(max(0, info.header_offset), file.size))
    header = opened.read(30)
    if header[:4] != ZIP or len(header) < 30:
        raise damaged(f"the member {name} is not where the archive says")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + info.compress_size > file.size:
        raise damaged(f"the member {name} does not have the {info.compress_size} bytes it claims")
    stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    if stored and info.file_size != info.compress_size:
        raise damaged(f"the member {name} has two sizes")
    # PyTorch may be told to compute no sums, and then writes 0.
    return Member(file, info.filename, start, info.compress_size, stored, info.CRC or None)


# The stream of before 1.6: four pickles, a list of storages, and their bytes in that order.


def read_stream(file: Bytes) -> Any:
    """The object of a file that `torch.save` wrote before 1.6, or with `_use_new_zipfile_serialization=False`.

    Raises:
      ValueError: a pickle of something else, a stream that is cut; see `pickles.load`.
    """
    storages: dict[str, Storage] = {}
    with reported(file.path, "read"), open(file.path, "rb") as opened:

        def part(storage=_no_storage) -> Any:
            stop = min(file.size, opened.tell() + MOST_BYTES)
            return load(Window(opened, stop), stop - opened.tell(), storage)

        if part() != MAGIC:
            raise refused("it is a pickle, but none of torch.save")
        if part() != STREAM_VERSION:
            raise ValueError(f"its stream is of another version, expected {STREAM_VERSION}")
        system = part()
        if type(system) is not dict or system.get("little_endian") is not True:
            raise ValueError(f"comes from a big-endian machine; {SAVE_AGAIN}")
        value = part(lambda identity: _streamed(identity, storages, file))
        keys = part()
        if type(keys) is not list or any(type(key) is not str for key in keys):
            raise damaged("it has no list of storages")
        if sorted(keys) != sorted(storages):
            raise damaged("its list of storages is not that of its tensors")
        for key in keys:
            _place(opened, storages[key], file.size)
    return value


def _no_storage(identity: tuple) -> Storage:
    raise damaged("its pickle asks for a storage too early")


def _streamed(identity: tuple, storages: dict[str, Storage], file: Bytes) -> Any:
    if len(identity) == 4 and identity[0] == "module":  # a class, with its source
        return identity[1]
    if len(identity) != 6 or identity[0] != "storage" or type(identity[2]) is not str:
        raise damaged("its pickle asks for something that is no storage")
    _, name, key, _, count, view = identity
    dtype = _typed_storage(name, count)
    if view is not None:
        raise refused("it holds views of storages, as PyTorch wrote them before 0.4")
    storage = storages.setdefault(key, Storage(count * dtype.itemsize, dtype, None, file))
    if (storage.size, storage.dtype) != (count * dtype.itemsize, dtype):
        raise damaged(f"the storage {shown(key)} has two sizes or types")
    return storage


def _place(opened: Any, storage: Storage, size: int) -> None:
    """Note where a storage lies: behind a count of its elements."""
    head = opened.read(8)
    storage.start = opened.tell()
    elements = int.from_bytes(head, "little")
    if len(head) < 8 or elements * storage.dtype.itemsize != storage.size:
        raise damaged(f"a storage of {storage.size} bytes says it has {elements} elements")
    if storage.start + storage.size > size:
        raise damaged(f"it ends at byte {size}, within a storage of {storage.size} bytes")
    opened.seek(storage.size, os.SEEK_CUR)
