"""`python -m cir_jax.eval CONFIG [--output DIR]`: benchmarks, a table, results.json and per-query ranks."""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import platform
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from cir_jax import files, metrics
from cir_jax.commands import Limited
from cir_jax.compilation import keep_compiled
from cir_jax.config import Evaluation, Run, load_config
from cir_jax.data.benchmark import Chosen
from cir_jax.data.documents import BUILTIN
from cir_jax.progress import printable
from cir_jax.typed import to_json
from cir_jax.workspace import Outcome, Workspace, digest

SHOWN = ("recall@1", "recall@5", "recall@10", "mrr")  # in the table; the rest is in results.json
TIMED = 10  # hits of the searches that are timed, and compared between indexes
SCANN_DEPTH = 100  # how many hits are asked of an approximate index
SCANN_RECALL = 0.99  # what a ScaNN index is tuned to, against the exact list
PACKAGES = ("jax", "flax", "numpy", "scann", "pillow", "tokenizers", "cir_jax")


@dataclass(frozen=True)
class Arguments(Limited):
    """Evaluate retrieval.

    CONFIG is a .py file that defines `config = Evaluation(…)`, or the name of a packaged one (`emoji`). Prints a
    table and writes DIR/results.json, the ranks of every query, and DIR/report.html, which shows them in pictures.
    With a --limit the galleries shrink too, so the numbers are only a try. An interrupted evaluation continues when
    the same command is given again. Without a CONFIG, --check judges files of ranked lists, and --compare two results.
    """

    config: tyro.conf.Positional[str | None] = None
    output: Path | None = None
    """folder for results.json, report.html and the ranks; without it `results/CONFIG`, with variants and limit in the
    name, or `results/comparison`"""
    variant: tuple[str, ...] = ()
    """measure on these variants of the benchmarks instead (the emoji have noto and twemoji; of several the mean too)"""
    batch_size: int = 128
    """queries or pictures computed at once"""
    check: tuple[Path, ...] = ()
    """judge files for the servers of CIRR, CIRCO and FashionIQ, TREC runs, and lists of candidates (.npz, .pt)"""
    labels: Path | None = None
    """the annotation file, or qrels, that --check holds them against and scores them with"""
    compare: tuple[Path, Path] | None = None
    """two results.json, A and B, of the same benchmarks: what differs, and whether that may be chance"""

    def __post_init__(self):
        super().__post_init__()
        asked = [name for name in ("config", "check", "compare") if getattr(self, name)]
        if len(asked) != 1:
            raise ValueError(
                "give one of: a CONFIG to evaluate, files to --check, two results to --compare"
            )
        if self.labels and not self.check:
            raise ValueError("--labels belong to --check; a benchmark brings its own")


def measure(
    model, name: str, retriever: str = "", k: int = 50, work: Workspace | None = None
) -> dict[str, float]:
    """Metrics of a model on a benchmark with exact search; used during training.

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
    hits = rerank(hits, score_candidates(model, asked, pictures, hits.rows[:, :k]))
    return metrics.evaluate(hits.rows, benchmark)


def _exact_hits(model, benchmark, least: int):
    """Hits of a retriever on a benchmark: as many as its metrics need, and at least so many."""
    from cir_jax.index import ExactIndex
    from cir_jax.retrieval import Queries, retrieve

    index = ExactIndex(model.encode("item", benchmark.gallery))
    queries = model.encode("query", Queries(benchmark.queries, 1, BUILTIN))
    depth = min(max(metrics.depth(benchmark), least), len(index))
    return retrieve(index, queries, depth, benchmark.exclude)


def _vectors(run: Run, work: Workspace):
    """(query vectors, item vectors, milliseconds per query spent encoding) of a run's benchmark."""
    from cir_jax.retrieval import Queries

    model, benchmark = work.model(run.retriever), work.benchmark(run.benchmark)
    items = work.items(model, run.benchmark)
    asked = list(Queries(benchmark.queries, 1, run.documents))
    model.encode("query", asked, work.batch_size)  # compiles, so that the timed pass does not
    start = time.perf_counter()
    queries = model.encode("query", asked, work.batch_size)
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
    asked = (run.reranker, run.benchmark, run.documents)
    scored = work.once("scored", asked, _Scored)
    missing = rows.copy()
    for query, place in zip(*np.nonzero(rows >= 0)):
        if (query, rows[query, place]) in scored.pairs:
            missing[query, place] = -1
    scores, milliseconds = work.scores(_origin(run, work), missing, _scorer(run, items, work))
    scored.milliseconds += milliseconds
    new = zip(*np.nonzero(missing >= 0))
    scored.pairs.update({(q, missing[q, place]): scores[q, place] for q, place in new})
    get = lambda query, row: scored.pairs.get((query, row), -np.inf)
    found = [[get(query, row) for row in each] for query, each in enumerate(rows)]
    return np.array(found, np.float32), scored.milliseconds / max(1, len(scored.pairs))


def _scorer(run: Run, items, work: Workspace):
    """What scores the candidates of some queries of a run; see `workspace.Score`."""
    from cir_jax.retrieval import Queries, score_by_vectors, score_candidates

    model, benchmark = work.model(run.reranker), work.benchmark(run.benchmark)
    pictures = lambda rows: [benchmark.gallery[row] for row in rows]

    def score(rows, first, advance):
        some = Chosen(benchmark.queries, range(first, first + len(rows)))
        asked = Queries(some, 2, run.documents)
        if run.reranker == run.retriever:
            return score_by_vectors(model, asked, items, rows)
        return score_candidates(model, asked, pictures, rows, advance)

    return score


def _subset_values(run: Run, items, work: Workspace) -> dict[str, np.ndarray]:
    """Metrics of stage 2 over the closed group of each query, every member of which it scores, found or not."""
    from cir_jax.index import Hits
    from cir_jax.retrieval import rerank

    benchmark = work.benchmark(run.benchmark)
    names = [name for name in benchmark.metrics if name.startswith("subset_")]
    if not names:
        return {}
    width = max(map(len, benchmark.subset))
    rows = np.array([[*members, *[-1] * (width - len(members))] for members in benchmark.subset])
    scores, _ = _candidate_scores(run, rows, items, work)
    hits = rerank(Hits(rows, np.zeros(rows.shape, np.float32)), scores)
    return metrics.per_query(hits.rows, benchmark, names)


def _tuning_queries(run: Run, work: Workspace) -> np.ndarray | None:
    """Query vectors of the validation split, on which an approximate index is tuned.

    None if that is evaluated, or if there is none because the benchmark is a folder of one's own.
    """
    from cir_jax.data import BENCHMARKS, benchmark_parts
    from cir_jax.retrieval import Queries

    name, variant, split = benchmark_parts(run.benchmark)
    if split == "val" or name not in BENCHMARKS:
        return None
    asked = Queries(work.benchmark(f"{name}/{variant}/val").queries, 1, run.documents)
    vectors = work.model(run.retriever).encode("query", asked, work.batch_size)
    return vectors[0][vectors[1]] if isinstance(vectors, tuple) else vectors


def _searched(run: Run, queries, items, work: Workspace):
    """(index, deep hits for the metrics, milliseconds per query of a search for 10 with the index warm)."""
    from cir_jax.index import make_index
    from cir_jax.retrieval import retrieve

    benchmark, tuning = work.benchmark(run.benchmark), {}
    if run.index == "scann":
        tuning = {"recall": SCANN_RECALL, "k": TIMED, "queries": _tuning_queries(run, work)}
    index = make_index(run.index, items, ids=benchmark.ids, **tuning)
    k = metrics.depth(benchmark) if index.kind == "exact" else SCANN_DEPTH
    k = min(max(k, run.k if run.reranker else 1), len(items))
    retrieve(index, queries, TIMED, benchmark.exclude)
    start = time.perf_counter()
    retrieve(index, queries, TIMED, benchmark.exclude)
    searching = 1000 * (time.perf_counter() - start) / len(benchmark.queries)
    return index, retrieve(index, queries, k, benchmark.exclude), searching


def evaluate_run(run: Run, work: Workspace) -> Outcome:
    """For each stage a row of results.json, and its arrays: `ids`, `rows`, `scores`, `rank`, and one per metric."""
    from cir_jax.index import ExactIndex
    from cir_jax.retrieval import rerank, retrieve

    benchmark = work.benchmark(run.benchmark)
    asked = (run.retriever, run.benchmark, run.documents)
    queries, items, encoding = work.once("vectors", asked, lambda: _vectors(run, work))
    index, hits, searching = _searched(run, queries, items, work)
    spent = {"encode": encoding, "search": searching}
    first = _outcome(run, 1, index, hits, spent, work)
    if index.kind == "scann":
        near, exact = (
            retrieve(i, queries, TIMED, benchmark.exclude) for i in (index, ExactIndex(items))
        )
        first[0]["index_recall@10"] = metrics.overlap(near.rows, exact.rows)
    if run.reranker is None:
        return [first]
    candidates = hits.rows[:, : run.k]
    scores, per_pair = _candidate_scores(run, candidates, items, work)
    spent |= {"rerank": per_pair * candidates.shape[1]}
    ranked, members = rerank(hits, scores, run.fusion), _subset_values(run, items, work)
    second = _outcome(run, 2, index, ranked, spent, work, members)
    second[0].update(_gain(first, second))
    return [first, second]


def _outcome(run: Run, stage: int, index, hits, spent, work: Workspace, measured=None):
    """Row and arrays of one stage: its hits, milliseconds per query of each part, metrics that hits do not tell."""
    benchmark = work.benchmark(run.benchmark)
    values = metrics.per_query(hits.rows, benchmark) | (measured or {})
    models = [run.retriever, run.reranker][:stage]
    row = {
        "benchmark": benchmark.name,
        "variant": benchmark.variant,
        "split": benchmark.split,
        "run": run.retriever,
        "stage": stage,
        "index": index.kind,
        "index_asked": run.index,
        "queries": len(benchmark.queries),
        "gallery": len(benchmark.gallery),
        "depth": hits.rows.shape[1],
        **_summary(values),
        "random": metrics.random_level(benchmark, length=hits.rows.shape[1]),
        "milliseconds_per_query": sum(spent.values()),
        "milliseconds": dict(spent),
        "checkpoints": [_identity(name, work) for name in models],
    }
    if len(benchmark.rules):
        row["rules"] = metrics.by_rule(values, benchmark.rules)
    if run.documents != BUILTIN:
        row["documents"] = to_json(run.documents)
    if stage == 2:
        row |= {"reranker": run.reranker, "k": run.k, "fusion": run.fusion}
    rank = metrics.ranks(hits.rows, benchmark.positives, benchmark.exclude)
    row["median_rank"] = metrics.median_rank(rank)
    ids = np.array([str(query.get("id", number)) for number, query in enumerate(benchmark.queries)])
    arrays = {"ids": ids, "rows": hits.rows, "scores": hits.scores, "rank": rank, **values}
    if len(benchmark.rules):
        arrays["rules"] = metrics.joined_rules(benchmark.rules)
    return row, arrays


def _identity(name: str, work: Workspace) -> dict[str, str]:
    model = work.model(name)
    return {"name": name, "fingerprint": model.fingerprint, "identity": model.identity}


def _gain(first, second) -> dict[str, dict[str, float]]:
    """What the second stage changed in each metric, and the p-value of a paired randomisation test."""
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
    """One more row for each evaluation of the same queries in several variants: every query's mean over them.

    The variants of the emoji are drawing styles. The interval is over queries.
    """
    groups = defaultdict(dict)
    for row, arrays in results:
        style, _, flags = row["variant"].partition("-")
        asked = digest(row.get("documents"))
        first = (row["benchmark"], flags, row["split"], row["run"], row["index_asked"], asked)
        second = tuple(row.get(name) for name in ("reranker", "k", "fusion"))
        groups[first, second].setdefault(style, (row, arrays))
    means = {
        (first, second): _mean_outcome(first[1], each.keys(), *zip(*each.values()))
        for (first, second), each in groups.items()
        if len(each) > 1 and len({tuple(arrays["ids"]) for _, arrays in each.values()}) == 1
    }
    for (first, _), mean in means.items():
        if mean[0]["stage"] == 2:
            mean[0].update(_gain(means[first, (None, None, None)], mean))
    return [row for row, _ in means.values()]


def _mean_outcome(flags, styles, rows, arrays):
    """Row and arrays of the mean over styles of one stage of an evaluation."""
    values = {name: np.mean([a[name] for a in arrays], axis=0) for name in rows[0]["metrics"]}
    mean = {k: v for k, v in rows[0].items() if k not in ("ranks", "rules")}
    mean |= {"variant": "-".join(filter(None, ("+".join(styles), flags))), **_summary(values)}
    for name in ("milliseconds_per_query", "index_recall@10"):
        if name in mean:
            mean[name] = float(np.mean([row[name] for row in rows]))
    for name in ("milliseconds", "random"):
        mean[name] = {k: float(np.mean([row[name][k] for row in rows])) for k in mean[name]}
    return mean, values


def environment() -> dict[str, Any]:
    """Versions and machine, as stored with every result."""
    import jax

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {len(jax.devices())} x {jax.devices()[0].device_kind}",
        "precision": "float32, products at highest precision",
        "versions": versions,
    }


def with_variants(evaluation: Evaluation, variants: tuple[str, ...]) -> Evaluation:
    """The same runs on other variants: `noto-full` becomes `twemoji-full` for `twemoji`.

    Benchmarks of one's own have no variants and stay as they are.
    """
    from cir_jax.data import BENCHMARKS, benchmark_parts

    if not variants:
        return evaluation
    runs = []
    for run, variant in itertools.product(evaluation.runs, variants):
        name, old, split = benchmark_parts(run.benchmark)
        new = "-".join([variant, *old.split("-")[1:]])
        other = f"{name}/{new}/{split}" if name in BENCHMARKS else run.benchmark
        runs.append(dataclasses.replace(run, benchmark=other))
    return Evaluation(tuple(dict.fromkeys(runs)))


def with_limit(evaluation: Evaluation, n: int) -> Evaluation:
    """The same runs on the first `n` queries of each benchmark (`cir_jax.data.benchmark.limited`); 0 for all."""
    from cir_jax.data import limited_name

    name = lambda run: limited_name(run.benchmark, n) if n else run.benchmark
    return Evaluation(
        tuple(dataclasses.replace(run, benchmark=name(run)) for run in evaluation.runs)
    )


def evaluate(evaluation: Evaluation, output: Path, batch_size: int = 128) -> list[dict[str, Any]]:
    """Carry out every run; write `results.json`, `report.html` and one `.npz` per stage; return the rows.

    What is computed is kept in `output/parts` until all is written: after an interruption the same call goes on there.

    Raises:
      BlockingIOError: another process evaluates into `output`.
    """
    import jax

    if not evaluation.runs:
        raise ValueError("the evaluation has no runs; give at least one Run(benchmark, retriever)")
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be at least 1")
    work = Workspace(output / "parts", batch_size)
    for run in evaluation.runs:
        check_run(run, work)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output.absolute()} is a file; choose another --output")
    with files.reported(output):
        output.mkdir(parents=True, exist_ok=True)
    with files.lock(output), jax.default_matmul_precision("highest"):
        return _evaluate(evaluation, output, work)


def check_run(run: Run, work: Workspace) -> None:
    """Refuse, before anything is computed, a run whose models cannot read the queries of its benchmark."""
    from cir_jax.methods import METHODS, method_name, reranks
    from cir_jax.model import as_example
    from cir_jax.retrieval import as_query

    benchmark = work.benchmark(run.benchmark)
    if reranks(work.model(run.retriever).config):
        raise ValueError(f"{run.retriever} is a re-ranker; a run needs a retriever before it")
    for stage, name in enumerate((run.retriever, run.reranker), 1):
        if name is None or not len(benchmark.queries):
            continue
        asked = as_query(benchmark.queries[0], stage, run.documents)
        parts = {"text" if part == "texts" else part: value for part, value in asked.items()}
        kinds = METHODS[method_name(work.model(name).config)][1].query_kinds
        as_example("query", parts, kinds, name)


def _evaluate(evaluation: Evaluation, output: Path, work: Workspace) -> list[dict[str, Any]]:
    from cir_jax.eval_report import evaluation_page
    from cir_jax.progress import progress

    results = []
    with progress("evaluating", len(evaluation.runs)) as advance:
        for run in evaluation.runs:
            compute = functools.partial(evaluate_run, run, work)
            for row, arrays in work.outcome(_key(run, work), compute):
                row["ranks"] = f"{_file_name(row)}.npz"
                with files.write_atomically(output / row["ranks"]) as part:
                    np.savez_compressed(part, **arrays)
                results.append((row, arrays))
            advance(1)
    rows = [row for row, _ in results] + pooled(results)
    result = {"format": files.FORMAT, "environment": environment(), "rows": rows}
    files.write_json(output / "results.json", result)
    opened = lambda row: work.benchmark(f"{row['benchmark']}/{row['variant']}/{row['split']}")
    evaluation_page(output / "report.html", results, opened, result["environment"])
    work.remove()
    return rows


def _key(run: Run, work: Workspace) -> list:
    """All that the outcome of a run depends on."""
    return [to_json(run), *_origin(run, work)]


def _origin(run: Run, work: Workspace) -> list:
    """What the scores of a run depend on: models and data. Runs that differ only in index, k or fusion share them."""
    names = filter(None, (run.retriever, run.reranker))
    models = [work.model(name).fingerprint for name in names]
    extracts = Path(run.documents.source)
    contents = [work.content(run.benchmark), extracts.is_file() and files.sha256(extracts)]
    return [models, contents, to_json(run.documents)]


def _file_name(row) -> str:
    """What distinguishes one stage of one run, as a file name."""
    models = [f"{Path(c['name']).name}-{c['fingerprint']}" for c in row["checkpoints"]]
    names = [_plain(row["benchmark"]), row["variant"], row["split"], *models, row["index_asked"]]
    if row["stage"] == 2:
        names.append(f"k{row['k']}")
        names += [] if row["fusion"] is None else [f"fusion{row['fusion']:g}"]
    names += [f"documents{digest(row['documents'])[:6]}"] if "documents" in row else []
    return "-".join(names)


def _plain(name: str) -> str:
    """The name of a benchmark as part of a file name; of a folder the last part, and a digest of the whole path."""
    plain = re.sub(r"[^\w-]+", "_", Path(name).name)[:40]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per row, with the model whose order it is; metrics in percent with their 95 % interval, then the gain of stage 2 and the random level."""
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    names = [name for name in names if name in SHOWN]
    titles = ("benchmark", "stage", "model", "index", "queries", "gallery")
    table = Table(*titles, *names, box=None)
    for title in ("gain R@1", "p", "random R@1", "random R@10", "ms", "index recall"):
        table.add_column(title)
    for row in rows:
        recall = f"{row['index_recall@10']:.3f}" if "index_recall@10" in row else ""
        table.add_row(
            printable(f"{row['benchmark']}/{row['variant']}/{row['split']}"),
            str(row["stage"]),
            printable(row["checkpoints"][-1]["name"]),
            row["index"],
            str(row["queries"]),
            str(row["gallery"]),
            *(_percent(row, name) for name in names),
            *_gain_cells(row),
            *(f"{100 * row['random'].get(f'recall@{k}', float('nan')):.2g}" for k in (1, 10)),
            f"{row['milliseconds_per_query']:.2f}",
            recall,
        )
    Console(width=None if sys.stdout.isatty() else 240, markup=False).print(table)


def _gain_cells(row) -> tuple[str, str]:
    """What stage 2 gained in recall@1, in points, and how probable that is by chance."""
    if "recall@1" not in row.get("gain", ()):
        return "", ""
    p = row["p"]["recall@1"]
    return f"{100 * row['gain']['recall@1']:+.1f}", "<0.001" if p < 0.001 else f"{p:.3f}"


def _percent(row, name) -> str:
    if name not in row["metrics"]:
        return ""
    low, high = row["interval"][name]
    return f"{100 * row['metrics'][name]:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _folder(arguments: Arguments) -> Path:
    """Where results go by default: another folder for what are other numbers."""
    first = [f"first{arguments.limit}"] if arguments.limit else []
    return Path("results") / "-".join([Path(arguments.config).stem, *arguments.variant, *first])


def main(argv: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m cir_jax.eval")
    if arguments.check:
        from cir_jax.checking import check_files

        return check_files(arguments.check, arguments.labels)
    if arguments.compare:
        from cir_jax.compare import compare

        return compare(*arguments.compare, arguments.output or Path("results") / "comparison")
    evaluation = load_config(arguments.config, Evaluation)
    keep_compiled(arguments.cache)
    output = arguments.output or _folder(arguments)
    evaluation = with_limit(with_variants(evaluation, arguments.variant), arguments.limit or 0)
    rows = evaluate(evaluation, output, arguments.batch_size)
    print_table(rows)
    for model in dict.fromkeys(each["identity"] for row in rows for each in row["checkpoints"]):
        print(f"model {printable(model)}")
    print(f"results and ranks in {output}; pictures and curves in {output / 'report.html'}")


if __name__ == "__main__":
    from cir_jax.commands import start

    start("eval")
