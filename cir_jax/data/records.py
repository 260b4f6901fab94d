"""Galleries: pictures with ids, read at random from folders, lists, tar shards or built-in data.

`open_gallery` takes what a person types and gives a `Gallery`; its locator, a JSON dictionary,
opens the same gallery again from an index on disk.
"""

import functools
import os
import re
import tarfile
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cir_jax.data.tables import TABLES, read_table, read_text, refuse, relative, string
from cir_jax.files import shown

READABLE = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# Those without a decoder belong to the gallery all the same: they are reported as skipped instead of missed in silence.
PICTURES = (*READABLE, ".heic", ".heif", ".svg")
LISTS = (".txt", *TABLES)
MOST_SHARDS = 1_000_000
UNDERSTOOD = """a gallery is one of
  a folder of pictures, searched with its subfolders; KEY.txt beside KEY.jpg is what it shows
  a list file: .txt with a path per line; .jsonl, .csv or .parquet with `image` and, if known,
    `id`, `text`; paths are relative to the list
  tar shards with files KEY.jpg and, if known, KEY.txt: x.tar, a folder of such files,
    'x-{00000..00003}.tar' or 'x-*.tar'
  a built-in data set: emoji, emoji:noto, emoji:twemoji
  a packed data set with one gallery, or that of a part of it: PACKED/noto/test
  the gallery of a published benchmark: fashioniq:FOLDER/dress/val"""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Gallery:
    """Items by row, each `{"image", "id"}` and `"text"` where known.

    `image` is a path, the bytes of a file, or uint8 `[H, W, 3]`; nothing is decoded or checked
    before it is used. `locator` is a JSON dictionary that `open_gallery` understands. `files` are the
    paths of those that hold all rows; none where pictures are files of their own.
    """

    ids: Sequence[str]
    locator: Mapping[str, Any]
    read: Callable[[int], dict]
    files: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict:
        row = range(len(self.ids))[row]
        return {**self.read(row), "id": self.ids[row]}


def open_gallery(source: str | os.PathLike | Mapping[str, Any]) -> Gallery:
    """Opens a gallery.

    Args:
      source: a folder of pictures, a list file, tar shards, a built-in data set, a published
        benchmark (`UNDERSTOOD` has the details), or the locator of a gallery. A built-in name wins
        over a folder of that name; `./emoji` is the folder.

    Raises:
      FileNotFoundError: nothing there; the message lists what is understood.
      ValueError: a path that leads out of the folder of its list or archive, an id twice, a
        malformed list, a compressed archive.
    """
    if isinstance(source, Mapping):
        return _from_locator(source)
    name = os.fspath(source)
    if name == "emoji" or name.startswith("emoji:"):
        return _emoji(name.partition(":")[2] or "both")
    if packed := _packed(name):
        return packed
    if _is_published(name):
        return _of_benchmark(name)
    path = Path(name).absolute()
    if path.is_dir():
        return _folder_of_shards(path) or _folder(path)
    if path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ValueError(f"{path} is compressed and cannot be read at random; unpack it to .tar")
    if path.suffix == ".tar":
        return _shards(str(path))
    if path.is_file() and path.suffix.lower() in LISTS:
        return _list(path)
    raise FileNotFoundError(f"there is no gallery {name!r}; {UNDERSTOOD}")


def _from_locator(locator):
    openers = {
        "folder": ("root", lambda root: _folder(Path(root))),
        "list": ("file", lambda file: _list(Path(file))),
        "tar": ("shards", _shards),
        "emoji": ("style", _emoji),
        "packed": ("root", _packed_again),
        "benchmark": ("name", _of_benchmark),
    }
    kind = locator.get("kind")
    if not isinstance(kind, str) or kind not in openers:
        raise ValueError(f"a gallery of kind {shown(kind)}; known are {', '.join(openers)}")
    field, opener = openers[kind]
    if field not in locator:
        raise ValueError(f"the gallery {shown(dict(locator))} does not say its {field!r}")
    place = locator[field]
    if not isinstance(place, str) or not place or "\0" in place:
        raise ValueError(
            f"the gallery {shown(dict(locator))} has no text that could name its {field!r}"
        )
    return opener(place)


def _gallery(ids, locator, read, files=()):
    """A gallery whose ids can be told apart; they may hold any characters, as names of files do."""
    faults = [f"{name!r} occurs {n} times" for name, n in Counter(ids).items() if n > 1]
    faults += ["an empty id"] * ("" in ids)
    refuse(f"unusable ids in the gallery {locator}", faults)
    return Gallery(ids, locator, read, files)


# ---- folders ----


def _folder(root):
    if not root.is_dir():
        raise FileNotFoundError(f"the folder {root} of a gallery is gone; {UNDERSTOOD}")
    ids = sorted(_pictures(root))
    if not ids:
        raise FileNotFoundError(f"{root} holds no pictures ({' '.join(PICTURES)}); {UNDERSTOOD}")
    read = functools.partial(_read_captioned, root, ids)
    return _gallery(ids, {"kind": "folder", "root": str(root)}, read)


def _pictures(root) -> Iterator[str]:
    """Paths of pictures below `root`, relative, with slashes; nothing hidden.

    Links to folders are among them: they are not followed, and reading one says so.
    """
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from ((Path(folder) / name).relative_to(root).as_posix() for name in linked)
        for name in names:
            if name.lower().endswith(PICTURES) and not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _read_captioned(root, ids, row):
    item = {"image": str(file_inside(root, ids[row]))}
    beside = PurePosixPath(ids[row]).with_suffix(".txt")
    if not os.path.isfile(root / beside):
        return item
    return item | {"text": _caption(file_inside(root, str(beside)).read_bytes())}


def _caption(data: bytes) -> str:
    return data.decode(errors="replace").strip()


def _read_file(root, paths, texts, row):
    item = {"image": str(file_inside(root, paths[row]))}
    return item | ({"text": texts[row]} if row in texts else {})


def file_inside(root: Path, name: str) -> Path:
    """The file `name` of the folder `root`, which links may not lead out of."""
    path = root / name
    target = Path(os.path.realpath(path))  # of a loop of links the first; Path.resolve fails on one
    if not target.is_relative_to(os.path.realpath(root)):
        raise ValueError(f"{path} leads out of {root}, to {target}; copy the file there")
    return path


def by_stem(folder: Path) -> dict[str, list[str]]:
    """The names in a folder by their stems in small letters; none if there is no such folder."""
    found = defaultdict(list)
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        found[Path(name).stem.lower()].append(name)
    return found


def near(path: Path, names_in: Callable[[Path], Mapping[str, Sequence[str]]] = by_stem) -> str:
    """What to say beside "there is no …" where a file has that name but for the case of its letters or its suffix.

    Args:
      names_in: `by_stem`, or that with a memory, for many paths.
    """
    names = names_in(path.parent).get(path.stem.lower(), ())
    others = [name for name in names if name != path.name]
    found = [name for name in others if name.lower() == path.name.lower()] or others
    return f"; {found[0]} is there, rename it or correct the entry" if found else ""


# ---- lists ----


def _list(file):
    if not file.is_file():
        raise FileNotFoundError(f"the list {file} of a gallery is gone; {UNDERSTOOD}")
    if file.suffix.lower() not in LISTS:
        raise ValueError(f"{file} is no list, expected {' '.join(LISTS)}; {UNDERSTOOD}")
    records = [record for record in _RECORDS[file.suffix.lower()](file) if record["image"]]
    root = file.parent
    faults, paths = [], []
    for record in records:
        paths.append(relative(record["image"], root))
        if paths[-1] is None:
            faults.append(record["image"])
    if faults:
        raise ValueError(
            f"{len(faults)} paths in {file} lead out of its folder {root}, the first {faults[:5]}; "
            f"put the list into a folder above the pictures"
        )
    if not records:
        raise ValueError(f"{file} names no pictures")
    ids = [record.get("id") or path for record, path in zip(records, paths, strict=True)]
    texts = {row: record["text"] for row, record in enumerate(records) if record.get("text")}
    read = functools.partial(_read_file, root, paths, texts)
    return _gallery(ids, {"kind": "list", "file": str(file)}, read)


def _text_records(file):
    for line in read_text(file).split("\n"):
        yield {"image": line.strip()}


def _table_records(file):
    for place, values in read_table(file):
        yield _record(values, place)


def _record(record, place):
    """`image`, `id` and `text` of one entry, as strings."""
    try:
        known = {key: string(record.get(key)) for key in ("image", "id", "text")}
    except ValueError as error:
        raise ValueError(f"{place}: a value {error}") from None
    if not isinstance(record.get("image"), str) or not known["image"]:
        found = textwrap.shorten(", ".join(str(name)[:40] for name in record), 200) or "nothing"
        raise ValueError(f"{place} has no `image` with a path; it has {found}")
    return {key: value for key, value in known.items() if value is not None}


_RECORDS = {".txt": _text_records, **dict.fromkeys(TABLES, _table_records)}


# ---- tar shards ----


class Member(NamedTuple):
    """Where the bytes of a file lie in a shard."""

    shard: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes; ValueError if the shard was cut."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ValueError(f"{self.shard} ends within a file at byte {self.offset}; it was cut")
        return data


def _folder_of_shards(root):
    """The gallery of the tar files in a folder, or None if it has none."""
    shards = [path for path in root.glob("*.tar") if not path.name.startswith(".")]
    if not shards:
        return None
    if next(_pictures(root), None):
        raise ValueError(
            f"{root} holds pictures and tar shards; "
            f"give '{root}/*.tar' for the shards, or move one kind away"
        )
    return _shards(str(root / "*.tar"))


def _shards(pattern):
    """The gallery of all shards that a pattern with `{000..123}`, `*` and `?` names, in order."""
    files = expand(Path(pattern))
    found = {path: _members(path) for path in files}
    keys = [(path, key) for path in files for key in found[path]]
    repeated = len({key for _, key in keys}) < len(keys)
    # Keys are unique in what img2dataset writes; other tools number each shard from the start.
    ids = [f"{path.stem}/{key}" if repeated else key for path, key in keys]
    read = functools.partial(_read_members, [found[path][key] for path, key in keys])
    if not ids:
        raise FileNotFoundError(f"no pictures in {pattern} ({len(files)} shards); {UNDERSTOOD}")
    return _gallery(ids, {"kind": "tar", "shards": pattern}, read, list(map(str, files)))


def expand(pattern: Path) -> list[Path]:
    """The tar shards a pattern names, sorted; members of a range must all be there."""
    names = [pattern.name]
    while match := _RANGE.search(names[0]):
        low, high = match[1], match[2]
        if int(low) > int(high):
            raise ValueError(f"{pattern} names no shards: {low} is above {high}; turn them round")
        if len(names) * (int(high) - int(low)) > MOST_SHARDS:
            raise ValueError(f"{pattern} names more than {MOST_SHARDS:,} shards; narrow its range")
        numbers = [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
        names = [_RANGE.sub(number, name, count=1) for name in names for number in numbers]
    if len(names) > 1:
        files = [pattern.parent / name for name in names]
    elif {"*", "?"} & set(pattern.name):
        files = sorted(pattern.parent.glob(pattern.name))
    else:
        files = [pattern]
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        listed = ", ".join(missing[:5]) or str(pattern)
        raise FileNotFoundError(f"missing tar shards: {listed}; {UNDERSTOOD}")
    return files


def members(shard: str | os.PathLike) -> Iterator[tuple[PurePosixPath, Member]]:
    """The ordinary files in a tar shard, in its order; hidden ones are passed over.

    Raises:
      ValueError: no uncompressed tar file, a damaged one, or a member that would leave its folder.
    """
    for info in _headers(shard):
        path = PurePosixPath(info.name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{shard} has a member {info.name!r} that leaves its folder; refused")
        if info.isreg() and not info.issparse() and not path.name.startswith("."):
            yield path, Member(str(shard), info.offset_data, info.size)


def _members(shard) -> dict[str, dict[str, Member]]:
    """The pictures of a shard by key, each `{"image": member}`, and `"text"` where known."""
    pictures, texts = {}, {}
    for path, member in members(shard):
        key, suffix = str(path.with_suffix("")), path.suffix.lower()
        if suffix in PICTURES and key in pictures:
            raise ValueError(f"{shard} has two pictures with the key {key!r}")
        if suffix in PICTURES:
            pictures[key] = member
        elif suffix == ".txt":
            texts[key] = member
    join = lambda key: {"text": texts[key]} if key in texts else {}
    return {key: {"image": member, **join(key)} for key, member in pictures.items()}


def _headers(shard):
    try:
        with tarfile.open(shard, "r:") as archive:
            yield from archive
            # tarfile takes a damaged header and a cut for the end; a real end is a block of zeros.
            archive.fileobj.seek(archive.offset)
            end = archive.fileobj.read(tarfile.BLOCKSIZE)
            if end.strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {archive.offset}")
            if len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"it was cut at byte {archive.offset + len(end)}")
    except tarfile.TarError as error:
        raise ValueError(f"{shard} cannot be read as an uncompressed tar file: {error}") from None


def _read_members(known, row):
    found = {part: member.read() for part, member in known[row].items()}
    return found | ({"text": _caption(found["text"])} if "text" in found else {})


# ---- built-in and published data ----


def _is_published(name):
    from cir_jax.data import PUBLISHED

    base, *rest = name.rsplit("/", 2)
    return len(rest) == 2 and base.partition(":")[0] in PUBLISHED


def _of_benchmark(name):
    from cir_jax.data import named_benchmark

    if not _is_published(name):
        raise ValueError(f"there is no published benchmark {shown(name)}; {UNDERSTOOD}")
    gallery = named_benchmark(name).gallery
    if not isinstance(gallery, Gallery):
        raise ValueError(f"{name} is limited; name the whole benchmark, and limit what is done")
    return gallery


def _emoji(style):
    from cir_jax.data import emoji

    if style == "both":
        items = [
            {**item, "id": f"{each}/{item['id']}"}
            for each in emoji.STYLES
            for item in emoji.gallery(each)
        ]
    else:
        items = emoji.gallery(style)
    ids = [item["id"] for item in items]
    return _gallery(ids, {"kind": "emoji", "style": style}, items.__getitem__)


# ---- packed data sets ----


def _packed(name: str) -> Gallery | None:
    """The gallery of a packed folder, or of the part that FOLDER/VARIANT/SPLIT names; None if that is neither."""
    from cir_jax.data.packed import Packed, is_packed

    if is_packed(name):
        return Packed(name).gallery()
    root, *part = name.rsplit("/", 2)
    return Packed(root).gallery(*part) if len(part) == 2 and is_packed(root) else None


def _packed_again(name):
    found = _packed(name)
    if found is None:
        raise FileNotFoundError(f"the packed gallery {name} is gone; {UNDERSTOOD}")
    return found
