import json

import numpy as np
import pytest

from cir_jax import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_sha256_is_the_known_digest(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "abc") == digest


def test_a_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "x.npy"
    with files.write_atomically(path) as temporary:
        np.save(temporary, np.arange(3))
        assert not path.exists() and temporary.parent == tmp_path
    assert np.load(path).tolist() == [0, 1, 2]
    assert names(tmp_path) == ["x.npy"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), files.write_atomically(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), files.write_atomically(tmp_path / "x"):
        pass


def test_a_folder_appears_only_when_complete(tmp_path):
    path = tmp_path / "new" / "folder"
    with files.write_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("text")
        assert not path.exists()
    assert (path / "inner" / "file").read_text() == "text"
    assert names(tmp_path / "new") == ["folder"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), files.write_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_nothing_is_overwritten_by_a_folder(tmp_path, kind):
    path = tmp_path / "taken"
    makers = {
        "file": path.touch,
        "folder": path.mkdir,
        "broken link": lambda: path.symlink_to("gone"),
    }
    makers[kind]()
    refused = pytest.raises(FileExistsError, match="taken already exists; choose another name")
    with refused, files.write_folder(path):
        pytest.fail("the block must not run")


def test_a_folder_made_by_someone_else_meanwhile_is_kept(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(FileExistsError), files.write_folder(path):
        path.mkdir()
    assert names(tmp_path) == ["folder"]


def test_json_round_trip_of_any_text(tmp_path):
    value = {"id": "a\nb\u2028\udc80 é", "list": [1, 2.5, None, True]}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value


def test_json_refuses_nan_before_touching_the_file(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert files.read_json(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe{}"])
def test_cut_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is not complete JSON"):
        files.read_json(tmp_path / "x.json")


def test_json_must_be_an_object(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a JSON list, expected an object"):
        files.read_json(tmp_path / "x.json")


def test_a_manifest_is_read_back(tmp_path):
    manifest = {"index": "exact", "rows": 0, "width": 4, "vectors": "v.npy", "files": {}}
    manifest |= {"fingerprint": None, "checkpoint": None, "gallery": None}
    manifest |= {"format": 1, "kind": "index", "more": 2}
    files.write_json(tmp_path / "manifest.json", manifest)
    assert files.read_manifest(tmp_path, "index") == manifest


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (
            {"format": 2, "kind": "index"},
            "made by a newer cir_jax .format 2, this one reads up to 1",
        ),
        ({"kind": "index"}, "has format None, expected 1"),
        ({"format": True, "kind": "index"}, "has format True"),
        ({"format": 0, "kind": "index"}, "has format 0"),
        ({"format": 1, "kind": "vectors"}, "holds 'vectors', expected 'index'.*cir_jax.index"),
        ({"format": 1}, "holds None, expected 'index'"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, manifest, message):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        files.read_manifest(tmp_path, "index")


def test_a_missing_manifest_says_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a folder.*python -m cir_jax.embed"):
        files.read_manifest(tmp_path / "absent", "vectors")
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json.*python -m cir_jax.train"):
        files.read_manifest(tmp_path, "checkpoint")


def test_sums_cover_every_file_but_the_manifest(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    (tmp_path / "manifest.json").write_text("{}")
    sums = files.folder_sums(tmp_path)
    assert sorted(sums) == ["b", "inner/a"]
    files.check_sums(tmp_path, sums)


def test_all_damaged_files_are_listed_at_once(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    sums = files.folder_sums(tmp_path)
    (tmp_path / "a").write_text("")
    (tmp_path / "b").unlink()
    with pytest.raises(ValueError, match=r"a: changed or cut.*b: missing; copy it again"):
        files.check_sums(tmp_path, sums)


def test_sums_never_lead_out_of_the_folder(tmp_path):
    (tmp_path / "outside").write_text("x")
    (tmp_path / "folder").mkdir()
    sum_ = files.sha256(tmp_path / "outside")
    for name in ("../outside", str(tmp_path / "outside")):
        with pytest.raises(ValueError, match="leads out of the folder"):
            files.check_sums(tmp_path / "folder", {name: sum_})


def test_a_bucket_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"gs://b/x is a bucket address.*mount the bucket"):
        files.read_manifest("gs://b/x", "index")
