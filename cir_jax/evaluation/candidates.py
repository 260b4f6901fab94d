"""Lists of candidates on disk: what a first stage found, for a second one to order.

Ours are `.npz` files of plain arrays. The `.pt` files of Candidate-Reranking are read too (`conversion.sources`): names
in the order of its first stage, CIRR's without the reference picture, and no scores.
"""

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax import files
from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation import metrics
from cir_jax.files import shown

FORMAT = 1
MOST_BYTES = 1 << 30
CUTS = (1, 5, 10, 50)


@dataclass(frozen=True)
class Candidates:
    """The first K names for each of Q queries, out of a gallery of N.

    Attributes:
      names: `[Q, K]` text, best first; "" is a missing one.
      gallery: `[N]` text, each name once.
      targets: `[Q]` text, the right answer of each query; None where labels are hidden.
      scores: `[Q, K]` float32 of the first stage, or None.
      split: as `val`.
      category: of FashionIQ, as `dress`; else "".
      model: what made them, the fingerprint of a checkpoint; "" where nobody knows.

    Raises:
      ValueError: shapes that do not fit, a name twice, or one that the gallery lacks.
    """

    names: np.ndarray
    gallery: np.ndarray
    targets: np.ndarray | None = None
    scores: np.ndarray | None = None
    split: str = ""
    category: str = ""
    model: str = ""

    def __post_init__(self):
        texts = [each for each in (self.names, self.gallery, self.targets) if each is not None]
        if any(np.asarray(each).dtype.kind != "U" for each in texts):
            raise ValueError("candidates: names, gallery and targets must be arrays of text")
        if self.names.ndim != 2 or self.gallery.ndim != 1 or not self.names.size:
            raise ValueError(
                f"candidates: names {self.names.shape} in a gallery {self.gallery.shape}; expected [Q, K] and [N]"
            )
        if self.targets is not None and self.targets.shape != self.names.shape[:1]:
            raise ValueError(f"candidates: {len(self.names)} queries, targets {self.targets.shape}")
        if self.scores is not None and self.scores.shape != self.names.shape:
            raise ValueError(f"candidates: names {self.names.shape}, scores {self.scores.shape}")
        self._check_names()

    def _check_names(self):
        known, counts = np.unique(self.gallery, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"candidates: the gallery has {shown(str(known[counts > 1][0]))} twice"
            )
        for what, names in (("name", self.names), ("target", self.targets)):
            missing = np.setdiff1d([""] if names is None else names, [*known, ""])
            if len(missing):
                raise ValueError(
                    f"candidates: {len(missing)} a {what} that the gallery of {len(known)} lacks: {shown(str(missing[0]))}"
                )
        self.rows  # noqa: B018 - evaluated for its error

    @property
    def rows(self) -> np.ndarray:
        """`[Q, K]` int64, the places of the names in the gallery; -1 is a missing one."""
        order = np.argsort(self.gallery)
        place = np.searchsorted(self.gallery, self.names, sorter=order).clip(max=len(order) - 1)
        rows = np.where(self.names == "", -1, order[place])
        return metrics.without_repetition(rows)

    def scored(self) -> dict[str, np.ndarray]:
        """recall@1, 5, 10, 50 and, if there are more, @K, for each query `[Q]`: targets outside the list are misses.

        Raises:
          ValueError: labels are hidden.
        """
        if self.targets is None:
            raise ValueError("these candidates have no targets; their labels are hidden")
        place = {str(name): row for row, name in enumerate(self.gallery)}
        count = self.names.shape[1]
        benchmark = Benchmark(
            name="candidates",
            variant=self.category or "-",
            split=self.split or "-",
            queries=[{}] * len(self.names),
            gallery=[{}] * len(self.gallery),
            ids=self.gallery.tolist(),
            positives=[{place[str(name)]: 1.0} for name in self.targets],
            metrics=tuple(f"recall@{k}" for k in sorted({*CUTS, count}) if k <= count),
        )
        ended = np.full((len(self.names), 1), -1)
        return metrics.per_query(np.concatenate([self.rows, ended], axis=1), benchmark)


def read_candidates(path: str | os.PathLike) -> Candidates:
    """Candidates from our `.npz` or the original's `.pt`, recognised by content.

    Raises:
      OSError: nothing is there.
      ValueError: neither; a damaged file; content that contradicts itself. The message begins with the path.
    """
    path = files.local_path(path)
    try:
        return _read_npz(path) if _is_npz(path) else _read_original(path)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def found_candidates(
    benchmark: Benchmark, rows: np.ndarray, scores: np.ndarray, model: str = ""
) -> Candidates:
    """Candidates from what a first stage found on a benchmark.

    Args:
      rows, scores: hits `[Q, K]`, best first, row -1 for a missing one; the reference, where it is no answer, counts as
        missing.
      model: its fingerprint.
    """
    struck = np.array(benchmark.exclude if len(benchmark.exclude) else [-1] * len(rows))
    ids = np.array([*benchmark.ids, ""], dtype=str)
    best = [_best(each) for each in benchmark.positives]
    single = all(len(each) == 1 for each in best)
    return Candidates(
        names=ids[np.where(rows == struck[:, None], -1, rows)],
        gallery=ids[:-1],
        targets=ids[[each[0] for each in best]] if single else None,
        scores=np.asarray(scores, np.float32),
        split=benchmark.split,
        category=_category(benchmark),
        model=model,
    )


def rows_in(found: Candidates, benchmark: Benchmark) -> np.ndarray:
    """The candidates `[Q, K]` as gallery rows of the benchmark that they were found on; -1 is a missing one.

    Raises:
      ValueError: they are of another split, category or gallery, or their queries or targets are others.
    """
    title = f"{benchmark.name}/{benchmark.variant}/{benchmark.split}"
    differ = lambda what, theirs, ours: ValueError(
        f"the candidates have {what} {theirs}, {title} has {ours}; take the file that was made for it"
    )
    for what, theirs, ours in (
        ("the split", found.split, benchmark.split),
        ("the category", found.category, _category(benchmark)),
    ):
        if theirs and ours and theirs != ours:
            raise differ(what, repr(theirs), repr(ours))
    if len(found.names) != len(benchmark.queries):
        raise differ("queries:", len(found.names), len(benchmark.queries))
    place = {name: row for row, name in enumerate(benchmark.ids)}
    if place.keys() != set(found.gallery.tolist()):
        odd = len(place.keys() ^ set(found.gallery.tolist()))
        raise differ(
            "a gallery of", len(found.gallery), f"{len(place)}, and {odd} names are in one only"
        )
    if found.targets is not None and any(benchmark.positives):
        wrong = [
            query
            for query, (name, right) in enumerate(zip(found.targets, benchmark.positives))
            if place[str(name)] not in _best(right)
        ]
        if wrong:
            raise differ(
                f"for query {wrong[0]} the target", repr(str(found.targets[wrong[0]])), "another"
            )
    of_place = np.array([place[str(name)] for name in found.gallery])
    return np.where(found.rows < 0, -1, of_place[found.rows])


def _best(right: Mapping[int, float]) -> list[int]:
    """The rows of the highest grade."""
    return [row for row, grade in right.items() if grade == max(right.values())]


def _category(benchmark: Benchmark) -> str:
    """FashionIQ's, which is the variant without its flags."""
    fashion = benchmark.name.partition(":")[0] == "fashioniq"
    return benchmark.variant.partition("-")[0] if fashion else ""


def is_candidates(path: str | os.PathLike) -> bool:
    """Whether a file begins like a zip or a pickle, as no text does."""
    with files.reported(path, "read"), open(path, "rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or start[:1] == b"\x80"


def write_candidates(path: str | os.PathLike, found: Candidates) -> None:
    """Write candidates as `.npz`, whole or not at all."""
    arrays = {"format": np.array(FORMAT), "names": found.names, "gallery": found.gallery}
    arrays |= {name: np.array(getattr(found, name)) for name in ("split", "category", "model")}
    for name in ("targets", "scores"):
        if getattr(found, name) is not None:
            arrays[name] = getattr(found, name)
    with files.write_atomically(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)


def _is_npz(path: Path) -> bool:
    with files.reported(path, "read"), open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as opened:
            return "names.npy" in opened.namelist()


def _read_npz(path: Path) -> Candidates:
    arrays = files.read_arrays(path, MOST_BYTES)
    if arrays.pop("format", np.array(0)).tolist() != FORMAT or "gallery" not in arrays:
        raise ValueError(f"is no file of candidates of format {FORMAT}")
    texts = {name: str(arrays.pop(name, "")) for name in ("split", "category", "model")}
    known = {name: arrays.pop(name, None) for name in ("names", "gallery", "targets", "scores")}
    if arrays:
        raise ValueError(f"holds the unknown arrays {shown(sorted(arrays))}")
    return Candidates(**known, **texts)


def _read_original(path: Path) -> Candidates:
    from cir_jax.conversion.sources import open_lists

    source = open_lists(path)
    facts, arrays = source.facts, source.tensors
    if "sorted_index_names" not in arrays or "index_names" not in facts:
        found = sorted([*arrays, *facts])[:8]
        raise ValueError(
            f"holds {shown(found)}; expected sorted_index_names, index_names and split"
        )
    texts = {name: facts.get(name, "") for name in ("split", "dress_types")}
    if any(type(each) is not str for each in texts.values()):
        raise ValueError("its split or dress_types are no text")
    targets = facts.get("target_names")
    found = Candidates(
        names=arrays["sorted_index_names"],
        gallery=_texts(facts["index_names"], "index_names"),
        targets=None if targets is None else _texts(targets, "target_names"),
        split=texts["split"],
        category=texts["dress_types"],
    )
    if "labels" in arrays and found.targets is not None:
        labels = arrays["labels"]
        expected = found.names == found.targets[:, None]
        if labels.shape != expected.shape or (labels != expected).any():
            raise ValueError("its labels are not where the names of its targets are")
    return found


def _texts(values: Any, what: str) -> np.ndarray:
    if type(values) is not list or not all(type(each) is str for each in values):
        raise ValueError(f"{what} is no list of names")
    return np.array(values, dtype=str)
