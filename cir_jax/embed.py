"""`python -m cir_jax.embed CHECKPOINT GALLERY DEST`: a gallery to vectors on disk."""

import contextlib
import functools
import itertools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from cir_jax import processes
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

    Several processes call this together, each for its part of every shard; the first of them writes.

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
    processes.check_same(
        f"what {source} or {checkpoint} holds", "\n".join([model.fingerprint, *gallery.ids])
    )
    open_writer = functools.partial(
        VectorWriter,
        dest,
        fingerprint=model.fingerprint,
        checkpoint=lasting_name(checkpoint),
        gallery=gallery.locator,
        dtype=dtype,
    )
    # In a block of its own: however it ends, others may write the folder afterwards.
    with (
        open_writer() if processes.first() else contextlib.nullcontext() as writer,
        ThreadPoolExecutor() as pool,
    ):
        count = min(len(gallery), limit or len(gallery))
        todo = processes.from_first(lambda: rows_to_do(writer, gallery, range(count)))
        new, again = todo["new"].tolist(), todo["again"].tolist()
        with progress("embedding", count, count - len(new) - len(again)) as advance:
            compute = functools.partial(_shard, model, gallery, batch_size, strict, pool, advance)
            for start in range(0, len(new), shard_size):
                found = compute(new[start : start + shard_size])
                if writer:
                    writer.add(*found)
            for start in range(0, len(again), shard_size):
                vectors, ids, _ = compute(again[start : start + shard_size])
                if writer:
                    writer.unskip(ids)
                    writer.add(vectors, ids)
        if writer:
            _finish(writer, source)
    return Path(dest)


def _finish(writer, source) -> None:
    """Mark the vectors complete and say how many there are; ValueError if there are none."""
    if not writer.rows:
        raise ValueError(
            f"none of the {writer.done} pictures of {source} could be read, the first because: "
            f"{writer.manifest['skipped'][0]['reason']}"
        )
    writer.finish()
    report_skipped(writer, writer.folder)


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
    vectors, told = [], {"ids": [], "skipped": []}
    mine = processes.share(len(rows), batch_size)
    for first in range(mine.start, mine.stop, batch_size):
        some = rows[first : min(first + batch_size, mine.stop)]
        examples, broken = read_some(some)
        told["skipped"] += broken
        if strict and broken:
            break
        if examples:
            vectors.append(model.encode("item", examples, batch_size))
        told["ids"] += [example["id"] for example in examples]
        advance(len(some))
    vectors, told = _everybodys(vectors, told)
    if strict and told["skipped"]:
        reason = told["skipped"][0]["reason"]
        raise ValueError(f"{reason}; without --strict it would be skipped")
    advance(len(rows) - len(mine))
    return vectors, told["ids"], told["skipped"]


def _everybodys(vectors: list[np.ndarray], told: dict[str, list]) -> tuple[np.ndarray, dict]:
    """What the processes have computed and noted, each for its part of a shard, in the order of its rows."""
    parts = {str(number): each for number, each in enumerate(vectors)}
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    found = processes.gather({**parts, "told": text})
    notes = [json.loads(bytes(each["told"])) for each in found]
    vectors = [x for each in found for name, x in each.items() if name != "told"]
    told = {name: [x for each in notes for x in each[name]] for name in told}
    return np.concatenate(vectors or [np.zeros((0, 0), np.float32)]), told


def rows_to_do(writer, gallery, rows: Sequence[int]) -> dict[str, np.ndarray]:
    """Rows that are `new`, and rows that were skipped and may be readable now (`again`), among some of a gallery.

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
    again = [row for row in rows if gallery.ids[row] in skipped]
    return {"new": np.array(new, np.int64), "again": np.array(again, np.int64)}


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
    """Embed as the command line says, alone or as one of several processes."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m cir_jax.embed")
    processes.join(preemption=False)
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
