"""Writes the files that PyTorch writes, byte by byte, so that tests need no PyTorch."""

import io
import json
import pickle
import struct
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np

KINDS = {"f8": "Double", "f4": "Float", "f2": "Half", "i8": "Long", "i4": "Int", "i2": "Short"}
KINDS |= {"i1": "Char", "u1": "Byte", "b1": "Bool"}


@dataclass
class Global:
    path: str


@dataclass
class Call:
    """A name that the file calls with arguments, and then perhaps gives a state."""

    path: str
    arguments: tuple = ()
    state: Any = None


@dataclass
class New:
    """An object made by `__new__`, with a state."""

    path: str
    state: Any = None


@dataclass
class Stored:
    """A persistent id."""

    identity: tuple


@dataclass
class Raw:
    """Instructions as they are."""

    code: bytes


def pickled(value: Any) -> bytes:
    """`value` as a pickle of protocol 2."""
    return b"\x80\x02" + _code(value) + b"."


def _code(value: Any) -> bytes:
    match value:
        case Raw(code):
            return code
        case Global(path):
            module, _, name = path.rpartition(".")
            return f"c{module}\n{name}\n".encode()
        case Call(path, arguments, state):
            build = b"" if state is None else _code(state) + b"b"
            return _code(Global(path)) + _code(arguments) + b"R" + build
        case New(path, state):
            return _code(Global(path)) + b")\x81" + _code(state) + b"b"
        case Stored(identity):
            return _code(identity) + b"Q"
        case tuple():
            return b"(" + b"".join(map(_code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_code(x) for pair in value.items() for x in pair) + b"u"
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case _:  # numbers, None and truth values, as Python writes them
            return pickle.dumps(value, 2)[2:-1]


@dataclass
class Writer:
    """A file in the making: tensors are added first, and then stand in the object that is saved."""

    storages: list = field(default_factory=list)

    def storage(self, array: np.ndarray, kind: str | None = None) -> tuple:
        """The persistent id of the bytes of an array."""
        self.storages.append(np.ascontiguousarray(array).reshape(-1))
        kind = kind or KINDS[array.dtype.str[1:]]
        key = str(len(self.storages) - 1)
        return ("storage", Global(f"torch.{kind}Storage"), key, "cpu", array.size)

    def tensor(self, array: np.ndarray, kind: str | None = None) -> Call:
        """An array in a storage of its own."""
        strides = [step // array.itemsize for step in np.empty(array.shape, array.dtype).strides]
        return self.view(self.storage(array, kind), 0, array.shape, tuple(strides))

    def view(self, storage: tuple, offset: Any, shape: tuple, strides: tuple) -> Call:
        arguments = (
            Stored(storage),
            offset,
            shape,
            strides,
            False,
            Call("collections.OrderedDict"),
        )
        return Call("torch._utils._rebuild_tensor_v2", arguments)

    def zip(self, value: Any, root: str = "archive", order: str = "little", **members) -> bytes:
        """The file of `torch.save`; `members` are more files, by name below the root."""
        files = {"data.pkl": pickled(value), "byteorder": order.encode()}
        files |= {f"data/{i}": array.tobytes() for i, array in enumerate(self.storages)}
        return zipped({f"{root}/{name}": data for name, data in (files | members).items()})

    def stream(self, value: Any) -> bytes:
        """The file of `torch.save` before 1.6."""
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
        parts = [0x1950A86A20F9469CFC6C, 1001, system, _streamed(value)]
        parts.append([str(i) for i in range(len(self.storages))])
        data = [struct.pack("<q", len(array)) + array.tobytes() for array in self.storages]
        return b"".join(map(pickled, parts)) + b"".join(data)


def _streamed(value: Any) -> Any:
    """`value` with the longer persistent ids of the stream."""
    match value:
        case Stored(identity):
            return Stored((*identity, None))
        case Call(path, arguments, state):
            return Call(path, _streamed(arguments), _streamed(state))
        case New(path, state):
            return New(path, _streamed(state))
        case dict():
            return {key: _streamed(each) for key, each in value.items()}
        case list() | tuple():
            return type(value)(_streamed(each) for each in value)
    return value


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


def safetensors(header: Any, data: bytes) -> bytes:
    """A file with any header."""
    text = header if type(header) is bytes else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
