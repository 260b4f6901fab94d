"""Metrics: rankings worked out by hand, brute force on random ones, and exact expectations."""

import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation import metrics

ALL = ("recall@1", "recall@3", "map@3", "ndcg@3", "mrr", "subset_recall@1", "subset_recall@2")
CIRCO = tuple(f"map@{k}" for k in (5, 10, 25, 50))
TARGETS = tuple(f"target_recall@{k}" for k in (5, 10, 25, 50))
ALL += ("target_recall@2", "trec_recall@3", "mrr@2", "mean(recall@3,subset_recall@1)")


def made(positives, items, exclude=(), subset=(), rules=(), names=("recall@1", "mrr")):
    return Benchmark(
        name="made",
        variant="v",
        split="test",
        queries=[{}] * len(positives),
        gallery=[{}] * items,
        ids=[str(row) for row in range(items)],
        positives=positives,
        exclude=exclude,
        subset=subset,
        rules=rules,
        metrics=names,
    )


def random_case(seed, queries=12, items=9, graded=True):
    """A random benchmark with references and subsets, and a full random ranking."""
    rng = np.random.default_rng(seed)
    rows = rng.permuted(np.tile(np.arange(items), (queries, 1)), axis=1)
    positives, exclude, subset = [], [], []
    for _ in range(queries):
        order = rng.permutation(items)
        right = order[: rng.integers(1, 4)]
        grades = rng.integers(1, 4, len(right)) if graded else np.ones(len(right))
        positives.append({int(r): float(g) for r, g in zip(right, grades, strict=True)})
        exclude.append(int(rng.choice([-1, order[-1]])))
        subset.append([int(row) for row in order[:5]])
    return rows, made(positives, items, exclude, subset, names=ALL)


def brute_force(row, right, reference, near):
    """The metrics of one query, spelled out."""
    ranked = [r for r in row if r not in (-1, reference)]
    right = {r: g for r, g in right.items() if r != reference}
    found = [k for k, r in enumerate(ranked) if r in right]
    values = {"mrr": 1 / (1 + found[0]) if found else 0}
    for k in (1, 3):
        values[f"recall@{k}"] = float(any(r in right for r in ranked[:k]))
    values["map@3"] = sum(
        len([f for f in found if f <= k]) / (k + 1) for k in found if k < 3
    ) / min(3, len(right))
    gain = lambda grades: sum(g / np.log2(k + 2) for k, g in enumerate(grades[:3]))
    values["mrr@2"] = 1 / (1 + found[0]) if found and found[0] < 2 else 0
    values["trec_recall@3"] = len(set(ranked[:3]) & right.keys()) / len(right)
    best = sorted(right.values(), reverse=True)
    values["target_recall@2"] = float(any(right.get(r) == best[0] for r in ranked[:2]))
    values["ndcg@3"] = gain([right.get(r, 0) for r in ranked]) / gain(best)
    closed = [r for r in ranked if r in near]
    for k in (1, 2):
        values[f"subset_recall@{k}"] = float(any(r in right for r in closed[:k]))
    values["mean(recall@3,subset_recall@1)"] = (values["recall@3"] + values["subset_recall@1"]) / 2
    return values


# ---- by hand ----


def test_ranks():
    rows = np.array([[4, 2, 0], [1, 3, 4], [0, 1, 2], [-1, -1, -1]])
    positives = [{0: 1.0}, {1: 1.0, 3: 1.0}, {4: 1.0}, {0: 1.0}]
    assert metrics.ranks(rows, positives).tolist() == [2, 0, -1, -1]
    assert metrics.ranks(rows, positives, [4, 1, -1, -1]).tolist() == [1, 0, -1, -1]
    assert metrics.ranks(rows, positives).dtype == np.int64
    assert metrics.ranks(np.zeros((1, 0), int), [{0: 1.0}]).tolist() == [-1]


def test_a_ranking_by_hand():
    # Right: 7 (grade 2), 1 and 3; reference 5. Ranking without it: 2 7 9 1 0 3.
    rows = np.array([[2, 5, 7, 9, 1, 0, 3]])
    case = made([{7: 2.0, 1: 1.0, 3: 1.0}], 10, [5], [[5, 9, 1, 0]])
    names = ("recall@1", "recall@2", "mrr", "map@2", "map@4", "map@6", "ndcg@4")
    found = metrics.evaluate(rows, case, (*names, "subset_recall@1", "subset_recall@2"))
    assert found["recall@1"] == 0 and found["recall@2"] == 1
    assert found["mrr"] == 1 / 2
    assert found["map@2"] == pytest.approx((1 / 2) / 2)
    assert found["map@4"] == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert found["map@6"] == pytest.approx((1 / 2 + 2 / 4 + 3 / 6) / 3)
    ideal = 2 + 1 / np.log2(3) + 1 / np.log2(4)
    assert found["ndcg@4"] == pytest.approx((2 / np.log2(3) + 1 / np.log2(5)) / ideal)
    assert found["subset_recall@1"] == 0 and found["subset_recall@2"] == 1


def test_the_mean_is_over_queries():
    rows = np.array([[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 1, 2]])
    case = made([{0: 1.0}, {1: 1.0}, {0: 1.0}, {0: 1.0, 1: 1.0}], 3)
    values = metrics.per_query(rows, case)
    assert values["recall@1"].tolist() == [1, 0, 0, 1]
    assert values["mrr"].tolist() == [1, 1 / 2, 1 / 3, 1]
    assert metrics.evaluate(rows, case) == {
        "recall@1": 0.5,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 3 + 1) / 4),
    }


def test_a_reference_that_is_a_right_answer_counts_for_nothing():
    case = made([{0: 1.0, 1: 1.0}], 3, exclude=[0], names=("recall@1", "map@2"))
    found = metrics.evaluate(np.array([[0, 2, 1]]), case)
    assert found == {"recall@1": 0, "map@2": 1 / 2}


def test_missing_hits_are_passed_over():
    case = made([{0: 1.0}, {2: 1.0}], 5, names=("recall@3", "mrr", "map@3"))
    found = metrics.per_query(np.array([[1, 0, -1], [1, 0, -1]]), case)
    assert found["recall@3"].tolist() == [1, 0]
    assert found["mrr"].tolist() == [1 / 2, 0]


def test_tables_by_rule():
    values = {"recall@1": np.array([1, 0, 1.0]), "mrr": np.array([1, 0.5, 1])}
    assert metrics.by_rule(values, ["b", "a", "b"]) == {
        "a": {"queries": 1, "recall@1": 0, "mrr": 0.5},
        "b": {"queries": 2, "recall@1": 1, "mrr": 1},
    }


def test_overlap():
    exact = np.array([[0, 1, 2], [3, 4, -1]])
    assert metrics.overlap(exact, exact) == 1
    assert metrics.overlap(np.array([[2, 9], [-1, 4]]), exact) == 2 / 5
    with pytest.raises(ValueError, match="hits of 1 and 2 queries"):
        metrics.overlap(exact[:1], exact)


def test_a_query_counts_in_each_of_its_kinds():
    values = {"map@10": np.array([1, 0, 0.5])}
    found = metrics.by_rule(values, [("a", "b"), ["b"], ("a", "a")])
    assert found == {"a": {"queries": 2, "map@10": 0.75}, "b": {"queries": 2, "map@10": 0.5}}


def test_median_rank():
    assert metrics.median_rank(np.array([0, 4, 2])) == 3
    assert metrics.median_rank(np.array([0, 1, 4, -1])) == 3.5
    assert metrics.median_rank(np.array([0, -1, -1])) is None
    assert metrics.median_rank(np.array([0, -1])) is None
    assert metrics.median_rank(np.array([], int)) is None


# ---- figures of others ----


def test_average_precision_as_in_circo():
    rows = np.array([range(100, 150)])
    found = [
        metrics.evaluate(rows, made([dict.fromkeys(right, 1.0)], 10_000), CIRCO)
        for right in ([101, 104, 9999], [100, 101, 102, 103, 104, 110, 120])
    ]
    assert list(found[0].values()) == pytest.approx([0.3] * 4)
    expected = [1.0, 0.714286, 0.839827, 0.839827]
    assert list(found[1].values()) == pytest.approx(expected, abs=1e-6)


def test_the_sample_submission_of_circo_has_its_known_scores(shared):
    read = lambda name: json.loads((shared / "data/circo" / name).read_text())
    asked = read("annotations/val.json")
    answers = read("submission_examples/submission_val.json")
    lists = [answers[str(query["id"])] for query in asked]
    ids = sorted(
        {each for found in lists for each in found}.union(*(q["gt_img_ids"] for q in asked))
    )
    place = {each: row for row, each in enumerate(ids)}
    grade = lambda query, each: 2.0 if each == query["target_img_id"] else 1.0
    positives = [{place[each]: grade(q, each) for each in q["gt_img_ids"]} for q in asked]
    aspects = [query["semantic_aspects"] for query in asked]
    case = made(positives, len(ids), rules=aspects)
    rows = np.array([[place[each] for each in found] for found in lists])
    values = metrics.per_query(rows, case, CIRCO + TARGETS)
    means = {name: 100 * value.mean() for name, value in values.items()}
    expected = [0.4861, 0.5178, 0.5400, 0.6020, 0.9091, 0.9091, 1.3636, 3.6364]
    assert list(means.values()) == pytest.approx(expected, abs=5e-5)
    table = metrics.by_rule(values, aspects)
    assert {k: round(100 * row["map@10"], 4) for k, row in table.items()} == {
        "cardinality": 0,
        "addition": 0.0871,
        "negation": 0,
        "direct_addressing": 0.9197,
        "compare_change": 0.0242,
        "comparative_statement": 1.0500,
        "statement_with_conjunction": 0.6183,
        "spatial_relations_background": 0.1808,
        "viewpoint": 0.6173,
    }
    assert table["addition"]["queries"] == 80 and table["negation"]["queries"] == 21


def test_cfir_s_reciprocal_rank_of_its_first_ten():
    """The true values of cfir.md 6.5; the original's mean over blocks is not repeated."""
    ranks = [1, 3, None, 12, 2]
    rows = np.full((5, 20), -1)
    for query, rank in enumerate(ranks):
        rows[query] = [0 if place == rank else 100 + place for place in range(1, 21)]
    case = made([{0: 1.0}] * 5, 200)
    names = ("recall@1", "recall@10", "mrr@10")
    expected = [0.2, 0.6, 0.366667]
    assert list(metrics.evaluate(rows, case, names).values()) == pytest.approx(expected, abs=1e-6)


def test_right_answers_outside_the_candidates_are_misses_at_every_k():
    case = made([{0: 1.0}, {1: 1.0}], 9, names=("recall@1", "recall@5", "mrr", "map@5"))
    rows = np.array([[2, 0, -1], [2, 0, -1]])
    found = metrics.per_query(rows, case)
    assert [value.tolist() for value in found.values()] == [[0, 0], [1, 0], [0.5, 0], [0.5, 0]]


# ---- properties ----


@st.composite
def cases(draw):
    """(full rankings, benchmark) with any right answers, references and subsets."""
    items = draw(st.integers(4, 8))
    some = st.sets(st.integers(0, items - 1), min_size=1, max_size=4)
    queries = draw(st.integers(1, 4))
    rows, positives, exclude, subset = [], [], [], []
    for _ in range(queries):
        rows.append(draw(st.permutations(range(items))))
        right = draw(some)
        positives.append({row: float(draw(st.integers(1, 3))) for row in right})
        exclude.append(draw(st.sampled_from([-1, *sorted(set(range(items)) - right)])))
        subset.append(sorted(draw(some)))
    return np.array(rows), made(positives, items, exclude, subset, names=ALL)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_metrics_are_what_their_definitions_say(given):
    rows, case = given
    found = metrics.per_query(rows, case)
    for query, row in enumerate(rows.tolist()):
        expected = brute_force(row, case.positives[query], case.exclude[query], case.subset[query])
        assert {name: found[name][query] for name in ALL} == pytest.approx(expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), st.randoms(use_true_random=False))
def test_recalls_grow_with_k_and_do_not_depend_on_numbering(given, random):
    rows, case = given
    items = len(case.gallery)
    for kind in ("recall", "target_recall", "trec_recall", "subset_recall", "mrr"):
        names = [f"{kind}@{k}" for k in range(1, items + 1) if kind != "mrr" or k < items]
        values = np.array([metrics.per_query(rows, case, [name])[name] for name in names])
        if kind == "subset_recall":
            assert set(values[-1]) <= {0.0, 1.0}
        assert (np.diff(values, axis=0) >= 0).all()
    new = np.array(random.sample(range(items), items))
    moved = made(
        [{int(new[row]): grade for row, grade in right.items()} for right in case.positives],
        items,
        [int(new[row]) if row >= 0 else -1 for row in case.exclude],
        [[int(new[row]) for row in near] for near in case.subset],
        names=ALL,
    )
    before, after = metrics.per_query(rows, case), metrics.per_query(new[rows], moved)
    assert all((before[name] == after[name]).all() for name in ALL)


@pytest.mark.parametrize("seed", range(20))
def test_brute_force_agrees(seed):
    rows, case = random_case(seed)
    found = metrics.per_query(rows, case)
    for query, row in enumerate(rows.tolist()):
        expected = brute_force(row, case.positives[query], case.exclude[query], case.subset[query])
        assert {name: found[name][query] for name in ALL} == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_stay_within_bounds_and_grow_with_k(seed):
    rows, case = random_case(seed)
    for kind in ("recall", "subset_recall"):
        values = [metrics.per_query(rows, case, [f"{kind}@{k}"]) for k in range(1, 10)]
        values = np.array([next(iter(value.values())) for value in values])
        assert (np.diff(values, axis=0) >= 0).all()
    for value in metrics.per_query(rows, case, (*ALL, "map@9", "ndcg@9")).values():
        assert (value >= 0).all() and (value <= 1 + 1e-12).all()


@pytest.mark.parametrize("seed", range(5))
def test_numbering_the_gallery_anew_changes_nothing(seed):
    rows, case = random_case(seed)
    new = np.random.default_rng(seed).permutation(len(case.gallery))
    moved = made(
        [{int(new[row]): g for row, g in right.items()} for right in case.positives],
        len(case.gallery),
        [int(new[row]) if row >= 0 else -1 for row in case.exclude],
        [[int(new[row]) for row in near] for near in case.subset],
        names=ALL,
    )
    before, after = metrics.per_query(rows, case), metrics.per_query(new[rows], moved)
    assert all((before[name] == after[name]).all() for name in ALL)


def test_the_best_order_reaches_one():
    _, case = random_case(3)
    rows = []
    for right, reference in zip(case.positives, case.exclude, strict=True):
        order = sorted(range(9), key=lambda row: (-right.get(row, 0), row))
        rows.append([reference, *(row for row in order if row != reference)][-9:])
    found = metrics.evaluate(np.array(rows), case)
    assert found == pytest.approx(dict.fromkeys(ALL, 1.0))


@pytest.mark.parametrize("seed", range(5))
def test_a_list_as_long_as_depth_tells_all(seed):
    rows, case = random_case(seed)
    for names in (("recall@1",), ("recall@3", "map@3"), ("ndcg@3",), ("mrr",), ALL):
        enough = metrics.depth(case, names)
        assert metrics.evaluate(rows[:, :enough], case, names) == metrics.evaluate(
            rows, case, names
        )
    assert metrics.depth(case, ("recall@3",)) == 4
    assert metrics.depth(made([{0: 1.0}], 9), ("recall@3",)) == 3
    assert metrics.depth(made([{0: 1.0}], 9)) == 9


# ---- random level ----


@pytest.mark.parametrize("reference", [-1, 5])
@pytest.mark.parametrize("right", [{0: 1.0}, {0: 2.0, 3: 1.0}, {0: 1.0, 1: 3.0, 2: 1.0}])
def test_random_level_is_the_mean_over_all_orders(right, reference):
    orders = np.array(list(itertools.permutations(range(6))))
    subset = [[0, 3, 4, 5]]
    single = made([right], 6, [reference], subset, names=ALL)
    every = made([right] * 720, 6, [reference] * 720, subset * 720, names=ALL)
    assert metrics.random_level(single) == pytest.approx(metrics.evaluate(orders, every))


def test_random_level_of_cut_lists():
    orders = np.array(list(itertools.permutations(range(5))))[:, :2]
    every = made([{0: 1.0, 1: 1.0}] * 120, 5, names=("mrr",))
    cut = metrics.random_level(every, length=2)["mrr"]
    assert cut == pytest.approx(metrics.evaluate(orders, every)["mrr"])
    assert cut < metrics.random_level(every)["mrr"]


def test_random_level_averages_over_queries():
    case = made([{0: 1.0}, {0: 1.0, 1: 1.0}], 4, names=("recall@1", "recall@4"))
    assert metrics.random_level(case) == {"recall@1": pytest.approx(0.375), "recall@4": 1}


def test_random_level_of_a_large_gallery():
    case = made([{5: 1.0}], 100_000, names=("recall@10", "mrr"))
    found = metrics.random_level(case)
    assert found["recall@10"] == pytest.approx(1e-4)
    assert found["mrr"] == pytest.approx((np.log(100_000) + np.euler_gamma) / 100_000, rel=1e-4)


# ---- chance ----


def test_interval_covers_the_mean_and_repeats():
    values = np.random.default_rng(0).random(400)
    low, high = metrics.interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)
    assert metrics.interval(values) == (low, high)
    assert metrics.interval(values, seed=1) != (low, high)
    narrow = metrics.interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_interval_of_equal_values_is_a_point():
    assert metrics.interval(np.ones(10)) == (1, 1)


def test_interval_of_a_mean_over_groups():
    """Groups count alike however large they are, and each is drawn from itself."""
    random = np.random.default_rng(0)
    groups = [random.random(900), 3 + random.random(100)]
    low, high = metrics.mean_interval(groups)
    mean = (groups[0].mean() + groups[1].mean()) / 2
    half = 1.96 * np.hypot(groups[0].std() / 30, groups[1].std() / 10) / 2
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.003)
    assert metrics.mean_interval(groups[:1]) == metrics.interval(groups[0])


def test_intervals_of_every_metric_take_less_than_a_second():
    rng = np.random.default_rng(0)
    rows = rng.permuted(np.tile(np.arange(1000), (710, 1)), axis=1)
    positives = [{int(row): 1.0} for row in rng.integers(1000, size=710)]
    case = made(positives, 1000, names=("recall@1", "recall@10", "mrr", "map@10", "ndcg@10"))
    start = time.process_time()
    found = metrics.intervals(rows, case)
    assert time.process_time() - start < 1
    means = metrics.evaluate(rows, case)
    assert all(low <= means[name] <= high for name, (low, high) in found.items())


def test_paired_p_is_the_share_of_sign_flips():
    first, second = np.array([1.0, 0.5, 1.0, 0.2, 0.9]), np.array([0.0, 0.5, 0.0, 0.6, 0.1])
    gap = first - second
    flips = np.array(list(itertools.product((-1, 1), repeat=5)))
    exact = (abs(flips @ gap) >= abs(gap.sum()) - 1e-9).mean()
    assert metrics.paired_p(first, second) == pytest.approx(exact, abs=0.02)
    assert metrics.paired_p(second, first) == pytest.approx(exact, abs=0.02)


def test_paired_p_of_equal_and_of_different_systems():
    rng = np.random.default_rng(0)
    values = (rng.random(500) < 0.5).astype(float)
    assert metrics.paired_p(values, values) == 1
    assert metrics.paired_p(values, np.zeros(500)) == pytest.approx(1 / 10_001)
    with pytest.raises(ValueError, match=r"\(500,\) and \(3,\)"):
        metrics.paired_p(values, values[:3])


def test_paired_p_is_uniform_under_the_null():
    rng = np.random.default_rng(1)
    pairs = rng.random((200, 2, 30))
    small = [metrics.paired_p(a, b, resamples=400) <= 0.1 for a, b in pairs]
    assert 0.04 < np.mean(small) < 0.17


# ---- what is refused ----


@pytest.mark.parametrize(
    "name", ["recall", "recall@0", "recall@-1", "precision@5", "mrr@", "", "mean()", "mean(mrr,)"]
)
def test_unknown_metrics_are_refused(name):
    with pytest.raises(ValueError, match=r"no metric is named .*there are recall@k"):
        metrics.evaluate(np.array([[0]]), made([{0: 1.0}], 1), [name])


def test_faulty_hits_are_refused():
    case = made([{0: 1.0}, {1: 1.0}], 4)
    with pytest.raises(ValueError, match="hits of query 1 name gallery row 3 more than once"):
        metrics.evaluate(np.array([[0, 1], [3, 3]]), case)
    with pytest.raises(ValueError, match=r"rows is float64 \(2, 2\)"):
        metrics.evaluate(np.zeros((2, 2)), case)
    with pytest.raises(ValueError, match=r"rows is int64 \(1, 1\); .* for 2 queries"):
        metrics.evaluate(np.array([[0]]), case)
    with pytest.raises(ValueError, match="hits name rows 0 to 4; the gallery has 4"):
        metrics.evaluate(np.array([[0], [4]]), case)


def test_lists_too_short_for_a_metric_are_refused():
    case = made([{0: 1.0}], 9, exclude=[2], names=("recall@3",))
    with pytest.raises(ValueError, match=r"recall@3 cannot be told for 1 of 1 .* search 4 hits"):
        metrics.evaluate(np.array([[1, 2, 3]]), case)
    assert metrics.evaluate(np.array([[1, 2, 3, 0]]), case) == {"recall@3": 1}
    assert metrics.evaluate(np.array([[1, 3, 0]]), case) == {"recall@3": 1}
    assert metrics.evaluate(np.array([[1, 2, -1]]), case) == {"recall@3": 0}
    whole = made([{0: 1.0}], 2, names=("recall@5",))
    assert metrics.evaluate(np.array([[1, 0]]), whole) == {"recall@5": 1}


def test_cut_lists_bound_mrr_and_subset_recall_from_below():
    rows, case = random_case(0)
    for name in ("mrr", "subset_recall@1"):
        cut = metrics.per_query(rows[:, :4], case, [name])[name]
        assert (cut <= metrics.per_query(rows, case, [name])[name]).all()


def test_queries_without_answers_are_refused():
    with pytest.raises(ValueError, match=r"made/v/test: 1 of 2 queries have no right answer"):
        metrics.evaluate(np.array([[0], [1]]), made([{0: 1.0}, {}], 2))
    with pytest.raises(ValueError, match="no right answer"):
        metrics.random_level(made([{0: 1.0}], 2, exclude=[0]))


def test_subset_metrics_need_subsets():
    with pytest.raises(ValueError, match=r"subset_recall@1: made/v has no subsets"):
        metrics.evaluate(np.array([[0]]), made([{0: 1.0}], 1), ["subset_recall@1"])
