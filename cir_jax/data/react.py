"""The files of REACT's retrieval stage (Liu et al. 2023; microsoft/react), read and written.

NNNNN.tsv and NNNNN.lineidx hold the features of the pictures and captions of a tar shard, metafile.json their numbers of
rows, filelist.pkl the pictures of each shard. A scattered folder, NNNNN/KEY.jpg with KEY.txt, is a gallery as it is
(`cir_jax.data.records`), and so are the shards; `to_vectors` joins features and gallery by their keys.
"""

import base64
import binascii
import functools
import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from cir_jax import files
from cir_jax.data.features import write_unit_vectors
from cir_jax.data.records import expand, members
from cir_jax.data.tables import read_text


class Features(NamedTuple):
    """Rows of a TSV: keys, SHA-256 of the downloads, features `[n, D]` as they were computed, not normalised."""

    keys: list[str]
    sums: list[str]
    image: np.ndarray
    text: np.ndarray


# ---- features ----


def read_features(path: str | os.PathLike, dtype: str = "float16") -> Features:
    """The rows of a TSV.

    Args:
      dtype: of the stored features; the file does not tell, REACT on a GPU writes float16.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a malformed line, named; rows of different widths; another number of rows than in the lineidx.
    """
    path = Path(path)
    rows = [
        _row(line, dtype, f"{path}, line {number}") for number, line in enumerate(_lines(path), 1)
    ]
    widths = {array.shape for row in rows for array in row[2:]}
    if len(widths) > 1:
        raise ValueError(f"{path} has features of widths {sorted(width for (width,) in widths)}")
    index = path.with_suffix(".lineidx")
    if index.is_file() and len(_lines(index)) != len(rows):
        raise ValueError(f"{index} counts {len(_lines(index))} rows, {path} has {len(rows)}")
    keys, sums, image, text = zip(*rows) if rows else ((), (), (), ())
    stacked = lambda arrays: np.stack(arrays) if arrays else np.zeros((0, 0), dtype)
    return Features(list(keys), list(sums), stacked(image), stacked(text))


def _lines(path: Path) -> list[str]:
    return [line for line in read_text(path).split("\n") if line.strip()]


def _row(line: str, dtype: str, place: str):
    cells = [cell.strip() for cell in line.split("\t")]
    if len(cells) != 4:
        raise ValueError(f"{place} has {len(cells)} columns, expected key, sum and two features")
    try:
        data = [base64.b64decode(cell, validate=True) for cell in cells[2:]]
        image, text = (np.frombuffer(each, np.dtype(dtype).newbyteorder("<")) for each in data)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{place} holds no {dtype} features: {error}") from None
    return cells[0], cells[1], image.astype(dtype), text.astype(dtype)


def write_features(path: str | os.PathLike, features: Features) -> None:
    """Write `NNNNN.tsv` and its `NNNNN.lineidx`; features become float16."""
    path, lines = Path(path), []
    columns = (features.image.astype("<f2"), features.text.astype("<f2"))
    if {len(features.keys)} != {len(each) for each in (features.sums, *columns)}:
        raise ValueError(f"features for {path} have columns of different lengths")
    for key, total, *arrays in zip(features.keys, features.sums, *columns):
        if any(letter in "\t\r\n" or ord(letter) > 127 for letter in f"{key}{total}"):
            raise ValueError(f"the key {key!r} cannot stand in a TSV of REACT")
        encoded = [base64.b64encode(array.tobytes()).decode() for array in arrays]
        lines.append("\t".join((key, total, *encoded)) + "\n")
    offsets = np.cumsum([0, *map(len, lines)])[:-1]
    with files.write_atomically(path) as temporary:
        temporary.write_text("".join(lines), encoding="ascii")
    with files.write_atomically(path.with_suffix(".lineidx")) as temporary:
        temporary.write_text("".join(f"{offset}\n" for offset in offsets), encoding="ascii")


def row_counts(folder: str | os.PathLike) -> dict[str, int]:
    """The number of rows of each TSV of a folder by its lineidx, in the order of the index's rows.

    Raises:
      FileNotFoundError: no TSV, or one without a lineidx.
      ValueError: a `metafile.json` in the folder that says something else, because it is stale.
    """
    folder = Path(folder)
    found = {
        path.stem: len(_lines(path.with_suffix(".lineidx")))
        for path in sorted(folder.glob("*.tsv"))
    }
    if not found:
        raise FileNotFoundError(f"{folder} holds no .tsv files")
    stored = folder / "metafile.json"
    if stored.is_file() and files.read_json(stored) != found:
        raise ValueError(f"{stored} is stale: the TSVs beside it have other rows; delete it")
    return found


def write_metafile(folder: str | os.PathLike) -> Path:
    """Write the `metafile.json` of a folder of TSVs."""
    path = Path(folder) / "metafile.json"
    path.unlink(missing_ok=True)
    counts = row_counts(folder)
    with files.write_atomically(path) as temporary:
        temporary.write_text(json.dumps(counts), encoding="ascii")
    return path


def to_vectors(
    folder: str | os.PathLike,
    dest: str | os.PathLike,
    part: Literal["image", "text"] = "image",
    gallery: str | os.PathLike | None = None,
    dtype: str = "float16",
) -> Path:
    """Write the features of a folder of TSVs, made unit, as vectors that `python -m cir_jax.index` takes.

    Rows are in the order of REACT's index: sorted shards, rows as in the file.

    Args:
      gallery: where the pictures are, the shards or the scattered folder (`write_unit_vectors`).
      dtype: of the stored features.

    Raises:
      ValueError: an unknown part. And as for `read_features`, `row_counts` and `write_unit_vectors`.
    """
    if part not in ("image", "text"):
        raise ValueError(f"part is {part!r}; expected image or text")

    def read(stem):
        features = read_features(Path(folder) / f"{stem}.tsv", dtype)
        return features.keys, getattr(features, part)

    pieces = ((count, functools.partial(read, stem)) for stem, count in row_counts(folder).items())
    return write_unit_vectors(dest, pieces, gallery)


# ---- shards ----


def write_filelist(shards: str | os.PathLike, dest: str | os.PathLike) -> None:
    """Write `filelist.pkl`: for each tar shard the names of its members that end in `.jpg`, in its order.

    Args:
      shards: a folder of shards, or a pattern as for `open_gallery`.

    Raises:
      FileNotFoundError: no shards.
      ValueError: shards that are not 00000.tar, 00001.tar, … without a gap, as REACT wants them.
    """
    found = OrderedDict()
    for number, shard in enumerate(_shards(shards)):
        if not shard.stem.isdecimal() or int(shard.stem) != number:
            raise ValueError(f"{shard} is not number {number} of the shards; REACT wants no gaps")
        found[shard.stem] = [str(path) for path, _ in members(shard) if path.name.endswith(".jpg")]
    with files.write_atomically(dest) as temporary:
        temporary.write_bytes(pickle.dumps(found))


def _shards(shards) -> list[Path]:
    path = Path(shards)
    return expand(path / "*.tar" if path.is_dir() else path)


def read_filelist(path: str | os.PathLike) -> dict[str, list[str]]:
    """The member names of each shard in a `filelist.pkl`; nothing in it is run (`cir_jax.conversion.pickles`).

    Raises:
      FileNotFoundError: no such file.
      ValueError: what is no such list, or asks for more than plain values.
    """
    from cir_jax.conversion import pickles

    data = Path(path).read_bytes()

    def refuse(_):
        raise ValueError("it refers to tensors, which a list of files does not")

    try:
        # No more steps than bytes: three million names are fine, and a bomb is not.
        found = pickles.load(io.BytesIO(data), len(data), refuse, steps=2 * len(data))
    except ValueError as error:
        raise ValueError(f"{path} is no list of files: {error}") from None
    sound = isinstance(found, dict) and all(
        isinstance(stem, str)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        for stem, names in found.items()
    )
    if not sound:
        raise ValueError(f"{path} is no list of files: expected names by shard")
    return found


def check_alignment(folder: str | os.PathLike, filelist: str | os.PathLike) -> int:
    """How many rows TSVs and filelist have alike; ValueError where a shard has more of one than of the other.

    REACT takes row r of its index for the r-th `.jpg` of all shards, and nothing in it looks whether that is so.
    """
    counts = row_counts(folder)
    listed = {stem: len(names) for stem, names in read_filelist(filelist).items()}
    differing = [stem for stem in {**counts, **listed} if counts.get(stem) != listed.get(stem)]
    if differing:
        first = differing[0]
        raise ValueError(
            f"{len(differing)} shards differ: {first} has {counts.get(first, 'no')} rows of features and "
            f"{listed.get(first, 'no')} pictures in {filelist}"
        )
    return sum(counts.values())


def scatter(shards: str | os.PathLike, dest: str | os.PathLike, fanned: bool = False) -> int:
    """Unpack tar shards to `dest/NNNNN/KEY.jpg`, `.json`, `.txt`, and give the number of files; those there stay.

    Args:
      shards: a folder of shards, or a pattern.
      fanned: to `dest/NNNNN/K/E/KEY.jpg`, as REACT's reader wants it by default.

    Raises:
      ValueError: a damaged shard, or a member in a folder of its own.
    """
    written = 0
    for shard in _shards(shards):
        for path, member in members(shard):
            if len(path.parts) > 1 or len(path.name) < 2:
                raise ValueError(
                    f"{shard} has a member {str(path)!r}, expected KEY.jpg and the like"
                )
            place = Path(dest) / shard.stem
            place = place / path.name[0] / path.name[1] / path.name if fanned else place / path.name
            if not place.is_file() or place.stat().st_size != member.size:
                place.parent.mkdir(parents=True, exist_ok=True)
                with files.write_atomically(place) as temporary:
                    temporary.write_bytes(member.read())
            written += 1
    return written


def sums(shards: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """(key, SHA-256 of the download) of each sample of img2dataset's shards, from the JSON beside the pictures.

    Raises:
      ValueError: a sample whose JSON has no `key` or `sha256`.
    """
    for shard in _shards(shards):
        for path, member in members(shard):
            if path.suffix == ".json":
                try:
                    value = json.loads(member.read())
                    yield value["key"], value["sha256"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path} in {shard} does not tell key and sha256: {error!r}"
                    ) from None
