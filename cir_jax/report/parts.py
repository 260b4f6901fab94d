"""What the pages about evaluations share: their style, and how they say numbers."""

import html
from collections.abc import Iterable

import numpy as np

from cir_jax.evaluation.metrics import components

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
.plot svg { width: 100%; max-width: 34rem; height: auto; display: block; margin-top: .4rem; }
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
.histogram { display: flex; gap: clamp(.2rem, 1vw, .7rem); margin-top: 1rem; }
.histogram > div { flex: 1; display: flex; flex-direction: column; min-width: 0; text-align: center; line-height: 1.3; }
.histogram span { height: 8.5rem; display: flex; align-items: flex-end; justify-content: center; gap: 2px; border-bottom: 1px solid var(--line); }
.histogram i { flex: 0 1 1.6rem; border-radius: .25rem .25rem 0 0; min-height: 1px; }
.histogram i.one { background: var(--pale); } .histogram i.two { background: var(--accent); }
.histogram b { font-size: .76rem; font-weight: 600; } .histogram b.one { color: var(--soft); } .histogram b.two { color: var(--accent); }
.histogram small { font-size: .74rem; margin: .25rem 0 .15rem; white-space: nowrap; }
.audit .moves { width: 13rem; height: .8rem; margin: .35rem 0 0; border-radius: 99px; } .audit td { vertical-align: top; }
@media (max-width: 640px) { .card { padding: 1.05rem 1.05rem; } .strip { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .stage { grid-column: 1 / -1; } .stage small { display: inline; margin-left: .5rem; } .strip > small { grid-column: 1 / -1; }
 .wanted small { text-align: left; } .bars { min-width: 4.5rem; } th, td { padding-inline: .45rem; } .audit .moves { width: 6rem; } }
"""


def escape(value) -> str:
    """Text as HTML."""
    return html.escape(str(value), quote=True)


def percent(fraction: float) -> str:
    """A fraction in percent, as HTML."""
    return "&lt;0.1" if 0 < 100 * fraction < 0.05 else f"{100 * fraction:.1f}"


def points(difference: float) -> str:
    """A difference of fractions in points, with its sign."""
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return f"±{text[1:]}" if not float(text[1:]) else text


def sign(difference: float) -> str:
    """The CSS class of a difference."""
    return "plus" if difference > 0 else "minus" if difference < 0 else "same"


def chance(p: float) -> str:
    """What a p value says, in words."""
    if p < 0.001:
        return "hardly by chance: p < 0.001"
    words = "unlikely to be chance" if p < 0.05 else "may well be chance"
    return f"{words}: p = {p:.2g}"


def metric_title(name: str) -> str:
    """A metric as tables call it."""
    short = {
        "subset_recall": "subset R",
        "target_recall": "target R",
        "trec_recall": "share found",
        "recall": "R",
        "map": "mAP",
        "ndcg": "nDCG",
        "mrr": "MRR",
    }
    if len(parts := components(name)) > 1:
        return f"mean of {', '.join(map(metric_title, parts))}"
    kind, at, k = name.partition("@")
    return f"{short.get(kind, kind)}{at}{k}"


def section(title: str, note: str, *parts: str) -> str:
    """A part of the page under a heading; nothing where its parts are empty. All are HTML."""
    content = "".join(parts)
    return (
        f"<section><h2>{title}</h2><p class='note'>{note}</p>{content}</section>" if content else ""
    )


def grid(parts: Iterable[str]) -> str:
    """Cards side by side."""
    content = "".join(f"<article class='card'>{part}</article>" for part in parts)
    return f"<div class='two-up'>{content}</div>" if content else ""


def moves(before: np.ndarray, after: np.ndarray, names: tuple[str, str]) -> str:
    """How many of the 0-based ranks `[Q]` became better and worse, as a bar, and who is first, as a table."""
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
    square = _square(before == 0, after == 0, names)
    return f"<div class='moves'>{bar}</div><div class='key'>{key}</div>{square}"


def _square(before, after, names) -> str:
    """Queries at rank 1 before and after, as a 2 x 2 table."""
    count = lambda first, second: f"<td>{int(((before == first) & (after == second)).sum()):,}</td>"
    lines = [
        f"<tr><th>{words}</th>{count(first, True)}{count(first, False)}</tr>"
        for first, words in ((True, "rank 1"), (False, "lower"))
    ]
    titles = f"{escape(names[0])} ↓ &nbsp; {escape(names[1])} →"
    head = f"<tr><th>{titles}</th><th>rank 1</th><th>lower</th></tr>"
    return f"<table class='square'><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"
