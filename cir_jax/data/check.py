"""Everything that is missing or wrong in a data set, in one report."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cir_jax.commands import reason
from cir_jax.data.benchmark import Benchmark, Dataset
from cir_jax.data.images import open_image
from cir_jax.data.packed import Part
from cir_jax.data.records import Gallery, by_stem, near
from cir_jax.data.tables import collected
from cir_jax.progress import progress

CHUNK = 256  # pictures that are in memory at once

Opener = Callable[[], Dataset | Benchmark | Gallery]


@dataclass
class Report:
    """What a check has found.

    `faults` make results wrong or impossible; `notes` may be meant: two items of a gallery with one picture.
    """

    rows: int = 0
    pictures: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [*(f"fault: {x}" for x in self.faults), *(f"note: {x}" for x in self.notes)]
        counts = f"{self.rows} rows, {self.pictures} different pictures"
        return "\n".join([*lines, f"{counts}: {len(self.faults)} faults, {len(self.notes)} notes"])


def check(parts: Mapping[Part, Opener]) -> Report:
    """Open every part, read every row and decode every picture; go on behind each fault.

    Faults are those of annotations (as the readers name them), pictures that a published set lacks, an empty part, an id that two rows of a gallery share,
    rows that cannot be read, and pictures that are missing, have a name in other case, or cannot be decoded.
    """
    report, shown, items, told = Report(), {}, {}, set()
    for part, open_part in parts.items():
        with collected() as faults:
            try:
                found = open_part()
            except (ValueError, OSError) as error:
                faults.append(reason(error))
                found = []
        # Two parts may read one file; what is wrong with it is said once.
        report.faults += [f"{part}: {fault}" for fault in faults if fault not in told]
        told |= set(faults)
        for table, rows in _tables(part, found):
            if not len(rows) and not faults:
                report.faults.append(f"{table} has no rows")
            _read(table, rows, report, shown, items)
    _look_at(report, shown, items)
    return report


def _tables(part, found) -> list[tuple[str, Sequence[Mapping]]]:
    if isinstance(found, Benchmark):
        return [(f"{part}, query", found.queries), (f"{part}, item", found.gallery)]
    return [(f"{part}, {'item' if isinstance(found, Gallery) else 'row'}", found)]


def _read(table: str, rows, report: Report, shown: dict, items: dict) -> None:
    """Note in `shown` the first place of every picture, and in `items` the ids of a gallery that show it."""
    ids = {}
    for number in range(len(rows)):
        report.rows += 1
        try:
            row = rows[number]
        except (ValueError, OSError) as error:
            report.faults.append(f"{table} {number}: {reason(error)}")
            continue
        name = row.get("id")
        place = f"{table} {number}" + (f" ({name})" if name is not None else "")
        if name is not None and ids.setdefault(name, number) != number:
            report.faults.append(f"{place}: row {ids[name]} has the same id")
        for image in _images(row):
            key = image if isinstance(image, str) else _digest(image)
            shown.setdefault(key, (place, lambda rows=rows, number=number: rows[number]))
            if table.endswith(", item"):
                items.setdefault((table, key), []).append(str(name))


def _images(row: Mapping) -> Iterator:
    for key, value in row.items():
        if key == "image":
            yield os.fspath(value) if isinstance(value, os.PathLike) else value
        elif isinstance(value, Mapping):
            yield from _images(value)


def _digest(image) -> bytes:
    return hashlib.sha256(
        image if isinstance(image, bytes) else np.ascontiguousarray(image)
    ).digest()


def _look_at(report: Report, shown: Mapping, items: Mapping) -> None:
    """Decode every picture, and compare the contents of those of one gallery."""
    report.pictures = len(shown)
    contents, decoded = {}, functools.partial(_decoded, names_in=functools.cache(by_stem))
    with ThreadPoolExecutor() as pool, progress("pictures", len(shown)) as advance:
        everything = list(shown.items())
        for first in range(0, len(everything), CHUNK):
            some = everything[first : first + CHUNK]
            for (key, (place, _)), (fault, content) in zip(some, pool.map(decoded, some)):
                contents[key] = content
                report.faults += [f"{place}: {fault}"] if fault else []
            advance(len(some))
    alike = {}
    for (table, key), names in items.items():
        if contents[key] is not None:
            alike.setdefault((table, contents[key]), []).extend(names)
    for (table, _), names in alike.items():
        if len(names) > 1:
            report.notes.append(f"{table}: the same picture is {', '.join(names)}")


def _decoded(entry, names_in) -> tuple[str, bytes | None]:
    """(what is wrong, or nothing; the digest of the content) of a picture."""
    key, (_, again) = entry
    try:
        if not isinstance(key, str):
            for image in _images(again()):
                open_image(image)
            return "", key
        if not os.path.isfile(key):
            return f"there is no picture {key}{near(Path(key), names_in)}", None
        open_image(key)
        return "", hashlib.sha256(Path(key).read_bytes()).digest()
    except (ValueError, OSError) as error:
        return reason(error), None
