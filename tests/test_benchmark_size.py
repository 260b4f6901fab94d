"""Evaluations as large as the published benchmarks, on made-up vectors: time on the processors, and memory."""

import resource
import time

import numpy as np
import pytest

from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation import metrics, runs
from cir_jax.index import ExactIndex
from cir_jax.retrieval import ranks_beyond, retrieve

pytestmark = pytest.mark.slow
FASHIONIQ = {2017: (3817, 2628), 2038: (6346, 3089), 1961: (5373, 2902)}


def vectors(random, rows, width):
    made = random.standard_normal((rows, width), dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def evaluated(random, queries, items, names, path):
    """What eval does with given vectors: lists, ranks, metrics, intervals, the file of ranks."""
    right = random.integers(len(items), size=(len(queries), 3))
    benchmark = Benchmark(
        "made", "v", "val", [{}] * len(queries), [{}] * len(items), [str(n) for n in range(len(items))],
        [dict.fromkeys(map(int, each), 1.0) for each in right], metrics=names,
    )  # fmt: skip
    hits = retrieve(ExactIndex(items), queries, runs._list_depth(benchmark))
    beyond = ranks_beyond(queries, items, hits, benchmark.positives)
    rank = metrics.ranks(hits.rows, benchmark.positives)
    values = runs._values(benchmark, hits, None, np.where(rank < 0, beyond, rank))
    np.savez_compressed(path, rows=hits.rows, scores=hits.scores, **values)
    return {name: metrics.interval(value) for name, value in values.items()}


def test_fashioniq_in_both_protocols(tmp_path):
    random, start = np.random.default_rng(0), time.process_time()
    names = ("recall@10", "recall@50", "recall@1", "recall@5", "mrr")
    for queries, galleries in FASHIONIQ.items():
        for items in galleries:
            asked = vectors(random, queries, 256)
            found = evaluated(random, asked, vectors(random, items, 256), names, tmp_path / "x.npz")
            assert 0 < found["recall@50"][0] < found["recall@50"][1] < 0.2
    assert time.process_time() - start < 20  # 10 seconds of 2 processors


def test_circo(tmp_path):
    random = np.random.default_rng(0)
    items, queries = vectors(random, 123_403, 768), vectors(random, 800, 768)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = tuple(f"{kind}@{k}" for kind in ("map", "target_recall") for k in (5, 10, 25, 50))
    evaluated(random, queries, items, names, tmp_path / "x.npz")
    assert time.process_time() - start < 30
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    assert grown < 1.5  # GB: the gallery once more, as the index holds it, and blocks of scores
