"""How well ranked lists answer a benchmark: pure numpy, on rows.

Metrics of a query are fractions:
- recall@k: 1 if any right answer is among the first k hits (trec_eval's `success`);
- target_recall@k: the same for the right answers of the highest grade alone (CIRCO, which has one target among
  several right answers);
- trec_recall@k: the share of all right answers among the first k hits (trec_eval's `recall`, as AToMiC's);
- subset_recall@k: recall@k after everything outside the query's subset is struck out (CIRR);
- mrr: 1 / rank of the first right answer; mrr@k: 0 beyond k;
- map@k: precision at each right answer of the first k, summed, over min(k, right answers) (CIRCO);
- ndcg@k: grades discounted by 1 / log2(rank + 1), over the best order possible;
- mean(a,b,…): the mean of some of these, for the figures that papers compare by, as
  `mean(recall@5,subset_recall@1)` on CIRR.
The reference picture of a query (`Benchmark.exclude`) is taken out before anything is counted; where an original keeps
it in its rankings (FashionIQ, CIRCO), the benchmark has no `exclude`. A right answer that is not in a list counts as
not found, so for mrr and subset_recall lists shorter than the gallery give a lower bound.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cir_jax.data.benchmark import Benchmark

TOSSED = 256  # queries whose signs are tossed at once; a multiple of 8
_UNLIMITED = ("mrr", "subset_recall")  # a right answer counts wherever it stands
_NAME = re.compile(r"(recall|target_recall|trec_recall|subset_recall|map|ndcg|mrr)@([1-9]\d*)|mrr")
_MEAN = re.compile(r"mean\(([^()]+)\)")


class _Judged(NamedTuple):
    """Lists and truth, ready to be counted; references are out."""

    grades: np.ndarray  # [Q, K] float64, 0 where wrong
    inside: np.ndarray  # [Q, K] bool, in the query's subset
    filled: np.ndarray  # [Q] number of hits
    complete: np.ndarray  # [Q] bool, nothing follows the list
    cases: list["_Case"]


class _Case(NamedTuple):
    """What a query asks of a ranking, whatever the ranking is."""

    items: int  # gallery without the reference
    grades: tuple[float, ...]  # of all right answers, descending
    best: int  # of them those of the highest grade
    near: int  # subset without the reference
    near_right: int  # right answers in it


def ranks(
    rows: np.ndarray, positives: Sequence[Mapping[int, float]], exclude: Sequence[int] = ()
) -> np.ndarray:
    """0-based rank of the best right answer per query, `[Q]` int64; -1 if none is in the list.

    Args:
      rows: hits `[Q, K]`, best first; -1 is a missing hit.
      positives: per query, gallery row -> grade.
      exclude: per query, a row that is taken out of the list first, or -1; empty for none.
    """
    right = _grades(_without(_checked(rows, len(positives)), exclude), positives) > 0
    return np.where(right.any(axis=1), right.argmax(axis=1), -1)


def evaluate(
    rows: np.ndarray, benchmark: Benchmark, metrics: Sequence[str] | None = None
) -> dict[str, float]:
    """The mean of each metric over the queries; see `per_query`."""
    return {name: float(v.mean()) for name, v in per_query(rows, benchmark, metrics).items()}


def per_query(
    rows: np.ndarray, benchmark: Benchmark, metrics: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Each metric for each query, `{name: [Q] float64}`.

    Args:
      rows: hits `[Q, K]` in the gallery of the benchmark, best first; -1 is a missing hit. `depth`
        tells how many hits are enough.
      metrics: names; those of the benchmark if None.

    Raises:
      ValueError: an unknown metric, a query without right answers, a row twice in one list, or
        lists shorter than the k of a metric. A list that ends with -1 is complete, however short.
    """
    names = tuple(benchmark.metrics if metrics is None else metrics)
    parts = {part: _parse(part, benchmark) for name in names for part in components(name)}
    judged = _judge(rows, benchmark)
    _check_depth(judged, parts, benchmark)
    found = {part: _VALUES[kind](judged, k) for part, (kind, k) in parts.items()}
    return {name: combined(name, found) for name in names}


def components(name: str) -> tuple[str, ...]:
    """The metrics that a metric is the mean of; of one that is no mean itself alone."""
    match = _MEAN.fullmatch(name)
    return tuple(match[1].replace(" ", "").split(",")) if match else (name,)


def combined(name: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """A metric `[Q]` from the values of its `components`."""
    return np.mean([values[part] for part in components(name)], axis=0)


def depth(benchmark: Benchmark, metrics: Sequence[str] | None = None) -> int:
    """Hits per query that give every metric exactly: all for mrr and subsets, else the largest k.

    Where queries have a reference, one more, since it may be among them.
    """
    names = benchmark.metrics if metrics is None else metrics
    wanted = [_parse(part, benchmark) for name in names for part in components(name)]
    items = len(benchmark.gallery)
    if any(kind in _UNLIMITED for kind, _ in wanted):
        return items
    largest = max((k for _, k in wanted), default=1)
    return min(items, largest + any(row >= 0 for row in benchmark.exclude))


def by_rule(
    values: Mapping[str, np.ndarray], rules: Sequence[str | Sequence[str]]
) -> dict[str, dict[str, float | int]]:
    """Means per kind of query, `{rule: {"queries": n, metric: mean}}`, sorted by rule.

    Args:
      values: metric -> `[Q]`.
      rules: per query its kind, or several (CIRCO's aspects): then it counts in each of them.
    """
    table = {}
    for rule, chosen in of_rule(rules).items():
        means = {name: float(value[chosen].mean()) for name, value in values.items()}
        table[rule] = {"queries": len(chosen), **means}
    return table


def of_rule(rules: Sequence[str | Sequence[str]]) -> dict[str, np.ndarray]:
    """The queries of each kind, `{rule: rows}`, sorted by rule."""
    members = defaultdict(list)
    for query, rule in enumerate(rules):
        for each in dict.fromkeys((rule,) if isinstance(rule, str) else rule):
            members[str(each)].append(query)
    return {rule: np.array(members[rule]) for rule in sorted(members)}


def joined_rules(rules: Sequence[str | Sequence[str]]) -> np.ndarray:
    """Kinds of queries as an array of text `[Q]`, several of one query in lines; `split_rules` gives them back."""
    return np.array(
        [rule if isinstance(rule, str) else "\n".join(rule) for rule in rules], dtype=str
    )


def split_rules(joined: np.ndarray) -> list[tuple[str, ...]]:
    """Kinds per query from `joined_rules`."""
    return [tuple(str(rule).split("\n")) if rule else () for rule in joined]


def median_rank(rank: np.ndarray) -> float | None:
    """The median of 1-based ranks, given 0-based ones `[Q]` (`ranks`); None if it lies outside the lists.

    A right answer outside its list has a rank beyond all others.
    """
    rank = np.asarray(rank, np.float64)
    median = np.median(np.where(rank < 0, np.inf, rank + 1)) if len(rank) else np.inf
    return float(median) if np.isfinite(median) else None


def interval(
    values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of the mean of `values` `[Q]` over queries.

    The same seed gives the same answer.
    """
    return mean_interval([values], level, resamples, seed)


def mean_interval(
    groups: Sequence[np.ndarray], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """`interval` of the mean over groups of the mean of each group's values, whatever their sizes.

    Queries are drawn within their group (FashionIQ's categories).
    """
    random = np.random.default_rng(seed)
    means = np.mean([_resampled(values, resamples, random) for values in groups], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(values, resamples, random):
    """Means `[resamples]` of values drawn with replacement."""
    levels, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    # Drawing queries with replacement and counting equal values is one multinomial draw.
    draws = random.multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    return draws @ levels / counts.sum()


def intervals(
    rows: np.ndarray, benchmark: Benchmark, metrics: Sequence[str] | None = None, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The 95 % bootstrap interval of each metric; see `per_query` and `interval`."""
    values = per_query(rows, benchmark, metrics)
    return {name: interval(value, seed=seed) for name, value in values.items()}


def paired_p(
    first: np.ndarray, second: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value that two systems, on the same queries `[Q]`, differ only by chance.

    Randomisation test: per query, which system gave which value is tossed anew. Never below
    1 / (resamples + 1).
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"values of {first.shape} and {second.shape} queries; "
            f"a paired test needs both systems' values for the same queries"
        )
    gap = first - second
    sizes, counts = np.unique(np.abs(gap[gap != 0]), return_counts=True)
    random, many = np.random.default_rng(seed), counts > 1
    # Gaps of one size that keep their sign are a binomial number; of a size that occurs once they are a bit.
    kept = random.binomial(counts[many], 0.5, size=(resamples, many.sum()))
    sums = (2 * kept - counts[many]) @ sizes[many]
    single = sizes[~many]
    for start in range(0, len(single), TOSSED):
        some = single[start : start + TOSSED]
        bits = np.unpackbits(np.frombuffer(random.bytes(resamples * TOSSED // 8), np.uint8))
        sums += (2.0 * bits.reshape(resamples, TOSSED)[:, : len(some)] - 1) @ some
    return float((1 + (np.abs(sums) >= abs(gap.sum()) - 1e-9).sum()) / (resamples + 1))


def random_level(
    benchmark: Benchmark, metrics: Sequence[str] | None = None, length: int | None = None
) -> dict[str, float]:
    """What random order reaches in expectation, computed exactly.

    Args:
      length: of the lists, for `mrr`; the whole gallery without the reference if None.
    """
    names = benchmark.metrics if metrics is None else metrics
    counts = Counter(_cases(benchmark))
    levels = {}
    for part in dict.fromkeys(part for name in names for part in components(name)):
        kind, k = _parse(part, benchmark)
        expected = _EXPECTED[kind]
        total = sum(
            count * expected(case, k, min(length or case.items, case.items))
            for case, count in counts.items()
        )
        levels[part] = float(total / counts.total())
    return {name: float(combined(name, levels)) for name in names}


def overlap(rows: np.ndarray, exact: np.ndarray) -> float:
    """The share of exact hits `[Q, K]` that `rows` `[Q, K']` hold too, in any order."""
    wanted = np.asarray(exact) >= 0
    if not wanted.any() or len(rows) != len(exact):
        raise ValueError(f"nothing to compare: hits of {len(rows)} and {len(exact)} queries")
    found = (np.asarray(exact)[:, :, None] == np.asarray(rows)[:, None, :]).any(axis=2)
    return float((found & wanted).sum() / wanted.sum())


def _parse(name, benchmark):
    """(kind, k) of a metric's name."""
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f"no metric is named {name!r}; "
            f"there are recall@k, target_recall@k, trec_recall@k, subset_recall@k, map@k, ndcg@k, mrr@k, mrr "
            f"and mean(…) of some of them"
        )
    if match[1] == "subset_recall" and not benchmark.subset:
        raise ValueError(f"{name}: {benchmark.name}/{benchmark.variant} has no subsets")
    kind = "mrr" if match[1] is None else "mrr@" if match[1] == "mrr" else match[1]
    return kind, int(match[2] or 1)


def _checked(rows, queries):
    """`rows` as `[Q, K]` integers without repetitions."""
    rows = np.asarray(rows)
    if rows.ndim != 2 or len(rows) != queries or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(
            f"rows is {rows.dtype} {rows.shape}; expected integers [Q, K] for {queries} queries"
        )
    if not rows.shape[1]:
        rows = np.full((queries, 1), -1)
    return without_repetition(rows)


def without_repetition(rows: np.ndarray) -> np.ndarray:
    """`rows` `[Q, K]` as int64; ValueError if a list names a row more than once (-1 counts for nothing)."""
    order = np.sort(rows, axis=1)
    again = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)
    if again.any():
        query = int(again.any(axis=1).argmax())
        row = order[query, 1:][again[query]][0]
        raise ValueError(f"the hits of query {query} name gallery row {row} more than once")
    return rows.astype(np.int64)


def _without(rows, exclude):
    """Lists with one row struck out and the rest moved up; -1 fills the end."""
    if not len(exclude):
        return rows
    struck = (rows == np.asarray(exclude)[:, None]) & (rows >= 0)
    order = np.argsort(struck, axis=1, kind="stable")
    return np.where(
        np.take_along_axis(struck, order, 1), -1, np.take_along_axis(rows, order, axis=1)
    )


def _grades(rows, positives):
    """The grade of each hit, `[Q, K]` float64; 0 where it is no right answer."""
    pairs = [(q, row, grade) for q, found in enumerate(positives) for row, grade in found.items()]
    return _looked_up(rows, pairs)


def _members(rows, lists):
    """Whether each hit is in its query's list, `[Q, K]` bool."""
    return _looked_up(rows, [(q, row, 1) for q, found in enumerate(lists) for row in found]) > 0


def _looked_up(rows, pairs):
    """Values `[Q, K]` of hits by (query, row, value); 0 elsewhere and for missing hits."""
    if not pairs or not rows.size:
        return np.zeros(rows.shape)
    query, row, value = (np.asarray(column) for column in zip(*pairs, strict=True))
    stride = max(int(rows.max()), int(row.max())) + 1
    keys = query * stride + row
    order = np.argsort(keys)
    wanted = np.arange(len(rows))[:, None] * stride + np.maximum(rows, 0)
    place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    found = (keys[order][place] == wanted) & (rows >= 0)
    return np.where(found, value[order][place], 0).astype(np.float64)


def _truths(benchmark):
    """Right answers per query without the reference; none is an error."""
    truths = [
        {row: grade for row, grade in found.items() if row != struck and grade > 0}
        for found, struck in zip(benchmark.positives, _references(benchmark), strict=True)
    ]
    empty = [query for query, truth in enumerate(truths) if not truth]
    if empty or not truths:
        title = f"{benchmark.name}/{benchmark.variant}/{benchmark.split}"
        raise ValueError(
            f"{title}: {len(empty)} of {len(truths)} queries have no right answer "
            f"(first: {empty[:5]}); a split without labels cannot be evaluated here"
        )
    return truths


def _references(benchmark):
    return benchmark.exclude if len(benchmark.exclude) else [-1] * len(benchmark.positives)


def _cases(benchmark):
    closed = benchmark.subset if len(benchmark.subset) else [()] * len(benchmark.positives)
    cases = []
    for truth, reference, group in zip(
        _truths(benchmark), _references(benchmark), closed, strict=True
    ):
        near = set(group) - {reference}
        grades = tuple(sorted(truth.values(), reverse=True))
        items = len(benchmark.gallery) - (reference >= 0)
        best = grades.count(grades[0])
        cases.append(_Case(items, grades, best, len(near), len(near & truth.keys())))
    return cases


def _judge(rows, benchmark):
    rows = _checked(rows, len(benchmark.positives))
    items = len(benchmark.gallery)
    if rows.size and (rows.max() >= items or rows.min() < -1):
        raise ValueError(
            f"hits name rows {rows.min()} to {rows.max()}; "
            f"the gallery has {items}, and -1 stands for no hit"
        )
    cases = _cases(benchmark)
    ended = (rows < 0).any(axis=1)
    rows = _without(rows, benchmark.exclude)
    filled = (rows >= 0).sum(axis=1)
    complete = ended | (filled >= [case.items for case in cases])
    inside = _members(rows, benchmark.subset)
    return _Judged(_grades(rows, _truths(benchmark)), inside, filled, complete, cases)


def _check_depth(judged, wanted, benchmark):
    """Refuses lists that stop before the value of a metric is known."""
    for name, (kind, k) in wanted.items():
        if kind in _UNLIMITED:
            continue
        known = judged.complete | (judged.filled >= k)
        if not known.all():
            raise ValueError(
                f"{name} cannot be told for {int((~known).sum())} of {len(known)} queries: their "
                f"lists of {judged.grades.shape[1]} hits are too short; "
                f"search {depth(benchmark, [name])} hits per query"
            )


def _recall(judged, k):
    return (judged.grades[:, :k] > 0).any(axis=1).astype(np.float64)


def _target_recall(judged, k):
    best = np.array([case.grades[0] for case in judged.cases])
    return (judged.grades[:, :k] == best[:, None]).any(axis=1).astype(np.float64)


def _trec_recall(judged, k):
    right = [len(case.grades) for case in judged.cases]
    return (judged.grades[:, :k] > 0).sum(axis=1) / right


def _subset_recall(judged, k):
    first = judged.inside & (np.cumsum(judged.inside, axis=1) <= k)
    return ((judged.grades > 0) & first).any(axis=1).astype(np.float64)


def _reciprocal(judged, k=None):
    right = judged.grades[:, :k] > 0
    return np.where(right.any(axis=1), 1 / (1 + right.argmax(axis=1)), 0.0)


def _average_precision(judged, k):
    right = judged.grades[:, :k] > 0
    precision = np.cumsum(right, axis=1) / np.arange(1, right.shape[1] + 1)
    possible = [min(k, len(case.grades)) for case in judged.cases]
    return (precision * right).sum(axis=1) / possible


def _gain(judged, k):
    grades = judged.grades[:, :k]
    return grades @ _discounts(grades.shape[1]) / [_ideal(case, k) for case in judged.cases]


def _discounts(count):
    return 1 / np.log2(np.arange(2, count + 2))


def _ideal(case, k):
    grades = np.asarray(case.grades[:k])
    return grades @ _discounts(len(grades))


def _missed(items, right, count):
    """Probability that the first r of `items` in random order hold none of `right`, r = 0…count."""
    place = np.arange(min(count, items))
    return np.cumprod(np.append(1.0, np.maximum(items - right - place, 0) / (items - place)))


def _expected_reciprocal(case, _, length):
    missed = _missed(case.items, len(case.grades), length)
    return (missed[:-1] - missed[1:]) @ (1 / np.arange(1, len(missed)))


def _expected_precision(case, k, _):
    right, place = len(case.grades), np.arange(min(k, case.items))
    before = place * (right - 1) / max(case.items - 1, 1)
    total = (right / case.items * (1 + before) / (place + 1)).sum()
    return total / min(k, right)


def _expected_gain(case, k, _):
    return sum(case.grades) / case.items * _discounts(min(k, case.items)).sum() / _ideal(case, k)


# kind -> values [Q] of judged lists
_VALUES = {
    "recall": _recall,
    "target_recall": _target_recall,
    "trec_recall": _trec_recall,
    "subset_recall": _subset_recall,
    "mrr": lambda judged, _: _reciprocal(judged),
    "mrr@": _reciprocal,
    "map": _average_precision,
    "ndcg": _gain,
}

# kind -> expectation over random orders, of (case, k, length of the list)
_EXPECTED = {
    "recall": lambda case, k, _: 1 - _missed(case.items, len(case.grades), k)[-1],
    "target_recall": lambda case, k, _: 1 - _missed(case.items, case.best, k)[-1],
    "trec_recall": lambda case, k, _: min(k, case.items) / case.items,
    "subset_recall": lambda case, k, _: 1 - _missed(case.near, case.near_right, k)[-1],
    "mrr": _expected_reciprocal,
    "mrr@": lambda case, k, length: _expected_reciprocal(case, k, min(k, length)),
    "map": _expected_precision,
    "ndcg": _expected_gain,
}
