"""Results as pictures: self-contained HTML pages, without scripts or anything fetched from elsewhere."""

import html
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cir_jax import files
from cir_jax.progress import printable

if TYPE_CHECKING:  # it brings JAX with it
    from cir_jax.retrieval import Result

LONGEST_QUERY = 220  # characters of a query that a search page shows
STYLE = """
:root { color-scheme: light dark; --page: #f5f6f9; --card: #fff; --ink: #151a23; --soft: #5b6475;
  --line: #e2e6ed; --track: #e8ebf2; --accent: #2460e6; --right: #0b9a68; --pale: #8d97a9; --down: #d0700d; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1015; --card: #161b23; --ink: #e9ecf2; --soft: #9aa4b5;
  --line: #272e39; --track: #262d39; --accent: #7aa8ff; --right: #2fce95; --pale: #7b8699; --down: #f0a04b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: radial-gradient(70rem 26rem at 85% -9rem, color-mix(in srgb, var(--accent) 13%, transparent), transparent) no-repeat var(--page);
  margin: 0 auto; max-width: 70rem; padding: 2.6rem clamp(1rem, 3vw, 2rem) 4rem; }
h1 { font-size: clamp(1.6rem, 4.4vw, 2.3rem); line-height: 1.15; letter-spacing: -.022em; font-weight: 700;
  margin: 0 0 .5rem; text-wrap: balance; }
.about { color: var(--soft); margin: 0 0 1.7rem; }
.query { display: flex; gap: 1rem; align-items: center; margin: 0 0 1.4rem; font-size: 1.15rem; }
.query img { width: 96px; height: 96px; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: .9rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .8rem; padding: .6rem; }
figure.right { outline: 3px solid var(--right); outline-offset: -1px; }
img { background: #fff; border-radius: .45rem; object-fit: contain; }
figure img { width: 100%; aspect-ratio: 1; display: block; }
figcaption { font-size: .8rem; margin-top: .45rem; overflow-wrap: anywhere; }
figcaption b { font-weight: 650; } figcaption span { color: var(--soft); float: right; }
section { margin: 0 0 2.2rem; }
"""


def page(title: str, about: str, body: Iterable[str], style: str = "") -> str:
    """A whole HTML document; `title` and `about` are escaped, `body` is HTML and `style` more CSS."""
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title>"
    )
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}{style}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p class='about'>{html.escape(about)}</p>{''.join(body)}</body></html>\n"
    )


def write_page(path: str | os.PathLike, text: str) -> None:
    """Write a page whole or not at all; what is no text (stray bytes in names) becomes escapes."""
    with files.write_atomically(path) as part:
        Path(part).write_text(text, encoding="utf-8", errors="backslashreplace")


def figure(
    image, caption: str, *, rank: int | None = None, score: float | None = None, right: bool = False
) -> str:
    """One picture with its rank, score and caption; a right answer is outlined."""
    from cir_jax.data.images import data_uri

    rank_html = f"<b>{rank}</b> " if rank is not None else ""
    score_html = f"<span>{score:.3f}</span>" if score is not None else ""
    name = html.escape(printable(caption), quote=True)
    return (
        f"<figure{' class=right' if right else ''}><img src='{data_uri(image)}' alt='{name}'>"
        f"<figcaption>{score_html}{rank_html}{name}</figcaption></figure>"
    )


def query_line(text: str | None, image) -> str:
    """The query as a person gave it: its picture, its words."""
    from cir_jax.data.images import data_uri

    picture = f"<img src='{data_uri(image)}' alt='query picture'>" if image is not None else ""
    words = f"<div>“{html.escape(text)}”</div>" if text is not None else ""
    return f"<div class='query'>{picture}{words}</div>"


def search_page(
    path: str | os.PathLike,
    results: "Sequence[Result]",
    index,
    *,
    text: str | None = None,
    image=None,
) -> None:
    """Write the results of one search as a page with their pictures.

    Raises:
      ValueError: the index does not know where its pictures are.
    """
    items = index.items([result.row for result in results])
    figures = [
        figure(item["image"], item.get("text") or result.id, rank=rank, score=result.score)
        for rank, (result, item) in enumerate(zip(results, items), 1)
    ]
    body = [query_line(text and textwrap.shorten(text, LONGEST_QUERY, placeholder=" …"), image)]
    for stage, title in ((2, "Ordered by the second stage"), (1, "Ordered by the first stage")):
        shown = [html_of for html_of, result in zip(figures, results) if result.stage == stage]
        heading = f"<p class='about'>{title}, with its scores</p>" if shown else ""
        body.append(f"{heading}<section class='row'>{''.join(shown)}</section>" if shown else "")
    about = f"{len(results)} of {len(index)} pictures, best first"
    write_page(path, page("Search results", about, body))
