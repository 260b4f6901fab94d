"""Tables of one's own: rows of `.jsonl`, `.csv` and `.parquet` files as plain dictionaries.

The three formats give the same rows, except that every value of a CSV is a string. A value that is
not there (a JSON `null`, an empty cell of a CSV, a null of parquet) is None. Every row knows its
place, so that whoever finds a fault in it can say where.
"""

import contextlib
import csv
import io
import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

TABLES = (".jsonl", ".csv", ".parquet")
SHOWN = 5  # faults of a file that one message lists

_collected: ContextVar[list[str] | None] = ContextVar("faults that are collected", default=None)


class Row(NamedTuple):
    """Values by column, and where they stand: "FILE, line 3"."""

    place: str
    values: dict[str, Any]


def read_table(path: str | os.PathLike) -> list[Row]:
    """The rows of a table, in their order; empty lines are skipped.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that is empty, damaged, no UTF-8 or of another kind; a line that is no JSON
        object, a CSV row with more or fewer cells than the header, columns without or with the same
        name. The message names file and line.
      ImportError: a parquet file, but no pyarrow.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is no table; expected a file that ends in {', '.join(TABLES)}")
    return list(reader(path))


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a folder, another encoding, or a NUL, which no text holds.
    """
    _check_file(path)
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not UTF-8: line {line}: {error}; save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line} holds a NUL byte; the file is damaged or no text")
    return text


def string(value: Any) -> str | None:
    """A cell as text, numbers written out; None if it is empty.

    Raises:
      ValueError: anything else, and text that cannot be written as UTF-8 or holds a NUL.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"is {_short(value)}, expected text")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"is {_short(value)}, which is no text")
    return value.strip() or None


def strings(value: Any, separator: str = "") -> list[str]:
    """A cell as a list of texts: a list, or one text, cut at the separator if there is one.

    Raises:
      ValueError: anything else, or an empty text in a list.
    """
    if isinstance(value, str) and separator:
        value = value.split(separator)
    values = value if isinstance(value, list) else [] if string(value) is None else [value]
    found = [string(each) for each in values]
    if None in found:
        raise ValueError(f"is {_short(value)}, expected no empty entry")
    return found


def relative(path: str, root: Path) -> str | None:
    """A path that is given from the folder `root`, relative to it, with slashes; None if it leads out."""
    found = os.path.normpath(os.path.relpath(root / path, root))
    return None if found.split(os.sep)[0] == ".." else Path(found).as_posix()


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """A list that takes the faults which `refuse` meets within the block, all of them, instead of an error.

    What is read there goes on without the rows that are wrong; it serves to find more faults and nothing else.
    """
    faults: list[str] = []
    token = _collected.set(faults)
    try:
        yield faults
    finally:
        _collected.reset(token)


def collects(faults: Sequence[str]) -> bool:
    """True within `collected`, whose list then has these faults too."""
    collecting = _collected.get()
    if collecting is not None:
        collecting += faults
    return collecting is not None


def refuse(title: str, faults: Sequence[str], place: object = "") -> None:
    """One ValueError that lists the first faults, if there are any; within `collected` none.

    Args:
      place: what a collected fault begins with, as a file; its title is lost.
    """
    if not collects([f"{place}: {fault}" if place else fault for fault in faults]) and faults:
        rest = len(faults) - SHOWN
        more = f"\n  and {rest} more" if rest > 0 else ""
        raise ValueError(f"{title}:\n  " + "\n  ".join(faults[:SHOWN]) + more)


def _check_file(path) -> None:
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _json_rows(path) -> Iterator[Row]:
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; expected a JSON object per line")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield Row(place, _json_object(line, place))


def _json_object(line, place) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place} is no JSON object with names and values: {line[:60]}")
    return value


def _distinct(pairs):
    names = Counter(name for name, _ in pairs)
    if len(names) < len(pairs):
        raise ValueError(f"an object with the name {names.most_common(1)[0][0]!r} twice")
    return dict(pairs)


def _csv_rows(path) -> Iterator[Row]:
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; expected a line with the names of the columns")
    # Strict, so that a quote that is never closed does not swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, start = None, 1
    while (cells := _next_cells(reader, path, start)) is not None:
        place, start = f"{path}, line {start}", reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = _header([name.strip() for name in cells], place)
        elif len(cells) != len(header):
            names = textwrap.shorten(", ".join(name[:40] for name in header), 200)
            raise ValueError(
                f"{place} has {len(cells)} cells, the header {len(header)} ({names}); "
                f"put values that hold commas into double quotes"
            )
        else:
            yield Row(place, {name: cell or None for name, cell in zip(header, cells)})


def _next_cells(reader, path, start) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {start} cannot be read as CSV: {error}; mend the quotes, "
            f"or write the table as .jsonl, which knows no limits"
        ) from None


def _header(names, place) -> list[str]:
    again = [name for name, times in Counter(names).items() if times > 1]
    if again or not all(names):
        found = f"the column {again[0]!r} twice" if again else "a column without a name"
        raise ValueError(f"{place} has {found}; expected a header of different names")
    return names


def _parquet_rows(path) -> Iterator[Row]:
    _check_file(path)
    number = 0
    with opened_parquet(path, lambda: f" after row {number}") as file:
        _header(file.schema_arrow.names, path)
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", values)


@contextlib.contextmanager
def opened_parquet(path: str | os.PathLike, where: Callable[[], str] = str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; what goes wrong with it in the block is told.

    Args:
      where: what to say of the place in the file.

    Raises:
      ImportError: no pyarrow.
      ValueError: a damaged file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            f"{path} needs pyarrow; run `pip install 'cir_jax[parquet]'`, or write it as .jsonl"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as parquet{where()}: {error}; it is damaged, make it again"
        ) from None


_READERS = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
