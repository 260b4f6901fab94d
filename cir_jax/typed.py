"""Frozen dataclasses against their declared types, and as JSON and back; nothing is converted to fit."""

import difflib
import json
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from cir_jax import files


def to_json(config) -> Any:
    """A config as plain dictionaries and lists."""
    import cattrs

    return cattrs.Converter().unstructure(config)


def portable(config) -> Any:
    """`to_json` as it is stored: files of this package are named from `cir_jax/` on, wherever it is installed."""
    home = f"{Path(__file__).resolve().parent.parent}{os.sep}"
    return json.loads(json.dumps(to_json(config)).replace(json.dumps(home)[1:-1], ""))


def from_json(kind: type, value: Any):
    """The config of dataclass `kind` that `to_json` wrote.

    ValueError that lists every unknown, missing or mistyped field by its dotted name; nothing is converted to fit.
    """
    from cattrs import transform_error

    faults = list(type_faults(kind, value, ""))
    if not faults:
        try:
            return _converter().structure(value, kind)
        except Exception as error:  # a config that refuses its values
            faults = transform_error(error, "", lambda each, _: str(each))
    listed = "\n  ".join(faults)
    raise ValueError(f"this is not a {kind.__name__} of this version:\n  {listed}")


def _converter():
    """cattrs, which by itself cannot tell several dataclasses apart whose fields all have defaults."""
    import cattrs

    converter = cattrs.Converter()
    choose = lambda value, kind: converter.structure(value, _nearest(kind, value))
    converter.register_structure_hook_func(lambda kind: bool(_choices(kind)), choose)
    return converter


def _choices(kind) -> list[type]:
    """The dataclasses among the types of a union, as of `VisionConfig | ResnetConfig`."""
    is_union = get_origin(kind) in (Union, UnionType)
    return [one for one in get_args(kind) if is_union and is_dataclass(one)]


def _nearest(kind, value) -> type:
    """The dataclass of a union that an object has the fewest faults as; the first of equals."""
    return min(_choices(kind), key=lambda one: len(list(type_faults(one, value, ""))))


# What a value of a plain type may be: the words of the error, and whether a value is it.
PLAIN = {
    int: ("a whole number", lambda x: type(x) is int),
    float: ("a finite number", lambda x: type(x) in (int, float) and abs(x) < 1e300),
    str: ("text", lambda x: type(x) is str),
    bool: ("true or false", lambda x: type(x) is bool),
    type(None): ("null", lambda x: x is None),
}


def type_faults(kind: Any, value: Any, name: str) -> Iterator[str]:
    """Where a value, a config or what `to_json` made of one, is not of the declared type."""
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if is_dataclass(outer) and isinstance(value, Mapping | outer):
        yield from _field_faults(kind, value, f"{name}.".lstrip("."))
    elif _choices(kind) and isinstance(value, (Mapping, *_choices(kind))):
        yield from type_faults(_nearest(kind, value), value, name)
    elif outer is tuple and _is_list(inner, value):
        each = inner[:1] * len(value) if inner[-1] is ... else inner
        for i, (part, x) in enumerate(zip(each, value)):
            yield from type_faults(part, x, f"{name}[{i}]")
    elif outer is Mapping and isinstance(value, Mapping):
        for key, x in value.items():
            yield from type_faults(inner[1], x, f"{name}[{files.shown(key)}]")
    elif not _is_plain(kind, value):
        yield f"{name or 'it'} is {files.shown(value)}, expected {_words(kind)}"


def _is_list(inner, value) -> bool:
    """True if a value may be a tuple of these types: a list of any or of the right length."""
    is_list = isinstance(value, list | tuple)
    return is_list and (inner[-1] is ... or len(inner) == len(value))


def _is_plain(kind, value) -> bool:
    """True if a value is of a type that is not made of named parts, or of one of several types."""
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer in (Union, UnionType):
        return any(not list(type_faults(one, value, "")) for one in inner)
    if outer is Literal:
        return any(type(value) is type(x) and value == x for x in inner)
    return kind in PLAIN and PLAIN[kind][1](value)


def _field_faults(kind, value: Any, path: str) -> Iterator[str]:
    """The faults of an object with the fields of a dataclass, or of the dataclass itself."""
    outer = get_origin(kind) or kind
    value = vars(value) if isinstance(value, outer) else value
    types = typing.get_type_hints(outer)
    given = dict(zip(getattr(outer, "__parameters__", ()), get_args(kind)))
    for name in value:
        if name not in types:
            yield unknown_field(str(name), list(types), path)
    for each in fields(outer):
        if each.name in value:
            own = types[each.name]
            yield from type_faults(given.get(own, own), value[each.name], f"{path}{each.name}")
        elif each.default is MISSING and each.default_factory is MISSING:
            yield f"{path}{each.name} is missing"


def _words(kind) -> str:
    """A type in words."""
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer in (Union, UnionType):
        return " or ".join(_words(one) for one in inner)
    if outer is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if outer is tuple:
        return "a list" if inner[-1] is ... else f"a list of {len(inner)}"
    return PLAIN[kind][0] if kind in PLAIN else "an object"


def unknown_field(name: str, known: Sequence[str], path: str = "") -> str:
    near = difflib.get_close_matches(name, known, 1, 0.4)
    hint = f'did you mean "{path}{near[0]}"?' if near else f"there are {', '.join(known)}"
    return f'no field "{path}{name}"; {hint}'
