"""How long an evaluation takes once its vectors are there; the command is `python -m cir_jax.bench rank`.

As large as FashionIQ's validation (three galleries, 6,016 queries, both protocols) and CIRCO's test (123,403 x 768, 800
queries), on made-up vectors: lists, ranks, metrics, intervals and the file of ranks as `python -m cir_jax.eval` makes
them. The peer sorts all scores of a gallery with numpy, as the originals do with PyTorch, and computes the same means
without intervals and files.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation import metrics, runs
from cir_jax.index import ExactIndex
from cir_jax.retrieval import ranks_beyond, retrieve

# queries -> items of the whole list of the split, and of the references and targets alone
FASHIONIQ = {2017: (3817, 2628), 2038: (6346, 3089), 1961: (5373, 2902)}
FASHIONIQ_METRICS = ("recall@1", "recall@5", "recall@10", "recall@50", "mrr")
CIRCO_METRICS = tuple(f"{kind}@{k}" for kind in ("map", "recall") for k in (5, 10, 25, 50))
TARGETS = 3  # right answers of a query


@dataclass
class Made:
    """A benchmark of made-up unit vectors."""

    queries: np.ndarray
    items: np.ndarray
    benchmark: Benchmark


def make(queries: int, items: int, width: int, names: tuple[str, ...]) -> Made:
    """`queries` and `items` rows of `width`; each query has up to three right answers."""
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    drawn = lambda rows: unit(rng.standard_normal((rows, width), dtype=np.float32))
    right = rng.integers(items, size=(queries, TARGETS))
    benchmark = Benchmark(
        "made", "v", "val", [{}] * queries, [{}] * items, [str(row) for row in range(items)],
        [dict.fromkeys(map(int, rows), 1.0) for rows in right], metrics=names,
    )  # fmt: skip
    return Made(drawn(queries), drawn(items), benchmark)


def evaluate(made: Made, path: Path) -> dict[str, tuple[float, float]]:
    """The interval of each metric; ranks and values of every query are written to `path`."""
    queries, items, benchmark = made.queries, made.items, made.benchmark
    hits = retrieve(ExactIndex(items), queries, runs.list_depth(benchmark))
    beyond = ranks_beyond(queries, items, hits, benchmark.positives)
    rank = metrics.ranks(hits.rows, benchmark.positives)
    values = runs.values_of_queries(benchmark, hits, None, np.where(rank < 0, beyond, rank))
    np.savez_compressed(path, rows=hits.rows, scores=hits.scores, **values)
    return {name: metrics.interval(value) for name, value in values.items()}


def sort_all(made: Made) -> dict[str, float]:
    """The mean of each metric, from whole sorted galleries, 256 queries at a time."""
    names, blocks = made.benchmark.metrics, []
    depth = len(made.items) if "mrr" in names else 50
    for start in range(0, len(made.queries), 256):
        scores = made.queries[start : start + 256] @ made.items.T
        blocks.append(np.argsort(-scores, axis=1, kind="stable")[:, :depth])
    found = metrics.per_query(np.concatenate(blocks), made.benchmark, names)
    return {name: float(value.mean()) for name, value in found.items()}


def tasks() -> Iterator[tuple[str, list[Made]]]:
    """The benchmarks of each size."""
    sizes = [(queries, items) for queries, both in FASHIONIQ.items() for items in both]
    yield "FashionIQ, both protocols", [make(*size, 256, FASHIONIQ_METRICS) for size in sizes]
    yield "CIRCO", [make(800, 123_403, 768, CIRCO_METRICS)]


def measured(repeat: int) -> Iterator[tuple[str, float, float]]:
    """For each size its title and the best seconds of `repeat` rounds, ours and the peer's in turns."""
    with tempfile.TemporaryDirectory() as folder:
        write = lambda made: evaluate(made, Path(folder, "ranks.npz"))
        for title, parts in tasks():
            rounds = [(_seconds(write, parts), _seconds(sort_all, parts)) for _ in range(repeat)]
            yield title, *map(min, zip(*rounds))


def _seconds(step, parts) -> float:
    start = time.monotonic()
    for made in parts:
        step(made)
    return time.monotonic() - start
