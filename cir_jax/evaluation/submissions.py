"""The ranked lists that evaluation servers take: read, checked, written, and scored where labels are at hand.

Five kinds, recognised by content: the two files of CIRR (`recall` and `recall_subset`), CIRCO's, FashionIQ's
predictions, and runs as TREC and `trec_eval` know them. A file is checked as a whole, and what is wrong is said in one
error; a file that a server would refuse is never written. The layouts are those of the servers' own descriptions and
sample files.
"""

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cir_jax import files
from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation import metrics
from cir_jax.files import shown

MOST_BYTES = 512 << 20  # of a file that is read
MOST_FAULTS = 12  # kinds of faults that one error lists
MOST_CIRR = 5 << 20  # bytes that CIRR's server takes
MOST_ITEMS = 1000  # per topic of a run, a rule of the track
CIRR_QUERIES = {"test1": 4148, "val": 4181}
CIRCO_QUERIES = {"test": 800, "val": 220}
# (queries, items) of the published lists; those of shirts are alike in val and test
FASHIONIQ_SIZES = {
    (2017, 3817): "dress val",
    (2038, 6346): "shirt val and test",
    (1961, 5373): "toptee val",
    (2024, 3818): "dress test",
    (2056, 5374): "toptee test",
    (5985, 11452): "dress train",
    (5988, 19036): "shirt train",
    (6027, 16121): "toptee train",
}
CUTS = (1, 5, 10, 50)


class Lists(NamedTuple):
    """Ranked lists of some queries, as one file holds them.

    Attributes:
      kind: a key of `KINDS`.
      lists: query id -> names, best first. FashionIQ's queries have no ids: they are numbered from "0".
      about: CIRR's version; the tag of a TREC run.
      scores: of a TREC run, as long as the lists.
      records: of FashionIQ the captions file's own entries, which the predictions repeat.
    """

    kind: str
    lists: Mapping[str, list[str]]
    about: str = ""
    scores: Mapping[str, list[float]] = {}
    records: tuple[Mapping[str, Any], ...] = ()


class Asked(NamedTuple):
    """What labels say about a query."""

    reference: str = ""
    members: tuple[str, ...] = ()  # of its closed group, without the reference
    right: Mapping[str, float] = {}  # name -> grade; none where labels are hidden
    aspects: tuple[str, ...] = ()


class Labels(NamedTuple):
    """An annotation file: its family, its queries by id, and the names in the gallery if they are known."""

    family: str
    queries: Mapping[str, Asked]
    pool: frozenset[str] = frozenset()


class Kind(NamedTuple):
    """How one kind of file is built and judged."""

    title: str
    family: str
    names: int | None  # in each list; None: as many as there are
    metrics: tuple[str, ...]
    text: Callable[[Lists], str]  # as the file holds it
    faults: Callable[[Lists], Iterator[str]] = lambda found: iter(())


# ---- reading ----


def read(path: str | os.PathLike) -> Lists:
    """The lists in a file of any kind, checked by `check` without labels.

    Raises:
      ValueError: none of the kinds, no complete JSON or text, or everything that is wrong with it, in one error.
    """
    path = files.local_path(path)
    found = _parsed(path)
    size = path.stat().st_size
    too_large = [f"{size:,} bytes; the server takes {MOST_CIRR:,}"] if size > MOST_CIRR else []
    _refuse(path, found.kind, too_large if found.kind.startswith("cirr") else [])
    check(found, name=path)
    return found


def _parsed(path: Path) -> Lists:
    text = _text(path)
    start = text.lstrip()[:1]
    if start not in ("{", "["):
        return _trec(text, path)
    value = _json(text, path)
    if isinstance(value, list):
        return _fashioniq(value, path)
    if "metric" in value or "version" in value:
        return _cirr(value, path)
    return Lists("circo", _listed(value, path, numbers=True))


def _text(path: Path) -> str:
    with files.reported(path, "read"):
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} has more than {MOST_BYTES:,} bytes; expected ranked lists")
        content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text (byte {error.start} is not UTF-8); expected one of: {_known()}"
        ) from None


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        told = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise ValueError(f"{path} is not complete JSON ({told})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        again = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the entry {shown(again)} occurs twice")
    return made


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _listed(value: Mapping[str, Any], path: Path, numbers: bool = False) -> dict[str, list[str]]:
    """Lists of names by query id; with `numbers` of whole numbers, which may stand as text."""
    wrong = [key for key, each in value.items() if not _is_list(each, numbers)]
    wanted = "lists of whole numbers" if numbers else "lists of names"
    if wrong or not value:
        example = f"the entry {shown(wrong[0])} is {shown(value[wrong[0]])}" if wrong else "empty"
        raise ValueError(f"{path}: expected {wanted} by query, found {example}; {_known()}")
    plain = lambda each: str(int(each)) if numbers else each
    made = {plain(key) if _is_number(key) else key: [*map(plain, v)] for key, v in value.items()}
    if len(made) < len(value):
        raise ValueError(f"{path} has a query twice, with and without zeros before its number")
    return made


def _is_list(value: Any, numbers: bool) -> bool:
    right = _is_number if numbers else (lambda each: type(each) is str and 0 < len(each) < 256)
    return type(value) is list and all(map(right, value))


def _is_number(value: Any) -> bool:
    if type(value) is str:
        return bool(re.fullmatch(r"\d{1,12}", value, re.ASCII))
    return type(value) is int and 0 <= value < 10**12


def _cirr(value: dict[str, Any], path: Path) -> Lists:
    value = dict(value)
    metric, version = value.pop("metric", None), value.pop("version", None)
    kinds = {"recall": "cirr recall", "recall_subset": "cirr subset"}
    if type(metric) is not str or metric not in kinds or version != "rc2":
        raise ValueError(
            f"{path} has version {shown(version)} and metric {shown(metric)}; CIRR's server wants version 'rc2' and "
            "metric 'recall' or 'recall_subset'"
        )
    return Lists(kinds[metric], _listed(value, path), version)


def _fashioniq(value: list, path: Path) -> Lists:
    names = lambda each: type(each) is dict and _is_list(each.get("ranking"), False)
    wrong = [n for n, each in enumerate(value) if not names(each)]
    if wrong or not value:
        raise ValueError(
            f"{path}: {f'entry {wrong[0]}' if wrong else 'the list'} holds no 'ranking' of names; expected the captions "
            f"of FashionIQ, each with its ranking; {_known()}"
        )
    lists = {str(n): each["ranking"] for n, each in enumerate(value)}
    records = tuple({k: x for k, x in each.items() if k != "ranking"} for each in value)
    return Lists("fashioniq", lists, records=records)


def _trec(text: str, path: Path) -> Lists:
    lists, scores, tags = defaultdict(list), defaultdict(list), {}
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if len(parts) != 6 or parts[1] != "Q0" or not _is_number(parts[3].removeprefix("-")):
            raise ValueError(
                f"{path}, line {number}: {shown(line)}; expected six columns: topic Q0 item rank score tag. {_known()}"
            )
        topic, _, item, _, score, tag = parts
        lists[topic].append(item)
        scores[topic].append(_number(score, path, number))
        tags[tag] = None
    if len(tags) != 1:
        raise ValueError(f"{path} has {len(tags)} run tags, expected one: {shown(list(tags)[:3])}")
    return Lists("trec", dict(lists), next(iter(tags)), dict(scores))


def _number(text: str, path: Path, line: int) -> float:
    # float would take nan, infinity and underscores too.
    plain = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text, re.ASCII)
    value = float(text) if plain else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}, line {line}: the score is {shown(text)}, expected a number")
    return value


def _known() -> str:
    return "known are " + ", ".join(kind.title for kind in KINDS.values())


# ---- checking ----


def check(
    found: Lists, labels: Labels | None = None, name: str | os.PathLike = "the submission"
) -> None:
    """Raise one ValueError that lists all faults, if there are any.

    Args:
      labels: what the lists are held against: the queries, their references and groups, the names in the gallery.
    """
    kind = KINDS[found.kind]
    if labels is not None and labels.family != kind.family:
        raise ValueError(f"{name} is {kind.title}, the labels are those of {labels.family}")
    told = [*_list_faults(found, kind), *kind.faults(found)]
    told += _count_faults(found, kind) if labels is None else _label_faults(found, labels)
    _refuse(name, found.kind, told)


def _refuse(name, kind: str, told: list[str]) -> None:
    if told:
        more = [f"and {len(told) - MOST_FAULTS} more"] if len(told) > MOST_FAULTS else []
        lines = "\n  ".join([*told[:MOST_FAULTS], *more])
        raise ValueError(f"{name} is no valid {KINDS[kind].title}:\n  {lines}")


def _several(what: str, queries: Iterable, total: int) -> Iterator[str]:
    """One line for a fault that some of the queries have."""
    queries = list(queries)
    if queries:
        some = ", ".join(shown(query)[1:-1] for query in queries[:3])
        more = ", …" if len(queries) > 3 else ""
        yield f"{len(queries)} of {total} queries {what}: {some}{more}"


def _list_faults(found: Lists, kind: Kind) -> Iterator[str]:
    say = lambda what, queries: _several(what, queries, len(found.lists))
    if kind.names is not None:
        wrong = [query for query, names in found.lists.items() if len(names) != kind.names]
        length = f" ({len(found.lists[wrong[0]])} in the first)" if wrong else ""
        yield from say(f"have not {kind.names} names{length}", wrong)
    again = [query for query, names in found.lists.items() if len(set(names)) < len(names)]
    yield from say("name an item twice", again)


def _count_faults(found: Lists, kind: Kind) -> Iterator[str]:
    """Without labels the number of queries is all that is known of a split."""
    counts = {"cirr": CIRR_QUERIES, "circo": CIRCO_QUERIES}.get(kind.family)
    if counts and len(found.lists) not in counts.values():
        known = ", ".join(f"{count:,} of {split}" for split, count in counts.items())
        yield f"{len(found.lists):,} queries, expected {known}"
    if kind.family == "fashioniq":
        yield from _fashioniq_size_faults(found)


def _fashioniq_size_faults(found: Lists) -> Iterator[str]:
    names = {len(each) for each in found.lists.values()}
    if not any((len(found.lists), count) in FASHIONIQ_SIZES for count in names) or len(names) > 1:
        known = ", ".join(f"{q:,} x {n:,} ({part})" for (q, n), part in FASHIONIQ_SIZES.items())
        length = " or ".join(f"{count:,}" for count in sorted(names)[:3])
        yield f"{len(found.lists):,} queries with {length} names, expected all items: {known}"


def _circo_faults(found: Lists) -> Iterator[str]:
    expected = {str(number) for number in range(len(found.lists))}
    if found.lists.keys() != expected:
        wrong = sorted(found.lists.keys() - expected)[:3]
        yield f"queries are not numbered from 0 to {len(found.lists) - 1}: {shown(wrong)}"


def _trec_faults(found: Lists) -> Iterator[str]:
    say = lambda what, queries: _several(what, queries, len(found.lists))
    broken = [
        t for t, names in found.lists.items() if any(len(x.split()) != 1 for x in [t, *names])
    ]
    yield from say("have a name that is empty or has spaces, or have one", broken)
    bad = [t for t, scores in found.scores.items() if not np.isfinite(scores).all()]
    yield from say("have scores that are no numbers", bad)
    long = [topic for topic, names in found.lists.items() if len(names) > MOST_ITEMS]
    yield from say(f"have more than {MOST_ITEMS} items", long)
    rising = [topic for topic, scores in found.scores.items() if (np.diff(scores) > 0).any()]
    yield from say("have scores that rise down the list", rising)


def _label_faults(found: Lists, labels: Labels) -> Iterator[str]:
    """What the lists say that the labels deny."""
    total = len(found.lists)
    unknown = [query for query in found.lists if query not in labels.queries]
    yield from _several("are not among those of the labels", unknown, total)
    if found.kind != "trec":  # absent topics count 0 there
        missing = [query for query in labels.queries if query not in found.lists]
        yield from _several("are missing", missing, len(labels.queries))
    both = {query: labels.queries[query] for query in found.lists if query in labels.queries}
    outside = [q for q in both if labels.pool and not labels.pool.issuperset(found.lists[q])]
    yield from _several("name items that are not in the gallery", outside, total)
    if found.kind.startswith("cirr"):
        own = [query for query, asked in both.items() if asked.reference in found.lists[query]]
        yield from _several("name their reference picture", own, total)
    if found.kind == "cirr subset":
        strange = [q for q, asked in both.items() if not set(found.lists[q]) <= {*asked.members}]
        yield from _several("name pictures outside their group", strange, total)
    if found.kind == "fashioniq":
        yield from _fashioniq_faults(found, labels, both)


def _fashioniq_faults(found, labels, both) -> Iterator[str]:
    other = [q for q, a in both.items() if found.records[int(q)].get("candidate") != a.reference]
    yield from _several("have another candidate than the captions", other, len(found.lists))
    short = [q for q in both if labels.pool and len(found.lists[q]) < len(labels.pool)]
    told = f"do not rank all {len(labels.pool):,} items"
    yield from _several(told, short, len(found.lists))


# ---- writing ----


def write(path: str | os.PathLike, found: Lists, labels: Labels | None = None) -> None:
    """Write lists as their server takes them, checked before, whole or not at all."""
    check(found, labels, path)
    text = KINDS[found.kind].text(found)
    large = len(text.encode()) > MOST_CIRR and found.kind.startswith("cirr")
    _refuse(path, found.kind, [f"more than {MOST_CIRR:,} bytes"] if large else [])
    with files.write_atomically(path) as part:
        Path(part).write_text(text, encoding="utf-8")


def _cirr_text(found: Lists) -> str:
    metric = "recall" if found.kind == "cirr recall" else "recall_subset"
    lists = {query: found.lists[query] for query in sorted(found.lists)}
    return json.dumps({"version": "rc2", "metric": metric, **lists})


def _circo_text(found: Lists) -> str:
    order = sorted(found.lists, key=int)
    return json.dumps({query: [int(name) for name in found.lists[query]] for query in order})


def _fashioniq_text(found: Lists) -> str:
    ranked = zip(found.records, (found.lists[str(n)] for n in range(len(found.records))))
    return json.dumps([{**record, "ranking": names} for record, names in ranked])


def _trec_text(found: Lists) -> str:
    lines = (
        f"{topic} Q0 {name} {place} {score:.9g} {found.about}\n"
        for topic, names in found.lists.items()
        for place, (name, score) in enumerate(zip(names, found.scores[topic]), 1)
    )
    return "".join(lines)


def family(benchmark: Benchmark) -> str:
    """The kind of files in which a benchmark is scored: `cirr`, `circo`, `fashioniq`, and `trec` of all others."""
    name = benchmark.name.partition(":")[0]
    return name if name in ("cirr", "circo", "fashioniq") else "trec"


def has_server(benchmark: Benchmark) -> bool:
    """Whether evaluations of a benchmark are written as files for its server, though its answers are hidden here."""
    return family(benchmark) != "trec"


def depth(benchmark: Benchmark, wanted: bool = False) -> int:
    """How many hits of a query `of_hits` writes, the reference counted; arguments as there."""
    kind = family(benchmark)
    if kind == "fashioniq":
        return len(benchmark.gallery) if _written(benchmark, wanted) else 0
    return min(len(benchmark.gallery), {"trec": MOST_ITEMS * wanted}.get(kind, 50) + 1)


def _written(benchmark: Benchmark, wanted: bool) -> bool:
    """Whether large files are: they were asked for, or are all that a run without answers gives."""
    return wanted or not any(benchmark.positives)


def of_hits(
    benchmark: Benchmark,
    rows: np.ndarray,
    members: np.ndarray | None = None,
    wanted: bool = False,
    tag: str = "cir_jax",
) -> dict[str, Lists]:
    """What an evaluation found, as files by a word for each: CIRR's two, CIRCO's, FashionIQ's; a TREC run of others.

    Args:
      benchmark: with or without the folder in its name.
      rows: hits `[Q, K]`, best first; -1 is a missing one.
      members: hits `[Q, W]` in the closed groups.
      wanted: large files too: a TREC run, and FashionIQ's complete rankings (up to 180 MB), which a split without
        answers always gives.
      tag: what a TREC run is called.
    """
    kind = family(benchmark)
    if kind == "circo":
        return {"circo": Lists("circo", _named(benchmark, rows, 50))}
    if kind == "fashioniq":
        return {"predictions": _predictions(benchmark, rows)} if _written(benchmark, wanted) else {}
    if kind == "trec":
        return {"run": _run(benchmark, rows, tag)} if wanted else {}
    found = {"recall": Lists("cirr recall", _named(benchmark, rows, 50), "rc2")}
    if members is not None:
        near = _named(benchmark, members, 3)
        found["recall_subset"] = Lists("cirr subset", near, "rc2")
    return found


def _predictions(benchmark: Benchmark, rows: np.ndarray) -> Lists:
    lists = _named(benchmark, rows, rows.shape[1]).values()
    records = tuple(query["record"] for query in benchmark.queries)
    return Lists("fashioniq", {str(n): names for n, names in enumerate(lists)}, records=records)


def _run(benchmark: Benchmark, rows: np.ndarray, tag: str) -> Lists:
    """Scores count down: those of two stages have no common scale, and trec_eval orders equal ones by name."""
    lists = _named(benchmark, rows, MOST_ITEMS)
    scores = {topic: [float(n) for n in range(len(x), 0, -1)] for topic, x in lists.items()}
    return Lists("trec", lists, "_".join(tag.split()), scores)


def _named(benchmark: Benchmark, rows: np.ndarray, count: int) -> dict[str, list[str]]:
    """The first names of each list, without the reference where it is no answer."""
    struck = benchmark.exclude if len(benchmark.exclude) else [-1] * len(rows)
    names = lambda each, x: [benchmark.ids[row] for row in each if row >= 0 and row != x][:count]
    return {
        str(query.get("id", number)): names(each.tolist(), x)
        for number, (query, each, x) in enumerate(zip(benchmark.queries, rows, struck))
    }


# ---- labels and scores ----


def read_labels(path: str | os.PathLike) -> Labels:
    """Labels from an original annotation file, recognised by content.

    CIRR: cap.rc2.SPLIT.json; CIRCO: val.json, test.json; FashionIQ: cap.CATEGORY.SPLIT.json; TREC: qrels, four columns.
    For CIRR and FashionIQ the gallery is read from `../image_splits` where it is there.
    """
    path = files.local_path(path)
    text = _text(path)
    if text.lstrip()[:1] not in ("{", "["):
        return _qrels(text, path)
    value = _json(text, path)
    first = value[0] if type(value) is list and value else None
    for mark, make in {"pairid": _cirr_labels, "shared_concept": _circo_labels}.items():
        if type(first) is dict and mark in first:
            return _made(make, value, path)
    if type(first) is dict and "candidate" in first:
        return _made(_fashioniq_labels, value, path)
    raise ValueError(f"{path} holds no labels of CIRR, CIRCO, FashionIQ or TREC")


def _made(make, value, path: Path) -> Labels:
    try:
        return make(value, path)
    except (KeyError, TypeError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no complete annotation file ({told[:200]})") from None


def _cirr_labels(value: list, path: Path) -> Labels:
    members = lambda each: [m for m in each["img_set"]["members"] if m != each["reference"]]
    right = lambda each: {each["target_hard"]: 1.0} if "target_hard" in each else {}
    queries = {
        str(each["pairid"]): Asked(each["reference"], tuple(members(each)), right(each))
        for each in value
    }
    return Labels("cirr", queries, _pool(path))


def _circo_labels(value: list, path: Path) -> Labels:
    def asked(each) -> Asked:
        right = {str(name): 1.0 for name in each.get("gt_img_ids", ())}
        if "target_img_id" in each:  # the highest grade marks what target_recall counts
            right[str(each["target_img_id"])] = 2.0
        aspects = tuple(each.get("semantic_aspects", ()))
        return Asked(str(each["reference_img_id"]), (), right, aspects)

    return Labels("circo", {str(each["id"]): asked(each) for each in value})


def _fashioniq_labels(value: list, path: Path) -> Labels:
    right = lambda each: {each["target"]: 1.0} if "target" in each else {}
    queries = {
        str(number): Asked(each["candidate"], (), right(each)) for number, each in enumerate(value)
    }
    return Labels("fashioniq", queries, _pool(path))


def _pool(captions: Path) -> frozenset[str]:
    """Names of the gallery that belongs to a captions file, if it lies beside it as published."""
    name = re.sub(r"^cap\.", "split.", captions.name)
    split = captions.absolute().parent.parent / "image_splits" / name
    return frozenset(_json(_text(split), split)) if split.is_file() else frozenset()


def _qrels(text: str, path: Path) -> Labels:
    right = defaultdict(dict)
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if len(parts) != 4 or not _is_number(parts[3].removeprefix("-")):
            raise ValueError(
                f"{path}, line {number}: {shown(line)}; expected the four columns of qrels: topic 0 item grade"
            )
        right[parts[0]][parts[2]] = float(parts[3])
    graded = lambda found: {name: grade for name, grade in found.items() if grade > 0}
    # trec_eval leaves out topics without a right answer.
    queries = {topic: Asked(right=graded(found)) for topic, found in right.items() if graded(found)}
    return Labels("trec", queries)


def score(found: Lists, labels: Labels) -> tuple[dict[str, np.ndarray], list[tuple[str, ...]]]:
    """(each metric of the kind for each query of the labels, `[Q]`; the queries' aspects).

    A query of the labels that a run leaves out has an empty list. Of equal scores in a TREC run the last name in
    alphabetical order counts as first, as for trec_eval.

    Raises:
      ValueError: what `check` finds; labels that are hidden.
    """
    check(found, labels)
    kind, asked = KINDS[found.kind], list(labels.queries.values())
    hidden = sum(not each.right for each in asked)
    if hidden:
        raise ValueError(
            f"{hidden} of {len(asked)} queries have no labels here; the server scores them"
        )
    lists = [_ranked(found, query) for query in labels.queries]
    names = sorted({*labels.pool}.union(*lists, *(each.right for each in asked)))
    place = {name: row for row, name in enumerate(names)}
    width = 1 + max(map(len, lists))
    rows = [[*(place[name] for name in each), *[-1] * (width - len(each))] for each in lists]
    closed = found.kind == "cirr subset"
    benchmark = Benchmark(
        name=kind.family,
        variant="labels",
        split="labels",
        queries=[{}] * len(asked),
        gallery=[{}] * len(names),
        ids=names,
        positives=[{place[n]: grade for n, grade in each.right.items()} for each in asked],
        subset=[[place[n] for n in e.members if n in place] for e in asked] if closed else (),
        metrics=kind.metrics,
    )
    return metrics.per_query(np.array(rows), benchmark), [each.aspects for each in asked]


def _ranked(found: Lists, query: str) -> list[str]:
    names = found.lists.get(query, [])
    if found.kind != "trec":
        return names
    pairs = sorted(zip(found.scores.get(query, ()), names), reverse=True)
    return [name for _, name in pairs]


KINDS: dict[str, Kind] = {
    "cirr recall": Kind(
        "CIRR recall file", "cirr", 50, tuple(f"recall@{k}" for k in CUTS), _cirr_text
    ),
    "cirr subset": Kind(
        "CIRR subset file", "cirr", 3, tuple(f"subset_recall@{k}" for k in (1, 2, 3)), _cirr_text
    ),
    "circo": Kind(
        "CIRCO file",
        "circo",
        50,
        tuple(f"{name}@{k}" for name in ("map", "target_recall") for k in (5, 10, 25, 50)),
        _circo_text,
        _circo_faults,
    ),
    "fashioniq": Kind(
        "FashionIQ predictions", "fashioniq", None, ("recall@10", "recall@50"), _fashioniq_text
    ),
    "trec": Kind(
        "TREC run",
        "trec",
        None,
        ("mrr@10", "trec_recall@10", "trec_recall@1000", "recall@10", "ndcg@10"),
        _trec_text,
        _trec_faults,
    ),
}
