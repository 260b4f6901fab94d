"""Experiments and evaluations as frozen dataclasses; a config file is a Python file that defines `config`.

Nothing here imports JAX, so that command lines answer quickly. Every field can be overridden on the command line
(`--optim.lr 1e-4`) and the whole is stored as JSON beside what it made.
"""

import difflib
import json
import os
import re
import runpy
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from cir_jax import files
from cir_jax.data.documents import BUILTIN, DocumentSpec

MethodConfig = TypeVar("MethodConfig")


@dataclass(frozen=True)
class Data:
    """One training set: a built-in one, or `pairs` or `triplets` in the table `root` (`cir_jax.data.own`).

    `weight` is its number of batches in each round over all training sets: every batch comes from one set only, so
    sets whose queries have different parts (text, picture and text) can train together. `block` consecutive rows of
    the set always share a batch: hard negatives for each other where the set puts what is alike together.
    """

    name: str
    root: str = ""
    variant: str = "both"
    split: str = "train"
    weight: int = 1
    block: int = 1


@dataclass(frozen=True)
class Optim:
    """AdamW. `frozen` are patterns over whole parameter paths (`text/.*`); frozen parameters keep no moments."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    clip_norm: float = 1.0
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Train:
    """Length and rhythm of a run, in steps.

    `batch_size` is the global batch over all processes and devices. `limit` takes only the first rows of each training
    set, for a quick try; 0 takes all.
    """

    steps: int
    batch_size: int
    seed: int = 0
    log_every: int = 10
    save_every: int = 200
    eval_every: int = 200
    augment: bool = True
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    limit: int = 0


@dataclass(frozen=True)
class Mesh:
    """How many ways parameters are split; devices left over split the batch."""

    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Experiment(Generic[MethodConfig]):
    """Everything a training run needs.

    `evals` are benchmarks as `name/variant/split`, or folders of one's own; the checkpoint with the best mean of `best` over them is kept.
    A re-ranker is measured on the 50 best candidates of the model `retriever`. `init` maps a parameter prefix to the
    checkpoint it starts from, the prefix "" being the whole model, or the path of one parameter to an `.npy` or
    `.npz` file (`cir_jax.warm_start`).
    """

    method: MethodConfig
    data: tuple[Data, ...]
    train: Train
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    init: Mapping[str, str] = field(default_factory=dict)
    evals: tuple[str, ...] = ()
    retriever: str = ""
    best: str = "recall@10"


def fine_tune(model: str, **changes) -> Experiment:
    """The experiment that trains a finished model further, on data of one's own.

    Method, preprocessing and vocabulary are the model's own, and training begins with its parameters. What is not given
    follows its recipe, where it has one, more carefully:
      lr: a tenth of the recipe's, without one 1e-5: what the model knows is to be bent, not replaced. The warm-up is a
        tenth of the steps, at most 100, because the optimizer knows nothing yet; then half a cosine down to zero.
      frozen, weight_decay: the recipe's. Frozen word vectors stay so, or words that the new data lacks would be left
        behind by those it has.
      augment: the recipe's, without one none: the changes are made for drawings on white, not for photographs.
      log_every, save_every, eval_every: twenty lines, ten measurements. best: "mrr", the steadiest on few queries.
      export_dtype: that of the model.

    Args:
      model: the name of a packaged model, or the folder of one that was trained or converted.
      changes: fields of `Experiment`, `Train`, `Optim` and `Mesh` by their own names. `data`, `steps` and `batch_size`
        are needed; a re-ranker with `evals` also needs its `retriever`.

    Raises:
      FileNotFoundError: no such model.
      ValueError: unknown fields, or needed ones that are missing.
    """
    method, manifest = _finished(model)
    parts = {"train": Train, "optim": Optim, "mesh": Mesh}
    part_of = {name: part for part, kind in parts.items() for name in kind.__dataclass_fields__}
    unknown = sorted(changes.keys() - part_of.keys() - Experiment.__dataclass_fields__.keys())
    missing = [] if "train" in changes else [n for n in ("steps", "batch_size") if n not in changes]
    missing += [] if "data" in changes else ["data"]
    if unknown or missing:
        known = ", ".join(sorted({*part_of, *Experiment.__dataclass_fields__}))
        raise ValueError(
            f"fine_tune: unknown {', '.join(unknown) or 'none'}, missing {', '.join(missing) or 'none'}; there are {known}"
        )
    recipe = manifest["about"].get("experiment", {})
    steps = changes["train"].steps if "train" in changes else changes["steps"]
    whole = {
        "train": Train(
            steps=steps,
            batch_size=changes.get("batch_size", 1),
            log_every=max(1, steps // 20),
            save_every=max(1, steps // 10),
            eval_every=max(1, steps // 10),
            augment=recipe.get("train", {}).get("augment", False),
            export_dtype=manifest["dtype"],
        ),
        "optim": _gentler(recipe.get("optim", {}), steps),
        "mesh": Mesh(),
        "method": method,
        "init": {"": model},
        "best": "mrr",
    } | {name: value for name, value in changes.items() if name not in part_of}
    for name, value in changes.items():
        if name in part_of:
            whole[part_of[name]] = replace(whole[part_of[name]], **{name: value})
    return Experiment(**whole)


def _finished(model: str):
    """(config with the checkpoint's own copy of the vocabulary, manifest) of a model, without its parameters."""
    from cir_jax import checkpoint, files
    from cir_jax.methods import METHODS
    from cir_jax.model import find_model

    folder = find_model(model)
    manifest = files.read_manifest(folder, "checkpoint")
    if manifest["method"] not in METHODS:
        raise ValueError(
            f"{folder} holds a model of method {manifest['method']!r}; this version knows {', '.join(METHODS)}"
        )
    method = from_json(METHODS[manifest["method"]][0], manifest["config"])
    return checkpoint._with_vocabulary(method, folder), manifest


def _gentler(recipe: Mapping, steps: int) -> Optim:
    """The optimizer to train a model further that a recipe, perhaps an unknown one, has made."""
    return Optim(
        lr=float(f"{recipe['lr'] / 10:.3g}") if "lr" in recipe else 1e-5,
        weight_decay=recipe.get("weight_decay", Optim.weight_decay),
        warmup=min(100, steps // 10),
        frozen=tuple(recipe.get("frozen", ())),
    )


@dataclass(frozen=True)
class Run:
    """One evaluation: who retrieves what, with which index, and who re-ranks its k best candidates.

    `benchmark` is `name/variant/split` of a built-in one, or a folder with queries and a gallery (`cir_jax.data.own`).
    `fusion` is the weight of stage 1's score in the second stage's order (`cir_jax.retrieval.rerank`); `documents` says
    where the entities and summaries of documents come from.
    """

    benchmark: str
    retriever: str
    index: Literal["exact", "scann"] = "exact"
    reranker: str | None = None
    k: int = 50
    fusion: float | None = None
    documents: DocumentSpec = BUILTIN

    def __post_init__(self):
        if self.k < 1 or not 0 <= (self.fusion or 0) <= 1:
            raise ValueError(
                f"k is {self.k} and fusion {self.fusion}; expected k from 1 on and fusion None or from 0 to 1"
            )


@dataclass(frozen=True)
class Evaluation:
    """A list of runs; `python -m cir_jax.eval` carries them out."""

    runs: tuple[Run, ...]


def config_folder() -> Path:
    """Where the packaged configs are: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def packaged_configs() -> list[str]:
    return sorted(path.stem for path in config_folder().glob("*.py"))


def find_config(name: str) -> Path:
    """The file of a config given as a path or as the name of a packaged one."""
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"there is no config file {path.absolute()}")
        return path
    packaged = config_folder() / f"{name}.py"
    if not packaged.is_file():
        raise FileNotFoundError(
            f"no packaged config is named {name!r}; there are {', '.join(packaged_configs())}, "
            f"or give the path of a .py file that defines `config`"
        )
    return packaged


def load_config(name: str, kind: type):
    """The `config` of a config file, checked to be of the expected kind (`Experiment` or `Evaluation`) and sound.

    ValueError, with the line where there is one, whatever is wrong with the file.
    """
    path = find_config(name)
    with files.explained(path, "read"):
        path.read_bytes()
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:
        raise ValueError(_place_and_reason(path, error)) from error
    if not isinstance(config, kind):
        found = "nothing of that name" if config is None else f"a {type(config).__name__}"
        raise ValueError(f"{path} must define `config = {kind.__name__}(…)`; it defines {found}")
    if faults := _value_faults(config):
        listed = "\n  ".join(faults)
        raise ValueError(f"{path} defines no sound {kind.__name__}:\n  {listed}")
    return config


def _value_faults(config) -> list[str]:
    """Fields whose values are not of the declared types: dataclasses do not look."""
    kind = type(config)
    if isinstance(config, Experiment):
        from cir_jax.methods import METHODS

        known = [method for method, _ in METHODS.values()]
        if type(config.method) not in known:
            found = f"config.method is a {type(config.method).__name__}"
            return [f"{found}, expected one of {', '.join(each.__name__ for each in known)}"]
        kind = Experiment[type(config.method)]
    return list(_faults(kind, config, "config"))


def _place_and_reason(path: Path, error: BaseException) -> str:
    """What a config file raised, with the line of the file, and for an unknown field the nearest known one."""
    frames = traceback.walk_tb(error.__traceback__)
    own = [(frame, line) for frame, line in frames if frame.f_code.co_filename == str(path)]
    line = own[-1][1] if own else getattr(error, "lineno", None)
    place = f"{path}, line {line}" if line else str(path)
    if isinstance(error, SystemExit):
        return f"{place}: the file ends the program; it must only define `config`"
    told = getattr(error, "msg", None) or error
    reason = str(told) if isinstance(error, ValueError) else f"{type(error).__name__}: {told}"
    unknown = re.match(
        r"(?:.*\.)?(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)
    )
    kind = own[-1][0].f_globals.get(unknown[1]) if unknown and own else None
    if is_dataclass(kind):
        reason = _unknown_field(unknown[2], [f.name for f in fields(kind)])
        return f"{place}: {unknown[1]} has {reason}"
    return f"{place}: {reason}"


def _unknown_field(name: str, known: Sequence[str], path: str = "") -> str:
    near = difflib.get_close_matches(name, known, 1, 0.4)
    hint = f'did you mean "{path}{near[0]}"?' if near else f"there are {', '.join(known)}"
    return f'no field "{path}{name}"; {hint}'


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

    faults = list(_faults(kind, value, ""))
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
    return min(_choices(kind), key=lambda one: len(list(_faults(one, value, ""))))


# What a value of a plain type may be: the words of the error, and whether a value is it.
PLAIN = {
    int: ("a whole number", lambda x: type(x) is int),
    float: ("a finite number", lambda x: type(x) in (int, float) and abs(x) < 1e300),
    str: ("text", lambda x: type(x) is str),
    bool: ("true or false", lambda x: type(x) is bool),
    type(None): ("null", lambda x: x is None),
}


def _faults(kind: Any, value: Any, name: str) -> Iterator[str]:
    """Where a value, a config or what `to_json` made of one, is not of the declared type."""
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if is_dataclass(outer) and isinstance(value, Mapping | outer):
        yield from _field_faults(kind, value, f"{name}.".lstrip("."))
    elif _choices(kind) and isinstance(value, (Mapping, *_choices(kind))):
        yield from _faults(_nearest(kind, value), value, name)
    elif outer is tuple and _is_list(inner, value):
        each = inner[:1] * len(value) if inner[-1] is ... else inner
        for i, (part, x) in enumerate(zip(each, value)):
            yield from _faults(part, x, f"{name}[{i}]")
    elif outer is Mapping and isinstance(value, Mapping):
        for key, x in value.items():
            yield from _faults(inner[1], x, f"{name}[{files.shown(key)}]")
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
        return any(not list(_faults(one, value, "")) for one in inner)
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
            yield _unknown_field(str(name), list(types), path)
    for each in fields(outer):
        if each.name in value:
            own = types[each.name]
            yield from _faults(given.get(own, own), value[each.name], f"{path}{each.name}")
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
