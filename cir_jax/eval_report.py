"""What an evaluation found, as one HTML page: above all, what the second stage bought.

The page needs no scripts and fetches nothing. Every picture is stored in it once, as a CSS class.
"""

import html
import io
import os
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cir_jax import metrics, report
from cir_jax.data.benchmark import Benchmark

SHOWN = 8  # pictures in a strip
EXAMPLES = 4  # queries of each kind that one benchmark shows: gains, losses, drawn at random
PAGE_EXAMPLES = 12  # the same for a whole page, so that it stays small with many benchmarks
PICTURE = 160  # longest side of a stored picture
CURVE = 50  # largest k of the recall curves
SEED = 0  # of the queries that are drawn at random
SHORT = 220  # characters of a document that are shown before it is opened
TICKS = (1, 2, 5, 10, 20, 50)

STYLE = """
h2 { font-size: 1.4rem; letter-spacing: -.012em; margin: 0 0 .3rem; }
h3 { font-size: 1.02rem; margin: 1.5rem 0 .2rem; } h3 + .note { margin-bottom: .7rem; }
section { margin-top: 3.2rem; } small, .note, .soft { color: var(--soft); }
small { font-size: .78rem; font-weight: 400; letter-spacing: 0; } .note { margin: 0 0 1rem; font-size: .9rem; max-width: 46rem; }
b, td, .big { font-variant-numeric: tabular-nums; }
code { font: .86em ui-monospace, Menlo, Consolas, monospace; }
.models { display: flex; flex-wrap: wrap; gap: .5rem; margin: -1rem 0 1.5rem; padding: 0; list-style: none; }
.models li { background: var(--card); border: 1px solid var(--line); border-radius: 99px; padding: .14rem .8rem;
  font-size: .84rem; } .models code { color: var(--soft); margin-left: .4rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 1.1rem; padding: 1.3rem 1.5rem;
  box-shadow: 0 1px 2px #0000000a, 0 10px 28px -18px #00000038; min-width: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19.5rem), 1fr)); gap: 1.1rem;
  margin-top: 0; } .cards .card { container-type: inline-size; display: flex; flex-direction: column; }
.card header { display: flex; flex-wrap: wrap; gap: 0 .7rem; align-items: baseline; justify-content: space-between; }
.card h2 { font-size: 1.12rem; margin: 0; overflow-wrap: anywhere; }
.lead { display: flex; gap: 0 clamp(.5rem, 4cqi, 1.2rem); align-items: flex-start; margin: .9rem 0 .3rem; }
.big { display: block; font-size: clamp(1.9rem, 14cqi, 3.1rem); line-height: 1.05; font-weight: 720; letter-spacing: -.035em; }
.big i { font-style: normal; font-size: .46em; font-weight: 600; letter-spacing: 0; margin-left: .1em; }
.lead small { display: block; white-space: nowrap; line-height: 1.35; }
.before { color: var(--pale); } .after { color: var(--accent); } .arrow { font-size: 1.5rem; color: var(--pale); line-height: clamp(1.9rem, 14cqi, 3.1rem); }
.gauge { position: relative; height: .55rem; border-radius: 99px; background: var(--track); margin: 1rem 0 .9rem; }
.gauge i, .gauge u { position: absolute; top: 0; bottom: 0; border-radius: 99px; }
.gauge i { opacity: .38; min-width: 2px; } .gauge u { width: .55rem; margin-left: -.275rem; box-shadow: 0 0 0 2px var(--card); }
.gauge .one { background: var(--pale); } .gauge .two { background: var(--accent); }
.gauge .chance { width: 2px; margin: 0; background: var(--soft); box-shadow: none; top: -4px; bottom: -4px; }
.gain { margin: 0 0 .9rem; } .gain b { font-size: 1.2rem; display: block; letter-spacing: -.01em; }
.plus { color: var(--accent); } .minus { color: var(--down); }
.facts { margin: auto 0 .7rem; padding-top: .7rem; border-top: 1px solid var(--line); font-size: .9rem; }
.facts div { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; white-space: nowrap; font-weight: 600; text-align: right; font-variant-numeric: tabular-nums; }
.example { margin: 0 0 1rem; padding: 1rem 1.2rem 1.1rem; }
.ask { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: center; margin-bottom: .8rem; }
.ask .words { flex: 1 1 12rem; font-size: 1.12rem; font-weight: 600; overflow-wrap: anywhere; min-width: 0; }
.words details { font-size: .86rem; font-weight: 400; } .words p { font-size: .95rem; font-weight: 450; margin: 0; }
.words summary { cursor: pointer; color: var(--soft); }
.ask .tile { width: 60px; flex: none; } .wanted { display: flex; gap: .6rem; align-items: center; }
.wanted small { text-align: right; line-height: 1.2; }
.pill { border-radius: 99px; padding: .22rem .85rem; font-weight: 650; white-space: nowrap; background: var(--track); }
.pill.plus { background: color-mix(in srgb, var(--accent) 14%, transparent); }
.pill.minus { background: color-mix(in srgb, var(--down) 16%, transparent); }
.strip { display: grid; grid-template-columns: 4.6rem repeat(8, minmax(0, 1fr)); gap: .5rem; align-items: center; }
.strip + .strip { margin-top: .5rem; } .stage { font-weight: 650; font-size: .9rem; line-height: 1.25; }
.stage small { display: block; font-weight: 400; } .strip > small { grid-column: 2 / -1; }
.tile { aspect-ratio: 1; border-radius: .6rem; background: #fff center / contain no-repeat; border: 1px solid var(--line);
  position: relative; display: grid; place-items: center; background-origin: content-box; padding: 5px; color: #333;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.tile em { font: 500 .68rem/1.2 system-ui, sans-serif; overflow: hidden; max-height: 100%; overflow-wrap: anywhere; }
.tile.right { outline: 3px solid var(--right); outline-offset: -1px; }
.strip .tile.right::after { content: "✓"; position: absolute; right: -.4rem; top: -.4rem; width: 1.15rem; height: 1.15rem;
  border-radius: 50%; background: var(--right); color: var(--card); font: 700 .74rem/1.15rem system-ui, sans-serif; text-align: center; }
.two-up { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19.5rem), 1fr)); gap: 1.1rem; }
.moves { display: flex; height: 1.7rem; border-radius: .5rem; overflow: hidden; gap: 2px; margin: .9rem 0 .4rem; }
.moves span { min-width: 0; } .moves .plus { background: var(--accent); } .moves .same { background: var(--track); }
.moves .minus { background: var(--down); }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.3rem; margin: 0 0 .9rem; font-size: .9rem; }
.key i { display: inline-block; width: .68rem; height: .68rem; border-radius: 3px; margin-right: .42rem; }
.key .minus i { background: var(--down); } .key .plus i { background: var(--accent); } .key .same i { background: var(--track); box-shadow: inset 0 0 0 1px var(--pale); }
.key span { color: var(--ink); } .key .line { height: 3px; vertical-align: middle; width: 1.3rem; }
.plot svg { width: 100%; height: auto; display: block; margin-top: .4rem; }
.plot text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; width: 100%; }
th, td { padding: .42rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 550; font-size: .8rem; } tr:last-child > * { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } td small { display: block; line-height: 1.3; }
th:last-child, td:last-child { padding-right: 0; } tbody th { font-weight: 550; color: var(--ink); }
.all th, .all td { padding-inline: .42rem; } .all th small { display: block; } .all { font-size: .84rem; }
.all small { font-size: .74rem; }
.square { width: auto; } .square th, .square td { padding-inline: .5rem; } .square :first-child { padding-left: 0; } .square td { font-size: 1rem; font-weight: 600; }
.bars { width: 30%; min-width: 7rem; } .bars i { display: block; height: .34rem; border-radius: 99px; margin: 2px 0; min-width: 1px; }
.bars .one { background: var(--pale); } .bars .two { background: var(--accent); }
@media (max-width: 640px) { .card { padding: 1.05rem 1.05rem; } .strip { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .stage { grid-column: 1 / -1; } .stage small { display: inline; margin-left: .5rem; } .strip > small { grid-column: 1 / -1; }
 .wanted small { text-align: left; } .bars { min-width: 4.5rem; } th, td { padding-inline: .45rem; } }
"""


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
) -> None:
    """Write the page; an existing one is replaced as a whole.

    Args:
      results: (row, arrays) of every run and stage. `rows` is `[Q, depth]` (-1: no hit) and `rank` `[Q]`, the 0-based
        rank of the best right answer (-1: outside). A second stage belongs to the first stage of equal benchmark,
        variant, split, run and asked index.
      benchmark_of: the benchmark of a row.
      environment: `time`, `precision` and `machine`, as `cir_jax.eval.environment` gives them.

    Raises:
      ValueError: arrays of another number of queries than the benchmark has.
    """
    entries = list({_identity(row): Entry(row, arrays) for row, arrays in results}.values())
    compared = _comparisons(entries, benchmark_of)
    pictures: dict[str, str] = {}
    body = [
        _models(entries),
        _cards(compared),
        *_examples(compared, pictures),
        _moves(compared),
        _curves(compared),
        *_rules(compared),
        _table(entries),
    ]
    two_stages = any(each.second for each in compared)
    title = "What the second stage bought" if two_stages else "What the evaluation found"
    stored = "".join(f".{name}{{background-image:url({uri})}}" for uri, name in pictures.items())
    about = _about(compared, environment or {})
    report.write_page(path, report.page(title, about, body, STYLE + stored))


# ---- what belongs together ----


def _key(row):
    return tuple(row[name] for name in ("benchmark", "variant", "split", "run", "index_asked"))


def _identity(row):
    """What distinguishes a stage: runs that share a first stage each bring it along."""
    return *_key(row), row["stage"], *(row.get(name) for name in ("reranker", "k", "fusion"))


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
        compared.append(Comparison(benchmark, _escape(" · ".join(parts)), first, second))
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


def _escape(value) -> str:
    return html.escape(str(value), quote=True)


def _percent(fraction: float) -> str:
    return "&lt;0.1" if 0 < 100 * fraction < 0.05 else f"{100 * fraction:.1f}"


def _range(row, name) -> str:
    low, high = row["interval"][name]
    return f"({_percent(low)}–{_percent(high)})"


def _points(difference: float) -> str:
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return f"±{text[1:]}" if not float(text[1:]) else text


def _sign(difference: float) -> str:
    return "plus" if difference > 0 else "minus" if difference < 0 else "same"


def _chance(p: float) -> str:
    """What a p value says, in words."""
    if p < 0.001:
        return "hardly by chance: p < 0.001"
    words = "unlikely to be chance" if p < 0.05 else "may well be chance"
    return f"{words}: p = {p:.2g}"


def _metric(name: str) -> str:
    short = {
        "subset_recall": "subset R",
        "target_recall": "target R",
        "trec_recall": "share found",
        "recall": "R",
        "map": "mAP",
        "ndcg": "nDCG",
        "mrr": "MRR",
    }
    kind, at, k = name.partition("@")
    return f"{short.get(kind, kind)}{at}{k}"


def _explained(name: str) -> str:
    return "R@1: a right answer comes first" if name == "recall@1" else _metric(name)


def _lead(row) -> str:
    """The metric of the big figures."""
    return "recall@1" if "recall@1" in row["metrics"] else next(iter(row["metrics"]))


def _gain(compared: Comparison, name: str) -> float:
    first, second = compared.first.row, compared.last.row
    known = second.get("gain", {}) if compared.second else {}
    return known.get(name, second["metrics"][name] - first["metrics"][name])


def _place(rank: int, depth: int) -> str:
    return str(rank + 1) if rank >= 0 else f"beyond {depth}"


def _header(compared: Comparison) -> str:
    name = _escape(compared.first.row["benchmark"])
    return f"<header><h2>{name}</h2><small>{compared.label}</small></header>"


def _where(row) -> str:
    return f"{row['variant']} · {row['split']}"


def _systems(compared: Comparison) -> str:
    """Which model stands in which stage."""
    rows = [each.row for each in (compared.first, compared.second) if each]
    return _escape(" · ".join(f"stage {row['stage']}: {_system(row)}" for row in rows))


def _system(row) -> str:
    if row["stage"] == 1:
        index = "" if row["index"] == "exact" else f", {row['index']} index"
        return f"{_name(row['run'])}{index}"
    fusion = "" if row.get("fusion") is None else f", fusion {row['fusion']:g}"
    return f"{_name(row.get('reranker', '?'))}, first {row.get('k', '?')}{fusion}"


def _name(checkpoint: str) -> str:
    return Path(str(checkpoint)).name


def _section(title: str, note: str, *parts: str) -> str:
    content = "".join(parts)
    return (
        f"<section><h2>{title}</h2><p class='note'>{note}</p>{content}</section>" if content else ""
    )


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
        f"<li>{_escape(_name(name))}<code>{_escape(mark)}</code></li>"
        for mark, name in known.items()
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
        f"<div class='{'after' if row is rows[-1] else 'before'}'><b class='big'>{_percent(row['metrics'][name])}<i>%</i></b>"
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
    chance = f" <span class='soft'>{_escape(_chance(p))}</span>" if p is not None else ""
    return f"<p class='gain'><b class='{_sign(gain)}'>{_points(gain)} points</b>{chance}</p>"


def _facts(compared) -> str:
    """The other numbers of a card: R@10, the random level, sizes, models."""
    row = compared.first.row
    names = list(dict.fromkeys(n for n in (_lead(row), "recall@10") if n in row["metrics"]))
    facts = {_metric(name): _change(compared, name) for name in names[1:]}
    chance = [_percent(row["random"][name]) for name in names if name in row.get("random", {})]
    if chance:
        facts[f"random {' · '.join(map(_metric, names))}"] = f"{' · '.join(chance)} %"
    facts["queries · gallery"] = f"{row['queries']:,} · {row['gallery']:,}"
    listed = "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items())
    return f"<dl class='facts'>{listed}</dl><small>{_systems(compared)}</small>"


def _change(compared, name) -> str:
    values = [each.row["metrics"][name] for each in (compared.first, compared.second) if each]
    return " → ".join(map(_percent, values)) + " %"


# ---- examples ----


def examples(before: np.ndarray, after: np.ndarray, depth: int, count: int) -> dict[str, list[int]]:
    """Queries to show, `{"gain": [...], "loss": [...], "drawn": [...]}`, at most `count` of each.

    Gains and losses are the largest changes of 1 / rank, ties in the order of the queries; the drawn ones come from all
    queries, whatever happened to them.

    Args:
      before, after: 0-based ranks `[Q]`; `depth` means that it is outside.
    """
    values = [np.where(rank < depth, 1 / (1 + rank), 0.0) for rank in (before, after)]
    change = values[1] - values[0]
    draw = np.random.default_rng(SEED).permutation(len(change))[:count]
    return {
        "gain": [int(q) for q in np.argsort(-change, kind="stable")[:count] if change[q] > 0],
        "loss": [int(q) for q in np.argsort(change, kind="stable")[:count] if change[q] < 0],
        "drawn": [int(q) for q in draw],
    }


def _examples(compared, pictures):
    """A section for each benchmark that has a second stage."""
    staged = [each for each in compared if each.second]
    for each in staged:
        count = max(1, min(EXAMPLES, PAGE_EXAMPLES // len(staged)))
        before, after, depth = _standing(each)
        chosen = examples(before, after, depth, count)
        counts = {"gain": int((after < before).sum()), "loss": int((after > before).sum())}
        row = each.first.row
        yield _section(
            f"{_escape(row['benchmark'])} <small>{each.label}</small>",
            f"The first {SHOWN} pictures of both stages. Right answers are outlined and ticked.",
            *(_kind(each, kind, queries, counts, pictures) for kind, queries in chosen.items()),
        )


def _kind(compared, kind, queries, counts, pictures) -> str:
    titles = {"gain": "Biggest gains", "loss": "Biggest losses", "drawn": "Drawn at random"}
    shown = "".join(_example(compared, query, pictures) for query in queries)
    note = (
        f"Not chosen: {len(queries)} of all {len(compared.benchmark.queries):,} queries, drawn with seed {SEED}."
        if kind == "drawn"
        else _told(kind, len(queries), counts[kind])
    )
    return f"<div class='{kind}'><h3>{titles[kind]}</h3><p class='note'>{note}</p>{shown}</div>"


def _told(kind, shown, total) -> str:
    way = "up" if kind == "gain" else "down"
    if not total:
        return f"No right answer moved {way}."
    share = f"all {total:,}" if shown == total else f"the {shown} largest of {total:,}"
    return f"Chosen: {share} queries whose right answer moved {way}, by the change of 1 / rank."


def _example(compared, query, pictures) -> str:
    before, after, _ = _standing(compared)
    moved = _sign(before[query] - after[query])
    places = [_place(e.arrays["rank"][query], e.arrays["rows"].shape[1]) for e in compared[2:]]
    strips = "".join(_strip(compared, e, query, pictures) for e in compared[2:])
    return (
        f"<article class='card example' data-query='{query}'><div class='ask'>{_query(compared.benchmark, query, pictures)}"
        f"{_wanted(compared, query, pictures)}<span class='pill {moved}'>rank {' → '.join(places)}</span></div>{strips}</article>"
    )


def _query(benchmark, query, pictures) -> str:
    """What was asked: picture, words, or a document that opens."""
    raw = benchmark.queries[query]
    picture = _tile(raw, "query picture", pictures) if raw.get("image") is not None else ""
    document, text = raw.get("document"), raw.get("text")
    words = f"“{_escape(text)}”" if text and text != document else ""
    if document:
        words += f"<p>{_escape(textwrap.shorten(document, SHORT, placeholder=' …'))}</p>"
        if len(document) > SHORT:
            words += f"<details><summary>whole text</summary>{_escape(document)}</details>"
    return f"{picture}<div class='words'>{words}</div>"


def _wanted(compared, query, pictures) -> str:
    """A right answer of the highest grade, since neither strip may hold it."""
    positives = compared.benchmark.positives[query]
    if not positives:
        return ""
    more = f"<br>1 of {len(positives)}" if len(positives) > 1 else ""
    item = compared.benchmark.gallery[max(positives, key=positives.get)]
    return f"<div class='wanted'><small>looked for{more}</small>{_tile(item, 'looked for', pictures)}</div>"


def _strip(compared, entry, query, pictures) -> str:
    """The first hits of one stage, without the reference of the query, which is no answer."""
    benchmark = compared.benchmark
    reference = benchmark.exclude[query] if len(benchmark.exclude) else -1
    hits = [int(row) for row in entry.arrays["rows"][query] if row >= 0 and row != reference][
        :SHOWN
    ]
    tiles = [
        _tile(benchmark.gallery[row], f"{place}", pictures, row in benchmark.positives[query])
        for place, row in enumerate(hits, 1)
    ]
    rank = _place(entry.arrays["rank"][query], entry.arrays["rows"].shape[1])
    content = "".join(tiles) or "<small>no hits</small>"
    stage = entry.row["stage"]
    return f"<div class='strip'><div class='stage'>stage {stage}<small>rank {rank}</small></div>{content}</div>"


def _tile(raw, role, pictures, right=False) -> str:
    """A picture by its class, or the words of an item that has none."""
    from cir_jax.data.images import data_uri

    words = str(raw.get("text") or raw.get("id") or "")
    label = _escape(": ".join(filter(None, (role, words))) + (", a right answer" if right else ""))
    styles, inside = f"tile{' right' if right else ''}", f"<em>{_escape(words)}</em>"
    if raw.get("image") is not None:
        uri = data_uri(raw["image"], PICTURE)
        styles, inside = f"{styles} {pictures.setdefault(uri, f'p{len(pictures)}')}", ""
    return f"<div class='{styles}' role='img' aria-label='{label}' title='{label}'>{inside}</div>"


# ---- wins and losses ----


def _moves(compared) -> str:
    return _section(
        "Wins and losses",
        "What the second stage did to the best right answer of each query, and how many queries have one at rank 1.",
        _grid(_moved(each) for each in compared if each.second),
    )


def _grid(parts) -> str:
    content = "".join(f"<article class='card'>{part}</article>" for part in parts)
    return f"<div class='two-up'>{content}</div>" if content else ""


def _moved(compared: Comparison) -> str:
    before, after, _ = _standing(compared)
    counts = {
        "plus": (int((after < before).sum()), "moved up"),
        "same": (int((after == before).sum()), "stayed"),
        "minus": (int((after > before).sum()), "moved down"),
    }
    bar = "".join(
        f"<span class='{k}' style='flex:{n}'></span>" for k, (n, _) in counts.items() if n
    )
    key = "".join(
        f"<span class='{k}'><i></i><b>{n:,}</b> {words}</span>" for k, (n, words) in counts.items()
    )
    return f"{_header(compared)}<div class='moves'>{bar}</div><div class='key'>{key}</div>{_square(before == 0, after == 0)}"


def _square(before, after) -> str:
    """Queries at rank 1 before and after, as a 2 x 2 table."""
    count = lambda first, second: f"<td>{int(((before == first) & (after == second)).sum()):,}</td>"
    lines = [
        f"<tr><th>{words}</th>{count(first, True)}{count(first, False)}</tr>"
        for first, words in ((True, "rank 1"), (False, "lower"))
    ]
    head = "<tr><th>stage 1 ↓ &nbsp; stage 2 →</th><th>rank 1</th><th>lower</th></tr>"
    return f"<table class='square'><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


# ---- recall curves ----


def _curves(compared) -> str:
    key = (
        "<span class='key'><span><i class='line' style='background:var(--accent)'></i>stage 2</span>"
        "<span><i class='line' style='background:var(--pale)'></i>stage 1</span>"
        "<span><i class='line' style='background:repeating-linear-gradient(90deg,var(--soft) 0 4px,transparent 4px 7px)'></i>random order</span></span>"
    )
    plots = (
        f"<div class='plot'>{_header(each)}{_plot(each, number)}</div>"
        for number, each in enumerate(compared)
    )
    return _section(
        "Recall at k",
        f"Queries with a right answer among the first k, in percent.{key}",
        _grid(plots),
    )


def recall_curve(rank: np.ndarray, limit: int) -> np.ndarray:
    """Recall at 1…limit in percent, `[limit]`, of 0-based ranks `[Q]` (-1: outside)."""
    found = rank[rank >= 0]
    counts = np.bincount(found[found < limit], minlength=limit)
    return 100 * np.cumsum(counts) / max(1, len(rank))


def _plot(compared: Comparison, number: int) -> str:
    """The curves as inline SVG, in the colours of the page whichever they are."""
    lists = [each for each in (compared.first, compared.second) if each]
    limit = min(CURVE, *(each.arrays["rows"].shape[1] for each in lists))
    if limit < 1:
        return "<p class='note'>no hits</p>"
    names = [f"recall@{k}" for k in range(1, limit + 1)]
    random = metrics.random_level(compared.benchmark, names)
    curves = [recall_curve(each.arrays["rank"], limit) for each in lists]
    label = f"recall at 1 to {limit}: " + ", ".join(
        f"{c[0]:.1f} to {c[-1]:.1f} percent" for c in curves
    )
    svg = _drawn(curves, 100 * np.array([random[name] for name in names]), f"plot {number}")
    return svg.replace("<svg ", f"<svg role='img' aria-label='{label}' ", 1)


# Matplotlib knows no CSS variables: it draws in these colours, which are replaced afterwards.
_COLOURS = {
    "#010101": "var(--ink)",
    "#010102": "var(--accent)",
    "#010103": "var(--pale)",
    "#010104": "var(--soft)",
    "#010105": "var(--line)",
}
_INK, _SECOND, _FIRST, _RANDOM, _LINE = _COLOURS


def _drawn(curves, random, salt) -> str:
    """SVG text of one plot; `salt` keeps its internal names apart from those of other plots in the page."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 10.5}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(settings):
        canvas = Figure(figsize=(4.3, 3.0), layout="constrained")
        _draw(canvas.add_subplot(), curves, random)
        text = io.StringIO()
        canvas.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (?:xmlns(?::\w+)?="[^"]*"|id="[\w.]+_\d+")', "", svg)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg


def _draw(axes, curves, random) -> None:
    places = np.arange(1, len(random) + 1)
    axes.plot(places, random, color=_RANDOM, linewidth=1.4, linestyle=(0, (4, 2)))
    if len(curves) > 1:
        axes.fill_between(places, *curves, color=_SECOND, alpha=0.12, linewidth=0)
    for curve, colour in zip(curves, (_FIRST, _SECOND)):
        axes.plot(places, curve, color=colour, linewidth=2.4, solid_capstyle="round")
        axes.plot(places[:1], curve[:1], "o", color=colour, markersize=5)
    axes.set_xscale("log")
    ticks = [k for k in TICKS if k <= len(random)]
    axes.set_xticks(ticks, ticks, color=_INK)
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(0, 101, 20), range(0, 101, 20), color=_INK)
    axes.set(ylim=(-1, 101), xlim=(0.94, max(1.1, 1.04 * len(random))))
    axes.set_xlabel("k", color=_INK)
    axes.grid(color=_LINE, linewidth=0.8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# ---- tables ----


def _rules(compared):
    """A table by kind of query for each benchmark that has kinds."""
    for each in compared:
        row, name = each.first.row, _lead(each.first.row)
        if not row.get("rules"):
            continue
        yield _section(
            f"{_escape(row['benchmark'])} by kind of query <small>{each.label}</small>",
            f"{_metric(name)} in percent, most frequent kinds first.",
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
    cells = "".join(f"<td>{_percent(value)}</td>" for value in values)
    if len(values) > 1:
        gain = values[1] - values[0]
        cells += f"<td class='{_sign(gain)}'><b>{_points(gain)}</b></td>"
    bars = "".join(
        f"<i class='{style}' style='width:{100 * value:.1f}%'></i>"
        for style, value in zip(("one", "two"), values)
    )
    return (
        f"<tr><th>{_escape(rule)}</th><td>{queries:,}</td>{cells}<td class='bars'>{bars}</td></tr>"
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
        *map(_metric, names),
        "ms per query",
    ]
    head = "".join(f"<th>{_escape(title)}</th>" for title in titles)
    lines = "".join(_line(entry.row, names) for entry in entries)
    return _section(
        "Everything measured",
        "Metrics in percent, with 95 % intervals over queries and what random order reaches. Recall of an index: how much of "
        "the exact first ten an approximate index finds.",
        "<article class='card scroll'><table class='all'>"
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></article>",
    )


def _line(row, names) -> str:
    stage = f"{row['stage']}<small>{_escape(_name(row.get('reranker', row['run'])))}</small>"
    recall = (
        f"<small>recall {row['index_recall@10']:.3f}</small>" if "index_recall@10" in row else ""
    )
    cells = [stage, _escape(row["index"]) + recall, f"{row['queries']:,}", f"{row['gallery']:,}"]
    cells += [_cell(row, name) for name in names]
    cells += [f"{row['milliseconds_per_query']:.2f}"]
    title = f"<th>{_escape(row['benchmark'])}<small>{_escape(_where(row))}</small></th>"
    return f"<tr>{title}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _cell(row, name) -> str:
    if name not in row["metrics"]:
        return ""
    random = (
        f"<small>random {_percent(row['random'][name])}</small>"
        if name in row.get("random", {})
        else ""
    )
    return f"<b>{_percent(row['metrics'][name])}</b><small>{_range(row, name)}</small>{random}"
