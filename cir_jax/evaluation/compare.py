"""`python -m cir_jax.eval --compare A/results.json B/results.json`: what differs, and whether that may be chance.

Two evaluations of the same queries are compared query by query: their ranks and metrics lie in `.npz` files beside
results.json.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cir_jax import files
from cir_jax.evaluation import metrics
from cir_jax.files import shown
from cir_jax.progress import printable

MOST_BYTES = 2 << 30  # of the arrays of one row, unpacked
NEEDED = {"benchmark", "variant", "split", "run", "stage", "index_asked", "metrics", "ranks"}


class System(NamedTuple):
    """One stage of one run: its row in results.json, and its arrays per query."""

    row: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


class Pair(NamedTuple):
    """The same queries by two systems, in the same order."""

    first: System
    second: System

    @property
    def title(self) -> str:
        return "/".join(str(self.first.row[name]) for name in ("benchmark", "variant", "split"))

    @property
    def metrics(self) -> list[str]:
        """The names that both have."""
        return [name for name in self.first.row["metrics"] if name in self.second.arrays]


class Difference(NamedTuple):
    """The second system against the first: means, the mean gap with its 95 % interval, and chance.

    `p` is that of a paired randomisation test.
    """

    queries: int
    first: float
    second: float
    gap: float
    low: float
    high: float
    p: float


def compared(first: str | os.PathLike, second: str | os.PathLike) -> list[Pair]:
    """The pairs of systems that two results.json have in common.

    On each benchmark the stages are paired in their order; where one side has a stage more, the last ones are.

    Raises:
      ValueError: damaged files, no benchmark in common, or other queries or another gallery under the same name.
    """
    paths = [files.local_path(path) for path in (first, second)]
    paths = [path / "results.json" if path.is_dir() else path for path in paths]
    groups = [_systems(path) for path in paths]
    common = [key for key in groups[0] if key in groups[1]]
    if not common:
        titles = [", ".join(sorted({"/".join(key[:3]) for key in group})) for group in groups]
        raise ValueError(
            f"nothing to compare: {paths[0]} has {titles[0] or 'no rows'}, {paths[1]} has {titles[1] or 'no rows'}; "
            "expected evaluations of the same benchmark, variant and split"
        )
    return [
        _aligned(one, two, paths)
        for key in common
        for one, two in _matched(groups[0][key], groups[1][key])
    ]


def _systems(path: Path) -> dict[tuple, list[System]]:
    """The rows of a results.json with their arrays, by benchmark and index."""
    value = files.read_json(path)
    rows = value.get("rows")
    if value.get("format") != files.FORMAT or type(rows) is not list:
        raise ValueError(f"{path} is no results.json of format {files.FORMAT}")
    groups = defaultdict(list)
    for row in rows:
        if type(row) is not dict or (NEEDED - {"ranks"}) - row.keys():
            raise ValueError(f"{path} has a row without {shown(sorted(NEEDED))}")
        if "ranks" in row:  # means over variants have none
            names = ("benchmark", "variant", "split", "index_asked", "asks")
            key = tuple(str(row.get(name, "")) for name in names)
            groups[key].append(System(row, _arrays(path, row)))
    return dict(groups)


def _arrays(results: Path, row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    name = row["ranks"]
    if type(name) is not str or not name or Path(name).name != name:
        raise ValueError(f"{results} names the ranks {shown(name)}, expected a file beside it")
    path = results.parent / name
    arrays = files.read_arrays(path, MOST_BYTES)
    wanted = ("ids", "rows", "rank", *row["metrics"])
    missing = [each for each in wanted if each not in arrays]
    count = len(arrays.get("ids", ()))
    short = [each for each in wanted if each in arrays and arrays[each].shape[:1] != (count,)]
    kinds = {"ids": "U", "rows": "i", "rank": "i"} | dict.fromkeys(row["metrics"], "f")
    odd = [each for each in wanted if each in arrays and arrays[each].dtype.kind != kinds[each]]
    if not (missing or short or odd):
        odd = [each for each in row["metrics"] if not np.isfinite(arrays[each]).all()]
    if missing or short or odd or not count:
        fault = (missing or short or odd or ["queries"])[0]
        raise ValueError(f"{path} has no {fault} for each of {count} queries; evaluate again")
    return arrays


def _matched(first: Sequence[System], second: Sequence[System]) -> list[tuple[System, System]]:
    """Systems side by side: stage by stage, and last by last where one side has a stage more."""
    stages = [
        {stage: [each for each in group if each.row["stage"] == stage] for stage in (1, 2)}
        for group in (first, second)
    ]
    pairs = [pair for stage in (1, 2) for pair in zip(stages[0][stage], stages[1][stage])]
    if bool(stages[0][2]) != bool(stages[1][2]):
        pairs.append(tuple((each[2] or each[1])[0] for each in stages))
    return pairs


def _aligned(first: System, second: System, paths: Sequence[Path]) -> Pair:
    """The pair with the second's queries in the first's order."""
    pair = Pair(first, second)
    sizes = [each.row.get("gallery") for each in pair]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{pair.title}: the gallery has {sizes[0]} items in {paths[0]} and {sizes[1]} in {paths[1]}; "
            "only evaluations over the same gallery can be compared"
        )
    ids = [each.arrays["ids"] for each in pair]
    orders = [np.argsort(each, kind="stable") for each in ids]
    known = [each[order] for each, order in zip(ids, orders)]
    if not np.array_equal(*known) or (known[0][1:] == known[0][:-1]).any():
        only = [len(np.setdiff1d(ids[a], ids[b])) for a, b in ((0, 1), (1, 0))]
        raise ValueError(
            f"{pair.title}: {paths[0]} has {len(ids[0])} queries, {only[0]} of them alone, {paths[1]} has {len(ids[1])}, "
            f"{only[1]} alone; only evaluations of the same queries, each once, can be compared"
        )
    order = np.empty(len(ids[0]), np.int64)
    order[orders[0]] = orders[1]
    arrays = {
        name: array[order] if array.shape[:1] == order.shape else array
        for name, array in second.arrays.items()
    }
    return Pair(first, System(second.row, arrays))


def difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """What a metric `[Q]` of the second system is above that of the first, and whether that may be chance."""
    gap = second - first
    low, high = metrics.interval(gap)
    chance = metrics.paired_p(second, first)
    return Difference(len(gap), first.mean(), second.mean(), gap.mean(), low, high, chance)


def differences(pair: Pair) -> dict[str, Difference]:
    """`difference` of every metric that both have."""
    both = pair.first.arrays, pair.second.arrays
    return {name: difference(*(each[name] for each in both)) for name in pair.metrics}


def by_rule(pair: Pair, name: str) -> dict[str, Difference]:
    """`difference` of a metric by kind of query; empty where kinds are not stored."""
    rules = pair.first.arrays.get("rules")
    if rules is None or rules.dtype.kind != "U" or len(rules) != len(pair.first.arrays["ids"]):
        return {}
    both = [each.arrays[name] for each in pair]
    return {
        rule: difference(*(each[chosen] for each in both))
        for rule, chosen in metrics.of_rule(metrics.split_rules(rules)).items()
    }


def system_title(row: Mapping[str, Any]) -> str:
    """A stage of a run in words."""
    first = Path(str(row["run"])).name
    if row["stage"] == 1:
        return first
    fusion = f", fusion {row['fusion']:g}" if row.get("fusion") is not None else ""
    count = f"first {row.get('k', '?')}{' alone' if row.get('restricted') else ''}"
    return f"{first} + {Path(str(row.get('reranker', '?'))).name} ({count}{fusion})"


def opened(pair: Pair):
    """The benchmark of a pair, for its pictures; None if it is not here or asks something else."""
    from cir_jax.data import named_benchmark

    with contextlib.suppress(ValueError, OSError, KeyError):
        benchmark = named_benchmark(pair.title)
        ids = [str(q.get("id", n)) for n, q in enumerate(benchmark.queries)]
        same = ids == pair.first.arrays["ids"].tolist()
        if same and len(benchmark.gallery) == pair.first.row.get("gallery"):
            return benchmark
    return None


def print_comparison(pairs: Sequence[Pair]) -> None:
    """One line per metric of each pair."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None, markup=False, soft_wrap=True)
    for pair in pairs:
        console.print(
            printable(f"\N{BULLET} {pair.title}, {len(pair.first.arrays['ids']):,} queries")
        )
        for letter, system in zip("AB", pair):
            console.print(printable(f"  {letter}: {system_title(system.row)}"))
        table = Table("metric", "A %", "B %", "B − A", "95 %", "p", box=None, padding=(0, 2))
        for name, found in differences(pair).items():
            values = (f"{100 * each:.2f}" for each in (found.first, found.second))
            span = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
            told = "<0.001" if found.p < 0.001 else f"{found.p:.3f}"
            table.add_row(name, *values, f"{100 * found.gap:+.2f}", span, told)
        console.print(table)


def _equal(pair: Pair) -> bool:
    both = pair.first.arrays, pair.second.arrays
    return all(np.array_equal(*(each[name] for each in both)) for name in ("rank", *pair.metrics))


def compare(first: Path, second: Path, output: Path) -> None:
    """Print the differences and write `output/comparison.html`."""
    from cir_jax.report.comparison import comparison_page

    found = compared(first, second)
    pairs = [pair for pair in found if not _equal(pair)] or found
    print_comparison(pairs)
    for pair in found:
        if not any(pair is each for each in pairs):
            print(printable(f"the same in both: {pair.title}, {system_title(pair.first.row)}"))
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output.absolute()} is a file; choose another --output")
    with files.reported(output):
        output.mkdir(parents=True, exist_ok=True)
    comparison_page(output / "comparison.html", pairs, opened)
    print(f"differences and pictures in {output / 'comparison.html'}")
