"""Experiments and evaluations as frozen dataclasses; a config file is a Python file that defines `config`.

Nothing here imports JAX, so that command lines answer quickly. Every field can be overridden on the command line
(`--optim.lr 1e-4`) and the whole is stored as JSON beside what it made.
"""

import json
import os
import runpy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

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
      log_every, save_every, eval_every: fifty lines, ten measurements. best: "mrr", the steadiest on few queries.
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
            log_every=max(1, steps // 50),
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
    """The `config` of a config file, checked to be of the expected kind (`Experiment` or `Evaluation`)."""
    path = find_config(name)
    config = runpy.run_path(str(path)).get("config")
    if not isinstance(config, kind):
        found = "nothing of that name" if config is None else f"a {type(config).__name__}"
        raise ValueError(f"{path} must define `config = {kind.__name__}(…)`; it defines {found}")
    return config


def to_json(config) -> Any:
    """A config as plain dictionaries and lists."""
    import cattrs

    return cattrs.Converter().unstructure(config)


def portable(config) -> Any:
    """`to_json` as it is stored: files of this package are named from `cir_jax/` on, wherever it is installed."""
    home = f"{Path(__file__).resolve().parent.parent}{os.sep}"
    return json.loads(json.dumps(to_json(config)).replace(json.dumps(home)[1:-1], ""))


def from_json(kind: type, value: Any):
    """The config of dataclass `kind` that `to_json` wrote; unknown, missing or mistyped fields are one error."""
    import cattrs
    from cattrs import transform_error

    try:
        return cattrs.Converter(forbid_extra_keys=True).structure(value, kind)
    except Exception as error:
        faults = "\n  ".join(transform_error(error, path=kind.__name__))
        raise ValueError(f"this is not a {kind.__name__} of this version:\n  {faults}") from None
