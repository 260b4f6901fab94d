"""CIRCO (Baldrati et al. 2023; miccunifi/CIRCO): photographs of COCO with a change, and everything that answers it.

annotations/{val,test}.json, COCO2017_unlabeled/annotations/image_info_unlabeled2017.json and
COCO2017_unlabeled/unlabeled2017/000000000008.jpg, …
"""

from cir_jax.data import published
from cir_jax.data.benchmark import Benchmark
from cir_jax.data.published import Asked
from cir_jax.data.tables import refuse

SPLITS = ("val", "test")
GALLERY = 123_403  # all of COCO 2017 unlabeled
INFO = "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
KS = (5, 10, 25, 50)
METRICS = (*(f"map@{k}" for k in KS), *(f"target_recall@{k}" for k in KS))
TARGET = (
    2.0  # the grade of the picture that the query was written for; of the other right answers 1
)


def benchmark(root: str, variant: str = "", split: str = "val") -> Benchmark:
    """All pictures of COCO 2017 unlabeled as gallery, in the order of its list; the reference stays in it.

    Ids are COCO's as text, those of queries their places in the file; `rules` are the semantic aspects, several for a
    query, where the file has them. The answers of `test` are not published. Variants: `coco`, and `coco-concept`, whose
    text is "find {shared concept} but {relative caption}" (MagicLens) instead of the relative caption alone.
    """
    part = published.part("circo", root, variant, split, ("coco",), SPLITS, ("concept",))
    shape = {"id": int, "reference_img_id": int, "relative_caption": str, "shared_concept": str}
    if split == "val":
        shape |= {"target_img_id": int, "gt_img_ids": [int]}
    file = part.root / f"annotations/{split}.json"
    records = [{"semantic_aspects": [], **r} for r in published.read_json(file, [shape])]
    records = published.fitting(records, [{"semantic_aspects": [str]}], file)
    asked = [
        Asked(
            id=str(record["id"]),
            asks={"text": _text(record, "concept" in part.flags)},
            targets=_targets(record),
            reference=str(record["reference_img_id"]),
            rules=record["semantic_aspects"],
        )
        for record in _answered(records, file)
    ]
    info = published.read_json(part.root / INFO, {"images": [{"id": int, "file_name": str}]})
    if len(info["images"]) != GALLERY:
        raise ValueError(
            f"{part.root / INFO} lists {len(info['images'])} pictures, expected all {GALLERY:,}; "
            "numbers of another gallery are not CIRCO's"
        )
    folder = "COCO2017_unlabeled/unlabeled2017"
    places = {str(image["id"]): [f"{folder}/{image['file_name']}"] for image in info["images"]}
    published.distinct([str(image["id"]) for image in info["images"]], part.root / INFO)
    return published.benchmark(part, file, asked, places, METRICS)


def _text(record, with_concept: bool) -> str:
    caption = record["relative_caption"]
    return f"find {record['shared_concept']} but {caption}" if with_concept else caption


def _answered(records, file) -> list[dict]:
    """The records, whose target must be among their answers."""
    odd = lambda r: "gt_img_ids" in r and r["target_img_id"] not in r["gt_img_ids"]
    faults = [f"the target of query {r['id']} is none of its answers" for r in records if odd(r)]
    refuse(f"{file} contradicts itself", faults, file)
    return [record for record in records if not odd(record)]


def _targets(record) -> dict[str, float]:
    grade = lambda name: TARGET if name == record["target_img_id"] else 1.0
    return {str(name): grade(name) for name in record.get("gt_img_ids", ())}
