"""The audit for shortcuts: how one part is left out, and what the shares say about hand-made answers."""

import numpy as np
import pytest
from test_methods import INPUTS

from cir_jax.config import Run
from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation import audit
from cir_jax.evaluation.audit import Alone, audits, composed, with_parts
from cir_jax.methods import METHODS, method_name

PICTURE = np.zeros((4, 4, 3), np.uint8)
QUERY = {"image": PICTURE, "text": "red", "id": "q"}


def benchmark(*queries):
    return Benchmark("made", "v", "test", list(queries), [{}], ["a"], [{0: 1.0}] * len(queries))


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("part", audit.PARTS)
def test_every_method_that_composes_reads_one_part_alone(name, part):
    """Without the other one if it can; else with one that says nothing."""
    config = METHODS[name][0].tiny(INPUTS)
    kinds = METHODS[method_name(config)][1].query_kinds
    if {"image", "text"} not in kinds:
        return
    (found,) = Alone([QUERY], part, config)
    assert set(found) in kinds and found[part] is QUERY[part]
    assert (len(found) == 1) == ({part} in kinds)
    if part == "image" and len(found) == 2:
        assert found["text"] == ""


def test_a_picture_that_says_nothing_is_what_the_transform_subtracts():
    from cir_jax.data.images import prepare

    config = METHODS["blip_rerank"][0].tiny(INPUTS)
    (found,) = Alone([QUERY], "text", config)
    prepared = prepare(found["image"], config.inputs.image)
    assert np.abs(prepared).max() < 0.5 / 255 / min(np.atleast_1d(config.inputs.image.std)) + 1e-6


def test_only_composed_benchmarks_are_asked_again():
    known = {"c": benchmark(QUERY), "t": benchmark({"text": "x"})}
    assert [composed(known[name]) for name in "ct"] == [True, False]
    runs = (Run("c", "m"), Run("t", "m"), Run("c", "m", asks="image"))
    found = with_parts(runs, known.get)
    assert [(run.benchmark, run.asks) for run in found] == [
        ("c", "all"), ("c", "text"), ("c", "image"), ("t", "all"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="nothing to audit"):
        with_parts(runs[1:2], known.get)
    given = Run("c", candidates="top.npz")
    assert with_parts((given, runs[0]), known.get)[:2] == (given, runs[0])


def result(asks, right, stage=1, **more):
    row = {
        "benchmark": "b", "variant": "v", "split": "test", "run": "m", "index_asked": "exact",
        "stage": stage, "queries": len(right), "metrics": {"recall@1": 0.0, "mrr": 0.0},
    } | ({"asks": asks} if asks != "all" else {}) | more  # fmt: skip
    return row, {"recall@1": np.array(right, float), "mrr": np.zeros(len(right))}


def test_shares_by_hand():
    results = [
        result("all", [1, 1, 1, 0, 1, 0]),
        result("text", [1, 0, 0, 0, 0, 1]),
        result("image", [1, 1, 0, 0, 0, 0]),
    ]
    (found,) = audits(results)
    row = found["metrics"]["recall@1"]
    assert list(found["metrics"]) == ["recall@1"] and found["queries"] == 6
    assert (row["all"], row["text"], row["image"]) == pytest.approx((4 / 6, 2 / 6, 2 / 6))
    assert row["either"] == 0.5
    assert (row["rest"], row["rest_queries"]) == (pytest.approx(2 / 3), 3)
    assert row["interval"]["either"][0] < 0.5 < row["interval"]["either"][1]
    assert row["rest_interval"][0] <= 2 / 3 <= row["rest_interval"][1]


def test_nothing_is_left_where_one_part_answers_all():
    results = [result("all", [1, 1]), result("text", [1, 1]), result("image", [0, 0])]
    row = audits(results)[0]["metrics"]["recall@1"]
    assert (row["either"], row["rest"], row["rest_interval"], row["rest_queries"]) == (
        1,
        None,
        None,
        0,
    )
    audit.print_audits(audits(results))


def test_the_last_stage_is_audited_and_what_was_not_asked_again_is_not():
    second = {"reranker": "r", "k": 5}
    results = [
        *(result(asks, [0, 1]) for asks in ("all", "text", "image")),
        *(result(asks, [1, 1], 2, **second) for asks in ("all", "text", "image")),
    ]
    assert [each["stage"] for each in audits(results)] == [2]
    assert audits(results[:1]) == [] and audits(results[:2]) == []
