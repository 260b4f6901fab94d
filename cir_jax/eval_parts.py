"""What an interrupted evaluation has already computed, kept in OUTPUT/parts until everything is written."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax import files
from cir_jax.data.benchmark import Benchmark, Chosen
from cir_jax.progress import progress
from cir_jax.vectors import Vectors, VectorWriter

SHARD = 8192  # items whose vectors an interruption can lose
SCORED = 1024  # queries whose candidate scores an interruption can lose

# (candidate rows [n, K] of some queries, place of the first of them, called with the number done) -> scores [n, K]
Score = Callable[[np.ndarray, int, Callable[[int], None]], np.ndarray]
Outcome = list[tuple[dict[str, Any], dict[str, np.ndarray]]]


def mark(benchmark: Benchmark) -> str:
    """A digest of what is asked and what is right, so that parts of changed data are not taken for the same."""
    asked = [
        [query.get(name) for name in ("id", "text", "document")] for query in benchmark.queries
    ]
    answers = [sorted(map(int, rows)) for rows in benchmark.positives]
    name = [benchmark.name, benchmark.variant, benchmark.split]
    return digest([name, list(benchmark.ids), asked, answers, list(map(int, benchmark.exclude))])


def digest(value: Any) -> str:
    """16 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Parts:
    """The parts of one evaluation; `folder` None keeps nothing.

    Each part has a key, a digest of all it depends on: parts of other data or models are never found.
    """

    folder: Path | None = None
    batch_size: int = 128

    def items(self, model, benchmark: Benchmark) -> np.ndarray:
        """Vectors `[N, D]` of a benchmark's gallery, shard by shard, with progress."""
        encode = lambda first, last: model.encode(
            "item", Chosen(benchmark.gallery, range(first, last)), self.batch_size, advance
        )
        count, done = len(benchmark.gallery), 0
        writer = self._writer(model, benchmark)
        if writer:
            done = writer.done
        with progress(f"items of {benchmark.name}", count, done) as advance:
            if writer is None:
                return encode(0, count)
            for first in range(done, count, SHARD):
                last = min(first + SHARD, count)
                writer.add(encode(first, last), benchmark.ids[first:last])
        writer.finish()
        return Vectors(writer.folder).array()

    def _writer(self, model, benchmark) -> VectorWriter | None:
        if self.folder is None:
            return None
        key = digest([model.fingerprint, mark(benchmark)])
        return VectorWriter(self.folder / f"items-{key}", fingerprint=model.fingerprint)

    def scores(self, key: Any, rows: np.ndarray, score: Score) -> tuple[np.ndarray, float]:
        """Scores `[Q, K]` float32 of candidates `rows`, and the milliseconds they took, some queries at a time."""
        key, scores, spent = digest([key, rows.tolist()]), np.zeros(rows.shape, np.float32), 0.0
        count = int((rows >= 0).any(axis=1).sum())
        with progress("candidates of queries", count) as advance:
            for first in range(0, len(rows), SCORED):
                some = rows[first : first + SCORED]
                found, milliseconds = self._block(
                    f"scores-{key}-{first}", some, first, score, advance
                )
                scores[first : first + SCORED] = found
                spent += milliseconds
        return scores, spent

    def _block(self, name: str, rows: np.ndarray, first: int, score: Score, advance):
        path = self.folder and self.folder / f"{name}.npz"
        if path and path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                return stored["scores"], float(stored["milliseconds"])
        start = time.perf_counter()
        scores = score(rows, first, advance)
        milliseconds = 1000 * (time.perf_counter() - start)
        if path:
            with files.write_atomically(path) as part:
                np.savez_compressed(part, scores=scores, milliseconds=milliseconds)
        return scores, milliseconds

    def outcome(self, key: Any, compute: Callable[[], Outcome]) -> Outcome:
        """`compute()`, or what it gave when it was computed before the interruption."""
        if self.folder is None:
            return compute()
        path = self.folder / f"run-{digest(key)}.npz"
        if path.is_file():
            return _read_outcome(path)
        outcome = compute()
        _write_outcome(path, outcome)
        return outcome

    def remove(self) -> None:
        """Delete all parts."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _write_outcome(path: Path, outcome: Outcome) -> None:
    arrays = {f"{n}/{name}": x for n, (_, each) in enumerate(outcome) for name, x in each.items()}
    text = json.dumps([row for row, _ in outcome])
    with files.write_atomically(path) as part:
        np.savez_compressed(part, rows=np.array(text), **arrays)


def _read_outcome(path: Path) -> Outcome:
    with np.load(path, allow_pickle=False) as stored:
        rows = json.loads(str(stored["rows"]))
        arrays = [
            {
                name.partition("/")[2]: stored[name]
                for name in stored.files
                if name.startswith(f"{n}/")
            }
            for n in range(len(rows))
        ]
    return list(zip(rows, arrays))
