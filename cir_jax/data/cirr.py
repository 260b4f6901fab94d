"""CIRR, version rc2 (Liu et al. 2021; Cuberick-Orion/CIRR): a photograph, and how another one differs from it.

cirr/captions/cap.rc2.{train,val,test1}.json, cirr/image_splits/split.rc2.….json, and the pictures at the paths that
the latter give (train/34/….png, dev/….png, test1/….png), below the folder itself, img_raw or cirr/img_raw.
"""

from cir_jax.data import published
from cir_jax.data.benchmark import Benchmark, Made
from cir_jax.data.published import Asked, Pair, Part

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
    return published.pairs(part, rows, _places(part))


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
            subset=_others(record, part),
        )
        for record in _records(part)
    ]
    return published.benchmark(part, asked, _places(part), METRICS, exclude=True)


def _others(record, part: Part) -> list[str]:
    members = record["img_set"]["members"]
    others = [name for name in members if name != record["reference"]]
    if len(set(members)) != MEMBERS or len(members) != MEMBERS or len(others) != MEMBERS - 1:
        raise ValueError(
            f"{part.title}: pair {record['pairid']} has the group {members}, expected {MEMBERS} different "
            f"pictures with the reference {record['reference']!r}"
        )
    return others


def _records(part: Part) -> list[dict]:
    shape = {"pairid": int, "reference": str, "caption": str, "img_set": {"members": [str]}}
    if part.split != "test1":
        shape["target_hard"] = str
    return published.read_json(part.root / f"cirr/captions/cap.rc2.{part.split}.json", [shape])


def _places(part: Part) -> dict[str, list[str]]:
    file = part.root / f"cirr/image_splits/split.rc2.{part.split}.json"
    names = published.read_json(file, {})
    published.check_shape(list(names.values()), [str], file)
    return {
        name: [f"{each}{path.removeprefix('./')}" for each in FOLDERS]
        for name, path in names.items()
    }
