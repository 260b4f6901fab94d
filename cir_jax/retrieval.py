"""Searching: queries become vectors, an index finds their items."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cir_jax.index import Hits, Index
from cir_jax.model import Model


class Result(NamedTuple):
    """One answer: the item's id, its score (larger is better) and its row in the gallery."""

    id: str
    score: float
    row: int


def check_fingerprint(model: Model, index: Index) -> None:
    """Refuse an index whose vectors another model made."""
    if index.fingerprint and model.fingerprint and index.fingerprint != model.fingerprint:
        raise ValueError(
            f"the index holds vectors of checkpoint {index.fingerprint}, the model "
            f"{model.name or 'given'} is {model.fingerprint}; embed the gallery again with this model, "
            "or search with the model that made the index"
        )


def retrieve(index: Index, vectors: np.ndarray, k: int, exclude: Sequence[int] = ()) -> Hits:
    """The k best items of each query.

    Args:
      index: anything with `search`.
      vectors: `[Q, D]` query vectors.
      k: at least 1; where the gallery has fewer items the rest is row -1.
      exclude: per query a row that is no answer (its reference picture), or -1; empty for none.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if not len(exclude):
        return index.search(vectors, k)
    hits = index.search(vectors, k + 1)
    unwanted = (hits.rows == np.asarray(exclude)[:, None]) & (hits.rows >= 0)
    # A stable sort by "unwanted" moves the excluded row behind the others and keeps their order.
    order = np.argsort(unwanted, axis=1, kind="stable")[:, :k]
    return Hits(*(np.take_along_axis(values, order, axis=1) for values in hits))


def search(
    model: Model,
    index: Index,
    *,
    text: str | None = None,
    image: str | os.PathLike | bytes | np.ndarray | None = None,
    k: int = 10,
) -> list[Result]:
    """Search with one query: a text, a picture, or a picture and a text.

    Args:
      model: from `cir_jax.load`.
      index: from `cir_jax.open_index`, or built from vectors of the same model.
      text: what to look for.
      image: path, bytes, PIL picture or uint8 array `[H, W, 3]`.
      k: how many results; fewer come back if the gallery is smaller.

    Raises:
      ValueError: neither text nor picture, an empty text, k below 1, or an index of another model.
    """
    check_fingerprint(model, index)
    if text is not None and not text.strip():
        raise ValueError("the query text is empty; give some words, a picture, or both")
    if text is None and image is None:
        raise ValueError("a query needs a text, a picture, or both; this one has neither")
    query = {"text": text, "image": image}
    vectors = model.encode("query", [{name: x for name, x in query.items() if x is not None}])
    rows, scores = retrieve(index, vectors, k)
    found = rows[0] >= 0
    return [
        Result(index.ids[row], float(score), int(row))
        for row, score in zip(rows[0][found], scores[0][found])
    ]
