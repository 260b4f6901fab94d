"""Two evaluations side by side, as one HTML page: numbers with their chance, and the queries that changed most."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation.compare import Difference, Pair, by_rule, differences, system_title
from cir_jax.report.page import page, write_page
from cir_jax.report.parts import (
    STYLE,
    chance,
    escape,
    grid,
    metric_title,
    moves,
    percent,
    points,
    section,
    sign,
)
from cir_jax.report.pictures import Ranking, example, place, stored
from cir_jax.report.plots import rank_histogram, recall_plot

EXAMPLES = 6  # queries of each kind


def comparison_page(
    path: str | os.PathLike,
    pairs: Sequence[Pair],
    benchmark_of: Callable[[Pair], Benchmark | None],
) -> None:
    """Write the page; an existing one is replaced as a whole.

    Args:
      benchmark_of: the benchmark of a pair, for pictures and curves; None where it is not here.
    """
    pictures: dict[str, str] = {}
    found = [(pair, differences(pair)) for pair in pairs]
    body = [
        f"<section class='cards'>{''.join(_card(*each) for each in found)}</section>",
        *(
            part
            for salt, each in enumerate(found)
            for part in _pair(*each, benchmark_of(each[0]), pictures, salt)
        ),
    ]
    about = f"{len(pairs)} comparison{'s' * (len(pairs) > 1)}, query by query. p is that of a paired randomisation test."
    style = STYLE + stored(pictures)
    write_page(path, page("What differs", about, body, style))


def _ranks(pair: Pair) -> tuple[np.ndarray, np.ndarray, int]:
    """(ranks of A, ranks of B `[Q]`, depth); what is beyond the shorter list has rank `depth`."""
    arrays = [each.arrays for each in pair]
    depth = min(each["rows"].shape[1] for each in arrays)
    inside = lambda rank: np.where((rank >= 0) & (rank < depth), rank, depth)
    return inside(arrays[0]["rank"]), inside(arrays[1]["rank"]), depth


def _lead(found: dict[str, Difference]) -> str:
    return "recall@1" if "recall@1" in found else next(iter(found))


def _header(pair: Pair) -> str:
    row = pair.first.row
    name = escape(Path(str(row["benchmark"])).name)
    return f"<header><h2>{name}</h2><small>{escape(row['variant'])} · {escape(row['split'])}</small></header>"


def _systems(pair: Pair) -> str:
    lines = (
        f"<div><dt>{letter}</dt><dd>{escape(system_title(each.row))}</dd></div>"
        for letter, each in zip("AB", pair)
    )
    return f"<dl class='facts'>{''.join(lines)}</dl>"


def _card(pair: Pair, found: dict[str, Difference]) -> str:
    name = _lead(found)
    each = found[name]
    figures = (
        f"<div class='{style}'><b class='big'>{percent(value)}<i>%</i></b><small>{letter}</small></div>"
        for style, letter, value in (("before", "A", each.first), ("after", "B", each.second))
    )
    gap = f"<b class='{sign(each.gap)}'>{points(each.gap)} points</b>"
    told = f"{_span(each)}; {escape(chance(each.p))}"
    return (
        f"<article class='card'>{_header(pair)}<small>{escape(metric_title(name))}, {each.queries:,} queries</small>"
        f"<div class='lead'>{'<span class=arrow>→</span>'.join(figures)}</div>"
        f"<p class='gain'>{gap} <span class='soft'>{told}</span></p>{_systems(pair)}</article>"
    )


def _span(each: Difference) -> str:
    return f"{points(each.low)} to {points(each.high)}"


def _pair(pair, found, benchmark, pictures, salt):
    """The sections of one pair."""
    title = (
        f"{escape(Path(str(pair.first.row['benchmark'])).name)} <small>{escape(pair.title)}</small>"
    )
    before, after, depth = _ranks(pair)
    lines = "".join(_line(metric_title(name), each) for name, each in found.items())
    yield section(
        title,
        "B − A in points, with the 95 % interval of the mean gap over queries.",
        f"<article class='card scroll'>{_table('metric', lines)}</article>",
    )
    cards = [moves(before, after, ("A", "B"))]
    cards.append(f"<small>queries by rank</small>{rank_histogram([before, after], depth)}")
    if benchmark is not None:
        ranks = [each.arrays["rank"] for each in pair]
        curve = recall_plot(benchmark, ranks, depth, f"plot {salt}")
        cards.append(f"<small>recall at k, in percent</small><div class='plot'>{curve}</div>")
    key = (
        "<span class='key'><span><i style='background:var(--pale)'></i>A</span>"
        "<span><i style='background:var(--accent)'></i>B</span></span>"
    )
    note = f"The best right answer of each query.{key}"
    yield section("Where right answers stand", note, grid(cards))
    yield _rules(pair, _lead(found))
    yield _changed(pair, benchmark, pictures)


def _table(first: str, lines: str) -> str:
    titles = (first, "queries", "A", "B", "B − A", "95 %", "p")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _line(title: str, each: Difference) -> str:
    p = "&lt;0.001" if each.p < 0.001 else f"{each.p:.3f}"
    cells = (
        f"{each.queries:,}",
        percent(each.first),
        percent(each.second),
        f"<b class='{sign(each.gap)}'>{points(each.gap)}</b>",
        _span(each),
        f"<b>{p}</b>" if each.p < 0.05 else p,
    )
    return f"<tr><th>{escape(title)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _rules(pair: Pair, name: str) -> str:
    found = by_rule(pair, name)
    order = sorted(found, key=lambda rule: (-found[rule].queries, rule))
    lines = "".join(_line(rule, found[rule]) for rule in order)
    by_chance = f"Of {len(order)} tests about {max(1, round(0.05 * len(order)))} fall below 0.05 by chance alone."
    return section(
        "By kind of query",
        f"{escape(metric_title(name))}, most frequent kinds first. {by_chance}",
        f"<article class='card scroll'>{_table('kind', lines)}</article>" if lines else "",
    )


def changed(before: np.ndarray, after: np.ndarray, depth: int, count: int) -> dict[str, list[int]]:
    """`{"gain": […], "loss": […]}`: the queries whose 1 / rank rose and fell most, at most `count` of each."""
    values = [np.where(rank < depth, 1 / (1 + rank), 0.0) for rank in (before, after)]
    change = values[1] - values[0]
    return {
        "gain": [int(q) for q in np.argsort(-change, kind="stable")[:count] if change[q] > 0],
        "loss": [int(q) for q in np.argsort(change, kind="stable")[:count] if change[q] < 0],
    }


def _changed(pair: Pair, benchmark: Benchmark | None, pictures: dict[str, str]) -> str:
    """The queries that changed most, as pictures, or as ranks where the gallery is not here."""
    before, after, depth = _ranks(pair)
    parts = []
    for kind, queries in changed(before, after, depth, EXAMPLES).items():
        title = {"gain": "B is better", "loss": "A is better"}[kind]
        total = int((after < before).sum() if kind == "gain" else (after > before).sum())
        show = _named if benchmark is None else _shown
        content = "".join(show(pair, query, benchmark, pictures) for query in queries)
        note = f"{len(queries)} of {total:,} queries, by the change of 1 / rank."
        parts.append(
            f"<div class='{kind}'><h3>{title}</h3><p class='note'>{note}</p>{content}</div>"
        )
    missing = " The gallery is not here, so ids stand for pictures." if benchmark is None else ""
    return section("Queries that changed most", f"Right answers are outlined.{missing}", *parts)


def _shown(pair: Pair, query: int, benchmark: Benchmark, pictures: dict[str, str]) -> str:
    rankings = [
        Ranking(letter, each.arrays["rows"], each.arrays["rank"])
        for letter, each in zip("AB", pair)
    ]
    before, after, _ = _ranks(pair)
    return example(benchmark, query, rankings, sign(before[query] - after[query]), pictures)


def _named(pair: Pair, query: int, *_) -> str:
    places = " → ".join(
        place(int(each.arrays["rank"][query]), each.arrays["rows"].shape[1]) for each in pair
    )
    name = escape(pair.first.arrays["ids"][query])
    return f"<article class='card example'>{name}: rank {places}</article>"
