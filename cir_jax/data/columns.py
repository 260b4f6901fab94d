"""Rows of large parquet files at random, by an id: what does not fit into memory stays in the files."""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cir_jax.data.tables import opened_parquet

HELD = 16  # row groups in memory


class Columns(Mapping):
    """Some columns of parquet files as a mapping from ids to rows, in the order of the files.

    Only ids are read at once. A row group is decoded when a row of it is needed, and the last few are kept: reading in
    the order of the files is quick, and small row groups are good for any other.

    Args:
      files: in their order; they belong together.
      key: the column of ids, strings.
      columns: what a row has.
      wanted: the ids that count; None for all.

    Raises:
      ImportError: no pyarrow.
      ValueError: damaged files, other columns, an id twice.
    """

    def __init__(
        self,
        files: Sequence[Path],
        key: str,
        columns: Sequence[str],
        wanted: Collection[str] | None = None,
    ):
        self.files, self.key, self.columns = list(files), key, list(columns)
        self._groups, sizes = [], []  # (file, number of the row group)
        for number, file in enumerate(self.files):
            for group, rows in enumerate(self._group_sizes(file)):
                self._groups.append((number, group))
                sizes.append(rows)
        self._starts = [0, *itertools.accumulate(sizes)]
        self._rows: dict[str, int] = {}
        for row, name in enumerate(self._ids()):
            if wanted is not None and name not in wanted:
                continue
            if name in self._rows:
                raise ValueError(f"{self.files[0].parent} has the {key} {name!r} twice")
            self._rows[name] = row
        self._group = functools.lru_cache(HELD)(self._read_group)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> dict[str, Any]:
        row = self._rows[name]
        place = bisect_right(self._starts, row) - 1
        return self._group(place).slice(row - self._starts[place], 1).to_pylist()[0]

    def place(self, name: str) -> int:
        """The row of an id over all files."""
        return self._rows[name]

    def _group_sizes(self, path: Path) -> list[int]:
        with opened_parquet(path) as file:
            missing = {self.key, *self.columns} - set(file.schema_arrow.names)
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(sorted(missing))}; it has "
                    f"{', '.join(file.schema_arrow.names)}"
                )
            if str(file.schema_arrow.field(self.key).type) not in ("string", "large_string"):
                raise ValueError(f"{path} has no texts in {self.key}, expected ids")
            counts = range(file.metadata.num_row_groups)
            return [file.metadata.row_group(number).num_rows for number in counts]

    def _ids(self) -> Iterator[str]:
        for path in self.files:
            with opened_parquet(path) as file:
                for batch in file.iter_batches(columns=[self.key]):
                    yield from batch.column(0).to_pylist()

    def _read_group(self, place: int):
        number, group = self._groups[place]
        with opened_parquet(self.files[number]) as file:
            return file.read_row_group(group, columns=self.columns)
