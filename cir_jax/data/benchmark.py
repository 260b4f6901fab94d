"""What a benchmark is: queries, a gallery, and which gallery rows answer which query."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Dataset(Protocol):
    """Random access to raw examples: pictures (path, bytes or uint8), strings, ids; also a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping: ...


@dataclass(frozen=True)
class Benchmark:
    """One evaluation, ready to run; rows are positions in the gallery.

    Args:
      name, variant, split: together they name the benchmark, in results and when it is made again.
      queries: raw queries with some of `image`, `text`, `document`, `id`.
      gallery: raw items with some of `image`, `text`, `id`.
      ids: the id of each gallery row.
      positives: per query, gallery row -> grade (above 0) of every right answer.
      exclude: per query, the row of its reference picture, which is no answer, or -1. Empty: none.
      subset: per query, the rows of the closed group that `subset_recall@k` ranks. Empty: none.
      rules: per query, a label for tables by kind of query. Empty: none.
      metrics: what is reported, see `cir_jax.metrics`.

    Raises:
      ValueError: lengths that do not match, or rows outside the gallery.
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
    rules: Sequence[str] = ()
    metrics: tuple[str, ...] = ("recall@1", "recall@5", "recall@10", "mrr")

    def __post_init__(self):
        faults = [*_length_faults(self), *_row_faults(self)]
        if faults:
            title = f"{self.name}/{self.variant}/{self.split} is inconsistent"
            raise ValueError(f"{title}:\n  " + "\n  ".join(faults))


def _length_faults(benchmark):
    queries, items = len(benchmark.queries), len(benchmark.gallery)
    if len(benchmark.ids) != items:
        yield f"{len(benchmark.ids)} ids for {items} gallery items"
    if len(benchmark.positives) != queries:
        yield f"positives for {len(benchmark.positives)} of {queries} queries"
    for field in ("exclude", "subset", "rules"):
        if len(getattr(benchmark, field)) not in (0, queries):
            yield f"{field} has {len(getattr(benchmark, field))} entries for {queries} queries"


def _row_faults(benchmark):
    items = len(benchmark.gallery)
    named = {
        "positives": benchmark.positives,
        "subset": benchmark.subset,
        "exclude": [[row] for row in benchmark.exclude if row != -1],
    }
    for field, lists in named.items():
        outside = sorted({row for rows in lists for row in rows if not 0 <= row < items})
        if outside:
            yield f"{field} names rows outside the gallery of {items}: {outside[:5]}"
