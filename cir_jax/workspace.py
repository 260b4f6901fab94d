"""What an evaluation opens and computes once: benchmarks, models, vectors, scores.

With a folder, what takes long is also kept on disk until the whole evaluation is written, so that an interrupted one
goes on where it was. Of several processes, which all call the same, the first has the folder.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax import files, processes
from cir_jax.data.benchmark import Benchmark, Chosen
from cir_jax.data.records import Gallery
from cir_jax.progress import progress
from cir_jax.vectors import Vectors, VectorWriter

SHARD = 8192  # items whose vectors an interruption can lose
SCORED = 1024  # queries whose candidate scores an interruption can lose
HELD = {
    "vectors": 4,
    "scored": 4,
    "candidates": 4,
}  # of the large kinds of things in memory; 8 of others

# (candidate rows [n, K] of some queries, place of the first of them, called with the number done) -> scores [n, K]
Score = Callable[[np.ndarray, int, Callable[[int], None]], np.ndarray]
Outcome = list[tuple[dict[str, Any], dict[str, np.ndarray]]]


def digest(value: Any) -> str:
    """16 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def content_digest(benchmark: Benchmark) -> str:
    """A digest of all that a benchmark asks and shows, so that nothing computed from other data is taken for its own.

    Pictures count by their bytes; those in files of their own, and galleries that lie in few large files, by the sizes
    of these and the times of their last change. A collection may have eleven million pictures.
    """
    gallery = benchmark.gallery
    held = gallery.files if isinstance(gallery, Gallery) else ()
    value = [
        [benchmark.name, benchmark.variant, benchmark.split, benchmark.metrics],
        [list(benchmark.ids), list(benchmark.exclude), list(benchmark.rules)],
        [list(map(int, rows)) for rows in benchmark.subset],
        [
            sorted((int(row), float(grade)) for row, grade in each.items())
            for each in benchmark.positives
        ],
        [_seen(query) for query in benchmark.queries],
        [_picture(path) for path in held] if held else [_seen(item) for item in gallery],
    ]
    return digest(value)


def _seen(raw: Mapping) -> dict[str, Any]:
    """A raw query or item, its picture by a digest."""
    return {name: _picture(x) if name == "image" else x for name, x in raw.items()}


def _picture(image) -> Any:
    if isinstance(image, str | os.PathLike):
        with contextlib.suppress(OSError):
            found = os.stat(image)
            return [os.fspath(image), found.st_size, found.st_mtime_ns]
        return os.fspath(image)
    return hashlib.sha256(
        image if isinstance(image, bytes) else np.ascontiguousarray(image)
    ).hexdigest()


class Workspace:
    """The things of one evaluation; those that a folder keeps are found again under a digest of all they depend on."""

    def __init__(self, folder: Path | None = None, batch_size: int = 128):
        self.folder, self.batch_size = folder, batch_size
        self._held: dict[str, OrderedDict] = {}
        self._used: set[Path] = set()

    def once(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave for this key; of each kind the last few are held."""
        held = self._held.setdefault(kind, OrderedDict())
        if key not in held:
            held[key] = make()
        held.move_to_end(key)
        while len(held) > HELD.get(kind, 8):
            held.popitem(last=False)
        return held[key]

    def benchmark(self, name: str) -> Benchmark:
        """The benchmark that a config names."""
        from cir_jax.data import named_benchmark

        return self.once("benchmark", name, lambda: named_benchmark(name))

    def content(self, name: str) -> str:
        """The `content_digest` of a benchmark."""
        return self.once("content", name, lambda: content_digest(self.benchmark(name)))

    def model(self, name: str):
        """The model of that name or folder."""
        from cir_jax.model import load

        return self.once("model", name, lambda: load(name))

    def candidates(self, path: str):
        """The `candidates.Candidates` in a file."""
        from cir_jax.evaluation.candidates import read_candidates

        return self.once("given", path, lambda: read_candidates(path))

    def candidates_digest(self, path: str) -> str:
        """16 hex digits of the content of a file of candidates."""
        return self.once("given digest", path, lambda: files.sha256(Path(path))[:16])

    def items(self, model, name: str) -> np.ndarray:
        """Vectors `[N, D]` of a benchmark's gallery, shard by shard, with progress."""
        gallery, ids = self.benchmark(name).gallery, self.benchmark(name).ids
        encode = lambda first, last: model.encode(
            "item", Chosen(gallery, range(first, last)), self.batch_size, advance, together=True
        )
        if self.folder is None:
            with progress(f"items of {name}", len(gallery)) as advance:
                return encode(0, len(gallery))
        writer = None
        if processes.first():
            place = self._place(f"items-{digest([model.fingerprint, self.content(name)])}")
            writer = VectorWriter(place, fingerprint=model.fingerprint)
        with writer or contextlib.nullcontext():
            done = int(processes.from_first(lambda: {"": np.array(writer.done)})[""])
            with progress(f"items of {name}", len(gallery), done) as advance:
                for first in range(done, len(gallery), SHARD):
                    last = min(first + SHARD, len(gallery))
                    vectors = encode(first, last)
                    if writer:
                        writer.add(vectors, ids[first:last])
            if writer:
                writer.finish()
        return processes.from_first(lambda: {"": Vectors(place).array()})[""]

    def scores(self, key: Any, rows: np.ndarray, score: Score) -> tuple[np.ndarray, float]:
        """Scores `[Q, K]` float32 of candidates `rows`, and the milliseconds they took, some queries at a time."""
        key, scores, spent = digest([key, rows.tolist()]), np.zeros(rows.shape, np.float32), 0.0
        count = int((rows >= 0).any(axis=1).sum())
        with progress("candidates of queries", count) as advance:
            for first in range(0, len(rows), SCORED):
                some, name = rows[first : first + SCORED], f"scores-{key}-{first}.npz"
                found = self._kept(
                    name, lambda some=some, first=first: _timed(score, some, first, advance)
                )
                scores[first : first + SCORED] = found["scores"]
                spent += float(found["milliseconds"])
        return scores, spent

    def outcome(self, key: Any, compute: Callable[[], Outcome]) -> Outcome:
        """`compute()`, or what it gave when it was computed before an interruption."""
        stored = self._kept(f"run-{digest(key)}.npz", lambda: self._packed(compute()))
        if self.folder is not None and processes.first():
            # The parts that a run was made of go with it, whichever process made them. Only what lies in the folder:
            # a name from a file must not lead a deletion out of it.
            named = json.loads(str(stored["parts"]))
            self._used |= {path for path in self.folder.iterdir() if path.name in named}
        return _unpacked(stored)

    def remove(self) -> None:
        """Delete what this evaluation has kept; what another one keeps in the folder stays."""
        for path in self._used:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if self.folder is not None and processes.first():
            with contextlib.suppress(OSError):  # not empty
                self.folder.rmdir()

    def _packed(self, outcome: Outcome) -> dict[str, np.ndarray]:
        rows = np.array(json.dumps([row for row, _ in outcome]))
        parts = np.array(json.dumps(sorted(path.name for path in self._used)))
        pairs = [(n, *each) for n, (_, arrays) in enumerate(outcome) for each in arrays.items()]
        return {"rows": rows, "parts": parts} | {f"{n}/{name}": x for n, name, x in pairs}

    def _place(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._used.add(self.folder / name)
        return self.folder / name

    def _kept(
        self, name: str, make: Callable[[], dict[str, np.ndarray]]
    ) -> Mapping[str, np.ndarray]:
        """Arrays from the file of that name; made, and written to it, if there is none that can be read."""
        if self.folder is None:
            return make()
        found = processes.from_first(lambda: _read(self._place(name)))
        if found is not None:
            return found
        arrays = make()
        if processes.first():
            with files.write_atomically(self._place(name)) as part:
                np.savez_compressed(part, **arrays)
        return arrays


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if it is not there, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception:  # of a dozen kinds, for a damaged archive
        return None


def _timed(score: Score, rows: np.ndarray, first: int, advance) -> dict[str, np.ndarray]:
    start = time.perf_counter()
    scores = score(rows, first, advance)
    return {"scores": scores, "milliseconds": np.array(1000 * (time.perf_counter() - start))}


def _unpacked(stored: Mapping[str, np.ndarray]) -> Outcome:
    rows = json.loads(str(stored["rows"]))
    of = lambda n: {k.partition("/")[2]: x for k, x in stored.items() if k.startswith(f"{n}/")}
    return [(row, of(n)) for n, row in enumerate(rows)]
