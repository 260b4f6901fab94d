"""Data sets packed into few large files: rows and pictures as ArrayRecord, written and read by TFDS.

A packed folder holds any number of parts of one data set: training sets, benchmarks and galleries. Every picture is
stored once, with the bytes of its file, however many rows show it; rows are JSON with the number of a picture where the
picture was. The folder is also two ordinary data sets of TFDS: `tfds.builder_from_directory("PACKED/rows")` and
`"PACKED/pictures"`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cir_jax import files
from cir_jax.data.benchmark import Benchmark, Dataset
from cir_jax.data.records import Gallery
from cir_jax.data.tables import refuse
from cir_jax.progress import progress

KIND = "dataset"
CACHE = "~/.cache/cir_jax/packed"  # copies of what lies in buckets

Kind = Literal["training", "benchmark", "gallery"]


class Part(NamedTuple):
    """What one piece of a data set is called, as a config calls it."""

    kind: Kind
    variant: str
    split: str

    def __str__(self) -> str:
        return f"{self.kind} {self.variant}/{self.split}"


# ---- writing ----


def pack(
    name: str, parts: Mapping[Part, Dataset | Benchmark | Gallery], dest: str | os.PathLike
) -> None:
    """Write parts of a data set to the new folder `dest`, on this machine or in a bucket.

    It is written under a temporary name and renamed; what a killed run has left is removed by the next one. A bucket has
    no renaming: there the folder is packed here first, and its manifest, without which it counts for nothing, comes last.

    Args:
      name: of the data set.
      parts: what to pack; rows keep their order.

    Raises:
      FileExistsError: something is at `dest`.
      BlockingIOError: another process is packing to `dest`.
      ValueError: a part without rows, pictures that are not there, a value that is neither a picture nor JSON.
    """
    for part, found in parts.items():
        rows = found.queries if isinstance(found, Benchmark) else found
        if not len(rows):
            raise ValueError(f"{name}: {part} has no rows; there is nothing to pack")
    if _in_bucket(dest):
        _upload(name, parts, os.fspath(dest))
        return
    _remove_leftovers(Path(dest))
    with files.write_folder(dest) as folder, files.lock(folder):
        _write(name, parts, folder)


def _remove_leftovers(dest: Path) -> None:
    """Delete temporary folders of `dest` that nobody holds any more."""
    for folder in dest.parent.glob(f"{files.TEMPORARY}????????-{dest.name}"):
        with files.lock(folder):
            pass
        shutil.rmtree(folder)


def _write(name, parts, folder: Path) -> None:
    shown, tables = _Pictures(), {}
    for part, found in parts.items():
        tables |= {split: (part, rows) for split, rows in _tables(part, found)}
    total = sum(len(rows) for _, rows in tables.values())
    with progress(f"rows of {name}", total) as advance:
        splits = {
            split: _json_rows(part, rows, shown, advance) for split, (part, rows) in tables.items()
        }
        _build(folder, "rows", splits)
    refuse(f"{name} cannot be packed", shown.faults)
    if shown.sources:
        with progress(f"pictures of {name}", len(shown.sources)) as advance:
            _build(folder, "pictures", {"pictures": shown.written(advance)})
    about = []
    for number, (part, found) in enumerate(parts.items()):
        header = f"{number:03d}.json"
        files.write_json(folder / header, _header(found))
        about.append({**part._asdict(), "splits": [s for s, _ in _tables(part, found)]})
        about[-1] |= {"header": header}
    manifest = {"format": files.FORMAT, "kind": KIND, "name": name, "parts": about}
    manifest |= {"rows": total, "pictures": len(shown.sources)}
    sums = {k: x for k, x in files.folder_sums(folder).items() if Path(k).name != files.LOCK}
    files.write_json(folder / files.MANIFEST, manifest | {"files": sums})


def _tables(part: Part, found) -> list[tuple[str, Dataset]]:
    """(name of the split of TFDS, rows) for each table of a part."""
    plain = lambda what: re.sub(r"\W", "_", f"{what}_{part.variant}_{part.split}")
    if isinstance(found, Benchmark):
        return [(plain("queries"), found.queries), (plain("gallery"), found.gallery)]
    return [(plain(part.kind), found)]


def _header(found) -> dict[str, Any]:
    """What there is to know of a part beside its rows."""
    if isinstance(found, Gallery):
        return {"ids": list(found.ids)}
    if not isinstance(found, Benchmark):
        return {}
    rows = {"queries", "gallery"}
    names = [field.name for field in dataclasses.fields(found) if field.name not in rows]
    return json.loads(json.dumps({name: getattr(found, name) for name in names}, default=_plain))


def _plain(value):
    """A value of numpy, or a sequence that is no list, as JSON knows it."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__}")


def _json_rows(part, rows, shown, advance) -> Iterator[tuple[int, dict]]:
    for number in range(len(rows)):
        place = f"{part}, row {number}"
        again = functools.partial(rows.__getitem__, number)
        row = _without_pictures(rows[number], shown, place, again, ())
        try:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place} holds what is no JSON: {error}") from None
        yield number, {"json": text}
        advance(1)


def _without_pictures(value, shown: "_Pictures", place, again, path):
    """A raw row with the numbers of its pictures instead of them."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: shown.number(x, place, again, (*path, key))
        if key == "image"
        else _without_pictures(x, shown, place, again, (*path, key))
        for key, x in value.items()
    }


class _Pictures:
    """The different pictures of all rows, numbered in the order in which they are met."""

    def __init__(self):
        self.sources: list[tuple[Callable[[], Any], str]] = []
        self.faults: list[str] = []
        self._numbers: dict[Any, int] = {}

    def number(self, image, place: str, again: Callable[[], Mapping], path: tuple) -> int:
        """The number of a picture; `again` reads its row once more, where `path` leads to it."""
        if isinstance(image, str | os.PathLike):
            key, read = os.fspath(image), functools.partial(_file_bytes, image)
            if key not in self._numbers and not os.path.isfile(image):
                self.faults.append(f"{place}: there is no picture {key}")
        else:
            # Not kept until it is written: all pictures of an archive together may be too much.
            key = _digest(image, place)
            read = lambda: functools.reduce(lambda x, name: x[name], path, again())
        if key not in self._numbers:
            self._numbers[key] = len(self.sources)
            self.sources.append((read, place))
        return self._numbers[key]

    def written(self, advance) -> Iterator[tuple[int, dict]]:
        """Records of TFDS."""
        for number, (read, place) in enumerate(self.sources):
            try:
                image = read()
            except OSError as error:
                raise type(error)(
                    error.errno, f"{place}: {error.strerror}", error.filename
                ) from None
            shape = image.shape if isinstance(image, np.ndarray) else ()
            data = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
            yield number, {"data": data, "shape": list(shape)}
            advance(1)


def _file_bytes(path) -> bytes:
    return Path(path).read_bytes()


def _digest(image, place) -> tuple:
    if isinstance(image, bytes):
        return (), hashlib.sha256(image).digest()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return image.shape, hashlib.sha256(np.ascontiguousarray(image)).digest()
    raise ValueError(
        f"{place} has a picture that is {type(image).__name__}; expected a path, bytes or uint8 [H, W, 3]"
    )


def _build(folder: Path, name: str, splits: Mapping[str, Iterable]) -> None:
    """Write a data set of TFDS to `folder/name`."""
    work = folder / f"{name}-in-work"
    builder = _builder(name)(splits, data_dir=os.fspath(work), file_format="array_record")
    with _silent():
        builder.download_and_prepare()
    os.rename(builder.data_dir, folder / name)
    shutil.rmtree(work)


@functools.cache
def _builder(table: str):
    """The class of TFDS that writes rows or pictures; made here, so that the library is only loaded to pack."""
    import tensorflow_datasets as tfds

    features = {
        "rows": {"json": tfds.features.Text(doc="a row; `image` is the number of a picture")},
        "pictures": {
            "data": tfds.features.Tensor(shape=(), dtype=np.object_, doc="a file, or uint8 values"),
            "shape": tfds.features.Tensor(shape=(None,), dtype=np.int64, doc="of such values"),
        },
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = table

        def __init__(self, splits, **options):
            self.generated = splits
            super().__init__(**options)

        def _info(self):
            described = tfds.features.FeaturesDict(features[table])
            return tfds.core.DatasetInfo(builder=self, features=described, disable_shuffling=True)

        def _split_generators(self, downloads):
            return {split: self._generate_examples(split) for split in self.generated}

        def _generate_examples(self, split):
            return self.generated[split]

    return Builder


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the bars and notes of TFDS; progress is shown here."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


# ---- reading ----


def is_packed(root: str | os.PathLike) -> bool:
    """True for a folder that `pack` has written, on this machine or in a bucket."""
    place = _path(root) / files.MANIFEST
    # Another artefact, or a damaged one, is for others to name.
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return json.loads(place.read_text()).get("kind") == KIND
    return False


class Packed:
    """A packed data set: its `name`, its `parts`, and how many `rows` and different `pictures` they have.

    Raises:
      FileNotFoundError, ValueError: no packed folder, a damaged manifest, or one of a newer format.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = _fetched(os.fspath(root)) if _in_bucket(root) else Path(os.path.abspath(root))
        self.place = os.fspath(root) if _in_bucket(root) else str(self.root)
        manifest = files.read_manifest(self.root, KIND)
        self.name, self.sums = manifest["name"], manifest["files"]
        self.rows, self.pictures = manifest["rows"], manifest["pictures"]
        self._about = {
            Part(x["kind"], x["variant"], x["split"]): (x["splits"], x["header"])
            for x in manifest["parts"]
        }

    @property
    def parts(self) -> list[Part]:
        """What it holds, in the order in which it was packed."""
        return list(self._about)

    def open(self, part: Part) -> Dataset | Benchmark | Gallery:
        """The part as it was before it was packed; pictures of files are their bytes, lists are tuples.

        An empty variant is the only one there is. A benchmark is called by the folder, so that its name makes it again.

        Raises:
          ValueError: no such part; the message lists those there are.
        """
        if not part.variant:  # the usual one
            same = [x for x in self._about if (x.kind, x.split) == (part.kind, part.split)]
            part = same[0] if len(same) == 1 else part
        if part not in self._about:
            known = ", ".join(map(str, self._about))
            raise ValueError(f"{self.place} holds no {part}; it has {known}")
        tables, header = self._about[part]
        about = files.read_json(self.root / header)
        rows = [_Rows(self.root, table) for table in tables]
        locator = {"kind": "packed", "root": f"{self.place}/{part.variant}/{part.split}"}
        if part.kind == "training":
            return rows[0]
        if part.kind == "gallery":
            return Gallery(about["ids"], locator, rows[0].__getitem__, self._files)
        about = {name: _tuples(value) for name, value in about.items()}
        about["positives"] = [{int(row): x for row, x in one.items()} for one in about["positives"]]
        about["name"] = self.place
        gallery = Gallery(about["ids"], locator, rows[1].__getitem__, self._files)
        return Benchmark(**about, queries=rows[0], gallery=gallery)

    @property
    def _files(self) -> list[str]:
        return [str(self.root / name) for name in (files.MANIFEST, *sorted(self.sums))]

    def training(self, name: str, variant: str, split: str) -> Dataset:
        """The training set of that name; ValueError if the folder holds another data set."""
        if name != self.name:
            raise ValueError(f"{self.place} holds {self.name}, expected {name}; pack that too")
        return self.open(Part("training", variant, split))

    def benchmark(self, variant: str, split: str, of: str = "") -> Benchmark:
        """The benchmark of that name; ValueError if the folder does not hold the data set `of`."""
        if of and of != self.name:
            raise ValueError(f"{self.place} holds {self.name}, expected {of}; pack that too")
        return self.open(Part("benchmark", variant, split))

    def gallery(self, variant: str | None = None, split: str | None = None) -> Gallery:
        """The gallery of that name, or of the benchmark; without a name the only one there is."""
        found = [x for x in self._about if x.kind != "training"]
        found = [x for x in found if variant is None or (x.variant, x.split) == (variant, split)]
        if len(found) != 1:
            known = ", ".join(map(str, self._about))
            raise ValueError(
                f"{self.place} has {len(found)} such galleries; it holds {known}; "
                f"say which, as {self.place}/noto/test"
            )
        opened = self.open(found[0])
        return opened.gallery if isinstance(opened, Benchmark) else opened

    def check(self) -> None:
        """ValueError that lists every file that is missing or changed."""
        files.check_sums(self.root, self.sums)


class _Rows(Sequence):
    """The rows of one table; opened when the first is read, by every process for itself."""

    def __init__(self, root: Path, table: str):
        self.root, self.table = root, table
        self._sources = None

    def __getstate__(self):
        return {**self.__dict__, "_sources": None}

    def _open(self):
        if self._sources is None:
            pictures = self.root / "pictures"
            shown = _source(pictures, "pictures") if pictures.is_dir() else ()
            self._sources = _source(self.root / "rows", self.table), shown
        return self._sources

    def __len__(self) -> int:
        return len(self._open()[0])

    def __getitem__(self, row: int) -> Mapping:
        rows, pictures = self._open()
        record = rows[range(len(rows))[row]]
        return _with_pictures(json.loads(record["json"]), pictures)


def _source(folder: Path, split: str):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(os.fspath(folder)).as_data_source(split)


def _tuples(value):
    """A value of JSON with tuples for its lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _with_pictures(value, pictures):
    if not isinstance(value, dict):
        return _tuples(value)
    return {
        key: _picture(pictures[x]) if key == "image" else _with_pictures(x, pictures)
        for key, x in value.items()
    }


def _picture(record) -> bytes | np.ndarray:
    shape = record["shape"]
    return np.frombuffer(record["data"], np.uint8).reshape(shape) if len(shape) else record["data"]


# ---- buckets ----


def _in_bucket(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def _path(place: str | os.PathLike):
    """A path on this machine or in a bucket.

    Raises:
      ImportError: the library that reads such a bucket is missing.
    """
    if not _in_bucket(place):
        return Path(place)
    from etils import epath

    scheme = os.fspath(place).partition("://")[0]
    try:
        epath.Path(place).exists()
    except ImportError as error:
        library = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}.get(scheme, str(error))
        raise ImportError(f"{place} needs {library}; `pip install {library}`") from None
    return epath.Path(place)


def _upload(name, parts, dest: str) -> None:
    """Pack here, and copy to a bucket, the manifest last."""
    place = _path(dest)
    if (place / files.MANIFEST).exists():
        raise FileExistsError(f"{dest} already exists; choose another name or delete it")
    cache = Path(CACHE).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=files.TEMPORARY) as folder:
        local = Path(folder) / "packed"
        pack(name, parts, local)
        found = [path for path in sorted(local.rglob("*")) if path.is_file()]
        found.sort(key=lambda path: path.name == files.MANIFEST)
        with progress(f"files to {dest}", len(found)) as advance:
            for path in found:
                target = place / path.relative_to(local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy(path, target)
                advance(1)


def _fetched(address: str) -> Path:
    """The copy on this machine of a packed folder in a bucket, made when there is none; ArrayRecord reads local files.

    Its name is that of the manifest, with the checksums of all files in it: what changes in the bucket is copied again.
    """
    place = _path(address)
    if not (place / files.MANIFEST).exists():
        raise FileNotFoundError(
            f"{address} has no {files.MANIFEST}; {KIND}: made by {files.MADE_BY[KIND]}"
        )
    text = (place / files.MANIFEST).read_bytes()
    local = Path(CACHE).expanduser() / hashlib.sha256(address.encode() + text).hexdigest()[:16]
    if local.exists():
        return local
    _remove_leftovers(local)
    with contextlib.suppress(FileExistsError), files.write_folder(local) as folder:
        (folder / files.MANIFEST).write_bytes(text)
        sums = files.read_manifest(folder, KIND)["files"]
        with files.lock(folder), progress(f"files from {address}", len(sums)) as advance:
            for name in sums:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _copy(place / name, folder / name)
                advance(1)
        files.check_sums(folder, sums)
    return local


def _copy(source, target) -> None:
    """A file from one place to another, whatever kind of place they are."""
    with source.open("rb") as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, 2**20)
