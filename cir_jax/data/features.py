"""Features that other tools computed, as vectors of our own: what their readers share."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from cir_jax.data.records import PICTURES, open_gallery
from cir_jax.vectors import VectorWriter

# The number of rows of a part, and a function that reads their keys and vectors `[n, D]`.
Piece = tuple[int, Callable[[], tuple[Sequence[str], np.ndarray]]]


def write_unit_vectors(
    dest: str | os.PathLike, pieces: Iterable[Piece], gallery: str | os.PathLike | None = None
) -> Path:
    """Write features, made unit, as vectors that `python -m cir_jax.index` takes; a shard for each piece.

    A feature that is zero or not finite has no direction; it is noted as skipped. After an interruption the same call
    continues behind the last whole piece.

    Args:
      gallery: where the pictures are (`open_gallery`), found by `key`; ids are then the gallery's, else the keys.

    Raises:
      ValueError: a gallery that lacks keys, or in which they are not unique.
    """
    names, locator = _ids_by_key(gallery)
    with VectorWriter(dest, fingerprint=None, gallery=locator) as writer:
        start = 0
        for count, read in pieces:
            if start >= writer.done:
                keys, vectors = read()
                writer.add(*_unit_rows(vectors, _ids(keys, names)))
            start += count
        writer.finish()
    return Path(dest)


def key(name: str) -> str:
    """What a picture is called by tools that know it under different paths: `12` of `00000/12.jpg`, of `12` itself."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in PICTURES else path.name


def _ids_by_key(gallery) -> tuple[dict[str, str] | None, Mapping | None]:
    """(ids of a gallery by key, its locator)."""
    if gallery is None:
        return None, None
    opened = open_gallery(gallery)
    names = {key(name): name for name in opened.ids}
    if len(names) < len(opened):
        raise ValueError(f"{gallery} has several pictures with one key; features fit none of them")
    return names, opened.locator


def _ids(keys: Sequence[str], names) -> list[str]:
    if names is None:
        return list(keys)
    lost = [each for each in keys if key(each) not in names]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(keys)} features are of pictures that the gallery lacks (first: "
            f"{', '.join(map(repr, lost[:3]))}); give the gallery that they were computed from"
        )
    return [names[key(each)] for each in keys]


def _unit_rows(vectors: np.ndarray, ids: Sequence[str]):
    """(unit rows float32, their ids, those without a direction as skipped), as `VectorWriter.add` takes them."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    good = (np.isfinite(lengths) & (lengths > 0))[:, 0]
    kept = [name for name, fine in zip(ids, good) if fine]
    reason = "its feature is zero or not finite"
    skipped = [{"id": name, "reason": reason} for name, fine in zip(ids, good) if not fine]
    return vectors[good] / lengths[good], kept, skipped
