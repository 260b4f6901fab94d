"""Small folders in the layouts of the published data sets, as their authors' code reads them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((50, 40), (40, 40), (33, 77))


def paint(folder: Path, *names: str) -> None:
    """Pictures of several shapes, different for each name; the format is that of the name, else JPEG."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = SIZES[number % len(SIZES)]
        colour = np.random.default_rng(list(name.encode())).integers(0, 256, 3)
        picture = Image.fromarray(np.full((height, width, 3), colour, np.uint8))
        picture.save(path, "PNG" if path.suffix == ".png" else "JPEG")


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def fashioniq(root: Path) -> None:
    for category in ("dress", "shirt", "toptee"):
        for split in ("train", "val", "test"):
            ids = [f"B{category[0]}{split[:2]}{number}".upper() for number in range(5)]
            records = [
                {"candidate": ids[0], "target": ids[2], "captions": ["Is Red.", " is LONGER, "]},
                {"candidate": ids[2], "target": ids[3], "captions": [".", "has a collar?"]},
            ]
            if split == "test":
                records = [{k: v for k, v in r.items() if k != "target"} for r in records]
            write(root / f"captions/cap.{category}.{split}.json", records)
            write(root / f"image_splits/split.{category}.{split}.json", ids)
            paint(root, *(f"images/{name}.jpg" for name in ids))


def cirr(root: Path) -> None:
    for split, folder in (("train", "train/34"), ("val", "dev"), ("test1", "test1")):
        ids = [f"{folder.split('/')[0]}-{number}-0-img1" for number in range(8)]
        records = []
        for number in range(2):
            members = ids[number : number + 6]
            record = {
                "pairid": 12060 + 3 * number,
                "reference": members[1],
                "target_hard": members[4],
                "target_soft": {members[4]: 1.0},
                "caption": f"Show {number} dogs",
                "img_set": {"id": number, "members": members, "reference_rank": 1},
            }
            if split == "test1":
                del record["target_hard"], record["target_soft"]
            records.append(record)
        write(root / f"cirr/captions/cap.rc2.{split}.json", records)
        paths = {name: f"./{folder}/{name}.png" for name in ids}
        write(root / f"cirr/image_splits/split.rc2.{split}.json", paths)
        paint(root, *paths.values())


def circo(root: Path) -> None:
    ids = [3, 8, 21, 7, 100, 581_929]
    images = [{"id": each, "file_name": f"{each:012}.jpg"} for each in ids]
    folder = root / "COCO2017_unlabeled"
    write(folder / "annotations/image_info_unlabeled2017.json", {"images": images})
    paint(folder / "unlabeled2017", *(image["file_name"] for image in images))
    record = {"reference_img_id": 8, "relative_caption": "is red", "shared_concept": "a kite"}
    answers = {"target_img_id": 21, "gt_img_ids": [21, 7]}
    aspects = {"semantic_aspects": ["addition", "viewpoint"]}
    other = {"target_img_id": 3, "gt_img_ids": [3], "semantic_aspects": ["viewpoint"]}
    val = [{**record, **answers, **aspects, "id": 0}, {**record, **other, "id": 1}]
    write(root / "annotations/val.json", val)
    write(root / "annotations/test.json", [{**record, "id": number} for number in range(3)])


# name -> what writes its folder
LAYOUTS = {"fashioniq": fashioniq, "cirr": cirr, "circo": circo}

# (name, variant, split) of training sets, with their lengths
TRAINING = {
    ("fashioniq", "", "train"): 6,
    ("fashioniq", "all", "val"): 6,
    ("fashioniq", "toptee", "train"): 2,
    ("cirr", "", "train"): 2,
    ("cirr", "rc2", "val"): 2,
}

# benchmarks, with the numbers of their queries and items
BENCHMARKS = {
    "fashioniq/dress/val": (2, 5),
    "fashioniq/shirt-plain-reversed/val": (2, 5),
    "fashioniq/toptee-union/val": (2, 3),
    "fashioniq/dress/test": (2, 5),
    "cirr/rc2/val": (2, 8),
    "cirr/rc2/test1": (2, 8),
    "circo/coco/val": (2, 6),
    "circo/coco-concept/test": (3, 6),
}
UNLABELLED = {"fashioniq/dress/test", "cirr/rc2/test1", "circo/coco-concept/test"}
