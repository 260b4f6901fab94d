"""Data sets for training and benchmarks for evaluation, by name."""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cir_jax.data import emoji, own, packed
from cir_jax.data.benchmark import Benchmark, Dataset, limited
from cir_jax.data.records import open_gallery

if TYPE_CHECKING:
    from cir_jax.config import Data

# name -> function(variant=, split=) of raw pairs {"query": …, "item": …, "group": int}
DATASETS: dict[str, Callable[..., Dataset]] = {
    "emoji-text": emoji.text_pairs,
    "emoji-composed": emoji.composed_pairs,
    "emoji-documents": emoji.document_pairs,
}

# name -> function(root) of the same, from a table of one's own
TABLES: dict[str, Callable[[str], Dataset]] = {"pairs": own.pairs, "triplets": own.triplets}

# name -> function(variant=, split=) of a Benchmark
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "emoji-text": emoji.text_benchmark,
    "emoji-composed": emoji.composed_benchmark,
    "emoji-documents": emoji.document_benchmark,
}

# name -> VARIANT/SPLIT of the training sets and of the benchmarks that `python -m cir_jax.data NAME` packs
_STYLES = [f"{style}/{split}" for style in emoji.STYLES for split in ("val", "test")]
PARTS = {
    "emoji-text": (("both/train",), _STYLES),
    "emoji-composed": (("both/train",), _STYLES),
    "emoji-documents": (("both/train",), _STYLES),
}
# What `python -m cir_jax.data` calls data of one's own beside `TABLES`.
FOLDERS = ("benchmark", "gallery")


def training_set(data: "Data") -> Dataset:
    """The raw pairs that one entry of `Experiment.data` names.

    Raises:
      ValueError: an unknown name, variant or split; the message lists the known ones. A table of
        one's own without its path, or one that cannot be read (`cir_jax.data.own`).
    """
    make = _known("data set", data.name, DATASETS | TABLES)
    if data.root and packed.is_packed(data.root):
        part = (own.VARIANT, own.SPLIT) if data.name in TABLES else (data.variant, data.split)
        return packed.Packed(data.root).training(data.name, *part)
    if data.name in TABLES:
        return make(_table_of(data))
    if data.root:
        raise ValueError(f"{data.name} is built in and has no root; found {data.root!r}")
    return make(variant=data.variant, split=data.split)


def _table_of(data) -> str:
    """The path of a table; it is all there is to choose."""
    if not data.root:
        raise ValueError(
            f"{data.name} needs a table; give its path, as "
            f'Data({data.name!r}, root="shop/train.csv")'
        )
    defaults = {field.name: field.default for field in dataclasses.fields(data)}
    for name in ("variant", "split"):
        # Ignored, they would promise a choice among rows that nobody makes.
        if getattr(data, name) != defaults[name]:
            raise ValueError(
                f"{data.root} is one set of {data.name} and has no {name} "
                f"{getattr(data, name)!r}; give each part a table of its own"
            )
    return data.root


def open_benchmark(name: str, variant: str = "noto", split: str = "test", **options) -> Benchmark:
    """A benchmark; `open_benchmark(b.name, b.variant, b.split)` makes `b` again.

    Args:
      name: a key of `BENCHMARKS`.
      variant: for the emoji a drawing style, `noto` or `twemoji`, then flags: `noto-full`.
      split: `val` or `test`.
      options: further arguments of that benchmark, as `gallery="full"`.

    Raises:
      ValueError: an unknown name, variant or split; the message lists the known ones.
    """
    return _known("benchmark", name, BENCHMARKS)(variant=variant, split=split, **options)


def named_benchmark(name: str) -> Benchmark:
    """The benchmark that a config names.

    Args:
      name: `name/variant/split` of a registered one, or the folder of one's own (`own.benchmark`).
        A variant may end in `-first30` (`limited`); for a folder `FOLDER/own-first30/all` says so,
        which is what joining name, variant and split of its benchmark gives. Of a packed data set
        `PACKED/variant/split`, or its folder where it was packed from a folder.

    Raises:
      ValueError: neither; the message lists the known ones. And what these raise.
    """
    base, variant, split = benchmark_parts(name)
    full, first = _without_limit(variant)
    if base not in BENCHMARKS and packed.is_packed(base):
        benchmark = packed.Packed(base).benchmark(full, split)
    else:
        benchmark = open_benchmark(base, full, split) if base in BENCHMARKS else own.benchmark(base)
    return limited(benchmark, first) if first else benchmark


def limited_name(name: str, n: int) -> str:
    """The name of a benchmark limited to its first `n` queries."""
    base, variant, split = benchmark_parts(name)
    return f"{base}/{_without_limit(variant)[0]}-first{n}/{split}"


def benchmark_parts(name: str) -> tuple[str, str, str]:
    """(name, variant, split) of what a config calls a benchmark; a registered name wins over a folder."""
    base, _, rest = name.partition("/")
    if base in BENCHMARKS and rest.count("/") == 1:
        return base, *rest.split("/")
    if os.path.isdir(name):
        return os.path.normpath(name), own.VARIANT, own.SPLIT
    base, *rest = name.rsplit("/", 2)
    if len(rest) == 2 and packed.is_packed(base):
        return base, *rest
    if len(rest) == 2 and rest[1] == own.SPLIT and _without_limit(rest[0])[0] == own.VARIANT:
        return base, *rest
    close = difflib.get_close_matches(name.partition("/")[0], BENCHMARKS, 1)
    raise ValueError(
        f"there is no benchmark {name!r}; expected name/variant/split, as emoji-text/noto/test, with "
        f"one of {', '.join(BENCHMARKS)}, or a folder with queries and a gallery"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def _without_limit(variant: str) -> tuple[str, int]:
    """`noto`, 30 of `noto-first30`; 0 where nothing is limited."""
    match = re.fullmatch(r"(.*)-first([1-9]\d*)", variant)
    return (match[1], int(match[2])) if match else (variant, 0)


def parts_of(
    name: str,
    root: str = "",
    training: Sequence[str] | None = None,
    benchmarks: Sequence[str] | None = None,
) -> dict[packed.Part, Callable]:
    """The parts of a data set, each with the function that opens it.

    Args:
      name: a registered data set or benchmark, a key of `TABLES`, or one of `FOLDERS`.
      root: the raw data, or a packed data set.
      training, benchmarks: which, as VARIANT/SPLIT; None for all that `PARTS` has.

    Raises:
      ValueError: an unknown name, a missing root, a part that is not VARIANT/SPLIT, or none at all.
    """
    if root and packed.is_packed(root):
        found = packed.Packed(root)
        return {part: functools.partial(found.open, part) for part in found.parts}
    _known("data set", name, dict.fromkeys((*DATASETS, *BENCHMARKS, *TABLES, *FOLDERS)))
    if name in TABLES or name in FOLDERS:
        return {_own_part(name): functools.partial(_own, name, root)}
    usual = PARTS.get(name, ((), ()))
    training = usual[0] if training is None else training
    benchmarks = usual[1] if benchmarks is None else benchmarks
    asked = [("training", each) for each in training] + [("benchmark", each) for each in benchmarks]
    if not asked:
        raise ValueError(
            f"{name} has no usual parts; name what to take, as --training VARIANT/SPLIT or --benchmarks VARIANT/SPLIT"
        )
    for _, each in asked:
        if each.count("/") != 1:
            raise ValueError(f"a part is {each!r}; expected VARIANT/SPLIT, as noto/test")
    parts = [packed.Part(kind, *each.split("/")) for kind, each in asked]
    return {part: functools.partial(_registered, name, root, part) for part in parts}


def _own_part(name) -> packed.Part:
    kind = name if name in FOLDERS else "training"
    return packed.Part(kind, own.VARIANT, own.SPLIT)


def _own(name, root):
    if not root:
        raise ValueError(f"{name} needs a root; `python -m cir_jax.data --help` says which")
    opener = {**TABLES, "benchmark": named_benchmark, "gallery": open_gallery}[name]
    return opener(root)


def _registered(name, root, part):
    from cir_jax.config import Data

    if part.kind == "training":
        return training_set(Data(name, root=root, variant=part.variant, split=part.split))
    return named_benchmark(f"{name}{f':{root}' if root else ''}/{part.variant}/{part.split}")


def _known(what, name, table):
    if name not in table:
        close = difflib.get_close_matches(name, table, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no {what} is named {name!r}; there are {', '.join(table)}{hint}")
    return table[name]
