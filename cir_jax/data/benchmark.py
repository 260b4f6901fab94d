"""What a benchmark is: queries, a gallery, and which gallery rows answer which query."""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

OTHERS = 10  # gallery items beside those needed, for each query of a limited benchmark


class Dataset(Protocol):
    """Random access to raw examples: pictures (path, bytes or uint8), strings, ids; also a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping: ...


@dataclass(frozen=True)
class Benchmark:
    """One evaluation, ready to run; rows are positions in the gallery.

    Args:
      name, variant, split: together they name the benchmark, in results and when it is made again.
      queries: raw queries with some of `image`, `text`, `document`, `id`; beside `text`, `wordings` may say it in
        several ways, whose mean asks in the first stage.
      gallery: raw items with some of `image`, `text`, `id`.
      ids: the id of each gallery row.
      positives: per query, gallery row -> grade (above 0) of every right answer.
      exclude: per query, the row of its reference picture, which is no answer, or -1. Empty: none.
      subset: per query, the rows of the closed group that `subset_recall@k` ranks. Empty: none.
      rules: per query, a label, or several, for tables by kind of query. Empty: none.
      metrics: what is reported, see `cir_jax.evaluation.metrics`.
      missing: how many `pictures` and `queries` of the published data are left out, for want of pictures.

    Raises:
      ValueError: no queries or no gallery, lengths that do not match, an id that two items have, or rows outside
        the gallery.
    """

    name: str
    variant: str
    split: str
    queries: Dataset
    gallery: Dataset
    ids: Sequence[str]
    positives: Sequence[Mapping[int, float]]
    exclude: Sequence[int] = ()
    subset: Sequence[Sequence[int]] = ()
    rules: Sequence[str | Sequence[str]] = ()
    metrics: tuple[str, ...] = ("recall@1", "recall@5", "recall@10", "mrr")
    missing: Mapping[str, int] = field(default_factory=lambda: {"pictures": 0, "queries": 0})

    def __post_init__(self):
        faults = [*_length_faults(self), *_id_faults(self), *_row_faults(self)]
        if faults:
            title = f"{self.name}/{self.variant}/{self.split} is inconsistent"
            raise ValueError(f"{title}:\n  " + "\n  ".join(faults))


def _length_faults(benchmark):
    queries, items = len(benchmark.queries), len(benchmark.gallery)
    if not queries or not items:
        yield f"{queries} queries and {items} gallery items; expected some of both"
    if len(benchmark.ids) != items:
        yield f"{len(benchmark.ids)} ids for {items} gallery items"
    if len(benchmark.positives) != queries:
        yield f"positives for {len(benchmark.positives)} of {queries} queries"
    for name in ("exclude", "subset", "rules"):
        if len(getattr(benchmark, name)) not in (0, queries):
            yield f"{name} has {len(getattr(benchmark, name))} entries for {queries} queries"


def _id_faults(benchmark):
    again = [name for name, times in Counter(benchmark.ids).items() if times > 1]
    if again:
        yield f"{len(again)} ids belong to several gallery items: {again[:5]}"


def _row_faults(benchmark):
    items = len(benchmark.gallery)
    named = {
        "positives": benchmark.positives,
        "subset": benchmark.subset,
        "exclude": [[row] for row in benchmark.exclude if row != -1],
    }
    for name, lists in named.items():
        outside = sorted({row for rows in lists for row in rows if not 0 <= row < items})
        if outside:
            yield f"{name} names rows outside the gallery of {items}: {outside[:5]}"


def numbered(names: Iterable[Hashable]) -> list[int]:
    """Equal names as equal numbers, counted from 0."""
    numbers = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


class Made(Sequence):
    """A data set whose rows are made when they are needed, by a function of the row."""

    def __init__(self, length: int, make: Callable[[int], Mapping]):
        self._rows, self.make = range(length), make

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Mapping:
        return self.make(self._rows[row])


class Chosen(Sequence):
    """Some rows of a data set, in the order given; read when they are needed."""

    def __init__(self, dataset: Dataset, rows: Sequence[int]):
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Mapping:
        return self.dataset[self.rows[row]]


def first_rows(dataset: Dataset, limit: int) -> Dataset:
    """The first rows of a data set; all of them where `limit` is 0 or above their number."""
    return Chosen(dataset, range(limit)) if 0 < limit < len(dataset) else dataset


def limited(benchmark: Benchmark, n: int) -> Benchmark:
    """A smaller benchmark for a quick try: the first `n` queries among fewer items.

    Its gallery holds what these queries need (right answers, references, subsets) and the first
    10 * n other items, in their old order. Such a gallery is easier, so the numbers say nothing about
    the whole benchmark; the variant says so: `noto-first30`.
    """
    if n < 1:
        raise ValueError(f"a benchmark limited to {n} queries; expected at least 1")
    n = min(n, len(benchmark.queries))
    exclude, subset = benchmark.exclude[:n], benchmark.subset[:n]
    needed = {row for rows in (*benchmark.positives[:n], *subset) for row in rows}
    needed |= {row for row in exclude if row >= 0}
    others = (row for row in range(len(benchmark.gallery)) if row not in needed)
    kept = sorted(needed.union(itertools.islice(others, OTHERS * n)))
    place = {row: number for number, row in enumerate(kept)}
    return replace(
        benchmark,
        variant=f"{benchmark.variant}-first{n}",
        queries=Chosen(benchmark.queries, range(n)),
        gallery=Chosen(benchmark.gallery, kept),
        ids=[benchmark.ids[row] for row in kept],
        positives=[
            {place[row]: grade for row, grade in found.items()} for found in benchmark.positives[:n]
        ],
        exclude=[place.get(row, -1) for row in exclude],
        subset=[[place[row] for row in rows] for rows in subset],
        rules=benchmark.rules[:n],
    )
