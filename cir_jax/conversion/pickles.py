"""Pickles read as data: a closed list of instructions over a closed list of names.

A pickle is a program for a small stack machine, and two of its instructions call what the file names. This reader is
another machine for the same instructions: it knows no callables at all, only the table `NAMES`, and it makes nothing
but plain Python values and the inert records below. It is not a subclass of `pickle.Unpickler`, because that one
would still call what `find_class` returns, set attributes, look into the registry of extensions, and allocate a memo
as long as a file claims. Here an instruction is looked up before its argument is read, and instructions, bytes and
copies are counted, so that memory and time are bounded by the size of the file.

Read are protocols 2 to 5 as Python, and the subset of 2 that TorchScript writes.
"""

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from cir_jax.files import shown

MOST_BYTES = 64 << 20  # of one pickle, without the tensors
MOST_STEPS = 1_000_000  # instructions and copied items; a model of 1,353 tensors takes about 60,000
MOST_AXES = 32
MOST = 2**48  # of a size, a stride or an offset
SAVE_AGAIN = "where the file was made, save the tensors alone: torch.save(model.state_dict(), ...) or safetensors"
FETCH_AGAIN = "the file is damaged or was made to mislead; fetch it again"

DTYPES = {
    "double": np.dtype("float64"),
    "float64": np.dtype("float64"),
    "float": np.dtype("float32"),
    "float32": np.dtype("float32"),
    "half": np.dtype("float16"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype("int64"),
    "int32": np.dtype("int32"),
    "int16": np.dtype("int16"),
    "int8": np.dtype("int8"),
    "uint64": np.dtype("uint64"),
    "uint32": np.dtype("uint32"),
    "uint16": np.dtype("uint16"),
    "uint8": np.dtype("uint8"),
    "bool": np.dtype("bool"),
    "complex64": np.dtype("complex64"),
    "complex128": np.dtype("complex128"),
}
STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Untyped": "uint8",
}


def refused(what: str) -> ValueError:
    """The error for a file that wants something this reader does not do."""
    return ValueError(f"refused: {what}; {SAVE_AGAIN}")


def damaged(what: str) -> ValueError:
    """The error for a file that contradicts itself or its format."""
    return ValueError(f"{what}; {FETCH_AGAIN}")


@dataclass(frozen=True, eq=False)
class Name:
    """A name of the table that the file mentions: what it stands for here, never the thing itself."""

    path: str
    means: Any


@dataclass(eq=False)
class Shell:
    """An inert object of a class that is not here: its name, and the state the file gives it."""

    path: str
    state: Any = None


@dataclass(eq=False)
class Storage:
    """Bytes of a file that tensors are cut from. `start` may be found after the tensors are."""

    size: int  # bytes
    dtype: np.dtype
    start: int | None = None
    file: Any = None
    swapped: bool = False  # big endian
    crc: int | None = None  # of all its bytes, if the archive tells

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` of the storage, uint8 (stop - start,)."""
        whole = start == 0 and stop == self.size
        return self.file.read(self.start + start, self.start + stop, self.crc if whole else None)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor that has not been read: offset and strides count elements, as PyTorch does."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Its values in memory of their own; only the bytes between first and last element are read."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        item, span = self.dtype.itemsize, _span(self.shape, self.strides)
        raw = self.storage.read(self.offset * item, (self.offset + span) * item)
        if self.storage.swapped:
            part = item // 2 if self.dtype.kind == "c" else item
            raw = raw.view(f"u{part}").byteswap().view(np.uint8)
        # A byte other than 0 and 1 is no truth value that numpy could work with.
        values = raw != 0 if self.dtype == bool else raw.view(self.dtype)
        steps = tuple(stride * item for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(values, self.shape, steps)
        # A copy, where the view would keep more than its values, or one value in several places.
        return view if math.prod(self.shape) == span else view.copy()


@dataclass(eq=False)
class Dtype:
    """A numpy dtype under construction."""

    code: str
    order: str = "="

    def made(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


@dataclass(eq=False)
class Array:
    """A numpy array, or a numpy scalar, whose bytes lie in the pickle."""

    dtype: np.dtype | None = None
    shape: tuple[int, ...] = ()
    data: bytes = b""
    fortran: bool = False
    scalar: bool = False

    def read(self) -> np.ndarray:
        order = "F" if self.fortran else "C"
        flat = np.frombuffer(self.data, self.dtype)
        if flat.dtype.kind == "U" and flat.size:
            points = flat.astype(flat.dtype.newbyteorder("=")).view(np.uint32)
            if ((points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))).any():
                raise damaged("a numpy array of text has numbers that are no characters")
        return flat.astype(self.dtype.newbyteorder("=")).reshape(self.shape, order=order)


@dataclass
class Machine:
    """The state of one run: the stack, what lies below its marks, the memo, and what is left of the bounds."""

    storage: Callable[[tuple], Any]  # persistent id -> Storage
    spare: int  # bytes that may still be copied
    stack: list = field(default_factory=list)
    below: list = field(default_factory=list)
    memo: dict = field(default_factory=dict)
    steps: int = 0
    most: int = MOST_STEPS

    def count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.most:
            raise refused(f"its pickle takes more than {self.most:,} steps")

    def copy(self, size: int) -> None:
        self.spare -= size
        if self.spare < 0:
            raise damaged("its pickle copies more bytes than it holds")

    def pop(self, *types: type) -> Any:
        """The top of the stack, which must be of one of `types` if any are given."""
        if not self.stack:
            raise damaged("its pickle takes a value from an empty stack")
        return _typed(self.stack.pop(), *types)

    def top(self) -> Any:
        if not self.stack:
            raise damaged("its pickle takes a value from an empty stack")
        return self.stack[-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def marked(self) -> list:
        """The values since the last mark."""
        if not self.below:
            raise damaged("its pickle ends a group that it did not begin")
        values, self.stack = self.stack, self.below.pop()
        return values


def load(stream: Any, size: int, storage: Callable[[tuple], Any], steps: int = MOST_STEPS) -> Any:
    """The value that a pickle describes, of plain Python values and the records of this module.

    Args:
      stream: a binary file at the first byte of the pickle; afterwards it is behind the last one. Its `read` and
        `readline` must themselves be bounded by what is there.
      size: bytes of the stream, which bounds what may be copied.
      storage: gives what a persistent id stands for, or raises ValueError.
      steps: instructions and copied items it may take.

    Raises:
      ValueError: an instruction or a name outside the closed lists (it is named), or a damaged pickle.
    """
    machine = Machine(storage, spare=min(size, MOST_BYTES), most=steps)
    while True:
        code = stream.read(1)
        known = _INSTRUCTIONS.get(code)
        if known is None:
            raise _unknown(code)
        opcode, act = known
        machine.count(1)
        argument = None if opcode.arg is None else _argument(opcode, stream)
        if opcode.name == "STOP":
            return machine.pop()
        act(machine, argument)


def _argument(opcode: Any, stream: Any) -> Any:
    try:
        return opcode.arg.reader(stream)
    except UnicodeError:
        raise damaged(f"its pickle has bytes that are no text in {opcode.name}") from None
    except (ValueError, OverflowError) as error:
        raise damaged(f"its pickle breaks off in {opcode.name} ({error})") from None


def _unknown(code: bytes) -> ValueError:
    if not code:
        return damaged("its pickle breaks off without an end")
    names = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}
    if code in names:
        return refused(f"its pickle uses the instruction {names[code]}")
    return damaged(f"its pickle has the byte {code!r} where an instruction should be")


def _typed(value: Any, *types: type) -> Any:
    if types and type(value) not in types:
        found, *wanted = (kind.__name__.removesuffix("Type") for kind in (type(value), *types))
        raise damaged(f"its pickle has a {found} where a {' or '.join(wanted)} should be")
    return value


def _key(value: Any) -> Any:
    """A key that is cheap to hash: a tuple could be nested without end, a long number made to collide."""
    _typed(value, str, int, bool, type(None))
    if type(value) is int and abs(value) >= 2**60:
        raise damaged("its pickle has a key of more than 60 bits")
    return value


# What the instructions do.


def _global(machine: Machine, argument: str) -> None:
    machine.push(_name(argument.replace(" ", ".", 1)))


def _stack_global(machine: Machine, _: None) -> None:
    name = machine.pop(str)
    machine.push(_name(f"{machine.pop(str)}.{name}"))


def _name(path: str) -> Name:
    if path in NAMES:
        return Name(path, NAMES[path])
    if re.fullmatch(r"__torch__(\.\w+)+", path):
        return Name(path, Shell)
    raise refused(f"the file wants {shown(path)[1:-1]}, which is not on the list of allowed names")


def _reduce(machine: Machine, _: None) -> None:
    arguments = machine.pop(tuple)
    name = machine.pop(Name)
    if name.means is Shell and not arguments:
        machine.push(Shell(name.path))
    elif isinstance(name.means, Maker):
        machine.push(name.means.make(machine, name.path, arguments))
    else:
        raise refused(f"the file calls {name.path}")


def _new(machine: Machine, _: None) -> None:
    # Arguments of __new__ would be lost in a shell, and the allowed classes have none.
    machine.pop(tuple)
    name = machine.pop(Name)
    if name.means is Shell:
        machine.push(Shell(name.path))
    elif name.path == "collections.OrderedDict":
        machine.push({})
    else:
        raise refused(f"the file makes an object of {name.path}")


def _build(machine: Machine, _: None) -> None:
    state, target = machine.pop(), machine.top()
    if type(target) is Shell:
        target.state = state
    elif type(target) is Dtype:
        _build_dtype(target, _typed(state, tuple))
    elif type(target) is Array:
        _build_array(target, _typed(state, tuple))
    elif type(target) is not dict:  # of an OrderedDict: `_metadata`, version numbers of modules
        raise refused(f"the file sets the state of a {type(target).__name__.removesuffix('Type')}")


def _build_dtype(target: Dtype, state: tuple) -> None:
    if len(state) < 5 or state[1] not in ("<", ">", "=", "|") or state[2:5] != (None,) * 3:
        raise refused("the file holds a numpy dtype with fields or of an unknown byte order")
    target.order = state[1]


def _build_array(target: Array, state: tuple) -> None:
    if len(state) != 5:
        raise damaged("its pickle gives a numpy array no complete state")
    _, shape, dtype, fortran, data = state
    _fill(target, _typed(shape, tuple), _typed(dtype, Dtype), data)
    target.fortran = _typed(fortran, bool, int) not in (0, False)


def _fill(target: Array, shape: tuple, dtype: Dtype, data: Any) -> Array:
    if type(data) is str:  # Python 2
        data = data.encode("latin-1", "replace")
    _typed(data, bytes, bytearray)
    made, shape = dtype.made(), _sizes(shape)
    if math.prod(shape) * made.itemsize != len(data):
        raise damaged(f"a numpy array of {_list(shape)} {made} has {len(data)} bytes")
    target.shape, target.dtype, target.data = shape, made, data
    return target


def _append(machine: Machine, _: None) -> None:
    value = machine.pop()
    _typed(machine.top(), list).append(value)


def _appends(machine: Machine, _: None) -> None:
    values = machine.marked()
    _typed(machine.top(), list).extend(values)


def _set_item(machine: Machine, _: None) -> None:
    value, key = machine.pop(), machine.pop()
    _typed(machine.top(), dict)[_key(key)] = value


def _set_items(machine: Machine, _: None) -> None:
    values = machine.marked()
    target = _typed(machine.top(), dict)
    if len(values) % 2:
        raise damaged("its pickle has a key without a value")
    for key, value in zip(values[::2], values[1::2]):
        target[_key(key)] = value


def _add_items(machine: Machine, _: None) -> None:
    values = machine.marked()
    _typed(machine.top(), set).update(_key(value) for value in values)


def _tuple(length: int) -> Callable:
    def act(machine: Machine, _: None) -> None:
        values = [machine.pop() for _ in range(length)]
        machine.push(tuple(reversed(values)))

    return act


def _get(machine: Machine, index: int) -> None:
    if index not in machine.memo:
        raise damaged(f"its pickle refers to entry {index} of its memo, which does not exist")
    machine.push(machine.memo[index])


def _put(machine: Machine, index: int) -> None:
    machine.memo[index] = machine.top()


def _pop(machine: Machine, _: None) -> None:
    # The instruction takes a mark away when there is nothing above it.
    if machine.stack or not machine.below:
        machine.pop()
    else:
        machine.marked()


def _persistent(machine: Machine, _: None) -> None:
    machine.push(machine.storage(machine.pop(tuple)))


def _push(machine: Machine, argument: Any) -> None:
    machine.push(argument)


_ACTS = {
    "PROTO": lambda machine, version: None,  # what a later one adds is refused where it comes
    "FRAME": lambda machine, size: None,
    "STOP": None,
    "MARK": lambda machine, _: machine.mark(),
    "POP": _pop,
    "POP_MARK": lambda machine, _: machine.marked(),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "BININT": _push,
    "BININT1": _push,
    "BININT2": _push,
    "LONG1": _push,
    "BINFLOAT": _push,
    "BINUNICODE": _push,
    "SHORT_BINUNICODE": _push,
    "BINUNICODE8": _push,
    "BINSTRING": _push,
    "SHORT_BINSTRING": _push,
    "BINBYTES": _push,
    "SHORT_BINBYTES": _push,
    "BINBYTES8": _push,
    "BYTEARRAY8": _push,
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "APPEND": _append,
    "APPENDS": _appends,
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "ADDITEMS": _add_items,
    "FROZENSET": lambda machine, _: machine.push({_key(x) for x in machine.marked()}),
    "BINGET": _get,
    "LONG_BINGET": _get,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _new,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
_INSTRUCTIONS = {
    op.code.encode("latin-1"): (op, _ACTS[op.name])
    for op in pickletools.opcodes
    if op.name in _ACTS
}


# What the names of the table stand for.


@dataclass(frozen=True)
class Maker:
    """Our own stand-in for a function: takes between `least` and `most` arguments."""

    call: Callable
    least: int
    most: int

    def make(self, machine: Machine, path: str, arguments: tuple) -> Any:
        if not self.least <= len(arguments) <= self.most:
            raise damaged(f"its pickle gives {path} {len(arguments)} arguments")
        return self.call(machine, *arguments)


def _sizes(values: tuple) -> tuple[int, ...]:
    """A shape, or strides, as the file gives it."""
    if len(values) > MOST_AXES or any(type(x) is not int or not 0 <= x < MOST for x in values):
        raise damaged(f"a tensor has the shape or strides {_list(values)}")
    return tuple(values)


def _list(values: tuple) -> str:
    return shown([x if type(x) is int and abs(x) < 10**30 else "?" for x in values[:8]])


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))


def _tensor(machine: Machine, storage, offset, shape, strides, *gradients, dtype=None) -> Tensor:
    """`_rebuild_tensor` and, with more about gradients, `_v2`."""
    dtype = _typed(storage, Storage).dtype if dtype is None else dtype
    shape = _sizes(_typed(shape, tuple, list))
    strides = _sizes(_typed(strides, tuple, list))
    (offset,) = _sizes((offset,))
    if len(shape) != len(strides):
        raise damaged(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    elements = math.prod(max(1, size) for size in shape)
    # An expanded tensor repeats its values; beyond the file's size that is no tensor anybody saved.
    if elements * dtype.itemsize > max(storage.file.size, 1 << 20):
        raise damaged(f"a tensor of {_list(shape)} {dtype} is greater than the file")
    end = (offset + _span(shape, strides)) * dtype.itemsize
    if 0 not in shape and end > storage.size:
        raise damaged(
            f"a tensor of {_list(shape)} {dtype} with strides {_list(strides)} from {offset} on needs "
            f"{end} bytes, its storage has {storage.size}"
        )
    return Tensor(storage, dtype, offset, shape, strides)


def _tensor_of_dtype(machine: Machine, storage, offset, shape, strides, *rest) -> Tensor:
    """`_rebuild_tensor_v3`: of dtypes that have no storage of their own."""
    dtype = _typed(rest[2], Name).means
    if not isinstance(dtype, np.dtype):
        raise damaged("a tensor has no dtype")
    return _tensor(machine, storage, offset, shape, strides, dtype=dtype)


def _parameter(machine: Machine, data, *rest) -> Tensor:
    return _typed(data, Tensor, Array)


def _items(machine: Machine, pairs=()) -> dict:
    """An OrderedDict, or dict, made of pairs."""
    made = {}
    machine.count(len(_typed(pairs, tuple, list)))
    for pair in pairs:
        if len(_typed(pair, tuple, list)) != 2:
            raise damaged("its pickle has a key without a value")
        made[_key(pair[0])] = pair[1]
    return made


def _set(machine: Machine, values=()) -> set:
    machine.count(len(_typed(values, tuple, list)))
    return {_key(value) for value in values}


def _same(machine: Machine, value=None, *rest) -> Any:
    return value


def _encode(machine: Machine, text, encoding="latin1") -> bytes:
    """Protocol 2 has no bytes: it writes them as text and asks for this."""
    machine.copy(len(_typed(text, str)))
    try:
        return text.encode("latin-1") if encoding in ("latin1", "latin-1") else text.encode("ascii")
    except UnicodeEncodeError:
        raise damaged("its pickle has text where bytes should be") from None


def _numpy_dtype(machine: Machine, code, *rest) -> Dtype:
    if type(code) is not str or not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16|U[1-9]\d?", code):
        raise refused(f"the file holds a numpy array of dtype {shown(code)}")
    return Dtype(code)


def _numpy_array(machine: Machine, *rest) -> Array:
    return Array()


def _numpy_scalar(machine: Machine, dtype, data) -> Array:
    return _fill(Array(scalar=True), (), _typed(dtype, Dtype), data)


def _numpy_buffer(machine: Machine, data, dtype, shape, order) -> Array:
    made = _fill(Array(), _typed(shape, tuple), _typed(dtype, Dtype), data)
    made.fortran = order == "F"
    return made


# The one table of allowed names. To allow one more is to add a line here.
NAMES: dict[str, Any] = {
    "collections.OrderedDict": Maker(_items, 0, 1),
    "builtins.dict": Maker(_items, 0, 1),
    "__builtin__.dict": Maker(_items, 0, 1),
    "builtins.set": Maker(_set, 0, 1),
    "__builtin__.set": Maker(_set, 0, 1),
    "_codecs.encode": Maker(_encode, 1, 2),
    # PyTorch
    "torch._utils._rebuild_tensor": Maker(_tensor, 4, 4),
    "torch._utils._rebuild_tensor_v2": Maker(_tensor, 4, 7),
    "torch._utils._rebuild_tensor_v3": Maker(_tensor_of_dtype, 7, 8),
    "torch._utils._rebuild_parameter": Maker(_parameter, 3, 3),
    "torch._utils._rebuild_parameter_with_state": Maker(_parameter, 4, 4),
    "torch.Size": Maker(_same, 1, 1),
    "torch.device": Maker(_same, 1, 2),
    "torch.storage.UntypedStorage": DTYPES["uint8"],
    # TorchScript: typed lists and dictionaries
    "torch.jit._pickle.build_intlist": Maker(_same, 1, 1),
    "torch.jit._pickle.build_doublelist": Maker(_same, 1, 1),
    "torch.jit._pickle.build_boollist": Maker(_same, 1, 1),
    "torch.jit._pickle.build_tensorlist": Maker(_same, 1, 1),
    "torch.jit._pickle.restore_type_tag": Maker(_same, 2, 2),
    # numpy, before and since 2.0
    "numpy.ndarray": None,
    "numpy.dtype": Maker(_numpy_dtype, 1, 3),
    "numpy.core.multiarray._reconstruct": Maker(_numpy_array, 3, 3),
    "numpy._core.multiarray._reconstruct": Maker(_numpy_array, 3, 3),
    "numpy.core.multiarray.scalar": Maker(_numpy_scalar, 2, 2),
    "numpy._core.multiarray.scalar": Maker(_numpy_scalar, 2, 2),
    "numpy.core.numeric._frombuffer": Maker(_numpy_buffer, 4, 4),
    "numpy._core.numeric._frombuffer": Maker(_numpy_buffer, 4, 4),
    # inert shells
    "argparse.Namespace": Shell,
    "torch.nn.functional.relu": None,
}
NAMES |= {f"torch.{word}Storage": DTYPES[dtype] for word, dtype in STORAGES.items()}
NAMES |= {f"torch.{word}": dtype for word, dtype in DTYPES.items()}
# The classes of the published FTI4CIR module; its code needs not be here.
NAMES |= {f"i2t_model.{name}": Shell for name in ("IMG2TEXT", "Phi")}
NAMES |= {
    f"MHTransformer.{name}": Shell
    for name in ("Transformer", "TransformerLayer", "MultiHeadAttention", "MlpTransformer")
}
NAMES |= {
    f"torch.nn.modules.{name}": Shell
    for name in (
        "container.ModuleList",
        "container.Sequential",
        "linear.Linear",
        "normalization.LayerNorm",
        "activation.GELU",
        "activation.Sigmoid",
        "dropout.Dropout",
        "loss.CosineEmbeddingLoss",
        "loss.MSELoss",
    )
}
