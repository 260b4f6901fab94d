"""`python -m cir_jax.eval CONFIG [--output DIR]`: benchmarks, a table, results.json and per-query ranks."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from cir_jax import files, processes
from cir_jax.commands import Limited
from cir_jax.compilation import keep_compiled
from cir_jax.config import Evaluation, Run, load_config
from cir_jax.evaluation import submissions
from cir_jax.evaluation.audit import audits, print_audits, with_parts
from cir_jax.evaluation.candidates import found_candidates, write_candidates
from cir_jax.evaluation.runs import LISTED, check_run, evaluate_run, origin, pooled
from cir_jax.progress import printable
from cir_jax.typed import to_json
from cir_jax.workspace import Workspace, digest

# In the table, where a benchmark has them; the rest is in results.json.
SHOWN = (
    *("recall@1", "recall@5", "recall@10", "recall@50"),
    *("mean(recall@10,recall@50)", "subset_recall@1", "subset_recall@2", "subset_recall@3"),
    "mean(recall@5,subset_recall@1)",
    *(f"{name}@{k}" for name in ("map", "target_recall") for k in (5, 10, 25, 50)),
    *("mrr@10", "trec_recall@10", "trec_recall@1000", "mrr"),
)
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
    audit: bool = False
    """ask again with the text alone and with the picture alone: what of a composed benchmark needs both?"""
    lists: bool = False
    """write large files too: the first stage's candidates, complete rankings for FashionIQ, TREC runs for what has no
    server of its own"""
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
        "precision": "products at highest precision, in the dtype of each checkpoint",
        "versions": versions,
    }


def with_variants(evaluation: Evaluation, variants: tuple[str, ...]) -> Evaluation:
    """The same runs on other variants: `noto-full` becomes `twemoji-full` for `twemoji`.

    Benchmarks of one's own have no variants and stay as they are.
    """
    from cir_jax.data import benchmark_parts, is_registered

    if not variants:
        return evaluation
    runs = []
    for run, variant in itertools.product(evaluation.runs, variants):
        name, old, split = benchmark_parts(run.benchmark)
        new = "-".join([variant, *old.split("-")[1:]])
        other = f"{name}/{new}/{split}" if is_registered(name) else run.benchmark
        runs.append(dataclasses.replace(run, benchmark=other))
    return Evaluation(tuple(dict.fromkeys(runs)))


def with_limit(evaluation: Evaluation, n: int) -> Evaluation:
    """The same runs on the first `n` queries of each benchmark (`cir_jax.data.benchmark.limited`); 0 for all."""
    from cir_jax.data import limited_name

    name = lambda run: limited_name(run.benchmark, n) if n else run.benchmark
    return Evaluation(
        tuple(dataclasses.replace(run, benchmark=name(run)) for run in evaluation.runs)
    )


def evaluate(
    evaluation: Evaluation, output: Path, batch_size: int = 128, audit: bool = False
) -> list[dict[str, Any]]:
    """Carry out every run; write `results.json`, `report.html` and one `.npz` per stage; return the rows.

    What is computed is kept in `output/parts` until all is written: after an interruption the same call goes on there.
    With `audit`, composed benchmarks are asked with each part of their queries alone too (`cir_jax.evaluation.audit`).
    Several processes call this together; the first of them writes.

    Raises:
      BlockingIOError: another process evaluates into `output`.
    """
    import jax

    if not evaluation.runs:
        raise ValueError("the evaluation has no runs; give at least one Run(benchmark, retriever)")
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be at least 1")
    work = Workspace(output / "parts", batch_size)
    if audit:
        evaluation = Evaluation(with_parts(evaluation.runs, work.benchmark))
    for run in evaluation.runs:
        check_run(run, work)
        processes.check_same(f"what {run.benchmark} or a model of its run holds", _held(run, work))
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output.absolute()} is a file; choose another --output")
    with files.reported(output):
        output.mkdir(parents=True, exist_ok=True)
    alone = files.lock(output) if processes.first() else contextlib.nullcontext()
    with alone, jax.default_matmul_precision("highest"):
        return _evaluate(evaluation, output, work)


def _evaluate(evaluation: Evaluation, output: Path, work: Workspace) -> list[dict[str, Any]]:
    from cir_jax.progress import progress
    from cir_jax.report.evaluation import evaluation_page

    results = []
    with progress("evaluating", len(evaluation.runs)) as advance:
        for run in evaluation.runs:
            compute = functools.partial(evaluate_run, run, work)
            for row, arrays in work.outcome(_key(run, work), compute):
                row["ranks"] = f"{_file_name(row)}.npz"
                results.append((row, arrays))
                if processes.first():
                    with files.write_atomically(output / row["ranks"]) as part:
                        np.savez_compressed(part, **arrays)
                    _write_lists(output, run, row, arrays, work.benchmark(run.benchmark))
            advance(1)
    rows = [row for row, _ in results] + pooled(results)
    if not processes.first():
        return rows
    result = {"format": files.FORMAT, "environment": environment(), "rows": rows}
    if found := audits(results):
        result["audits"] = found
    files.write_json(output / "results.json", result)
    opened = lambda row: work.benchmark(f"{row['benchmark']}/{row['variant']}/{row['split']}")
    shown = [(row, arrays) for row, arrays in results if row["metrics"]]
    evaluation_page(output / "report.html", shown, opened, result["environment"], found)
    work.remove()
    return rows


def _write_lists(output: Path, run: Run, row, arrays, benchmark) -> None:
    """The files that the benchmark's server takes, named in `row["files"]`; why there is none, where it would refuse."""
    stem = row["ranks"].removesuffix(".npz")
    hits, members = arrays["rows"], arrays.get("members")
    if run.lists and row["stage"] == 1:
        some = (
            hits[:, :LISTED],
            arrays["scores"][:, :LISTED],
            row["checkpoints"][0]["fingerprint"],
        )
        write_candidates(output / f"{stem}.candidates.npz", found_candidates(benchmark, *some))
        row["candidates"] = f"{stem}.candidates.npz"
    for word, lists in submissions.of_hits(
        benchmark, hits, members, run.lists, "-".join(_models(row))
    ).items():
        name = f"{stem}.{word}.{'txt' if lists.kind == 'trec' else 'json'}"
        try:
            submissions.write(output / name, lists)
        except ValueError as error:  # of a part of the split, say
            row.setdefault("no_files", []).append(str(error))
        else:
            row.setdefault("files", []).append(name)


def _held(run: Run, work: Workspace) -> str:
    """What all processes must have alike for their parts to fit together, as text."""
    benchmark, names = work.benchmark(run.benchmark), (run.retriever, run.reranker)
    models = [work.model(name).fingerprint for name in names if name]
    return digest([list(benchmark.ids), len(benchmark.queries), models])


def _key(run: Run, work: Workspace) -> list:
    """All that the outcome of a run depends on."""
    return [to_json(run), *origin(run, work)]


def _models(row) -> list[str]:
    """The models of a row, or its candidates' file, as parts of a name."""
    return [f"{Path(c['name']).name}-{c['fingerprint']}" for c in row["checkpoints"]]


def _file_name(row) -> str:
    """What distinguishes one stage of one run, as a file name."""
    names = [_plain(row["benchmark"]), row["variant"], row["split"]]
    names += [*_models(row), row["index_asked"]]
    if row["stage"] == 2:
        names.append(f"k{row['k']}")
        names += [] if row["fusion"] is None else [f"fusion{row['fusion']:g}"]
        names += ["restricted"] if "restricted" in row else []
    names += [f"{row['asks']}-alone"] if "asks" in row else []
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
    for title in (
        "median rank",
        "gain R@1",
        "p",
        "random R@1",
        "random R@10",
        "ms",
        "index recall",
    ):
        table.add_column(title)
    for row in rows:
        recall = f"{row['index_recall@10']:.3f}" if "index_recall@10" in row else ""
        table.add_row(
            printable(f"{row['benchmark']}/{row['variant']}/{row['split']}{_asks(row)}"),
            str(row["stage"]),
            printable(row["checkpoints"][-1]["name"]),
            row["index"],
            str(row["queries"]),
            str(row["gallery"]),
            *(_percent(row, name) for name in names),
            "" if row.get("median_rank") is None else f"{row['median_rank']:g}",
            *_gain_cells(row),
            *(f"{100 * row['random'].get(f'recall@{k}', float('nan')):.2g}" for k in (1, 10)),
            f"{row['milliseconds_per_query']:.2f}",
            recall,
        )
    Console(width=None if sys.stdout.isatty() else 400, markup=False).print(table)


def _asks(row) -> str:
    return f", {row['asks']} alone" if "asks" in row else ""


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
    """Evaluate, check or compare, as the command line says, and print what came of it."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m cir_jax.eval")
    processes.join(preemption=False)
    if (arguments.check or arguments.compare) and not processes.first():
        return None
    if arguments.check:
        from cir_jax.evaluation.checking import check_files

        return check_files(arguments.check, arguments.labels)
    if arguments.compare:
        from cir_jax.evaluation.compare import compare

        return compare(*arguments.compare, arguments.output or Path("results") / "comparison")
    evaluation = load_config(arguments.config, Evaluation)
    keep_compiled(arguments.cache)
    output = arguments.output or _folder(arguments)
    evaluation = with_limit(with_variants(evaluation, arguments.variant), arguments.limit or 0)
    if arguments.lists:
        evaluation = Evaluation(tuple(dataclasses.replace(r, lists=True) for r in evaluation.runs))
    rows = evaluate(evaluation, output, arguments.batch_size, arguments.audit)
    if not processes.first():
        return None
    print_table(rows)
    if arguments.audit:
        print_audits(files.read_json(output / "results.json")["audits"])
    for model in dict.fromkeys(each["identity"] for row in rows for each in row["checkpoints"]):
        print(f"model {printable(model)}")
    for name in (name for row in rows for name in row.get("files", ())):
        print(f"for the server: {output / name}")
    for reason in (reason for row in rows for reason in row.get("no_files", ())):
        print(f"no file for the server: {printable(reason)}")
    print(f"results and ranks in {output}; pictures and curves in {output / 'report.html'}")


if __name__ == "__main__":
    from cir_jax.commands import start

    start("eval")
