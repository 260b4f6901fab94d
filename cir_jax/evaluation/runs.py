"""One run of an evaluation: what is retrieved and re-ranked, and the rows of results.json that tell of it."""

import functools
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax import files
from cir_jax.config import Run
from cir_jax.data import benchmark_parts
from cir_jax.data.benchmark import Chosen
from cir_jax.data.documents import BUILTIN
from cir_jax.evaluation import metrics, submissions
from cir_jax.typed import to_json
from cir_jax.workspace import Outcome, Workspace, digest

TIMED = 10  # hits of the searches that are timed, and compared between indexes
SCANN_DEPTH = 100  # how many hits are asked of an approximate index
LISTED = 200  # hits of each query that are kept, if the metrics do not need more
CATEGORISED = (
    "fashioniq",
)  # benchmarks whose variants are categories, over which papers take the mean
SECOND = ("reranker", "k", "fusion", "restricted")  # what distinguishes second stages
SCANN_RECALL = 0.99  # what a ScaNN index is tuned to, against the exact list


def measure(
    model, name: str, retriever: str = "", k: int = 50, work: Workspace | None = None
) -> dict[str, float]:
    """Metrics of a model on a benchmark with exact search; used during training, by all processes together.

    A re-ranker is measured on the k best candidates of the model that `retriever` names; a `work` space that is given
    again has them, and the benchmark, at hand.
    """
    from cir_jax.retrieval import Queries, rerank, score_candidates

    work = work or Workspace()
    benchmark = work.benchmark(name)
    if not retriever:
        return metrics.evaluate(_exact_hits(model, benchmark, 1).rows, benchmark)
    find = lambda: _exact_hits(work.model(retriever), benchmark, k)
    hits = work.once("candidates", (retriever, name, k), find)
    asked = Queries(benchmark.queries, 2, BUILTIN)
    pictures = lambda rows: [benchmark.gallery[row] for row in rows]
    scores = score_candidates(model, asked, pictures, hits.rows[:, :k], together=True)
    hits = rerank(hits, scores)
    return metrics.evaluate(hits.rows, benchmark)


def _exact_hits(model, benchmark, least: int):
    """Hits of a retriever on a benchmark: as many as its metrics need, and at least so many."""
    from cir_jax.index import ExactIndex
    from cir_jax.retrieval import Queries, retrieve

    index = ExactIndex(model.encode("item", benchmark.gallery, together=True))
    queries = model.encode("query", Queries(benchmark.queries, 1, BUILTIN), together=True)
    depth = min(max(metrics.depth(benchmark), least), len(index))
    return retrieve(index, queries, depth, benchmark.exclude)


def asked_in(run: Run, stage: int, queries, work: Workspace):
    """What raw queries ask in a stage of a run."""
    from cir_jax.evaluation.audit import Alone
    from cir_jax.retrieval import Queries

    asked = Queries(queries, stage, run.documents)
    if run.asks == "all":
        return asked
    return Alone(asked, run.asks, work.model(run.retriever if stage == 1 else run.reranker).config)


def _vectors(run: Run, work: Workspace):
    """(query vectors, item vectors, milliseconds per query spent encoding) of a run's benchmark."""
    model, benchmark = work.model(run.retriever), work.benchmark(run.benchmark)
    items = work.items(model, run.benchmark)
    asked = list(asked_in(run, 1, benchmark.queries, work))
    encode = functools.partial(model.encode, "query", asked, work.batch_size, together=True)
    encode()  # compiles, so that the timed pass does not
    start = time.perf_counter()
    queries = encode()
    return queries, items, 1000 * (time.perf_counter() - start) / max(1, len(benchmark.queries))


@dataclass
class _Scored:
    """What a re-ranker has scored on a benchmark, so that no pair is scored twice, and how long that took."""

    pairs: dict[tuple[int, int], float] = field(default_factory=dict)  # by (query, gallery row)
    milliseconds: float = 0.0


def _candidate_scores(
    run: Run, rows: np.ndarray, items, work: Workspace
) -> tuple[np.ndarray, float]:
    """Scores `[Q, K]` float32 of the run's re-ranker, and its milliseconds per pair so far, compilation included."""
    asked = (run.reranker, run.benchmark, run.documents, run.asks)
    scored = work.once("scored", asked, _Scored)
    missing = rows.copy()
    for query, place in zip(*np.nonzero(rows >= 0)):
        if (query, rows[query, place]) in scored.pairs:
            missing[query, place] = -1
    scores, milliseconds = work.scores(origin(run, work), missing, _scorer(run, items, work))
    scored.milliseconds += milliseconds
    new = zip(*np.nonzero(missing >= 0))
    scored.pairs.update({(q, missing[q, place]): scores[q, place] for q, place in new})
    get = lambda query, row: scored.pairs.get((query, row), -np.inf)
    found = [[get(query, row) for row in each] for query, each in enumerate(rows)]
    return np.array(found, np.float32), scored.milliseconds / max(1, len(scored.pairs))


def _scorer(run: Run, items, work: Workspace):
    """What scores the candidates of some queries of a run; see `workspace.Score`."""
    from cir_jax.retrieval import score_by_vectors, score_candidates

    model, benchmark = work.model(run.reranker), work.benchmark(run.benchmark)
    pictures = lambda rows: [benchmark.gallery[row] for row in rows]

    def score(rows, first, advance):
        some = Chosen(benchmark.queries, range(first, first + len(rows)))
        asked = asked_in(run, 2, some, work)
        if run.reranker == run.retriever:
            return score_by_vectors(model, asked, items, rows, together=True)
        return score_candidates(model, asked, pictures, rows, advance, together=True)

    return score


def _members(run: Run, stage: int, queries, items, work: Workspace):
    """Hits in the closed group of each query, every member of which a stage scores, found or not; None without groups.

    No approximate index comes between; equal scores are ordered by row.
    """
    from cir_jax.index import Hits
    from cir_jax.retrieval import rerank, scores_of

    closed = work.benchmark(run.benchmark).subset
    if not len(closed):
        return None
    width = max(map(len, closed))
    rows = np.array([[*sorted(each), *[-1] * (width - len(each))] for each in closed])
    scores = (
        scores_of(queries, items, rows)
        if stage == 1
        else _candidate_scores(run, rows, items, work)[0]
    )
    return rerank(Hits(rows, np.zeros(rows.shape, np.float32)), scores)


def values_of_queries(benchmark, hits, members, rank) -> dict[str, np.ndarray]:
    """Each metric for each query, from its list, the hits in its group, and the rank of its best right answer.

    Without `members` those of groups are left out.
    """
    grouped = lambda name: any(p.startswith("subset_") for p in metrics.components(name))
    names = [name for name in benchmark.metrics if members is not None or not grouped(name)]
    parts = list(dict.fromkeys(p for name in names for p in metrics.components(name)))
    near = [part for part in parts if part.startswith("subset_")]
    listed = [part for part in parts if part not in near and part != "mrr"]
    found = metrics.per_query(hits.rows, benchmark, listed)
    found |= metrics.per_query(members.rows, benchmark, near) if near else {}
    found["mrr"] = np.where(rank < 0, 0.0, 1 / (1 + np.maximum(rank, 0)))
    return {name: metrics.combined(name, found) for name in names}


def _tuning_queries(run: Run, work: Workspace) -> np.ndarray | None:
    """Query vectors of the validation split, on which an approximate index is tuned.

    None if that is evaluated, or if there is none because the benchmark is a folder of one's own.
    """
    from cir_jax.data import tuning_benchmark
    from cir_jax.retrieval import Queries

    name = tuning_benchmark(run.benchmark)
    if name is None:
        return None
    asked = Queries(work.benchmark(name).queries, 1, run.documents)
    vectors = work.model(run.retriever).encode("query", asked, work.batch_size, together=True)
    return vectors[0][vectors[1]] if isinstance(vectors, tuple) else vectors


def _searched(run: Run, queries, items, work: Workspace):
    """(index, deep hits for the metrics, milliseconds per query of a search for 10 with the index warm)."""
    from cir_jax.index import make_index
    from cir_jax.retrieval import retrieve

    benchmark, tuning = work.benchmark(run.benchmark), {}
    if run.index == "scann":
        tuning = {"recall": SCANN_RECALL, "k": TIMED, "queries": _tuning_queries(run, work)}
    index = make_index(run.index, items, ids=benchmark.ids, **tuning)
    k = list_depth(benchmark, run.lists) if index.kind == "exact" else SCANN_DEPTH
    k = min(max(k, run.k if run.reranker else 1), len(items))
    retrieve(index, queries, TIMED, benchmark.exclude)
    start = time.perf_counter()
    retrieve(index, queries, TIMED, benchmark.exclude)
    searching = 1000 * (time.perf_counter() - start) / len(benchmark.queries)
    return index, retrieve(index, queries, k, benchmark.exclude), searching


def list_depth(benchmark, lists: bool = False) -> int:
    """How many hits a list needs; ranks beyond it are counted, which is faster than sorting a whole gallery.

    With `lists`, as many as are written to large files too.
    """
    parts = [part for name in benchmark.metrics for part in metrics.components(name)]
    limited = [part for part in parts if part != "mrr" and not part.startswith("subset_")]
    return max(LISTED, metrics.depth(benchmark, limited), submissions.depth(benchmark, lists))


def evaluate_run(run: Run, work: Workspace) -> Outcome:
    """For each stage a row of results.json, and its arrays: `ids`, `rows`, `scores`, `rank`, and one per metric."""
    from cir_jax.retrieval import rerank

    make = _given if run.candidates else _retrieved
    first, hits, beyond, queries, items = make(run, work)
    if run.reranker is None:
        return [first]
    candidates = hits.rows[:, : run.k]
    scores, per_pair = _candidate_scores(run, candidates, items, work)
    spent = first[0]["milliseconds"] | {"rerank": per_pair * candidates.shape[1]}
    if run.restricted:
        hits, beyond = _ended(hits, run.k), np.full(len(candidates), -1)
    ranked, members = rerank(hits, scores, run.fusion), _members(run, 2, queries, items, work)
    second = _outcome(run, 2, first[0]["index"], ranked, members, beyond, spent, work)
    second[0].update(_gain(first, second))
    return [first, second]


def _retrieved(run: Run, work: Workspace):
    """(row and arrays of the first stage, its hits, ranks beyond them, query vectors, item vectors)."""
    from cir_jax.index import ExactIndex
    from cir_jax.retrieval import ranks_beyond, retrieve

    benchmark = work.benchmark(run.benchmark)
    asked = (run.retriever, run.benchmark, run.documents, run.asks)
    queries, items, encoding = work.once("vectors", asked, lambda: _vectors(run, work))
    index, hits, searching = _searched(run, queries, items, work)
    spent = {"encode": encoding, "search": searching}
    beyond = np.full(len(benchmark.queries), -1)
    if index.kind == "exact":
        beyond = ranks_beyond(queries, items, hits, benchmark.positives, benchmark.exclude)
    members = _members(run, 1, queries, items, work)
    first = _outcome(run, 1, index.kind, hits, members, beyond, spent, work)
    if index.kind == "scann":
        near, exact = (
            retrieve(i, queries, TIMED, benchmark.exclude) for i in (index, ExactIndex(items))
        )
        first[0]["index_recall@10"] = metrics.overlap(near.rows, exact.rows)
    return first, hits, beyond, queries, items


def _given(run: Run, work: Workspace):
    """`_retrieved` from a file of candidates: nobody knows what lies beyond, nor the order in closed groups."""
    hits = _given_hits(run, work)
    beyond = np.full(len(hits.rows), -1)
    return _outcome(run, 1, "given", hits, None, beyond, {}, work), hits, beyond, None, None


def _given_hits(run: Run, work: Workspace):
    """The lists in a file of candidates; ValueError if they do not belong to the benchmark, or are too short."""
    from cir_jax.evaluation.candidates import rows_in
    from cir_jax.index import Hits

    found = work.candidates(given_path(run))
    rows = rows_in(found, work.benchmark(run.benchmark))
    if run.reranker and run.k > rows.shape[1]:
        raise ValueError(f"{run.candidates} has {rows.shape[1]} candidates a query, k is {run.k}")
    if run.fusion is not None and found.scores is None:
        raise ValueError(f"{run.candidates} has no scores that fusion could weigh; leave it out")
    places = np.broadcast_to(-np.arange(rows.shape[1], dtype=np.float32), rows.shape)
    return _ended(Hits(rows, places if found.scores is None else found.scores), rows.shape[1])


def _ended(hits, k: int):
    """The first k hits of lists that are complete with them, so that what is not in them is a miss at every cut."""
    from cir_jax.index import Hits

    end = lambda values, x: np.pad(values[:, :k], ((0, 0), (0, 1)), constant_values=x)
    return Hits(end(hits.rows, -1), end(hits.scores, -np.inf))


def _outcome(run: Run, stage: int, index: str, hits, members, beyond, spent, work: Workspace):
    """Row and arrays of one stage.

    Args:
      index: what kind found the candidates; `given` if a file holds them.
      hits, members: its lists, and those of the closed groups.
      beyond: `[Q]` ranks of right answers that lie beyond the lists, -1 where nobody knows.
      spent: milliseconds per query of each part.
    """
    benchmark = work.benchmark(run.benchmark)
    rank = metrics.ranks(hits.rows, benchmark.positives, benchmark.exclude)
    rank = np.where(rank < 0, beyond, rank)
    labelled = any(benchmark.positives)  # else the benchmark's server knows the answers
    values = values_of_queries(benchmark, hits, members, rank) if labelled else {}
    identities = [_first_identity(run, work)]
    identities += [_identity(run.reranker, work)] if stage == 2 else []
    row = {
        "benchmark": benchmark.name,
        "variant": benchmark.variant,
        "split": benchmark.split,
        "run": run.retriever or run.candidates,
        "stage": stage,
        "index": index,
        "index_asked": run.index,
        "queries": len(benchmark.queries),
        "gallery": len(benchmark.gallery),
        "missing": dict(benchmark.missing),
        "depth": hits.rows.shape[1],
        **_summary(values),
        "random": metrics.random_level(
            benchmark, list(values), length=None if index == "exact" else hits.rows.shape[1]
        )
        if labelled
        else {},
        "milliseconds_per_query": sum(spent.values()),
        "milliseconds": dict(spent),
        "checkpoints": identities,
    }
    if len(benchmark.rules) and labelled:
        row["rules"] = metrics.by_rule(values, benchmark.rules)
    if run.documents != BUILTIN:
        row["documents"] = to_json(run.documents)
    if run.asks != "all":
        row["asks"] = run.asks
    if stage == 2:
        row |= {"candidate_recall": _candidate_recall(run, hits, benchmark)} if labelled else {}
        row |= {"reranker": run.reranker, "k": run.k, "fusion": run.fusion}
        row |= {"restricted": True} if run.restricted else {}
    row["median_rank"] = metrics.median_rank(rank)
    ids = np.array([str(query.get("id", number)) for number, query in enumerate(benchmark.queries)])
    arrays = {"ids": ids, "rows": hits.rows, "scores": hits.scores, "rank": rank, **values}
    if members is not None:
        arrays["members"] = members.rows
    if len(benchmark.rules):
        arrays["rules"] = metrics.joined_rules(benchmark.rules)
    return row, arrays


def _candidate_recall(run: Run, hits, benchmark) -> float:
    """The share of queries with a right answer among the candidates, which bounds what a second stage can do."""
    found = metrics.ranks(hits.rows[:, : run.k], benchmark.positives, benchmark.exclude)
    return float((found >= 0).mean())


def _identity(name: str, work: Workspace) -> dict[str, str]:
    model = work.model(name)
    return {
        "name": name,
        "fingerprint": model.fingerprint,
        "identity": model.identity,
        "dtype": model.config.dtype,
        "inputs": to_json(model.config.inputs),
    }


def _first_identity(run: Run, work: Workspace) -> dict[str, Any]:
    """What made the first stage: a model, or the file of candidates by its content."""
    if run.retriever:
        return _identity(run.retriever, work)
    path = given_path(run)
    mark, made = work.candidates_digest(path), work.candidates(path).model
    told = f"candidates {path} {mark}{f' of model {made}' if made else ''}"
    return {"name": path, "fingerprint": mark, "identity": told}


def given_path(run: Run) -> str:
    """The file of candidates for the benchmark of a run."""
    variant = benchmark_parts(run.benchmark)[1].partition("-")[0]
    return run.candidates.replace("{variant}", variant)


def _gain(first, second) -> dict[str, dict[str, float]]:
    """What the second stage changed in each metric that both have, and the p-value of a paired randomisation test."""
    values = {name: (first[1][name], second[1][name]) for name in first[0]["metrics"]}
    return {
        "gain": {name: float((after - before).mean()) for name, (before, after) in values.items()},
        "p": {name: metrics.paired_p(after, before) for name, (before, after) in values.items()},
    }


def _summary(values) -> dict[str, dict]:
    """Mean and 95 % interval of each metric over queries."""
    return {
        "metrics": {name: float(v.mean()) for name, v in values.items()},
        "interval": {name: list(metrics.interval(v)) for name, v in values.items()},
    }


def pooled(results: list[tuple[dict, dict]]) -> list[dict[str, Any]]:
    """One more row for each evaluation in several variants.

    Of the same queries (the emoji, drawn in several styles) it is every query's mean over the variants, with an
    interval over queries. Of FashionIQ's categories, each with queries and a gallery of its own, it is the mean over
    categories, large or small; its queries are drawn within their category.
    """
    groups = defaultdict(dict)
    for row, arrays in results:
        style, _, flags = row["variant"].partition("-")
        asked = digest([row.get("documents"), row.get("asks")])
        first = (row["benchmark"], flags, row["split"], row["run"], row["index_asked"], asked)
        second = tuple(row.get(name) for name in SECOND)
        groups[first, second].setdefault(style, (row, arrays))
    means = {}
    for (first, second), each in groups.items():
        same = len({tuple(arrays["ids"]) for _, arrays in each.values()}) == 1
        if len(each) > 1 and (same or first[0].partition(":")[0] in CATEGORISED):
            make = _mean_outcome if same else _mean_of_categories
            means[first, second] = make(first[1], each.keys(), *zip(*each.values()))
    for (first, _), mean in means.items():
        if mean[0]["stage"] == 2:
            mean[0].update(_gain(means[first, (None,) * len(SECOND)], mean))
    return [row for row, _ in means.values()]


def _mean_outcome(flags, styles, rows, arrays):
    """Row and arrays of the mean over styles of one stage of an evaluation."""
    values = {name: np.mean([a[name] for a in arrays], axis=0) for name in rows[0]["metrics"]}
    return _mean_row(flags, styles, rows) | _summary(values), values


def _mean_of_categories(flags, categories, rows, arrays):
    """Row and arrays of the mean over categories; values are weighted so that their mean over all queries is it."""
    names, queries = rows[0]["metrics"], [row["queries"] for row in rows]
    mean = _mean_row(flags, categories, rows)
    mean |= {
        "queries": sum(queries),
        "gallery": sum(row["gallery"] for row in rows),
        "missing": {n: sum(row["missing"][n] for row in rows) for n in rows[0]["missing"]},
        "metrics": {name: float(np.mean([row["metrics"][name] for row in rows])) for name in names},
        "interval": {
            name: list(metrics.mean_interval([a[name] for a in arrays])) for name in names
        },
    }
    weights = [sum(queries) / (len(rows) * count) for count in queries]
    weigh = lambda name: np.concatenate([w * a[name] for w, a in zip(weights, arrays)])
    return mean, {name: weigh(name) for name in names}


def _mean_row(flags, styles, rows):
    """What the row of a mean says beside its metrics."""
    mean = {k: v for k, v in rows[0].items() if k not in ("ranks", "rules", "median_rank")}
    mean["variant"] = "-".join(filter(None, ("+".join(styles), flags)))
    for name in ("milliseconds_per_query", "index_recall@10", "candidate_recall"):
        if name in mean:
            mean[name] = float(np.mean([row[name] for row in rows]))
    for name in ("milliseconds", "random"):
        mean[name] = {k: float(np.mean([row[name][k] for row in rows])) for k in mean[name]}
    return mean


def check_run(run: Run, work: Workspace) -> None:
    """Refuse, before anything is computed, a run that would tell nothing, or whose models cannot read the queries."""
    from cir_jax.evaluation.audit import composed
    from cir_jax.methods import METHODS, method_name, reranks
    from cir_jax.methods import kinds as item_kinds
    from cir_jax.model import as_example
    from cir_jax.retrieval import as_query

    benchmark = work.benchmark(run.benchmark)
    if not any(benchmark.positives) and not submissions.has_server(benchmark):
        raise ValueError(
            f"the answers of {run.benchmark} are not published, so that nothing can be measured here"
        )
    if run.candidates:
        _given_hits(run, work)
    if run.retriever and reranks(work.model(run.retriever).config):
        raise ValueError(f"{run.retriever} is a re-ranker; a run needs a retriever before it")
    if run.asks != "all" and not composed(benchmark):
        raise ValueError(
            f"{run.benchmark} asks with no picture and text together, so it cannot ask with the {run.asks} alone"
        )
    for stage, name in enumerate((run.retriever, run.reranker), 1):
        if not name:
            continue
        asked = as_query(benchmark.queries[0], stage, run.documents)
        several = ("texts", "wordings")
        parts = {"text" if part in several else part: value for part, value in asked.items()}
        kinds = METHODS[method_name(work.model(name).config)][1].query_kinds
        as_example("query", parts, kinds, name)
        items = item_kinds(work.model(name).config, "item")
        as_example("item", benchmark.gallery[0], items, name)


def origin(run: Run, work: Workspace) -> list:
    """What the scores of a run depend on: models and data. Runs that differ only in index, k or fusion share them."""
    names = filter(None, (run.retriever, run.reranker))
    models = [work.model(name).fingerprint for name in names]
    models += [work.candidates_digest(given_path(run))] if run.candidates else []
    extracts = Path(run.documents.source)
    contents = [work.content(run.benchmark), extracts.is_file() and files.sha256(extracts)]
    return [models, contents, to_json(run.documents), run.asks]
