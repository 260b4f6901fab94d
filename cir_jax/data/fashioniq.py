"""FashionIQ (Wu et al. 2021; XiaoxiaoGuo/fashion-iq): a garment, and two captions that say what another has instead.

captions/cap.{dress,shirt,toptee}.{train,val,test}.json, image_splits/split.….json, and the pictures as
images/ID.jpg, images/ID.png, or ID.jpg in a folder for each category.
"""

from collections.abc import Sequence
from pathlib import Path

from cir_jax.data import published
from cir_jax.data.benchmark import Benchmark, Made
from cir_jax.data.published import Asked, Pair, Part
from cir_jax.data.tables import refuse

CATEGORIES = ("dress", "toptee", "shirt")  # in the order in which the published training joins them
SPLITS = ("train", "val", "test")
METRICS = ("recall@10", "recall@50", "mean(recall@10,recall@50)", "recall@1", "recall@5", "mrr")
ENDS = ".?, "  # what both ends of a caption lose


def pairs(root: str, variant: str = "", split: str = "train") -> Made:
    """Raw training pairs; the four wordings of an edit are drawn alike, as in Candidate-Reranking (`wordings`).

    Variants: `all`, or a category.
    """
    part = published.part("fashioniq", root, variant, split, ("all", *CATEGORIES), SPLITS[:2])
    chosen = CATEGORIES if part.kind == "all" else (part.kind,)
    rows = [
        Pair(wordings(*record["captions"]), record["target"], record["candidate"])
        for category in chosen
        for record in _records(part, category)
    ]
    names = {name for row in rows for name in (row.target, row.reference)}
    return published.pairs(part, part.root / "captions", rows, _places(names))


def benchmark(root: str, variant: str = "", split: str = "val") -> Benchmark:
    """One category; its gallery is the whole list of the split, and the reference stays in it.

    Variants: a category, then
      union: the gallery holds only references and targets, in the order of the list (the "VAL split" of some papers;
        easier, never to be compared with the other);
      plain: the captions as they are, joined by "and" (MagicLens); without it they lose `ENDS` and the first begins
        with a capital;
      reversed: the second caption first (with `plain` as Pic2Word);
      both: the mean of the two orders asks (FTI4CIR, SEARLE and LinCIR; the reversed one has no capital); a second
        stage reads the usual one.
    The targets of `test` are not published. `record` of a query is its entry in the captions file, which predictions
    repeat (`cir_jax.evaluation.submissions`).
    """
    part = published.part(
        "fashioniq",
        root,
        variant,
        split,
        CATEGORIES,
        SPLITS,
        ("union", "plain", "reversed", "both"),
    )
    if {"both", "reversed"} <= set(part.flags):
        raise ValueError(f"{part.title}: both orders include the reversed one; choose one flag")
    if "union" in part.flags and split == "test":
        raise ValueError(f"{part.title}: the union is of references and targets, and test has none")
    records = _records(part, part.kind)
    file = part.root / f"image_splits/split.{part.kind}.{split}.json"
    ids = published.distinct(published.read_json(file, [str]), file)
    if "union" in part.flags:
        named = {record[key] for record in records for key in ("candidate", "target")}
        ids = [name for name in ids if name in named]
    asked = [
        Asked(
            id=f"{part.kind}-{split}-{row}",
            asks={**_asks(*record["captions"], part.flags), "record": record},
            targets={record["target"]: 1.0} if "target" in record else {},
            reference=record["candidate"],
        )
        for row, record in enumerate(records)
    ]
    return published.benchmark(part, _file(part, part.kind), asked, _places(ids), METRICS)


def _asks(first: str, second: str, flags: Sequence[str]) -> dict:
    """The captions of a query as one text, by the flags of `benchmark`."""
    usual, turned = f"{first} and {second}", f"{second} and {first}"
    if "plain" not in flags:
        first, second = first.strip(ENDS), second.strip(ENDS)
        usual, turned = f"{first.capitalize()} and {second}", f"{second} and {first}"
    both = {"wordings": (usual, turned)} if "both" in flags else {}
    return {"text": turned if "reversed" in flags else usual, **both}


def wordings(first: str, second: str) -> tuple[str, str, str, str]:
    """What training draws from: both captions in both orders, and each alone; an empty one stays so."""
    first, second = first.strip(ENDS), second.strip(ENDS)
    return (
        f"{first.capitalize()} and {second}",
        f"{second.capitalize()} and {first}",
        first.capitalize(),
        second.capitalize(),
    )


def _records(part: Part, category: str) -> list[dict]:
    file = _file(part, category)
    shape = {"candidate": str, "captions": [str]}
    if part.split != "test":
        shape["target"] = str
    records = published.read_json(file, [shape])
    counts = [len(record["captions"]) for record in records]
    odd = [f"[{row}] has {n} captions, expected 2" for row, n in enumerate(counts) if n != 2]
    refuse(f"{file} has another form than the published file", odd, file)
    return [record for record, n in zip(records, counts) if n == 2]


def _file(part: Part, category: str) -> Path:
    return part.root / f"captions/cap.{category}.{part.split}.json"


def _places(ids):
    folders = ("images/{}.jpg", "images/{}.png", *(f"{name}/{{}}.jpg" for name in CATEGORIES))
    return {name: [folder.format(name) for folder in folders] for name in ids}
