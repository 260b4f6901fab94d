"""Recall curves and histograms of ranks, drawn in the colours of the page."""

import io
import re
from collections.abc import Sequence

import numpy as np

from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation import metrics

CURVE = 50  # largest k of the recall curves

TICKS = (1, 2, 5, 10, 20, 50)
ENDS = (1, 2, 5, 10, 20, 50)  # of the ranges of ranks in a histogram


def recall_curve(rank: np.ndarray, limit: int) -> np.ndarray:
    """Recall at 1…limit in percent, `[limit]`, of 0-based ranks `[Q]` (-1: outside)."""
    found = rank[rank >= 0]
    counts = np.bincount(found[found < limit], minlength=limit)
    return 100 * np.cumsum(counts) / max(1, len(rank))


def recall_plot(benchmark: Benchmark, ranks: Sequence[np.ndarray], depth: int, salt: str) -> str:
    """The curves of one or two rankings and of random order as inline SVG, in the colours of the page.

    Args:
      ranks: of each ranking the 0-based ranks `[Q]` (-1: outside); the last is drawn in the accent colour.
      depth: of the shortest list.
      salt: keeps the internal names of this plot apart from those of others in the page.
    """
    limit = min(CURVE, depth)
    if limit < 1:
        return "<p class='note'>no hits</p>"
    names = [f"recall@{k}" for k in range(1, limit + 1)]
    random = metrics.random_level(benchmark, names)
    curves = [recall_curve(rank, limit) for rank in ranks]
    label = f"recall at 1 to {limit}: " + ", ".join(
        f"{c[0]:.1f} to {c[-1]:.1f} percent" for c in curves
    )
    svg = _drawn(curves, 100 * np.array([random[name] for name in names]), salt)
    return svg.replace("<svg ", f"<svg role='img' aria-label='{label}' ", 1)


def rank_histogram(ranks: Sequence[np.ndarray], depth: int) -> str:
    """How many queries have their best right answer at which rank, for one or two rankings, as HTML.

    Args:
      ranks: of each ranking the 0-based ranks `[Q]`; those from `depth` on are outside, and count with the last range.
      depth: of the lists.
    """
    last = [end for end in ENDS if end <= depth]
    first = [1, *(end + 1 for end in last)]
    edges = [each - 1 for each in first] + [np.iinfo(np.int64).max]
    counts = [np.histogram(rank, edges)[0] for rank in ranks]
    titles = [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(first, last)] + [f"{first[-1]}+"]
    most = max(1, *(int(each.max()) for each in counts))
    columns = "".join(
        _column(title, [int(each[n]) for each in counts], most) for n, title in enumerate(titles)
    )
    return f"<div class='histogram'>{columns}</div>"


def _column(title: str, counts: Sequence[int], most: int) -> str:
    """The bars of one range of ranks; the last ranking has the accent colour."""
    styles = ("one", "two")[-len(counts) :]
    bars = "".join(
        f"<i class='{style}' style='height:{100 * count / most:.1f}%'></i>"
        for style, count in zip(styles, counts)
    )
    numbers = "".join(f"<b class='{style}'>{n:,}</b>" for style, n in zip(styles, counts))
    label = f"rank {title}: {' → '.join(f'{count:,}' for count in counts)} queries"
    return (
        f"<div title='{label}' role='img' aria-label='{label}'>"
        f"<span>{bars}</span><small>{title}</small>{numbers}</div>"
    )


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
