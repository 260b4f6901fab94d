"""Embedded items on disk: numbered shards of vectors and ids, and a manifest that is true after every shard.

vectors-00000.npy   [n, D] float32 or float16
ids-00000.txt       one id per line as a JSON string, so that an id may hold any character, newlines too
manifest.json       row range and checksums of the shards, width, skipped items, gallery, checkpoint, "complete"
"""

import contextlib
import functools
import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax import files

DTYPES = ("float32", "float16")


class Vectors:
    """A complete folder of vectors, memory mapped.

    ids: list of N strings; shards: the mapped arrays [n, D]; width: D; fingerprint: of the checkpoint that made them,
    and checkpoint: its name or folder;
    gallery: locator of the pictures or None; skipped: list of {"id", "reason"}; manifest: all of the above as stored.
    """

    def __init__(self, folder: str | os.PathLike, verify: bool = True):
        """Open `folder`; `verify=False` leaves the checksums of large files unread.

        ValueError if the folder is incomplete, damaged, of another kind or made by a newer cir_jax.
        """
        self.folder = files.local_path(folder)
        self.manifest = files.read_manifest(folder, "vectors")
        _check_shards(self.folder, self.manifest)
        if not self.manifest["complete"]:
            raise ValueError(
                f"{self.folder.absolute()} is incomplete: it stops after {self.manifest['rows']} rows; "
                "run the same embed command again to continue it"
            )
        if verify:
            files.check_sums(self.folder, _sums(self.manifest))
        self.width: int = self.manifest["width"] or 0
        self.fingerprint: str | None = self.manifest["fingerprint"]
        self.checkpoint: str | None = self.manifest["checkpoint"]
        self.gallery: Any = self.manifest["gallery"]
        self.skipped: list[dict[str, str]] = self.manifest["skipped"]
        self.shards = [self._shard(shard) for shard in self.manifest["shards"]]
        self.ids: list[str] = [
            name for shard in self.manifest["shards"] for name in self._ids(shard)
        ]

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __repr__(self) -> str:
        return f"Vectors({str(self.folder)!r}: {len(self)} x {self.width})"

    def array(self) -> np.ndarray:
        """All rows, [N, D] float32: the mapped file itself if there is one float32 shard, else a copy in memory."""
        if len(self.shards) == 1 and self.shards[0].dtype == np.float32:
            return self.shards[0]
        out = np.empty((len(self), self.width), np.float32)
        for shard, rows in zip(self.manifest["shards"], self.shards):
            out[shard["start"] : shard["stop"]] = rows
        return out

    def _shard(self, shard: Mapping[str, Any]) -> np.ndarray:
        path = self.folder / shard["vectors"]
        expected = (shard["stop"] - shard["start"], self.width), self.manifest["dtype"]
        rows = load_array(path, shard["stop"] - shard["start"])
        if (rows.shape, rows.dtype.name) != expected:
            raise ValueError(
                f"{path.absolute()} holds {rows.dtype.name} {rows.shape}, expected {expected[1]} {expected[0]}"
            )
        return rows

    def _ids(self, shard: Mapping[str, Any]) -> list[str]:
        return read_ids(self.folder / shard["ids"], shard["stop"] - shard["start"])


class VectorWriter:
    """Write vectors shard by shard; after an interruption the same call continues behind the last whole shard.

    `done` tells how many items of the gallery are dealt with: the place to continue from. Until `finish` or `close`,
    or the end of a `with` block, the folder belongs to this writer alone.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        fingerprint: str | None,
        checkpoint: str | None = None,
        gallery: Any = None,
        dtype: str = "float32",
        width: int | None = None,
    ):
        """Start `folder`, or re-open it when it was begun with the same arguments (ValueError otherwise).

        fingerprint: of the checkpoint; checkpoint: its name or folder; gallery: its locator, a JSON value; width: D, else that of the first shard.
        FileExistsError if the folder holds something else; BlockingIOError if another writer has it.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        self.folder = files.local_path(folder)
        given = {"dtype": dtype, "width": width, "fingerprint": fingerprint, "gallery": gallery}
        self._given = json.loads(json.dumps(given | {"checkpoint": checkpoint}))
        self._held, self._is_open = contextlib.ExitStack(), False
        self._open()

    def __enter__(self) -> "VectorWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write the folder; what was added is kept. Any later call takes it again, if it is free."""
        self._held.close()
        self._is_open = False

    @property
    def rows(self) -> int:
        """Rows in finished shards."""
        return self.manifest["rows"]

    @property
    def done(self) -> int:
        """Items dealt with: rows written and items skipped."""
        return self.rows + len(self.manifest["skipped"])

    def add(
        self, vectors: np.ndarray, ids: Sequence[str], skipped: Iterable[Mapping[str, str]] = ()
    ) -> None:
        """Write one shard, vectors [n, D] with n ids, and note the items skipped on the way to it.

        skipped: {"id", "reason"} each. With n = 0 only they are noted. ValueError if shapes, width or values
        (not finite, or too large for the dtype) are wrong; the folder is then as it was, and after an OSError (a full
        disk) too: the same call may be repeated.
        """
        self._open()
        skipped = [{"id": str(item["id"]), "reason": str(item["reason"])} for item in skipped]
        ids = [str(name) for name in ids]
        vectors = self._checked(vectors, ids)
        change = {"skipped": self.manifest["skipped"] + skipped, "complete": False}
        if len(vectors):
            shard = self._write_shard(vectors, ids)
            shards = [*self.manifest["shards"], shard]
            change |= {"shards": shards, "rows": shard["stop"], "width": vectors.shape[1]}
        self._write_manifest(self.manifest | change)

    def unskip(self, ids: Iterable[str]) -> None:
        """Forget that these items were skipped: they are gone, or about to be added."""
        self._open()
        gone = set(ids)
        kept = [item for item in self.manifest["skipped"] if item["id"] not in gone]
        if len(kept) < len(self.manifest["skipped"]):
            self._write_manifest(self.manifest | {"skipped": kept, "complete": False})

    def finish(self) -> None:
        """Mark the folder complete. `add` after this reopens it."""
        self._open()
        self._write_manifest(self.manifest | {"complete": True})
        self.close()

    def _open(self) -> None:
        """Take the folder for this writer, unless it has it, and read or begin its manifest."""
        if self._is_open:
            return
        with files.reported(self.folder):
            self._refuse_others()
            self.folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(files.lock(self.folder))
        try:
            begun = (self.folder / files.MANIFEST).is_file()
            self.manifest = self._reopen(self._given) if begun else self._start(self._given)
        except BaseException:
            self._held.close()
            raise
        self._is_open = True

    def _refuse_others(self) -> None:
        """FileExistsError if there is something else than vectors, begun or not, at the place of the folder."""
        if (self.folder / files.MANIFEST).is_file() or not os.path.lexists(self.folder):
            return
        if not self.folder.is_dir() or any(_lasting(self.folder)):
            raise FileExistsError(
                f"{self.folder.absolute()} exists and holds no vectors; choose another name or delete it"
            )

    def _start(self, given: Mapping[str, Any]) -> dict[str, Any]:
        head = {"format": files.FORMAT, "kind": "vectors", "complete": False, "rows": 0}
        return self._write_manifest(head | dict(given) | {"skipped": [], "shards": []})

    def _reopen(self, given: Mapping[str, Any]) -> dict[str, Any]:
        manifest = files.read_manifest(self.folder, "vectors")
        _check_shards(self.folder, manifest)
        if not manifest["rows"] and not manifest["skipped"]:
            return self._start(given)
        # Where the checkpoint and the pictures lie may change: fingerprint and ids tell which they are.
        free = {"checkpoint", "gallery"}
        if given["width"] is None or manifest["width"] is None:
            free.add("width")
        differing = [
            f"{name} {manifest[name]!r} there, {value!r} now"
            for name, value in given.items()
            if manifest[name] != value and name not in free
        ]
        if differing:
            raise ValueError(
                f"{self.folder.absolute()} was begun differently: {'; '.join(differing)}; "
                "choose another folder or repeat the first command"
            )
        absent = [name for name in _sums(manifest) if not (self.folder / name).is_file()]
        if absent:
            raise ValueError(
                f"{self.folder.absolute()} lacks {', '.join(absent)}; copy it again or start anew"
            )
        for leftover in self.folder.glob(f"{files.TEMPORARY}*"):
            leftover.unlink()
        width, gallery = (
            manifest["width"] or given["width"],
            given["gallery"] or manifest["gallery"],
        )
        return manifest | {"width": width, "gallery": gallery}

    def _checked(self, vectors: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        vectors = check_vectors(vectors)
        if len(vectors) != len(ids):
            raise ValueError(f"{len(vectors)} vectors with {len(ids)} ids; give one id per vector")
        width = self.manifest["width"]
        if len(vectors) and width not in (None, vectors.shape[1]):
            raise ValueError(
                f"{self.folder.absolute()} holds vectors of width {width}, these have width {vectors.shape[1]}; "
                "they come from another checkpoint, choose another folder"
            )
        with np.errstate(over="ignore"):
            return check_vectors(vectors.astype(self.manifest["dtype"], copy=False), dtype=None)

    def _write_shard(self, vectors: np.ndarray, ids: Sequence[str]) -> dict[str, Any]:
        number, start = len(self.manifest["shards"]), self.rows
        names = {"vectors": f"vectors-{number:05d}.npy", "ids": f"ids-{number:05d}.txt"}
        with files.write_atomically(self.folder / names["vectors"]) as path:
            np.save(path, vectors, allow_pickle=False)
        write_ids(self.folder / names["ids"], ids)
        sums = {kind: files.sha256(self.folder / name) for kind, name in names.items()}
        return names | {"start": start, "stop": start + len(ids), "sha256": sums}

    def _write_manifest(self, manifest: dict[str, Any]) -> dict[str, Any]:
        files.write_json(self.folder / files.MANIFEST, manifest)
        self.manifest = manifest
        return manifest


class Items:
    """The raw items behind the rows of an index; the gallery is opened at the first call."""

    def __init__(self, ids: Sequence[str], gallery: Any):
        self.ids, self.gallery = ids, gallery

    def __call__(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        """One raw item (image, text, id) for each row; ValueError without a gallery or for a row that is none."""
        rows = [operator.index(row) for row in rows]
        wrong = [row for row in rows if not 0 <= row < len(self.ids)]
        if wrong:
            raise ValueError(
                f"rows {wrong} are not in this index of {len(self.ids)} rows (-1 = nothing)"
            )
        dataset, places = self._opened
        names = [self.ids[row] for row in rows]
        lost = [name for name in names if name not in places]
        if lost:
            raise ValueError(
                f"the gallery {self.gallery!r} no longer has {lost[:5]}; embed it again"
            )
        return [dataset[places[name]] for name in names]

    @functools.cached_property
    def _opened(self) -> tuple[Any, dict[str, int]]:
        # Items that could not be embedded have no row here, so places in the gallery go by id.
        if self.gallery is None:
            raise ValueError(
                "this index does not know its pictures; give gallery= when making it, "
                "or make it from vectors of python -m cir_jax.embed"
            )
        from cir_jax.data.records import open_gallery

        try:
            dataset = open_gallery(self.gallery)
        except FileNotFoundError as error:
            told = str(error).partition("; a gallery is one of")[0]
            raise FileNotFoundError(
                f"{told}; if the pictures were moved, say where with --gallery, or embed them there to the same vectors"
            ) from None
        return dataset, {name: place for place, name in enumerate(dataset.ids)}


def check_vectors(vectors: Any, dtype: str | None = "float32") -> np.ndarray:
    """`vectors` as a contiguous array [N, D] of `dtype` (None: its own), every value finite.

    Integers, any floats and JAX arrays are converted. ValueError for other shapes and types, and for rows with NaN
    or an infinity: ScaNN ends the process on them, and no score can rank them.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or (len(vectors) and not vectors.shape[1]):
        raise ValueError(f"vectors have shape {vectors.shape}, expected [N, D] with D > 0")
    if vectors.dtype.kind not in "fiu" and vectors.dtype.name != "bfloat16":
        raise ValueError(f"vectors are {vectors.dtype.name}, expected real numbers")
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(vectors, dtype)
    step = 1 + 2**22 // max(1, vectors.shape[1])
    for start in range(0, len(vectors), step):
        finite = np.isfinite(vectors[start : start + step]).all(1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise ValueError(
                f"row {row} of {len(vectors)} vectors has a NaN or infinite {vectors.dtype.name} value; "
                "leave such rows out or mend the model that made them"
            )
    return vectors


def check_queries(queries: Any, width: int) -> np.ndarray:
    """`queries` as a contiguous float32 array [Q, D], every value finite and D = `width` (0: any)."""
    try:
        queries = check_vectors(queries)
    except ValueError as error:
        raise ValueError(f"queries: {error}") from None
    if width and queries.shape[1] != width:
        raise ValueError(
            f"queries have width {queries.shape[1]}, the index has width {width}; "
            "encode them with the checkpoint that made the vectors"
        )
    return queries


def load_array(path: Path, rows: int) -> np.ndarray:
    """The array of an `.npy` file, memory mapped if it is to have `rows`; ValueError naming the file if it is none."""
    try:
        with files.reported(path, "read"):
            return np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
    except PermissionError:
        raise
    # What NumPy raises for a damaged header, Python code that it parses, varies.
    except (OSError, ValueError, EOFError, TypeError, SyntaxError) as error:
        raise ValueError(f"{path.absolute()} is damaged ({error}); copy it again") from error


def write_ids(path: str | os.PathLike, ids: Iterable[str]) -> None:
    """Write ids, one JSON string per line, atomically."""
    with files.write_atomically(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        file.writelines(json.dumps(name) + "\n" for name in ids)


def read_ids(path: str | os.PathLike, count: int) -> list[str]:
    """The `count` ids of a file written by `write_ids`; ValueError if it holds anything else."""
    with files.reported(path, "read"):
        text = Path(path).read_bytes().decode("ascii", "replace")
    try:
        ids = json.loads("[" + ",".join(text.splitlines()) + "]")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    if len(ids) != count or not all(isinstance(name, str) for name in ids):
        raise ValueError(f"{path} holds {len(ids)} lines, expected {count} ids; copy it again")
    return ids


def _sums(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {
        shard[kind]: shard["sha256"][kind]
        for shard in manifest["shards"]
        for kind in ("vectors", "ids")
    }


def _lasting(folder: Path) -> Iterable[Path]:
    """What lies in a folder, without the files that an interruption leaves."""
    leftover = (files.TEMPORARY, files.LOCK)
    return (path for path in folder.iterdir() if not path.name.startswith(leftover))


def _check_shards(folder: Path, manifest: Mapping[str, Any]) -> None:
    """ValueError if the shards do not follow each other, share a file, or are not the rows the manifest counts."""
    shards, end, faults = manifest["shards"], 0, []
    for number, shard in enumerate(shards):
        start, stop = shard["start"], shard["stop"]
        if start != end or stop <= start:
            faults.append(
                f"shards[{number}] is rows {start} to {stop}, expected one from row {end} on"
            )
        end = stop
    if manifest["rows"] != end:
        faults.append(f"rows is {manifest['rows']}, the shards hold {end}")
    if shards and not manifest["width"]:
        faults.append(f"width is {manifest['width']}, expected at least 1")
    if len(_sums(manifest)) != 2 * len(shards):
        faults.append("shards share a file, expected two files for each")
    files.refuse_manifest(folder, "vectors", faults)
