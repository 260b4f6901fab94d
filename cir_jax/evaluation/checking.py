"""`python -m cir_jax.eval --check FILE [--labels FILE]`: judge anybody's ranked lists, and score them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cir_jax.evaluation import candidates, metrics, submissions
from cir_jax.progress import printable


def check_files(paths: Sequence[Path], labels: Path | None = None) -> None:
    """Print what each file is and, where right answers are known, its scores.

    Raises:
      ValueError: the first file that its server would refuse, with everything that is wrong with it.
    """
    known = submissions.read_labels(labels) if labels else None
    for path in paths:
        if candidates.is_candidates(path):
            _candidates(path, known)
        else:
            _lists(path, known)


def _lists(path: Path, labels: submissions.Labels | None) -> None:
    found = submissions.read(path)
    if labels is not None:
        submissions.check(found, labels, path)
    title = submissions.KINDS[found.kind].title
    counts = {len(names) for names in found.lists.values()}
    _say(path, f"{title}, {len(found.lists):,} queries, {_range(counts)} names each: valid")
    if labels is None:
        print("  not held against labels; --labels FILE scores it")
    elif not all(asked.right for asked in labels.queries.values()):
        print("  the right answers are not published; the server scores it")
    else:
        values, aspects = submissions.score(found, labels)
        _scores(values)
        _by_aspect(values, aspects)


def _candidates(path: Path, labels: submissions.Labels | None) -> None:
    if labels is not None:
        raise ValueError(f"{path} holds candidates with targets of their own; leave out --labels")
    found = candidates.read_candidates(path)
    (queries, count), gallery = found.names.shape, len(found.gallery)
    part = " ".join(filter(None, (found.category, found.split)))
    _say(
        path,
        f"candidates{f' of {part}' if part else ''}, {queries:,} queries, the first {count} of {gallery:,}",
    )
    if found.targets is not None:
        _scores(found.scored())


def _say(path: Path, what: str) -> None:
    print(printable(f"{path}: {what}"))


def _range(counts: set[int]) -> str:
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"


def _scores(values: Mapping[str, np.ndarray]) -> None:
    """Each metric in percent with its interval."""
    for name, value in values.items():
        low, high = metrics.interval(value)
        print(f"  {name:18} {100 * value.mean():8.4f} %  ({100 * low:.2f} to {100 * high:.2f})")


def _by_aspect(values: Mapping[str, np.ndarray], aspects: Sequence[Sequence[str]]) -> None:
    if "map@10" in values:
        for aspect, row in metrics.by_rule(values, aspects).items():
            title = printable(f"map@10, {aspect}")
            print(f"  {title:40} {100 * row['map@10']:8.4f} %  {row['queries']:,} queries")
