"""Results as pictures: self-contained HTML pages, without scripts or anything fetched from elsewhere."""

import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cir_jax import files
from cir_jax.retrieval import Result

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 16%, transparent);
        --soft: color-mix(in srgb, currentColor 60%, transparent); --accent: #2f6fed; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2.5rem auto; max-width: 68rem; padding: 0 1.5rem; }
h1 { font-size: 1.35rem; font-weight: 650; margin: 0 0 .3rem; }
.about { color: var(--soft); margin: 0 0 1.6rem; }
.query { display: flex; gap: 1rem; align-items: center; margin: 0 0 1.4rem; font-size: 1.1rem; }
.query img { width: 96px; height: 96px; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: .9rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .6rem; padding: .55rem; }
figure.right { outline: 3px solid var(--accent); outline-offset: -1px; }
img { background: #fff; border-radius: .35rem; object-fit: contain; }
figure img { width: 100%; aspect-ratio: 1; display: block; }
figcaption { font-size: .78rem; margin-top: .4rem; overflow-wrap: anywhere; }
figcaption b { font-weight: 650; } figcaption span { color: var(--soft); float: right; }
section { margin: 0 0 2.2rem; }
"""


def page(title: str, about: str, body: Iterable[str]) -> str:
    """A whole HTML document; `title` and `about` are escaped, `body` is HTML."""
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{html.escape(title)}</title>"
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p class='about'>{html.escape(about)}</p>{''.join(body)}</body></html>\n"
    )


def figure(
    image, caption: str, *, rank: int | None = None, score: float | None = None, right: bool = False
) -> str:
    """One picture with its rank, score and caption; a right answer is outlined."""
    from cir_jax.data.images import data_uri

    rank_html = f"<b>{rank}</b> " if rank is not None else ""
    score_html = f"<span>{score:.3f}</span>" if score is not None else ""
    name = html.escape(caption)
    return (
        f"<figure{' class=right' if right else ''}><img src='{data_uri(image)}' alt='{html.escape(caption, quote=True)}'>"
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
    results: Sequence[Result],
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
    about = f"{len(results)} of {len(index)} pictures, best first, with their scores"
    body = [query_line(text, image), f"<section class='row'>{''.join(figures)}</section>"]
    with files.write_atomically(path) as part:
        Path(part).write_text(page("Search results", about, body), encoding="utf-8")
