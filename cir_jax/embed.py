"""`python -m cir_jax.embed CHECKPOINT GALLERY DEST`: a gallery to vectors on disk."""

import functools
import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from cir_jax.commands import Limited, reason
from cir_jax.compilation import keep_compiled
from cir_jax.progress import printable, progress


@dataclass(frozen=True)
class Arguments(Limited):
    """Embed a gallery: one vector per picture, or of a model of texts one per caption.

    CHECKPOINT is a folder or the name of a packaged model (`emoji_text`). GALLERY is a folder of pictures, a list
    file, tar shards, or the name of a data set. DEST is a new folder; an interrupted run, or one with a --limit,
    continues when the same command is given again; then pictures that have come since are added too, and those that
    could not be read are tried once more. Pictures that cannot be read are listed in DEST/manifest.json.
    """

    checkpoint: tyro.conf.Positional[str]
    gallery: tyro.conf.Positional[str]
    dest: tyro.conf.Positional[Path]
    batch_size: int = 128
    """pictures computed at once"""
    shard_size: int = 8192
    """rows of one file; what an interruption can lose"""
    dtype: Literal["float32", "float16"] = "float32"
    """type on disk"""
    strict: bool = False
    """stop at the first picture that cannot be read"""


def read_pictures(gallery, rows: Sequence[int], spec, pool) -> tuple[list[dict], list[dict]]:
    """(examples, skipped) of some gallery rows.

    An example is `{"id", "image"}` with the picture already cut to what the model reads, uint8 `[S, S, 3]`; skipped
    pictures are `{"id", "reason"}`.
    """
    from cir_jax.data.images import crop, open_image

    def read(row):
        name = gallery.ids[row]
        try:
            return {"id": name, "image": crop(open_image(gallery[row]["image"]), spec)}
        except (ValueError, OSError) as error:
            return {"id": name, "reason": reason(error)}

    read_rows = list(pool.map(read, rows))
    return [x for x in read_rows if "image" in x], [x for x in read_rows if "reason" in x]


def embed(
    checkpoint: str | os.PathLike,
    source: str | os.PathLike,
    dest: str | os.PathLike,
    *,
    batch_size: int = 128,
    shard_size: int = 8192,
    dtype: Literal["float32", "float16"] = "float32",
    strict: bool = False,
    limit: int | None = None,
) -> Path:
    """Write the vectors of every picture of a gallery to the folder `dest`, continuing where an earlier run stopped.

    Args:
      checkpoint, source, dest, batch_size, shard_size, dtype, strict: as of the command (`Arguments`).
      limit: only the first so many pictures; a later run without it goes on behind them.

    Raises:
      ValueError: a gallery without readable pictures; with `strict`, the first picture that cannot be read; a `dest`
        begun by another checkpoint, with another dtype, or with pictures that the gallery lacks; a re-ranker.
    """
    from cir_jax.data.records import open_gallery
    from cir_jax.methods import reranks
    from cir_jax.model import lasting_name, load
    from cir_jax.vectors import VectorWriter

    if batch_size < 1 or shard_size < 1:
        raise ValueError(
            f"batch size is {batch_size} and shard size {shard_size}; both must be at least 1"
        )
    gallery = open_gallery(source)
    if not len(gallery):
        raise ValueError(f"{source} holds no pictures; there is nothing to embed")
    model = load(checkpoint)
    if reranks(model.config):
        raise ValueError(
            f"{checkpoint} is a re-ranker, which makes no vectors; embed with a retriever"
        )
    # In a block of its own: however it ends, others may write the folder afterwards.
    with (
        VectorWriter(
            dest,
            fingerprint=model.fingerprint,
            checkpoint=lasting_name(checkpoint),
            gallery=gallery.locator,
            dtype=dtype,
        ) as writer,
        ThreadPoolExecutor() as pool,
    ):
        count = min(len(gallery), limit or len(gallery))
        new, again = rows_to_do(writer, gallery, range(count))
        with progress("embedding", count, count - len(new) - len(again)) as advance:
            compute = functools.partial(_shard, model, gallery, batch_size, strict, pool, advance)
            for start in range(0, len(new), shard_size):
                writer.add(*compute(new[start : start + shard_size]))
            for start in range(0, len(again), shard_size):
                vectors, ids, _ = compute(again[start : start + shard_size])
                writer.unskip(ids)
                writer.add(vectors, ids)
        if not writer.rows:
            raise ValueError(
                f"none of the {writer.done} pictures of {source} could be read, the first because: "
                f"{writer.manifest['skipped'][0]['reason']}"
            )
        writer.finish()
        report_skipped(writer, Path(dest))
    return Path(dest)


def _of_texts(gallery, kinds) -> bool:
    """Whether a model reads the texts of a gallery: it reads nothing else, or the gallery has nothing else."""
    if {"text"} not in kinds:
        return False
    return kinds[0] == {"text"} or "image" not in gallery[0]


def _shard(model, gallery, batch_size: int, strict: bool, pool, advance, rows: Sequence[int]):
    """(vectors `[n, D]`, ids, skipped) of some gallery rows, as `VectorWriter.add` takes them."""
    from cir_jax.methods import kinds

    spec = model.config.inputs.image
    read_some = lambda rows: (
        read_texts(gallery, rows)
        if _of_texts(gallery, kinds(model.config, "item"))
        else read_pictures(gallery, rows, spec, pool)
    )
    vectors, ids, skipped = [np.zeros((0, 0), np.float32)], [], []
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        examples, broken = read_some(some)
        if strict and broken:
            raise ValueError(f"{broken[0]['reason']}; without --strict it would be skipped")
        if examples:
            vectors.append(model.encode("item", examples, batch_size))
        ids += [example["id"] for example in examples]
        skipped += broken
        advance(len(some))
    return np.concatenate(vectors[1:] or vectors), ids, skipped


def rows_to_do(writer, gallery, rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """(rows that are new, rows that were skipped and may be readable now) among some rows of a gallery.

    Items go by their ids, so a gallery may have grown, moved, or lost items that could not be read.

    Raises:
      ValueError: the gallery has lost items that have vectors.
    """
    from cir_jax.vectors import read_ids

    shards = writer.manifest["shards"]
    parts = [read_ids(writer.folder / s["ids"], s["stop"] - s["start"]) for s in shards]
    have, present = {*itertools.chain(*parts)}, {*gallery.ids}
    lost = have - present
    if lost:
        raise ValueError(
            f"{writer.folder} was begun when the gallery held other pictures, {sorted(lost)[0]!r} for one of "
            f"{len(lost)}; embed it into a new folder"
        )
    skipped = {item["id"] for item in writer.manifest["skipped"]}
    writer.unskip(skipped - present)
    known = have | skipped
    new = [row for row in rows if gallery.ids[row] not in known]
    return new, [row for row in rows if gallery.ids[row] in skipped]


def read_texts(gallery, rows: Sequence[int]) -> tuple[list[dict], list[dict]]:
    """(examples, skipped) of some gallery rows, for a model whose items are texts: `{"id", "text"}`."""
    examples, skipped = [], []
    for row in rows:
        text = gallery[row].get("text")
        if text and text.strip():
            examples.append({"id": gallery.ids[row], "text": text})
        else:
            skipped.append({"id": gallery.ids[row], "reason": f"{gallery.ids[row]}: has no text"})
    return examples, skipped


def report_skipped(writer, dest: Path) -> None:
    """Say how much was written, and which pictures were not."""
    skipped = writer.manifest["skipped"]
    print(f"{writer.rows} vectors of width {writer.manifest['width']} in {dest}")
    for item in skipped[:5]:
        print(f"skipped {printable(item['reason'])}", file=sys.stderr)
    if skipped:
        print(
            f"{len(skipped)} pictures skipped, all listed in {dest / 'manifest.json'}",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> None:
    """Embed as the command line says."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m cir_jax.embed")
    keep_compiled(arguments.cache)
    embed(
        arguments.checkpoint,
        arguments.gallery,
        arguments.dest,
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        dtype=arguments.dtype,
        strict=arguments.strict,
        limit=arguments.limit,
    )


if __name__ == "__main__":
    from cir_jax.commands import start

    start("embed")
