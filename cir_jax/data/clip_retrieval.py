"""The folders in which clip-retrieval (Beaumont 2022) exchanges embeddings, read and written.

img_emb/img_emb_0.npy, text_emb/text_emb_0.npy (float16 or float32, unit rows) and metadata/metadata_0.parquet
(`image_path`, `caption`, …) have the same rows, partition by partition in the order of their names.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cir_jax import files
from cir_jax.data.features import Piece, write_unit_vectors
from cir_jax.data.records import open_gallery
from cir_jax.data.tables import opened_parquet
from cir_jax.vectors import Vectors, load_array

FOLDERS = {"image": "img_emb", "text": "text_emb", "metadata": "metadata"}
PARTITION = 1_000_000  # rows of one


class Partition(NamedTuple):
    """Vectors `[n, D]` of pictures and captions, memory mapped, and what is known of each row; None where absent."""

    image: np.ndarray | None
    text: np.ndarray | None
    metadata: list[dict[str, Any]] | None


def partitions(folder: str | os.PathLike) -> Iterator[Partition]:
    """The partitions in their order.

    Raises:
      FileNotFoundError: neither kind of vectors.
      ValueError: partitions of one kind that another lacks, or of another number of rows; damaged files.
    """
    root = Path(folder)
    found = {
        kind: {path.stem.removeprefix(f"{name}_"): path for path in sorted(_files(root / name))}
        for kind, name in FOLDERS.items()
    }
    found = {kind: paths for kind, paths in found.items() if paths}
    if not found.keys() & {"image", "text"}:
        raise FileNotFoundError(f"{root} holds neither img_emb/*.npy nor text_emb/*.npy")
    names = next(iter(found.values())).keys()
    for kind, paths in found.items():
        if paths.keys() != names:
            raise ValueError(
                f"{root / FOLDERS[kind]} has other partitions than the folders beside it"
            )
    for name in names:
        yield _partition({kind: paths[name] for kind, paths in found.items()})


def _files(folder: Path) -> list[Path]:
    suffix = "parquet" if folder.name == FOLDERS["metadata"] else "npy"
    return list(folder.glob(f"{folder.name}_*.{suffix}"))


def _partition(paths: Mapping[str, Path]) -> Partition:
    parts = {}
    for kind, path in paths.items():
        if kind == "metadata":
            with opened_parquet(path) as file:
                parts[kind] = file.read().to_pylist()
            continue
        parts[kind] = load_array(path, 1)
        if parts[kind].ndim != 2 or parts[kind].dtype.name not in ("float16", "float32"):
            found = f"{parts[kind].dtype.name} {parts[kind].shape}"
            raise ValueError(f"{path} holds {found}, expected float16 or float32 [rows, width]")
    counts = {len(part) for part in parts.values()}
    if len(counts) > 1:
        told = ", ".join(f"{paths[kind]} {len(part)}" for kind, part in parts.items())
        raise ValueError(f"partitions have different numbers of rows: {told}")
    return Partition(*(parts.get(kind) for kind in FOLDERS))


def write(
    folder: str | os.PathLike,
    image: np.ndarray | None = None,
    text: np.ndarray | None = None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    rows: int = PARTITION,
) -> Path:
    """Write vectors `[N, D]` as float16, and metadata, `rows` of them in a partition.

    Raises:
      FileExistsError: something there.
      ValueError: parts of different lengths, or nothing.
      ImportError: metadata, but no pyarrow.
    """
    parts = {"image": image, "text": text, "metadata": metadata}
    parts = {kind: part for kind, part in parts.items() if part is not None}
    lengths = {len(part) for part in parts.values()}
    if len(lengths) != 1 or lengths == {0} or rows < 1:
        raise ValueError(f"nothing to write, or parts of different lengths: {sorted(lengths)}")
    total = lengths.pop()
    count = -(-total // rows)
    digits = len(str(count))
    with files.write_folder(folder) as place:
        for kind, part in parts.items():
            (place / FOLDERS[kind]).mkdir()
            for number in range(count):
                name = f"{FOLDERS[kind]}_{number:0{digits}}"
                some = part[number * rows : (number + 1) * rows]
                _write_part(place / FOLDERS[kind] / name, kind, some)
    return Path(folder)


def _write_part(path: Path, kind: str, part) -> None:
    if kind != "metadata":
        np.save(path.with_name(f"{path.name}.npy"), np.asarray(part, np.float16))
        return
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            "metadata needs pyarrow; run `pip install 'cir_jax[parquet]'`, or write vectors alone"
        ) from None
    table = pyarrow.Table.from_pylist([dict(row) for row in part])
    parquet.write_table(table, path.with_name(f"{path.name}.parquet"))


def to_vectors(
    folder: str | os.PathLike,
    dest: str | os.PathLike,
    part: Literal["image", "text"] = "image",
    gallery: str | os.PathLike | None = None,
) -> Path:
    """Write the vectors of a folder of clip-retrieval's as those that `python -m cir_jax.index` takes.

    Args:
      gallery: where the pictures are, the shards or the folder that were embedded (`write_unit_vectors`). Keys are
        `image_path`; without metadata, and without a gallery, the number of the row.

    Raises:
      FileNotFoundError: no vectors of that part.
      ValueError: as for `partitions` and `write_unit_vectors`.
    """
    if part not in ("image", "text"):
        raise ValueError(f"part is {part!r}; expected image or text")
    return write_unit_vectors(dest, _pieces(folder, part, gallery is not None), gallery)


def _pieces(folder, part, need_paths) -> Iterator[Piece]:
    start = 0
    for each in partitions(folder):
        vectors = getattr(each, part)
        if vectors is None:
            raise FileNotFoundError(f"{folder} has no {FOLDERS[part]}")
        keys = [str(row.get("image_path") or "") for row in each.metadata or ()]
        if not keys or not all(keys):
            if need_paths:
                raise ValueError(
                    f"{folder} has no metadata with image_path, so no picture is known"
                )
            keys = [str(start + row) for row in range(len(vectors))]
        yield len(vectors), lambda keys=keys, vectors=vectors: (keys, vectors)
        start += len(vectors)


def from_vectors(
    source: str | os.PathLike, folder: str | os.PathLike, rows: int = PARTITION
) -> Path:
    """Write the folder of vectors `source` (`python -m cir_jax.embed`) as clip-retrieval's.

    `image_path` is the id; `caption` the text that the gallery has for it, if it is still there.
    """
    vectors = Vectors(source)
    metadata = [{"image_path": name} for name in vectors.ids]
    if vectors.gallery is not None:
        gallery = open_gallery(vectors.gallery)
        places = {name: place for place, name in enumerate(gallery.ids)}
        for row in metadata:
            if row["image_path"] in places:
                row["caption"] = gallery[places[row["image_path"]]].get("text", "")
    return write(folder, image=vectors.array(), metadata=metadata, rows=rows)
