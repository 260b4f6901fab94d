"""The only file that touches ScaNN: build, tune, search, save and load one searcher over float32 vectors.

Scores are inner products. From `SMALLEST_TREE` rows on, a searcher is a partitioning tree, asymmetric hashing inside
the leaves and exact rescoring of the best; below that it is ScaNN's brute force, since neither can be trained.
ScaNN's own checks are few (a NaN in the data ends the process), so callers pass finite float32 arrays [N, D].
A searcher, saved or not, always answers the same; one built again from the same vectors may not, because the clustering
depends on where arrays lie in memory (seen with ScaNN 1.4.2, with one training thread too).
"""

import contextlib
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax import files

SMALLEST_TREE = 200
DIMENSIONS_PER_BLOCK = 4
ANISOTROPIC_THRESHOLD = 0.2
TRAINING_ROWS = 250_000
HELD_OUT = 1000
# Measured at widths 128 and 512: scanning 16 hashed rows takes as long as rescoring one exactly.
HASHED_ROWS_PER_RESCORED = 16
BATCH = 256
# A pickle that ScaNN would load without asking.
PICKLE = "scann_docids.pkl"
QUIET = threading.Lock()

Searcher = Any


@dataclass(frozen=True)
class ScannSettings:
    """How a searcher was built and tuned; part of the manifest of an index."""

    scorer: str  # "tree_ah" or "brute_force"
    leaves: int  # 0 for brute force, as the next two
    leaves_to_search: int
    reorder: int  # candidates rescored exactly
    k: int  # what recall means: the share of the exact top k that is found
    recall_target: float
    recall: float  # measured, the lower of two halves of the held-out queries; brute force is exact
    queries: int  # how many were held out
    held_out: str  # "given queries", "perturbed rows" or "none"

    def __str__(self) -> str:
        if self.scorer == "brute_force":
            return f"brute force (fewer than {SMALLEST_TREE} rows), recall 1.000"
        return (
            f"{self.leaves} leaves ({self.leaves_to_search} searched), {self.reorder} rescored, "
            f"recall@{self.k} {self.recall:.3f} (target {self.recall_target:g}) "
            f"on {self.queries:,} {self.held_out}"
        )


COUNT, SHARE = "a whole number from 0 on", "a finite number"
SETTINGS = {
    "scorer": "text",
    "leaves": COUNT,
    "leaves_to_search": COUNT,
    "reorder": COUNT,
    "k": COUNT,
    "recall_target": SHARE,
    "recall": SHARE,
    "queries": COUNT,
    "held_out": "text",
}


def read_settings(value: Any, rows: int) -> tuple[ScannSettings | None, list[str]]:
    """The settings of a manifest, and what is wrong with them for a searcher over `rows` vectors.

    ScaNN itself checks little: a number that is too large may end the process.
    """
    faults = files.field_faults(value, SETTINGS, "settings")
    if faults:
        return None, faults
    settings = ScannSettings(**{name: value[name] for name in SETTINGS})
    tree = settings.scorer == "tree_ah"
    ranges = {
        "leaves": (1, rows) if tree else (0, 0),
        "leaves_to_search": (1, settings.leaves) if tree else (0, 0),
        "reorder": (1, rows) if tree else (0, 0),
        "k": (1, rows),
    }
    faults = [
        f"settings.{name} is {value[name]}, expected {low} to {high}"
        for name, (low, high) in ranges.items()
        if not low <= value[name] <= high
    ]
    if not tree and settings.scorer != "brute_force":
        faults.append(
            f"settings.scorer is {settings.scorer!r}, expected 'tree_ah' or 'brute_force'"
        )
    return settings, faults


def import_scann() -> Any:
    """ScaNN's Python interface, without its TensorFlow half; RuntimeError if it cannot be imported.

    `import scann` fails where TensorFlow is newer than the one it was built for, so TensorFlow is hidden meanwhile.
    """
    hidden, path = sys.modules.get("tensorflow"), list(sys.path)
    present = "tensorflow" in sys.modules
    sys.modules["tensorflow"] = None
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"ScaNN cannot be imported ({error}); on Linux `pip install scann` brings it, "
            'elsewhere use the index kind "exact"'
        ) from error
    finally:
        sys.path[:] = path
        del sys.modules["tensorflow"]
        if present:
            sys.modules["tensorflow"] = hidden
    return scann_ops_pybind


def make_searcher(
    vectors: np.ndarray, recall: float, k: int, queries: np.ndarray | None = None
) -> tuple[Searcher, ScannSettings]:
    """A searcher over vectors [N, D], N > 0, tuned to find `recall` of the exact top k of held-out queries [Q, D].

    Without queries, perturbed rows of the gallery stand in for them: good for queries that lie among the items, too
    easy or too hard for others.
    """
    k = min(k, len(vectors))
    if len(vectors) < SMALLEST_TREE:
        return build(vectors, 0), ScannSettings("brute_force", 0, 0, 0, k, recall, 1.0, 0, "none")
    held_out = "perturbed rows" if queries is None else "given queries"
    queries = perturbed(vectors) if queries is None else spaced(queries, HELD_OUT)
    leaves = round(3.5 * len(vectors) ** 0.5)
    searcher = build(vectors, leaves)
    floor = floors(vectors, queries, k)

    def measure(leaves_to_search: int, reorder: int) -> float:
        scores = raw_search(searcher, queries, k, reorder, leaves_to_search)[1]
        return lower_half_recall(scores, floor) * scores.shape[1] / k

    to_search, reorder, found = cheapest(measure, len(vectors), leaves, k, recall)
    measured = (k, recall, found, len(queries), held_out)
    return searcher, ScannSettings("tree_ah", leaves, to_search, reorder, *measured)


def build(vectors: np.ndarray, leaves: int) -> Searcher:
    """A searcher over vectors [N, D]: tree, hashing and rescoring, or brute force if `leaves` is 0."""
    builder = import_scann().builder(vectors, 10, "dot_product")
    if leaves:
        builder = builder.tree(
            leaves,
            leaves,
            training_sample_size=min(len(vectors), TRAINING_ROWS),
            spherical=True,
            # ScaNN's default of 50 rows per leaf costs small galleries up to a third of the recall.
            min_partition_size=1,
        )
        builder = builder.score_ah(
            DIMENSIONS_PER_BLOCK, anisotropic_quantization_threshold=ANISOTROPIC_THRESHOLD
        ).reorder(80)
    else:
        builder = builder.score_brute_force()
    with quiet():
        return builder.build()


def search(
    searcher: Searcher, settings: ScannSettings, count: int, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 and scores float32 [Q, up to k] of queries [Q, D] among `count` rows; NaN score = nothing found.

    Beyond the k it was tuned for, leaves and rescored candidates grow in proportion; recall is then not promised.
    """
    if settings.scorer == "brute_force":
        return raw_search(searcher, queries, k)
    growth = max(1.0, k / settings.k)
    reorder = min(count, max(k, math.ceil(settings.reorder * growth)))
    leaves = min(settings.leaves, math.ceil(settings.leaves_to_search * growth))
    return raw_search(searcher, queries, k, reorder, leaves)


def raw_search(
    searcher: Searcher,
    queries: np.ndarray,
    k: int,
    reorder: int | None = None,
    leaves_to_search: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 and scores float32, as wide as the longest list found; shorter lists end in NaN scores."""
    many = len(queries) > BATCH
    call = searcher.search_batched_parallel if many else searcher.search_batched
    rows, scores = call(
        queries,
        final_num_neighbors=k,
        pre_reorder_num_neighbors=reorder,
        leaves_to_search=leaves_to_search,
    )
    return rows.astype(np.int64), scores


def write(searcher: Searcher, folder: Path) -> str:
    """Save a searcher into a new folder that may be moved; returns the name of its file of vectors."""
    folder.mkdir()
    try:
        with quiet():
            searcher.serialize(str(folder), relative_path=True)
    except RuntimeError as error:
        # ScaNN keeps the reason to itself.
        raise OSError(
            f"ScaNN could not write its files to {folder.absolute().parent.parent}; "
            "make room there, or see that it may be written, and repeat"
        ) from error
    return "dataset.npy"


def read(folder: Path, settings: ScannSettings) -> Searcher:
    """Load a searcher whose files were checked.

    ValueError if the folder holds a pickle, or if ScaNN cannot load it or finds another scorer than the settings say.
    """
    if os.path.lexists(folder / PICKLE):
        raise ValueError(
            f"{folder.absolute()} holds {PICKLE}, which cir_jax never writes and ScaNN would unpickle; "
            "do not use this index"
        )
    scann = import_scann()
    try:
        with quiet():
            searcher = scann.load_searcher(str(folder))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{folder.absolute()} is no searcher that ScaNN can load ({error}); make the index again"
        ) from error
    found = "brute_force" if "brute_force {" in searcher.config() else "tree_ah"
    if found != settings.scorer:
        raise ValueError(
            f"{folder.absolute()} is a searcher with {found}, the manifest says {settings.scorer!r}; "
            "make the index again"
        )
    return searcher


def cheapest(
    measure: Callable[[int, int], float], count: int, leaves: int, k: int, target: float
) -> tuple[int, int, float]:
    """The cheapest (leaves to search, rows to rescore) whose measured recall reaches the target, and that recall.

    All leaves with all rows rescored is exact search, so there is always an answer.
    """
    best, lowest = None, np.inf
    for reorder in ladder(k, count):
        most = (lowest - reorder) * HASHED_ROWS_PER_RESCORED * leaves / count
        limit = leaves if best is None else min(leaves, int(most))
        found = fewest_leaves(lambda n, reorder=reorder: measure(n, reorder), limit, target)
        if found:
            lowest = found[0] * count / leaves / HASHED_ROWS_PER_RESCORED + reorder
            best = found[0], reorder, found[1]
    return best or (leaves, count, measure(leaves, count))


def fewest_leaves(
    measure: Callable[[int], float], limit: int, target: float
) -> tuple[int, float] | None:
    """The least number of leaves up to `limit` that reaches the target, with its recall; None if none does."""
    if limit < 1:
        return None
    low, high = 0, 1
    while (recall := measure(high)) < target:
        if high == limit:
            return None
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        value = measure(middle)
        low, high, recall = (low, middle, value) if value >= target else (middle, high, recall)
    return high, recall


def ladder(first: int, last: int) -> list[int]:
    """first, then steps of about 1.5 up to and with last."""
    steps = [first]
    while steps[-1] < last:
        steps.append(min(last, steps[-1] * 3 // 2 + 1))
    return steps


def lower_half_recall(scores: np.ndarray, floor: np.ndarray) -> float:
    """The share of the scores [Q, up to k] that reach `floor` [Q, 1], in the worse half of the queries.

    The worse of two halves, because settings are chosen on these same queries.
    """
    share = (np.where(np.isnan(scores), -np.inf, scores) >= floor).mean(1)
    return float(min(half.mean() for half in (share[::2], share[1::2]) if len(half)))


def floors(vectors: np.ndarray, queries: np.ndarray, k: int, block: int = 16384) -> np.ndarray:
    """The k-th largest inner product of each query with the vectors less a rounding error, [Q, 1].

    Whatever scores as much belongs to the top k: of equal items, any will do.
    """
    best = np.full((len(queries), k), -np.inf, np.float32)
    for start in range(0, len(vectors), block):
        scores = np.concatenate([best, queries @ vectors[start : start + block].T], 1)
        best = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k:]
    return best.min(1, keepdims=True) - 1e-6 * np.abs(best).max(1, keepdims=True)


def perturbed(vectors: np.ndarray) -> np.ndarray:
    """Up to `HELD_OUT` rows, each with noise of its own length added and brought back to that length."""
    rows = spaced(vectors, HELD_OUT)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    noise = np.random.default_rng(0).standard_normal(rows.shape, np.float32)
    noisy = rows + length * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return noisy * length / np.maximum(np.linalg.norm(noisy, axis=1, keepdims=True), 1e-12)


def spaced(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep ScaNN's log lines off the terminal; if the block raises, they are shown after all."""
    with QUIET, tempfile.TemporaryFile() as log:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(kept, log.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
