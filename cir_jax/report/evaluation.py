"""What an evaluation found, as one HTML page: above all, what the second stage bought.

The page needs no scripts and fetches nothing. Every picture is stored in it once, as a CSS class.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation import metrics
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
from cir_jax.report.pictures import SHOWN, Ranking, example, stored
from cir_jax.report.plots import rank_histogram, recall_plot

EXAMPLES = 4  # queries of each kind that one benchmark shows: gains, losses, drawn at random
PAGE_EXAMPLES = 12  # the same for a whole page, so that it stays small with many benchmarks
SEED = 0  # of the queries that are drawn at random


class Entry(NamedTuple):
    """A row of results.json and its arrays per query, as `cir_jax.eval` collects them."""

    row: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


class Comparison(NamedTuple):
    """A retriever on a benchmark without and, if there is one, with a second stage."""

    benchmark: Benchmark
    label: str
    first: Entry
    second: Entry | None

    @property
    def last(self) -> Entry:
        return self.second or self.first


def evaluation_page(
    path: str | os.PathLike,
    results: Sequence[tuple[Mapping[str, Any], Mapping[str, np.ndarray]]],
    benchmark_of: Callable[[Mapping[str, Any]], Benchmark],
    environment: Mapping[str, Any] | None = None,
    audits: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page; an existing one is replaced as a whole.

    Args:
      results: (row, arrays) of every run and stage. `rows` is `[Q, depth]` (-1: no hit) and `rank` `[Q]`, the 0-based
        rank of the best right answer (-1: outside). A second stage belongs to the first stage of equal benchmark,
        variant, split, run and asked index.
      benchmark_of: the benchmark of a row.
      environment: `time`, `precision` and `machine`, as `cir_jax.eval.environment` gives them.
      audits: as `cir_jax.evaluation.audit.audits` gives them.

    Raises:
      ValueError: arrays of another number of queries than the benchmark has.
    """
    entries = list({_identity(row): Entry(row, arrays) for row, arrays in results}.values())
    compared = _comparisons([each for each in entries if "asks" not in each.row], benchmark_of)
    pictures: dict[str, str] = {}
    body = [
        _models(entries),
        _cards(compared),
        *map(_audit, audits),
        *_examples(compared, pictures),
        _moves(compared),
        _histograms(compared),
        _curves(compared),
        *_rules(compared),
        _table(entries),
    ]
    two_stages = any(each.second for each in compared)
    title = "What the second stage bought" if two_stages else "What the evaluation found"
    about = _about(compared, environment or {})
    write_page(path, page(title, about, body, STYLE + stored(pictures)))


# ---- what belongs together ----


def _key(row):
    return tuple(row[name] for name in ("benchmark", "variant", "split", "run", "index_asked"))


def _identity(row):
    """What distinguishes a stage: runs that share a first stage each bring it along."""
    return (
        *_key(row),
        row["stage"],
        *(row.get(n) for n in ("reranker", "k", "fusion", "restricted", "asks")),
    )


def _pairs(entries: Iterable[Entry]) -> list[tuple[Entry, Entry | None]]:
    """Each first stage with each of its second stages, or with None; a second stage alone stands first."""
    seconds = defaultdict(list)
    for entry in entries:
        if entry.row["stage"] == 2:
            seconds[_key(entry.row)].append(entry)
    firsts = [entry for entry in entries if entry.row["stage"] == 1]
    pairs = [(first, second) for first in firsts for second in seconds.get(_key(first.row), [None])]
    known = {_key(first.row) for first in firsts}
    return pairs + [(e, None) for e in entries if e.row["stage"] == 2 and _key(e.row) not in known]


def _main(pairs):
    """Of each retriever and benchmark the pairs with one index only: the exact one, where it was asked for."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[_key(pair[0].row)[:-1]].append(pair)
    chosen = []
    for group in groups.values():
        asked = [first.row["index_asked"] for first, _ in group]
        wanted = "exact" if "exact" in asked else asked[0]
        chosen += [pair for pair, index in zip(group, asked) if index == wanted]
    return chosen


def _comparisons(entries, benchmark_of) -> list[Comparison]:
    """What the page shows, labelled with the models where one benchmark occurs several times."""
    pairs = _main(_pairs(entries))
    times = Counter(_key(first.row)[:3] for first, _ in pairs)
    compared = []
    for first, second in pairs:
        row, benchmark = first.row, benchmark_of(first.row)
        parts = [row["variant"], row["split"]]
        if times[_key(row)[:3]] > 1:
            parts += [_system(entry.row) for entry in (first, second) if entry]
        _check(benchmark, first, second)
        compared.append(Comparison(benchmark, escape(" · ".join(parts)), first, second))
    return compared


def _check(benchmark, first, second) -> None:
    for entry in filter(None, (first, second)):
        found, expected = len(entry.arrays["rank"]), len(benchmark.queries)
        if found != expected:
            title = "/".join(map(str, _key(entry.row)[:3]))
            raise ValueError(
                f"{title}, stage {entry.row['stage']}: ranks of {found} queries, but the benchmark has {expected}; "
                "give the benchmark that was evaluated"
            )


def _standing(compared: Comparison) -> tuple[np.ndarray, np.ndarray, int]:
    """(ranks before, ranks after `[Q]`, depth); what is outside either list's reach has rank `depth`.

    A second list may be cut where the first goes on; beyond the shorter one nothing can be said to have moved.
    """
    arrays = [compared.first.arrays, compared.last.arrays]
    depth = min(each["rows"].shape[1] for each in arrays)
    before, after = (
        np.where((each["rank"] >= 0) & (each["rank"] < depth), each["rank"], depth)
        for each in arrays
    )
    return before, after, depth


# ---- words and numbers ----


def _range(row, name) -> str:
    low, high = row["interval"][name]
    return f"({percent(low)}–{percent(high)})"


def _explained(name: str) -> str:
    return "R@1: a right answer comes first" if name == "recall@1" else metric_title(name)


def _lead(row) -> str:
    """The metric of the big figures."""
    return "recall@1" if "recall@1" in row["metrics"] else next(iter(row["metrics"]))


def _gain(compared: Comparison, name: str) -> float:
    first, second = compared.first.row, compared.last.row
    known = second.get("gain", {}) if compared.second else {}
    return known.get(name, second["metrics"][name] - first["metrics"][name])


def _header(compared: Comparison) -> str:
    name = escape(compared.first.row["benchmark"])
    return f"<header><h2>{name}</h2><small>{compared.label}</small></header>"


def _where(row) -> str:
    asks = f" · {row['asks']} alone" if "asks" in row else ""
    return f"{row['variant']} · {row['split']}{asks}"


def _systems(compared: Comparison) -> str:
    """Which model stands in which stage."""
    rows = [each.row for each in (compared.first, compared.second) if each]
    return escape(" · ".join(f"stage {row['stage']}: {_system(row)}" for row in rows))


def _system(row) -> str:
    if row["stage"] == 1:
        index = "" if row["index"] == "exact" else f", {row['index']} index"
        return f"{_name(row['run'])}{index}"
    fusion = "" if row.get("fusion") is None else f", fusion {row['fusion']:g}"
    alone = " alone" if row.get("restricted") else ""
    return f"{_name(row.get('reranker', '?'))}, first {row.get('k', '?')}{alone}{fusion}"


def _name(checkpoint: str) -> str:
    return Path(str(checkpoint)).name


# ---- the top: models and cards ----


def _about(compared, environment) -> str:
    if not compared:
        return "Nothing was evaluated."
    sizes = {_key(each.first.row)[:3]: len(each.benchmark.queries) for each in compared}
    known = {n: str(environment[n]) for n in ("time", "precision", "machine") if n in environment}
    if "time" in known:
        known["time"] = known["time"].replace("T", " ").replace("+00:00", " UTC")
    asked = f"{len(sizes)} benchmark{'s' * (len(sizes) > 1)}, {sum(sizes.values()):,} queries"
    return " · ".join([asked, *known.values()])


def _models(entries) -> str:
    """The checkpoints with their fingerprints, each once."""
    known = {c["fingerprint"]: c["name"] for entry in entries for c in entry.row["checkpoints"]}
    listed = (
        f"<li>{escape(_name(name))}<code>{escape(mark)}</code></li>" for mark, name in known.items()
    )
    return f"<ul class='models'>{''.join(listed)}</ul>" if known else ""


def _cards(compared) -> str:
    return f"<section class='cards'>{''.join(map(_card, compared))}</section>" if compared else ""


def _card(compared: Comparison) -> str:
    name = _lead(compared.first.row)
    return (
        f"<article class='card'>{_header(compared)}{_figures(compared, name)}{_gauge(compared, name)}"
        f"{_verdict(compared, name)}{_facts(compared)}</article>"
    )


def _figures(compared, name) -> str:
    """The lead metric, before and after."""
    rows = [each.row for each in (compared.first, compared.second) if each]
    figures = [
        f"<div class='{'after' if row is rows[-1] else 'before'}'><b class='big'>{percent(row['metrics'][name])}<i>%</i></b>"
        f"<small>stage {row['stage']}</small><small>{_range(row, name)}</small></div>"
        for row in rows
    ]
    arrow = "<span class='arrow'>→</span>"
    return f"<small>{_explained(name)}</small><div class='lead'>{arrow.join(figures)}</div>"


def _gauge(compared, name) -> str:
    """Values and intervals on a line from 0 to 100 %, with the random level."""
    marks = []
    for style, entry in zip(("one", "two"), filter(None, (compared.first, compared.second))):
        low, high = (100 * bound for bound in entry.row["interval"][name])
        value = 100 * entry.row["metrics"][name]
        marks.append(
            f"<i class='{style}' style='left:{low:.2f}%;width:{high - low:.2f}%'></i>"
            f"<u class='{style}' style='left:{value:.2f}%'></u>"
        )
    chance = 100 * compared.first.row.get("random", {}).get(name, 0)
    return f"<div class='gauge'><u class='chance' style='left:{chance:.2f}%'></u>{''.join(marks)}</div>"


def _verdict(compared, name) -> str:
    if not compared.second:
        return f"<p class='gain soft'>stage {compared.first.row['stage']} only</p>"
    gain, p = _gain(compared, name), compared.second.row.get("p", {}).get(name)
    told = f" <span class='soft'>{escape(chance(p))}</span>" if p is not None else ""
    return f"<p class='gain'><b class='{sign(gain)}'>{points(gain)} points</b>{told}</p>"


def _facts(compared) -> str:
    """The other numbers of a card: R@10, the random level, sizes, models."""
    row = compared.first.row
    names = list(dict.fromkeys(n for n in (_lead(row), "recall@10") if n in row["metrics"]))
    facts = {metric_title(name): _change(compared, name) for name in names[1:]}
    chance = [percent(row["random"][name]) for name in names if name in row.get("random", {})]
    if chance:
        facts[f"random {' · '.join(map(metric_title, names))}"] = f"{' · '.join(chance)} %"
    facts["queries · gallery"] = f"{row['queries']:,} · {row['gallery']:,}"
    listed = "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items())
    return f"<dl class='facts'>{listed}</dl><small>{_systems(compared)}</small>"


def _change(compared, name) -> str:
    values = [each.row["metrics"][name] for each in (compared.first, compared.second) if each]
    return " → ".join(map(percent, values)) + " %"


# ---- the audit ----


def _audit(audit: Mapping[str, Any]) -> str:
    """What one part of the queries answers alone."""
    lines = "".join(_audit_line(name, row) for name, row in audit["metrics"].items())
    parts = (
        "text alone",
        "picture alone",
        "either alone",
        "whole query",
        "whole query on the rest",
    )
    head = "".join(f"<th>{title}</th>" for title in ("", *parts))
    where = f"{audit['variant']} · {audit['split']} · stage {audit['stage']}"
    return section(
        f"Shortcuts of {escape(audit['benchmark'])} <small>{escape(where)}</small>",
        "The same system, asked with the text alone and with the picture alone. Only queries that neither answers show "
        "that picture and text are composed: the rest."
        "<span class='key'><span class='same'><i></i>one part alone</span>"
        "<span class='plus'><i></i>only picture and text together</span>"
        "<span class='minus'><i></i>not found</span></span>",
        f"<article class='card scroll'><table class='audit'><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></article>",
    )


def _audit_line(name: str, row: Mapping[str, Any]) -> str:
    cells = [
        _share(row[part], row["interval"][part]) for part in ("text", "image", "either", "all")
    ]
    rest = "–" if row["rest"] is None else _share(row["rest"], row["rest_interval"])
    cells.append(f"{rest}<small>{row['rest_queries']:,} queries</small>")
    bar = _stacked(row)
    return f"<tr><th>{metric_title(name)}{bar}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _share(value: float, interval: Sequence[float]) -> str:
    return f"<b>{percent(value)}</b><small>({percent(interval[0])}–{percent(interval[1])})</small>"


def _stacked(row: Mapping[str, Any]) -> str:
    """All queries as a bar: answered by one part alone, by both only, by neither way of asking."""
    rest = 1 - row["either"]
    both = rest * (row["rest"] or 0.0)
    parts = (
        ("same", row["either"], "one part alone"),
        ("plus", both, "only picture and text together"),
        ("minus", rest - both, "not found"),
    )
    return "".join(
        (
            "<div class='moves'>",
            *(
                f"<span class='{style}' style='flex:{share:.4f}' title='{words}: {100 * share:.1f} %'></span>"
                for style, share, words in parts
                if share > 0
            ),
            "</div>",
        )
    )


# ---- examples ----


def examples(
    before: np.ndarray,
    after: np.ndarray,
    depth: int,
    count: int,
    lead: np.ndarray | None = None,
) -> dict[str, list[int]]:
    """Queries to show, `{"gain": […], "loss": […], "best": […], "worst": […], "drawn": […]}`, at most `count` of each.

    Gains and losses are the largest changes of 1 / rank, ties in the order of the queries. Best are those whose right
    answer is first with the largest lead, worst those where it is furthest down, both by `after`; the drawn ones come
    from all queries, whatever happened to them.

    Args:
      before, after: 0-based ranks `[Q]`; `depth` means that it is outside.
      lead: how far the score of the first hit is above that of the second `[Q]`, if known.
    """
    values = [np.where(rank < depth, 1 / (1 + rank), 0.0) for rank in (before, after)]
    change = values[1] - values[0]
    lead = np.zeros(len(after)) if lead is None else lead
    first = np.lexsort((-lead, after))
    last = np.argsort(-after, kind="stable")
    draw = np.random.default_rng(SEED).permutation(len(change))[:count]
    return {
        "gain": [int(q) for q in np.argsort(-change, kind="stable")[:count] if change[q] > 0],
        "loss": [int(q) for q in np.argsort(change, kind="stable")[:count] if change[q] < 0],
        "best": [int(q) for q in first[:count] if after[q] == 0],
        "worst": [int(q) for q in last[:count] if after[q] > 0],
        "drawn": [int(q) for q in draw],
    }


def _lead_of_first(arrays) -> np.ndarray | None:
    """How far the first hit of each query is above the second, if scores are known."""
    scores = arrays.get("scores")
    if scores is None or scores.shape[1] < 2:
        return None
    first, second = scores[:, 0].astype(np.float64), scores[:, 1].astype(np.float64)
    return np.where(np.isfinite(first) & np.isfinite(second), first - second, 0.0)


def _examples(compared, pictures):
    """A section of pictures for each benchmark."""
    for each in compared:
        count = max(1, min(EXAMPLES, PAGE_EXAMPLES // len(compared)))
        before, after, depth = _standing(each)
        chosen = examples(before, after, depth, count, _lead_of_first(each.last.arrays))
        counts = {
            "gain": int((after < before).sum()),
            "loss": int((after > before).sum()),
            "best": int((after == 0).sum()),
            "worst": int((after > 0).sum()),
        }
        if not each.second:
            chosen = {kind: chosen[kind] for kind in ("best", "worst", "drawn")}
        stages = "both stages" if each.second else f"stage {each.first.row['stage']}"
        yield section(
            f"{escape(each.first.row['benchmark'])} <small>{each.label}</small>",
            f"The first {SHOWN} pictures of {stages}. Right answers are outlined and ticked.",
            *(_kind(each, kind, queries, counts, pictures) for kind, queries in chosen.items()),
        )


KINDS = {
    "gain": ("Biggest gains", "whose right answer moved up, by the change of 1 / rank"),
    "loss": ("Biggest losses", "whose right answer moved down, by the change of 1 / rank"),
    "best": ("Best", "whose right answer is first, by its lead over the second"),
    "worst": ("Worst", "whose right answer is not first, by how far down it is"),
    "drawn": ("Drawn at random", ""),
}


def _kind(compared, kind, queries, counts, pictures) -> str:
    title, by = KINDS[kind]
    shown = "".join(_example(compared, query, pictures) for query in queries)
    note = (
        f"Not chosen: {len(queries)} of all {len(compared.benchmark.queries):,} queries, drawn with seed {SEED}."
        if kind == "drawn"
        else _told(by, len(queries), counts[kind])
    )
    return f"<div class='{kind}'><h3>{title}</h3><p class='note'>{note}</p>{shown}</div>"


def _told(by, shown, total) -> str:
    if not total:
        return f"No query {by.partition(',')[0]}."
    share = f"all {total:,}" if shown == total else f"the {shown} first of {total:,}"
    return f"Chosen: {share} queries {by}."


def _example(compared, query, pictures) -> str:
    before, after, _ = _standing(compared)
    entries = [each for each in (compared.first, compared.second) if each]
    rankings = [
        Ranking(f"stage {each.row['stage']}", each.arrays["rows"], each.arrays["rank"])
        for each in entries
    ]
    moved = sign(before[query] - after[query])
    return example(compared.benchmark, query, rankings, moved, pictures)


# ---- wins and losses ----


def _moves(compared) -> str:
    return section(
        "Wins and losses",
        "What the second stage did to the best right answer of each query, and how many queries have one at rank 1.",
        grid(_moved(each) for each in compared if each.second),
    )


def _moved(compared: Comparison) -> str:
    before, after, _ = _standing(compared)
    return f"{_header(compared)}{moves(before, after, ('stage 1', 'stage 2'))}"


# ---- histograms and recall curves ----


def _histograms(compared) -> str:
    key = (
        "<span class='key'><span><i style='background:var(--accent)'></i>after re-ranking, or the only stage</span>"
        "<span><i style='background:var(--pale)'></i>before</span></span>"
    )
    return section(
        "Ranks",
        f"How many queries have their best right answer at which rank.{key}",
        grid(_histogram(each) for each in compared),
    )


def _histogram(compared: Comparison) -> str:
    before, after, depth = _standing(compared)
    ranks = [before, after] if compared.second else [after]
    medians = [metrics.median_rank(np.where(rank < depth, rank, -1)) for rank in ranks]
    told = " → ".join(f"beyond {depth}" if m is None else f"{m:g}" for m in medians)
    return (
        f"{_header(compared)}<p class='note'>median rank {told}</p>{rank_histogram(ranks, depth)}"
    )


def _curve(compared: Comparison, number: int) -> str:
    lists = [each.arrays for each in (compared.first, compared.second) if each]
    depth = min(each["rows"].shape[1] for each in lists)
    return recall_plot(
        compared.benchmark, [each["rank"] for each in lists], depth, f"plot {number}"
    )


def _curves(compared) -> str:
    key = (
        "<span class='key'><span><i class='line' style='background:var(--accent)'></i>stage 2</span>"
        "<span><i class='line' style='background:var(--pale)'></i>stage 1</span>"
        "<span><i class='line' style='background:repeating-linear-gradient(90deg,var(--soft) 0 4px,transparent 4px 7px)'></i>random order</span></span>"
    )
    plots = (
        f"<div class='plot'>{_header(each)}{_curve(each, number)}</div>"
        for number, each in enumerate(compared)
    )
    return section(
        "Recall at k",
        f"Queries with a right answer among the first k, in percent.{key}",
        grid(plots),
    )


# ---- tables ----


def _rules(compared):
    """A table by kind of query for each benchmark that has kinds."""
    for each in compared:
        row, name = each.first.row, _lead(each.first.row)
        if not row.get("rules"):
            continue
        yield section(
            f"{escape(row['benchmark'])} by kind of query <small>{each.label}</small>",
            f"{metric_title(name)} in percent, most frequent kinds first.",
            f"<article class='card scroll'>{_rule_table(each, name)}</article>",
        )


def _rule_table(compared, name) -> str:
    first = compared.first.row["rules"]
    second = compared.second.row.get("rules", {}) if compared.second else {}
    lines = [
        _rule_line(
            rule, first[rule]["queries"], [t[rule][name] for t in (first, second) if rule in t]
        )
        for rule in sorted(first, key=lambda rule: (-first[rule]["queries"], rule))
    ]
    stages = (
        "<th>stage 1</th><th>stage 2</th><th>gain</th>"
        if second
        else f"<th>stage {compared.first.row['stage']}</th>"
    )
    head = f"<tr><th>kind</th><th>queries</th>{stages}<th class='bars'></th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


def _rule_line(rule, queries, values) -> str:
    cells = "".join(f"<td>{percent(value)}</td>" for value in values)
    if len(values) > 1:
        gain = values[1] - values[0]
        cells += f"<td class='{sign(gain)}'><b>{points(gain)}</b></td>"
    bars = "".join(
        f"<i class='{style}' style='width:{100 * value:.1f}%'></i>"
        for style, value in zip(("one", "two"), values)
    )
    return (
        f"<tr><th>{escape(rule)}</th><td>{queries:,}</td>{cells}<td class='bars'>{bars}</td></tr>"
    )


def _table(entries) -> str:
    if not entries:
        return ""
    names = list(dict.fromkeys(name for entry in entries for name in entry.row["metrics"]))
    titles = [
        "benchmark",
        "stage",
        "index",
        "queries",
        "gallery",
        *map(metric_title, names),
        "ms per query",
    ]
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    lines = "".join(_line(entry.row, names) for entry in entries)
    return section(
        "Everything measured",
        "Metrics in percent, with 95 % intervals over queries and what random order reaches. Recall of an index: how much of "
        "the exact first ten an approximate index finds.",
        "<article class='card scroll'><table class='all'>"
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></article>",
    )


def _line(row, names) -> str:
    stage = f"{row['stage']}<small>{escape(_name(row.get('reranker', row['run'])))}</small>"
    recall = (
        f"<small>recall {row['index_recall@10']:.3f}</small>" if "index_recall@10" in row else ""
    )
    cells = [stage, escape(row["index"]) + recall, f"{row['queries']:,}", f"{row['gallery']:,}"]
    cells += [_cell(row, name) for name in names]
    cells += [f"{row['milliseconds_per_query']:.2f}"]
    title = f"<th>{escape(row['benchmark'])}<small>{escape(_where(row))}</small></th>"
    return f"<tr>{title}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _cell(row, name) -> str:
    if name not in row["metrics"]:
        return ""
    random = (
        f"<small>random {percent(row['random'][name])}</small>"
        if name in row.get("random", {})
        else ""
    )
    return f"<b>{percent(row['metrics'][name])}</b><small>{_range(row, name)}</small>{random}"
