"""Packed data sets: the rows of the raw ones, wherever those come from; and what packing refuses."""

import importlib
import io
import json
import os
import pickle
import re
import sys
import tarfile

import numpy as np
import processes
import pytest
from PIL import Image

from cir_jax import files
from cir_jax.config import Data
from cir_jax.data import named_benchmark, open_benchmark, own, packed, parts_of, training_set
from cir_jax.data.benchmark import Benchmark
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.packed import Packed, Part, pack
from cir_jax.data.pipeline import train_batches
from cir_jax.data.records import open_gallery
from cir_jax.data.text import TextSpec

OWN = (own.VARIANT, own.SPLIT)


def draw(root, *names):
    """Pictures of 30 x 20 that all differ, as JPEG or PNG."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(sum(map(ord, name)))
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(path)


@pytest.fixture
def shop(tmp_path):
    """Pairs, triplets and a benchmark in tables of one's own."""
    root = tmp_path / "shop"
    draw(root, "p/a.jpg", "p/b.jpg", "p/c.png", "test/gallery/x.jpg", "test/gallery/y.png")
    (root / "pairs.csv").write_text("image,text\np/a.jpg,rot\np/c.png,grün\np/a.jpg,a red one\n")
    rows = [("p/a.jpg", "as a dress", "p/b.jpg"), ("p/b.jpg", "in blue", "p/a.jpg")]
    keys = ("reference", "text", "target")
    lines = [json.dumps(dict(zip(keys, row))) for row in rows]
    (root / "triplets.jsonl").write_text("\n".join(lines))
    queries = [
        {"text": "one", "targets": ["x.jpg"], "subset": ["x.jpg", "y.png"], "rule": "short"},
        {"reference": "x.jpg", "text": "other", "targets": ["y.png"], "subset": ["y.png"]},
    ]
    (root / "test/queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    return root


def plain(value):
    """A raw value with the bytes of its pictures and tuples for lists, so that raw and packed can be compared."""
    if isinstance(value, dict):
        return {
            k: _bytes(v) if k == "image" and isinstance(v, str) else plain(v)
            for k, v in value.items()
        }
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def _bytes(path):
    with open(path, "rb") as file:
        return file.read()


def assert_same_rows(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for row in range(len(ours)):
        assert plain(ours[row]) == plain(theirs[row]), row


def assert_same_benchmark(ours, theirs):
    assert_same_rows(ours.queries, theirs.queries)
    assert_same_rows(ours.gallery, theirs.gallery)
    assert (ours.variant, ours.split) == (theirs.variant, theirs.split)
    for field in ("ids", "positives", "exclude", "subset", "rules", "metrics"):
        assert plain(list(getattr(ours, field))) == plain(list(getattr(theirs, field))), field


def test_built_in_data_is_the_same_packed(tmp_path):
    names = {
        Part("training", "both", "train"): training_set(Data("emoji-documents", variant="both")),
        Part("benchmark", "noto", "val"): open_benchmark("emoji-documents", "noto", "val"),
        Part("benchmark", "noto-masked", "val"): open_benchmark(
            "emoji-documents", "noto-masked", "val"
        ),
    }
    pack("emoji-documents", names, tmp_path / "packed")
    assert Packed(tmp_path / "packed").parts == list(names)
    found = training_set(Data("emoji-documents", root=str(tmp_path / "packed"), variant="both"))
    assert_same_rows(found, names[Part("training", "both", "train")])
    assert len(Packed(tmp_path / "packed").training("emoji-documents", "", "train")) == len(found)
    with pytest.raises(ValueError, match="holds no benchmark /val; it has training both/train, "):
        Packed(tmp_path / "packed").benchmark("", "val")
    for part in list(names)[1:]:
        name = f"{tmp_path}/packed/{part.variant}/{part.split}"
        benchmark = named_benchmark(name)
        assert benchmark.name == f"{tmp_path}/packed"
        assert_same_benchmark(benchmark, names[part])
        assert len(named_benchmark(f"{tmp_path}/packed/noto-first3/val").queries) == 3
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("table", ["pairs", "triplets"])
def test_tables_of_ones_own_are_the_same_packed(table, shop, tmp_path):
    raw = str(shop / f"{table}.{'csv' if table == 'pairs' else 'jsonl'}")
    parts = parts_of(table, raw)
    pack(table, {part: opened() for part, opened in parts.items()}, tmp_path / "packed")
    found = training_set(Data(table, root=str(tmp_path / "packed")))
    assert_same_rows(found, training_set(Data(table, root=raw)))
    # Two rows show the first picture; it is stored once.
    assert Packed(tmp_path / "packed").pictures == 2


def test_a_benchmark_of_ones_own_is_the_same_packed(shop, tmp_path):
    raw = own.benchmark(str(shop / "test"))
    pack("benchmark", {Part("benchmark", *OWN): raw}, tmp_path / "packed")
    found = named_benchmark(str(tmp_path / "packed"))
    assert found.name == str(tmp_path / "packed")
    assert_same_benchmark(found, raw)
    assert found.exclude == (-1, 0) and found.rules == ("short", "other")
    assert_same_benchmark(named_benchmark(f"{found.name}/{found.variant}/{found.split}"), raw)
    gallery = open_gallery(json.loads(json.dumps(found.gallery.locator)))
    assert_same_rows(gallery, found.gallery)


def test_galleries_are_the_same_packed(tmp_path):
    draw(tmp_path / "folder", "b.jpg", "a/1.png", "a/2.JPEG")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("7.jpg", b"seven"), ("7.txt", "sieben ä".encode()), ("8.png", b"8")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    for source in ("folder", "x.tar"):
        raw, dest = open_gallery(tmp_path / source), tmp_path / f"{source}.packed"
        pack("gallery", {Part("gallery", *OWN): raw}, dest)
        found = open_gallery(dest)
        assert found.ids == list(raw.ids)
        assert_same_rows(found, raw)
        assert_same_rows(open_gallery(json.loads(json.dumps(found.locator))), raw)
        assert_same_rows(pickle.loads(pickle.dumps(found)), raw)


def test_training_sees_the_same_batches_packed(shop, tmp_path):
    raw = training_set(Data("pairs", root=str(shop / "pairs.csv")))
    pack("pairs", {Part("training", *OWN): raw}, tmp_path / "packed")
    found = training_set(Data("pairs", root=str(tmp_path / "packed")))
    inputs = Inputs(ImageSpec(size=16), TextSpec(length=8))
    streams = [train_batches([x], [1], inputs, batch_size=2, seed=1) for x in (raw, found)]
    for _ in range(4):
        ours, theirs = (next(stream) for stream in streams)
        for side in ("query", "item"):
            for name, x in theirs[side].items():
                np.testing.assert_array_equal(ours[side][name], x)


def test_it_is_an_ordinary_data_set_of_tfds_in_the_order_of_the_rows(shop, tmp_path):
    import tensorflow_datasets as tfds

    raw = training_set(Data("pairs", root=str(shop / "pairs.csv")))
    pack("pairs", {Part("training", *OWN): raw}, tmp_path / "packed")
    rows = tfds.builder_from_directory(tmp_path / "packed/rows").as_data_source("training_own_all")
    texts = [json.loads(row["json"])["query"]["texts"][0] for row in rows]
    assert texts == ["rot", "grün", "a red one"]
    pictures = tfds.builder_from_directory(tmp_path / "packed/pictures").as_data_source("pictures")
    assert [x["data"] for x in pictures] == [_bytes(shop / "p/a.jpg"), _bytes(shop / "p/c.png")]


def test_missing_pictures_end_packing_before_anything_is_kept(shop, tmp_path):
    raw = training_set(Data("triplets", root=str(shop / "triplets.jsonl")))
    for name in ("a", "b"):
        (shop / f"p/{name}.jpg").unlink()
    with pytest.raises(ValueError) as error:
        pack("triplets", {Part("training", *OWN): raw}, tmp_path / "packed")
    for name in ("a", "b"):
        assert f"training own/all, row 0: there is no picture {shop}/p/{name}.jpg" in str(
            error.value
        )
    assert not [path for path in tmp_path.iterdir() if path != shop]


class Failing(list):
    """Rows of which the last cannot be read."""

    def __getitem__(self, row):
        if row == len(self) - 1:
            raise OSError(5, "input/output error", "disk")
        return super().__getitem__(row)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "training a/b has no rows"),
        ([{"image": 7}], ValueError, "training a/b, row 0 has a picture that is int"),
        ([{"id": {1}}], ValueError, "row 0 holds what is no JSON"),
        ([{"id": float("nan")}], ValueError, "row 0 holds what is no JSON"),
        (Failing([{"id": 1}, {}]), OSError, "input/output error"),
    ],
)
def test_what_cannot_be_packed_is_named_and_nothing_remains(rows, error, message, tmp_path):
    with pytest.raises(error, match=message):
        pack("mine", {Part("training", "a", "b"): rows}, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_goes_and_what_another_one_writes_stays(tmp_path):
    rows = {Part("training", "a", "b"): [{"id": 1}]}
    left = tmp_path / ".tmp-01234567-packed"
    left.mkdir()
    (left / "half").write_text("")
    with files.lock(left), pytest.raises(BlockingIOError, match="another process is writing"):
        pack("mine", rows, tmp_path / "packed")
    pack("mine", rows, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    with pytest.raises(FileExistsError, match="already exists"):
        pack("mine", rows, tmp_path / "packed")


def test_what_a_packed_folder_does_not_hold_is_named(shop, tmp_path):
    raw = training_set(Data("pairs", root=str(shop / "pairs.csv")))
    pack("pairs", {Part("training", *OWN): raw}, tmp_path / "packed")
    with pytest.raises(ValueError, match="holds pairs, expected triplets"):
        training_set(Data("triplets", root=str(tmp_path / "packed")))
    with pytest.raises(ValueError, match="no benchmark own/all; it has training own/all"):
        named_benchmark(str(tmp_path / "packed"))
    with pytest.raises(ValueError, match="0 such galleries; it holds training own/all"):
        open_gallery(tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match=r"the packed gallery .* is gone"):
        open_gallery({"kind": "packed", "root": str(tmp_path / "other")})
    with pytest.raises(ValueError, match="'both'; expected VARIANT/SPLIT"):
        parts_of("emoji-text", training=["both"])
    with pytest.raises(ValueError, match="did you mean 'emoji-text'"):
        parts_of("emoji-txt")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """gs:// in memory."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "gs"
        store, pseudo_dirs, cachable = {}, [""], False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("gs://"))

    backend = type(importlib.import_module("etils.epath.backend").fsspec_backend)
    monkeypatch.setattr(backend, "_get_filesystem", lambda self, name: Bucket())
    monkeypatch.setattr(packed, "CACHE", str(tmp_path / "cache"))
    return Bucket


def test_a_bucket_holds_the_same(bucket, shop, tmp_path):
    raw, place = own.benchmark(str(shop / "test")), "gs://pods/shop"
    assert not packed.is_packed(place)
    pack("benchmark", {Part("benchmark", *OWN): raw}, place)
    assert any(name.endswith("manifest.json") for name in bucket.store)
    assert not list((tmp_path / "cache").iterdir())
    found = named_benchmark(f"{place}/own/all")
    assert_same_benchmark(found, raw)
    assert found.gallery.locator["root"] == f"{place}/own/all"
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert_same_rows(open_gallery(found.gallery.locator), raw.gallery)
    with pytest.raises(FileExistsError, match="gs://pods/shop already exists"):
        pack("benchmark", {Part("benchmark", *OWN): raw}, place)
    (copy,) = (tmp_path / "cache").iterdir()
    packed.shutil.rmtree(copy)
    name = next(name for name in bucket.store if "gallery" in name)
    bucket().pipe_file(name, b"cut")
    with pytest.raises(ValueError, match=r"is damaged: rows/.*gallery.*changed or cut"):
        named_benchmark(f"{place}/own/all")


def test_the_command_packs_and_checks(shop, tmp_path):
    dest = tmp_path / "packed"
    done = processes.run(
        "cir_jax.data", "pairs", "--root", shop / "pairs.csv", "--dest", dest, "--check"
    )
    assert done.returncode == 0, done.stderr
    assert b"3 rows, 2 different pictures: 0 faults" in done.stdout
    assert b"3 rows and 2 pictures in" in done.stdout and b"training own/all" in done.stdout
    shard = next((dest / "pictures").glob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = processes.run("cir_jax.data", "pairs", "--root", dest, "--check")
    assert done.returncode == 1 and b"pictures/" in done.stderr and b"changed or cut" in done.stderr
    done = processes.run("cir_jax.data", "pairs", "--root", shop / "pairs.csv")
    assert done.returncode == 0 and b"training own/all: 3 pairs\n  first: {" in done.stdout
    done = processes.run("cir_jax.data", "pairs", "--dest", tmp_path / "other")
    assert done.returncode == 1 and b"pairs needs a root" in done.stderr


def test_a_check_reports_everything_at_once(tmp_path):
    root = tmp_path / "test"
    draw(root, "g/ok.jpg", "g/same.jpg", "g/UPPER.JPG", "g/suffix.png")
    (root / "g/same.jpg").write_bytes((root / "g/ok.jpg").read_bytes())
    (root / "g/broken.jpg").write_bytes(b"no picture")
    (root / "g/cut.jpg").write_bytes((root / "g/ok.jpg").read_bytes()[:400])
    names = ["ok.jpg", "same.jpg", "upper.jpg", "suffix.jpg", "broken.jpg", "cut.jpg", "gone.jpg"]
    (root / "gallery.txt").write_text("\n".join(f"g/{name}" for name in names))
    queries = [{"text": "x", "targets": [f"g/{name}"], "id": 1} for name in ("ok.jpg", "no.jpg")]
    queries += [{"text": "x", "targets": ["g/ok.jpg"], "id": 1}, {"targets": ["g/ok.jpg"]}]
    (root / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    done = processes.run("cir_jax.data", "benchmark", "--root", root, "--check")
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    text = done.stdout.decode()
    faults = [line for line in text.splitlines() if line.startswith("fault: ")]
    for wanted in (
        "'g/no.jpg', which is not among the 7 ids",
        "line 3: the id '1' occurs twice",
        "line 4: asks nothing",
        "(g/upper.jpg): there is no picture .*; UPPER.JPG is there",
        "(g/suffix.jpg): there is no picture .*; suffix.png is there",
        "(g/gone.jpg): there is no picture",
        "(g/broken.jpg): .*cannot be read as a picture",
        "(g/cut.jpg): .*cannot be read as a picture",
    ):
        pattern = wanted.replace("(", r"\(").replace(")", r"\)")
        assert len([1 for line in faults if re.search(pattern, line)]) >= 1, wanted
    assert "note: benchmark own/all, item: the same picture is g/ok.jpg, g/same.jpg" in text
    assert b"faults, listed above" in done.stderr
    assert not os.path.exists(tmp_path / "packed")


def test_a_benchmark_without_queries_or_with_one_id_twice_is_inconsistent():
    item, query = {"image": b"", "id": "a"}, {"text": "x"}
    with pytest.raises(
        ValueError, match=r"x/y/z is inconsistent:\n  0 queries and 1 gallery items"
    ):
        Benchmark("x", "y", "z", [], [item], ["a"], [])
    with pytest.raises(ValueError, match=r"1 ids belong to several gallery items: \['a'\]"):
        Benchmark("x", "y", "z", [query], [item, item], ["a", "a"], [{0: 1.0}])


def test_a_name_in_another_case_is_said(shop):
    (shop / "p/a.jpg").rename(shop / "p/A.JPG")
    with pytest.raises(ValueError, match=r"line 2: there is no picture .*/p/a.jpg; A.JPG is there"):
        own.pairs(str(shop / "pairs.csv"))
