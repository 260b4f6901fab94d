"""Captions of photographs: COCO and Flickr30k in Karpathy's splits, COCO and Visual Genome in LXMERT's, CC3M in Maria's.

Karpathy & Fei-Fei 2015: dataset_coco.json or dataset_flickr30k.json; LXMERT (Tan & Bansal 2019), as Maria and
Vokenization read it: lxmert/mscoco_{train,nominival,minival}.json and lxmert/vgnococo.json. Pictures of COCO are in
train2014 and val2014, those of Flickr30k in flickr30k-images, those of Visual Genome in vg; all of them may be below
`images`, too. Conceptual Captions as Maria has it: training.tsv and validation.tsv, lines of a caption, a tab and an id,
and the pictures images/training/training_00009486, without an ending.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cir_jax.data import published
from cir_jax.data.benchmark import Benchmark, Made
from cir_jax.data.published import Asked, Missing, Pair, Part
from cir_jax.data.records import Gallery
from cir_jax.data.tables import refuse

METRICS = (*(f"recall@{k}" for k in (1, 5, 10)), "mrr")
FIVE = 5  # captions of a picture under the flag `five`
SOURCES = ("mscoco", "vg", "vqa", "gqa", "visual7w")  # of sentences in LXMERT's files
LXMERT = {name: f"lxmert/mscoco_{name}.json" for name in ("train", "nominival", "minival")}
LXMERT |= {"vgnococo": "lxmert/vgnococo.json"}


class Captioned(NamedTuple):
    """A picture: its id, where it may lie, and what is said of it, each text with an id."""

    id: str
    places: Sequence[str]
    texts: Sequence[tuple[str, str]]


# ---- Karpathy ----


def coco_pairs(root: str, variant: str = "", split: str = "train") -> Made:
    """Raw training pairs, a row for each caption.

    `train` are the 113,287 pictures of the files' `train` and `restval`. Variants: `karpathy`, and `karpathy-five` for at
    most five captions of a picture.
    """
    return _pairs(*_karpathy("coco", root, variant, split))


def coco_benchmark(root: str, variant: str = "", split: str = "test") -> Benchmark:
    """Captions ask for their picture among those of the split; variants as for `coco_pairs`, and the other direction.

    The test split has 5,000 pictures and 25,010 captions; with `karpathy-five`, 25,000. With `karpathy-texts` pictures
    ask for their captions among all captions of the split; the first of them that is found counts.
    """
    return _benchmark(*_karpathy("coco", root, variant, split, ("five", "texts")))


def flickr30k_pairs(root: str, variant: str = "", split: str = "train") -> Made:
    """Raw training pairs, a row for each caption (29,000 pictures with five each)."""
    return _pairs(*_karpathy("flickr30k", root, variant, split))


def flickr30k_benchmark(root: str, variant: str = "", split: str = "test") -> Benchmark:
    """Captions ask for their picture among the 1,000 (validation: 1,014) of the split; `karpathy-texts` as for COCO."""
    return _benchmark(*_karpathy("flickr30k", root, variant, split, ("five", "texts")))


def _karpathy(
    name, root, variant, split, flags: Sequence[str] = ("five",)
) -> tuple[Part, Path, list[Captioned]]:
    part = published.part(
        name, root, variant, split, ("karpathy",), ("train", "val", "test"), flags
    )
    shape = {"filename": str, "split": str, "sentences": [{"raw": str, "sentid": int}]}
    if name == "coco":
        shape |= {"filepath": str, "cocoid": int}
    file = part.root / f"dataset_{name}.json"
    images = published.read_json(file, {"images": [shape]})["images"]
    wanted = ("train", "restval") if split == "train" else (split,)
    images = [image for image in images if image["split"] in wanted]
    if not images:
        raise ValueError(f"{file} has no pictures of the split {split!r}")
    most = FIVE if "five" in part.flags else None
    return (
        part,
        file,
        [
            Captioned(
                str(image["cocoid"]) if name == "coco" else image["filename"].removesuffix(".jpg"),
                _below_images(f"{image.get('filepath', 'flickr30k-images')}/{image['filename']}"),
                [(str(each["sentid"]), each["raw"]) for each in image["sentences"][:most]],
            )
            for image in images
        ],
    )


# ---- LXMERT ----


def lxmert_pairs(root: str, variant: str = "", split: str = "train+nominival") -> Made:
    """Raw training pairs, a row for each sentence, file after file.

    `split` joins files by `+`: train (82,783 pictures), nominival (35,504), minival (5,000), vgnococo. Variants: sources
    of sentences joined by `+`, in the order in which they are wanted: `mscoco` (the usual), `mscoco+vg`.

    `train` and `nominival`, on which Maria's model was trained, have 4,382 of the 5,000 pictures of Karpathy's test split.
    """
    return _pairs(*_lxmert(root, variant, split))


def lxmert_benchmark(root: str, variant: str = "", split: str = "minival") -> Benchmark:
    """Sentences ask for their picture among those of the files; the published evaluation is `mscoco` on `minival`."""
    return _benchmark(*_lxmert(root, variant, split))


def _lxmert(root, variant, split) -> tuple[Part, Path, list[Captioned]]:
    kind = (variant or SOURCES[0]).split("-")[0]
    sources, names = kind.split("+"), split.split("+")
    for what, given, known in (("source", sources, SOURCES), ("split", names, LXMERT)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(
                f"coco-lxmert has no {what} {unknown[0]!r}; there are {', '.join(known)}, and several are joined by +"
            )
    part = published.part("coco-lxmert", root, variant, split, (kind,), (split,))
    shape, found = {"img_id": str, "sentf": {}}, []
    for name in names:
        file = part.root / LXMERT[name]
        records = published.read_json(file, [shape])
        none = {source: [] for source in sources}
        records = [{**record, "sentf": none | record["sentf"]} for record in records]
        said = {source: [str] for source in sources}
        for record in published.fitting(records, [{"sentf": said}], file):
            texts = [
                (f"{record['img_id']}:{source}:{number}", text)
                for source in sources
                for number, text in enumerate(record["sentf"][source])
            ]
            found.append(Captioned(record["img_id"], _lxmert_places(record["img_id"]), texts))
    return part, part.root / "lxmert", found


def _lxmert_places(name):
    """COCO_train2014_000000318556 tells its folder; a bare number is of Visual Genome."""
    folder = name.split("_")[1] if name.startswith("COCO_") and name.count("_") > 1 else "vg"
    return _below_images(f"{folder}/{name}.jpg")


# ---- Conceptual Captions ----


def cc3m_pairs(root: str, variant: str = "", split: str = "train") -> Made:
    """Raw training pairs of Conceptual Captions, from Maria's table (shards of img2dataset are a `captioned` gallery)."""
    return _pairs(*_cc3m(root, variant, split))


def cc3m_benchmark(root: str, variant: str = "", split: str = "val") -> Benchmark:
    """Captions ask for their picture among those of the split."""
    return _benchmark(*_cc3m(root, variant, split))


def _cc3m(root, variant, split) -> tuple[Part, Path, list[Captioned]]:
    part = published.part("cc3m", root, variant, split, ("tsv",), ("train", "val"))
    name = {"train": "training", "val": "validation"}[split]
    file, texts, faults = part.root / f"{name}.tsv", defaultdict(list), []
    for number, line in enumerate(published.read_lines(file), 1):
        cells = line.split("\t")
        if len(cells) == 2 and cells[1].strip():
            texts[cells[1].strip()].append((f"{split}-{number}", cells[0]))
        else:
            faults.append(f"line {number} is no caption, tab and id: {line[:60]!r}")
    refuse(f"{file} has another form than the published file", faults, file)
    return (
        part,
        file,
        [Captioned(key, [f"images/{name}/{key}"], said) for key, said in texts.items()],
    )


# ---- all ----


def _below_images(path):
    return [path, f"images/{path}"]


def _different(file: Path, pictures: Sequence[Captioned]) -> list[Captioned]:
    """The pictures, which must have different ids."""
    published.distinct([each.id for each in pictures], file)
    found = {}
    for each in pictures:
        found.setdefault(each.id, each)
    return list(found.values())


def _pairs(part: Part, file: Path, pictures: Sequence[Captioned]) -> Made:
    pictures = _different(file, pictures)
    rows = [Pair((text,), each.id) for each in pictures for _, text in each.texts]
    return published.pairs(part, file, rows, {each.id: each.places for each in pictures})


def _benchmark(part: Part, file: Path, pictures: Sequence[Captioned]) -> Benchmark:
    pictures = _different(file, pictures)
    places = {each.id: each.places for each in pictures}
    if "texts" in part.flags:
        return _other_direction(part, file, pictures, places)
    asked = [
        Asked(id=name, asks={"text": text}, targets={each.id: 1.0})
        for each in pictures
        for name, text in each.texts
    ]
    return published.benchmark(part, file, asked, places, METRICS)


def _other_direction(part: Part, file: Path, pictures: Sequence[Captioned], places) -> Benchmark:
    """Pictures ask for their captions; both of a missing picture are left out."""
    paths = published.find(part.root, places)
    missing = Missing(part, places, paths)
    kept = [each for each in pictures if each.id in paths and each.texts]
    missing.tell(len(kept), len(pictures), "queries")
    texts = {name: text for each in kept for name, text in each.texts}
    published.distinct([name for each in kept for name, _ in each.texts], file)
    ids = list(texts)
    rows = {name: row for row, name in enumerate(ids)}
    return Benchmark(
        name=part.name,
        variant=part.variant,
        split=part.split,
        queries=Made(len(kept), lambda row: {"image": paths[kept[row].id], "id": kept[row].id}),
        gallery=Gallery(
            ids, {"kind": "benchmark", "name": str(part)}, lambda row: {"text": texts[ids[row]]}
        ),
        ids=ids,
        positives=[{rows[name]: 1.0 for name, _ in each.texts} for each in kept],
        metrics=METRICS,
        missing=missing.counts,
    )
