"""Evaluations as large as the published benchmarks, on made-up vectors: the numbers of a full sort, in bounded memory."""

import resource

import pytest

from cir_jax.bench.ranking import CIRCO_METRICS, FASHIONIQ_METRICS, evaluate, make, sort_all

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "queries, items, width, names",
    [(2038, 6346, 256, FASHIONIQ_METRICS), (800, 123_403, 768, CIRCO_METRICS)],
    ids=["fashioniq", "circo"],
)
def test_numbers_and_memory(queries, items, width, names, tmp_path):
    made = make(queries, items, width, names)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    intervals = evaluate(made, tmp_path / "ranks.npz")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    assert grown < 1.5  # GB: the gallery once more, as the index holds it, and blocks of scores
    means = sort_all(made)
    assert means.keys() == intervals.keys() == set(names)
    for name, mean in means.items():
        low, high = intervals[name]
        assert low <= mean <= high
