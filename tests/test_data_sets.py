"""What every published data set keeps to, on small folders in the original layouts."""

import dataclasses
import functools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from data_layouts import BENCHMARKS, LAYOUTS, TRAINING, UNLABELLED, paint
from pyarrow import parquet
from test_methods import drawn

from cir_jax.checkpoint import save_model
from cir_jax.config import Data, Evaluation, Run
from cir_jax.data import (
    PUBLISHED,
    atomic,
    circo,
    imagenet,
    named_benchmark,
    open_benchmark,
    published,
    training_set,
)
from cir_jax.data import tuning_benchmark as tuned
from cir_jax.data.columns import Columns
from cir_jax.data.documents import DocumentSpec
from cir_jax.data.images import ImageSpec, prepare
from cir_jax.data.published import Asked
from cir_jax.data.records import Gallery, open_gallery
from cir_jax.eval import check_run, evaluate
from cir_jax.evaluation.metrics import random_level
from cir_jax.methods.clip import ClipConfig
from cir_jax.model import Model
from cir_jax.retrieval import Queries
from cir_jax.train import training_batches
from cir_jax.workspace import Workspace

pytestmark = pytest.mark.usefixtures("at_home")


@functools.cache
def spec():
    return ImageSpec(size=32, resize="targetpad", convert_first=False)


def same(first, second):
    """Two raw values that are equal, arrays included."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return np.array_equal(first, second) if isinstance(first, np.ndarray) else first == second


def is_text(value):
    return type(value) is str


def check_side(side):
    """A query or an item can be prepared: a picture, and texts that are texts."""
    if "image" in side:
        pixels = prepare(side["image"], spec())
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.float32
    assert all(is_text(side[name]) for name in ("text", "document", "title") if name in side)
    assert all(map(is_text, (*side.get("texts", ()), *side.get("wordings", ()))))
    json.dumps({name: value for name, value in side.items() if name != "image"})


def test_every_registered_set_has_a_small_one():
    trained = {name for name, each in PUBLISHED.items() if each.pairs}
    asked = {name for name, each in PUBLISHED.items() if each.benchmark}
    assert LAYOUTS.keys() == PUBLISHED.keys() == trained | asked
    assert {name for name, _, _ in TRAINING} == trained
    assert {name.split("/")[0] for name in BENCHMARKS} == asked


def test_the_readme_lists_every_set():
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    table = readme.partition("\n## Data sets")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([\w-]+)`", "".join(rows))) == {*PUBLISHED, "captioned", "captions"}


@pytest.mark.parametrize("case", TRAINING, ids="/".join)
def test_training_sets(case):
    name, variant, split = case
    dataset = training_set(Data(name, variant=variant, split=split))
    assert len(dataset) == TRAINING[case] == len(list(dataset))
    assert same(dataset[-1], dataset[len(dataset) - 1]) and same(dataset[0], dataset[0])
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    for raw in dataset:
        assert raw.keys() == {"query", "item", "group"} and type(raw["group"]) is int
        assert raw["query"].keys() & {"text", "texts", "document"}
        check_side(raw["query"])
        check_side(raw["item"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks(name, made):
    found = named_benchmark(name)
    assert (len(found.queries), len(found.gallery)) == BENCHMARKS[name]
    assert len(set(found.ids)) == len(found.ids) and all(map(is_text, found.ids))
    assert found.gallery[-1]["id"] == found.ids[-1]
    asked = list(found.queries)
    assert len({query["id"] for query in asked}) == len(asked) == len(found.queries)
    for side in (*asked, *found.gallery):
        check_side(side)
    assert all(same(found.queries[row], query) for row, query in enumerate(asked))
    again = open_benchmark(found.name, found.variant, found.split)
    assert (again.ids, again.positives, again.exclude) == (
        found.ids,
        found.positives,
        found.exclude,
    )
    if name in UNLABELLED:
        assert not any(found.positives)
    else:
        assert all(found.positives) and random_level(found).keys() == set(found.metrics)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_galleries_are_opened_by_the_name_of_their_benchmark(name, made, monkeypatch):
    benchmark = named_benchmark(name)
    gallery = open_gallery(name)
    monkeypatch.delenv("CIR_JAX_DATA")
    again = open_gallery(json.loads(json.dumps(gallery.locator)))
    assert isinstance(again, Gallery) and list(again.ids) == benchmark.ids
    assert same(again[1], benchmark.gallery[1])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_root_can_be_given(name, made, monkeypatch):
    base, rest = name.split("/", 1)
    monkeypatch.setenv("CIR_JAX_DATA", "/nowhere")
    monkeypatch.chdir(made)
    full = f"{base}:./{base}/{rest}"
    found = named_benchmark(full)
    assert f"{found.name}/{found.variant}/{found.split}" == full
    few = named_benchmark(
        full.replace("/" + rest, f"/{rest.split('/')[0]}-first1/{rest.split('/')[1]}")
    )
    assert len(few.queries) == 1
    with pytest.raises(
        FileNotFoundError, match=rf"no folder /nowhere/{base} with {base}; say where"
    ):
        named_benchmark(name)
    if (name := tuned(full)) is not None:
        assert name.startswith(f"{base}:./{base}/") and len(named_benchmark(name).queries)


def test_where_a_set_is_looked_for(made, monkeypatch, tmp_path):
    monkeypatch.delenv("CIR_JAX_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no folder {tmp_path}/data/cirr"):
        training_set(Data("cirr"))
    os.symlink(made, tmp_path / "data")
    assert len(training_set(Data("cirr"))) == 2
    monkeypatch.chdir(made)
    assert len(training_set(Data("cirr", root="cirr"))) == 2


def test_training_reads_them(tiny_experiment, made):
    data = (Data("fashioniq"), Data("cirr", root=str(made / "cirr"), variant="rc2"))
    train = dataclasses.replace(tiny_experiment.train, batch_size=2)
    config = dataclasses.replace(tiny_experiment, data=data, train=train)
    batches = training_batches(config, 0)
    for _ in data:
        batch = next(batches)
        assert batch["query"]["image"].shape == batch["item"]["image"].shape == (2, 64, 64, 3)
        assert batch["query"]["text"].shape == (2, 24) and batch["item"]["group"].shape == (2,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fashioniq/dress-both/val", "cirr/rc2/val", "circo/coco/val", "atomic/small/test"]
)
def test_models_are_measured_on_them(name, made, tiny_experiment, tmp_path):
    """The whole of `eval`: both indexes where they can be tuned, results and a page."""
    model = drawn(ClipConfig.tiny(tiny_experiment.method.inputs), 0)
    save_model(tmp_path / "clip", model.config, model.params)
    base, rest = name.split("/", 1)
    run = Run(f"{base}:{made}/{base}/{rest}", str(tmp_path / "clip"))
    (row,) = evaluate(Evaluation((run,)), tmp_path / "out")
    assert row["metrics"].keys() == set(named_benchmark(name).metrics)
    assert row["benchmark"] == f"{base}:{made}/{base}" and (tmp_path / "out/report.html").is_file()
    if base == "circo":
        assert row["rules"]["viewpoint"]["queries"] == 2
        assert row["rules"]["addition"]["queries"] == 1


def test_nothing_is_measured_without_answers(made):
    run = Run("openimages/dialogues/test", "emoji_text")
    with pytest.raises(ValueError, match="answers of openimages/dialogues/test are not published"):
        check_run(run, Workspace())


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fashioniq/hat/val",
            "no variant 'hat'; expected dress or toptee or shirt, then any of -un",
        ),
        ("fashioniq/dress-onion/val", "no variant 'dress-onion'"),
        ("fashioniq/dressing/val", "no variant 'dressing'"),
        ("fashioniq/dress/dev", "no split 'dev'; there are train, val, test"),
        ("fashioniq/dress-union/test", "the union is of references and targets, and test has none"),
        ("coco/karpathy/restval", "no split 'restval'"),
        ("fashioniq/dress-both-reversed/val", "both orders include the reversed one; choose"),
        ("cirr/rc1/val", "no variant 'rc1'; expected rc2"),
        ("fashoniq/dress/val", "did you mean 'fashioniq'"),
        ("fashoniq:/x/dress/val", "did you mean 'fashioniq'"),
    ],
)
def test_unknown_parts_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        named_benchmark(name)


def test_a_set_without_training_pairs():
    with pytest.raises(ValueError, match="no data set is named 'circo'"):
        training_set(Data("circo"))


def test_missing_pictures_are_one_error_or_left_out(copied, capsys):
    root = copied("cirr")
    for number in (1, 7):
        (root / f"dev/dev-{number}-0-img1.png").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"2 of 8 pictures are missing \(first: dev-1-0-img1 in .*/dev/dev-1",
    ):
        named_benchmark(f"cirr:{root}/rc2/val")
    found = named_benchmark(f"cirr:{root}/rc2-available/val")
    assert "2 of 8 pictures are missing" in (told := capsys.readouterr().err)
    assert "1 of 2 queries are left out" in told
    assert len(found.gallery) == 6 and [query["id"] for query in found.queries] == ["12063"]
    assert found.ids[found.exclude[0]] == "dev-2-0-img1"
    assert [found.ids[row] for row in found.positives[0]] == ["dev-5-0-img1"]
    assert [found.ids[row] for row in found.subset[0]] == [f"dev-{n}-0-img1" for n in (3, 4, 5, 6)]
    (root / "train/34/train-1-0-img1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 pictures are missing"):
        training_set(Data("cirr", root=str(root)))
    assert len(training_set(Data("cirr", root=str(root), variant="rc2-available"))) == 1
    shutil.rmtree(root / "dev")
    with pytest.raises(
        FileNotFoundError, match=r"8 of 8 pictures are missing.*no queries are left"
    ):
        named_benchmark(f"cirr:{root}/rc2-available/val")


def test_one_of_the_best_targets_must_be_there():
    answerable = lambda targets, *there: published._answerable(Asked("q", {}, targets), there)
    assert answerable({"a": 1.0, "b": 1.0}, "b") and answerable({"a": 2.0, "b": 1.0}, "a")
    assert not answerable({"a": 2.0, "b": 1.0}, "b") and answerable({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[0].pop("caption"), r"\[0\] has no 'caption'"),
        (lambda r: r[1].update(pairid="1"), r'\[1\].pairid is "1", expected int'),
        (lambda r: r[1].update(caption="a\0b"), r"\[1\].caption is .*, which is no text"),
        (lambda r: r[1].update(caption="\ud800"), "which is no text"),
        (
            lambda r: r[1]["img_set"].update(members="x"),
            r'\[1\].img_set.members is "x", expected list',
        ),
        (lambda r: r[0]["img_set"]["members"].pop(), "pair 12060 has the group .* expected 6 diff"),
        (lambda r: r.__setitem__(0, 7), r"\[0\] is 7, expected dict"),
        (lambda r: r[1].update(pairid=12060), "the query '12060' occurs twice"),
        (
            lambda r: r[1].update(target_hard="x"),
            "the query '12063' names 'x', which the gallery lacks",
        ),
    ],
)
def test_annotations_of_another_form_are_refused(change, message, copied):
    root = copied("cirr")
    file = root / "cirr/captions/cap.rc2.val.json"
    records = json.loads(file.read_text())
    change(records)
    file.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message):
        named_benchmark(f"cirr:{root}/rc2/val")


def test_files_that_are_not_there_or_no_json(copied):
    root = copied("fashioniq")
    (root / "captions/cap.dress.val.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a JSON dict, expected a list"):
        named_benchmark(f"fashioniq:{root}/dress/val")
    (root / "captions/cap.dress.val.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*cap.dress.val.json; .*README.md says"):
        named_benchmark(f"fashioniq:{root}/dress/val")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "./dev/../../secret.png", "a\0"])
def test_paths_in_annotations_stay_inside(path, copied):
    root = copied("cirr")
    paint(root.parent, "secret.png")
    file = root / "cirr/image_splits/split.rc2.val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dev-1-0-img1": path}))
    with pytest.raises(ValueError, match=r"leads out of .*; refused|which is no text"):
        named_benchmark(f"cirr:{root}/rc2/val")


def test_links_of_files_stay_inside_and_folders_may_be_links(copied):
    root = copied("cirr")
    shutil.move(root / "dev", root.parent / "disk")
    os.symlink(root.parent / "disk", root / "dev")
    assert len(named_benchmark(f"cirr:{root}/rc2/val").gallery) == 8
    picture = root / "dev/dev-1-0-img1.png"
    shutil.move(picture, root.parent / "secret.png")
    os.symlink(root.parent / "secret.png", picture)
    with pytest.raises(ValueError, match=r"dev-1-0-img1.png leads out of .*secret.png; copy"):
        named_benchmark(f"cirr:{root}/rc2/val")


# ---- FashionIQ ----


def test_texts_of_fashioniq(made):
    texts = lambda variant: [q["text"] for q in named_benchmark(f"fashioniq/{variant}/val").queries]
    assert texts("dress") == ["Is red and is LONGER", " and has a collar"]
    assert texts("dress-reversed") == ["is LONGER and Is Red", "has a collar and "]
    assert texts("dress-plain") == ["Is Red. and  is LONGER, ", ". and has a collar?"]
    assert texts("dress-plain-reversed") == [" is LONGER,  and Is Red.", "has a collar? and ."]
    raw = training_set(Data("fashioniq"))[0]
    assert raw["query"]["texts"] == (
        "Is red and is LONGER",
        "Is longer and Is Red",
        "Is red",
        "Is longer",
    )


def test_both_orders_ask_by_their_mean(monkeypatch, tiny_experiment):
    """fti4cir.md 3: unit vectors of both texts, their mean made unit; a second stage reads one."""
    queries = named_benchmark("fashioniq/dress-both/val").queries
    assert queries[0]["wordings"] == ("Is red and is LONGER", "is LONGER and Is Red")
    assert queries[0]["text"] == "Is red and is LONGER"
    assert Queries(queries, 2)[0] == {key: queries[0][key] for key in ("image", "text")}

    def features(self, part, examples, *_):
        check_side(examples[0])
        seeds = [list(f"{each['image']}{each['text']}".encode()) for each in examples]
        vectors = np.stack([np.random.default_rng(seed).normal(size=5) for seed in seeds])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    monkeypatch.setattr(Model, "features", features)
    model = Model(ClipConfig.tiny(tiny_experiment.method.inputs), None, None)
    asked = list(Queries(queries, 1))
    found = model.encode("query", asked)
    one = [
        model.encode(
            "query",
            [{**q, "text": q["wordings"][n]} | {"wordings": [q["wordings"][n]]} for q in asked],
        )
        for n in (0, 1)
    ]
    mean = (one[0] + one[1]) / 2
    assert np.allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-12)
    assert not np.allclose(found, one[0], atol=1e-2)
    with pytest.raises(ValueError, match="some queries have `wordings` and some have not"):
        model.encode("query", [asked[0], {"text": "x"}])


def test_layouts_of_fashioniq(copied):
    root = copied("fashioniq")
    (root / "dress").mkdir()
    for path in (root / "images").glob("BDVA*"):
        shutil.move(path, root / "dress")
    shutil.move(root / "dress/BDVA2.jpg", root / "images/BDVA2.png")
    found = named_benchmark(f"fashioniq:{root}/dress/val")
    assert [os.path.relpath(item["image"], root) for item in found.gallery][1:3] == [
        "dress/BDVA1.jpg",
        "images/BDVA2.png",
    ]
    assert found.queries[0]["image"] == found.gallery[0]["image"] and not found.exclude


# ---- CIRR and CIRCO ----


def test_cirr_takes_its_reference_out_and_ranks_five_others():
    found = named_benchmark("cirr/rc2/val")
    assert found.exclude == [1, 2]
    assert [[found.ids[row][4] for row in rows] for rows in found.subset] == [
        ["0", "2", "3", "4", "5"],
        ["1", "3", "4", "5", "6"],
    ]
    assert found.queries[0]["id"] == "12060" and found.queries[0]["text"] == "Show 0 dogs"


def test_layouts_of_cirr(copied):
    root = copied("cirr")
    (root / "cirr/img_raw").mkdir()
    shutil.move(root / "dev", root / "cirr/img_raw/dev")
    assert "/img_raw/" in named_benchmark(f"cirr:{root}/rc2/val").gallery[0]["image"]


def test_circo_has_several_answers_and_aspects(monkeypatch):
    found = named_benchmark("circo/coco/val")
    assert found.ids == ["3", "8", "21", "7", "100", "581929"] and not found.exclude
    assert found.positives[0] == {2: 2.0, 3: 1.0}
    assert found.rules == [("addition", "viewpoint"), ("viewpoint",)]
    concept = named_benchmark("circo/coco-concept/val")
    assert [found.queries[0]["text"], concept.queries[0]["text"]] == [
        "is red",
        "find a kite but is red",
    ]
    assert tuned("circo/coco/test") == "circo/coco/val" and tuned("circo/coco/val") is None
    monkeypatch.setattr(circo, "GALLERY", 123_403)
    with pytest.raises(ValueError, match=re.escape("lists 6 pictures, expected all 123,403")):
        named_benchmark("circo/coco/val")


# ---- captions ----


def test_captions_are_rows_and_share_the_group_of_their_picture():
    found = training_set(Data("coco"))
    assert [raw["group"] for raw in found] == [0] * 6 + [1] * 5 + [2] * 5
    assert found[0]["query"]["text"] == "A train picture, said 0 times."
    assert found[6]["query"]["text"].startswith("A restval"), "restval belongs to train"
    benchmark = named_benchmark("coco/karpathy/test")
    assert benchmark.ids == ["98", "96"] and benchmark.positives == [{0: 1.0}] * 6 + [{1: 1.0}] * 6
    assert [query["id"] for query in benchmark.queries][:2] == ["20", "21"]
    assert named_benchmark("flickr30k/karpathy/test").ids[0] == "flickr30k-images_2"


def test_sentences_of_lxmert_in_the_order_of_files_and_sources():
    found = named_benchmark("coco-lxmert/vqa+mscoco/nominival+train")
    first = found.queries[0]
    assert first["id"] == "COCO_val2014_000900000000:vqa:0" and first["text"] == "What is it?"
    assert found.queries[1]["id"] == "COCO_val2014_000900000000:mscoco:0"
    assert found.ids[3].startswith("COCO_train2014_")
    assert found.gallery[3]["image"].endswith(f"/images/train2014/{found.ids[3]}.jpg")
    vg = training_set(Data("coco-lxmert", variant="vg", split="vgnococo"))
    assert vg[0]["item"]["image"].endswith("/vg/7.jpg")
    with pytest.raises(ValueError, match=r"no source 'vgg'; there are mscoco, vg, .* joined by \+"):
        named_benchmark("coco-lxmert/vgg/minival")
    with pytest.raises(ValueError, match="no split 'val'; there are train, nominival, minival"):
        named_benchmark("coco-lxmert/mscoco/minival+val")
    assert tuned("coco-lxmert/mscoco/minival") is None


# ---- AToMiC ----


def test_topics_and_rows_of_atomic():
    topics, rows = named_benchmark("atomic/small/test"), named_benchmark("atomic/base-rows/test")
    assert topics.ids == ["uuid-6", "uuid-7", "uuid-8"], "in the order of the collection"
    assert topics.positives == [{2: 1.0, 1: 1.0}, {0: 1.0}]
    assert [query["id"] for query in topics.queries] == ["projected-8", "projected-6"]
    assert topics.queries[1] == {
        "id": "projected-6",
        "title": "Harbour 6",
        "section": "Introduction",
        "document": "The Harbour of Number 6 lies in New York.",
    }
    assert rows.positives == [{8: 1.0}, {6: 1.0}, {7: 1.0}]
    assert [query["id"] for query in rows.queries] == ["0", "1", "2"]
    assert rows.queries[0]["document"] == rows.queries[2]["document"]
    pictures = [prepare(item["image"], spec()).mean() for item in rows.gallery]
    assert len(set(pictures)) == 9


def test_what_asks_for_pictures_of_atomic():
    text = lambda variant, row: training_set(Data("atomic", variant=variant))[row]["query"]["text"]
    assert text("", 1) == "Harbour 1 Introduction The Harbour of Number 1 lies in New York."
    assert text("entities", 2) == "New York row 1" and text("summaries", 3) == "Summary 2"
    assert "New York" in text("entities-builtin", 0)
    assert [raw["group"] for raw in training_set(Data("atomic"))] == [0, 1, 2, 3]


def test_rows_without_entities_ask_by_their_summary_or_title(copied):
    root = copied("atomic")
    entities = root / "atomic_train_entities.json"
    entities.write_text(json.dumps([[], ["a"], [], ["b"]]))
    texts = lambda: [
        raw["query"]["text"]
        for raw in training_set(Data("atomic", root=str(root), variant="entities"))
    ]
    assert texts() == ["Summary 0", "a", "Summary 1", "b"]
    (root / "atomic_train_summaries.json").unlink()
    assert texts() == ["Harbour 0", "a", "Harbour 1", "b"]


def test_extracts_of_cfir_serve_the_benchmark(made, tmp_path):
    atomic.write_extracts(made / "atomic", "test", tmp_path / "x.jsonl")
    document = DocumentSpec(source=str(tmp_path / "x.jsonl"))
    asked = Queries(named_benchmark("atomic/small/test").queries, 1, document)
    assert asked[0] == {"texts": ["New York", "row 8"]}
    atomic.write_extracts(made / "atomic", "test", tmp_path / "rows.jsonl", rows=True)
    document = DocumentSpec(source=str(tmp_path / "rows.jsonl"))
    asked = Queries(named_benchmark("atomic/small-rows/test").queries, 2, document)
    assert asked[1] == {"text": "Summary 6"}


def test_faults_of_atomic(copied, capsys):
    root = copied("atomic")
    (root / "AToMiC-Images-v0.2/data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 3 pictures are missing \(first: uuid-"):
        named_benchmark(f"atomic:{root}/small/test")
    few = named_benchmark(f"atomic:{root}/small-available/test")
    base = named_benchmark(f"atomic:{root}/base-available/train")
    assert len(base.gallery) == 7 and len(base.queries) == 3
    assert few.ids == ["uuid-6"] and [q["id"] for q in few.queries] == ["projected-6"]
    assert "1 of 2 queries are left out" in capsys.readouterr().err
    (root / "atomic_test_entities.json").write_text("[[]]")
    with pytest.raises(ValueError, match="has 1 entries for 3 rows of the qrels"):
        training_set(Data("atomic", root=str(root), split="test", variant="entities-available"))
    shutil.rmtree(root / "AToMiC-Texts-v0.2.1")
    with pytest.raises(FileNotFoundError, match=r"no .*/data/train-\*.parquet; download AToMiC-T"):
        named_benchmark(f"atomic:{root}/small-available/test")


def test_columns_are_rows_at_random(tmp_path):
    rows = [{"id": f"k{n}", "n": n, "more": [n]} for n in range(20)]
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for file, part in zip(files, (rows[:11], rows[11:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), file, row_group_size=4)
    found = Columns(files, "id", ["n", "more"])
    assert list(found) == [row["id"] for row in rows] and len(found) == 20
    for n in np.random.default_rng(0).permutation(20):
        assert found[f"k{n}"] == {"n": n, "more": [n]}
    assert list(Columns(files, "id", ["n"], {"k12", "k3", "other"})) == ["k3", "k12"]
    with pytest.raises(KeyError):
        found["k20"]
    with pytest.raises(ValueError, match=r"a.parquet has no column m; it has id, n, more"):
        Columns(files, "id", ["m"])
    with pytest.raises(ValueError, match="has no texts in n, expected ids"):
        Columns(files, "n", ["id"])
    with pytest.raises(ValueError, match="has the id 'k0' twice"):
        Columns([*files, files[0]], "id", ["n"])
    files[1].write_bytes(files[1].read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"b.parquet cannot be read as parquet: "):
        Columns(files, "id", ["n"])


# ---- Conceptual Captions, ImageNet, Open Images ----


def test_captions_of_cc3m(copied):
    found = named_benchmark("cc3m/tsv/val")
    assert found.positives == [{0: 1.0}, {0: 1.0}, {1: 1.0}, {2: 1.0}]
    assert found.queries[1]["id"] == "val-4" and found.ids[0] == "validation_00009480"
    assert found.queries[0]["text"] == "a validation of validation_00009480"
    root = copied("cc3m")
    (root / "validation.tsv").write_text("a caption\n")
    with pytest.raises(
        ValueError, match=r"validation.tsv has another form.*\n  line 1 is no caption, tab"
    ):
        named_benchmark(f"cc3m:{root}/tsv/val")


def test_captions_of_imagenet(copied):
    found = training_set(Data("imagenet", split="test"))
    assert [raw["query"]["text"] for raw in found] == [
        "a brown dog | laying on the grass",
        "a close up of a dog |",
    ]
    assert found[1]["item"]["image"].endswith("/test/ILSVRC2012_test_00000003.JPEG")
    with pytest.raises(ValueError, match="no split 'train'; there are test"):
        training_set(Data("imagenet"))
    root = copied("imagenet")
    records = [{"img_id": "../1", "subject": "a", "attribute": "b"}]
    (root / "blip_pairs.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"'../1' is no id of ImageNet, expected eight digits"):
        training_set(Data("imagenet", root=str(root), split="test"))


def tagger(*nouns):
    return lambda text: [(word, "NOUN" if word in nouns else "X") for word in text.split()]


@pytest.mark.parametrize(
    ("caption", "nouns", "released", "fixed"),
    [
        ("a brown dog laying on the grass", ["dog"], ("a brown dog", "laying on the grass"), ...),
        (
            "two people riding bikes in the park park park",
            ["people", "bikes", "park"],
            ("two people", "riding bikes in the park"),
            ...,
        ),
        ("a dog dog dog dog", ["dog"], None, None),
        ("a close up of a dog", ["dog"], ("a close up of a dog", ""), None),
        (
            "running very fast today",
            [],
            ("ru", "nning very fast today"),
            ("running very", "fast today"),
        ),
        ("the red car", ["car"], None, None),
        ("", [], None, None),
    ],
)
def test_subjects_and_attributes_by_the_specification(caption, nouns, released, fixed):
    """fti4cir.md 2.2, golden cases, and what is sensible instead."""
    tag = tagger(*nouns)
    assert imagenet.split_caption(caption, tag) == released
    assert imagenet.split_caption(caption, tag, "fixed") == (released if fixed is ... else fixed)


def test_captions_become_pairs_that_train(copied):
    root = copied("imagenet")
    said = {"00000001": "the red car", "00000002": "a brown dog laying on the grass"}
    imagenet.write_pairs(root / "blip_pairs.json", said, tagger("dog"))
    found = training_set(Data("imagenet", root=str(root), split="test"))
    assert [raw["query"]["text"] for raw in found] == ["a brown dog | laying on the grass"]
    assert found[0]["item"]["image"].endswith("_00000002.JPEG")
    with pytest.raises(ValueError, match="mode is 'other'; expected released or fixed"):
        imagenet.split_caption("a", tagger(), "other")


def test_dialogues_of_openimages(copied):
    texts = lambda variant: [
        q["text"] for q in named_benchmark(f"openimages/{variant}/train").queries
    ]
    assert texts("dialogues") == ["hi\thow are you ?\tfine", "bye\tbye"]
    assert texts("dialogues-context") == ["hi\thow are you ?", "bye"]
    found = named_benchmark("openimages/dialogues/train")
    assert [query["id"] for query in found.queries] == ["0", "2"], "the places of their lines"
    assert found.ids[0] == "0312462f3202e152", "in the order of the list"
    root = copied("openimages")
    (root / "open_images.ids").unlink()
    assert named_benchmark(f"openimages:{root}/dialogues/test").ids == sorted(found.ids)
    (root / "test.pkl.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"test.pkl.txt holds no dialogues"):
        named_benchmark(f"openimages:{root}/dialogues/test")
    with pytest.raises(ValueError, match="the response of val and test is not in their files"):
        named_benchmark("openimages/dialogues-context/test")
