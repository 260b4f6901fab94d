"""The published data sets packed, checked and counted: the rows of the raw ones, and every fault at once."""

import dataclasses
import json
import os
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import tyro
from data_layouts import BENCHMARKS, TRAINING
from test_packed import assert_same_benchmark, assert_same_rows

import cir_jax.data as data_package
from cir_jax import embed
from cir_jax.config import Data, Run
from cir_jax.data import (
    PARTS,
    PUBLISHED,
    __main__,
    named_benchmark,
    open_gallery,
    parts_of,
    training_set,
    tuning_benchmark,
)
from cir_jax.data.check import check
from cir_jax.data.counts import counted
from cir_jax.data.packed import Packed, Part, pack
from cir_jax.workspace import content_digest

PAGE = Path(data_package.__file__).with_name("README.md").read_text()


pytestmark = pytest.mark.usefixtures("at_home")


def every_part(name, root):
    """The usual parts, and those that `data_layouts` tries."""
    training = [
        f"{variant}/{split}" for base, variant, split in TRAINING if base == name and variant
    ]
    asked = [each.partition("/")[2] for each in BENCHMARKS if each.partition("/")[0] == name]
    more = parts_of(name, root, training, asked) if training or asked else {}
    return parts_of(name, root) | more


def run(capsys, *arguments):
    """What the command prints, and its error."""
    error = ""
    try:
        __main__.main([str(each) for each in arguments])
    except (ValueError, OSError) as found:
        error = str(found)
    return capsys.readouterr().out, error


@pytest.mark.parametrize("name", PUBLISHED)
def test_packed_sets_have_the_rows_of_raw_ones(name, made, tmp_path):
    """All parts, in the place of the raw folder: as training set, benchmark, and gallery."""
    raw, root = every_part(name, str(made / name)), str(tmp_path / name)
    pack(name, {part: opened() for part, opened in raw.items()}, root)
    assert Packed(root).name == name and Packed(root).parts == list(raw)
    for part, opened in raw.items():
        if part.kind == "training":
            data = Data(name, root=root, variant=part.variant, split=part.split)
            assert_same_rows(training_set(data), opened())
            continue
        full = f"{name}:{root}/{part.variant}/{part.split}"
        found = named_benchmark(full)
        assert f"{found.name}/{found.variant}/{found.split}" == full
        assert_same_benchmark(found, opened())
        assert_same_rows(open_gallery(full), opened().gallery)
        assert_same_rows(open_gallery(found.gallery.locator), opened().gallery)
        if (tuning := tuning_benchmark(full)) is not None:
            assert len(named_benchmark(tuning).queries)


def test_the_usual_parts_are_those_of_every_set():
    for name, each in PUBLISHED.items():
        training, benchmarks = PARTS[name]
        assert bool(training) == (each.pairs is not None)
        assert bool(benchmarks) == (each.benchmark is not None)


def test_a_packed_set_is_found_where_the_raw_one_was(made, tmp_path, monkeypatch):
    opened = {
        part: make() for part, make in parts_of("fashioniq", benchmarks=["dress/val"]).items()
    }
    opened |= {part: make() for part, make in parts_of("fashioniq", training=["all/train"]).items()}
    pack("fashioniq", opened, tmp_path / "fashioniq")
    monkeypatch.setenv("CIR_JAX_DATA", str(tmp_path))
    assert len(training_set(Data("fashioniq"))) == 6
    found = named_benchmark("fashioniq/dress-first1/val")
    assert found.name == "fashioniq" and len(found.queries) == 1
    assert tuning_benchmark("fashioniq/dress/test") == "fashioniq/dress/val"
    assert tuning_benchmark("fashioniq/shirt/test") is None, "it was not packed"
    with pytest.raises(ValueError, match=r"holds no benchmark shirt/val; it has benchmark dress"):
        named_benchmark("fashioniq/shirt/val")
    with pytest.raises(ValueError, match="holds fashioniq, expected cirr"):
        named_benchmark(f"cirr:{tmp_path}/fashioniq/rc2/val")
    with pytest.raises(ValueError, match="holds fashioniq, expected cirr"):
        parts_of("cirr", str(tmp_path / "fashioniq"))


# ---- their page ----


def test_what_the_page_says_can_be_done(made, tmp_path, monkeypatch, capsys):
    """Commands and lines of configs, on the small folders."""
    monkeypatch.delenv("CIR_JAX_DATA")
    monkeypatch.chdir(tmp_path)
    os.symlink(made, "data")
    os.mkdir("shards")
    with tarfile.open("shards/00000.tar", "w") as archive:
        archive.add(made / "coco/val2014/val2014_1.jpg", "0.jpg")
        archive.add(made / "openimages/test.pkl.txt", "0.txt")
    Path("captions.jsonl").write_text('{"text": "A dog.", "keys": ["a dog"]}\n')
    lines = re.findall(r"^(?:python -m|Run\(|Data\().*", PAGE, re.MULTILINE)
    packed, trained, asked = set(), set(), set()
    for line in lines:
        words = shlex.split(line)
        if line.startswith("Run("):
            name = eval(line, {"Run": Run}).benchmark
            asked.add(name.partition(":")[0])
            assert len(named_benchmark(name).queries)
        elif line.startswith("Data("):
            data = eval(line, {"Data": Data})
            trained.add(data.name)
            assert len(training_set(data))
        elif words[2] == "cir_jax.embed":
            tyro.cli(embed.Arguments, args=words[3:])
            assert len(open_gallery(words[4]))
        else:
            assert words[2] == "cir_jax.data"
            __main__.main(words[3:])
            packed |= {words[3]} if "--dest" in words else set()
    assert packed == {*PUBLISHED, "captioned"}
    assert trained == {
        "captioned",
        "captions",
        *(name for name, each in PUBLISHED.items() if each.pairs),
    }
    assert asked == {name for name in PUBLISHED if PARTS[name][1]} - {"openimages"}, "no answers"


def test_links_of_the_page_exist():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (Path(data_package.__file__).parent / target).exists(), target


# ---- counts ----


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_command_counts_every_set(name, made, capsys):
    printed, error = run(capsys, name, "--root", made / name)
    assert not error and "missing" not in printed
    for part, opened in parts_of(name, str(made / name)).items():
        found = opened()
        length = (
            f"{len(found)} pairs"
            if part.kind == "training"
            else f"{len(found.queries)} queries, {len(found.gallery)} pictures in the gallery, "
        )
        assert f"{part}: {length}" in printed
    assert printed.count("\n  first: {") == len(PARTS[name][0] + PARTS[name][1])


def test_counts_are_those_of_the_annotations_whatever_is_missing(copied, capsys):
    root = copied("cirr")
    (root / "dev/dev-1-0-img1.png").unlink()
    (root / "cirr/captions/cap.rc2.train.json").unlink()
    printed, error = run(capsys, "cirr", "--root", root)
    assert error.startswith("1 of 3 parts of cirr cannot be opened")
    assert "training rc2/train: there is no file" in printed
    assert (
        "benchmark rc2/val: 2 queries, 8 pictures in the gallery, 2 answers, references taken out, subsets of 5\n"
        '  first: {"text": "Show 0 dogs", "id": "12060"}\n'
        f"  1 of 8 pictures are missing (first: dev-1-0-img1 in {root}/dev/dev-1-0-img1.png)\n"
    ) in printed
    assert "8 pictures in the gallery, no published answers" in printed
    with pytest.raises(FileNotFoundError, match="1 of 8 pictures are missing"):
        named_benchmark(f"cirr:{root}/rc2/val")
    (line, _) = counted(Part("benchmark", "coco", "val"), lambda: named_benchmark("circo/coco/val"))
    assert line.endswith("3 answers (1 to 2 of a query), 2 kinds of query")


# ---- checks ----


@pytest.mark.parametrize("name", PUBLISHED)
def test_whole_sets_have_no_faults(name, made):
    report = check(every_part(name, str(made / name)))
    assert not report.faults and report.rows and report.pictures


def changed(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def break_fashioniq(root):
    changed(
        root / "captions/cap.dress.val.json",
        lambda r: r.append({"candidate": "BDVA0", "captions": []}),
    )
    changed(root / "captions/cap.dress.val.json", lambda r: r.append({**r[0], "captions": ["one"]}))
    changed(root / "captions/cap.dress.val.json", lambda r: r.append({**r[0], "target": "BNONE"}))
    changed(root / "image_splits/split.dress.val.json", lambda r: r.append("BDVA1"))
    (root / "images/BDVA0.jpg").rename(root / "images/BDVA0.JPG")
    (root / "images/BDVA1.jpg").rename(root / "images/BDVA1.jpeg")
    (root / "images/BDVA4.jpg").unlink()
    (root / "images/BDVA3.jpg").write_bytes(b"no picture")
    shirts = root / "captions/cap.shirt.val.json"
    shirts.write_text(shirts.read_text()[: len(shirts.read_text()) // 2])
    (root / "captions/cap.toptee.val.json").write_text("[]")


def break_cirr(root):
    file = root / "cirr/captions/cap.rc2.val.json"
    changed(file, lambda r: r.append({**r[0], "caption": "again"}))
    changed(
        file, lambda r: r.append({**r[0], "pairid": 7, "img_set": {"members": ["dev-1-0-img1"]}})
    )
    changed(file, lambda r: r.append({**r[0], "pairid": "8"}))
    changed(file, lambda r: r.append({**r[0], "pairid": 9, "target_hard": "dev-9"}))
    (root / "dev/dev-6-0-img1.png").unlink()
    split = root / "cirr/image_splits/split.rc2.test1.json"
    split.write_text(split.read_text()[:-1] + ', "test1-0-0-img1": "./dev/dev-0-0-img1.png"}')


def break_circo(root):
    changed(root / "annotations/val.json", lambda r: r[0].update(target_img_id=100))
    changed(root / "annotations/val.json", lambda r: r[1].update(semantic_aspects=7))
    changed(root / "annotations/test.json", lambda r: r[1].update(id=0))
    changed(root / "annotations/test.json", lambda r: r[2].pop("shared_concept"))
    folder = root / "COCO2017_unlabeled"
    os.remove(folder / "unlabeled2017/000000000100.jpg")
    (folder / "unlabeled2017/000000000021.jpg").rename(folder / "unlabeled2017/000000000021.png")


def break_captions(root):
    changed(root / "dataset_coco.json", lambda r: r["images"][1]["sentences"][0].pop("raw"))
    changed(root / "dataset_coco.json", lambda r: r["images"].append(r["images"][2]))
    (root / "train2014").rename(root / "train")


def break_lxmert(root):
    file = root / "lxmert/mscoco_minival.json"
    changed(file, lambda r: r.append({**r[0], "sentf": {"mscoco": ["one", 2]}}))
    changed(file, lambda r: r.append(r[1]))
    for path in (root / "images/val2014").glob("*_000700000002.jpg"):
        path.rename(path.with_suffix(".JPG"))


def break_cc3m(root):
    with open(root / "validation.tsv", "a") as file:
        file.write("no tab\n\t\n")
    (root / "images/validation/validation_00009481").unlink()


def break_imagenet(root):
    record = {"img_id": "../1", "subject": "a", "attribute": "b"}
    changed(root / "blip_pairs.json", lambda r: r.extend([record, {"img_id": "00000002"}]))
    (root / "test/ILSVRC2012_test_00000001.JPEG").rename(
        root / "test/ILSVRC2012_test_00000001.jpeg"
    )


def break_openimages(root):
    with open(root / "open_images.ids", "a") as file:
        file.write("0312462f3202e152\nffffffffffffffff\n")
    (root / "test.pkl.txt").write_text("\n")


def break_atomic(root):
    (root / "AToMiC-Images-v0.2/data/train-00001-of-00002.parquet").unlink()


# name -> what breaks its folder, and the faults that a check must name, each once
BROKEN = {
    "fashioniq": (
        break_fashioniq,
        [
            "cap.dress.val.json: [2] has no 'target'",
            "cap.dress.val.json: [2] has 1 captions, expected 2",
            "cap.dress.val.json: the query 'dress-val-2' names 'BNONE', which the gallery lacks",
            "split.dress.val.json: 'BDVA1' is listed twice",
            "pictures: there is no BDVA0 in ROOT/images/BDVA0.jpg; BDVA0.JPG is there, rename it",
            "pictures: there is no BDVA1 in ROOT/images/BDVA1.jpg; BDVA1.jpeg is there",
            "pictures: there is no BDVA4 in ROOT/images/BDVA4.jpg",
            "(BDVA3): ROOT/images/BDVA3.jpg: cannot be read as a picture",
            "cap.shirt.val.json is not complete JSON",
            "cap.toptee.val.json is empty",
        ],
    ),
    "cirr": (
        break_cirr,
        [
            "cap.rc2.val.json: the query '12060' occurs twice",
            "cap.rc2.val.json: pair 7 has the group ['dev-1-0-img1'], expected 6 different",
            """cap.rc2.val.json: [4].pairid is "8", expected int""",
            "cap.rc2.val.json: the query '9' names 'dev-9', which the gallery lacks",
            "pictures: there is no dev-6-0-img1 in ROOT/dev/dev-6-0-img1.png",
            "split.rc2.test1.json has the name 'test1-0-0-img1' twice",
        ],
    ),
    "circo": (
        break_circo,
        [
            "val.json: the target of query 0 is none of its answers",
            "val.json: [1].semantic_aspects is 7, expected list",
            "test.json: the query '0' occurs twice",
            "test.json: [2] has no 'shared_concept'",
            "there is no 100 in ROOT/COCO2017_unlabeled/unlabeled2017/000000000100.jpg",
            "000000000021.jpg; 000000000021.png is there",
            "coco/val: pictures are missing; no queries are left",
        ],
    ),
    "coco": (
        break_captions,
        [
            "dataset_coco.json: images[1].sentences[0] has no 'raw'",
            "dataset_coco.json: '98' is listed twice",
            "training karpathy/train: pictures: there is no 100 in ROOT/train2014/train2014_0.jpg",
            "training karpathy/train: pictures: there is no 95 in ROOT/train2014/train2014_5.jpg",
        ],
    ),
    "coco-lxmert": (
        break_lxmert,
        [
            "mscoco_minival.json: [3].sentf.mscoco[1] is 2, expected str",
            "lxmert: 'COCO_val2014_000700000001' is listed twice",
            "2014_000700000002.jpg; COCO_val2014_000700000002.JPG is there, rename it",
        ],
    ),
    "cc3m": (
        break_cc3m,
        [
            "validation.tsv: line 5 is no caption, tab and id: 'no tab'",
            "validation.tsv: line 6 is no caption, tab and id",
            "there is no validation_00009481 in ROOT/images/validation/validation_00009481",
        ],
    ),
    "imagenet": (
        break_imagenet,
        [
            "blip_pairs.json: '../1' is no id of ImageNet, expected eight digits",
            "blip_pairs.json: [3] has no 'subject'",
            "blip_pairs.json: [3] has no 'attribute'",
            "there is no 00000001 in ROOT/test/ILSVRC2012_test_00000001.JPEG; ILSVRC2012_test_00000001.jpeg is there",
        ],
    ),
    "openimages": (
        break_openimages,
        [
            "open_images.ids: '0312462f3202e152' is listed twice",
            "there is no ffffffffffffffff in ROOT/images/ffffffffffffffff.jpg",
            "test.pkl.txt holds no dialogues",
        ],
    ),
    "atomic": (
        break_atomic,
        [
            "benchmark small/test: pictures: there is no uuid-7 in ROOT/AToMiC-Images-v0.2",
            "benchmark small/test: pictures: there is no uuid-8 in ROOT/AToMiC-Images-v0.2",
        ],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_check_names_every_fault_of_a_published_set(name, copied, capsys):
    change, wanted = BROKEN[name]
    root = copied(name)
    change(root)
    printed, error = run(capsys, name, "--root", root, "--check", "--dest", root.parent / "packed")
    faults = [line for line in printed.split("\n") if line.startswith("fault: ")]
    for each in wanted:
        found = [line for line in faults if each.replace("ROOT", str(root)) in line]
        assert len(found) == 1, (each, printed)
    assert len(faults) == len(wanted), faults
    assert re.fullmatch(rf"{name} has {len(faults)} faults, listed above", error)
    assert not (root.parent / "packed").exists()


def test_a_folder_that_is_not_there_is_one_fault(copied, capsys):
    root = copied("flickr30k")
    (root / "flickr30k-images").rename(root / "flickr30k_images")
    printed, _ = run(capsys, "flickr30k", "--root", root, "--check")
    faults = [line for line in printed.split("\n") if line.startswith("fault: ")]
    assert [re.search(r"(\d) of \1 pictures are missing", line) is not None for line in faults] == [
        True
    ] * 3


# ---- digests ----


def test_archives_count_by_their_files_and_changes_are_noticed(copied, tmp_path, monkeypatch):
    """The gallery of a collection is not read to know it again, and another one is not taken for it."""
    root = copied("atomic")
    opened = lambda: named_benchmark(f"atomic:{root}/large/test")
    pack("atomic", {Part("benchmark", "large", "test"): opened()}, tmp_path / "packed")
    packed = lambda: named_benchmark(f"atomic:{tmp_path}/packed/large/test")
    for make, file in (
        (opened, next(root.glob("AToMiC-Images*/data/*00001-of*"))),
        (packed, next((tmp_path / "packed/pictures").glob("*array_record*"))),
    ):
        found = make()
        unread = dataclasses.replace(found.gallery, read=None)
        before = content_digest(dataclasses.replace(found, gallery=unread))
        assert before == content_digest(make())
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert content_digest(make()) != before
