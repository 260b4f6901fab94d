"""Data sets for training and benchmarks for evaluation, by name."""

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING

from cir_jax.data import emoji
from cir_jax.data.benchmark import Benchmark, Dataset

if TYPE_CHECKING:
    from cir_jax.config import Data

# name -> function(variant=, split=) of raw pairs {"query": …, "item": …, "group": int}
DATASETS: dict[str, Callable[..., Dataset]] = {
    "emoji-text": emoji.text_pairs,
    "emoji-composed": emoji.composed_pairs,
    "emoji-documents": emoji.document_pairs,
}

# name -> function(variant=, split=) of a Benchmark
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "emoji-text": emoji.text_benchmark,
    "emoji-composed": emoji.composed_benchmark,
    "emoji-documents": emoji.document_benchmark,
}


def training_set(data: "Data") -> Dataset:
    """The raw pairs that one entry of `Experiment.data` names.

    Raises:
      ValueError: an unknown name, variant or split; the message lists the known ones.
    """
    make = _known("data set", data.name, DATASETS)
    if data.root:
        raise ValueError(f"{data.name} is built in and has no root; found {data.root!r}")
    return make(variant=data.variant, split=data.split)


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


def _known(what, name, table):
    if name not in table:
        close = difflib.get_close_matches(name, table, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no {what} is named {name!r}; there are {', '.join(table)}{hint}")
    return table[name]
