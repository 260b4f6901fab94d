"""Galleries: folders, lists, tar shards, built-in data; and what they refuse."""

import importlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cir_jax.data.records import PICTURES, open_gallery


def put(root, *names, data=b"picture"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + name.encode())


def shard(path, members):
    """A tar file of {name: bytes}, or of prepared TarInfo."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def same(first, second):
    assert list(first.ids) == list(second.ids)
    assert [first[row] for row in range(len(first))] == [second[row] for row in range(len(first))]


def test_a_folder_is_read_with_its_subfolders_in_order(tmp_path):
    put(tmp_path, "b.png", "a/2.JPG", "a/1.jpeg", "a/deep/er/x.webp", "z.TIFF")
    put(tmp_path, "notes.txt", "a/list.json", ".hidden.png", ".cache/x.png", "a/._1.jpeg")
    gallery = open_gallery(tmp_path)
    assert list(gallery.ids) == ["a/1.jpeg", "a/2.JPG", "a/deep/er/x.webp", "b.png", "z.TIFF"]
    assert len(gallery) == 5
    assert gallery[1] == {"image": str(tmp_path / "a/2.JPG"), "id": "a/2.JPG"}
    assert [item["id"] for item in gallery] == list(gallery.ids)
    assert gallery[-1]["id"] == "z.TIFF" and gallery[np.int64(0)]["id"] == "a/1.jpeg"
    with pytest.raises(IndexError):
        gallery[5]


def test_every_picture_suffix_is_known(tmp_path):
    put(tmp_path, *(f"x{suffix}" for suffix in PICTURES))
    assert len(open_gallery(tmp_path)) == len(PICTURES) == 12


def test_a_relative_folder_becomes_an_absolute_locator(tmp_path, monkeypatch):
    put(tmp_path / "photos", "a.png")
    monkeypatch.chdir(tmp_path)
    gallery = open_gallery("photos")
    assert gallery.locator == {"kind": "folder", "root": str(tmp_path / "photos")}
    monkeypatch.chdir("/")
    same(gallery, open_gallery(json.loads(json.dumps(gallery.locator))))


def test_links_may_not_lead_out_of_the_folder(tmp_path):
    put(tmp_path / "inside", "a.png", "b/real.png")
    put(tmp_path, "secret.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "inside" / "link.png")
    os.symlink("b/real.png", tmp_path / "inside" / "near.png")
    gallery = open_gallery(tmp_path / "inside")
    row = gallery.ids.index
    assert gallery[row("near.png")]["image"].endswith("near.png")
    with pytest.raises(ValueError, match=r"link.png leads out of .*secret.png; copy the file"):
        gallery[row("link.png")]


def test_a_linked_folder_is_a_folder(tmp_path):
    put(tmp_path / "real", "a.png")
    os.symlink(tmp_path / "real", tmp_path / "alias")
    assert open_gallery(tmp_path / "alias")[0]["image"] == str(tmp_path / "alias/a.png")


def test_lists_of_paths(tmp_path):
    put(tmp_path, "a/1.png", "2.png")
    (tmp_path / "list.txt").write_text("2.png\r\n\n  ./a/1.png \n", encoding="utf-8-sig")
    gallery = open_gallery(tmp_path / "list.txt")
    assert list(gallery.ids) == ["2.png", "a/1.png"]
    assert gallery[1] == {"image": str(tmp_path / "a/1.png"), "id": "a/1.png"}
    same(gallery, open_gallery(gallery.locator))


def test_lists_with_ids_and_texts(tmp_path):
    lines = [
        {"image": "a.png", "id": 7, "text": "a näme"},
        {"image": "sub/b.png", "text": None, "extra": 1},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    (tmp_path / "list.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "list.csv").write_text(
        'text,image,id\n"a näme",a.png,7\n,sub/b.png,\n', encoding="utf-8"
    )
    for name in ("list.jsonl", "list.csv"):
        gallery = open_gallery(tmp_path / name)
        assert list(gallery.ids) == ["7", "sub/b.png"]
        assert gallery[0] == {"image": str(tmp_path / "a.png"), "id": "7", "text": "a näme"}
        assert gallery[1] == {"image": str(tmp_path / "sub/b.png"), "id": "sub/b.png"}
        same(gallery, open_gallery(gallery.locator))


def test_absolute_paths_below_the_list_are_fine(tmp_path):
    put(tmp_path, "a/1.png")
    (tmp_path / "list.txt").write_text(str(tmp_path / "a/1.png"))
    assert list(open_gallery(tmp_path / "list.txt").ids) == ["a/1.png"]


@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "/etc/x.png"])
def test_paths_out_of_the_list_are_refused(path, tmp_path):
    (tmp_path / "list.txt").write_text(f"ok.png\n{path}\n")
    with pytest.raises(ValueError, match=r"1 paths in .*list.txt lead out .* put the list into"):
        open_gallery(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"image": "a.png"}\n{"image"', r"x.jsonl, line 2 is not JSON"),
        ("x.jsonl", "[1]", r"line 1 is no JSON object"),
        ("x.jsonl", '{"path": "a.png"}', r"line 1 has no `image` with a path; it has path"),
        ("x.csv", "path,text\na.png,b\n", r"line 2 has no `image`.*it has path, text"),
        ("x.csv", "image\n", "names no pictures"),
        ("x.txt", "\n\n", "names no pictures"),
        ("x.txt", "a.png\nb.png\n./a.png\n", r"'a.png' occurs 2 times"),
    ],
)
def test_malformed_lists_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_gallery(tmp_path / name)


def test_a_list_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes("é.png".encode("latin1"))
    with pytest.raises(ValueError, match=r"x.txt is not UTF-8"):
        open_gallery(tmp_path / "x.txt")


def test_a_shard_as_img2dataset_writes_it(tmp_path):
    members = {
        "000000001.jpg": b"one",
        "000000001.txt": b"a caption\n",
        "000000001.json": b"{}",
        "000000000.jpg": b"zero" * 400,
        "000000002.json": b"{}",
    }
    path = shard(tmp_path / "00000.tar", members)
    gallery = open_gallery(path)
    assert list(gallery.ids) == ["000000001", "000000000"]
    assert gallery[1] == {"image": b"zero" * 400, "id": "000000000"}
    assert gallery[0] == {"image": b"one", "text": "a caption", "id": "000000001"}
    assert gallery.locator == {"kind": "tar", "shards": str(path)}
    same(gallery, open_gallery(json.loads(json.dumps(gallery.locator))))


def shards(root):
    for number in range(3):
        members = {f"{number}{k}.png": f"{number}{k}".encode() for k in range(2)}
        shard(root / f"x-{number:05d}.tar", members)


@pytest.mark.parametrize("source", ["", "x-{00000..00002}.tar", "x-*.tar", "x-0000?.tar"])
def test_several_shards(source, tmp_path):
    shards(tmp_path)
    gallery = open_gallery(tmp_path / source)
    assert list(gallery.ids) == ["00", "01", "10", "11", "20", "21"]
    assert [item["image"] for item in gallery] == [name.encode() for name in gallery.ids]
    same(gallery, open_gallery(gallery.locator))


def test_part_of_a_range(tmp_path):
    shards(tmp_path)
    assert list(open_gallery(tmp_path / "x-{00001..00002}.tar").ids) == ["10", "11", "20", "21"]


def test_two_ranges(tmp_path):
    for name in ("a0-0", "a0-1", "a1-0", "a1-1"):
        shard(tmp_path / f"{name}.tar", {f"{name}.png": b""})
    gallery = open_gallery(tmp_path / "a{0..1}-{0..1}.tar")
    assert list(gallery.ids) == ["a0-0", "a0-1", "a1-0", "a1-1"]


def test_keys_that_repeat_are_told_apart_by_their_shard(tmp_path):
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", {"0.png": name.encode(), "dir/v1.0.png": b""})
    gallery = open_gallery(tmp_path)
    assert list(gallery.ids) == ["a/0", "a/dir/v1.0", "b/0", "b/dir/v1.0"]
    assert gallery[2]["image"] == b"b"


def test_missing_shards_are_listed(tmp_path):
    shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing tar shards: .*x-00003.tar; a gallery is"):
        open_gallery(tmp_path / "x-{00001..00003}.tar")
    with pytest.raises(FileNotFoundError, match=r"missing tar shards: .*y-\*.tar"):
        open_gallery(tmp_path / "y-*.tar")


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png"])
def test_members_that_leave_their_folder_are_refused(name, tmp_path):
    path = shard(tmp_path / "x.tar", {"0.png": b"", name: b""})
    with pytest.raises(ValueError, match="leaves its folder; refused"):
        open_gallery(path)


def test_links_and_hidden_members_are_no_pictures(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("0.png"))
        archive.addfile(tarfile.TarInfo("._0.png"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert list(open_gallery(tmp_path / "x.tar").ids) == ["0"]


def test_broken_archives_are_refused(tmp_path):
    path = shard(tmp_path / "x.tar", {"0.png": b"a" * 2000, "1.png": b"b" * 2000})
    whole = path.read_bytes()
    path.write_bytes(whole[:1500])
    with pytest.raises(ValueError, match=r"x.tar cannot be read .*unexpected end"):
        open_gallery(path)
    for damaged in (whole[:3000], whole[:2560] + b"x" * 512 + whole[3072:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged header at byte 2560"):
            open_gallery(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as an uncompressed tar file"):
        open_gallery(path)
    path.write_bytes(whole)
    gallery = open_gallery(path)
    path.write_bytes(whole[:3100])
    with pytest.raises(ValueError, match=r"ends within a file at byte 3072; it was cut"):
        gallery[1]


def test_two_pictures_with_one_key_are_refused(tmp_path):
    path = shard(tmp_path / "x.tar", {"0.png": b"", "0.jpg": b""})
    with pytest.raises(ValueError, match="two pictures with the key '0'"):
        open_gallery(path)


def test_compressed_archives_are_refused(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unpack it to .tar"):
        open_gallery(tmp_path / "x.tar.gz")


def test_pictures_beside_shards_are_ambiguous(tmp_path):
    shards(tmp_path)
    put(tmp_path, "a.png")
    with pytest.raises(ValueError, match="holds pictures and tar shards"):
        open_gallery(tmp_path)


@pytest.mark.parametrize("style", ["noto", "twemoji"])
def test_one_style_of_emoji(style):
    gallery = open_gallery(f"emoji:{style}")
    assert len(gallery) == 2859
    assert gallery.locator == {"kind": "emoji", "style": style}
    item = gallery[gallery.ids.index("1f600")]
    assert item["text"] == "grinning face" and item["image"].shape == (64, 64, 3)


def test_both_styles_of_emoji():
    gallery = open_gallery("emoji")
    assert len(gallery) == 2 * 2859
    assert gallery.ids[0].startswith("noto/") and gallery.ids[-1].startswith("twemoji/")
    assert gallery[0]["id"] == gallery.ids[0]
    assert list(open_gallery(gallery.locator).ids) == list(gallery.ids)


def test_a_built_in_name_wins_over_a_folder(tmp_path, monkeypatch):
    put(tmp_path / "emoji", "a.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_gallery("emoji")) == 5718
    assert list(open_gallery("./emoji").ids) == ["a.png"]
    assert list(open_gallery(Path("emoji").absolute()).ids) == ["a.png"]


@pytest.mark.parametrize("source", ["nowhere", "nowhere.txt", "nowhere/"])
def test_a_missing_gallery_is_answered_with_what_is_understood(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        open_gallery(source)
    for word in ("nowhere", "folder", ".jsonl", "tar", "emoji"):
        assert word in str(error.value)


def test_a_bucket_says_what_it_needs(monkeypatch):
    def absent(self, name):
        raise ImportError("Please install gcsfs")

    backend = type(importlib.import_module("etils.epath.backend").fsspec_backend)
    monkeypatch.setattr(backend, "_get_filesystem", absent)
    with pytest.raises(ImportError, match=r"gs://bucket/x needs gcsfs; `pip install gcsfs`"):
        open_gallery("gs://bucket/x")


def test_faulty_locators_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"kind .zip.; known are folder, list, tar, emoji"):
        open_gallery({"kind": "zip"})
    with pytest.raises(ValueError, match="does not say its 'root'"):
        open_gallery({"kind": "folder"})
    with pytest.raises(FileNotFoundError, match="is gone"):
        open_gallery({"kind": "folder", "root": str(tmp_path / "x")})
    with pytest.raises(FileNotFoundError, match="is gone"):
        open_gallery({"kind": "list", "file": str(tmp_path / "x.txt")})
    with pytest.raises(ValueError, match="style is 'apple'"):
        open_gallery("emoji:apple")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no pictures \(.jpg"):
        open_gallery(tmp_path)
    shard(tmp_path / "x.tar", {"a.txt": b""})
    with pytest.raises(FileNotFoundError, match=r"no pictures in .*1 shards"):
        open_gallery(tmp_path)


def test_galleries_travel_to_other_processes(tmp_path):
    put(tmp_path / "folder", "a.png")
    shards(tmp_path)
    for source in (tmp_path / "folder", tmp_path / "x-*.tar"):
        gallery = open_gallery(source)
        same(gallery, pickle.loads(pickle.dumps(gallery)))
