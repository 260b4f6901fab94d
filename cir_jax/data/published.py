"""What the published data sets share: annotations are read and checked, pictures found, benchmarks and pairs made.

A data set is a folder, `root`, in the layout that its authors' code reads. Annotations are read when it is opened;
pictures are only looked for, a listing for each folder. Where some are missing, that is one error with their number,
or, under the flag `available` of a variant, what needs them is left out and the numbers are told on stderr. Where faults
are collected (`tables.collected`) every one is named; and in `taken_as_there` pictures are not asked for.
"""

import contextlib
import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cir_jax import files
from cir_jax.data.benchmark import Benchmark, Made, numbered
from cir_jax.data.records import Gallery, by_stem, near
from cir_jax.data.tables import collects, read_text, refuse
from cir_jax.progress import printable

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
AVAILABLE = "available"  # the flag of every variant that leaves out what has no picture

_absent: ContextVar[list[str] | None] = ContextVar(
    "what is absent and taken to be there", default=None
)


@dataclass(frozen=True)
class Part:
    """A part of a data set, and where it lies; as text, what benchmarks and galleries are called."""

    name: str
    root: Path
    variant: str
    split: str
    kind: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}:{self.root}/{self.variant}/{self.split}"

    @property
    def title(self) -> str:
        """The name for messages."""
        return printable(str(self))


def part(
    name: str,
    root: str | os.PathLike,
    variant: str,
    split: str,
    kinds: Sequence[str],
    splits: Sequence[str],
    flags: Sequence[str] = (),
) -> Part:
    """The part that a variant (`KIND-FLAG-FLAG`) and a split name; an empty variant is the first kind.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: an unknown kind, flag or split; the message lists the known ones.
    """
    place = Path(os.path.abspath(files.local_path(root)))
    variant = variant or kinds[0]
    kind = next((k for k in kinds if variant == k or variant.startswith(f"{k}-")), None)
    given = variant[len(kind or "") + 1 :].split("-") if variant != kind else []
    known = (*flags, AVAILABLE)
    if kind is None or not set(given) <= set(known):
        raise ValueError(
            f"{name} has no variant {variant!r}; expected {' or '.join(kinds)}, then any of "
            f"{', '.join(f'-{flag}' for flag in known)}"
        )
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; there are {', '.join(splits)}")
    if not place.is_dir():
        raise FileNotFoundError(
            f"there is no folder {place} with {name}; say where it is, as {name}:FOLDER/{variant}/"
            f'{split} or Data("{name}", root="FOLDER")'
        )
    return Part(name, place, variant, split, kind, tuple(given))


# ---- annotations ----


def read_json(path: Path, shape: Any) -> Any:
    """The value in a JSON file, which has a shape.

    Args:
      shape: a type; `[shape]`, a list of such; `{key: shape}`, an object with at least these keys; or `{str: shape}`,
        an object of such values with different names.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no JSON, nothing in it, or of another shape; the first five faults with their places.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; cir_jax/data/README.md says what the data set consists of"
        )
    kind = list if isinstance(shape, list) else dict
    value = files.read_json(path, kind, distinct=kind is dict and str in shape)
    if not value:
        raise ValueError(f"{path} is empty, expected what the published file has")
    return fitting(value, shape, path)


def fitting(value: Any, shape: Any, path: Path) -> Any:
    """A value of a file, if it is of a shape (`read_json`); while faults are collected without what does not fit.

    Raises:
      ValueError: another shape.
    """
    if _fits(value, shape):
        return value
    faults = list(_shape_faults(value, shape))
    refuse(f"{path} has another form than the published file", faults, path)
    value = _pruned(value, shape)
    if not value or not _fits(value, shape):
        raise ValueError(f"{path} has nothing else")
    return value


def distinct(names: Sequence[str], path: Path) -> list[str]:
    """The names that a file lists; ValueError if one is there twice, or none at all."""
    if not names:
        raise ValueError(f"{path} lists nothing, expected different names")
    again = [name for name, times in Counter(names).items() if times > 1]
    title = f"{path} lists names more than once, expected different ones"
    refuse(title, [f"{name!r} is listed twice" for name in again], path)
    return list(dict.fromkeys(names))


def _fits(value, shape) -> bool:
    """True if there are no `_shape_faults`, quickly: files hold a million values."""
    if type(shape) is type:
        return type(value) is shape and not (shape is str and _NO_TEXT.search(value))
    if isinstance(shape, list):
        inner = shape[0]
        return type(value) is list and all(_fits(each, inner) for each in value)
    if str in shape:
        return type(value) is dict and all(
            _fits(key, str) and _fits(each, shape[str]) for key, each in value.items()
        )
    return type(value) is dict and all(
        key in value and _fits(value[key], inner) for key, inner in shape.items()
    )


def _shape_faults(value, shape, place=""):
    kind = shape if isinstance(shape, type) else type(shape)
    if type(value) is not kind:
        yield f"{place or 'the file'} is {files.shown(value)}, expected {kind.__name__}"
    elif isinstance(shape, list):
        for number, each in enumerate(value):
            yield from _shape_faults(each, shape[0], f"{place}[{number}]")
    elif isinstance(shape, dict) and str in shape:
        for key, each in value.items():
            yield from _shape_faults(key, str, f"the name {files.shown(key)}")
            yield from _shape_faults(each, shape[str], f"{place}[{files.shown(key)}]")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if key in value:
                yield from _shape_faults(value[key], inner, f"{place}.{key}".lstrip("."))
            else:
                yield f"{place or 'the file'} has no {key!r}"
    elif kind is str and _NO_TEXT.search(value):
        yield f"{place} is {files.shown(value)}, which is no text"


def _pruned(value, shape):
    """What is left of a value without the entries of lists and objects that do not fit."""
    if isinstance(shape, list) and type(value) is list:
        return [each for each in value if _fits(each, shape[0])]
    if not isinstance(shape, dict) or type(value) is not dict:
        return value
    if str in shape:
        return {k: x for k, x in value.items() if _fits(k, str) and _fits(x, shape[str])}
    return value | {key: _pruned(value[key], shape[key]) for key in shape.keys() & value.keys()}


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, without their ends."""
    return [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]


# ---- pictures ----


def find(root: Path, places: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The paths of the pictures that are there, by id.

    Args:
      places: for each id the paths below `root` where the picture may lie; the first that is there counts.

    Raises:
      ValueError: a path that leads out of `root`; a link to a file elsewhere.
    """
    names_in, found = functools.cache(lambda folder: listing(root, folder)), {}
    for name, paths in places.items():
        for path in paths:
            folder, _, file = path.removeprefix("./").rpartition("/")
            if path.startswith("/") or ".." in path.split("/") or "\0" in path:
                raise ValueError(f"the picture {name!r} leads out of {root}: {path!r}; refused")
            if file in names_in(folder):
                found[name] = f"{root}/{folder}/{file}" if folder else f"{root}/{file}"
                break
    return found


def listing(root: Path, folder: str) -> frozenset[str]:
    """The names of the files in a folder below `root`; none if there is no such folder.

    The folder may be a link, as of pictures on another disk; a file may be one only within the data set.
    """
    place, names = root / folder, []
    if not place.is_dir():
        return frozenset()
    inside = [os.path.realpath(root), os.path.realpath(place)]
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                if not any(target.is_relative_to(each) for each in inside):
                    raise ValueError(
                        f"{entry.path} leads out of {root}, to {target}; copy the file there"
                    )
            if entry.is_file():
                names.append(entry.name)
    return frozenset(names)


@contextlib.contextmanager
def taken_as_there() -> Iterator[list[str]]:
    """A list that takes what is said of missing pictures within the block; they are taken to be there, to be counted."""
    told: list[str] = []
    token = _absent.set(told)
    try:
        yield told
    finally:
        _absent.reset(token)


class Missing:
    """What an opened part lacks: refused, or counted and told.

    Args:
      wanted: for each id the places where it was looked for.
      found: the ids that are there.
    """

    counts: dict[str, int]  # of what is missing, and of the queries or pairs left out for it

    def __init__(
        self,
        part: Part,
        wanted: Mapping[str, Sequence[str]],
        found: Container[str],
        what: str = "pictures",
    ):
        self.part = part
        self.names = [name for name in wanted if name not in found]
        self.counts = {"pictures": len(self.names), "queries": 0}
        if not self.names:
            return
        where = lambda name: f"{part.root / wanted[name][0]}{self._near(wanted[name])}"
        first = printable(f"{self.names[0]} in {where(self.names[0])}")
        self.told = f"{len(self.names)} of {len(wanted)} {what} are missing (first: {first})"
        if (absent := _absent.get()) is not None:
            absent.append(self.told)
        elif AVAILABLE not in part.flags:
            # All of them are one fault: a folder that is not there, or has another name.
            some = self.names if len(self.names) < len(wanted) else ()
            faults = [f"{what}: there is no {name} in {where(name)}" for name in some]
            if not (some and collects(faults)):
                raise FileNotFoundError(
                    f"{part.title}: {self.told}; get them, or take the variant {part.variant}-{AVAILABLE}, which leaves "
                    "out what needs them"
                )
            self.told = f"{what} are missing"  # each is named already

    def tell(self, kept: int, rows: int, what: str) -> None:
        """Say how much is left of `rows` queries or pairs, if anything is missing; FileNotFoundError if nothing is."""
        self.counts["queries"] = rows - kept
        if not self.names or _absent.get() is not None:
            return
        if not kept:
            raise FileNotFoundError(f"{self.part.title}: {self.told}; no {what} are left")
        left = f"{self.part.title}: {self.told}; {rows - kept} of {rows} {what} are left out"
        if AVAILABLE in self.part.flags:
            print(left, file=sys.stderr)

    @functools.cached_property
    def _names_in(self):
        return functools.cache(by_stem)

    def _near(self, places: Sequence[str]) -> str:
        """What there is instead, in any of the places."""
        said = (near(self.part.root / place, self._names_in) for place in places)
        return next(filter(None, said), "")


def present(part: Part, places: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], Missing]:
    """The paths of pictures by id (`find`), and what is missing."""
    found = find(part.root, places)
    missing = Missing(part, places, found)
    if _absent.get() is not None:
        found |= {name: f"{part.root}/{places[name][0]}" for name in missing.names}
    return found, missing


# ---- benchmarks and training sets ----


class Asked(NamedTuple):
    """A query, and the ids of what belongs to it.

    `asks` are the parts of the raw query, without picture and id; `targets` are graded, above 0, and none where they are not published; `reference` is the picture that the query
    shows, "" for none; `rules` are the kinds of query it is of.
    """

    id: str
    asks: Mapping[str, Any]
    targets: Mapping[str, float]
    reference: str = ""
    subset: Sequence[str] = ()
    rules: Sequence[str] = ()


def benchmark(
    part: Part,
    file: Path,
    asked: Sequence[Asked],
    places: Mapping[str, Sequence[str]],
    metrics: tuple[str, ...],
    exclude: bool = False,
    pictures: Mapping[str, Any] | None = None,
    files: Sequence[Path] = (),
) -> Benchmark:
    """The benchmark of a part whose gallery is `places` (as for `find`), in that order.

    Args:
      file: of the annotations, for messages.
      exclude: the reference of a query is no answer to it, and is taken out of its list.
      pictures: by id, where they are no files; `files` hold them.

    Raises:
      FileNotFoundError: missing pictures, without the flag `available`.
      ValueError: ids that occur twice or that the gallery lacks.
    """
    asked = _consistent(part, file, asked, places)
    if pictures is None:
        pictures, missing = present(part, places)
    else:
        missing = Missing(part, places, pictures)
    ids = [name for name in places if name in pictures]
    rows = {name: row for row, name in enumerate(ids)}
    kept = [
        one
        for one in asked
        if (not one.reference or one.reference in rows) and _answerable(one, rows)
    ]
    missing.tell(len(kept), len(asked), "queries")
    subsets = [[rows[name] for name in one.subset if name in rows] for one in kept]
    return Benchmark(
        name=part.name,
        variant=part.variant,
        split=part.split,
        queries=Made(len(kept), lambda row: _query(kept[row], pictures)),
        gallery=Gallery(
            ids,
            {"kind": "benchmark", "name": str(part)},
            lambda row: {"image": pictures[ids[row]]},
            list(map(str, files)),
        ),
        ids=ids,
        positives=[
            {rows[name]: grade for name, grade in one.targets.items() if name in rows}
            for one in kept
        ],
        exclude=[rows[one.reference] for one in kept] if exclude else (),
        subset=subsets if any(subsets) else (),
        rules=[tuple(one.rules) for one in kept] if any(one.rules for one in kept) else (),
        metrics=metrics,
        missing=missing.counts,
    )


def _answerable(one: Asked, there) -> bool:
    """True if one of the best targets is there, or none is published."""
    best = max(one.targets.values(), default=0)
    return not one.targets or any(
        name in there for name, grade in one.targets.items() if grade == best
    )


def _consistent(part, file, asked, places) -> list[Asked]:
    """The queries, which must have different ids and name pictures of the gallery."""
    kept, faults = {}, []
    for one in asked:
        named = [*one.targets, *([one.reference] if one.reference else ()), *one.subset]
        found = [
            f"the query {one.id!r} names {name!r}, which the gallery lacks"
            for name in dict.fromkeys(named)
            if name not in places
        ]
        found += [f"the query {one.id!r} occurs twice"] * (one.id in kept)
        if not found:
            kept[one.id] = one
        faults += found
    refuse(f"{part.title} contradicts itself", faults, file)
    return list(kept.values())


def _query(one: Asked, pictures):
    shown = {"image": pictures[one.reference]} if one.reference else {}
    return {**shown, **one.asks, "id": one.id}


class Pair(NamedTuple):
    """A training pair: one of the texts asks, with the reference if there is one, for the picture `target`."""

    texts: Sequence[str]
    target: str
    reference: str = ""


def pairs(
    part: Part, file: Path, rows: Sequence[Pair], places: Mapping[str, Sequence[str]]
) -> Made:
    """Raw pairs as `cir_jax.data.pipeline` reads them; rows with one target are all right for it (one `group`).

    Args:
      file: of the annotations, for messages.

    Raises:
      FileNotFoundError: missing pictures, without the flag `available`.
      ValueError: no pairs; pictures without a place.
    """
    if not rows:
        raise ValueError(f"{file} has nothing for {part.title}")
    used = dict.fromkeys(name for row in rows for name in (row.reference, row.target) if name)
    unknown = [f"there is no picture {name!r} in the list" for name in used if name not in places]
    refuse(f"{part.title} contradicts itself", unknown, file)
    needed = {name: places[name] for name in used if name in places}
    paths, missing = present(part, needed)
    kept = [
        row for row in rows if row.target in paths and (not row.reference or row.reference in paths)
    ]
    missing.tell(len(kept), len(rows), "pairs")
    numbers = numbered(row.target for row in kept)
    return Made(len(kept), lambda row: _pair(kept[row], paths, numbers[row]))


def _pair(row: Pair, paths, group):
    query = {"texts": tuple(row.texts)} if len(row.texts) > 1 else {"text": row.texts[0]}
    if row.reference:
        query = {"image": paths[row.reference], **query}
    return {"query": query, "item": {"image": paths[row.target]}, "group": group}
