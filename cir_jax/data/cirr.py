"""CIRR, version rc2 (Liu et al. 2021; Cuberick-Orion/CIRR): a photograph, and how another one differs from it.

cirr/captions/cap.rc2.{train,val,test1}.json, cirr/image_splits/split.rc2.….json, and the pictures at the paths that
the latter give (train/34/….png, dev/….png, test1/….png), below the folder itself, img_raw or cirr/img_raw.
"""

from pathlib import Path

from cir_jax.data import published
from cir_jax.data.benchmark import Benchmark, Made
from cir_jax.data.published import Asked, Pair, Part
from cir_jax.data.tables import refuse

SPLITS = ("train", "val", "test1")
FOLDERS = ("", "img_raw/", "cirr/img_raw/")
METRICS = (
    *(f"recall@{k}" for k in (1, 5, 10, 50)),
    *(f"subset_recall@{k}" for k in (1, 2, 3)),
    "mean(recall@5,subset_recall@1)",
)
MEMBERS = 6  # of a subset, the reference among them


def pairs(root: str, variant: str = "", split: str = "train") -> Made:
    """Raw training pairs with the caption as it is."""
    part = published.part("cirr", root, variant, split, ("rc2",), SPLITS[:2])
    rows = [Pair([r["caption"]], r["target_hard"], r["reference"]) for r in _records(part)]
    return published.pairs(part, _file(part), rows, _places(part))


def benchmark(root: str, variant: str = "", split: str = "val") -> Benchmark:
    """All pictures of the split as gallery, the reference taken out; the id of a query is its `pairid`.

    `subset` are the five other members of the query's group in their order. The only target is `target_hard`. Those of
    `test1` are not published.
    """
    part = published.part("cirr", root, variant, split, ("rc2",), SPLITS)
    asked = [
        Asked(
            id=str(record["pairid"]),
            asks={"text": record["caption"]},
            targets={record["target_hard"]: 1.0} if "target_hard" in record else {},
            reference=record["reference"],
            subset=_others(record),
        )
        for record in _grouped(_records(part), part)
    ]
    return published.benchmark(part, _file(part), asked, _places(part), METRICS, exclude=True)


def _others(record) -> list[str]:
    return [name for name in record["img_set"]["members"] if name != record["reference"]]


def _grouped(records, part: Part) -> list[dict]:
    """The records, which must have whole groups."""
    whole, faults = [], []
    for record in records:
        members, count = record["img_set"]["members"], len(_others(record))
        if len(set(members)) == len(members) == MEMBERS == count + 1:
            whole.append(record)
        else:
            faults.append(
                f"pair {record['pairid']} has the group {members}, expected {MEMBERS} different pictures with the "
                f"reference {record['reference']!r}"
            )
    refuse(f"{part.title} has groups that are not whole", faults, _file(part))
    return whole


def _records(part: Part) -> list[dict]:
    shape = {"pairid": int, "reference": str, "caption": str, "img_set": {"members": [str]}}
    if part.split != "test1":
        shape["target_hard"] = str
    return published.read_json(_file(part), [shape])


def _file(part: Part) -> Path:
    return part.root / f"cirr/captions/cap.rc2.{part.split}.json"


def _places(part: Part) -> dict[str, list[str]]:
    file = part.root / f"cirr/image_splits/split.rc2.{part.split}.json"
    return {
        name: [f"{each}{path.removeprefix('./')}" for each in FOLDERS]
        for name, path in published.read_json(file, {str: str}).items()
    }
