"""Searching in two stages: queries become vectors, an index finds candidates, a re-ranker orders them.

Any retriever, any index and any re-ranker go together; a retriever re-ranks too, by the inner product of another
query with the candidates (CFIR's second stage).
"""

import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cir_jax import processes
from cir_jax.data.documents import DocumentSpec, document_query
from cir_jax.index import Hits, Index
from cir_jax.model import Model

# Features of candidates that are held at once while their pairs are scored.
FEATURE_BYTES = 2**30
BLOCK = 256  # most candidates of a block; several processes take the blocks among themselves
COUNTED = 64  # queries whose scores of a whole gallery are held at once


class Result(NamedTuple):
    """One answer: the item's id, its score (larger is better), its row in the gallery.

    `stage` says whose score it is: the index's (1) or the re-ranker's (2).
    """

    id: str
    score: float
    row: int
    stage: int = 1


def check_fingerprint(model: Model, index: Index) -> None:
    """Refuse an index whose vectors another model made."""
    if index.fingerprint and model.fingerprint and index.fingerprint != model.fingerprint:
        raise ValueError(
            f"the index holds vectors of checkpoint {index.fingerprint}, the model "
            f"{model.name or 'given'} is {model.fingerprint}; embed the gallery again with this model, "
            "or search with the model that made the index"
        )


def as_query(raw: Mapping, stage: int, spec: DocumentSpec | None = None) -> dict:
    """What a raw query asks in a stage: a document first by its entities, then by its summary; others as they are.

    `wordings` stand for the text in the first stage, `text` in the second.
    """
    if raw.get("document") is not None:
        return document_query(raw, "entities" if stage == 1 else "summary", spec)
    words = "wordings" if stage == 1 and raw.get("wordings") else "text"
    return {part: raw[part] for part in ("image", words) if raw.get(part) is not None}


class Queries(Sequence):
    """The queries of a benchmark as they ask in one stage; read when they are needed."""

    def __init__(self, raw: Sequence[Mapping], stage: int, spec: DocumentSpec | None = None):
        self.raw, self.stage, self.spec = raw, stage, spec

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, row: int) -> dict:
        return as_query(self.raw[row], self.stage, self.spec)


def retrieve(
    index: Index,
    vectors: np.ndarray | tuple[np.ndarray, np.ndarray],
    k: int,
    exclude: Sequence[int] = (),
) -> Hits:
    """The k best items of each query.

    Args:
      index: anything with `search`.
      vectors: `[Q, D]` query vectors; or `([Q, M, D], mask [Q, M])` where queries ask several times: then the k best of
        each are united, an item counting with its best score.
      k: at least 1; where fewer items are found the rest is row -1.
      exclude: per query a row that is no answer (its reference picture), or -1; empty for none.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if isinstance(vectors, tuple):
        vectors, mask = vectors
        owner = np.nonzero(mask)[0]
        unwanted = np.asarray(exclude)[owner] if len(exclude) else ()
        return united(retrieve(index, vectors[mask], k, unwanted), owner, len(mask))
    if not len(exclude):
        return index.search(vectors, k)
    hits = index.search(vectors, k + 1)
    unwanted = (hits.rows == np.asarray(exclude)[:, None]) & (hits.rows >= 0)
    # A stable sort by "unwanted" moves the excluded row behind the others and keeps their order.
    order = np.argsort(unwanted, axis=1, kind="stable")[:, :k]
    return Hits(*(np.take_along_axis(values, order, axis=1) for values in hits))


def united(hits: Hits, owner: np.ndarray, queries: int) -> Hits:
    """Hits `[T, K]` of texts as hits `[Q, K]` of the queries that `owner` `[T]` says they belong to.

    Each item keeps its best score; equal scores are ordered by row.
    """
    rows = np.full((queries, hits.rows.shape[1]), -1, np.int64)
    scores = np.full(rows.shape, -np.inf, np.float32)
    for query in range(queries):
        mine = owner == query
        found, values = hits.rows[mine].ravel(), hits.scores[mine].ravel()
        order = np.lexsort((found, -values))
        order = order[found[order] >= 0]
        _, first = np.unique(found[order], return_index=True)
        best = order[np.sort(first)][: rows.shape[1]]
        rows[query, : len(best)], scores[query, : len(best)] = found[best], values[best]
    return Hits(rows, scores)


def score_candidates(
    model: Model,
    queries: Sequence[Mapping],
    pictures: Callable[[Sequence[int]], Sequence[Mapping]],
    rows: np.ndarray,
    progress: Callable[[int], None] | None = None,
    together: bool = False,
) -> np.ndarray:
    """Scores `[Q, K]` float32 of a re-ranker for each query's candidates; -inf where the row is -1.

    Each pair is scored once. What depends on a query alone is computed once, what depends on an item alone once for as
    many queries as fit half of `FEATURE_BYTES`; items are taken in blocks of at most `BLOCK` that fit the other half.

    Args:
      model: a re-ranker, or a retriever, which scores by the inner product.
      queries: as the method reads them (`as_query`).
      pictures: raw items of gallery rows (`Index.items`).
      rows: `[Q, K]` gallery rows.
      progress: called with the number of queries done.
      together: every process calls this with the same arguments, takes a part of the blocks, and gets all scores; the
        same bits as from one process.
    """
    out = np.full(rows.shape, -np.inf, np.float32)
    units = _units(model, rows)
    mine = processes.share(len(units)) if together else range(len(units))
    for number, (turn, block) in ((number, units[number]) for number in mine):
        if number == mine[0] or turn is not units[number - 1][0]:
            asked = model.features("query", [queries[row] for row in turn])
        items = model.features("item", pictures(block.tolist()))
        places = np.searchsorted(block, rows[turn]).clip(max=len(block) - 1)
        inside = block[places] == rows[turn]
        scores = model.score(asked, items, np.where(inside, places, -1))
        out[turn] = np.where(inside, scores, out[turn])
        if progress and (number == mine[-1] or turn is not units[number + 1][0]):
            progress(len(turn))
    if not together:
        return out
    return np.max([part["scores"] for part in processes.gather({"scores": out})], axis=0)


def _units(model: Model, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(queries, gallery rows) whose pairs are scored at once, for candidates `rows` `[Q, K]`."""
    wanted = np.nonzero((rows >= 0).any(axis=1))[0]
    if not len(wanted):
        return []
    fit = lambda part: max(1, FEATURE_BYTES // 2 // model.feature_bytes(part))
    queries, items = fit("query"), min(BLOCK, fit("item"))
    of = lambda turn: _blocks(np.setdiff1d(rows[turn], [-1]), items)
    return [(turn, block) for turn in _blocks(wanted, queries) for block in of(turn)]


def scores_of(
    vectors: np.ndarray | tuple[np.ndarray, np.ndarray], items: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Inner products `[Q, K]` of query vectors, as `retrieve` takes them, with the items `[N, D]` of `rows` `[Q, K]`.

    Of queries that ask several times the best counts; -inf where the row is -1.
    """
    several = isinstance(vectors, tuple)
    asked, mask = vectors if several else (vectors[:, None], np.ones((len(vectors), 1), bool))
    scores = np.einsum("qmd,qkd->qmk", asked, items[rows.clip(min=0)])
    best = np.where(mask[:, :, None], scores, -np.inf).max(axis=1)
    return np.where(rows >= 0, best, -np.inf).astype(np.float32)


def ranks_beyond(
    vectors: np.ndarray | tuple[np.ndarray, np.ndarray],
    items: np.ndarray,
    hits: Hits,
    positives: Sequence[Mapping[int, float]],
    exclude: Sequence[int] = (),
) -> np.ndarray:
    """The 0-based rank `[Q]` of the best right answer where the exact list does not hold one, -1 where it does.

    Counted are the items with a larger score, or an equal one and a lower row; that takes no sorting.
    """
    out = np.full(len(hits.rows), -1, np.int64)
    several = isinstance(vectors, tuple)
    ask = lambda query: vectors[0][query][vectors[1][query]] if several else vectors[[query]]
    struck = exclude if len(exclude) else np.full(len(out), -1)
    wanted = [np.array([row for row in r if row != x], np.int64) for r, x in zip(positives, struck)]
    absent = lambda query: len(wanted[query]) and not np.isin(wanted[query], hits.rows[query]).any()
    missing = np.array([q for q in range(len(out)) if absent(q) and len(ask(q))], np.int64)
    for turn in _blocks(missing, COUNTED):
        parts = [ask(query) for query in turn]
        starts = np.cumsum([0, *map(len, parts[:-1])])
        scores = np.maximum.reduceat(np.concatenate(parts) @ items.T, starts, axis=0)
        for query, row in zip(turn, scores):
            rank = _rank(row, wanted[query], struck[query])
            # In rounding two products may differ; what was not listed lies behind the list.
            out[query] = max(rank, hits.rows.shape[1])
    return out


def _rank(scores: np.ndarray, wanted: np.ndarray, struck: int) -> int:
    """How many items `[N]` come before the best of the wanted ones."""
    best = scores[wanted].max()
    first = wanted[scores[wanted] == best].min()
    before = (scores > best).sum() + (scores[:first] == best).sum()
    counted = struck >= 0 and (scores[struck] > best or (scores[struck] == best and struck < first))
    return int(before) - int(counted)


def _blocks(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[first : first + size] for first in range(0, len(values), size)]


def score_by_vectors(
    model: Model,
    queries: Sequence[Mapping],
    vectors: np.ndarray,
    rows: np.ndarray,
    together: bool = False,
) -> np.ndarray:
    """`score_candidates` of a retriever whose item vectors `[N, D]` are at hand, so that no picture is read."""
    out = np.full(rows.shape, -np.inf, np.float32)
    wanted = np.nonzero((rows >= 0).any(axis=1))[0]
    if len(wanted):
        asked = model.encode("query", [queries[row] for row in wanted], together=together)
        out[wanted] = scores_of(asked, vectors, rows[wanted])
    return out


def rerank(hits: Hits, scores: np.ndarray, fusion: float | None = None) -> Hits:
    """Hits whose first K are ordered by a second stage; those behind keep stage 1's order and scores.

    Args:
      hits: of stage 1, `[Q, N]`.
      scores: `[Q, K]` of stage 2 for the first K hits; equal ones keep stage 1's order.
      fusion: None to order by stage 2 alone; else the weight, 0 to 1, of stage 1's score in the mean of both, after
        each was standardised over a query's candidates.
    """
    count = scores.shape[1]
    present = hits.rows[:, :count] >= 0
    if fusion is not None:
        if not 0 <= fusion <= 1:
            raise ValueError(f"fusion is {fusion}; it is the weight of stage 1, from 0 to 1")
        first, second = (_standardised(x, present) for x in (hits.scores[:, :count], scores))
        scores = fusion * first + (1 - fusion) * second
    order = np.argsort(-np.where(present, scores, -np.inf), axis=1, kind="stable")
    scores = np.where(present, scores, -np.inf).astype(np.float32)
    reordered = lambda values, new: np.concatenate(
        [np.take_along_axis(new, order, axis=1), values[:, count:]], axis=1
    )
    return Hits(reordered(hits.rows, hits.rows[:, :count]), reordered(hits.scores, scores))


def _standardised(scores, present):
    """Scores with mean 0 and deviation 1 in each row; 0 where nothing is present."""
    count = present.sum(axis=1, keepdims=True).clip(1)
    values = np.where(present, scores, 0.0).astype(np.float64)
    centred = np.where(present, values - values.sum(axis=1, keepdims=True) / count, 0.0)
    spread = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    return centred / np.where(spread > 0, spread, 1.0)


def search(
    model: Model,
    index: Index,
    *,
    text: str | None = None,
    image: str | os.PathLike | bytes | np.ndarray | None = None,
    document: str | None = None,
    k: int = 10,
    reranker: Model | None = None,
    candidates: int = 50,
    fusion: float | None = None,
    exclude: str | None = None,
    documents: DocumentSpec | None = None,
    document_id: str = "",
) -> list[Result]:
    """Search with one query: a text, a picture, a picture and a text, or a document.

    Args:
      model: from `cir_jax.load`.
      index: from `cir_jax.open_index`, or built from vectors of the same model.
      text: what to look for.
      image: path, bytes, PIL picture or uint8 array `[H, W, 3]`.
      document: a whole text. Its entities ask one by one; a second stage asks with its summary.
      k: how many results; fewer come back if the gallery is smaller.
      reranker: a model that orders the best `candidates` again; `model` itself is one for documents.
      fusion: see `rerank`.
      exclude: the id of an item that is no answer, such as the picture that is to be changed.
      documents: where entities and summaries come from; `document_id` is the document's id in a file of them.

    Raises:
      ValueError: neither text nor picture nor document, an empty one, a document with a text or picture, k or
        `candidates` below 1, an id to exclude that the index lacks, an index of another model, or one that does not
        know its pictures though a re-ranker needs them.
    """
    check_fingerprint(model, index)
    raw = {**_checked_query(text, image, document), "id": document_id}
    if k < 1 or candidates < 1:
        raise ValueError(f"k is {k} and candidates {candidates}; both must be at least 1")
    k, candidates = (min(count, max(1, len(index))) for count in (k, candidates))
    vectors = model.encode("query", [as_query(raw, 1, documents)])
    unwanted = () if exclude is None else [_row_of(exclude, index)]
    hits = retrieve(index, vectors, k if reranker is None else max(k, candidates), unwanted)
    second = 0
    if reranker is not None:
        asked, rows = [as_query(raw, 2, documents)], hits.rows[:, :candidates]
        if reranker.fingerprint and reranker.fingerprint == index.fingerprint:
            scores = score_by_vectors(reranker, asked, index.vectors, rows)
        else:
            scores = score_candidates(reranker, asked, index.items, rows)
        hits, second = rerank(hits, scores, fusion), candidates
    return [
        Result(index.ids[row], float(score), int(row), 2 if place < second else 1)
        for place, (row, score) in enumerate(zip(hits.rows[0, :k], hits.scores[0, :k]))
        if row >= 0
    ]


def _visible(character: str) -> bool:
    """False for spaces, controls and what has no width."""
    return not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf")


def _unicode(text: str) -> bool:
    """False for a text with half of a surrogate pair, as from arguments that are no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _row_of(name: str, index: Index) -> int:
    """The row of an id."""
    found = [row for row, each in enumerate(index.ids) if each == name]
    if not found:
        raise ValueError(
            f"there is no item {name!r} to exclude among the {len(index)} of the index"
        )
    return found[0]


def _checked_query(text, image, document) -> dict:
    """The raw query of `search`, or the error that says what is missing."""
    for name, value in (("text", text), ("document", document)):
        if value is not None and not any(map(_visible, value)):
            raise ValueError(f"the query {name} is empty; give some words, a picture, or both")
        if value is not None and not _unicode(value):
            raise ValueError(f"the query {name} is no valid Unicode; give it as UTF-8")
    if document is not None and (text is not None or image is not None):
        raise ValueError("a document asks alone; leave out the text and the picture")
    if text is None and image is None and document is None:
        raise ValueError("a query needs a text, a picture, both, or a document; this one has none")
    return {"text": text, "image": image, "document": document}
