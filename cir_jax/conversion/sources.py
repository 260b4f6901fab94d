"""Published weights on disk as named tensors, whatever program wrote them.

A file is recognised by its content: safetensors, the zip and the older stream of `torch.save`, TorchScript archives,
what flax writes, and folders as Hugging Face and open_clip publish them, in one file or in shards. Nothing of a file is
executed (`pickles.py`), and a tensor is read when it is asked for, so that a conversion holds one at a time.
safetensors is read by the few lines below and not by its package: that one maps the file into memory (see
`torch_files.py`).
"""

import functools
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.conversion.flax_files import begins_dictionary, pickled_bytes, read_flax
from cir_jax.conversion.pickles import (
    DTYPES,
    Array,
    Shell,
    Storage,
    Tensor,
    damaged,
    refused,
)
from cir_jax.conversion.torch_files import PICKLE, ZIP, Bytes, read_stream, read_zip
from cir_jax.files import local_path, read_json, reported, sha256, shown

# Names that a folder's weights may have, the one to prefer first, and those of its config.
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
WEIGHTS = (*WEIGHTS, "open_clip_pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
CONFIGS = ("config.json", "open_clip_config.json")
# Keys under which training programs put the weights, and words in those of what else they save.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
TRAINING = {"optimizer", "optimizers", "optim", "opt", "scheduler", "scaler", "rng", "amp", "loss"}
MOST_HEADER = 16 << 20  # bytes of JSON
MOST_VISITS = 1_000_000  # values of a file; a few shared lists can stand for billions
MOST_DEPTH = 64
PLAIN = (type(None), bool, int, float, str)
TABLES = ("_parameters", "_buffers", "_modules")  # of a pickled module
SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
# How files begin that people take for weights.
MISTAKEN = {
    b"version https://git-lfs": "a pointer of Git LFS, not the weights; fetch them with git lfs pull",
    b"<": "a web page, not the weights; the download failed or wants a login",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\x89HDF": "a file of Keras; expected weights of PyTorch or safetensors",
    b"\x93NUMPY": "a numpy array; expected weights of PyTorch or safetensors",
}


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read from its file when it is asked for; nothing is kept."""

    def __init__(self, records: Mapping[str, Tensor | Array]):
        self.records = records

    def __getitem__(self, key: str) -> np.ndarray:
        return self.records[key].read()

    def __contains__(self, key: object) -> bool:
        # Mapping's own would read the tensor.
        return key in self.records

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self.records[key].shape

    def dtype(self, key: str) -> np.dtype:
        """The dtype of a tensor, without reading it."""
        return self.records[key].dtype.newbyteorder("=")


@dataclass(frozen=True)
class Source:
    """Named tensors of a file or a folder, and what else it says.

    Attributes:
      tensors: name, as in a PyTorch `state_dict` -> array; a `Tensors`. bfloat16 is `ml_dtypes.bfloat16`.
      config: the config.json beside the weights, or None.
      facts: plain values that lay beside the tensors: numbers, texts, lists, dictionaries, by dotted name. Of arguments
        that argparse parsed it is a dictionary.
      layout: "safetensors", "torch zip", "torchscript", "torch legacy", "flax" or "hugging face folder".
      left_out: groups of tensors that were not taken, an optimizer's say -> how many.
      files: what was read, for `sha256`.
    """

    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any] | None
    facts: Mapping[str, Any]
    layout: str
    left_out: Mapping[str, int]
    files: tuple[Path, ...] = ()

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the file; of several, that of the lines "SHA-256  name" that `sha256sum` prints."""
        if len(self.files) == 1:
            return sha256(self.files[0])
        lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(self.files)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_source(path: str | os.PathLike, part: str | None = None) -> Source:
    """The tensors of a file or a folder of weights.

    Args:
      path: a file in one of the formats, a folder with one, or the index of shards.
      part: of a file with several groups of tensors, the key of the one to take; "*" takes all, under dotted names.

    Raises:
      OSError: nothing is there, or it may not be read.
      ValueError: everything else: no such format, damaged, made to mislead, ambiguous. The message begins with the path
        of the file that is at fault.
    """
    path = local_path(path)
    with reported(path, "read"):
        mode = path.stat().st_mode
    try:
        if stat.S_ISDIR(mode):
            return _open_folder(path, part)
        if not stat.S_ISREG(mode):
            raise ValueError("is no regular file; expected weights")
        if _is_json(path):
            return _open_shards(path, part)
        source = _open_file(path, part)
    except ValueError as error:
        # What came from a file of the folder names it already.
        told = str(error)
        raise ValueError(told if str(path) in told else f"{path}: {told}") from error
    return _with_config(source, path) if path.name in WEIGHTS else source


def joined(sources: Mapping[str, Source]) -> Source:
    """One source of several: the names of a part begin with the part's name and a dot, those of the part "" do not.

    Config, facts and layout are those of the part "".

    Raises:
      ValueError: the part "" has names like those of another.
    """
    for part in sources.keys() - {""}:
        taken = sum(name.startswith(f"{part}.") for name in sources[""].tensors)
        if taken:
            raise ValueError(
                f"holds {taken} tensors behind {part}. itself; leave out {part}=SOURCE"
            )
    behind = lambda part, name: f"{part}.{name}" if part else name
    named = lambda field: {
        behind(part, name): each
        for part, source in sources.items()
        for name, each in field(source).items()
    }
    return replace(
        sources[""],
        tensors=Tensors(named(lambda source: source.tensors.records)),
        left_out=named(lambda source: source.left_out),
        files=tuple(path for source in sources.values() for path in source.files),
    )


def open_lists(path: str | os.PathLike) -> Source:
    """All that a file of `torch.save` holds, arrays of text among the tensors: lists of results, say, and no weights.

    Raises: as `open_source`.
    """
    path = local_path(path)
    with reported(path, "read"), open(path, "rb") as opened:
        zipped = opened.read(4) == ZIP
    try:
        file = Bytes(path)
        value, layout = read_zip(file) if zipped else (read_stream(file), "torch legacy")
        gathered = Gathered(iter(range(MOST_VISITS)), texts=True).add("", value)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    return Source(Tensors(gathered.tensors), None, gathered.facts, layout, {}, (path,))


def _is_json(path: Path) -> bool:
    with reported(path, "read"), open(path, "rb") as file:
        start = file.read(64)
    # The length that a safetensors file begins with may look like a brace, but has zeros behind it.
    return start.lstrip()[:1] == b"{" and b"\0" not in start


def _open_folder(folder: Path, part: str | None) -> Source:
    found = [name for name in (*WEIGHTS, *INDEXES) if (folder / name).is_file()]
    if not found:
        raise ValueError(f"is a folder without {', '.join((*WEIGHTS, *INDEXES))}; name the file")
    first = folder / found[0]
    source = _open_shards(first, part) if _is_json(first) else _open_file(first, part)
    return _with_config(source, first)


def _with_config(source: Source, weights: Path) -> Source:
    """`source` with the config beside it, if there is one; open_clip names its own."""
    beside = [weights.parent / name for name in CONFIGS]
    own = beside[1] if weights.name.startswith("open_clip") else beside[0]
    config = next((path for path in (own, *beside) if path.is_file()), None)
    if config is None:
        return source
    if config.stat().st_size > MOST_HEADER:
        raise ValueError(f"{config} has more than {MOST_HEADER} bytes, expected a config")
    return replace(source, config=read_json(config), layout="hugging face folder")


def _open_shards(index: Path, part: str | None) -> Source:
    """The tensors of several files, by the list of them that Hugging Face writes."""
    if index.stat().st_size > MOST_HEADER:
        raise ValueError(f"{index} has more than {MOST_HEADER} bytes, expected an index of shards")
    listed = read_json(index)
    shards = listed.get("weight_map")
    if type(shards) is not dict or not shards:
        raise ValueError(
            f"{index.name} is JSON without a weight_map; expected weights or an index of shards"
        )
    names = set(shards.values()) if all(type(x) is str for x in shards.values()) else {""}
    for name in names:
        outside = name in ("", ".", "..") or bool(set("/\\:") & set(name))
        if outside or not name.isprintable() or len(name.encode()) > 255:
            raise ValueError(
                f"{index.name} names the shard {shown(name)}, expected a file beside it"
            )
        if not (index.parent / name).is_file():
            raise ValueError(
                f"{index.name} names the shard {shown(name)}, which is missing; fetch it"
            )
    opened = {name: _open_file(index.parent / name, part) for name in sorted(names)}
    absent = [key for key, name in shards.items() if key not in opened[name].tensors]
    total = sum(len(source.tensors) for source in opened.values())
    if absent or total != len(shards):
        raise damaged(
            f"{index.name} lists {len(shards)} tensors, its shards hold {total}"
            + (f" and not {shown(absent[0])}" if absent else "")
        )
    records = {key: opened[name].tensors.records[key] for key, name in shards.items()}
    facts, left_out = {}, {}
    for source in opened.values():
        facts |= source.facts
        left_out |= source.left_out
    files = (index, *(index.parent / name for name in sorted(names)))
    layout = next(iter(opened.values())).layout
    return _with_config(Source(Tensors(records), None, facts, layout, left_out, files), index)


def _open_file(path: Path, part: str | None) -> Source:
    """One file of any format; a ValueError begins with its path."""
    with reported(path, "read"):
        file = Bytes(path)
        with open(path, "rb") as opened:
            start = opened.read(64)
    try:
        # First, because the number a safetensors file begins with may look like any of the others.
        if start[8:9] == b"{" and not any(start[5:8]):
            records, facts = _safetensors(file)
            _refuse_part(part, "safetensors")
            return Source(Tensors(records), None, facts, "safetensors", {}, (path,))
        if start[:4] == ZIP:
            return _chosen(*read_zip(file), file, part)
        if start[:1] == PICKLE and (place := pickled_bytes(file)):
            return _flax(file, *place, part)
        if start[:1] == PICKLE:
            return _chosen(read_stream(file), "torch legacy", file, part)
        if begins_dictionary(start):
            return _flax(file, 0, file.size, part)
        raise ValueError(_unknown(start))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def _refuse_part(part: str | None, layout: str) -> None:
    if part not in (None, "*"):
        raise ValueError(f"has no part {shown(part)}: {layout} has no parts")


def _flax(file: Bytes, start: int, stop: int, part: str | None) -> Source:
    """The arrays that flax wrote, the names of the dictionaries they lie in joined by dots."""
    _refuse_part(part, "flax")
    gathered = Gathered(iter(range(MOST_VISITS))).add("", read_flax(file, start, stop))
    if not gathered.tensors:
        raise ValueError("holds no tensors")
    return Source(Tensors(gathered.tensors), None, {}, "flax", {}, (file.path,))


def _unknown(start: bytes) -> str:
    for beginning, what in MISTAKEN.items():
        if start.startswith(beginning):
            return f"is {what}"
    begins = f"begins with {start[:8]!r}" if start else "is empty"
    return (
        f"{begins}; expected safetensors, a file of torch.save or of flax, or a TorchScript archive"
    )


# safetensors: the length of a header, the header in JSON, and bytes.


def _safetensors(file: Bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > min(MOST_HEADER, file.size - 8):
        raise damaged(f"its header should have {length} bytes; the file has {file.size}")
    try:
        text = file.read(8, 8 + length).tobytes().decode()
        header = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header is no JSON ({_short(error)})") from None
    if type(header) is not dict:
        raise damaged("its header is no JSON object")
    facts = header.pop("__metadata__", {})
    if type(facts) is not dict or any(type(x) is not str for x in facts.values()):
        raise damaged("its __metadata__ is not texts by name")
    gathered = Gathered(iter(range(MOST_VISITS)))
    for key, entry in header.items():
        gathered.add(key, _entry(key, entry, file, 8 + length))
    places = gathered.tensors
    if not places:
        raise ValueError("holds no tensors")
    end = 8 + length
    # The format wants every byte to belong to one tensor.
    for key, record in sorted(places.items(), key=lambda item: _extent(item[1])):
        start, stop = _extent(record)
        if start != end:
            raise damaged(f"the tensor {shown(key)} begins at byte {start}, expected {end}")
        end = stop
    if end != file.size:
        raise damaged(f"its tensors end at byte {end}, the file at {file.size}")
    return places, facts


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _short(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "no UTF-8"
    return "too deep" if isinstance(error, RecursionError) else shown(str(error))[1:-1]


def _extent(record: Tensor) -> tuple[int, int]:
    return record.storage.start, record.storage.start + record.storage.size


def _entry(key: str, entry: Any, file: Bytes, first: int) -> Tensor:
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(f"the entry of {shown(key)} has not dtype, shape and data_offsets")
    code, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(code) is not str or code not in SAFETENSORS:
        raise refused(f"the tensor {shown(key)} has the dtype {shown(code)}")
    counts = lambda x: type(x) is list and all(type(n) is int and 0 <= n < 2**48 for n in x)
    if not counts(shape) or len(shape) > 32 or not counts(place) or len(place) != 2:
        raise damaged(f"the tensor {shown(key)} has shape {shown(shape)} at {shown(place)}")
    dtype = DTYPES[SAFETENSORS[code]]
    size, elements = place[1] - place[0], math.prod(shape)
    if size != elements * dtype.itemsize or first + place[1] > file.size:
        raise damaged(
            f"the tensor {shown(key)} of {shown(shape)} {dtype} lies at {shown(place)} of {file.size - first} bytes"
        )
    if math.prod(max(1, n) for n in shape) >= 2**48:
        raise damaged(f"the tensor {shown(key)} has shape {shown(shape)}")
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Tensor(Storage(size, dtype, first + place[0], file), dtype, 0, tuple(shape), strides)


# From the object of a PyTorch file to names.


def _chosen(value: Any, layout: str, file: Bytes, part: str | None) -> Source:
    """The group of tensors that is the model's, or the `part` of the caller."""
    aside = Gathered(iter(range(MOST_VISITS)))
    left_out: dict[str, int] = {}
    if part not in (None, "*", *_children(value)):
        known = sorted(_children(value))[:8]
        raise ValueError(f"has no part {shown(part)}; it has {shown(known)}")
    if part != "*":
        key = part or _wrapped(value, aside.budget)
        while key is not None:
            children = _children(value)
            value = children.pop(key)
            left_out |= _set_aside(children, aside)
            key = _wrapped(value, aside.budget)
        children = _children(value)
        training = {k: v for k, v in children.items() if _is_training(k, v)}
        if training:
            left_out |= _set_aside(training, aside)
            value = {k: v for k, v in children.items() if k not in training}
    gathered = Gathered(aside.budget).add("", value)
    if not gathered.tensors:
        raise ValueError("holds no tensors of a model; expected its weights")
    facts = aside.facts | {k: v for k, v in gathered.facts.items() if k}
    return Source(Tensors(gathered.tensors), None, facts, layout, left_out, (file.path,))


def _set_aside(children: dict[str, Any], aside: "Gathered") -> dict[str, int]:
    """How many tensors lie at each of the keys; what is plain there goes to the facts of `aside`."""
    counts = {}
    for key, each in children.items():
        found = Gathered(aside.budget).add(key, each)
        if found.tensors:
            counts[key] = len(found.tensors)
        else:
            aside.facts |= found.facts
    return counts


def _children(value: Any) -> dict[str, Any]:
    """What lies in a dictionary or a list, by name."""
    if type(value) in (list, tuple):
        return {str(i): each for i, each in enumerate(value)}
    if type(value) is not dict:
        return {}
    children = {str(key): each for key, each in value.items()}
    if len(children) < len(value):
        raise damaged("it has a dictionary with a number and the same number as text")
    return children


def _wrapped(value: Any, budget: Iterator[int]) -> str | None:
    """The key under which the weights lie, or None if they lie here.

    Raises:
      ValueError: several groups could be the weights.
    """
    children = _children(value)
    count = lambda each: len(Gathered(budget).add("x", each).tensors)
    groups = {k: count(v) for k, v in children.items() if type(v) in (dict, list, tuple, Shell)}
    groups = {k: n for k, n in groups.items() if n and not _is_training(k, children[k])}
    direct = any(_is_tensor(each) for each in children.values())
    if not groups or (direct and not set(groups) & set(WRAPPERS)):
        return None
    if len(groups) > 1:
        listed = ", ".join(f"{shown(key)} ({n} tensors)" for key, n in sorted(groups.items())[:8])
        raise ValueError(
            f"holds several groups of tensors: {listed}; say which with --group NAME (in Python part=NAME), or * for all"
        )
    return next(iter(groups))


def _is_training(key: str, value: Any) -> bool:
    """True for the state of an optimizer, however it is called, and what else belongs to training."""
    if type(value) not in (dict, list, tuple):
        return False
    optimizer = type(value) is dict and {"state", "param_groups"} <= set(value)
    return optimizer or bool(TRAINING & set(re.split("[^a-z]+", key.lower())))


def _is_tensor(value: Any) -> bool:
    return type(value) is Tensor or (type(value) is Array and not value.scalar)


class Gathered:
    """The tensors and the plain values below a value of a file, by dotted name.

    Args:
      budget: gives one item for each value that may still be visited.
      texts: take arrays of text too; weights have none.
    """

    def __init__(self, budget: Iterator[int], texts: bool = False):
        self.budget, self.texts = budget, texts
        self.tensors: dict[str, Tensor | Array] = {}
        self.facts: dict[str, Any] = {}

    def add(self, name: str, value: Any, depth: int = 0) -> "Gathered":
        """What lies at `value`, under names that begin with `name`.

        Raises:
          ValueError: two tensors of one name, names nobody can print, values nested without end.
        """
        self._visit(depth)
        if _is_tensor(value):
            self._tensor(name, value)
        elif type(value) is Shell and value.path != "argparse.Namespace":
            self._object(name, value, depth)
        elif (plain := self._plain(value, depth)) is not NotImplemented:
            self.facts[name] = plain
        else:
            for key, each in _children(value).items():
                self.add(_joined(name, key), each, depth + 1)
        return self

    def _visit(self, depth: int) -> None:
        if depth > MOST_DEPTH:
            raise damaged(f"its values are nested deeper than {MOST_DEPTH}")
        if next(self.budget, None) is None:
            raise damaged(f"it stands for more than {MOST_VISITS:,} values")

    def _tensor(self, name: str, value: Tensor | Array) -> None:
        name = name or "tensor"
        if len(name) > 1000 or not name.isprintable():
            raise damaged(f"a tensor is called {shown(name)}, expected a printable name")
        if name in self.tensors:
            raise damaged(f"two tensors are called {shown(name)}")
        if type(value) is Array and value.dtype is None:
            raise damaged(f"the numpy array {shown(name)} has no values")
        if value.dtype.kind == "U" and not self.texts:
            raise refused(f"the file holds a numpy array of dtype {shown(value.dtype.str)}")
        self.tensors[name] = value

    def _object(self, name: str, shell: Shell, depth: int) -> None:
        """A module: what its `state_dict` would hold, and its plain attributes."""
        state = shell.state if type(shell.state) is dict else {}
        state = {key: each for key, each in state.items() if type(key) is str}
        if not shell.path.startswith("__torch__."):
            hidden = state.get("_non_persistent_buffers_set")
            hidden = hidden if type(hidden) is set else set()
            attributes = state
            state = {k: v for k, v in state.items() if not _is_tensor(v) and k not in TABLES}
            for table in TABLES:
                found = attributes.get(table)
                state |= {k: v for k, v in _children(found).items() if k not in hidden}
        for key, each in state.items():
            path = _joined(name, key)
            if _is_tensor(each) or type(each) is Shell:
                self.add(path, each, depth + 1)
            elif not key.startswith("_") and key != "training" and each is not None:
                plain = self._plain(each, depth + 1)
                if plain is not NotImplemented:
                    self.facts[path] = plain

    def _plain(self, value: Any, depth: int) -> Any:
        """`value` as JSON could hold it; NotImplemented if there is a tensor or a module in it."""
        self._visit(depth)
        if type(value) is Shell and value.path == "argparse.Namespace":
            value = value.state if type(value.state) is dict else {}
        if type(value) in PLAIN:
            return value
        if type(value) is Array and value.scalar:
            return value.read().item()
        if type(value) in (Tensor, Array, Shell):
            return NotImplemented
        if type(value) in (list, tuple, set):
            made = [self._plain(each, depth + 1) for each in value]
            return NotImplemented if any(x is NotImplemented for x in made) else made
        if type(value) is dict:
            made = {}
            for key, each in value.items():
                made[str(key)] = self._plain(each, depth + 1)
                if made[str(key)] is NotImplemented:
                    return NotImplemented
            return made
        return None  # a dtype, a function, bytes: nothing to tell


def _joined(name: str, key: str) -> str:
    # Longer ones are refused where they name a tensor; joined without end they would fill the memory.
    return f"{name[:1001]}.{key[:1001]}" if name else key
