"""Queries as pictures: what was asked, what was looked for, and the first hits of each ranking."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cir_jax.data.benchmark import Benchmark
from cir_jax.report.parts import escape

SHOWN = 8  # pictures in a strip
PICTURE = 160  # longest side of a stored picture
SHORT = 220  # characters of a document that are shown before it is opened


class Ranking(NamedTuple):
    """Lists to show: their title, hits `[Q, K]` and the 0-based rank of the best right answer `[Q]` (-1: outside)."""

    title: str
    rows: np.ndarray
    rank: np.ndarray


def example(
    benchmark: Benchmark,
    query: int,
    rankings: Sequence[Ranking],
    moved: str,
    pictures: dict[str, str],
) -> str:
    """A card with a query and the first hits of each ranking.

    Args:
      moved: `plus`, `minus` or `same`, the colour of its ranks.
      pictures: data URI -> CSS class, of the pictures that the page stores; new ones are added.
    """
    places = " → ".join(place(int(each.rank[query]), each.rows.shape[1]) for each in rankings)
    strips = "".join(_strip(benchmark, query, each, pictures) for each in rankings)
    return (
        f"<article class='card example' data-query='{query}'><div class='ask'>{_query(benchmark, query, pictures)}"
        f"{_wanted(benchmark, query, pictures)}<span class='pill {moved}'>rank {places}</span></div>{strips}</article>"
    )


def place(rank: int, depth: int) -> str:
    """A 0-based rank in words."""
    return str(rank + 1) if rank >= 0 else f"beyond {depth}"


def stored(pictures: Mapping[str, str]) -> str:
    """The CSS that holds the pictures."""
    return "".join(f".{name}{{background-image:url({uri})}}" for uri, name in pictures.items())


def _query(benchmark, query, pictures) -> str:
    """What was asked: picture, words, or a document that opens."""
    raw = benchmark.queries[query]
    picture = _tile(raw, "query picture", pictures) if raw.get("image") is not None else ""
    document, text = raw.get("document"), raw.get("text")
    words = f"“{escape(text)}”" if text and text != document else ""
    if document:
        words += f"<p>{escape(textwrap.shorten(document, SHORT, placeholder=' …'))}</p>"
        if len(document) > SHORT:
            words += f"<details><summary>whole text</summary>{escape(document)}</details>"
    return f"{picture}<div class='words'>{words}</div>"


def _wanted(benchmark, query, pictures) -> str:
    """A right answer of the highest grade, since neither strip may hold it."""
    positives = benchmark.positives[query]
    if not positives:
        return ""
    more = f"<br>1 of {len(positives)}" if len(positives) > 1 else ""
    item = benchmark.gallery[max(positives, key=positives.get)]
    return f"<div class='wanted'><small>looked for{more}</small>{_tile(item, 'looked for', pictures)}</div>"


def _strip(benchmark, query, ranking, pictures) -> str:
    """The first hits of a ranking, without the reference of the query, which is no answer."""
    reference = benchmark.exclude[query] if len(benchmark.exclude) else -1
    hits = [int(row) for row in ranking.rows[query] if row >= 0 and row != reference][:SHOWN]
    tiles = [
        _tile(benchmark.gallery[row], f"{number}", pictures, row in benchmark.positives[query])
        for number, row in enumerate(hits, 1)
    ]
    rank = place(int(ranking.rank[query]), ranking.rows.shape[1])
    content = "".join(tiles) or "<small>no hits</small>"
    title = escape(ranking.title)
    return f"<div class='strip'><div class='stage'>{title}<small>rank {rank}</small></div>{content}</div>"


def _tile(raw, role, pictures, right=False) -> str:
    """A picture by its class, or the words of an item that has none."""
    from cir_jax.data.images import data_uri

    words = str(raw.get("text") or raw.get("id") or "")
    label = escape(": ".join(filter(None, (role, words))) + (", a right answer" if right else ""))
    styles, inside = f"tile{' right' if right else ''}", f"<em>{escape(words)}</em>"
    if raw.get("image") is not None:
        uri = data_uri(raw["image"], PICTURE)
        styles, inside = f"{styles} {pictures.setdefault(uri, f'p{len(pictures)}')}", ""
    return f"<div class='{styles}' role='img' aria-label='{label}' title='{label}'>{inside}</div>"
