"""Shortcuts of a benchmark: what of it one part of the query, the text or the picture, answers alone.

A composed query is a picture and a text that changes it. Where the text alone finds the answer, or the picture alone,
the query does not show that a method composes anything. The audit asks the same system again with one part left out:

- a method that reads queries of the other part alone (`query_kinds`) is asked so, in the way it was made for: CLIP
  compares the part itself, stage I of BLIP4CIR reads a text without a picture and a picture like an item, a method
  with pseudo-words puts a picture into its prompt;
- any other (a re-ranker of pairs, MagicLens without a picture) gets a part that says nothing: the empty text, or a
  picture of one colour, the mean that its transform subtracts.

Both stages are asked so, and the second gets the candidates that the first one found with the same part alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cir_jax.config import Run
from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation import metrics

PARTS = ("text", "image")


class Alone(Sequence):
    """Queries with one part of each, as a method is best asked.

    Args:
      queries: mappings with `image` and `text`.
      part: the one that stays.
      config: of the method.
    """

    def __init__(self, queries: Sequence[Mapping], part: str, config):
        from cir_jax.methods import METHODS, method_name

        kinds = METHODS[method_name(config)][1].query_kinds
        self.queries, self.part = queries, part
        self.rest = {} if {part} in kinds else _nothing(part, config)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, row: int) -> dict:
        return {self.part: self.queries[row][self.part], **self.rest}


def _nothing(part: str, config) -> dict[str, Any]:
    """What stands in the place of the other part where a method needs both."""
    if part == "image":
        return {"text": ""}
    spec = config.inputs.image
    mean = np.round(255 * np.asarray(spec.mean)).astype(np.uint8)
    return {"image": np.broadcast_to(mean, (spec.size, spec.size, 3)).copy()}


def composed(benchmark: Benchmark) -> bool:
    """Whether its queries have a picture and a text."""
    return all(benchmark.queries[0].get(part) is not None for part in PARTS)


def with_parts(runs: Sequence[Run], opened) -> tuple[Run, ...]:
    """The runs, each on a composed benchmark followed by the same with the text and with the picture alone.

    Args:
      opened: gives the benchmark of a name.

    Raises:
      ValueError: no run has composed queries.
    """
    asked = [
        run for run in runs if run.asks == "all" and run.retriever
    ]  # given candidates are of the whole query
    whole = [run for run in asked if composed(opened(run.benchmark))]
    if not whole:
        raise ValueError("there is nothing to audit: no benchmark asks with a picture and a text")
    again = {run: [replace(run, asks=part) for part in PARTS] for run in whole}
    return tuple(dict.fromkeys(each for run in runs for each in (run, *again.get(run, ()))))


def key(row: Mapping[str, Any]) -> tuple:
    """What the rows of one system on one benchmark share, whatever part they ask with."""
    names = (
        "benchmark",
        "variant",
        "split",
        "run",
        "index_asked",
        "stage",
        "reranker",
        "k",
        "fusion",
        "restricted",
    )
    return tuple(row.get(name) for name in names)


def audits(results: Sequence[tuple[Mapping, Mapping]]) -> list[dict[str, Any]]:
    """For each system that was asked with every part alone too, what one part answers; of its last stage only.

    Each has `benchmark`, `variant`, `split`, `run`, `stage`, `queries`, and for recall@k in `metrics`: `all`, `text`
    and `image` (recall when asked with all, with the text, with the picture alone), `either` (the share of queries
    that one of them answers), `rest` (recall of the whole query on the others, `rest_interval`, None where there are
    none) and `rest_queries`; with the 95 % interval of the others too.
    """
    asked = {(key(row), row.get("asks", "all")): (row, arrays) for row, arrays in results}
    last = {key(row)[:5]: 0 for row, _ in results}
    for row, _ in results:
        last[key(row)[:5]] = max(last[key(row)[:5]], row["stage"])
    found = []
    for (system, part), (row, arrays) in asked.items():
        alone = [asked.get((system, each)) for each in PARTS]
        if part == "all" and row["stage"] == last[system[:5]] and all(alone):
            found.append(_audit(row, arrays, *(each[1] for each in alone)))
    return found


def _audit(row, arrays, text, image) -> dict[str, Any]:
    names = ("benchmark", "variant", "split", "run", "reranker", "stage", "queries")
    recalls = [name for name in row["metrics"] if name.startswith("recall@")]
    table = {name: _shares(arrays[name], text[name], image[name]) for name in recalls}
    return {name: row[name] for name in names if name in row} | {"metrics": table}


def _shares(whole, text, image) -> dict[str, Any]:
    """Recalls of the three ways to ask, 0 or 1 for each query `[Q]`, and what they share."""
    either = np.maximum(text, image)
    rest = whole[either == 0]
    parts = {"all": whole, "text": text, "image": image, "either": either}
    shares = {name: float(values.mean()) for name, values in parts.items()}
    shares["interval"] = {name: list(metrics.interval(values)) for name, values in parts.items()}
    shares["rest"] = float(rest.mean()) if len(rest) else None
    shares["rest_interval"] = list(metrics.interval(rest)) if len(rest) else None
    return shares | {"rest_queries": len(rest)}


def print_audits(found: Sequence[Mapping[str, Any]]) -> None:
    """One line for each system and recall@k."""
    import sys

    from rich.console import Console
    from rich.table import Table

    from cir_jax.progress import printable

    titles = ("shortcuts", "metric", "whole query", "text alone", "picture alone", "either alone")
    table = Table(*titles, "whole query on the rest", "rest", box=None)
    for each in found:
        title = printable(f"{each['benchmark']}/{each['variant']}/{each['split']}")
        for name, row in each["metrics"].items():
            cells = [told(row[part], row["interval"][part]) for part in ("all", *PARTS, "either")]
            rest = told(row["rest"], row["rest_interval"])
            table.add_row(title, name, *cells, rest, f"{row['rest_queries']:,}")
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)


def told(value: float | None, interval: Sequence[float] | None) -> str:
    """A share in percent with its interval."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} ({100 * interval[0]:.0f}–{100 * interval[1]:.0f})"
