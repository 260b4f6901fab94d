"""AToMiC (Yang et al. 2023; TREC-AToMiC on Hugging Face): sections of Wikipedia ask for their pictures.

The downloaded repositories, each a folder: AToMiC-Texts-v0.2.1 and AToMiC-Images-v0.2 with train-*.parquet,
AToMiC-Qrels-v0.2 with {train,validation,test}-*.parquet, in `data` or beside it. And, for CFIR (GLA-IR/CFIR), what it
asks with: atomic_{split}_entities.json and atomic_{split}_summaries.json, lists with an entry for each row of the
qrels; they were not published.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cir_jax import files
from cir_jax.data import published
from cir_jax.data.benchmark import Benchmark, Made, numbered
from cir_jax.data.columns import Columns
from cir_jax.data.documents import BUILTIN, document_query
from cir_jax.data.published import Asked, Missing, Part
from cir_jax.data.tables import opened_parquet

TEXTS, IMAGES, QRELS = "AToMiC-Texts-v0.2.1", "AToMiC-Images-v0.2", "AToMiC-Qrels-v0.2"
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # ours: theirs
# column -> part of a raw query (`cir_jax.data.documents`)
FIELDS = {
    "page_title": "title",
    "section_title": "section",
    "context_section_description": "document",
}
METRICS = (
    *("recall@1", "recall@5", "recall@10", "mrr@10", "trec_recall@10", "trec_recall@1000"),
    "mean(trec_recall@10,trec_recall@1000)",  # CFIR's average_score, with `-rows`
)


def pairs(root: str, variant: str = "", split: str = "train") -> Made:
    """Raw training pairs, a row for each of the qrels.

    Variants say what of a section asks: `fields` (titles and text), `entities` (one text, joined by spaces) or
    `summaries`, both from CFIR's files; with `-builtin`, from `cir_jax.data.documents` instead.
    """
    kinds = {"fields": "fields", "entities": "joined", "summaries": "summary"}
    part = published.part("atomic", root, variant, split, tuple(kinds), tuple(SPLITS), ["builtin"])
    rows = _qrels(part, split)
    texts, pictures = _texts(part, rows), _Pictures(part, {image for _, image in rows})
    given = None
    if part.kind != "fields" and "builtin" not in part.flags:
        given = _asked_by_cfir(part, len(rows))
    missing = Missing(part, {image: (IMAGES,) for _, image in rows}, pictures)
    kept = [row for row, (text, image) in enumerate(rows) if text in texts and image in pictures]
    missing.tell(len(kept), len(rows), "pairs")
    groups = numbered(rows[row][1] for row in kept)

    def pair(number):
        text, image = rows[kept[number]]
        if given is not None:
            asked = {"text": given[kept[number]] or texts[text]["page_title"] or ""}
        else:
            asked = document_query(_raw(texts[text]), kinds[part.kind], BUILTIN)
        return {"query": asked, "item": {"image": pictures[image]}, "group": groups[number]}

    return Made(len(kept), pair)


def benchmark(root: str, variant: str = "", split: str = "test") -> Benchmark:
    """Sections ask, as documents, for their pictures; the id of a query is its `text_id`.

    Variants: the gallery is `small`, the pictures of the split's own qrels; `base`, those of all qrels; or `large`, the
    whole collection; each in the order of the collection. With `-rows` every row of the qrels is a query of its own with
    one answer, as CFIR counts, and its id is the number of the row; without it a text asks once for all its pictures,
    as trec_eval counts.
    """
    kinds = ("small", "base", "large")
    part = published.part("atomic", root, variant, split, kinds, tuple(SPLITS), ["rows"])
    qrels = {each: _qrels(part, each) for each in (SPLITS if part.kind == "base" else [split])}
    rows = qrels[split]
    wanted = {image for each in qrels.values() for _, image in each}
    pictures = _Pictures(part, None if part.kind == "large" else wanted)
    places = dict.fromkeys((*pictures, *sorted(wanted - pictures.keys())), (IMAGES,))
    topics = defaultdict(dict)
    for row, (text, image) in enumerate(rows):
        topics[(row, text) if "rows" in part.flags else (text, text)][image] = 1.0
    raws = _read_all(_texts(part, rows))
    asked = [
        Asked(id=str(topic), asks=raws[text], targets=targets)
        for (topic, text), targets in topics.items()
        if text in raws
    ]
    file, held = part.root / QRELS, pictures.rows.files
    return published.benchmark(part, file, asked, places, METRICS, pictures=pictures, files=held)


def write_extracts(
    root: str | os.PathLike, split: str, dest: str | os.PathLike, rows: bool = False
) -> None:
    """Write CFIR's entities and summaries of a split as a file for `DocumentSpec(source=…)`.

    Args:
      split: train, val or test.
      dest: a file that ends in `.jsonl`.
      rows: for the benchmark with `-rows`; without it a text has what its first row has.

    Raises:
      FileNotFoundError: no qrels, or neither of CFIR's files.
      ValueError: files that do not fit the qrels.
    """
    part = published.part("atomic", root, "", split, ("small",), tuple(SPLITS))
    qrels, found = _qrels(part, split), {}
    kinds = {"entities": "entities", "summaries": "summary"}
    there = {k: v for k, v in kinds.items() if _cfir_file(part.root, split, k).is_file()}
    if not there:
        raise FileNotFoundError(
            f"there is no file {_cfir_file(part.root, split, 'entities')}, nor one of summaries"
        )
    values = {
        name: _cfir(part.root, split, kind, len(qrels), False) for kind, name in there.items()
    }
    for row, (text, _) in enumerate(qrels):
        name = str(row) if rows else text
        found.setdefault(name, {"id": name} | {key: each[row] for key, each in values.items()})
    with files.write_atomically(dest) as temporary:
        lines = "".join(json.dumps(line) + "\n" for line in found.values())
        temporary.write_text(lines, encoding="utf-8")


# ---- the files ----


def _parquet(part: Part, repository: str, split: str) -> list[Path]:
    """The parquet files of a split of a repository, in their order."""
    folders = [part.root / repository / "data", part.root / repository]
    for folder in folders:
        if found := sorted(folder.glob(f"{split}*.parquet")):
            return found
    raise FileNotFoundError(f"there is no {folders[0]}/{split}-*.parquet; download {repository}")


def _qrels(part: Part, split: str) -> list[tuple[str, str]]:
    """(text, picture) of each row of the qrels, all of them relevant."""
    found = []
    for path in _parquet(part, QRELS, SPLITS[split]):
        with opened_parquet(path) as file:
            columns = file.read(columns=["text_id", "image_id"]).to_pydict()
        if len(columns) != 2:
            raise ValueError(f"{path} has no columns text_id and image_id")
        found += zip(*columns.values())
    return found


def _texts(part: Part, rows) -> Columns:
    wanted = {text for text, _ in rows}
    found = Columns(_parquet(part, TEXTS, "train"), "text_id", list(FIELDS), wanted)
    missing = Missing(part, dict.fromkeys(wanted, (TEXTS,)), found, "texts")
    missing.tell(len(found), len(wanted), "texts")
    return found


def _read_all(texts: Columns) -> dict[str, dict[str, str]]:
    """Raw queries by text, read once and in the order of the files."""
    return {name: _raw(texts[name]) for name in texts}


def _raw(row: Mapping[str, Any]) -> dict[str, str]:
    return {part: row[column] or "" for column, part in FIELDS.items()}


class _Pictures(Mapping):
    """The bytes of pictures by id."""

    def __init__(self, part: Part, wanted: set[str] | None):
        self.rows = Columns(_parquet(part, IMAGES, "train"), "image_id", ["image"], wanted)

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def __contains__(self, name):
        return name in self.rows

    def __getitem__(self, name):
        image = self.rows[name]["image"]
        return image["bytes"] if isinstance(image, dict) else image


def _cfir_file(root: Path, split: str, kind: str) -> Path:
    return root / f"atomic_{SPLITS[split]}_{kind}.json"


def _asked_by_cfir(part: Part, rows: int) -> list[str]:
    """The text of each row of the qrels; where there are no entities the summary, if that file is there."""
    texts = _cfir(part.root, part.split, part.kind, rows)
    if all(texts) or not _cfir_file(part.root, part.split, "summaries").is_file():
        return texts
    return [
        text or summary
        for text, summary in zip(texts, _cfir(part.root, part.split, "summaries", rows))
    ]


def _cfir(root: Path, split: str, kind: str, rows: int, joined: bool = True) -> Sequence:
    """What CFIR's file says of each row of the qrels; entities as one text, if `joined`."""
    path = _cfir_file(root, split, kind)
    found = published.read_json(path, [[str]] if kind == "entities" else [str])
    if len(found) != rows:
        raise ValueError(f"{path} has {len(found)} entries for {rows} rows of the qrels")
    return [" ".join(each) for each in found] if kind == "entities" and joined else found
