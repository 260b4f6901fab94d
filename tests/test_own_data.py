"""Data of one's own: tables, training sets, benchmarks, fine-tuning, and smaller versions of them."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from test_methods import INPUTS, drawn

import cir_jax
from cir_jax.checkpoint import save_model
from cir_jax.config import Data, Evaluation, Experiment, Optim, Run, Train
from cir_jax.data import (
    benchmark_parts,
    limited_name,
    named_benchmark,
    open_benchmark,
    own,
    training_set,
)
from cir_jax.data.augment import Changes
from cir_jax.data.benchmark import Benchmark, first_rows, limited
from cir_jax.data.pipeline import train_batches
from cir_jax.data.records import open_gallery
from cir_jax.data.tables import read_table, string, strings
from cir_jax.eval import evaluate, with_limit, with_variants
from cir_jax.evaluation import metrics
from cir_jax.evaluation.runs import measure
from cir_jax.fine_tuning import fine_tune
from cir_jax.methods.blip_itm import BlipItmConfig
from cir_jax.methods.clip import ClipConfig
from cir_jax.train import train, training_batches
from cir_jax.training import optim
from cir_jax.training.checks import check_experiment
from cir_jax.training.step import make_init
from cir_jax.training.warm_start import warm_start
from cir_jax.training.workdir import prepare_workdir
from cir_jax.typed import portable
from cir_jax.workspace import content_digest

README = Path(__file__).resolve().parents[1] / "README.md"
FORMATS = ("jsonl", "csv", "parquet")
ROWS = [
    {"image": "a.png", "text": 'red, "very" red', "ids": ["x", "y"]},
    {"image": "b.png", "text": "blau\nund grün", "ids": ["z"]},
    {"image": "c.png", "text": None, "ids": None},
]


def write(path, rows):
    """Rows as the table that the suffix of a path says; lists are joined by `|` in a CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        filled = [{name: row.get(name) for name in columns} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(filled), path)
    else:
        joined = lambda value: "|".join(value) if isinstance(value, list) else value
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows({name: joined(row[name]) for name in row} for row in rows)
    return path


def paint(folder, *names, size=40):
    """Pictures of one colour each, drawn from their names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng(list(name.encode())).integers(0, 256, 3)
        Image.fromarray(np.full((size, size, 3), colour, np.uint8)).save(folder / name)


# ---- tables ----


@pytest.mark.parametrize("suffix", FORMATS)
def test_three_formats_give_the_same_rows(suffix, tmp_path):
    table = read_table(write(tmp_path / f"x.{suffix}", ROWS))
    found = [
        {**row.values, "ids": strings(row.values["ids"], "|" if suffix == "csv" else "")}
        for row in table
    ]
    assert found == [{**row, "ids": row["ids"] or []} for row in ROWS]
    where = "row" if suffix == "parquet" else "line"
    first = 2 if suffix == "csv" else 1
    assert table[1].place == f"{tmp_path}/x.{suffix}, {where} {first + 1}"


def test_places_are_lines_also_behind_line_breaks_in_cells(tmp_path):
    (tmp_path / "x.csv").write_text('image,text\na,"1\n2"\n\nb,3\n')
    assert [row.place.rpartition(", ")[2] for row in read_table(tmp_path / "x.csv")] == [
        "line 2",
        "line 5",
    ]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(suffix, tmp_path):
    path = write(tmp_path / f"x.{suffix}", ROWS[:1])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_table(path)[0].values["image"] == "a.png"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"x.jsonl, line 2 is not JSON"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', r"line 2 is no JSON object"),
        ("x.jsonl", b'{"a": 1, "a": 2}\n', r"line 1 is not JSON: .*'a' twice"),
        ("x.jsonl", b"[" * 100_000, r"line 1 is not JSON"),
        ("x.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"line 1 is not JSON"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\0"}\n', r"line 2 holds a NUL byte"),
        ("x.jsonl", b"{}\n{}\n\xff\n", r"is not UTF-8: line 3"),
        ("x.jsonl", b" \n\n", r"x.jsonl is empty"),
        ("x.jsonl", b"", r"x.jsonl is empty"),
        ("x.csv", b"", r"x.csv is empty"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", r"line 3 has 3 cells, the header 2 \(a, b\)"),
        ("x.csv", b"a,b\n1\n", r"line 2 has 1 cells, the header 2"),
        ("x.csv", b"a,a\n1,2\n", r"line 1 has the column 'a' twice"),
        ("x.csv", b"a,\n1,2\n", r"line 1 has a column without a name"),
        ("x.csv", b"a,b\n1,\0\n", r"line 2 holds a NUL byte"),
        ("x.csv", b'a,b\n1,2\n1,"2\n3,4\n', r"line 3 cannot be read as CSV: unexpected end"),
        ("x.csv", b"a,b\n1," + b"x" * 200_000, r"line 2 cannot .*field limit.*as .jsonl"),
        ("x.csv", "ä\n".encode("utf-16"), r"x.csv is not UTF-8: line 1"),
        ("x.parquet", b"", r"x.parquet cannot be read as parquet"),
        ("x.parquet", b"PAR1" + b"x" * 50 + b"PAR1", r"x.parquet cannot be read as parquet"),
        ("x.tsv", b"a\tb\n", r"no table; expected a file that ends in .jsonl, .csv, .parquet"),
    ],
)
def test_a_faulty_table_is_one_error_with_its_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_folder_or_nothing_is_no_table(suffix, tmp_path):
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        read_table(tmp_path / f"folder.{suffix}")
    with pytest.raises(FileNotFoundError, match=f"there is no file .*x.{suffix}"):
        read_table(tmp_path / f"x.{suffix}")


def test_parquet_damaged_anywhere_is_refused_or_read(tmp_path):
    path = write(tmp_path / "x.parquet", ROWS * 20)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="it is damaged, make it again"):
        read_table(path)
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            read_table(path)
        except ValueError as error:
            assert "x.parquet" in str(error)


def test_without_pyarrow_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'cir_jax\[parquet\]'"):
        read_table(path)


def test_cells_as_text():
    assert [string(x) for x in (3, 2.5, " a ", "", " ", None)] == ["3", "2.5", "a", *[None] * 3]
    assert strings([1, "b"]) == ["1", "b"] and strings("a|b") == ["a|b"]
    assert strings("a| b", "|") == ["a", "b"] and strings(None) == strings("") == []
    for wrong in (True, {}, [], float("nan"), b"x", "a\0", "\ud800"):
        with pytest.raises(ValueError):
            string(wrong)
    for wrong in ("a||b", "|"):
        with pytest.raises(ValueError, match="no empty entry"):
            strings(wrong, "|")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_gallery_may_be_any_table(suffix, tmp_path):
    rows = [{"image": "a.png", "id": "1", "text": "one"}, {"image": "b/c.png", "id": None}]
    rows[1]["text"] = None
    gallery = open_gallery(write(tmp_path / f"list.{suffix}", rows))
    assert list(gallery.ids) == ["1", "b/c.png"]
    assert gallery[0] == {"image": str(tmp_path / "a.png"), "id": "1", "text": "one"}


# ---- training sets ----

PAIRS = [
    {"image": "a.png", "text": "red"},
    {"image": "sub/b.png", "text": 7},
    {"image": "./a.png", "text": "crimson"},
]
TRIPLETS = [
    {"reference": "a.png", "text": "bluer", "target": "sub/b.png"},
    {"reference": "sub/b.png", "text": "redder", "target": "a.png"},
    {"reference": "c.png", "text": "less", "target": "sub/b.png"},
]


@pytest.fixture
def shop(tmp_path):
    paint(tmp_path / "shop", "a.png", "sub/b.png", "c.png")
    return tmp_path / "shop"


@pytest.mark.parametrize("suffix", FORMATS)
def test_pairs_and_triplets(suffix, shop):
    rows = [{**row, "text": str(row["text"])} for row in PAIRS]
    found = training_set(Data("pairs", root=str(write(shop / f"pairs.{suffix}", rows))))
    a, b, c = (str(shop / name) for name in ("a.png", "sub/b.png", "c.png"))
    assert [each["query"] for each in found] == [
        {"texts": (text,)} for text in ("red", "7", "crimson")
    ]
    assert [each["item"] for each in found] == [{"image": path} for path in (a, b, a)]
    assert [each["group"] for each in found] == [0, 1, 0], "several captions share a group"
    found = training_set(Data("triplets", root=str(write(shop / f"t.{suffix}", TRIPLETS))))
    assert found[2] == {
        "query": {"image": c, "text": "less"},
        "item": {"image": b},
        "group": 0,
    }
    assert [each["group"] for each in found] == [0, 1, 0]


def test_numbers_become_texts(shop):
    found = training_set(Data("pairs", root=str(write(shop / "x.jsonl", PAIRS))))
    assert found[1]["query"] == {"texts": ("7",)}


def test_paths_are_relative_to_the_table_wherever_one_stands(shop, monkeypatch):
    write(shop / "x.csv", PAIRS)
    monkeypatch.chdir(shop.parent)
    found = training_set(Data("pairs", root="shop/x.csv"))
    monkeypatch.chdir("/")
    assert Path(found[0]["item"]["image"]).is_file()


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("pairs", [{"image": "a.png", "caption": "x"}], r"no column text; it has image, caption"),
        ("pairs", [], r"x.csv has no rows"),
        ("pairs", [*PAIRS, {"image": "a.png", "text": " "}], r"line 5: `text` is empty"),
        ("pairs", [{"image": "", "text": "x"}], r"line 2: `image` is empty"),
        ("pairs", [{"image": "../x.png", "text": "x"}], r"\.\./x.png leads out of .*shop; put"),
        ("pairs", [{"image": "link.png", "text": "x"}], r"link.png leads out of .*secret.png"),
        ("pairs", [{"image": "no.png", "text": "x"}], r"line 2: there is no picture .*no.png"),
        ("pairs", [{"image": "sub", "text": "x"}], r"line 2: there is no picture .*sub"),
        ("triplets", PAIRS, r"no column reference, target; it has image, text"),
        ("triplets", [{**TRIPLETS[0], "target": ""}], r"line 2: `target` is empty"),
    ],
)
def test_faults_of_training_tables(name, rows, message, shop):
    paint(shop.parent, "secret.png")
    os.symlink(shop.parent / "secret.png", shop / "link.png")
    path = write(shop / "x.csv", rows)
    if not rows:
        path.write_text("image,text\n")
    with pytest.raises(ValueError, match=message):
        training_set(Data(name, root=str(path)))


def test_many_faults_are_one_message_with_the_first_five(shop):
    rows = [{"image": f"{number}.png", "text": "x"} for number in range(8)]
    rows[2] = {"image": "a.png", "text": True}
    with pytest.raises(ValueError) as error:
        training_set(Data("pairs", root=str(write(shop / "x.jsonl", rows))))
    lines = str(error.value).splitlines()
    assert len(lines) == 7 and lines[-1] == "  and 3 more"
    assert "line 3: `text` is True, expected text" in lines[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"pairs needs a table; give its path, as Data\('pairs', root="),
        ({"root": "x.csv", "split": "val"}, r"x.csv is one set of pairs and has no split 'val'"),
        ({"root": "x.csv", "variant": "noto"}, r"has no variant 'noto'"),
    ],
)
def test_a_table_is_all_there_is_to_choose(options, message):
    with pytest.raises(ValueError, match=message):
        training_set(Data("pairs", **options))


def test_pictures_from_files_are_augmented_like_arrays(shop):
    """A path, its bytes and its pixels give the same batch, and augmentation changes it."""
    path = shop / "a.png"
    pixels = np.asarray(Image.open(path).convert("RGB").resize((INPUTS.image.size,) * 2))
    batches = []
    for image, augmented in ((str(path), True), (path.read_bytes(), True), (pixels, True)):
        raw = {"query": {"texts": ("red",)}, "item": {"image": image}, "group": 0}
        options = {"batch_size": 2, "seed": 3, "changes": Changes(augmented)}
        batches.append(next(train_batches([[raw] * 4], [1], INPUTS, **options)))
    plain = next(train_batches([[raw] * 4], [1], INPUTS, **options | {"changes": Changes(False)}))
    for batch in batches[1:]:
        jax.tree.map(np.testing.assert_array_equal, batch, batches[0])
    assert np.abs(plain["item"]["image"] - batches[0]["item"]["image"]).max() > 0.01


def test_first_rows():
    assert list(first_rows([1, 2, 3], 2)) == [1, 2]
    assert [len(first_rows([1, 2, 3], limit)) for limit in (0, 1, 3, 9)] == [3, 1, 3, 3]


# ---- benchmarks ----

GALLERY = [f"{name}.png" for name in "abcdef"]
QUERIES = [
    {"text": "x", "targets": ["b.png", "c.png"], "subset": ["a.png", "b.png", "d.png"]},
    {"text": "y", "reference": "a.png", "targets": ["d.png"], "subset": ["d.png", "a.png"]},
    {"image": "ask.png", "targets": ["f.png"], "subset": ["f.png"], "rule": "plain", "id": "q"},
]


@pytest.fixture
def bench(tmp_path):
    paint(tmp_path / "bench", "ask.png", *(f"gallery/{name}" for name in GALLERY))
    return tmp_path / "bench"


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_benchmark_in_a_folder(suffix, bench):
    write(bench / f"queries.{suffix}", QUERIES)
    found = own.benchmark(str(bench))
    assert (found.name, found.variant, found.split) == (str(bench), "own", "all")
    assert list(found.ids) == GALLERY
    assert found.positives == [{1: 1.0, 2: 1.0}, {3: 1.0}, {5: 1.0}]
    assert list(found.exclude) == [-1, 0, -1]
    assert list(found.subset) == [[0, 1, 3], [3, 0], [5]]
    assert list(found.rules) == ["other", "other", "plain"]
    assert found.metrics == (*Benchmark.metrics, "subset_recall@1")
    asked = [{"text": "x", "id": "0"}]
    asked += [{"text": "y", "image": str(bench / "gallery/a.png"), "id": "1"}]
    asked += [{"image": str(bench / "ask.png"), "id": "q"}]
    assert list(found.queries) == asked


def test_recall_and_subset_recall_by_hand(bench):
    write(bench / "queries.jsonl", QUERIES)
    # Query 0: c (right, outside the subset), a (wrong, in it), b. Query 1: its reference, then d.
    rows = np.array([[2, 0, 1, 3, 4, 5], [0, 3, 1, 2, 4, 5], [4, 5, 0, 1, 2, 3]])
    found = metrics.evaluate(rows, own.benchmark(str(bench)))
    assert found["recall@1"] == pytest.approx(2 / 3)
    assert found["subset_recall@1"] == pytest.approx(2 / 3)
    assert found["mrr"] == pytest.approx((1 + 1 + 1 / 2) / 3)


def test_a_benchmark_with_the_least(bench):
    write(bench / "queries.csv", [{"text": "x", "targets": "b.png"}])
    found = own.benchmark(f"{bench}/")
    assert found.name == str(bench)
    assert (found.exclude, found.subset, found.rules) == ((), (), ())
    assert found.metrics == Benchmark.metrics


@pytest.mark.parametrize("suffix", [*FORMATS, "txt"])
def test_the_gallery_may_be_a_list(suffix, bench):
    rows = [{"image": f"gallery/{name}", "id": name[0]} for name in GALLERY]
    if suffix == "txt":
        (bench / "gallery.txt").write_text("\n".join(row["image"] for row in rows))
    else:
        write(bench / f"gallery.{suffix}", rows)
    target = "gallery/b.png" if suffix == "txt" else "b"
    write(bench / "queries.jsonl", [{"text": "x", "targets": [target]}])
    assert own.benchmark(str(bench)).positives == [{1: 1.0}]
    (bench / "gallery/c.png").unlink()
    with pytest.raises(ValueError, match=r"gallery.\w+ cannot be searched:\n.*no picture .*c.png"):
        own.benchmark(str(bench))


def test_documents_are_queries(bench):
    write(bench / "queries.jsonl", [{"document": "A long text.", "targets": ["a.png"]}])
    assert own.benchmark(str(bench)).queries == [{"document": "A long text.", "id": "0"}]


GOOD = {"text": "x", "targets": ["a.png"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**GOOD, "targets": ["z.png"]}], r"`targets` names 'z.png', .* the 6 ids .*'a.png', 'b"),
        ([{**GOOD, "reference": "z"}], r"`reference` names 'z'"),
        ([{**GOOD, "subset": ["z"]}], r"`subset` names 'z'"),
        ([GOOD, {"text": "x", "targets": []}], r"line 2: has no `targets`"),
        ([{"text": "x"}], r"no column targets; it has text"),
        ([{"targets": ["a.png"]}], r"line 1: asks nothing"),
        ([{**GOOD, "image": "no.png"}], r"there is no picture .*no.png"),
        ([{**GOOD, "image": "../x.png"}], r"leads out"),
        ([{**GOOD, "image": "ask.png", "reference": "b.png"}], r"has `image` and `reference`"),
        ([{**GOOD, "reference": ["b.png", "c.png"]}], r"several references"),
        ([{**GOOD, "reference": "a.png"}], r"its `reference` among its `targets`"),
        ([{**GOOD, "id": 1}, {**GOOD, "id": "1"}], r"line 2: the id '1' occurs twice"),
        ([{**GOOD, "subset": ["b.png"]}], r"none of its `targets` in its `subset`"),
        ([{**GOOD, "subset": ["a.png"]}, GOOD], r"line 2: has none of its `targets`"),
        ([GOOD, {"document": "x", "targets": ["a.png"]}], r"line 1: has no `document`"),
        ([{**GOOD, "targets": [None]}], r"`targets` is \[None\], expected no empty entry"),
        ([{**GOOD, "targets": {}}], r"`targets` is \{\}, expected text"),
        ([{**GOOD, "text": ["x"]}], r"`text` is \['x'\], expected text"),
    ],
)
def test_faults_of_queries(rows, message, bench):
    write(bench / "queries.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        own.benchmark(str(bench))


def test_several_faults_of_queries_are_one_error(bench):
    write(bench / "queries.jsonl", [{**GOOD, "targets": [str(n)]} for n in range(7)])
    with pytest.raises(ValueError, match=r"queries.jsonl cannot be asked:\n.*line 1: .*") as error:
        own.benchmark(str(bench))
    assert str(error.value).endswith("and 2 more")


def test_what_a_folder_must_hold(bench):
    with pytest.raises(FileNotFoundError, match=r"has no queries; expected one of queries.jsonl"):
        own.benchmark(str(bench))
    write(bench / "queries.jsonl", [GOOD])
    write(bench / "queries.csv", [GOOD])
    with pytest.raises(ValueError, match=r"has queries.jsonl and queries.csv; remove all but one"):
        own.benchmark(str(bench))
    (bench / "queries.csv").unlink()
    (bench / "gallery").rename(bench / "pictures")
    with pytest.raises(FileNotFoundError, match=r"has no gallery; expected a folder of pictures"):
        own.benchmark(str(bench))
    with pytest.raises(FileNotFoundError, match="no folder"):
        own.benchmark(str(bench / "none"))


def test_names_of_benchmarks(bench, monkeypatch):
    write(bench / "queries.jsonl", QUERIES)
    monkeypatch.chdir(bench.parent)
    for name in ("bench", "./bench/", "bench/own/all", str(bench)):
        found = named_benchmark(name)
        again = named_benchmark(f"{found.name}/{found.variant}/{found.split}")
        assert (again.name, again.positives) == (found.name, found.positives)
    (bench.parent / "emoji-text/noto/test").mkdir(parents=True)
    assert named_benchmark("emoji-text/noto/test").name == "emoji-text"
    assert benchmark_parts("./emoji-text/noto/test") == ("emoji-text/noto/test", "own", "all")
    assert named_benchmark("bench/own-first2/all").variant == "own-first2"
    with pytest.raises(ValueError, match=r"no benchmark 'emoji-txt/noto/test'.* did you mean 'emo"):
        named_benchmark("emoji-txt/noto/test")
    with pytest.raises(ValueError, match="or a folder with queries"):
        named_benchmark("nowhere")


# ---- smaller ----


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("emoji-text/noto/test", "emoji-text/noto-first3/test"),
        ("emoji-text/noto-full-first9/val", "emoji-text/noto-full-first3/val"),
    ],
)
def test_limited_names(name, smaller):
    assert limited_name(name, 3) == smaller
    found = named_benchmark(smaller)
    assert len(found.queries) == 3 and len(found.gallery) <= 3 + 30
    base, variant, split = smaller.split("/")
    assert (found.name, found.variant, found.split) == (base, variant, split)


def test_limited_benchmarks_are_consistent():
    whole = open_benchmark("emoji-composed", "noto", "val")
    few = limited(whole, 7)
    assert (few.variant, few.metrics) == ("noto-first7", whole.metrics)
    assert len(few.queries) == 7 and 70 < len(few.gallery) < len(whole.gallery)
    for query in range(7):
        assert few.queries[query]["id"] == whole.queries[query]["id"]
        for old, new in (
            (whole.positives, few.positives),
            (whole.subset, few.subset),
            ([[row] for row in whole.exclude], [[row] for row in few.exclude]),
        ):
            ids = [whole.ids[row] for row in old[query]]
            assert [few.ids[row] for row in new[query]] == ids
            assert [few.gallery[row]["id"] for row in new[query]] == ids
    needed = {row for rows in (*few.positives, *few.subset) for row in rows} | set(few.exclude)
    assert len(few.gallery) == len(needed) + 70
    assert list(few.rules) == list(whole.rules[:7])


def test_a_limit_beyond_the_queries_and_a_senseless_one(bench):
    write(bench / "queries.jsonl", QUERIES)
    whole = own.benchmark(str(bench))
    few = limited(whole, 50)
    assert few.variant == "own-first3" and list(few.ids) == list(whole.ids)
    assert few.positives == whole.positives and list(few.exclude) == list(whole.exclude)
    with pytest.raises(ValueError, match="at least 1"):
        limited(whole, 0)


def test_runs_are_limited_and_varied_by_name(bench):
    runs = (Run("emoji-text/noto-full/test", "m"), Run(str(bench), "m"))
    few = with_limit(Evaluation(runs), 5)
    names = ["emoji-text/noto-full-first5/test", f"{bench}/own-first5/all"]
    assert [run.benchmark for run in few.runs] == names
    assert with_limit(Evaluation(runs), 0).runs == runs
    varied = [run.benchmark for run in with_variants(few, ("twemoji", "noto")).runs]
    assert varied == ["emoji-text/twemoji-full-first5/test", *names]


# ---- training and evaluating ----


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Sixteen coloured pictures: a table of pairs, one of triplets, and two benchmarks."""
    root = tmp_path_factory.mktemp("colours")
    names = [f"{n}.png" for n in range(16)]
    paint(root / "one/gallery", *names)
    words = ["grinning face", "cat", "red heart", "car", "tree", "house", "dog", "fish"]
    texts = [f"{words[n % 8]} {'large' if n < 8 else 'small'}" for n in range(16)]
    pairs = [{"image": f"one/gallery/{n}", "text": t} for n, t in zip(names, texts)]
    write(root / "pairs.csv", pairs)
    edits = [
        {"reference": pair["image"], "text": pair["text"], "target": pair["image"]}
        for pair in pairs
    ]
    write(root / "triplets.jsonl", edits)
    asked = [{"text": t, "targets": [n]} for n, t in zip(names, texts)]
    write(root / "one/queries.jsonl", asked)
    paint(root / "two/one/gallery", *names)
    write(root / "two/one/queries.jsonl", asked[:5])
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of a tiny model with its own vocabulary."""
    folder = tmp_path_factory.mktemp("start") / "tiny"
    model = drawn(ClipConfig.tiny(INPUTS))
    recipe = {"optim": {"lr": 0.02, "frozen": ["text/embedding"], "weight_decay": 0.3}}
    save_model(folder, model.config, model.params, dtype="float16", about={"experiment": recipe})
    return str(folder)


@pytest.fixture
def quickly_compiled():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
def test_training_on_own_data_lowers_the_loss(colours, start, tmp_path, quickly_compiled):
    data = [Data("pairs", root=f"{colours}/pairs.csv")]
    data += [Data("triplets", root=f"{colours}/triplets.jsonl")]
    config = fine_tune(
        start, data=tuple(data), evals=(f"{colours}/one",), steps=50, batch_size=8, lr=1e-2
    )
    rhythm = {"log_every": 1, "eval_every": 50, "save_every": 50}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **rhythm))
    prepare_workdir(config, tmp_path / "run")
    tuned, before = cir_jax.load(train(config, tmp_path / "run")), cir_jax.load(start)
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    for kind in (losses[::2], losses[1::2]):
        assert np.mean(kind[-5:]) < 0.9 * np.mean(kind[:5])
    found, at_first = (measure(m, config.evals[0])["mrr"] for m in (tuned, before))
    assert found > at_first + 0.05
    words = [model.params["text"]["embedding"] for model in (tuned, before)]
    np.testing.assert_array_equal(*words, err_msg="frozen word vectors have moved")
    assert Path(tuned.config.inputs.text.vocab).parent == tmp_path / "run" / "model"


def test_a_shipped_model_starts_where_it_ended(tmp_path):
    """Before the first step it is the shipped model, and brings its vocabulary along."""
    config = fine_tune("emoji_text", data=(), steps=1, batch_size=8, limit=8)
    assert (config.train.export_dtype, config.train.augment) == ("float16", True)
    assert config.optim.frozen == ("text/embedding",) and config.train.limit == 8
    init = make_init(config, optim.optimizer(config.optim, 1))
    shapes = jax.eval_shape(init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
    state = warm_start({name: zeros[name] for name in ("params", "frozen")}, config)
    params = optim.join(state["params"], state["frozen"])
    save_model(tmp_path / "model", config.method, params, dtype=config.train.export_dtype)
    ours, shipped = cir_jax.load(tmp_path / "model"), cir_jax.load("emoji_text")
    jax.tree.map(np.testing.assert_array_equal, ours.params, shipped.params)
    copy, original = (Path(model.config.inputs.text.vocab) for model in (ours, shipped))
    assert copy.parent == tmp_path / "model" and copy.read_bytes() == original.read_bytes()


def test_a_run_from_before_there_were_limits_continues(start, tmp_path):
    config = fine_tune(start, data=(Data("pairs", root="x.csv"),), steps=9, batch_size=8)
    prepare_workdir(config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["train"]["limit"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    prepare_workdir(config, tmp_path)
    few = dataclasses.replace(config, train=dataclasses.replace(config.train, limit=5))
    with pytest.raises(ValueError, match=r"different: train.limit 0, now 5\)"):
        prepare_workdir(few, tmp_path)


def test_what_fine_tuning_takes_over(start, colours):
    data = (Data("pairs", root="x.csv"),)
    config = fine_tune(start, data=data, steps=200, batch_size=8, tensor=1, seed=5, best="recall@1")
    assert isinstance(config, Experiment) and config.init == {"": start}
    assert config.method == cir_jax.load(start).config
    assert config.optim == Optim(
        lr=0.002, weight_decay=0.3, warmup=20, frozen=("text/embedding",), schedule="cosine"
    )
    assert config.train == Train(
        steps=200,
        batch_size=8,
        seed=5,
        log_every=10,
        save_every=20,
        eval_every=20,
        augment=False,
        export_dtype="float16",
    )
    assert config.best == "recall@1"
    given = fine_tune(start, data=data, train=Train(7, 4), optim=Optim(lr=1.0), frozen=())
    assert (given.train, given.optim) == (Train(7, 4), Optim(lr=1.0))


def test_fine_tuning_keeps_how_a_recipe_trained(tmp_path):
    ours = {"crop": (0.5, 1.0), "mirror": True, "augment": False}
    recipe = Experiment(
        ClipConfig.tiny(INPUTS),
        (),
        Train(9, 8, **ours),
        Optim(
            betas=(0.8, 0.9),
            epsilon=1e-6,
            clip_norm=None,
            layer_decay=0.7,
            undecayed=(".*/positions",),
        ),
    )
    model, about = drawn(recipe.method), {"experiment": portable(recipe)}
    save_model(tmp_path / "m", model.config, model.params, about=about)
    config = fine_tune(str(tmp_path / "m"), data=(), steps=50, batch_size=4)
    assert {name: getattr(config.train, name) for name in ours} == ours
    assert config.optim == dataclasses.replace(recipe.optim, lr=1e-4, warmup=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1, "batch_size": 8}, r"missing data"),
        ({"data": ()}, r"missing steps, batch_size"),
        ({"data": (), "steps": 1, "batchsize": 8}, r"unknown batchsize, missing batch_size"),
    ],
)
def test_fine_tuning_says_what_it_needs(changes, message, start):
    with pytest.raises(ValueError, match=message):
        fine_tune(start, **changes)


def test_a_re_ranker_is_tuned_behind_a_retriever(colours):
    options = {"steps": 1, "batch_size": 8, "evals": (str(colours / "one"),)}
    data = (Data("triplets", root=str(colours / "triplets.jsonl")),)
    with pytest.raises(ValueError, match="a re-ranker needs one"):
        check_experiment(fine_tune("emoji_rerank", data=data, **options))
    config = fine_tune("emoji_rerank", data=data, retriever="emoji_cir", **options)
    check_experiment(config)
    batch = next(training_batches(config, 0))
    assert batch["query"]["image"].shape == batch["item"]["image"].shape == (8, 64, 64, 3)


def test_queries_that_a_method_would_half_ignore_are_refused(colours):
    config = Experiment(
        method=BlipItmConfig.tiny(INPUTS),
        data=(Data("triplets", root=str(colours / "triplets.jsonl")),),
        train=Train(1, 8),
    )
    with pytest.raises(ValueError, match=r"consist of image and text; blip_itm takes text"):
        training_batches(config, 0)


def test_a_limit_of_rows_is_kept_for_each_set(colours):
    data = [Data("pairs", root=str(colours / "pairs.csv"))]
    config = Experiment(method=ClipConfig.tiny(INPUTS), data=data, train=Train(1, 8, limit=3))
    batches = training_batches(config, 0)
    groups = {int(g) for _ in range(3) for g in next(batches)["item"]["group"]}
    assert groups == {0, 1, 2}
    wrong = dataclasses.replace(config, train=Train(1, 8, limit=-1))
    with pytest.raises(ValueError, match="limit is -1"):
        check_experiment(wrong)


def test_evaluating_own_benchmarks_keeps_them_apart(colours, start, tmp_path, monkeypatch):
    """Two folders of one name, one of them limited too, on both indexes: every row has its own file."""
    monkeypatch.chdir(colours)
    names = ("one", "two/one", "one/own-first2/all")
    runs = (*(Run(name, start) for name in names), Run("one", start, "scann"))
    rows = evaluate(Evaluation(runs), tmp_path)
    assert [(row["benchmark"], row["variant"], row["split"]) for row in rows] == [
        ("one", "own", "all"),
        ("two/one", "own", "all"),
        ("one", "own-first2", "all"),
        ("one", "own", "all"),
    ]
    assert [row["queries"] for row in rows] == [16, 5, 2, 16]
    files = {row["ranks"] for row in rows}
    assert len(files) == 4 and all(len(np.load(tmp_path / name)["rank"]) for name in files)
    assert {
        row["benchmark"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]
    } == {
        "one",
        "two/one",
    }
    assert "two/one" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_readme_example(tmp_path):
    """The commands of the README as they stand: tuned on names and drawings, others are found better."""
    mark = "<!-- own data -->"
    (program,) = re.findall(rf"^{mark}\n```sh\n(.*?)^```", README.read_text(), re.M | re.S)
    assert program.count("\n") <= 30
    room = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    room["PYTHONPATH"] = str(README.parent)
    done = subprocess.run(
        ["bash", "-e", "-c", program],
        cwd=tmp_path,
        env=room,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "results/compare/results.json").read_text())
    shipped, tuned = (row["metrics"] for row in result["rows"])
    assert tuned["recall@10"] > shipped["recall@10"] + 0.05
    assert done.stdout.count("shop/benchmark/own/all") == 2


# ---- what changes must not go unnoticed ----

FIELDS = {
    "queries": lambda b: [{**b.queries[0], "text": "other"}, *b.queries[1:]],
    "gallery": lambda b: [{**b.gallery[1]}, {**b.gallery[0]}, *list(b.gallery)[2:]],
    "positives": lambda b: [b.positives[1], b.positives[0], *b.positives[2:]],
    "exclude": lambda b: [3] + [-1] * (len(b.queries) - 1),
    "subset": lambda b: [[0, 1]] + [[2, 3]] * (len(b.queries) - 1),
    "rules": lambda b: ["rule"] * len(b.queries),
    "metrics": lambda b: ("recall@2",),
    "variant": lambda b: "other",
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_part_of_a_benchmark_counts_in_its_digest(field, colours, monkeypatch):
    monkeypatch.chdir(colours)
    found = named_benchmark("one")
    changed = dataclasses.replace(found, **{field: FIELDS[field](found)})
    assert content_digest(found) == content_digest(named_benchmark("one"))
    assert content_digest(changed) != content_digest(found)


def test_a_changed_picture_counts_too(colours, monkeypatch):
    monkeypatch.chdir(colours)
    before = content_digest(named_benchmark("one"))
    picture = next(colours.glob("one/gallery/*"))
    os.utime(picture, ns=(1, 1))
    assert content_digest(named_benchmark("one")) != before


def test_training_does_not_continue_on_a_changed_table(start, tmp_path):
    (tmp_path / "x.csv").write_text("image,text\n")
    data = (Data("pairs", root=str(tmp_path / "x.csv")),)
    config = fine_tune(start, data=data, steps=9, batch_size=8)
    prepare_workdir(config, tmp_path / "run")
    prepare_workdir(config, tmp_path / "run")
    (tmp_path / "x.csv").write_text("image,text\na.png,changed\n")
    with pytest.raises(ValueError, match=r"was begun with other contents of .*x.csv"):
        prepare_workdir(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("wrong", "meant"), [("refrence", "reference"), ("subsets", "subset"), ("txt", "text")]
)
def test_columns_that_look_misspelled_are_refused(wrong, meant, colours, monkeypatch, tmp_path):
    shutil.copytree(colours / "one", tmp_path / "one")
    row = {"text": "a fox", "targets": [next(colours.glob("one/gallery/*")).name], wrong: "x"}
    (tmp_path / "one/queries.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=f"has a column {wrong}; if {meant} is meant"):
        named_benchmark(str(tmp_path / "one"))
