"""Data sets for training and benchmarks for evaluation, by name."""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cir_jax.data import (
    atomic,
    captions,
    circo,
    cirr,
    emoji,
    fashioniq,
    imagenet,
    lincir,
    openimages,
    own,
    packed,
)
from cir_jax.data.benchmark import Benchmark, Dataset, Made, limited
from cir_jax.data.records import open_gallery

if TYPE_CHECKING:
    from cir_jax.config import Data

# name -> function(variant=, split=) of raw pairs {"query": …, "item": …, "group": int}
DATASETS: dict[str, Callable[..., Dataset]] = {
    "emoji-text": emoji.text_pairs,
    "emoji-composed": emoji.composed_pairs,
    "emoji-documents": emoji.document_pairs,
}

# name -> function(root) of the same, from a table or a gallery of one's own
TABLES: dict[str, Callable[[str], Dataset]] = {
    "pairs": own.pairs,
    "triplets": own.triplets,
    "captioned": own.captioned,
    "captions": lincir.captions,
}

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
    "fashioniq": (("all/train",), ("dress/val", "shirt/val", "toptee/val")),
    "cirr": (("rc2/train",), ("rc2/val", "rc2/test1")),
    "circo": ((), ("coco/val", "coco/test")),
    "atomic": (("fields/train",), ("small/val", "small/test")),
    "coco-lxmert": (("mscoco/train+nominival",), ("mscoco/minival",)),
    "coco": (("karpathy/train",), ("karpathy/val", "karpathy/test")),
    "flickr30k": (("karpathy/train",), ("karpathy/val", "karpathy/test")),
    "cc3m": (("tsv/train",), ("tsv/val",)),
    "imagenet": (("blip/test",), ()),
    "openimages": ((), tuple(f"dialogues/{split}" for split in openimages.FILES)),
}
# What `python -m cir_jax.data` calls data of one's own beside `TABLES`.
FOLDERS = ("benchmark", "gallery")


class Published(NamedTuple):
    """A data set of others, read from its folder in the original layout (`cir_jax.data.published`).

    `pairs` and `benchmark` are functions (root, variant, split), None where it has none of that; an empty variant is
    the usual one. An approximate index is tuned on the queries of the split `tuning`.
    """

    pairs: Callable[[str, str, str], Dataset] | None
    benchmark: Callable[[str, str, str], Benchmark] | None
    tuning: str = "val"


PUBLISHED: dict[str, Published] = {
    "fashioniq": Published(fashioniq.pairs, fashioniq.benchmark),
    "cirr": Published(cirr.pairs, cirr.benchmark),
    "circo": Published(None, circo.benchmark),
    "atomic": Published(atomic.pairs, atomic.benchmark),
    "coco": Published(captions.coco_pairs, captions.coco_benchmark),
    "coco-lxmert": Published(captions.lxmert_pairs, captions.lxmert_benchmark, tuning=""),
    "flickr30k": Published(captions.flickr30k_pairs, captions.flickr30k_benchmark),
    "cc3m": Published(captions.cc3m_pairs, captions.cc3m_benchmark),
    "imagenet": Published(imagenet.pairs, None),
    "openimages": Published(None, openimages.benchmark, tuning=""),
}
# The environment variable of the folder that holds published data sets by name.
ROOTS = "CIR_JAX_DATA"


def training_set(data: "Data") -> Dataset:
    """The raw pairs that one entry of `Experiment.data` names.

    Raises:
      FileNotFoundError: a published data set that is not there, or lacks files.
      ValueError: an unknown name, variant or split; the message lists the known ones. A table of
        one's own without its path, or one that cannot be read (`cir_jax.data.own`).
    """
    found = _training_set(data)
    alone = lambda row: {part: x for part, x in found[row].items() if part != "group"}
    return found if data.grouped else Made(len(found), alone)


def _training_set(data: "Data") -> Dataset:
    trained = {name: each.pairs for name, each in PUBLISHED.items() if each.pairs}
    make = _known("data set", data.name, DATASETS | TABLES | trained)
    root = data.root or (_usual_root(data.name) if data.name in PUBLISHED else "")
    if root and packed.is_packed(root):
        part = (own.VARIANT, own.SPLIT) if data.name in TABLES else (data.variant, data.split)
        return packed.Packed(root).training(data.name, *part)
    if data.name in TABLES:
        return make(_table_of(data))
    if data.name in PUBLISHED:
        return make(root, data.variant, data.split)
    if data.root:
        raise ValueError(f"{data.name} is built in and has no root; found {data.root!r}")
    return make(**({"variant": data.variant} if data.variant else {}), split=data.split)


def _usual_root(name: str) -> str:
    """Where a published data set is if nothing else is said: `$CIR_JAX_DATA/NAME`, without that `data/NAME`."""
    return os.path.join(os.environ.get(ROOTS) or "data", name)


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


def open_benchmark(name: str, variant: str = "", split: str = "test", **options) -> Benchmark:
    """A benchmark; `open_benchmark(b.name, b.variant, b.split)` makes `b` again.

    Args:
      name: a key of `BENCHMARKS`; or of `PUBLISHED`, with or without a root, raw or packed: `cirr`, `cirr:FOLDER`.
      variant: for the emoji a drawing style, `noto` or `twemoji`, then flags: `noto-full`; empty for
        the usual one.
      split: `val` or `test`, or what a published set calls them.
      options: further arguments of a built-in benchmark, as `gallery="full"`.

    Raises:
      FileNotFoundError: a published data set that is not there, or lacks files.
      ValueError: an unknown name, variant or split; the message lists the known ones.
    """
    base, _, root = name.partition(":")
    asked = {base: each.benchmark for base, each in PUBLISHED.items() if each.benchmark}
    if base not in asked:
        options |= {"variant": variant} if variant else {}
        return _known("benchmark", name, BENCHMARKS | asked)(split=split, **options)
    root = root or _usual_root(base)
    if packed.is_packed(root):
        found = packed.Packed(root).benchmark(variant, split, of=base)
    else:
        found = asked[base](root, variant, split, **options)
    return dataclasses.replace(found, name=name)


def is_registered(name: str) -> bool:
    """True of a name, with or without a root, that `open_benchmark` knows; False of a folder of one's own."""
    base = name.partition(":")[0]
    return name in BENCHMARKS or (base in PUBLISHED and PUBLISHED[base].benchmark is not None)


def tuning_benchmark(name: str) -> str | None:
    """The benchmark with whose queries an index for another is tuned; None if it is that one, or there is none."""
    base, variant, split = benchmark_parts(name)
    if not is_registered(base):
        return None
    kind, _, root = base.partition(":")
    tuning = PUBLISHED[kind].tuning if kind in PUBLISHED else "val"
    if not tuning or tuning == split:
        return None
    root = root or (_usual_root(kind) if kind in PUBLISHED else "")
    if root and packed.is_packed(root):
        part = packed.Part("benchmark", _without_limit(variant)[0], tuning)
        if part not in packed.Packed(root).parts:
            return None
    return f"{base}/{variant}/{tuning}"


def named_benchmark(name: str) -> Benchmark:
    """The benchmark that a config names.

    Args:
      name: `name/variant/split` of a registered one, `name:root/variant/split` of a published one
        with its folder, or the folder of one's own (`own.benchmark`).
        A variant may end in `-first30` (`limited`); for a folder `FOLDER/own-first30/all` says so,
        which is what joining name, variant and split of its benchmark gives. Of a packed data set
        `PACKED/variant/split`, or its folder where it was packed from a folder.

    Raises:
      ValueError: neither; the message lists the known ones. And what these raise.
    """
    base, variant, split = benchmark_parts(name)
    full, first = _without_limit(variant)
    if not is_registered(base) and packed.is_packed(base):
        benchmark = packed.Packed(base).benchmark(full, split)
    else:
        benchmark = (
            open_benchmark(base, full, split) if is_registered(base) else own.benchmark(base)
        )
    return limited(benchmark, first) if first else benchmark


def limited_name(name: str, n: int) -> str:
    """The name of a benchmark limited to its first `n` queries."""
    base, variant, split = benchmark_parts(name)
    return f"{base}/{_without_limit(variant)[0]}-first{n}/{split}"


def benchmark_parts(name: str) -> tuple[str, str, str]:
    """(name, variant, split) of what a config calls a benchmark; a registered name wins over a folder."""
    base, *rest = name.rsplit("/", 2)
    if len(rest) == 2 and is_registered(base):
        return base, *rest
    if os.path.isdir(name):
        return os.path.normpath(name), own.VARIANT, own.SPLIT
    if len(rest) == 2 and packed.is_packed(base):
        return base, *rest
    if len(rest) == 2 and rest[1] == own.SPLIT and _without_limit(rest[0])[0] == own.VARIANT:
        return base, *rest
    known = [*BENCHMARKS, *(each for each in PUBLISHED if is_registered(each))]
    close = difflib.get_close_matches(re.split("[/:]", name)[0], known, 1)
    raise ValueError(
        f"there is no benchmark {name!r}; expected name/variant/split, as emoji-text/noto/test, with "
        f"one of {', '.join(known)}, or a folder with queries and a gallery"
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
      name: a registered or published data set or benchmark, a key of `TABLES`, or one of `FOLDERS`.
      root: the raw data, or a packed data set.
      training, benchmarks: which, as VARIANT/SPLIT; None for all that `PARTS` has, if both are None.

    Raises:
      ValueError: an unknown name, a missing root, a part that is not VARIANT/SPLIT, or none at all.
    """
    if root and packed.is_packed(root):
        found = packed.Packed(root)
        if name != found.name:
            raise ValueError(f"{root} holds {found.name}, expected {name}")
        return {part: functools.partial(found.open, part) for part in found.parts}
    _known("data set", name, dict.fromkeys((*DATASETS, *BENCHMARKS, *PUBLISHED, *TABLES, *FOLDERS)))
    if name in TABLES or name in FOLDERS:
        return {_own_part(name): functools.partial(_own, name, root)}
    if training is None and benchmarks is None:
        training, benchmarks = PARTS[name]
    training, benchmarks = training or (), benchmarks or ()
    asked = [("training", each) for each in training] + [("benchmark", each) for each in benchmarks]
    if not asked:
        raise ValueError(
            f"there is nothing of {name} to take; name it, as --training VARIANT/SPLIT or --benchmarks VARIANT/SPLIT"
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
