"""What strangers throw at the commands: pictures, names, queries, galleries and archives of every bad kind.

The commands run as a user starts them. Where one run meets many bad things at once, each of them is a test of its own.
"""

import io
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run

import cir_jax
from cir_jax.data import emoji
from cir_jax.data.records import open_gallery
from cir_jax.vectors import Vectors

SIDE = 64
MODEL = "emoji_text"


def error_of(*arguments, **options) -> str:
    """The one error of a command that has to fail; a traceback, an exit code 0 or a second error is none."""
    done = run(*arguments, **options)
    said = done.stderr.decode()
    assert done.returncode == 1, (done.returncode, said)
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and len(errors[0]) > len("error: "), said
    return said[said.index("error: ") :]


# ---- pictures ----


def drawing() -> np.ndarray:
    """A picture with every grey and colour edge that a wrong conversion would move."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.stack([4 * x % 256, 4 * y % 256, (x // 16 * 80 + y // 32 * 40) % 256], 2).astype(
        np.uint8
    )


def stored(picture, kind: str, **options) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def shown(data: bytes) -> np.ndarray:
    """What Pillow shows of a file, on white."""
    picture = Image.open(io.BytesIO(data))
    under = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(under, picture.convert("RGBA")).convert("RGB"))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb() -> bytes:
    """20,000 x 20,000 white points in 50 kB."""
    rows = zlib.compressobj(1)
    row = b"\0" + b"\xff" * 2500
    data = b"".join(rows.compress(row * 1000) for _ in range(20)) + rows.flush()
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def damaged() -> bytes:
    data = bytearray(PNG)
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    return bytes(data)


def rotated_by_camera() -> bytes:
    """Stored lying on its side, with the note that it is to be turned."""
    exif = Image.Exif()
    exif[274] = 6
    return stored(Image.fromarray(drawing()), "jpeg", exif=exif, quality=95)


def palette() -> bytes:
    picture = Image.fromarray(drawing()).quantize(16)
    return stored(picture, "png", transparency=3)


def animation() -> bytes:
    first, second = (Image.fromarray(x).quantize(32) for x in (drawing(), 255 - drawing()))
    return stored(first, "gif", save_all=True, append_images=[second])


PNG = stored(Image.fromarray(drawing()), "png")
GREY = drawing()[..., 0]
ALPHA = np.where(np.arange(SIDE) < 20, 0, 255).astype(np.uint8) * np.ones((SIDE, 1), np.uint8)
DEEP = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 16
CMYK = stored(Image.fromarray(drawing()).convert("CMYK"), "jpeg", quality=95)
GREY_ALPHA = stored(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), "png")

# name -> (contents of the file, the picture that the model has to see)
GOOD = {
    "one.png": (
        stored(Image.new("RGB", (1, 1), (9, 200, 30)), "png"),
        np.full((1, 1, 3), (9, 200, 30)),
    ),
    "cmyk.jpg": (CMYK, shown(CMYK)),
    "sixteen bits.png": (
        stored(Image.fromarray(DEEP), "png"),
        np.repeat((DEEP >> 8)[..., None], 3, 2),
    ),
    "palette.png": (palette(), shown(palette())),
    "grey and alpha.png": (GREY_ALPHA, shown(GREY_ALPHA)),
    "animated.gif": (animation(), shown(animation())),
    "turned.jpg": (rotated_by_camera(), shown(rotated_by_camera())),
    "wrong suffix.png": (stored(Image.fromarray(drawing()), "webp", lossless=True), drawing()),
    "new\nline.png": (PNG, drawing()),
    "\x1b[31mred.png": (PNG, drawing()),
    "🦊 café.PNG": (PNG, drawing()),
    os.fsdecode(b"\xff\xfe bytes.png"): (PNG, drawing()),
    "-rf.png": (PNG, drawing()),
    "folder.png/within.png": (PNG, drawing()),
    "link within.png": (Path("one.png"), np.full((1, 1, 3), (9, 200, 30))),
}
# name -> (contents of the file, what its line in the manifest says)
BAD = {
    "corrupt.png": (damaged(), "cannot be read as a picture"),
    "truncated.jpg": (CMYK[: len(CMYK) // 2], "truncated"),
    "empty.png": (b"", "the file is empty"),
    "bomb.png": (bomb(), "decompression bomb"),
    "photo.heic": (
        struct.pack(">I", 24) + b"ftypheic" + bytes(200),
        "HEIC, which Pillow cannot decode",
    ),
    "drawing.svg": (
        b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
        "convert it to PNG",
    ),
    "text.jpg": (b"no picture at all, only words", "unknown format"),
    "loop.png": (Path("loop of links.png"), "symbolic links"),
    "loop of links.png": (Path("loop.png"), "symbolic links"),
    "leads nowhere.png": (Path("none.png"), "No such file"),
    "leads out.png": (Path(sys.executable), "leads out of"),
    "pipe.png": (None, "is no file"),
}
IGNORED = {".hidden.png": PNG, "notes.txt": b"read me", "folder.png/.thumbs/small.png": PNG}


def place(folder: Path, name: str, contents) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if contents is None:
        os.mkfifo(path)
    elif isinstance(contents, Path):
        path.symlink_to(contents)
    else:
        path.write_bytes(contents)


@pytest.fixture(scope="module")
def strange(tmp_path_factory) -> Path:
    """A folder with `pictures` of every kind and their `vectors`, and what the command said."""
    folder = tmp_path_factory.mktemp("strange")
    for name, (contents, _) in {**GOOD, **BAD}.items():
        place(folder / "pictures", name, contents)
    for name, contents in IGNORED.items():
        place(folder / "pictures", name, contents)
    os.symlink("..", folder / "pictures" / "upwards")  # a loop of folders
    done = run("cir_jax.embed", MODEL, folder / "pictures", folder / "vectors")
    assert done.returncode == 0, done.stderr.decode()
    (folder / "said").write_bytes(done.stderr)
    return folder


@pytest.fixture(scope="module")
def expected_vectors():
    names = list(GOOD)
    model = cir_jax.load(MODEL)
    return dict(zip(names, model.encode("item", [GOOD[n][1].astype(np.uint8) for n in names])))


@pytest.mark.parametrize("name", GOOD, ids=ascii)
def test_readable_pictures_are_seen_as_they_are(name, strange, expected_vectors):
    vectors = Vectors(strange / "vectors")
    found = vectors.array()[vectors.ids.index(name)]
    np.testing.assert_allclose(found, expected_vectors[name], atol=2e-5)


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_unreadable_pictures_are_listed_with_their_reason(name, strange):
    skipped = {item["id"]: item["reason"] for item in Vectors(strange / "vectors").skipped}
    assert BAD[name][1] in skipped[name]


def test_nothing_is_missed_and_nothing_invented(strange):
    vectors = Vectors(strange / "vectors")
    assert sorted(vectors.ids) == sorted(GOOD)
    assert sorted(item["id"] for item in vectors.skipped) == sorted(BAD)
    said = (strange / "said").read_text()
    assert f"{len(BAD)} pictures skipped" in said
    assert "Warning" not in said


def test_the_pictures_differ_so_that_the_tests_above_can_fail(expected_vectors):
    seen = np.stack(
        [expected_vectors[n] for n in ("one.png", "cmyk.jpg", "palette.png", "turned.jpg")]
    )
    assert (seen @ seen.T)[np.triu_indices(4, 1)].max() < 0.999


def test_strict_stops_at_the_first_unreadable_picture(strange, tmp_path):
    said = error_of("cir_jax.embed", MODEL, strange / "pictures", tmp_path / "v", "--strict")
    assert any(str(name) in said for name in BAD)
    assert "--strict" in said


@pytest.fixture(scope="module")
def strange_index(strange) -> Path:
    done = run("cir_jax.index", strange / "vectors", strange / "index")
    assert done.returncode == 0, done.stderr.decode()
    return strange / "index"


def test_strange_names_are_shown_on_one_line_each_and_obeyed_by_no_terminal(
    strange_index, tmp_path
):
    page = tmp_path / "page.html"
    done = run("cir_jax.search", strange_index, "--text", "a fox", "--k", 99, "--html", page)
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert len([line for line in lines if re.match(r" *\d+ ", line)]) == len(GOOD)
    said = done.stdout.decode()
    for escaped in (r"new\nline.png", r"\x1b[31mred.png", r"\udcff\udcfe bytes.png", "🦊 café.PNG"):
        assert escaped in said
    assert "\x1b" not in said
    text = page.read_bytes().decode()
    assert text.count("<figure") == len(GOOD) and "\x1b" not in text


def test_every_strange_picture_finds_itself(strange_index, strange):
    index, model = cir_jax.open_index(strange_index), cir_jax.load(MODEL)
    for name in ("one.png", "new\nline.png", os.fsdecode(b"\xff\xfe bytes.png")):
        best = cir_jax.search(model, index, image=strange / "pictures" / name, k=len(GOOD))
        assert name in [r.id for r in best if r.score > best[0].score - 1e-5]
        assert index.items([index.ids.index(name)])[0]["id"] == name


@pytest.mark.slow
def test_a_hundred_thousand_files_in_one_folder(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(100):
        Image.fromarray(emoji.tiles("noto")[n]).save(folder / f"{n:06d}.png")
    for n in range(100, 100_000):
        os.link(folder / f"{n % 100:06d}.png", folder / f"{n:06d}.png")
    done = run("cir_jax.embed", MODEL, folder, tmp_path / "v", "--limit", 300)
    assert done.returncode == 0, done.stderr.decode()
    vectors = Vectors(tmp_path / "v")
    assert vectors.ids == [f"{n:06d}.png" for n in range(300)]
    np.testing.assert_array_equal(vectors.array()[:100], vectors.array()[100:200])
    assert len(open_gallery(folder)) == 100_000


# ---- queries ----


def page_of(words: str, tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(words, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--text, --image, both, or --document"),
        (["--text", ""], "the query text is empty"),
        (["--text", " \t\n"], "the query text is empty"),
        (["--text", "\u200b"], "the query text is empty"),
        (["--text", b"\xff\xfe"], "is no valid Unicode"),
        (["--image", "none.png"], "none.png"),
        (["--image", "."], "is no file"),
        (["--image", "/dev/zero"], "is no file"),
        (["--image", "empty.png"], "the file is empty"),
        (["--document", "none.txt"], "none.txt"),
        (["--document", "empty.png"], "document is empty"),
        (["--text", "x", "--document", "words.txt"], "a document asks alone"),
        (["--text", "x", "--k", "0"], "at least 1"),
        (["--text", "x", "--k", "-3"], "at least 1"),
        (
            ["--text", "x", "--rerank", "emoji_rerank"],
            "consists of image and text; this one has text",
        ),
        (["--text", "x", "--exclude", "nobody"], "no item 'nobody'"),
        (["--text", "x", "--html", "no/such/folder/x.html"], "no/such/folder"),
        (["--text", "x", "--checkpoint", "emoji_documents"], "the index holds vectors of"),
    ],
    ids=ascii,
)
def test_queries_that_cannot_be_asked_end_in_one_clear_error(
    arguments, expected, strange_index, tmp_path
):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "one.png").write_bytes(PNG)
    page_of("some words", tmp_path)
    assert expected in error_of("cir_jax.search", strange_index, *arguments, cwd=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["empty.png", "one.png", "words.txt"]


@pytest.mark.parametrize(
    "words",
    [
        "狐狸",
        "ثعلب أحمر",
        "лиса",
        "🦊🦊",
        "ﬁ ﬂ ½",
        "a\u0301" * 50,
        "<b>fox</b> & ' \" ; --",
        "x" * 5000,
    ],
    ids=ascii,
)
def test_text_of_any_script_is_answered(words, strange_index):
    model, index = cir_jax.load(MODEL), cir_jax.open_index(strange_index)
    found = cir_jax.search(model, index, text=words, k=3)
    assert len({r.id for r in found}) == 3
    assert all(np.isfinite(r.score) for r in found)


def test_ten_megabytes_of_text_are_answered_by_their_beginning(strange_index, tmp_path):
    words = "a red fox in the snow " * 480_000
    assert len(words) > 10_000_000
    model, index = cir_jax.load(MODEL), cir_jax.open_index(strange_index)
    whole = cir_jax.search(model, index, text=words, k=3)
    assert whole == cir_jax.search(model, index, text=words[:2200], k=3)


def test_a_text_that_is_cut_is_announced(strange_index):
    done = run("cir_jax.search", strange_index, "--text", "fox " * 100, "--k", 1)
    assert done.returncode == 0
    assert re.search(r"the text has \d+ pieces; the model reads the first 22", done.stderr.decode())


def test_more_results_than_there_are_items_are_all_items(strange_index):
    done = run("cir_jax.search", strange_index, "--text", "x", "--k", 10**12)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().count("\n") == len(GOOD) + 1


@pytest.mark.parametrize(
    "picture",
    [
        np.full((8, 8, 3), np.nan, np.float32),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        17,
    ],
    ids=["nan", "empty", "grey", "four channels", "number"],
)
def test_arrays_that_are_no_picture_are_refused(picture, strange_index):
    model, index = cir_jax.load(MODEL), cir_jax.open_index(strange_index)
    with pytest.raises(ValueError, match="expected"):
        cir_jax.search(model, index, image=picture)
