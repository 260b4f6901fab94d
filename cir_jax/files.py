"""Artefacts on disk: complete or absent, checked by checksum, refused with a reason.

Every artefact is written under a temporary name beside its place and renamed when it is complete. Paths are local:
vectors and indexes are memory mapped, which a bucket address does not allow.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
MADE_BY = {
    "vectors": "python -m cir_jax.embed",
    "index": "python -m cir_jax.index",
    "checkpoint": "python -m cir_jax.train",
}


def local_path(path: str | os.PathLike) -> Path:
    """`path` as a `Path`; ValueError for a bucket address such as `gs://…`."""
    if "://" in os.fspath(path):
        raise ValueError(
            f"{os.fspath(path)} is a bucket address, expected a local path; copy the folder here or mount the bucket"
        )
    return Path(path)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; it becomes `path` if the block succeeds.

    The temporary name keeps the suffix. When the block raises, an earlier `path` stays as it was.
    """
    path = local_path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; it becomes `path` if the block succeeds.

    Missing parent folders are made. FileExistsError if something is at `path`, before and after the block.
    """
    path = local_path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        refuse_existing(path)
        os.rename(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: str | os.PathLike) -> None:
    """FileExistsError if there is anything at `path`, a broken link included."""
    if os.path.lexists(local_path(path)):
        raise FileExistsError(
            f"{Path(path).absolute()} already exists; choose another name or delete it"
        )


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN and infinities are refused: they are not JSON."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with write_atomically(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file if it is cut or is not a JSON object."""
    path = local_path(path)
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path.absolute()} is not complete JSON ({error}); it was cut or overwritten, make it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path.absolute()} holds a JSON {type(value).__name__}, expected an object"
        )
    return value


def read_manifest(folder: str | os.PathLike, kind: str) -> dict[str, Any]:
    """The manifest of an artefact folder of this `kind` ("vectors", "index" or "checkpoint").

    FileNotFoundError if the folder or its manifest is missing; ValueError for another kind or a newer format.
    """
    folder = local_path(folder)
    made_by = f"{kind}: made by {MADE_BY[kind]}"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.absolute()} is not a folder; {made_by}")
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder.absolute()} has no {MANIFEST}; {made_by}")
    manifest = read_json(folder / MANIFEST)
    version, found = manifest.get("format"), manifest.get("kind")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"{folder.absolute()}/{MANIFEST} has format {version!r}, expected 1 to {FORMAT}; {made_by}"
        )
    if version > FORMAT:
        raise ValueError(
            f"{folder.absolute()} was made by a newer cir_jax (format {version}, this one reads up to {FORMAT}); "
            "update cir_jax"
        )
    if found != kind:
        raise ValueError(f"{folder.absolute()} holds {found!r}, expected {kind!r}; {made_by}")
    return manifest


def folder_sums(folder: str | os.PathLike) -> dict[str, str]:
    """The SHA-256 of every file below `folder` except its manifest, by name relative to it."""
    folder = local_path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: sha256(path) for name, path in names.items() if name != MANIFEST}


def check_sums(folder: str | os.PathLike, sums: Mapping[str, str]) -> None:
    """ValueError that lists every file of `sums` (name -> SHA-256) that is missing or changed."""
    folder = local_path(folder)
    faults = [f"{name}: {fault}" for name in sums if (fault := _fault(folder, name, sums[name]))]
    if faults:
        raise ValueError(
            f"{folder.absolute()} is damaged: "
            + "; ".join(faults)
            + "; copy it again or make it again"
        )


def _fault(folder: Path, name: str, expected: str) -> str | None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "leads out of the folder"
    if not path.is_file():
        return "missing"
    return None if sha256(path) == expected else "changed or cut (its checksum differs)"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")


def _flush(path: Path) -> None:
    """Ask the operating system to put a file or a folder's list of names on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
