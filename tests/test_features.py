"""Files of REACT and of clip-retrieval, both ways; shards, scattered folders and training on them."""

import base64
import json
import pickle
import tarfile

import numpy as np
import pyarrow
import pytest
from data_layouts import paint
from pyarrow import parquet
from test_records import shard

from cir_jax.config import Data
from cir_jax.data import clip_retrieval, react, training_set
from cir_jax.data.features import key
from cir_jax.data.react import Features
from cir_jax.data.records import open_gallery
from cir_jax.index import ExactIndex
from cir_jax.vectors import Vectors

KEYS = [["000000002", "000000000"], ["000010001", "000010007", "000010003"]]


@pytest.fixture
def shards(tmp_path):
    """Two shards as img2dataset writes them, not sorted by key; the last caption is empty."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, keys in enumerate(KEYS):
        members = {}
        for name in keys:
            paint(tmp_path / "drawn", f"{name}.jpg")
            members[f"{name}.jpg"] = (tmp_path / f"drawn/{name}.jpg").read_bytes()
            value = {"key": name, "sha256": f"{int(name):064x}", "caption": "", "status": "success"}
            members[f"{name}.json"] = json.dumps(value).encode()
            caption = "" if name.endswith("7") else f" caption {int(name)}\n"
            members[f"{name}.txt"] = caption.encode()
        shard(folder / f"{number:05}.tar", members)
        (folder / f"{number:05}_stats.json").write_text("{}")
    return folder


@pytest.fixture
def features(shards, tmp_path):
    """The TSVs of these shards, D = 6."""
    rng, folder = np.random.default_rng(0), tmp_path / "tsv"
    folder.mkdir()
    for number, keys in enumerate(KEYS):
        image, text = rng.normal(size=(2, len(keys), 6)).astype(np.float16)
        found = Features(keys, [f"{int(name):064x}" for name in keys], image, text)
        react.write_features(folder / f"{number:05}.tsv", found)
    return folder


# ---- shards ----


def test_shards_train(shards):
    found = training_set(Data("captioned", root=str(shards)))
    assert len(found) == 5 and [raw["group"] for raw in found] == list(range(5))
    assert [raw["query"]["text"] for raw in found] == [
        "caption 2",
        "caption 0",
        "caption 10001",
        "",
        "caption 10003",
    ]
    assert found[0]["item"]["image"][:2] == b"\xff\xd8"
    with pytest.raises(ValueError, match=r"'a.png' of .*drawn has no text, which training needs"):
        paint(shards.parent / "drawn", "a.png")
        training_set(Data("captioned", root=str(shards.parent / "drawn")))[-1]


@pytest.mark.parametrize("fanned", [False, True])
def test_scattered_shards_are_a_gallery_with_captions(shards, tmp_path, fanned):
    assert react.scatter(shards, tmp_path / "out", fanned) == 15
    place = "00001/0/0/000010001" if fanned else "00001/000010001"
    assert (tmp_path / f"out/{place}.json").is_file()
    gallery = open_gallery(tmp_path / "out")
    assert len(gallery) == 5 and f"{place}.jpg" in gallery.ids
    by_key = {key(item["id"]): item for item in gallery}
    assert by_key["000010003"]["text"] == "caption 10003" and by_key["000010007"]["text"] == ""
    before = (tmp_path / f"out/{place}.jpg").stat().st_mtime_ns
    react.scatter(str(shards / "{00000..00001}.tar"), tmp_path / "out", fanned)
    assert (tmp_path / f"out/{place}.jpg").stat().st_mtime_ns == before, "what is there stays"


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/x.jpg"])
def test_no_member_leaves_the_folder_it_is_scattered_to(name, tmp_path):
    shard(tmp_path / "00000.tar", {name: b"x"})
    with pytest.raises(ValueError, match=r"that leaves its folder; refused|expected KEY.jpg"):
        react.scatter(tmp_path / "00000.tar", tmp_path / "out/in")
    assert not list(tmp_path.rglob("x.jpg"))


def test_sums_of_shards(shards, tmp_path):
    assert list(react.sums(shards))[1] == ("000000000", f"{0:064x}")
    shard(tmp_path / "00000.tar", {"a.json": b'{"key": "a"}'})
    with pytest.raises(ValueError, match=r"a.json in .*00000.tar does not tell key and sha256"):
        list(react.sums(tmp_path / "00000.tar"))


# ---- file lists ----


def test_filelists_are_read_and_written(shards, tmp_path):
    react.write_filelist(shards, tmp_path / "filelist.pkl")
    stored = pickle.loads((tmp_path / "filelist.pkl").read_bytes())
    assert type(stored).__name__ == "OrderedDict" and list(stored) == ["00000", "00001"]
    assert stored["00000"] == ["000000002.jpg", "000000000.jpg"]
    assert react.read_filelist(tmp_path / "filelist.pkl") == stored
    for protocol in (2, 3, 4, 5):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(stored, protocol))
        assert react.read_filelist(tmp_path / "x.pkl") == stored


def test_long_filelists_are_read(tmp_path):
    names = {"00000": [f"{number:09}.jpg" for number in range(400_000)]}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(names))
    assert react.read_filelist(tmp_path / "x.pkl") == names


class Bomb:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    "value", [Bomb(), {"00000": [Bomb()]}, ["a.jpg"], {"00000": "a.jpg"}, {"00000": [1]}, b"x" * 9]
)
def test_nothing_else_is_read_as_a_filelist(value, tmp_path, capsys):
    data = value if isinstance(value, bytes) else pickle.dumps(value)
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=r"x.pkl is no list of files: "):
        react.read_filelist(tmp_path / "x.pkl")
    assert capsys.readouterr().out == ""


def test_gaps_between_shards_are_refused(shards, tmp_path):
    (shards / "00000.tar").rename(shards / "00002.tar")
    with pytest.raises(ValueError, match=r"00001.tar is not number 0 of the shards"):
        react.write_filelist(shards, tmp_path / "filelist.pkl")


def test_alignment_is_looked_at(shards, features, tmp_path):
    react.write_filelist(shards, tmp_path / "filelist.pkl")
    assert react.check_alignment(features, tmp_path / "filelist.pkl") == 5
    with tarfile.open(shards / "00001.tar", "a") as archive:
        archive.add(shards.parent / "drawn/000000000.jpg", "late.jpg")
    react.write_filelist(shards, tmp_path / "filelist.pkl")
    with pytest.raises(ValueError, match=r"1 shards differ: 00001 has 3 rows .* and 4 pictures"):
        react.check_alignment(features, tmp_path / "filelist.pkl")


# ---- features of REACT ----


def test_a_tsv_is_what_the_specification_says(tmp_path):
    """react.md 1.3: four columns, little-endian float16 in base64, offsets of lines; 2,813 bytes a row at D = 512."""
    image = np.arange(1024, dtype=np.float16).reshape(2, 512)
    found = Features(["000000012", "000000013"], ["a" * 64, "b" * 64], image, -image)
    react.write_features(tmp_path / "00000.tsv", found)
    data = (tmp_path / "00000.tsv").read_bytes()
    assert (tmp_path / "00000.lineidx").read_bytes() == b"0\n2813\n" and len(data) == 2 * 2813
    cells = data.split(b"\n")[1].split(b"\t")
    assert cells[:2] == [b"000000013", b"b" * 64] and len(cells[2]) == len(cells[3]) == 1368
    assert np.array_equal(np.frombuffer(base64.b64decode(cells[3]), "<f2"), -image[1])
    again = react.read_features(tmp_path / "00000.tsv")
    assert (again.keys, again.sums) == (found.keys, found.sums)
    assert np.array_equal(again.image, image) and np.array_equal(again.text, -image)
    assert again.image.dtype == np.float16
    assert react.read_features(tmp_path / "00000.tsv", "float32").image.shape == (2, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("\t", " ", 1), "line 1 has 3 columns"),
        (lambda text: text.replace("\t", "\t!", 2), "line 1 holds no float16 features"),
        (lambda text: text + text.split("\n")[0] + "\n", "counts 2 rows, .* has 3"),
        (lambda text: text[:-5], "line 2 holds no float16 features"),
        (lambda text: text[:-9] + "\n", "has features of widths"),
    ],
)
def test_damaged_tsvs_are_refused(change, message, features):
    path = features / "00000.tsv"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        react.read_features(path)


def test_the_metafile_counts_rows_and_a_stale_one_is_noticed(features):
    path = react.write_metafile(features)
    assert json.loads(path.read_text()) == {"00000": 2, "00001": 3} == react.row_counts(features)
    path.write_text('{"00000": 2}')
    with pytest.raises(ValueError, match=r"metafile.json is stale"):
        react.row_counts(features)
    react.write_metafile(features)
    with pytest.raises(FileNotFoundError, match=r"holds no .tsv files"):
        react.row_counts(features.parent)


@pytest.mark.parametrize("part", ["image", "text"])
@pytest.mark.parametrize("place", [None, "shards", "out"])
def test_features_become_vectors_that_are_searched(part, place, shards, features, tmp_path):
    react.scatter(shards, tmp_path / "out")
    gallery = place and tmp_path / place
    vectors = Vectors(react.to_vectors(features, tmp_path / "x.vectors", part, gallery))
    stored = [getattr(react.read_features(features / f"0000{n}.tsv"), part) for n in (0, 1)]
    wanted = np.concatenate(stored).astype(np.float32)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert np.abs(vectors.array() - wanted).max() < 1e-6
    assert [key(name) for name in vectors.ids] == [*KEYS[0], *KEYS[1]]
    index = ExactIndex(vectors.array(), vectors.ids, vectors.gallery)
    hit = index.search(wanted[3:4], 1).rows[0]
    assert index.ids[hit[0]].endswith("000010007" + (".jpg" if place == "out" else ""))
    if place:
        assert index.items(hit)[0]["text"] == "" and index.items(hit)[0]["image"]


def test_features_without_a_direction_are_skipped_and_told(features, tmp_path):
    one = react.read_features(features / "00000.tsv")
    one.image[0] = 0
    react.write_features(features / "00000.tsv", one)
    vectors = Vectors(react.to_vectors(features, tmp_path / "x.vectors"))
    assert len(vectors) == 4 and vectors.skipped == [
        {"id": KEYS[0][0], "reason": "its feature is zero or not finite"}
    ]
    react.to_vectors(features, tmp_path / "x.vectors")
    assert len(Vectors(tmp_path / "x.vectors")) == 4, "a second call adds nothing"


def test_a_gallery_that_lacks_keys_is_refused(shards, features, tmp_path):
    (shards / "00001.tar").unlink()
    with pytest.raises(ValueError, match="3 of 3 features are of pictures that the gallery lacks"):
        react.to_vectors(features, tmp_path / "x.vectors", gallery=shards)


# ---- clip-retrieval ----


def made(folder, rows=2):
    rng = np.random.default_rng(1)
    image, text = rng.normal(size=(2, 5, 8)).astype(np.float16)
    names = [f"{name}" for keys in KEYS for name in keys]
    metadata = [{"image_path": name, "caption": f"c {name}", "width": 3} for name in names]
    return clip_retrieval.write(folder, image, text, metadata, rows), image, text, metadata


def test_partitions_both_ways(tmp_path):
    folder, image, text, metadata = made(tmp_path / "out")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        *(f"img_emb/img_emb_{n}.npy" for n in range(3)),
        *(f"metadata/metadata_{n}.parquet" for n in range(3)),
        *(f"text_emb/text_emb_{n}.npy" for n in range(3)),
    ]
    found = list(clip_retrieval.partitions(folder))
    assert [len(part.image) for part in found] == [2, 2, 1]
    assert np.array_equal(np.concatenate([part.image for part in found]), image)
    assert np.array_equal(np.concatenate([part.text for part in found]), text)
    assert [row for part in found for row in part.metadata] == metadata
    made(tmp_path / "many", rows=1)
    clip_retrieval.write(tmp_path / "twelve", image=np.ones((12, 2)), rows=1)
    assert (tmp_path / "twelve/img_emb/img_emb_00.npy").is_file(), "names sort as numbers"
    with pytest.raises(FileExistsError):
        clip_retrieval.write(folder, image=image)


def test_partitions_become_vectors(shards, tmp_path):
    folder, image, *_ = made(tmp_path / "out")
    vectors = Vectors(clip_retrieval.to_vectors(folder, tmp_path / "x.vectors", gallery=shards))
    wanted = image.astype(np.float32) / np.linalg.norm(image.astype(np.float32), axis=1)[:, None]
    assert np.abs(vectors.array() - wanted).max() < 1e-6
    assert vectors.ids == [*KEYS[0], *KEYS[1]] and vectors.gallery == open_gallery(shards).locator
    texts = Vectors(clip_retrieval.to_vectors(folder, tmp_path / "t.vectors", "text"))
    assert texts.ids == vectors.ids and not np.allclose(texts.array(), wanted, atol=1e-2)
    clip_retrieval.write(tmp_path / "bare", image=image)
    bare = Vectors(clip_retrieval.to_vectors(tmp_path / "bare", tmp_path / "b.vectors"))
    assert bare.ids == ["0", "1", "2", "3", "4"]
    with pytest.raises(ValueError, match="no metadata with image_path"):
        clip_retrieval.to_vectors(tmp_path / "bare", tmp_path / "c.vectors", gallery=shards)
    with pytest.raises(FileNotFoundError, match="has no text_emb"):
        clip_retrieval.to_vectors(tmp_path / "bare", tmp_path / "d.vectors", "text")


def test_vectors_become_partitions(shards, tmp_path):
    folder, *_ = made(tmp_path / "out")
    clip_retrieval.to_vectors(folder, tmp_path / "x.vectors", gallery=shards)
    again = clip_retrieval.from_vectors(tmp_path / "x.vectors", tmp_path / "again")
    (part,) = clip_retrieval.partitions(again)
    assert part.image.dtype == np.float16 and part.text is None
    assert np.abs(part.image - Vectors(tmp_path / "x.vectors").array()).max() < 1e-3
    assert part.metadata[0] == {"image_path": KEYS[0][0], "caption": "caption 2"}


def test_partitions_that_do_not_fit_are_refused(tmp_path):
    folder, *_ = made(tmp_path / "out")
    (folder / "text_emb/text_emb_1.npy").unlink()
    with pytest.raises(ValueError, match="text_emb has other partitions"):
        list(clip_retrieval.partitions(folder))
    folder, image, *_ = made(tmp_path / "two")
    np.save(folder / "img_emb/img_emb_1.npy", image)
    with pytest.raises(ValueError, match=r"different numbers of rows: .*img_emb_1.npy 5, .* 2"):
        list(clip_retrieval.partitions(folder))
    np.save(folder / "img_emb/img_emb_0.npy", np.ones(2))
    with pytest.raises(ValueError, match=r"img_emb_0.npy holds float64 \(2,\), expected float16"):
        list(clip_retrieval.partitions(folder))
    np.save(folder / "img_emb/img_emb_0.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(ValueError, match="is damaged"):
        list(clip_retrieval.partitions(folder))
    with pytest.raises(FileNotFoundError, match="holds neither img_emb"):
        list(clip_retrieval.partitions(tmp_path))


def test_metadata_of_clip_retrieval_itself_is_read(tmp_path):
    """Files mode: paths of pictures, more columns."""
    paint(tmp_path / "photos", "a/x.jpg", "y.png")
    (tmp_path / "photos/a/x.txt").write_text("an x")
    for name in ("img_emb", "metadata"):
        (tmp_path / "out" / name).mkdir(parents=True)
    np.save(tmp_path / "out/img_emb/img_emb_0.npy", np.eye(2, 4, dtype=np.float16))
    rows = [{"image_path": f"/gone/photos/{name}"} for name in ("y.png", "a/x.jpg")]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "out/metadata/metadata_0.parquet")
    where = tmp_path / "x.vectors"
    clip_retrieval.to_vectors(tmp_path / "out", where, gallery=tmp_path / "photos")
    assert Vectors(where).ids == ["y.png", "a/x.jpg"]
    assert open_gallery(tmp_path / "photos")[0]["text"] == "an x"
