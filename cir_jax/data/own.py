"""Data of one's own: training pairs, composed triplets and whole benchmarks from tables and pictures.

Every path is relative to the folder of its table and may not lead out of it, neither by `..` nor by
a link. Everything is read and checked when it is opened; pictures are only looked for, not decoded.
"""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cir_jax.data.benchmark import Benchmark, Made, numbered
from cir_jax.data.records import LISTS, Gallery, file_inside, near, open_gallery
from cir_jax.data.tables import TABLES, Row, read_table, refuse, relative, string, strings

SEPARATOR = "|"  # between the ids of a list in a cell of a CSV
COLUMNS = (
    "text",
    "image",
    "document",
    "reference",
    "subset",
    "id",
    "rule",
)  # of queries, all optional
VARIANT, SPLIT = "own", "all"  # of benchmarks of one's own, in results


# ---- training sets, as cir_jax.data.pipeline reads them ----


def pairs(root: str) -> list[dict]:
    """Captions and pictures: the columns `image` and `text` of a table.

    A picture with several captions has a row for each; they are all right for it (one `group`).

    Raises:
      FileNotFoundError: no such table.
      ValueError: a malformed table, missing columns, empty texts, pictures that are missing or lie
        outside the table's folder; the first five faults with their lines.
    """
    rows = _training_rows(root, ("image",))
    groups = numbered(row["image"] for row in rows)
    return [
        {"query": {"texts": (row["text"],)}, "item": {"image": row["image"]}, "group": group}
        for row, group in zip(rows, groups)
    ]


def triplets(root: str) -> list[dict]:
    """A picture, what is to change about it, and the picture that results.

    These are the columns `reference`, `text` and `target`; rows with one target are all right for
    it. Errors as for `pairs`.
    """
    rows = _training_rows(root, ("reference", "target"))
    groups = numbered(row["target"] for row in rows)
    return [
        {
            "query": {"image": row["reference"], "text": row["text"]},
            "item": {"image": row["target"]},
            "group": group,
        }
        for row, group in zip(rows, groups)
    ]


def captioned(root: str) -> Made:
    """The pictures of a gallery with their texts: tar shards as img2dataset makes them (CC3M, LAION), a folder of
    pictures with KEY.txt beside KEY.jpg, a list with `text`.

    An empty text stays so. Errors as for `open_gallery`; and ValueError, when it is read, for a picture without text.
    """
    gallery = open_gallery(root)

    def pair(row):
        item = gallery[row]
        if "text" not in item:
            raise ValueError(f"{item['id']!r} of {root} has no text, which training needs")
        return {"query": {"text": item["text"]}, "item": {"image": item["image"]}, "group": row}

    return Made(len(gallery), pair)


def _training_rows(root, pictures) -> list[dict[str, str]]:
    """`text` and the absolute paths of the columns `pictures`, by row."""
    file = Path(os.path.abspath(root))
    table, find = read_table(file), _finder(file.parent)
    _check_columns(file, table, (*pictures, "text"))

    def row(values):
        return {name: find(_needed(values, name)) for name in pictures} | {
            "text": _needed(values, "text")
        }

    return _each(f"{file} cannot be trained on", table, row)


def _check_columns(file, table: Sequence[Row], wanted, optional=()) -> None:
    """Refuse a table that lacks columns, or has one that looks like a misspelled one of `optional`."""
    if not table:
        raise ValueError(f"{file} has no rows; expected {', '.join(wanted)} in each")
    known = list(dict.fromkeys(name for row in table for name in row.values))
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ValueError(
            f"{file} has no column {', '.join(missing)}; it has {', '.join(known) or 'none'}, "
            f"expected {', '.join(wanted)}"
        )
    for name in set(known) - {*wanted, *optional}:
        for meant in difflib.get_close_matches(name.lower(), [*wanted, *optional], 1, 0.75):
            raise ValueError(
                f"{file} has a column {name}; if {meant} is meant, write it so, else give it another name"
            )


def _each(title: str, table: Sequence[Row], make: Callable[[dict], Any]) -> list:
    """What `make` makes of the values of each row; the rows at which it fails are one error."""
    made, faults = [], []
    for place, values in table:
        try:
            made.append(make(values))
        except ValueError as error:
            faults.append(f"{place}: {error}")
    refuse(title, faults)
    return made


def _cell(values: Mapping, name: str) -> str | None:
    try:
        return string(values.get(name))
    except ValueError as error:
        raise ValueError(f"`{name}` {error}") from None


def _needed(values: Mapping, name: str) -> str:
    found = _cell(values, name)
    if found is None:
        raise ValueError(f"`{name}` is empty")
    return found


def _finder(root: Path) -> Callable[[str], str]:
    """The function from paths relative to `root` to those of the files, which must be there."""
    found = {}

    def find(name):
        if name not in found:
            path = relative(name, root)
            if path is None:
                raise ValueError(
                    f"{name} leads out of {root}; put the table into a folder above the pictures"
                )
            file = file_inside(root, path)
            if not os.path.isfile(file):
                raise ValueError(f"there is no picture {file}{near(file)}")
            found[name] = str(file)
        return found[name]

    return find


# ---- benchmarks ----


class _Asked(NamedTuple):
    """A query and, as rows of the gallery, what belongs to it."""

    raw: dict[str, str]
    targets: list[int]
    reference: int
    subset: list[int]
    rule: str


def benchmark(folder: str) -> Benchmark:
    """The benchmark in a folder, whose name is the path as it is given.

    The folder holds `queries.jsonl`, `.csv` or `.parquet`, and as gallery a list (`gallery.txt`,
    `.jsonl`, `.csv`, `.parquet`) or, without one, a folder `gallery` of pictures. Columns of a query:
      text, image, document: what is asked, in the parts that the method takes; `image` is a path.
      reference: instead of `image`, the id of the gallery item whose picture is that of the query;
        it is no answer.
      targets: the ids of the right answers.
      subset: the ids of a closed group that `subset_recall@k` ranks; all queries have one, or none.
      id, rule: a name, by default the number of the row from 0 on; a label for tables by kind of
        query.
    Lists of ids are lists in JSON and parquet, and joined by `|` in a CSV.

    Raises:
      FileNotFoundError: no such folder, queries or gallery.
      ValueError: malformed tables, unknown ids, queries without targets or without anything to ask,
        missing pictures; the first five faults with their lines.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root} with queries and a gallery")
    gallery, file = _gallery(root), _only(root, "queries", TABLES)
    if file is None:
        raise FileNotFoundError(
            f"{root} has no queries; expected one of {_names('queries', TABLES)}"
        )
    table = read_table(file)
    _check_columns(file, table, ("targets",), COLUMNS)
    asked = _queries(file, table, gallery)
    return Benchmark(
        name=os.path.normpath(folder),
        variant=VARIANT,
        split=SPLIT,
        queries=[each.raw for each in asked],
        gallery=gallery,
        ids=gallery.ids,
        positives=[dict.fromkeys(each.targets, 1.0) for each in asked],
        **_where_any("exclude", [each.reference for each in asked], -1),
        **_where_any("rules", [each.rule for each in asked], ""),
        **_where_any("subset", [each.subset for each in asked], []),
        metrics=(*Benchmark.metrics, *["subset_recall@1"] * any(each.subset for each in asked)),
    )


def _where_any(field, values, nothing) -> dict[str, list]:
    """A field of the benchmark, if any query has a value for it."""
    return {field: values} if any(value != nothing for value in values) else {}


def _gallery(root) -> Gallery:
    """The gallery of a benchmark; the pictures that its list names are there."""
    file = _only(root, "gallery", LISTS)
    if file is None and not (root / "gallery").is_dir():
        raise FileNotFoundError(
            f"{root} has no gallery; expected a folder of pictures, gallery, or one of "
            f"{_names('gallery', LISTS)}"
        )
    gallery = open_gallery(file or root / "gallery")
    if file is not None:
        find, items = (
            _finder(root),
            [Row(repr(name), item) for name, item in zip(gallery.ids, gallery)],
        )
        _each(f"{file} cannot be searched", items, lambda item: find(item["image"]))
    return gallery


def _only(root, stem, suffixes) -> Path | None:
    """The file of that name with one of the suffixes."""
    found = [path for suffix in suffixes if (path := root / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"{root} has {names}; remove all but one")
    return found[0] if found else None


def _names(stem, suffixes) -> str:
    return ", ".join(f"{stem}{suffix}" for suffix in suffixes)


def _queries(file, table: Sequence[Row], gallery: Gallery) -> list[_Asked]:
    find, places = _finder(file.parent), {name: row for row, name in enumerate(gallery.ids)}
    separator = SEPARATOR if file.suffix.lower() == ".csv" else ""
    columns = {name for row in table for name in row.values if row.values[name] is not None}
    seen = set()

    def asked(values):
        rows = {
            name: _rows(values, name, places, separator)
            for name in ("targets", "subset", "reference")
        }
        reference = rows["reference"][0] if rows["reference"] else -1
        raw = {name: _cell(values, name) for name in ("text", "document", "image")}
        if raw["image"] and reference >= 0:
            raise ValueError("has `image` and `reference`; a query has one picture")
        raw["image"] = find(raw["image"]) if raw["image"] else None
        if reference >= 0:
            raw["image"] = gallery[reference]["image"]
        raw = {name: value for name, value in raw.items() if value is not None}
        _check_query(raw, rows, columns)
        raw["id"] = _cell(values, "id") or str(len(seen))
        if raw["id"] in seen:
            raise ValueError(f"the id {raw['id']!r} occurs twice")
        seen.add(raw["id"])
        rule = _cell(values, "rule") or ("other" if "rule" in columns else "")
        return _Asked(raw, rows["targets"], reference, rows["subset"], rule)

    return _each(f"{file} cannot be asked", table, asked)


def _rows(values, name, places, separator) -> list[int]:
    """The gallery rows of the ids in a cell; an id that is repeated counts once."""
    try:
        ids = strings(values.get(name), "" if name == "reference" else separator)
    except ValueError as error:
        raise ValueError(f"`{name}` {error}") from None
    unknown = [each for each in ids if each not in places]
    if unknown:
        known = ", ".join(map(repr, list(places)[:2]))
        raise ValueError(
            f"`{name}` names {unknown[0]!r}, which is not among the {len(places)} ids of the "
            f"gallery ({known} …)"
        )
    return list(dict.fromkeys(places[each] for each in ids))


def _check_query(raw, rows, columns) -> None:
    if not raw:
        raise ValueError("asks nothing; expected text, image, reference or document")
    if not rows["targets"]:
        raise ValueError("has no `targets`")
    if len(rows["reference"]) > 1:
        raise ValueError("has several references; expected one id")
    if set(rows["reference"]) & set(rows["targets"]):
        raise ValueError("has its `reference` among its `targets`")
    if "document" in columns and "document" not in raw:
        raise ValueError("has no `document`, which others have; measure the two kinds apart")
    if "subset" in columns and not set(rows["subset"]) & set(rows["targets"]):
        raise ValueError("has none of its `targets` in its `subset`, and there are subsets")
