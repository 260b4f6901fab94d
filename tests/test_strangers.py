"""What strangers throw at the commands: pictures, names, queries, galleries and archives of every bad kind.

The commands run as a user starts them. Where one run meets many bad things at once, each of them is a test of its own.
"""

import io
import os
import re
import shutil
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from processes import run

import cir_jax
from cir_jax.data import emoji
from cir_jax.data.records import open_gallery
from cir_jax.memory import halved_once
from cir_jax.vectors import Vectors, VectorWriter

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
    "pipe.png": (None, "is no ordinary file"),
    "upwards": (Path(".."), "leads out of"),  # a loop of folders
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


def test_pictures_that_were_repaired_or_added_join_and_broken_ones_may_go(tmp_path):
    pictures = tmp_path / "pictures"
    for name, data in {"a.png": PNG, "b.png": b"broken", "c.png": b"", "d.png": PNG}.items():
        place(pictures, name, data)
    command = ("cir_jax.embed", MODEL, pictures, tmp_path / "v")
    assert run(*command).returncode == 0
    assert "without --strict" in error_of(*command, "--strict")
    (pictures / "b.png").write_bytes(CMYK)
    (pictures / "c.png").unlink()
    (pictures / "0.png").write_bytes(GREY_ALPHA)
    again = pictures.rename(tmp_path / "moved")
    assert run("cir_jax.embed", MODEL, again, tmp_path / "v", "--strict").returncode == 0
    vectors = Vectors(tmp_path / "v")
    assert (vectors.ids, vectors.skipped) == (["a.png", "d.png", "0.png", "b.png"], [])
    assert run("cir_jax.index", tmp_path / "v", tmp_path / "i").returncode == 0
    items = cir_jax.open_index(tmp_path / "i").items(range(4))
    assert [Path(item["image"]).read_bytes() for item in items] == [PNG, PNG, GREY_ALPHA, CMYK]
    (again / "a.png").unlink()
    assert "held other pictures, 'a.png'" in error_of(*command[:2], again, tmp_path / "v")


def test_a_first_try_that_failed_reserves_no_folder(tmp_path):
    place(tmp_path / "pictures", "a.png", PNG)
    said = error_of("cir_jax.embed", "emoji_itm", tmp_path / "pictures", tmp_path / "v")
    assert "is a re-ranker" in said and not (tmp_path / "v").exists()
    VectorWriter(tmp_path / "v", fingerprint="of another model").close()
    assert run("cir_jax.embed", MODEL, tmp_path / "pictures", tmp_path / "v").returncode == 0


def test_a_moved_gallery_and_a_moved_model_are_found_by_their_options(tmp_path):
    place(tmp_path / "here", "a.png", PNG)
    shutil.copytree(Path(cir_jax.__file__).parent / "weights" / MODEL, tmp_path / "mine")
    assert (
        run("cir_jax.embed", tmp_path / "mine", tmp_path / "here", tmp_path / "v").returncode == 0
    )
    assert run("cir_jax.index", tmp_path / "v", tmp_path / "i").returncode == 0
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "mine").rename(tmp_path / "yours")
    ask = ("cir_jax.search", tmp_path / "i", "--text", "x", "--html", tmp_path / "x.html")
    assert "say where with --checkpoint" in error_of(*ask)
    model = ("--checkpoint", tmp_path / "yours")
    assert "say where with --gallery" in error_of(*ask, *model)
    assert run(*ask, *model, "--gallery", tmp_path / "there").returncode == 0
    assert (tmp_path / "x.html").read_text().count("<figure") == 1


def test_a_packaged_model_wins_over_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).mkdir()
    assert cir_jax.load(MODEL).fingerprint
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json"):
        cir_jax.load(f"./{MODEL}")


@pytest.mark.parametrize(
    ("name", "text"),
    [("g.csv", "image, id\npics/0.png, 7 \n"), ("g.jsonl", '{"image": " pics/0.png", "id": 7}\n')],
)
def test_lists_read_cells_as_other_tables_do(name, text, tmp_path):
    place(tmp_path / "pics", "0.png", PNG)
    (tmp_path / name).write_text(text)
    gallery = open_gallery(tmp_path / name)
    assert gallery.ids == ["7"] and Path(gallery[0]["image"]).is_file()


@pytest.mark.parametrize("value", ["[1, 2]", "true", "NaN", '{"a": 1}'])
def test_ids_that_are_no_text_are_refused(value, tmp_path):
    (tmp_path / "g.jsonl").write_text(f'{{"image": "0.png", "id": {value}}}\n')
    with pytest.raises(ValueError, match="line 1"):
        open_gallery(tmp_path / "g.jsonl")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CIR_JAX_PROCESSES": ""}, "CIR_JAX_COORDINATOR, CIR_JAX_PROCESSES, CIR_JAX_PROCESS not"),
        ({"CIR_JAX_PROCESSES": "2"}, "CIR_JAX_COORDINATOR, CIR_JAX_PROCESS not set"),
    ],
)
def test_a_wrong_number_of_processes(environment, expected, tmp_path):
    assert expected in error_of("cir_jax.embed", MODEL, "x", "v", env=environment, cwd=tmp_path)


def test_a_range_of_shards_that_runs_backwards(tmp_path):
    assert "turn them round" in error_of("cir_jax.embed", MODEL, "x-{3..0}.tar", "v", cwd=tmp_path)


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
        (["--image", "."], "is a folder"),
        (["--image", "/dev/zero"], "is no ordinary file"),
        (["--text", "x", "--fusion", "0.5"], "needs --rerank"),
        (["--text", "x", "--html", "."], "is a folder; expected the name of a file"),
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


@pytest.mark.slow
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


# ---- configs ----

CONFIG = """
from cir_jax.config import Data, Evaluation, Experiment, Mesh, Optim, Run, Train
from cir_jax.data.emoji import VOCABULARY
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.methods.clip import ClipConfig

inputs = Inputs(image=ImageSpec(size=64), text=TextSpec(vocab=str(VOCABULARY), length=24))
method = ClipConfig.tiny(inputs)
train = Train(steps=2, batch_size=8, log_every=1, save_every=2, eval_every=2)
config = Experiment(method=method, data=(Data("emoji-text"),), train=train)
"""
REPLACE = "import dataclasses\nconfig = dataclasses.replace(config, {})\n"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("Train(step=3, batch_size=8)", "steps"),
        ("Optim(lrr=1e-4)", 'did you mean "lr"'),
        ("Experiment(method=method, date=())", "data"),
        (REPLACE.format('train=Train(steps="many", batch_size=8)'), "steps"),
        (REPLACE.format("train=Train(steps=2.5, batch_size=8)"), "steps"),
        (REPLACE.format("data=Data('emoji-text')"), "data"),
        (REPLACE.format("optim=None"), "optim"),
        (REPLACE.format("method=Optim()"), "method"),
        (REPLACE.format("train=Train(steps=0, batch_size=8)"), "steps is 0"),
        (REPLACE.format("train=Train(steps=2, batch_size=-8)"), "batch_size is -8"),
        (REPLACE.format("data=()"), "data"),
        (REPLACE.format('data=(Data("emoji-txt"),)'), "did you mean 'emoji-text'"),
        (REPLACE.format('data=(Data("emoji-text", root="x"),)'), "built in and has no root"),
        (REPLACE.format('data=(Data("emoji-text", variant="notto"),)'), "notto"),
        (REPLACE.format('data=(Data("emoji-text", block=3),)'), "blocks"),
        (REPLACE.format('data=(Data("emoji-text", weight=0),)'), "at least 1"),
        (REPLACE.format('evals=("emoji-text/noto",)'), "emoji-text/noto"),
        (REPLACE.format('evals=("emoji-text/noto/val",), best="recal@1"'), "recal@1"),
        (REPLACE.format('evals=("emoji-text/noto/val",), retriever="emoji_text"'), "retriever"),
        (REPLACE.format('init={"": "emoji_txt"}'), "emoji_txt"),
        (REPLACE.format('init={"": "emoji_cir"}'), "does not fit"),
        (REPLACE.format('init={"": "none.npy"}'), "none.npy"),
        (REPLACE.format('optim=Optim(frozen=("txt/.*",))'), "txt/.*"),
        (REPLACE.format('optim=Optim(frozen=("(",))'), "frozen"),
        (REPLACE.format('optim=Optim(frozen=(".*",))'), "frozen"),
        (REPLACE.format("optim=Optim(lr=float('nan'))"), "lr"),
        (REPLACE.format("optim=Optim(warmup=-1)"), "warmup"),
        (REPLACE.format("mesh=Mesh(fsdp=3)"), "fsdp"),
        (REPLACE.format("mesh=Mesh(tensor=8)"), "tensor"),
        (REPLACE.format("mesh=Mesh(fsdp=0)"), "fsdp"),
        (REPLACE.format("train=Train(steps=2, batch_size=6)"), "use 4 or 8"),
        ("del config", "must define `config"),
        ("config = 5", "must define `config"),
        ("config = Evaluation(())", "must define `config"),
        ("1 / 0", "division by zero"),
        ("import no_such_module", "no_such_module"),
        ("def f(:", "line"),
        ("raise SystemExit(3)", "the file ends the program"),
        ("open('/none/at/all')", "/none/at/all"),
    ],
    ids=lambda value: value[-60:] if "\n" in value else value,
)
def test_configs_that_cannot_be_carried_out(more, expected, tmp_path):
    (tmp_path / "mine.py").write_text(CONFIG + more + "\n")
    command = ("cir_jax.train", "mine.py", "--workdir", "work")
    assert expected in error_of(*command, cwd=tmp_path, env={"JAX_NUM_CPU_DEVICES": "4"})
    assert not (tmp_path / "work" / "checkpoints" / "2").exists()


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ("(Run('emoji-text/noto/val', 'emoji_txt'),)", "emoji_txt"),
        ("(Run('emoji-text/noto/val', 'emoji_text', index='faiss'),)", "faiss"),
        ("(Run('emoji-text/noto/val', 'emoji_text', k=0),)", "k is 0"),
        ("(Run('emoji-text/noto/val', 'emoji_text', fusion=2),)", "fusion"),
        ("(Run('emoji-text/noto/val', 'emoji_itm'),)", "emoji_itm"),
        ("(Run('emoji-composed/noto/val', 'emoji_text', reranker='emoji_itm'),)", "consists of"),
        ("(Run('nowhere', 'emoji_text'),)", "nowhere"),
        ("()", "runs"),
        ("Run('emoji-text/noto/val', 'emoji_text')", "runs"),
    ],
)
def test_evaluations_that_cannot_be_carried_out(runs, expected, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"from cir_jax.config import Evaluation, Run\nconfig = Evaluation({runs})\n"
    )
    assert expected in error_of("cir_jax.eval", "mine.py", "--output", "out", cwd=tmp_path)
    assert not (tmp_path / "out" / "results.json").exists()


# ---- archives ----


def archive(*members: tuple[str, bytes | dict]) -> bytes:
    """A tar file with members of any kind; a dictionary changes the header of a member without contents."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            if isinstance(contents, bytes):
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))
                continue
            for field, value in contents.items():
                setattr(info, field, value)
            tar.addfile(info)
    return data.getvalue()


WHOLE = archive(("a.png", PNG), ("b.png", PNG), ("b.txt", b"a caption"))
SECOND = 512 + -(-len(PNG) // 512) * 512  # where the second member begins


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("x.tar", archive(("/etc/a.png", PNG)), "'/etc/a.png' that leaves its folder"),
        ("x.tar", archive(("a.png", PNG), ("../b.png", PNG)), "'../b.png' that leaves its folder"),
        ("x.tar", archive(("a/../../b.png", PNG)), "leaves its folder"),
        ("x.tar", archive(("a.png", PNG), ("A/../a.png", PNG)), "leaves its folder"),
        ("x.tar", archive(("a.png", PNG), ("a.jpg", PNG)), "two pictures with the key 'a'"),
        (
            "x.tar",
            archive(("a.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})),
            "no pictures",
        ),
        (
            "x.tar",
            archive(("a.png", {"type": tarfile.LNKTYPE, "linkname": "b.png"})),
            "no pictures",
        ),
        (
            "x.tar",
            archive(("a.png", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5})),
            "no pictures",
        ),
        ("x.tar", archive(("a.png", {"type": tarfile.FIFOTYPE})), "no pictures"),
        ("x.tar", archive(), "no pictures"),
        ("x.tar", WHOLE[:SECOND], "it was cut"),
        ("x.tar", WHOLE[: SECOND + 300], "cannot be read"),
        ("x.tar", WHOLE[: SECOND + 700], "cannot be read"),
        ("x.tar", WHOLE[:SECOND] + b"\xff" * 512 + WHOLE[SECOND + 512 :], "cannot be read"),
        ("x.tar", b"no archive", "cannot be read"),
        ("x.tar", b"", "cannot be read"),
        ("x.tar", zlib.compress(WHOLE), "cannot be read"),
        ("x.tar.gz", WHOLE, "is compressed"),
        ("x.zip", WHOLE, "there is no gallery"),
        ("x-00000.tar", WHOLE, "missing tar shards"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_archives_that_cannot_be_trusted(name, contents, expected, tmp_path):
    (tmp_path / name).write_bytes(contents)
    asked = "x-{00000..00002}.tar" if name == "x-00000.tar" else name
    assert expected in error_of("cir_jax.embed", MODEL, asked, "v", cwd=tmp_path)
    assert os.listdir(tmp_path) == [name]


def test_a_shard_with_links_beside_pictures_gives_the_pictures(tmp_path):
    link = {"type": tarfile.SYMTYPE, "linkname": "../../secret"}
    (tmp_path / "x.tar").write_bytes(archive(("a.png", PNG), ("l.png", link), ("b.png", b"words")))
    done = run("cir_jax.embed", MODEL, "x.tar", "v", cwd=tmp_path)
    assert done.returncode == 0
    vectors = Vectors(tmp_path / "v")
    assert vectors.ids == ["a"] and [item["id"] for item in vectors.skipped] == ["b"]


# ---- what commands share ----


def test_programs_compiled_once_are_found_again_in_a_private_folder(strange_index, tmp_path):
    folder = tmp_path / "programs"
    command = ("cir_jax.search", strange_index, "--text", "a fox", "--cache", folder)
    first = run(*command)
    assert first.returncode == 0, first.stderr.decode()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*-cache")}
    assert kept and all(not path.stat().st_mode & 0o077 for path in folder.iterdir())
    again = run(*command)
    assert again.stdout == first.stdout
    # A program that compiles too quickly to be kept may take longer the next time, and is then kept as well.
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in folder.rglob("*-cache")}.items()


@pytest.mark.parametrize("way", ["none", "writable", "file"])
def test_programs_are_not_kept_where_others_could_change_them(way, strange_index, tmp_path):
    folder = {"none": "none"}.get(way, str(tmp_path / "programs"))
    if way == "writable":
        run("cir_jax.search", strange_index, "--text", "a fox", "--cache", folder)
        (inner,) = Path(folder).iterdir()
        for path in inner.iterdir():
            path.unlink()
        inner.chmod(0o777)
    if way == "file":
        Path(folder).write_text("occupied")
    done = run("cir_jax.search", strange_index, "--text", "a fox", "--cache", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert ("compiled programs are not kept" in done.stderr.decode()) == (way != "none")
    assert not list(tmp_path.rglob("*-cache"))


def test_the_first_few_pictures_are_a_quick_try_that_can_be_continued(tmp_path):
    for number in range(7):
        place(tmp_path / "pictures", f"{number}.png", PNG)
    command = ("cir_jax.embed", MODEL, tmp_path / "pictures", tmp_path / "v")
    assert run(*command, "--limit", 3).returncode == 0
    assert Vectors(tmp_path / "v").ids == ["0.png", "1.png", "2.png"]
    assert run("cir_jax.index", tmp_path / "v", tmp_path / "i", "--limit", 2).returncode == 0
    assert cir_jax.open_index(tmp_path / "i").ids == ["0.png", "1.png"]
    assert run(*command).returncode == 0
    assert Vectors(tmp_path / "v").ids == [f"{number}.png" for number in range(7)]


@pytest.mark.parametrize("command", ["embed emoji_text emoji v", "index v i", "eval emoji"])
def test_a_limit_below_one_is_refused(command, tmp_path):
    done = run(*command.split(), "--limit", 0, cwd=tmp_path)
    assert done.returncode == 2 and "must be at least 1" in done.stderr.decode()


class Full:
    """Stands in for a computation that needs one unit of memory for each row."""

    def __init__(self, room: int):
        self.room, self.sizes = room, []

    def __call__(self, size: int) -> int:
        self.sizes.append(size)
        if size > self.room:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."
            )
        return size


@pytest.mark.parametrize(("room", "tried"), [(64, [64]), (32, [64, 32]), (40, [64, 32])])
def test_a_batch_that_does_not_fit_is_halved_once_with_a_notice(room, tried, capsys):
    compute = Full(room)
    assert halved_once(compute, 64, 64, "batch size") == (tried[-1], tried[-1])
    assert compute.sizes == tried
    said = capsys.readouterr().err
    assert ("batch size 64 does not fit" in said and "going on with 32" in said) == (room < 64)


@pytest.mark.parametrize(("size", "tried"), [(64, [64, 32]), (32, [32]), (1, [1])])
def test_a_batch_that_does_not_fit_by_half_is_named(size, tried):
    compute = Full(0)
    with pytest.raises(MemoryError, match=f"batch size {tried[-1]} does not fit .*smaller"):
        halved_once(compute, size, 64, "batch size")
    assert compute.sizes == tried


def test_other_errors_of_the_device_are_not_taken_for_memory():
    def compute(size):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        halved_once(compute, 64, 64, "batch size")


@pytest.mark.parametrize("part", ["query", "item"])
def test_halves_of_a_batch_give_the_same_vectors(part, monkeypatch, capsys):
    model = cir_jax.load(MODEL)
    examples = {"query": ["a fox", "a red heart in the rain", "x"] * 7, "item": [drawing()] * 21}
    whole = model.encode(part, examples[part])
    encode = cir_jax.Model._encode_batch

    def small(self, params, part, batch, mesh):
        if len(next(iter(batch.values()))) > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return encode(self, params, part, batch, mesh)

    monkeypatch.setattr(cir_jax.Model, "_encode_batch", small)
    np.testing.assert_allclose(model.encode(part, examples[part], 16), whole, atol=1e-5)
    assert "going on with 8" in capsys.readouterr().err
