"""Artefacts on disk: complete or absent, checked by checksum, refused with a reason.

Every artefact is written under a temporary name beside its place and renamed when it is complete. Paths are local:
vectors and indexes are memory mapped, which a bucket address does not allow.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands that show their help do without
    import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
MADE_BY = {
    "vectors": "python -m cir_jax.embed",
    "index": "python -m cir_jax.index",
    "checkpoint": "python -m cir_jax.train",
    "dataset": "python -m cir_jax.data",
}


def _is_file_name(x: Any) -> bool:
    """True for a path that a file can have and that stays below the folder it is relative to."""
    try:
        name = x.encode(errors="surrogateescape")
    except (AttributeError, UnicodeEncodeError):
        return False
    path = PurePosixPath(x)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and b"\0" not in name and len(name) < 256


def _is_sum(x: Any) -> bool:
    return type(x) is str and bool(re.fullmatch("[0-9a-f]{64}", x))


def _is_count(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**48


# What a field may be required to be: the words of the error, and whether a value is it.
IS = {
    "true or false": lambda x: type(x) is bool,
    "a whole number from 0 on": _is_count,
    "a whole number from 0 on, or null": lambda x: x is None or _is_count(x),
    "a finite number": lambda x: type(x) in (int, float) and abs(x) < 1e300,
    "text": lambda x: type(x) is str,
    "text or null": lambda x: x is None or type(x) is str,
    "an object": lambda x: type(x) is dict,
    "an object, text or null": lambda x: x is None or type(x) in (dict, str),
    "a file inside the folder": _is_file_name,
    "a SHA-256": _is_sum,
    "SHA-256 sums by file": lambda x: (
        type(x) is dict and all(_is_file_name(k) and _is_sum(v) for k, v in x.items())
    ),
    "texts by name": lambda x: type(x) is dict and all(type(v) is str for v in x.values()),
    "float32 or float16": lambda x: x in ("float32", "float16"),
    "float32, float16 or bfloat16": lambda x: x in ("float32", "float16", "bfloat16"),
    "training, benchmark or gallery": lambda x: x in ("training", "benchmark", "gallery"),
    "exact or scann": lambda x: x in ("exact", "scann"),
}
# Fields of each kind of manifest beside `format` and `kind`; [x] is a list of x. More fields are no fault.
FIELDS = {
    "vectors": {
        "complete": "true or false",
        "rows": "a whole number from 0 on",
        "dtype": "float32 or float16",
        "width": "a whole number from 0 on, or null",
        "fingerprint": "text or null",
        "checkpoint": "text or null",
        "gallery": "an object, text or null",
        "skipped": [{"id": "text", "reason": "text"}],
        "shards": [
            {
                "vectors": "a file inside the folder",
                "ids": "a file inside the folder",
                "start": "a whole number from 0 on",
                "stop": "a whole number from 0 on",
                "sha256": {"vectors": "a SHA-256", "ids": "a SHA-256"},
            }
        ],
    },
    "index": {
        "index": "exact or scann",
        "rows": "a whole number from 0 on",
        "width": "a whole number from 0 on",
        "fingerprint": "text or null",
        "checkpoint": "text or null",
        "gallery": "an object, text or null",
        "vectors": "a file inside the folder",
        "files": "SHA-256 sums by file",
    },
    "checkpoint": {
        "method": "text",
        "config": "an object",
        "dtype": "float32, float16 or bfloat16",
        "parameters": "a whole number from 0 on",
        "fingerprint": "text",
        "about": "an object",
        "sums": "SHA-256 sums by file",
    },
    "dataset": {
        "name": "text",
        "rows": "a whole number from 0 on",
        "pictures": "a whole number from 0 on",
        "parts": [
            {
                "kind": "training, benchmark or gallery",
                "variant": "text",
                "split": "text",
                "splits": ["text"],
                "header": "a file inside the folder",
            }
        ],
        "files": "SHA-256 sums by file",
    },
}
# Fields that a manifest may lack.
OPTIONAL = {"checkpoint": {"modules": "texts by name"}}


def local_path(path: str | os.PathLike) -> Path:
    """`path` as a `Path`; ValueError for a bucket address such as `gs://…`."""
    if "://" in os.fspath(path):
        raise ValueError(
            f"{os.fspath(path)} is a bucket address, expected a local path; copy the folder here or mount the bucket"
        )
    return Path(path)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file in hexadecimal, read in pieces."""
    with reported(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def reported(path: str | os.PathLike, done: str = "written") -> Iterator[None]:
    """Say in one line that `path` could not be `done`, and why, if a full disk or a permission ends the block."""
    try:
        yield
    except Exception as error:
        code = _code(error)
        if code not in FULL + CLOSED:
            raise
        remedy = "make room (or raise the limit) and repeat; what was complete before is unchanged"
        if code in CLOSED:
            remedy = "ask its owner for the permission, or choose another place"
        place = Path(path).absolute()
        told = f"{place} could not be {done}: {os.strerror(code).lower()}; {remedy}"
        again = type(OSError(code, ""))(told)
        again.errno = code
        raise again from error


def refuse_full(folder: str | os.PathLike, size: int) -> None:
    """OSError if `size` bytes do not fit into `folder`, before a library tries and leaves its own errors.

    What may lie in one file counts too (`ulimit -f`): Orbax puts a state into few files.
    """
    rooms = {errno.ENOSPC: shutil.disk_usage(folder).free}
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        rooms[errno.EFBIG] = math.inf if limit == resource.RLIM_INFINITY else limit
    for code, room in rooms.items():
        if size > room:
            with reported(folder):
                raise OSError(code, f"{size} bytes wanted, {room} there")


def _code(error: Exception) -> int | None:
    """The number of the operating system's error that an exception stands for."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    # Orbax and ScaNN tell it in words only, and NumPy only how many values it could not write.
    if isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", str(error)):
        return errno.ENOSPC
    return next((code for code in FULL if os.strerror(code) in str(error)), None)


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Hold `folder`, which exists, for one writer; BlockingIOError at once if another one has it.

    However the holder ends, kill -9 too, the operating system frees the lock. Its file `.lock` lies inside, because a
    writer of a folder may not be allowed to write beside it, and goes when the block ends, so that two folders with
    the same content stay the same; one that a killed process left means nothing. Readers need no lock: what they
    read is complete at any time.
    """
    import filelock

    folder = local_path(folder)
    # Not per thread, the default: a writer may be closed by another thread than the one that opened it.
    held = filelock.FileLock(folder / LOCK, thread_local=False)
    try:
        with reported(folder):
            held.acquire(blocking=False)
    except filelock.Timeout:
        raise BlockingIOError(
            f"another process is writing {folder.absolute()}; wait for it or choose another folder"
        ) from None
    try:
        yield
    finally:
        # Before the release: afterwards it may be the file of the next holder. filelock does not accept a lock on a
        # file that is gone.
        (folder / LOCK).unlink(missing_ok=True)
        held.release()


def check_writable(path: str | os.PathLike) -> None:
    """OSError if no file can be written at `path`: it is a folder, or its folder is not there."""
    path = local_path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path.absolute()} is a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path.parent.absolute()} to write to; make it first"
        )


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; it becomes `path` if the block succeeds.

    The temporary name keeps the suffix. When the block raises, an earlier `path` stays as it was.
    """
    path = local_path(path)
    check_writable(path)
    temporary = _temporary(path)
    with reported(path):
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            with contextlib.suppress(PermissionError):  # in a folder that nothing was written to
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; it becomes `path` if the block succeeds.

    Missing parent folders are made. FileExistsError if something is at `path`, before and after the block.
    """
    path = local_path(path)
    refuse_existing(path)
    temporary = _temporary(path)
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _flush(file)
            _rename_to_new(temporary, path)
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _rename_to_new(temporary: Path, path: Path) -> None:
    refuse_existing(path)
    try:
        os.rename(temporary, path)
    except OSError as error:
        # Someone made it between the two lines above.
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            refuse_existing(path)
        raise


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


def read_json(path: str | os.PathLike, kind: type = dict, distinct: bool = False) -> Any:
    """The JSON object (or list) in a file; ValueError naming the file if it is cut or is something else.

    Args:
      distinct: an object with a name twice, of which JSON takes the last, is refused.
    """
    path = local_path(path)
    with reported(path, "read"):
        content = path.read_bytes()
    try:
        # Decoded here, or json would take a stray zero byte for UTF-16.
        value = json.loads(
            content.decode("utf-8-sig"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_distinct if distinct else None,
        )
    except RepeatedNameError as error:
        raise ValueError(f"{path.absolute()} has {error}; only one can be right") from None
    except (ValueError, RecursionError) as error:
        at = f"byte {error.start} is not UTF-8" if isinstance(error, UnicodeError) else error
        raise ValueError(
            f"{path.absolute()} is not complete JSON ({at}); it was cut or overwritten, make it again"
        ) from error
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise ValueError(
            f"{path.absolute()} holds a JSON {type(value).__name__}, expected {wanted}"
        )
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class RepeatedNameError(ValueError):
    """An object of JSON has a name twice."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        again = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        raise RepeatedNameError(", ".join(f"the name {name!r} twice" for name in again[:5]))
    return found


def read_manifest(folder: str | os.PathLike, kind: str) -> dict[str, Any]:
    """The manifest of an artefact folder of this `kind`, a key of `FIELDS`.

    FileNotFoundError if the folder or its manifest is missing; ValueError for another kind or a newer format, and one
    that lists every field that is missing or is not what `FIELDS` says, so that callers may trust what they get.
    """
    folder = local_path(folder)
    made_by = f"{kind}: made by {MADE_BY[kind]}"
    with reported(folder, "read"):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder.absolute()} is not a folder; {made_by}")
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder.absolute()} has no {MANIFEST}; {made_by}")
    manifest = read_json(folder / MANIFEST)
    version, found = manifest.get("format"), manifest.get("kind")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"{folder.absolute()}/{MANIFEST} has format {reprlib.repr(version)}, expected 1 to {FORMAT}; {made_by}"
        )
    if version > FORMAT:
        raise ValueError(
            f"{folder.absolute()} was made by a newer cir_jax (format {reprlib.repr(version)}, this one reads up to {FORMAT}); "
            "update cir_jax"
        )
    if found != kind:
        raise ValueError(
            f"{folder.absolute()} holds {reprlib.repr(found)}, expected {kind!r}; {made_by}"
        )
    optional = {name: x for name, x in OPTIONAL.get(kind, {}).items() if name in manifest}
    refuse_manifest(folder, kind, field_faults(manifest, FIELDS[kind] | optional))
    return manifest


def refuse_manifest(folder: str | os.PathLike, kind: str, faults: list[str]) -> None:
    """ValueError that lists the faults of a manifest, if there are any."""
    if faults:
        listed = "; ".join(faults[:8]) + ("; and more" if len(faults) > 8 else "")
        raise ValueError(
            f"{Path(folder).absolute()}/{MANIFEST} is not a sound manifest of kind {kind!r}: {listed}; "
            f"copy the folder again or make it again with {MADE_BY[kind]}"
        )


def field_faults(value: Any, expected: Any, name: str = "") -> list[str]:
    """What in a JSON value differs from a description such as those of `FIELDS`."""
    if isinstance(expected, dict) and isinstance(value, dict):
        path = lambda field: f"{name}.{field}".strip(".")
        absent = [path(field) for field in expected if field not in value]
        faults = [f"lacks {', '.join(absent)}"] if absent else []
        present = [field for field in expected if field in value]
        return faults + [f for x in present for f in field_faults(value[x], expected[x], path(x))]
    if isinstance(expected, list) and isinstance(value, list):
        each = [field_faults(x, expected[0], f"{name}[{i}]") for i, x in enumerate(value)]
        return [fault for faults in each for fault in faults]
    words = {dict: "an object", list: "a list"}.get(type(expected), expected)
    if isinstance(expected, str) and IS[expected](value):
        return []
    return [f"{name} is {shown(value)}, expected {words}"]


def read_arrays(path: str | os.PathLike, most: int) -> "dict[str, np.ndarray]":
    """The arrays in an `.npz` file of at most `most` bytes unpacked; nothing in it is executed.

    Raises:
      OSError: nothing is there.
      ValueError: a damaged file, too large a one, or arrays of Python objects.
    """
    import zipfile

    import numpy as np

    path = local_path(path)
    with reported(path, "read"), open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as opened:
                size = sum(member.file_size for member in opened.infolist())
            if size > most:
                raise ValueError(f"it unpacks to {size:,} bytes, at most {most:,} are read")
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                return {name: np.asarray(stored[name]) for name in stored.files}
        except Exception as error:  # of a dozen kinds, for a damaged archive
            if isinstance(error, OSError | MemoryError) and not isinstance(
                error, zipfile.BadZipFile
            ):
                raise
            raise ValueError(f"{path} is no complete file of arrays ({error})") from None


def shown(value: Any) -> str:
    """A JSON value as an error message quotes it: in one line, cut when it is long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    with reported(path, "read"):
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
