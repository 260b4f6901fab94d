"""Artefacts that are half-written, changed, of another kind, locked, unreadable, or on a full disk: one clear error.

Every case asserts the words of the error, that nothing new lies on the disk, and that what was there is as it was.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from test_methods import INPUTS, drawn

from cir_jax import files
from cir_jax.checkpoint import read_model, save_model
from cir_jax.commands import start
from cir_jax.data.records import open_gallery
from cir_jax.index import ExactIndex, ScannIndex, make_index, open_index
from cir_jax.methods.clip import ClipConfig
from cir_jax.train import train
from cir_jax.vectors import Items, Vectors, VectorWriter

SUM = "0" * 64
OPEN = {"vectors": Vectors, "index": open_index, "scann": open_index, "checkpoint": read_model}


def some(count, width=4, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def written(folder, rows, split=3):
    with VectorWriter(folder, fingerprint="abc", checkpoint="emoji_text") as made:
        for part in (range(split), range(split, len(rows))):
            made.add(rows[part], [f"i{row}" for row in part])
        made.finish()
    return folder


def content(folder: Path) -> dict:
    """Every path below a folder, hidden ones too, with its bytes."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@contextlib.contextmanager
def refused(folder, match, error=ValueError):
    """The block raises one error with these words, and leaves the folder as it was."""
    before = content(folder)
    with pytest.raises(error, match=match) as raised:
        yield raised
    assert "Error(" not in str(raised.value)
    assert content(folder) == before


def changed(folder: Path, path: str, value) -> None:
    """Set the field at a dotted path of a manifest; "absent" deletes it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    *parents, last = [int(x) if x.isdigit() else x for x in path.split(".")]
    place = manifest
    for name in parents:
        place = place[name]
    if value == "absent":
        del place[last]
    else:
        place[last] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with `vectors` (5 x 4), an exact `index`, a `scann` one with a tree, and a tiny `checkpoint`."""
    folder = tmp_path_factory.mktemp("made")
    vectors = Vectors(written(folder / "vectors", some(5)))
    ExactIndex(vectors).save(folder / "index")
    ScannIndex(some(220, 8)).save(folder / "scann")
    model = drawn(ClipConfig.tiny(INPUTS))
    save_model(folder / "checkpoint", model.config, model.params)
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run a command as a user does; it must end with exit code 1 and one line, which is returned."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"cir_jax.{name}", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            start(name)
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (1, "", 1), err
        return err

    return run


# Manifests

COUNT = "expected a whole number from 0 on"
INSIDE = "expected a file inside the folder"
MANIFESTS = [
    ("vectors", "format", 2, "made by a newer cir_jax .format 2, this one reads up to 1.*update"),
    ("vectors", "kind", "index", "holds 'index', expected 'vectors'"),
    ("vectors", "shards", 5, "shards is 5, expected a list"),
    ("vectors", "shards", [5], r"shards\[0\] is 5, expected an object"),
    ("vectors", "shards", "absent", "lacks shards"),
    ("vectors", "rows", "x", f'rows is "x", {COUNT}'),
    ("vectors", "rows", -1, f"rows is -1, {COUNT}"),
    ("vectors", "rows", True, f"rows is true, {COUNT}"),
    ("vectors", "rows", 5.0, f"rows is 5.0, {COUNT}"),
    ("vectors", "rows", 10**30, f"rows is 10*, {COUNT}"),
    ("vectors", "rows", 4, "rows is 4, the shards hold 5"),
    ("vectors", "shards.0.sha256", None, r"shards\[0\].sha256 is null, expected an object"),
    ("vectors", "shards.0.sha256.ids", "00", 'sha256.ids is "00", expected a SHA-256'),
    ("vectors", "shards.0.sha256.ids", SUM, "ids-00000.txt: changed or cut"),
    ("vectors", "shards.0.vectors", "../index/vectors.npy", INSIDE),
    ("vectors", "shards.0.vectors", "/etc/passwd", INSIDE),
    ("vectors", "shards.0.vectors", "a\0b", INSIDE),
    ("vectors", "shards.0.vectors", "", INSIDE),
    ("vectors", "shards.0.vectors", "\ud800", INSIDE),
    ("vectors", "shards.0.vectors", "gone.npy", "gone.npy: missing"),
    ("vectors", "shards.1.vectors", "vectors-00000.npy", "shards share a file"),
    ("vectors", "shards.1.start", 2, r"shards\[1\] is rows 2 to 5, expected one from row 3 on"),
    ("vectors", "shards.1.stop", 3, r"shards\[1\] is rows 3 to 3"),
    ("vectors", "width", None, "width is None, expected at least 1"),
    ("vectors", "width", 0, "width is 0, expected at least 1"),
    ("vectors", "width", 7, r"holds float32 \(3, 4\), expected float32 \(3, 7\)"),
    ("vectors", "dtype", "float64", 'dtype is "float64", expected float32 or float16'),
    ("vectors", "dtype", "float16", r"holds float32 .* expected float16"),
    ("vectors", "complete", "yes", 'complete is "yes", expected true or false'),
    ("vectors", "complete", False, "incomplete: it stops after 5 rows; run the same embed command"),
    ("vectors", "skipped", [3], r"skipped\[0\] is 3, expected an object"),
    ("vectors", "skipped", [{"id": "a"}], r"lacks skipped\[0\].reason"),
    ("vectors", "gallery", 5, "gallery is 5, expected an object, text or null"),
    ("vectors", "fingerprint", ["a"], r'fingerprint is \["a"\], expected text or null'),
    ("index", "kind", [], r"holds \[\], expected 'index'"),
    ("index", "index", "faiss", 'index is "faiss", expected exact or scann'),
    ("index", "index", [], r"index is \[\], expected exact or scann"),
    ("index", "index", "scann", "settings is null, expected an object"),
    ("index", "files", [], r"files is \[\], expected SHA-256 sums by file"),
    ("index", "files", {}, r"files lacks vectors.npy; files lacks ids.txt"),
    ("index", "files", {"../x": SUM}, "expected SHA-256 sums by file"),
    ("index", "vectors", "ids.txt", "ids.txt is damaged"),
    ("index", "vectors", "../vectors/vectors-00000.npy", INSIDE),
    ("index", "rows", 4, r"has shape \(5, 4\) of float32, expected \(4, 4\)"),
    ("index", "width", 5, r"has shape \(5, 4\) of float32, expected \(5, 5\)"),
    ("scann", "settings", [], r"settings is \[\], expected an object"),
    (
        "scann",
        "settings.leaves_to_search",
        10**12,
        "settings.leaves_to_search is 10*, expected 1 to",
    ),
    ("scann", "settings.reorder", 0, "settings.reorder is 0, expected 1 to 220"),
    ("scann", "settings.reorder", 221, "settings.reorder is 221, expected 1 to 220"),
    ("scann", "settings.leaves", -1, f"settings.leaves is -1, {COUNT}"),
    ("scann", "settings.k", 0, "settings.k is 0, expected 1 to 220"),
    ("scann", "settings.scorer", "magic", "'magic', expected 'tree_ah' or 'brute_force'"),
    ("scann", "settings.recall", "high", 'settings.recall is "high", expected a finite number'),
    ("checkpoint", "method", "gpt", "method 'gpt'; this version knows clip, "),
    ("checkpoint", "method", ["clip"], r'method is \["clip"\], expected text'),
    ("checkpoint", "config", 3, "config is 3, expected an object"),
    ("checkpoint", "method", "cfir", "manifest.json: this is not a CfirConfig of this version"),
    ("checkpoint", "config.embedd", 3, 'no field "embedd"; did you mean "embed"?'),
    ("checkpoint", "config.embed", "16", 'embed is "16", expected a whole number'),
    ("checkpoint", "config.embed", 16.0, "embed is 16.0, expected a whole number"),
    ("checkpoint", "config.embed", 17, "has a config that does not fit its"),
    ("checkpoint", "config.embed", True, "embed is true, expected a whole number"),
    ("checkpoint", "config.activation", None, "activation is null, expected one of 'quick_gelu'"),
    ("checkpoint", "config.inputs.image.mean", "abc", "mean is .abc., expected a list of 3"),
    ("checkpoint", "config.inputs.image.size", 0, "image size 0; expected at least 1"),
    ("checkpoint", "config.inputs.image.size", 48, "set both to the same size"),
    ("checkpoint", "config.text.vocabulary", -1, "has a config that does not fit"),
    ("checkpoint", "config.text.vocabulary", 10**12, "config.text.vocabulary is 10*;"),
    ("checkpoint", "config.text.layers", 10**9, "config.text.layers is 10*;"),
    ("checkpoint", "config.vision.width", 0, "has a config that does not fit"),
    ("checkpoint", "config.vision.patch", 0, "has a config that does not fit"),
    ("checkpoint", "config.vision.heads", 0, "has a config that does not fit"),
    ("checkpoint", "config.vision.heads", 3, "width 32 does not divide into 3 heads"),
    # Changes that fit every shape: only the fingerprint tells.
    (
        "checkpoint",
        "config.vision.heads",
        4,
        "was changed: its config and parameters have the fing",
    ),
    ("checkpoint", "config.inputs.image.mean", [0, 0, 0], "was changed.*copy the folder again"),
    ("checkpoint", "config.activation", "relu", "was changed"),
    ("checkpoint", "fingerprint", "0" * 16, 'its manifest says "0000000000000000"'),
    (
        "checkpoint",
        "config.inputs.text.vocab",
        "../../secret",
        "vocab is .*which is not among sums",
    ),
    ("checkpoint", "config.inputs.text.vocab", "", "vocab is .*which is not among sums"),
    ("checkpoint", "sums", [], r"sums is \[\], expected SHA-256 sums by file"),
    ("checkpoint", "dtype", "object", "expected float32, float16 or bfloat16"),
    ("checkpoint", "parameters", -1, f"parameters is -1, {COUNT}"),
    ("checkpoint", "parameters", 10**9, "does not fit its 10* parameters: its config describes"),
    ("checkpoint", "about", 3, "about is 3, expected an object"),
]


@pytest.mark.parametrize(("kind", "path", "value", "words"), MANIFESTS)
def test_a_changed_manifest_is_one_clear_error(copy, kind, path, value, words):
    OPEN[kind](copy / kind)
    changed(copy / kind, path, value)
    with refused(copy, words) as told:
        OPEN[kind](copy / kind)
    assert str(copy / kind) in str(told.value)


@pytest.mark.parametrize("kind", OPEN)
def test_a_half_written_manifest_is_never_taken_for_whole(copy, kind):
    path = copy / kind / "manifest.json"
    whole = path.read_bytes().rstrip()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with refused(copy, r"manifest.json is not complete JSON .*make it again"):
            OPEN[kind](copy / kind)
    for text in ("[" * 100_000, '{"format": NaN}', '{"a": ' + "9" * 5000 + "}", "\0"):
        path.write_text(text)
        with refused(copy, r"manifest.json is not complete JSON"):
            OPEN[kind](copy / kind)
    path.write_text("[]")
    with refused(copy, "holds a JSON list, expected an object"):
        OPEN[kind](copy / kind)
    path.unlink()
    with refused(copy, "has no manifest.json.*made by python -m", FileNotFoundError):
        OPEN[kind](copy / kind)


@pytest.mark.parametrize("kind", OPEN)
def test_every_listed_file_is_checked(copy, kind):
    manifest = json.loads((copy / kind / "manifest.json").read_text())
    names = manifest.get("files") or manifest.get("sums") or ["vectors-00001.npy", "ids-00000.txt"]
    for name in names:
        path = copy / kind / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with refused(copy, "changed or cut .its checksum differs.; copy it again or make it again"):
            OPEN[kind](copy / kind)
        path.write_bytes(whole)
    OPEN[kind](copy / kind)


def test_commands_name_the_artefact_that_is_none(copy, fails, tmp_path):
    dest = tmp_path / "dest"
    assert "holds 'index', expected 'vectors'" in fails("index", copy / "index", dest)
    assert "is not a folder; vectors: made by" in fails("index", copy / "gone", dest)
    changed(copy / "vectors", "shards", 5)
    told = fails("index", copy / "vectors", dest)
    assert f"{copy / 'vectors'}/manifest.json" in told and "shards is 5, expected a list" in told
    assert "holds 'vectors', expected 'index'" in fails("search", copy / "vectors", "--text", "a")
    assert not os.path.lexists(dest) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_a_destination_that_exists_is_kept(copy, fails, tmp_path, there):
    dest = tmp_path / "dest"
    {"file": dest.touch, "folder": dest.mkdir, "link": lambda: dest.symlink_to("gone")}[there]()
    with refused(copy, "already exists; choose another name or delete it", FileExistsError):
        save_model(dest, *read_model(copy / "checkpoint")[::2])
    assert f"{dest} already exists; choose another name" in fails("index", copy / "vectors", dest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "dest"]
    assert dest.is_symlink() or not list(dest.rglob("*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "xyz"}, "fingerprint 'abc' there, 'xyz' now"),
        ({"dtype": "float16"}, "dtype 'float32' there, 'float16' now"),
        ({"width": 5}, "width 4 there, 5 now"),
    ],
)
def test_vectors_of_another_checkpoint_are_not_continued(copy, change, words):
    with refused(copy, f"was begun differently: {words}.*choose another folder"):
        VectorWriter(copy / "vectors", **({"fingerprint": "abc"} | change))
    with (
        VectorWriter(copy / "vectors", fingerprint="abc") as writer,
        pytest.raises(ValueError, match=r"width 4, these have width 3.*another checkpoint"),
    ):
        writer.add(some(1, 3), ["x"])
    assert Vectors(copy / "vectors").ids == [f"i{row}" for row in range(5)]


# Locators


@pytest.mark.parametrize(
    ("locator", "words", "error"),
    [
        ({}, "a gallery of kind null; known are folder, list, tar, emoji", ValueError),
        ({"kind": []}, r"a gallery of kind \[\]; known are", ValueError),
        ({"kind": "web"}, "a gallery of kind .web.; known are", ValueError),
        ({"kind": "folder"}, "does not say its 'root'", ValueError),
        ({"kind": "folder", "root": 5}, "no text that could name its 'root'", ValueError),
        ({"kind": "folder", "root": "a\0b"}, "no text that could name its 'root'", ValueError),
        ({"kind": "folder", "root": "/nowhere"}, "folder /nowhere of a gallery is gone", OSError),
        ({"kind": "list", "file": None}, "no text that could name its 'file'", ValueError),
        ({"kind": "list", "file": "/gone.csv"}, "list /gone.csv of a gallery is gone", OSError),
        ({"kind": "tar", "shards": ["x"]}, "no text that could name its 'shards'", ValueError),
        ({"kind": "tar", "shards": "/x-{0..9999999999}.tar"}, "more than 1,000,000", ValueError),
        ({"kind": "tar", "shards": "/gone-{0..2}.tar"}, "missing tar shards", OSError),
        ({"kind": "emoji", "style": "apple"}, "style", ValueError),
        ({"kind": "emoji", "style": {}}, "no text that could name its 'style'", ValueError),
        ("nowhere.txt", "there is no gallery 'nowhere.txt'", OSError),
        ({"kind": "emoji", "style": "noto"}, r"no longer has \['i0'\]; embed it again", ValueError),
    ],
)
def test_a_locator_that_leads_elsewhere_is_one_error(copy, locator, words, error):
    changed(copy / "index", "gallery", locator)
    index = open_index(copy / "index")
    with refused(copy, words, error):
        index.items([0])
    assert (
        index.search(some(1), 1).rows.tolist()
        == ExactIndex(some(5)).search(some(1), 1).rows.tolist()
    )


def test_a_list_locator_may_name_a_file_that_is_none(copy):
    with refused(copy, "vectors-00000.npy is no list, expected .txt", ValueError):
        open_gallery({"kind": "list", "file": str(copy / "vectors" / "vectors-00000.npy")})
    with pytest.raises(ValueError, match="does not know its pictures"):
        Items(["a"], None)([0])


# Galleries of any size


@pytest.mark.parametrize("kind", ["exact", "scann"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rows", [0, 1, 2, "equal", "zero", "doubled"])
def test_small_and_equal_galleries_from_vectors_to_hits(tmp_path, kind, dtype, rows):
    made = {
        "equal": np.ones((5, 4)),
        "zero": np.zeros((5, 4)),
        "doubled": np.repeat(some(3).round(1), 2, 0),
    }
    table = made[rows] if rows in made else some(rows).round(1)
    with VectorWriter(tmp_path / "v", fingerprint="a", dtype=dtype, width=4) as writer:
        writer.add(table, ["same"] * len(table))
        writer.finish()
    vectors = Vectors(tmp_path / "v")
    assert np.array_equal(vectors.array(), table.astype(dtype).astype(np.float32))
    make_index(kind, vectors).save(tmp_path / "i")
    index = open_index(tmp_path / "i")
    assert index.ids == ["same"] * len(table)
    assert index.kind == (kind if len(table) else "exact")
    queries = some(3, seed=1)
    hits, scores = index.search(queries, 7), queries @ vectors.array().T
    order = np.argsort(-scores, axis=1, kind="stable")
    found = len(table)
    np.testing.assert_allclose(
        hits.scores[:, :found], np.take_along_axis(scores, order, 1), rtol=0, atol=1e-5
    )
    assert all(sorted(row) == list(range(found)) for row in hits.rows[:, :found].tolist())
    assert (hits.rows[:, found:] == -1).all() and np.isneginf(hits.scores[:, found:]).all()
    if rows in ("equal", "zero"):
        assert (hits.rows[:, :found] == range(found)).all(), "equal scores: the lower row first"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_stored_rows_that_are_not_finite_make_no_index(copy, fails, tmp_path, bad, kind):
    path = copy / "vectors" / "vectors-00001.npy"
    rows = np.load(path)
    rows[1, 2] = bad
    np.save(path, rows)
    changed(copy / "vectors", "shards.1.sha256.vectors", files.sha256(path))
    told = fails("index", copy / "vectors", tmp_path / "dest", "--kind", kind)
    assert "row 4 of 5 vectors has a NaN or infinite" in told
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


# Two writers

WRITER = """
import sys, time
import numpy as np
from cir_jax.vectors import VectorWriter
writer = VectorWriter(sys.argv[1], fingerprint="abc")
writer.add(np.ones((2, 4), np.float32), ["a", "b"])
print("ready", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_told_at_once_and_served_when_the_first_is_killed(tmp_path):
    folder = tmp_path / "v"
    first = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"ready\n"
        words = f"another process is writing {folder}; wait for it or choose another folder"
        with refused(tmp_path, words, BlockingIOError):
            VectorWriter(folder, fingerprint="abc")
    finally:
        first.kill()
        first.communicate()
    with VectorWriter(folder, fingerprint="abc") as second:
        assert second.rows == 2
        second.finish()
    assert Vectors(folder).ids == ["a", "b"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "ids-00000.txt",
        "manifest.json",
        "vectors-00000.npy",
    ]


def test_the_lock_goes_however_the_block_ends(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), VectorWriter(tmp_path / "v", fingerprint="a"):
        raise RuntimeError("stop")
    writer = VectorWriter(tmp_path / "v", fingerprint="a")
    writer.add(np.zeros((0, 0)), [], [{"id": "a", "reason": "broken"}])
    with pytest.raises(BlockingIOError), files.lock(tmp_path / "v"):
        pytest.fail("taken twice")
    del writer  # nobody closed it
    with files.lock(tmp_path / "v"):
        pass
    with pytest.raises(ValueError, match="begun differently"):
        VectorWriter(tmp_path / "v", fingerprint="b")
    with files.lock(tmp_path / "v"):
        assert (tmp_path / "v" / files.LOCK).exists()
    assert [path.name for path in (tmp_path / "v").iterdir()] == ["manifest.json"]


def test_a_writer_that_comes_back_sees_what_another_added(tmp_path):
    first = VectorWriter(tmp_path / "v", fingerprint="a")
    first.finish()
    with VectorWriter(tmp_path / "v", fingerprint="a") as other:
        other.add(some(1), ["other"])
        with pytest.raises(BlockingIOError, match="another process is writing"):
            first.add(some(1), ["first"])
    first.add(some(1), ["first"])
    first.finish()
    assert Vectors(tmp_path / "v").ids == ["other", "first"]


def test_a_second_training_of_a_workdir_is_refused(tmp_path, tiny_experiment):
    (tmp_path / "run").mkdir()
    with (
        files.lock(tmp_path / "run"),
        refused(tmp_path, "run; wait for it or choose another folder", BlockingIOError),
    ):
        train(tiny_experiment, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_of_two_index_builds_exactly_one_wins(copy, tmp_path):
    command = [sys.executable, "-m", "cir_jax.index", str(copy / "vectors"), str(tmp_path / "dest")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    loser = next(err for process, (_, err) in zip(both, told) if process.returncode)
    assert f"error: {tmp_path / 'dest'} already exists; choose another name" in loser
    assert loser.count("\n") == 1
    assert open_index(tmp_path / "dest").ids == Vectors(copy / "vectors").ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "dest"]


def test_a_folder_that_appears_at_the_last_moment_is_kept(tmp_path, monkeypatch):
    """Between the last look and the rename, where only the operating system can tell."""
    dest, rename = tmp_path / "dest", os.rename

    def late(source, target):
        dest.mkdir()
        (dest / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(FileExistsError, match="dest already exists"), files.write_folder(dest):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["dest", "theirs"]


# Permissions


@pytest.fixture
def without_rights():
    """(folder, as someone who owns nothing): the block runs without root's power to ignore permissions."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)

    @contextlib.contextmanager
    def someone():
        if os.geteuid():
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    yield folder, someone
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


READ = "could not be read: permission denied; ask its owner for the permission"


@pytest.mark.parametrize("kind", OPEN)
def test_what_may_not_be_read_is_named(made, without_rights, kind):
    folder, someone = without_rights
    shutil.copytree(made / kind, folder / kind)
    OPEN[kind](folder / kind)
    names = {"vectors": "ids-00001.txt", "checkpoint": "params/_METADATA"}
    for place in (folder / kind / names.get(kind, "ids.txt"), folder / kind / "manifest.json"):
        place.chmod(0)
        with pytest.raises(PermissionError, match=f"{place.name} {READ}"), someone():
            OPEN[kind](folder / kind)
        place.chmod(0o644)
    (folder / kind).chmod(0)
    with pytest.raises(PermissionError, match=f"{kind}.* {READ}"), someone():
        OPEN[kind](folder / kind)


def test_where_nothing_may_be_written_is_named(without_rights):
    folder, someone = without_rights
    written(folder / "v", some(5))
    index = ExactIndex(some(5))
    index.save(folder / "first")
    folder.chmod(0o555)
    (folder / "v").chmod(0o555)
    before = content(folder)
    denied = "could not be written: permission denied; ask its owner"
    for place, write in {
        "i": lambda: index.save(folder / "i"),
        "new/i": lambda: index.save(folder / "new" / "i"),
        "x.json": lambda: files.write_json(folder / "x.json", {}),
        "v": lambda: VectorWriter(folder / "v", fingerprint="abc"),
        "w": lambda: VectorWriter(folder / "w", fingerprint="abc"),
    }.items():
        with pytest.raises(PermissionError, match=f"{folder / place} {denied}"), someone():
            write()
    assert content(folder) == before


# A full disk

FULL = """
import json, os, resource, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_artefacts import content, some
from test_methods import INPUTS, drawn
from cir_jax import files
from cir_jax.checkpoint import read_model, save_model
from cir_jax.index import ExactIndex, ScannIndex, open_index
from cir_jax.methods.clip import ClipConfig
from cir_jax.vectors import Vectors, VectorWriter
from pathlib import Path
folder = Path(sys.argv[1])
rows, model = some(400, 64), drawn(ClipConfig.tiny(INPUTS))
ids = [f"i{row}" for row in range(400)]
scann = ScannIndex(rows)
files.write_json(folder / "x.json", {"old": 1})
writer = VectorWriter(folder / "v", fingerprint="a")
writer.add(rows[:10], ids[:10])
writes = {
    "x.json": lambda: files.write_json(folder / "x.json", {"new": ids * 10}),
    "v": lambda: writer.add(rows[10:], ids[10:]),
    "exact": lambda: ExactIndex(rows).save(folder / "exact"),
    "scann": lambda: scann.save(folder / "scann"),
    "model": lambda: save_model(folder / "model", model.config, model.params),
}
before, told = content(folder), {}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for name, write in writes.items():
    try:
        write()
    except OSError as error:
        told[name] = str(error)
after = content(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
for write in writes.values():
    write()
writer.finish()
assert np.array_equal(Vectors(folder / "v").array(), rows) and Vectors(folder / "v").ids == ids
assert files.read_json(folder / "x.json") == {"new": ids * 10}
for kind in ("exact", "scann"):
    assert open_index(folder / kind).search(rows[:1], 1).rows.tolist() == [[0]]
assert read_model(folder / "model")[3]["parameters"] > 0
new = sorted(str(path.relative_to(folder)) for path in after.keys() - before.keys())
print(json.dumps({"told": told, "kept": all(after[p] == before[p] for p in before), "new": new}))
"""


def test_a_full_disk_loses_nothing_and_the_work_continues(tmp_path):
    """A limit on the size of files stands in for it: Python ignores the signal, so that writes fail as on a full disk."""
    script = textwrap.dedent(FULL)
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    told = found["told"]
    assert sorted(told) == ["exact", "model", "scann", "v", "x.json"]
    for name, message in told.items():
        assert "\n" not in message and str(tmp_path) in message and "make room" in message
        reason = "ScaNN could not write" if name == "scann" else "could not be written: "
        assert reason in message and ".tmp-" not in message
    assert "x.json could not be written: file too large" in told["x.json"]
    assert "model could not be written: file too large" in told["model"]
    assert found["kept"] and found["new"] == []
