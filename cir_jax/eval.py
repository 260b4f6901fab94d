"""`python -m cir_jax.eval CONFIG [--output DIR]`: benchmarks, a table, results.json and per-query ranks."""

import datetime
import platform
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from cir_jax import files, metrics
from cir_jax.config import Evaluation, Run, load_config

TIMED = 10  # hits of the searches that are timed, and compared between indexes
SCANN_DEPTH = 100  # how many hits are asked of an approximate index
SCANN_RECALL = 0.99  # what a ScaNN index is tuned to, against the exact list
PACKAGES = ("jax", "flax", "numpy", "scann", "pillow", "tokenizers", "cir_jax")


@dataclass(frozen=True)
class Arguments:
    """Evaluate retrieval.

    CONFIG is a .py file that defines `config = Evaluation(…)`, or the name of a packaged one (`emoji`). Prints a
    table and writes DIR/results.json and the ranks of every query.
    """

    config: tyro.conf.Positional[str]
    output: Path | None = None
    """folder for results.json and the ranks; without it `results/CONFIG`"""


@lru_cache(maxsize=8)
def named_benchmark(name: str):
    """The benchmark written `name/variant/split`."""
    from cir_jax.data import open_benchmark

    parts = name.split("/")
    if len(parts) != 3:
        raise ValueError(
            f"benchmark {name!r} must be written name/variant/split, as emoji-text/noto/test"
        )
    return open_benchmark(*parts)


def measure(model, name: str) -> dict[str, float]:
    """Metrics of a model on the benchmark `name/variant/split` with exact search; used during training."""
    from cir_jax.index import ExactIndex
    from cir_jax.retrieval import retrieve

    benchmark = named_benchmark(name)
    index = ExactIndex(model.encode("item", benchmark.gallery))
    queries = model.encode("query", benchmark.queries)
    hits = retrieve(index, queries, metrics.depth(benchmark), benchmark.exclude)
    return metrics.evaluate(hits.rows, benchmark)


@lru_cache(maxsize=4)
def _vectors(retriever: str, name: str):
    """(model, query vectors, item vectors, milliseconds per query spent encoding) of a benchmark."""
    from cir_jax.model import load

    model, benchmark = load(retriever), named_benchmark(name)
    items = model.encode("item", benchmark.gallery)
    model.encode("query", benchmark.queries)  # compiles, so that the timed pass does not
    start = time.perf_counter()
    queries = model.encode("query", benchmark.queries)
    return model, queries, items, 1000 * (time.perf_counter() - start) / max(1, len(queries))


def _tuning_queries(run: Run, model) -> np.ndarray | None:
    """Query vectors of the validation split, on which an approximate index is tuned; None if that is evaluated."""
    name, variant, split = run.benchmark.split("/")
    if split == "val":
        return None
    return model.encode("query", named_benchmark(f"{name}/{variant}/val").queries)


def _searched(run: Run, model, queries, items):
    """(index, deep hits for the metrics, milliseconds per query of a search for 10 with the index warm)."""
    from cir_jax.index import make_index
    from cir_jax.retrieval import retrieve

    benchmark, tuning = named_benchmark(run.benchmark), {}
    if run.index == "scann":
        tuning = {"recall": SCANN_RECALL, "k": TIMED, "queries": _tuning_queries(run, model)}
    index = make_index(run.index, items, ids=benchmark.ids, **tuning)
    k = metrics.depth(benchmark) if index.kind == "exact" else min(SCANN_DEPTH, len(items))
    retrieve(index, queries, TIMED, benchmark.exclude)
    start = time.perf_counter()
    retrieve(index, queries, TIMED, benchmark.exclude)
    searching = 1000 * (time.perf_counter() - start) / len(queries)
    return index, retrieve(index, queries, k, benchmark.exclude), searching


def evaluate_run(run: Run) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One row of results.json, and its arrays per query: `ids`, `rows`, `scores`, `rank`, and one per metric."""
    from cir_jax.index import ExactIndex
    from cir_jax.retrieval import retrieve

    benchmark = named_benchmark(run.benchmark)
    model, queries, items, encoding = _vectors(run.retriever, run.benchmark)
    index, hits, searching = _searched(run, model, queries, items)
    values = metrics.per_query(hits.rows, benchmark)
    row = {
        "benchmark": benchmark.name,
        "variant": benchmark.variant,
        "split": benchmark.split,
        "run": run.retriever,
        "stage": 1,
        "index": index.kind,
        "index_asked": run.index,
        "queries": len(queries),
        "gallery": len(items),
        "depth": hits.rows.shape[1],
        **_summary(values),
        "random": metrics.random_level(benchmark, length=hits.rows.shape[1]),
        "milliseconds_per_query": encoding + searching,
        "milliseconds": {"encode": encoding, "search": searching},
        "checkpoints": [{"name": run.retriever, "fingerprint": model.fingerprint}],
    }
    if index.kind == "scann":
        near, exact = (
            retrieve(i, queries, TIMED, benchmark.exclude) for i in (index, ExactIndex(items))
        )
        row["index_recall@10"] = metrics.overlap(near.rows, exact.rows)
    rank = metrics.ranks(hits.rows, benchmark.positives, benchmark.exclude)
    ids = np.array([str(query.get("id", number)) for number, query in enumerate(benchmark.queries)])
    return row, {"ids": ids, "rows": hits.rows, "scores": hits.scores, "rank": rank, **values}


def _summary(values) -> dict[str, dict]:
    """Mean and 95 % interval of each metric over queries."""
    return {
        "metrics": {name: float(v.mean()) for name, v in values.items()},
        "interval": {name: list(metrics.interval(v)) for name, v in values.items()},
    }


def pooled(results: list[tuple[dict, dict]]) -> list[dict[str, Any]]:
    """One more row for each evaluation made in several drawing styles: every query's mean over the styles.

    The interval is over queries, since the same names are asked in every style.
    """
    groups = defaultdict(list)
    for row, arrays in results:
        style, _, flags = row["variant"].partition("-")
        key = (row["benchmark"], flags, row["split"], row["run"], row["index_asked"])
        groups[key].append((style, row, arrays))
    return [_mean_row(key[1], *zip(*group)) for key, group in groups.items() if len(group) > 1]


def _mean_row(flags, styles, rows, arrays) -> dict[str, Any]:
    """The row of the mean over styles of one evaluation."""
    values = {name: np.mean([a[name] for a in arrays], axis=0) for name in rows[0]["metrics"]}
    mean = {k: v for k, v in rows[0].items() if k != "ranks"}
    mean |= {"variant": "-".join(filter(None, ("+".join(styles), flags))), **_summary(values)}
    for name in ("milliseconds_per_query", "index_recall@10"):
        if name in mean:
            mean[name] = float(np.mean([row[name] for row in rows]))
    for name in ("milliseconds", "random"):
        mean[name] = {k: float(np.mean([row[name][k] for row in rows])) for k in mean[name]}
    return mean


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


def evaluate(evaluation: Evaluation, output: Path) -> list[dict[str, Any]]:
    """Carry out every run, write `results.json` and one `.npz` per run, and return the rows."""
    import jax

    from cir_jax.progress import progress

    output.mkdir(parents=True, exist_ok=True)
    results = []
    with (
        jax.default_matmul_precision("highest"),
        progress("evaluating", len(evaluation.runs)) as advance,
    ):
        for run in evaluation.runs:
            row, arrays = evaluate_run(run)
            model = f"{Path(run.retriever).name}-{row['checkpoints'][0]['fingerprint']}"
            names = (row["benchmark"], row["variant"], row["split"], model, run.index)
            row["ranks"] = f"{'-'.join(names)}.npz"
            with files.write_atomically(output / row["ranks"]) as part:
                np.savez_compressed(part, **arrays)
            results.append((row, arrays))
            advance(1)
    rows = [row for row, _ in results] + pooled(results)
    result = {"format": files.FORMAT, "environment": environment(), "rows": rows}
    files.write_json(output / "results.json", result)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per row; metrics in percent with their 95 % interval, then the random level."""
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    table = Table(
        "benchmark",
        "index",
        "queries",
        "gallery",
        *names,
        "random R@10",
        "encode ms",
        "search ms",
        "index recall",
        box=None,
    )
    for row in rows:
        cells = [_percent(row, name) for name in names]
        recall = f"{row['index_recall@10']:.3f}" if "index_recall@10" in row else ""
        table.add_row(
            f"{row['benchmark']}/{row['variant']}/{row['split']}",
            row["index"],
            str(row["queries"]),
            str(row["gallery"]),
            *cells,
            f"{100 * row['random'].get('recall@10', float('nan')):.1f}",
            f"{row['milliseconds']['encode']:.2f}",
            f"{row['milliseconds']['search']:.3f}",
            recall,
        )
    Console(width=None if sys.stdout.isatty() else 170, markup=False).print(table)


def _percent(row, name) -> str:
    if name not in row["metrics"]:
        return ""
    low, high = row["interval"][name]
    return f"{100 * row['metrics'][name]:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def main(argv: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m cir_jax.eval")
    evaluation = load_config(arguments.config, Evaluation)
    output = arguments.output or Path("results") / Path(arguments.config).stem
    print_table(evaluate(evaluation, output))
    print(f"results and ranks in {output}")


if __name__ == "__main__":
    from cir_jax.commands import start

    start("eval")
