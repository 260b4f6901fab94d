"""Small folders in the layouts of the published data sets, as their authors' code reads them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from cir_jax.vectors import VectorWriter

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


def karpathy(root: Path, name: str, folder: str) -> None:
    images = []
    for number, split in enumerate(("train", "val", "test", "restval", "test", "train", "val")):
        filepath = folder or ("train2014" if split == "train" else "val2014")
        sentences = [
            {"raw": f"A {split} picture, said {n} times.", "sentid": 10 * number + n}
            for n in range(6 - number % 2)
        ]
        image = {"filename": f"{filepath}_{number}.jpg", "split": split, "sentences": sentences}
        if not folder:
            image |= {"filepath": filepath, "cocoid": 100 - number}
        images.append(image)
        paint(root, f"{filepath}/{image['filename']}")
    write(root / f"dataset_{name}.json", {"images": images})


def lxmert(root: Path) -> None:
    for split, folder in (("train", "train2014"), ("nominival", "val2014"), ("minival", "val2014")):
        records = []
        for number in range(3):
            name = f"COCO_{folder}_{len(split):04}{number:08}"
            said = {"mscoco": [f"A {split}.", "Number {number}."], "vqa": ["What is it?"]}
            records.append({"img_id": name, "labelf": {}, "sentf": said})
            paint(root, f"images/{folder}/{name}.jpg")
        write(root / f"lxmert/mscoco_{split}.json", records)
    records = [{"img_id": str(number), "sentf": {"vg": ["a kite"]}} for number in (7, 8)]
    write(root / "lxmert/vgnococo.json", records)
    paint(root, "vg/7.jpg", "vg/8.jpg")


def atomic(root: Path) -> None:
    """Eleven pictures, of which the last two are in no qrels; row groups of three rows."""

    def table(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)

    paint(root / "drawn", *(f"{number}.png" for number in range(11)))
    read = lambda number: {"bytes": (root / f"drawn/{number}.png").read_bytes(), "path": None}
    images = [
        {"image_id": f"uuid-{number}", "image_url": "", "image": read(number)}
        for number in range(11)
    ]
    table(root / "AToMiC-Images-v0.2/data/train-00000-of-00002.parquet", images[:7])
    table(root / "AToMiC-Images-v0.2/data/train-00001-of-00002.parquet", images[7:])
    texts = [
        {
            "text_id": f"projected-{number}",
            "page_title": f"Harbour {number}",
            "section_title": "Introduction",
            "context_page_description": "About harbours.",
            "context_section_description": f"The Harbour of Number {number} lies in New York.",
            "media": [],
        }
        for number in range(9)
    ]
    table(root / "AToMiC-Texts-v0.2.1/data/train-00000-of-00001.parquet", texts)
    relevant = {
        "train": [(0, 0), (1, 1), (1, 2), (2, 3)],
        "validation": [(5, 5), (3, 4)],
        "test": [(8, 8), (6, 6), (8, 7)],
    }
    for split, found in relevant.items():
        rows = [
            {"text_id": f"projected-{text}", "Q0": "Q0", "image_id": f"uuid-{image}", "rel": 1}
            for text, image in found
        ]
        table(root / f"AToMiC-Qrels-v0.2/data/{split}-00000-of-00001.parquet", rows)
        write(root / f"atomic_{split}_entities.json", [["New York", f"row {n}"] for n, _ in found])
        write(root / f"atomic_{split}_summaries.json", [f"Summary {n}" for n, _ in found])
    shutil.rmtree(root / "drawn")


def cc3m(root: Path) -> None:
    for name in ("training", "validation"):
        ids = [f"{name}_0000948{number}" for number in range(3)]
        lines = [f"a {name} of {key}\t{key}\n" for key in (*ids, ids[0])]
        (root / f"{name}.tsv").parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.tsv").write_text("".join(lines))
        paint(root, *(f"images/{name}/{key}" for key in ids))


def imagenet(root: Path) -> None:
    records = [
        {"img_id": "00000001", "subject": "a brown dog", "attribute": "laying on the grass"},
        {"img_id": "00000003", "subject": "a close up of a dog", "attribute": ""},
    ]
    write(root / "blip_pairs.json", records)
    names = [f"ILSVRC2012_test_0000000{number}" for number in (1, 2, 3)]
    paint(root / "test", *(f"{name}.JPEG" for name in names))
    searle(root, names)


def searle(root: Path, names) -> None:
    """SEARLE's concepts and phrases, of which those of one concept lack it, and words of 8 numbers."""
    phrases = {"dog": ["a dog runs", "dog and dog"], "hat": ["a hat"], "cat": ["lost", "a cat"]}
    write(root / "searle/phrases.json", phrases)
    rows = "".join(f"{number},{name},dog,cat,hat\n" for number, name in enumerate(names))
    (root / "searle/concepts.csv").write_text(f",Image Name,1,2,3\n{rows}")
    with VectorWriter(root / "searle/words", fingerprint=None) as writer:
        rows = np.arange(8 * len(names), dtype=np.float32).reshape(-1, 8)
        writer.add(rows, [f"{name}.JPEG" for name in names])
        writer.finish()


def openimages(root: Path) -> None:
    ids = ["0312462f3202e152", "00f0ab12345678cd", "ffff462f3202e152"]
    paint(root, *(f"images/{name}.jpg" for name in ids))
    (root / "open_images.ids").write_text("".join(f"{name}\n" for name in ids))
    lines = {"train": "hi\thow are you ?\tfine\n\nbye\tbye\n", "valid": "hi\n", "test": "a\tb\n"}
    for name, text in lines.items():
        (root / f"{name}.pkl.txt").write_text(text)


# name -> what writes its folder
LAYOUTS = {
    "fashioniq": fashioniq,
    "cirr": cirr,
    "circo": circo,
    "atomic": atomic,
    "coco": lambda root: karpathy(root, "coco", ""),
    "coco-lxmert": lxmert,
    "flickr30k": lambda root: karpathy(root, "flickr30k", "flickr30k-images"),
    "cc3m": cc3m,
    "imagenet": imagenet,
    "openimages": openimages,
}

# (name, variant, split) of training sets, with their lengths
TRAINING = {
    ("fashioniq", "", "train"): 6,
    ("fashioniq", "all", "val"): 6,
    ("fashioniq", "toptee", "train"): 2,
    ("cirr", "", "train"): 2,
    ("cirr", "rc2", "val"): 2,
    ("atomic", "", "train"): 4,
    ("atomic", "entities", "val"): 2,
    ("atomic", "summaries", "test"): 3,
    ("atomic", "entities-builtin", "train"): 4,
    ("coco", "", "train"): 16,
    ("coco", "karpathy-five", "train"): 15,
    ("coco-lxmert", "", "train+nominival"): 12,
    ("coco-lxmert", "vqa+mscoco", "minival"): 9,
    ("coco-lxmert", "vg", "vgnococo"): 2,
    ("flickr30k", "", "val"): 11,
    ("cc3m", "", "train"): 4,
    ("imagenet", "", "test"): 2,
}

# benchmarks, with the numbers of their queries and items
BENCHMARKS = {
    "fashioniq/dress/val": (2, 5),
    "fashioniq/shirt-plain-reversed/val": (2, 5),
    "fashioniq/toptee-union/val": (2, 3),
    "fashioniq/toptee-both-union/val": (2, 3),
    "fashioniq/dress/test": (2, 5),
    "cirr/rc2/val": (2, 8),
    "cirr/rc2/test1": (2, 8),
    "circo/coco/val": (2, 6),
    "circo/coco-concept/test": (3, 6),
    "atomic/small/test": (2, 3),
    "atomic/base-rows/test": (3, 9),
    "atomic/large/val": (2, 11),
    "coco/karpathy/test": (12, 2),
    "coco/karpathy-five/test": (10, 2),
    "coco-lxmert/mscoco/minival": (6, 3),
    "coco-lxmert/mscoco+vqa/train+nominival": (18, 6),
    "flickr30k/karpathy/val": (11, 2),
    "cc3m/tsv/val": (4, 3),
    "openimages/dialogues/train": (2, 3),
    "openimages/dialogues-context/train": (2, 3),
    "openimages/dialogues/val": (1, 3),
}
UNLABELLED = {name for name in BENCHMARKS if name.startswith("openimages/") or "/test" in name}
UNLABELLED -= {name for name in BENCHMARKS if name.startswith(("coco", "flickr", "atomic"))}
