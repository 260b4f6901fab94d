"""The engine of conversion: a table of rules says which source tensor becomes which parameters, in both directions.

A table must account for everything: every parameter is filled, every source tensor is used or ignored by a named
pattern that gives its reason, every shape is right and every number finite; otherwise nothing is made, and one
message lists all that is wrong.
"""

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from cir_jax import files

Shape = tuple[int, ...]
# Faults that one message lists; the rest is counted.
LISTED = 60
JSON_BYTES = 2**20
FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Change:
    """What happens to a source tensor: cut into `parts` along its first axis, then the `axes` of each permuted.

    `ones` axes of length one in front of all others are dropped before, and with `heads` = (n, count) the axes n, of
    that many heads, and n + 1 are made one. In this form a change has one inverse, and says what shape it expects.
    """

    parts: int = 1
    axes: tuple[int, ...] | None = None
    ones: int = 0
    heads: tuple[int, int] | None = None

    def forward(self, x: np.ndarray) -> list[np.ndarray]:
        """The arrays for the targets of a rule, as views."""
        x = x.reshape(x.shape[self.ones :])
        if self.heads:
            axis = self.heads[0]
            x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return [self._turned(part) for part in np.split(x, self.parts)] if x.ndim else [x]

    def _turned(self, x):
        return x if self.axes is None else x.transpose(self.axes)

    def backward(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The source tensor of what `forward` gave."""
        turned = [self._turned_back(part) for part in parts]
        whole = turned[0] if len(turned) == 1 else np.concatenate(turned)
        return whole.reshape((1,) * self.ones + self._with_heads(whole.shape))

    def _turned_back(self, x):
        return x if self.axes is None else x.transpose(np.argsort(self.axes))

    def source_shape(self, target: Shape) -> Shape:
        """The shape of the source tensor whose parts have the shape `target`."""
        shape = (
            target if self.axes is None else tuple(int(target[i]) for i in np.argsort(self.axes))
        )
        shape = (self.parts * shape[0], *shape[1:]) if self.parts > 1 else tuple(shape)
        return (1,) * self.ones + self._with_heads(shape)

    def _with_heads(self, shape: Shape) -> Shape:
        if self.heads is None:
            return shape
        axis, count = self.heads
        return (*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :])


SAME = Change()
LINEAR = Change(axes=(1, 0))  # PyTorch's [outputs, inputs] -> [inputs, outputs]
CONV = Change(axes=(2, 3, 1, 0))  # OIHW -> HWIO
FUSED = Change(parts=3, axes=(1, 0))  # one projection of query, key and value
FUSED_BIAS = Change(parts=3)


@dataclass(frozen=True)
class Rule:
    """One source tensor and the parameters it becomes, named by their paths.

    A `*` in `source` stands for the number of a layer, from `first` on: the tensors of all layers are stacked along a
    leading axis of the targets.
    """

    source: str
    targets: tuple[str, ...]
    change: Change = SAME
    first: int = 0

    def names(self, shapes: Mapping[str, Shape]) -> list[str]:
        """The names of its source tensors, in the order of the layers."""
        if "*" not in self.source:
            return [self.source]
        layers = shapes[self.targets[0]][0]
        return [self.source.replace("*", str(self.first + i)) for i in range(layers)]

    def source_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The shape of each of its source tensors."""
        shape = shapes[self.targets[0]]
        return self.change.source_shape(shape[1:] if "*" in self.source else shape)


def rule(source: str, target: str, change: Change = SAME, first: int = 0) -> Rule:
    """A rule with one target, or with several written `a/{b,c}/d`."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", target)
    names = [found[1] + each + found[3] for each in found[2].split(",")] if found else [target]
    return Rule(source, tuple(names), change, first)


def linear(source: str, target: str, first: int = 0) -> list[Rule]:
    """The rules of a linear layer with bias."""
    return [
        rule(f"{source}.weight", f"{target}/kernel", LINEAR, first),
        rule(f"{source}.bias", f"{target}/bias", SAME, first),
    ]


def norm(
    source: str, target: str, names: Sequence[str] = ("weight", "bias"), first: int = 0
) -> list[Rule]:
    """The rules of a LayerNorm, whose scale and bias PyTorch calls `names`."""
    return [
        rule(f"{source}.{names[0]}", f"{target}/scale", SAME, first),
        rule(f"{source}.{names[1]}", f"{target}/bias", SAME, first),
    ]


def within(rules: Sequence[Rule], source: str = "", target: str = "") -> tuple[Rule, ...]:
    """A table whose names of sources and of targets lie behind prefixes."""
    return tuple(
        replace(
            each, source=source + each.source, targets=tuple(target + name for name in each.targets)
        )
        for each in rules
    )


@dataclass(frozen=True)
class Options:
    """What the person who converts says, and the folder that the source came in, if it is one."""

    method: str | None = None
    variant: str | None = None
    activation: str | None = None
    tokenizer: Path | None = None
    resize_first: bool = False
    folder: Path | None = None

    def beside(self, name: str) -> Mapping[str, Any]:
        """The object in a JSON file of the source's folder; empty if there is none."""
        if self.folder is None or not (self.folder / name).is_file():
            return {}
        if (self.folder / name).stat().st_size > JSON_BYTES:
            raise ValueError(f"{self.folder / name} is larger than {JSON_BYTES:,} bytes")
        return files.read_json(self.folder / name)


@dataclass(frozen=True)
class Plan:
    """What a model's module says about a source: the config it implies and the table to read it by.

    Attributes:
      config: of the method.
      rules: the table.
      layout: the recognised layout of names, in words.
      ignored: patterns over whole source names -> why such a tensor is not needed.
      prefix: what every source name begins with before the names of the table.
      notes: lines for the printed summary.
      faults: what is wrong already, to be told together with what the tensors lack.
      fresh: paths of parameters that no source has and that therefore begin as in a new model; the notes name them.
    """

    config: Any
    rules: tuple[Rule, ...]
    layout: str
    ignored: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


class Stripped(Mapping):
    """The tensors of a source (`cir_jax.conversion.sources.Tensors`), their names read without a common prefix."""

    def __init__(self, tensors, prefix: str):
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name):
        return self.tensors[self.prefix + name]

    def __contains__(self, name):
        return self.prefix + name in self.tensors

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, without reading it."""
        return tuple(self.tensors.shape(self.prefix + name))

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor, without reading it."""
        return self.tensors.dtype(self.prefix + name)

    def __iter__(self):
        return (name[len(self.prefix) :] for name in self.tensors)

    def __len__(self):
        return len(self.tensors)


def shape_of(tensors, name: str, layout: str, axes: int = 2) -> Shape:
    """The shape of a tensor from which sizes are read; ValueError if it is not there or has other axes."""
    if name not in tensors:
        refuse([f"missing {name}, from which the sizes are read"], layout)
    shape = tensors.shape(name)
    if len(shape) != axes or 0 in shape:
        refuse([f"{name} has shape {list(shape)}, expected {axes} axes"], layout)
    return shape


def layer_count(tensors, prefix: str) -> int:
    """How many layers there are behind a prefix; those of a hole in the numbers will be missed later."""
    found = {name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)}
    numbers = {int(each) for each in found if re.fullmatch("[0-9]{1,4}", each)}
    if not numbers:
        raise ValueError(f"there is no layer {prefix}0")
    return max(numbers) + 1


def common_prefix(names: Sequence[str], prefix: str) -> str:
    """`prefix` if all names begin with it, otherwise nothing."""
    return prefix if names and all(name.startswith(prefix) for name in names) else ""


def convert(
    tensors,
    plan: Plan,
    shapes: Mapping[str, Shape],
    dtype="float32",
    fresh: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Parameters by path, and the ignored source names with their reasons.

    Tensors are read one after the other, so that memory stays near the size of the result.

    Args:
      tensors: of a `Source`, by name.
      plan: its table names sources and targets.
      shapes: of every parameter of the model, by path.
      dtype: of the result; a number that it cannot hold is a fault.
      fresh: the values of the parameters that the plan calls so.

    Raises:
      ValueError: all faults at once.
    """
    tensors = Stripped(tensors, plan.prefix)
    ignored, faults = _name_faults(tensors, plan, shapes)
    faults = [*plan.faults, *faults]
    # A tensor that fills several parameters is one fault.
    faults += dict.fromkeys(_tensor_faults(tensors, plan.rules, shapes, np.dtype(dtype)))
    refuse(faults, plan.layout)
    params = {name: np.asarray(fresh[name], dtype) for name in plan.fresh}
    for each in plan.rules:
        _fill(params, each, tensors, shapes, np.dtype(dtype))
    return params, ignored


def refuse(faults: Sequence[str], layout: str) -> None:
    """ValueError that lists the faults of a source, if there are any."""
    if faults:
        listed = "\n  ".join(faults[:LISTED])
        more = f"\n  and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        raise ValueError(
            f"the source, read as {layout}, does not fit the model; nothing was written. {len(faults)} "
            f"fault{'s' * (len(faults) > 1)}:\n  {listed}{more}"
        )


def _name_faults(tensors, plan: Plan, shapes) -> tuple[dict[str, str], list[str]]:
    """(ignored names with reasons, faults): what the table asks for and the source lacks, and what is left over."""
    _check_table(plan.rules, shapes, plan.fresh)
    wanted = {name for each in plan.rules for name in each.names(shapes)}
    ignored, over = {}, []
    for name in tensors:
        if name in wanted:
            continue
        reason = next(
            (why for pattern, why in plan.ignored.items() if re.fullmatch(pattern, name)), None
        )
        if reason is None:
            over.append(name)
        else:
            ignored[name] = reason
    present = set(tensors)
    missing = sorted(wanted - present, key=_natural)
    faults = [f"missing {name}{_near(name, over)}" for name in missing]
    faults += [
        f"left over {shown(name)}{_near(name, missing)}" for name in sorted(over, key=_natural)
    ]
    return ignored, faults


def _check_table(
    rules: Sequence[Rule], shapes: Mapping[str, Shape], fresh: Sequence[str] = ()
) -> None:
    """A table fills every parameter exactly once; anything else is a mistake in the table."""
    targets = [*fresh, *(target for each in rules for target in each.targets)]
    astray = sorted({*targets} ^ {*shapes}) + sorted({x for x in targets if targets.count(x) > 1})
    if astray:
        raise AssertionError(f"the table of rules does not fit the model at {astray}")


def _near(name: str, names: Sequence[str]) -> str:
    """A hint at the most similar of some names."""
    found = difflib.get_close_matches(name[:200], list(names[:500]), 1, 0.8)
    return f" (nearest: {shown(found[0])})" if found else ""


def _natural(name: str) -> list:
    """A key that sorts layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]{1,9})", name)]


def shown(name: str) -> str:
    """A name from a file as a message quotes it."""
    return name if name.isascii() and name.isprintable() and len(name) <= 100 else files.shown(name)


def _tensor_faults(tensors, rules: Sequence[Rule], shapes, dtype) -> Iterator[str]:
    """What is wrong with the tensors that the table uses: shape, type, numbers."""
    for each in rules:
        expected = each.source_shape(shapes)
        for name in each.names(shapes):
            if name in tensors and (fault := _tensor_fault(name, tensors, expected, dtype)):
                yield f"{name}: {fault}"


def _tensor_fault(name: str, tensors, expected: Shape, dtype) -> str | None:
    kind, shape = tensors.dtype(name), tensors.shape(name)
    if kind.name not in FLOATS:
        return f"found {kind}, expected one of {', '.join(FLOATS)}"
    if shape != expected and not (shape == (1,) and expected == ()):
        return f"found shape {list(shape)}, expected {list(expected)}"
    x = tensors[name]
    # Plane by plane: the arrays of the test itself stay small.
    bad = sum(int((~np.isfinite(rows)).sum()) for rows in _planes(x))
    if bad:
        return f"found {bad:,} of {x.size:,} numbers that are infinite or no number, expected none"
    largest = float(ml_dtypes.finfo(dtype).max)
    wider = float(ml_dtypes.finfo(x.dtype).max) > largest
    if wider and any((np.abs(rows) > largest).any() for rows in _planes(x)):
        return f"found numbers beyond {largest:.6g}, which {dtype} cannot hold; use another --dtype"
    return None


def _planes(x: np.ndarray, size: int = 2**20) -> Iterator[np.ndarray]:
    """An array in pieces of about `size` numbers."""
    if x.ndim == 0:
        yield x
        return
    rows = max(1, size // max(1, math.prod(x.shape[1:])))
    for start in range(0, len(x), rows):
        yield x[start : start + rows]


def _fill(params: dict, each: Rule, tensors, shapes, dtype) -> None:
    """Put the source tensors of one rule into their places."""
    for target in each.targets:
        params[target] = np.empty(shapes[target], dtype)
    stacked = "*" in each.source
    for layer, name in enumerate(each.names(shapes)):
        x = np.asarray(tensors[name]).reshape(each.source_shape(shapes))
        for target, part in zip(each.targets, each.change.forward(x)):
            params[target][layer if stacked else ...] = part


def original(
    params: Mapping[str, np.ndarray], rules: Sequence[Rule]
) -> Iterator[tuple[str, Shape, Any]]:
    """(name, shape, function that makes the array) of every source tensor that the parameters stand for."""
    shapes = {name: x.shape for name, x in params.items()}
    _check_table(rules, shapes)
    for each in rules:
        for layer, name in enumerate(each.names(shapes)):
            make = lambda each=each, layer=layer: _original(params, each, layer)
            yield name, each.source_shape(shapes), make


def _original(params, each: Rule, layer: int) -> np.ndarray:
    parts = [params[target] for target in each.targets]
    return each.change.backward([x[layer] for x in parts] if "*" in each.source else parts)


def module_fingerprints(params: Mapping[str, np.ndarray]) -> dict[str, str]:
    """16 hex digits for each module, the first part of a path: over its sorted names and its numbers as float32."""
    digests = {}
    for name, x in sorted(params.items()):
        digest = digests.setdefault(name.partition("/")[0], hashlib.sha256())
        digest.update(f"{name}{x.shape}".encode())
        digest.update(np.ascontiguousarray(x, np.float32))
    return {module: digest.hexdigest()[:16] for module, digest in digests.items()}
