"""Search structures over item vectors: exact on the device mesh, approximate with ScaNN.

    python -m cir_jax.index VECTORS DEST --kind exact|scann [--recall 0.95 --k 10]

An index carries the ids of its rows, the locator of their pictures and the fingerprint of the checkpoint that made
the vectors, so that a saved one is all a search needs.
"""

import functools
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from cir_jax import files, processes, scann_index
from cir_jax.commands import Limited
from cir_jax.compilation import keep_compiled
from cir_jax.scann_index import ScannSettings
from cir_jax.vectors import (
    Items,
    Vectors,
    check_queries,
    check_vectors,
    load_array,
    read_ids,
    write_ids,
)

# Query batches are padded to one of these sizes, so that each is compiled once.
BUCKETS = (8, 32, 128, 512)
# Rows of the gallery are multiplied in about 16 blocks, of at least and at most so many.
BLOCKS, LEAST_ROWS, MOST_ROWS = 16, 128, 8192


class Hits(NamedTuple):
    """The best rows of each query; equal scores are ordered by row, missing hits stand last."""

    rows: np.ndarray  # [Q, K] int64, -1 = nothing
    scores: np.ndarray  # [Q, K] float32, descending, -inf where the row is -1


class Index(Protocol):
    """What searches need of a search structure."""

    kind: str  # "exact" or "scann"
    ids: Sequence[str]
    gallery: Any  # locator of the pictures, a JSON value, or None
    fingerprint: str | None  # of the checkpoint that made the vectors
    checkpoint: str | None  # its name or folder
    items: Callable[[Sequence[int]], list[Mapping[str, Any]]]

    def __len__(self) -> int: ...

    def search(self, queries: np.ndarray, k: int) -> Hits: ...

    def save(self, path: str | os.PathLike) -> None: ...


class ExactIndex:
    """Every score, in float32, each device of the mesh ranking its own slice of the gallery.

    The mesh may be that of several processes; then all of them search together, and all get the same hits, bit for
    bit those of one process.
    """

    kind = "exact"

    def __init__(
        self,
        vectors: Vectors | np.ndarray,
        ids: Sequence[str] | None = None,
        gallery: Any = None,
        fingerprint: str | None = None,
        mesh: Any = None,
        checkpoint: str | None = None,
    ):
        """vectors: `Vectors` or floats [N, D] (not copied on the host: leave them unchanged); N may be 0.

        ids: N strings, by default those of the `Vectors`, else row numbers; mesh: by default all devices.
        """
        from cir_jax.sharding import make_mesh

        _describe(self, vectors, ids, gallery, fingerprint, checkpoint)
        self.mesh = make_mesh() if mesh is None else mesh
        self._placed = _place(self.vectors, self.mesh) if len(self) else None

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> Hits:
        """The k best rows of each query; queries [Q, D] finite, Hits [Q, k]. Equal scores: the lower row first."""
        queries, k = check_queries(queries, self.width), _checked_k(k)
        found = min(k, len(self))
        if not found or not len(queries):
            return _nothing(len(queries), k)
        rank = _ranker(self.mesh)
        size = _bucket(len(queries))
        parts = []
        for start in range(0, len(queries), size):
            block = queries[start : start + size]
            block = np.pad(block, ((0, size - len(block)), (0, 0)))
            parts.append(rank(block, self._placed, len(self), found))
        rows, scores = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
        return _as_hits(rows[: len(queries)], scores[: len(queries)], k)

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to a new folder; FileExistsError if there is one."""
        with files.write_folder(path) as folder:
            np.save(folder / "vectors.npy", self.vectors, allow_pickle=False)
            _seal(folder, self, "vectors.npy")


class ScannIndex:
    """Approximate search with ScaNN, tuned on held-out queries; `settings` tells how."""

    kind = "scann"

    def __init__(
        self,
        vectors: Vectors | np.ndarray,
        ids: Sequence[str] | None = None,
        gallery: Any = None,
        fingerprint: str | None = None,
        *,
        checkpoint: str | None = None,
        recall: float = 0.95,
        k: int = 10,
        queries: np.ndarray | None = None,
        built: tuple[Any, ScannSettings] | None = None,
    ):
        """The first four as in `ExactIndex`; building takes about three times the memory of the vectors.

        recall: the share of the exact top k to find; queries: held-out queries [Q, D] to tune it on, else perturbed
        rows of the gallery; built: a searcher and its settings, as `open_index` reads them.
        RuntimeError if ScaNN cannot be imported; ValueError for an empty gallery.
        """
        _describe(self, vectors, ids, gallery, fingerprint, checkpoint)
        if not len(self):
            raise ValueError('a "scann" index needs at least one row; use the kind "exact"')
        if not 0 < recall <= 1:
            raise ValueError(f"recall is {recall}, expected a share in (0, 1]")
        if queries is not None:
            queries = check_queries(queries, self.width)
            if not len(queries):
                raise ValueError("queries is empty; leave it out or give queries to tune on")
        if built is None and processes.first():  # of several processes, the others ask it
            built = scann_index.make_searcher(self.vectors, recall, _checked_k(k), queries)
        self._searcher, self.settings = built or (None, None)

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> Hits:
        """About the k best rows of each query; queries [Q, D] finite, Hits [Q, k]."""
        queries, k = check_queries(queries, self.width), _checked_k(k)
        if not len(queries):
            return _nothing(0, k)
        asked = (self._searcher, self.settings, len(self), queries, min(k, len(self)))
        find = lambda: dict(zip(Hits._fields, scann_index.search(*asked)))
        return _as_hits(**processes.from_first(find), k=k)

    def config(self) -> str:
        """ScaNN's own configuration of the searcher, as protocol buffer text."""
        return self._searcher.config()

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to a new folder; FileExistsError if there is one."""
        with files.write_folder(path) as folder:
            vectors = "scann/" + scann_index.write(self._searcher, folder / "scann")
            _seal(folder, self, vectors, settings=asdict(self.settings))


def make_index(
    kind: str,
    vectors: Vectors | np.ndarray,
    ids: Sequence[str] | None = None,
    gallery: Any = None,
    fingerprint: str | None = None,
    *,
    mesh: Any = None,
    recall: float = 0.95,
    k: int = 10,
    queries: np.ndarray | None = None,
    checkpoint: str | None = None,
) -> ExactIndex | ScannIndex:
    """An index of this kind, "exact" or "scann"; see the classes for the arguments.

    Where ScaNN cannot be imported, and for an empty gallery, "scann" gives an `ExactIndex`, says so once on stderr,
    and `index.kind` tells what serves.
    """
    _checked_kind(kind)
    if kind == "scann" and _scann_serves(len(vectors)):
        tuning = {"recall": recall, "k": k, "queries": queries}
        return ScannIndex(vectors, ids, gallery, fingerprint, checkpoint=checkpoint, **tuning)
    return ExactIndex(vectors, ids, gallery, fingerprint, mesh, checkpoint)


def open_index(path: str | os.PathLike, mesh: Any = None) -> ExactIndex | ScannIndex:
    """The index saved at `path`, its files checked; a "scann" one is served exactly where ScaNN is missing.

    FileNotFoundError or ValueError if the folder is no index, is damaged, or was made by a newer cir_jax.
    """
    folder = files.local_path(path)
    manifest = files.read_manifest(folder, "index")
    kind, rows, width = manifest["index"], manifest["rows"], manifest["width"]
    name, sums = manifest["vectors"], manifest["files"]
    faults = [f"files lacks {needed}" for needed in (name, "ids.txt") if needed not in sums]
    settings = None
    if kind == "scann":
        settings, found = scann_index.read_settings(manifest.get("settings"), rows)
        faults += found
    files.refuse_manifest(folder, "index", faults)
    files.check_sums(folder, sums)
    vectors = load_array(folder / name, rows)
    if (vectors.shape, vectors.dtype) != ((rows, width), np.float32):
        raise ValueError(
            f"{folder / name} has shape {vectors.shape} of {vectors.dtype}, "
            f"expected {(rows, width)} of float32; make the index again"
        )
    ids = read_ids(folder / "ids.txt", rows)
    carried = {label: manifest[label] for label in ("gallery", "fingerprint", "checkpoint")}
    if kind == "scann" and _scann_serves(rows):
        built = scann_index.read(folder / "scann", settings), settings
        return ScannIndex(vectors, ids, **carried, built=built)
    return ExactIndex(vectors, ids, **carried, mesh=mesh)


@functools.cache
def _ranker(mesh) -> Callable:
    """The jitted ranking on this mesh: only k candidates of each device travel."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from cir_jax.sharding import AXES

    def best(scores, rows, k):
        """The k best of rows `[Q, n]`; of equal scores the first."""
        scores, places = jax.lax.top_k(scores, min(k, scores.shape[1]))
        return scores, jnp.take_along_axis(rows, places, 1)

    def of_block(queries, count, k, numbered):
        number, block = numbered
        rows = number * block.shape[1] + jnp.arange(block.shape[1])
        scores = jnp.matmul(queries, block, precision=jax.lax.Precision.HIGHEST)
        # top_k sorts -0 behind 0, which would break ties by sign instead of by row.
        scores = jnp.where(scores == 0, 0.0, scores)
        scores = jnp.where(rows < count, scores, -jnp.inf)
        return best(scores, jnp.broadcast_to(rows, scores.shape), k)

    def local(queries, blocks, count, k):
        numbers = jax.lax.axis_index(AXES) * len(blocks) + jnp.arange(len(blocks))
        found = jax.lax.map(functools.partial(of_block, queries, count, k), (numbers, blocks))
        # One list after the other, in the order of their rows: [blocks, Q, k] to [Q, blocks * k].
        found = best(*(jnp.moveaxis(x, 0, 1).reshape(len(queries), -1) for x in found), k)
        gather = functools.partial(jax.lax.all_gather, axis_name=AXES, axis=1, tiled=True)
        scores, rows = best(*map(gather, found), k)
        return rows, scores

    def rank(queries, placed, count, k):
        return jax.shard_map(
            lambda queries, blocks, count: local(queries, blocks, count, k),
            mesh=mesh,
            in_specs=(P(), P(AXES), P()),
            out_specs=P(),
            check_vma=False,
        )(queries, placed, count)

    return jax.jit(rank, static_argnums=3)


def _place(vectors: np.ndarray, mesh) -> Any:
    """The vectors [N, D] in blocks [B, D, n], padded with zeros, the blocks spread over all devices.

    Transposed, because this product is up to half again as fast for 8 to 32 queries and equal for more.
    """
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from cir_jax.sharding import AXES

    rows, width = _block_rows(len(vectors)), vectors.shape[1]
    blocks = -(-len(vectors) // rows // mesh.size) * mesh.size

    def part(index):
        start, stop, _ = index[0].indices(blocks)
        some = vectors[start * rows : stop * rows]
        some = np.pad(some, ((0, (stop - start) * rows - len(some)), (0, 0)))
        return some.reshape(-1, rows, width).swapaxes(1, 2)

    place = NamedSharding(mesh, P(AXES))
    return jax.make_array_from_callback((blocks, width, rows), place, part)


def _block_rows(rows: int) -> int:
    """How many rows are multiplied at once.

    This depends on the size of the gallery and on nothing else: the last bits of a product depend on its shape, and
    the lists shall be the same on any number of devices and processes.
    """
    return min(MOST_ROWS, max(LEAST_ROWS, 1 << (max(1, rows) // BLOCKS).bit_length()))


def _bucket(queries: int) -> int:
    """How many queries to score at once: one of few sizes."""
    return next((size for size in BUCKETS if size >= queries), BUCKETS[-1])


def _describe(index, vectors, ids, gallery, fingerprint, checkpoint) -> None:
    """Check the vectors and set what both kinds of index carry."""
    if isinstance(vectors, Vectors):
        ids = vectors.ids if ids is None else ids
        gallery = vectors.gallery if gallery is None else gallery
        fingerprint = vectors.fingerprint if fingerprint is None else fingerprint
        checkpoint = vectors.checkpoint if checkpoint is None else checkpoint
        vectors = vectors.array()
    index.vectors = check_vectors(vectors)
    index.width = index.vectors.shape[1]
    index.ids = [str(name) for name in (range(len(index.vectors)) if ids is None else ids)]
    if len(index.ids) != len(index.vectors):
        raise ValueError(
            f"{len(index.vectors)} vectors with {len(index.ids)} ids; give one id per vector"
        )
    index.gallery, index.fingerprint, index.checkpoint = gallery, fingerprint, checkpoint
    index.items = Items(index.ids, gallery)


def _seal(folder: Path, index: Index, vectors: str, **more) -> None:
    """Write the ids, and last the manifest with the checksums of everything else."""
    write_ids(folder / "ids.txt", index.ids)
    manifest = {
        "format": files.FORMAT,
        "kind": "index",
        "index": index.kind,
        "rows": len(index),
        "width": index.width,
        "fingerprint": index.fingerprint,
        "checkpoint": index.checkpoint,
        "gallery": index.gallery,
        "vectors": vectors,
        "files": files.folder_sums(folder),
    }
    files.write_json(folder / files.MANIFEST, manifest | more)


def _checked_k(k: int) -> int:
    if operator.index(k) < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    return operator.index(k)


def _checked_kind(kind: str) -> str:
    if kind not in ("exact", "scann"):
        raise ValueError(f'index kind is {kind!r}, expected "exact" or "scann"')
    return kind


def _nothing(queries: int, k: int) -> Hits:
    return Hits(np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf, np.float32))


def _as_hits(rows: np.ndarray, scores: np.ndarray, k: int) -> Hits:
    """Lists of up to k as Hits [Q, k]: NaN and -inf are nothing, equal scores ordered by row."""
    found = ~(np.isnan(scores) | np.isneginf(scores))
    rows, scores = np.where(found, rows, -1), np.where(found, scores, -np.inf)
    order = np.lexsort((rows, -scores), axis=-1)
    hits = _nothing(len(rows), k)
    hits.rows[:, : rows.shape[1]] = np.take_along_axis(rows, order, 1)
    hits.scores[:, : rows.shape[1]] = np.take_along_axis(scores, order, 1)
    return hits


def _scann_serves(rows: int) -> bool:
    """Whether ScaNN can hold these rows; if not, say once that the exact index serves."""
    try:
        scann_index.import_scann()
    except RuntimeError as error:
        _say_once(f"{error}. The exact index serves instead.")
        return False
    if not rows:
        _say_once("ScaNN cannot index an empty gallery. The exact index serves instead.")
    return rows > 0


@functools.cache
def _say_once(message: str) -> None:
    print(f"cir_jax.index: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Command(Limited):
    """Build an index over a folder of vectors and save it."""

    vectors: Path
    """VECTORS, a folder made by python -m cir_jax.embed"""
    dest: Path
    """DEST, the folder to write; it must not exist"""
    kind: Literal["exact", "scann"] = "exact"
    """scann is approximate and made for large galleries"""
    recall: float = 0.95
    """scann: the share of the exact top k to find"""
    k: int = 10
    """scann: how many results the recall is tuned for"""


def main(argv: Sequence[str] | None = None) -> None:
    """Build, tune and save an index as the command line says, and tell in one line what was written."""
    import tyro

    command = tyro.cli(
        Command,
        prog="python -m cir_jax.index",
        args=argv,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    files.refuse_existing(command.dest)
    keep_compiled(command.cache)
    vectors, tuning = Vectors(command.vectors), {"recall": command.recall, "k": command.k}
    if command.limit:
        first, origin = slice(command.limit), {"checkpoint": vectors.checkpoint}
        carried = vectors.ids[first], vectors.gallery, vectors.fingerprint
        index = make_index(command.kind, vectors.array()[first], *carried, **origin, **tuning)
    else:
        index = make_index(command.kind, vectors, **tuning)
    index.save(command.dest)
    line = f"wrote {command.dest}: {index.kind} index, {len(index):,} rows x {index.width}"
    print(line if index.kind == "exact" else f"{line}, {index.settings}")


if __name__ == "__main__":
    from cir_jax.commands import start

    start("index")
