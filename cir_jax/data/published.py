"""What the published data sets share: annotations are read and checked, pictures found, benchmarks and pairs made.

A data set is a folder, `root`, in the layout that its authors' code reads. Annotations are read when it is opened;
pictures are only looked for, a listing for each folder. Where some are missing, that is one error with their number,
or, under the flag `available` of a variant, what needs them is left out and the numbers are told on stderr.
"""

import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cir_jax import files
from cir_jax.data.benchmark import Benchmark, Made, numbered
from cir_jax.data.records import Gallery
from cir_jax.data.tables import read_text, refuse
from cir_jax.progress import printable

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
AVAILABLE = "available"  # the flag of every variant that leaves out what has no picture


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
      shape: a type; `[shape]`, a list of such; or `{key: shape}`, an object with at least these keys.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no JSON, or of another shape; the first five faults with their places.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; README.md says what the data set consists of"
        )
    value = files.read_json(path, list if isinstance(shape, list) else dict)
    check_shape(value, shape, path)
    return value


def check_shape(value: Any, shape: Any, path: Path) -> None:
    """ValueError if a value of a file is not of a shape (`read_json`)."""
    faults = [] if _fits(value, shape) else list(_shape_faults(value, shape))
    refuse(f"{path} has another form than the published file", faults)


def check_distinct(names: Sequence[str], path: Path) -> None:
    """ValueError if a file lists a name twice, or none."""
    again = [name for name, times in Counter(names).items() if times > 1]
    if again or not names:
        found = f"{again[0]!r} twice" if again else "nothing"
        raise ValueError(f"{path} lists {found}, expected different names")


def _fits(value, shape) -> bool:
    """True if there are no `_shape_faults`, quickly: files hold a million values."""
    if isinstance(shape, list):
        inner = shape[0]
        return type(value) is list and all(_fits(each, inner) for each in value)
    if isinstance(shape, dict):
        return type(value) is dict and all(
            key in value and _fits(value[key], inner) for key, inner in shape.items()
        )
    return type(value) is shape and not (shape is str and _NO_TEXT.search(value))


def _shape_faults(value, shape, place=""):
    kind = shape if isinstance(shape, type) else type(shape)
    if type(value) is not kind:
        yield f"{place or 'the file'} is {files.shown(value)}, expected {kind.__name__}"
    elif isinstance(shape, list):
        for number, each in enumerate(value):
            yield from _shape_faults(each, shape[0], f"{place}[{number}]")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if key in value:
                yield from _shape_faults(value[key], inner, f"{place}.{key}".lstrip("."))
            else:
                yield f"{place or 'the file'} has no {key!r}"
    elif kind is str and _NO_TEXT.search(value):
        yield f"{place} is {files.shown(value)}, which is no text"


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
        first = printable(f"{self.names[0]} in {part.root / wanted[self.names[0]][0]}")
        self.told = f"{len(self.names)} of {len(wanted)} {what} are missing (first: {first})"
        if AVAILABLE not in part.flags:
            raise FileNotFoundError(
                f"{part.title}: {self.told}; get them, or take the variant {part.variant}-{AVAILABLE}, which leaves "
                "out what needs them"
            )

    def tell(self, kept: int, rows: int, what: str) -> None:
        """Say how much is left of `rows` queries or pairs, if anything is missing; FileNotFoundError if nothing is."""
        self.counts["queries"] = rows - kept
        if not self.names:
            return
        if not kept:
            raise FileNotFoundError(f"{self.part.title}: {self.told}; no {what} are left")
        left = f"{self.part.title}: {self.told}; {rows - kept} of {rows} {what} are left out"
        print(left, file=sys.stderr)


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
    asked: Sequence[Asked],
    places: Mapping[str, Sequence[str]],
    metrics: tuple[str, ...],
    exclude: bool = False,
    pictures: Mapping[str, Any] | None = None,
) -> Benchmark:
    """The benchmark of a part whose gallery is `places` (as for `find`), in that order.

    Args:
      exclude: the reference of a query is no answer to it, and is taken out of its list.
      pictures: by id, where they are no files.

    Raises:
      FileNotFoundError: missing pictures, without the flag `available`.
      ValueError: ids that occur twice or that the gallery lacks.
    """
    _check_ids(part, asked, places)
    if pictures is None:
        pictures = find(part.root, places)
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


def _check_ids(part, asked, places):
    """Refuse annotations that contradict each other."""
    seen, faults = set(), []
    for one in asked:
        if one.id in seen:
            faults.append(f"the query {one.id!r} occurs twice")
        seen.add(one.id)
        named = [*one.targets, *([one.reference] if one.reference else ()), *one.subset]
        faults += [
            f"the query {one.id!r} names {name!r}, which the gallery lacks"
            for name in named
            if name not in places
        ]
    refuse(f"{part.title} contradicts itself", faults)


def _query(one: Asked, pictures):
    shown = {"image": pictures[one.reference]} if one.reference else {}
    return {**shown, **one.asks, "id": one.id}


class Pair(NamedTuple):
    """A training pair: one of the texts asks, with the reference if there is one, for the picture `target`."""

    texts: Sequence[str]
    target: str
    reference: str = ""


def pairs(part: Part, rows: Sequence[Pair], places: Mapping[str, Sequence[str]]) -> Made:
    """Raw pairs as `cir_jax.data.pipeline` reads them; rows with one target are all right for it (one `group`).

    Raises:
      FileNotFoundError: missing pictures, without the flag `available`.
      ValueError: pictures without a place.
    """
    used = dict.fromkeys(name for row in rows for name in (row.reference, row.target) if name)
    unknown = [name for name in used if name not in places]
    refuse(f"{part.title} contradicts itself", [f"no picture {name!r}" for name in unknown])
    needed = {name: places[name] for name in used}
    paths = find(part.root, needed)
    missing = Missing(part, needed, paths)
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
