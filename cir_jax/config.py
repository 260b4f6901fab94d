"""Experiments and evaluations as frozen dataclasses; a config file is a Python file that defines `config`.

Nothing here imports JAX, so that command lines answer quickly. Every field can be overridden on the command line
(`--optim.lr 1e-4`) and the whole is stored as JSON (`cir_jax.typed`) beside what it made.
"""

import re
import runpy
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from cir_jax import files
from cir_jax.data.documents import BUILTIN, DocumentSpec
from cir_jax.typed import type_faults, unknown_field

MethodConfig = TypeVar("MethodConfig")


@dataclass(frozen=True)
class Data:
    """One training set: built in, published in the folder `root`, `pairs` or `triplets` in the table `root`, or
    `captioned` pictures of the gallery `root`, or `captions` without pictures in the table `root`.

    `cir_jax.data` has the names; of published sets, `root` may be left out where `$CIR_JAX_DATA/NAME` or `data/NAME` is
    it. An empty `variant` is the usual one.
    `weight` is its number of batches in each round over all training sets: every batch comes from one set only, so
    sets whose queries have different parts (text, picture and text) can train together. `block` consecutive rows of
    the set always share a batch: hard negatives for each other where the set puts what is alike together.
    Rows with one target are right answers for each other; without `grouped` wrong ones, as in most papers.
    """

    name: str
    root: str = ""
    variant: str = ""
    split: str = "train"
    weight: int = 1
    block: int = 1
    grouped: bool = True


@dataclass(frozen=True)
class Optim:
    """AdamW; with `weight_decay` 0 it is Adam. Lengths are in steps, numbered from 0.

    Attributes:
      lr: the learning rate after the warm-up.
      weight_decay: decoupled: a step takes `lr * weight_decay` of a parameter away.
      betas: decay of the means of gradients and of their squares.
      epsilon: added to the root of the latter.
      warmup: the rate first rises in a straight line over so many steps.
      warmup_includes: both ends of that line are no step of it: with "zero" its steps have the rates 0, 1/W, … (W-1)/W of
        `lr` (Hugging Face), with "peak" 1/W, … 1 (open_clip), with "both" 0, 1/(W-1), … 1 (BEiT-3).
      schedule: how the rate falls from `lr` to `min_lr` after the warm-up; "constant" keeps `lr`.
      min_lr: the rate at the end.
      period: steps from `lr` to `min_lr`; 0 for all that follow the warm-up. A run that goes on after a shorter
        period sees a cosine rise again.
      hold: so many steps in a row have the rate of their first: those of an epoch, where it is set once an epoch.
      drops: from each of these steps on, the rate is multiplied by `drop_factor`.
      drop_factor: see `drops`.
      clip_norm: longest gradient, over all trained parameters together; None does not clip.
      decay: what `weight_decay` shrinks: "matrices" spares vectors (biases, norms, class tokens) and scalars.
      undecayed: patterns over whole parameter paths that `decay` spares too.
      layer_decay: factor of the rate from each block to the one before: the last block learns at `layer_decay` times
        the rate of the head, the first of L at its L-th power, embeddings and positions at the (L + 1)-th.
      frozen: patterns over whole parameter paths (`text/.*`); frozen parameters keep no moments.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-8
    warmup: int = 0
    warmup_includes: Literal["zero", "peak", "both"] = "zero"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr: float = 0.0
    period: int = 0
    hold: int = 1
    drops: tuple[int, ...] = ()
    drop_factor: float = 0.1
    clip_norm: float | None = 1.0
    decay: Literal["matrices", "all"] = "matrices"
    undecayed: tuple[str, ...] = ()
    layer_decay: float = 1.0
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Train:
    """Length and rhythm of a run, in steps.

    `batch_size` is the global batch over all processes and devices. `limit` takes only the first rows of each training
    set, for a quick try; 0 takes all. `workers` are the processes that prepare examples for each training set, each with
    a copy of it; 0 prepares in threads of this process, which is as fast until its Python is what takes longest.
    The last `keep` checkpoints are kept, beside the best model. An example that cannot be read (a damaged picture) is
    replaced by another of its set, listed, and counted; the run ends when they are more than the share `unreadable` of
    a set, with 0 at the first.

    Pictures: `augment` scales, shifts, turns and tints them a little, as befits drawings on white, and leaves words out of
    offered wordings; `crop` shows a random part, of a share of the area between its two numbers and an aspect ratio of
    3:4 to 4:3, instead of the part that is always shown later (torchvision's `RandomResizedCrop`); `mirror` every
    other one the other way round.
    Order: batches run across the ends of epochs, or with `drop_last` each epoch ends with its last whole batch. Without
    `reshuffle` every epoch repeats the order of the first; with `drop_last` too, its batches.

    Three ways to a batch that does not fit. With `chunks` the encoders see that many parts of the batch, one after the
    other, and again on the way back: the same loss and gradient for a third more work (gradient caching). With `ring`
    contrastive losses hold the scores of a pair of devices instead of all with all: the same loss, of use from about
    ten thousand rows on. With `accumulate` the gradient is the mean over that many micro-batches, each with negatives
    of its own only: another, easier loss.
    """

    steps: int
    batch_size: int
    seed: int = 0
    log_every: int = 10
    save_every: int = 200
    eval_every: int = 200
    augment: bool = True
    crop: tuple[float, float] | None = None
    mirror: bool = False
    drop_last: bool = False
    reshuffle: bool = True
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    limit: int = 0
    workers: int = 0
    keep: int = 2
    unreadable: float = 0.01
    chunks: int = 1
    ring: bool = False
    accumulate: int = 1


@dataclass(frozen=True)
class Mesh:
    """How many ways parameters are split; devices left over split the batch."""

    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Experiment(Generic[MethodConfig]):
    """Everything a training run needs.

    `evals` are benchmarks as in `Run`; the checkpoint with the best mean of `best` over them is kept.
    A re-ranker is measured on the `k` best candidates of the model `retriever`. `init` maps a parameter prefix to the
    checkpoint, or part of one, it starts from, the prefix "" being the whole model, or the path of one parameter to an
    `.npy` or `.npz` file (`cir_jax.training.warm_start`).
    """

    method: MethodConfig
    data: tuple[Data, ...]
    train: Train
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    init: Mapping[str, str] = field(default_factory=dict)
    evals: tuple[str, ...] = ()
    retriever: str = ""
    k: int = 50
    best: str = "recall@10"


@dataclass(frozen=True)
class Run:
    """One evaluation: who retrieves what, with which index, and who re-ranks its k best candidates.

    `benchmark` is `name/variant/split` of a built-in or published one, `name:root/variant/split` of a published one in the
    folder `root`, or a folder with queries and a gallery (`cir_jax.data.own`).
    `fusion` is the weight of stage 1's score in the second stage's order (`cir_jax.retrieval.rerank`); `documents` says
    where the entities and summaries of documents come from. With `asks`, queries of a picture and a text ask with one
    of them alone (`cir_jax.evaluation.audit`), which with CLIP are the baselines that papers print: text only, picture only, and
    with "all" the sum of both unit vectors.
    In the place of a retriever, `candidates` is a file of lists that a first stage found (`cir_jax.evaluation.candidates`): ours, or
    the `.pt` of Candidate-Reranking; `{variant}` in its name stands for FashionIQ's category. `restricted` ends the second stage's lists after the k candidates, as the numbers of
    Candidate-Reranking and CFIR do; without it the rest of the first stage's follows. `lists` writes large files too:
    candidates, FashionIQ's predictions, TREC runs (`cir_jax.evaluation.submissions`).
    """

    benchmark: str
    retriever: str = ""
    index: Literal["exact", "scann"] = "exact"
    reranker: str | None = None
    k: int = 50
    fusion: float | None = None
    documents: DocumentSpec = BUILTIN
    asks: Literal["all", "text", "image"] = "all"
    candidates: str | None = None
    restricted: bool = False
    lists: bool = False

    def __post_init__(self):
        if bool(self.retriever) == bool(self.candidates):
            raise ValueError(
                f"retriever is {self.retriever!r} and candidates {self.candidates!r}; a run needs one of both"
            )
        if self.candidates and (self.index != "exact" or self.asks != "all"):
            raise ValueError(
                f"index is {self.index!r} and asks {self.asks!r} with given candidates; both belong to a retriever"
            )
        if self.restricted and self.reranker is None:
            raise ValueError("restricted without a reranker; it is about the second stage's lists")
        if self.fusion is not None and self.reranker is None:
            raise ValueError(f"fusion is {self.fusion} without a reranker; it weighs two stages")
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
    with files.reported(path, "read"):
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
    return list(type_faults(kind, config, "config"))


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
        reason = unknown_field(unknown[2], [f.name for f in fields(kind)])
        return f"{place}: {unknown[1]} has {reason}"
    return f"{place}: {reason}"
