"""What a data set holds, from its annotations alone: the first thing to see of one that was just downloaded."""

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping

from cir_jax.data.benchmark import Benchmark, Dataset
from cir_jax.data.packed import Part
from cir_jax.data.published import taken_as_there
from cir_jax.data.records import Gallery

SHOWN = 200  # characters of a query


def counted(part: Part, open_part: Callable[[], Dataset | Benchmark | Gallery]) -> Iterator[str]:
    """Lines: how much a part holds, what its first query says, and which pictures of a published set are missing.

    Raises:
      FileNotFoundError, ValueError: annotations that are missing or wrong, as the readers name them.
    """
    with taken_as_there() as missing:
        found = open_part()
    yield f"{part}: {', '.join(_counts(found))}"
    rows = found.queries if isinstance(found, Benchmark) else found
    if len(rows):
        yield f"  first: {_said(rows[0])}"
    yield from (f"  {told}" for told in missing)


def _counts(found) -> Iterator[str]:
    if not isinstance(found, Benchmark):
        yield f"{len(found):,} {'pictures' if isinstance(found, Gallery) else 'pairs'}"
        return
    yield f"{len(found.queries):,} queries"
    yield f"{len(found.gallery):,} pictures in the gallery"
    answers = [len(rows) for rows in found.positives]
    each = f" ({min(answers)} to {max(answers)} of a query)" if max(answers) > 1 else ""
    yield f"{sum(answers):,} answers{each}" if any(answers) else "no published answers"
    if any(row >= 0 for row in found.exclude):
        yield "references taken out"
    if found.subset:
        yield f"subsets of {max(map(len, found.subset))}"
    kinds = {kind for each in found.rules for kind in ([each] if isinstance(each, str) else each)}
    if kinds:
        yield f"{len(kinds)} kinds of query"


def _said(raw: Mapping) -> str:
    """What a raw query or pair asks with, beside pictures."""
    asks = {name: value for name, value in raw.get("query", raw).items() if name != "image"}
    return textwrap.shorten(json.dumps(asks, ensure_ascii=False), SHOWN)
