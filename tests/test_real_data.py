"""The real annotation files of `../shared/data`: every number that the specifications print, and what is asked.

The pictures are not at hand; `pictured` says of every one that it is there.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cir_jax.config import Data
from cir_jax.data import __main__, circo, named_benchmark, published, training_set
from cir_jax.evaluation import metrics

README = Path(published.__file__).with_name("README.md").read_text()
FASHIONIQ = {  # queries and pictures of each split, pictures of the union
    "dress": ((5985, 11452), (2017, 3817), (2024, 3818), 2628),
    "shirt": ((5988, 19036), (2038, 6346), (2038, 6346), 3089),
    "toptee": ((6027, 16121), (1961, 5373), (2056, 5374), 2902),
}
SPLITS = ("train", "val", "test")
ASPECTS = {
    "cardinality": (37, 0),
    "addition": (80, 0.0871),
    "negation": (21, 0),
    "direct_addressing": (119, 0.9197),
    "compare_change": (86, 0.0242),
    "comparative_statement": (50, 1.0500),
    "statement_with_conjunction": (164, 0.6183),
    "spatial_relations_background": (100, 0.1808),
    "viewpoint": (54, 0.6173),
}


class Everything:
    def __contains__(self, name):
        return True


@pytest.fixture(autouse=True)
def pictured(request, shared, monkeypatch):
    if "unpictured" not in request.fixturenames:
        monkeypatch.setattr(published, "listing", lambda root, folder: Everything())


@pytest.fixture
def unpictured():
    """Without pictures, as things are."""


@pytest.mark.parametrize(
    "name", ["fashioniq", "cirr", pytest.param("circo", marks=pytest.mark.slow)]
)
def test_the_command_prints_what_its_readme_shows(name, unpictured, request, shared, capsys):
    """All but the examples, which belong to the data sets."""
    root = request.getfixturevalue("circo_root") if name == "circo" else shared / "data" / name
    more = ["--benchmarks", "rc2/val", "rc2/test1"] if name == "cirr" else []
    __main__.main([name, "--root", str(root), *more])
    printed = capsys.readouterr().out
    assert printed.count("\n  first: {") == len(re.findall("^[a-z]", printed, re.MULTILINE))
    printed = re.sub(r"^  first: .*\n", "", printed, flags=re.MULTILINE)
    (block,) = re.findall(rf"^```printed {name}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert re.sub(r" \(first: .*\)", "", printed) == block


# ---- FashionIQ ----


@pytest.mark.parametrize("category", FASHIONIQ)
def test_counts_of_fashioniq(category, shared):
    root = shared / "data/fashioniq"
    opened = lambda variant, split: named_benchmark(f"fashioniq:{root}/{variant}/{split}")
    for split, wanted in zip(SPLITS, FASHIONIQ[category]):
        found = opened(category, split)
        assert (len(found.queries), len(found.gallery)) == wanted
        listed = json.loads((root / f"image_splits/split.{category}.{split}.json").read_text())
        assert found.ids == listed, "the order is that of the file"
        assert not found.exclude and found.metrics[:2] == ("recall@10", "recall@50")
        targets = Counter(row for rows in found.positives for row in rows)
        assert all(len(rows) == (split != "test") for rows in found.positives)
        assert set(targets.values()) <= {1}, "each target occurs once in a file"
        shown = [query["image"] for query in found.queries]
        best = [found.gallery[next(iter(r))]["image"] for r in found.positives if r]
        assert all(first != second for first, second in zip(shown, best))
    union = opened(f"{category}-union", "val")
    assert len(union.gallery) == FASHIONIQ[category][3]
    assert len(union.queries) == FASHIONIQ[category][1][0]


def test_fashioniq_as_a_whole(shared):
    root = shared / "data/fashioniq"
    opened = [
        named_benchmark(f"fashioniq:{root}/{category}/{split}")
        for split in SPLITS
        for category in FASHIONIQ
    ]
    assert sum(len(each.gallery) for each in opened) == 77_683
    assert len({name for each in opened for name in each.ids}) == 74_381
    val = [each for each in opened if each.split == "val"]
    assert sum(len(each.queries) for each in val) == 6016
    assert sum(len(each.gallery) for each in val) == 15_536
    assert len({name for each in val for name in each.ids}) == 15_415
    asked = [query["text"] for each in opened for query in each.queries]
    assert max(len(text.split()) for text in asked) == 28 + 1
    empty = Counter(
        each.variant
        for each in val
        for query in each.queries
        if query["text"].startswith(" and ") or query["text"].endswith(" and ")
    )
    assert empty == {"shirt": 1, "toptee": 2}


def test_training_set_of_fashioniq(shared):
    found = training_set(Data("fashioniq", root=str(shared / "data/fashioniq")))
    assert len(found) == 18_000
    first = json.loads((shared / "data/fashioniq/captions/cap.dress.train.json").read_text())[0]
    assert found[0]["query"]["image"].endswith(f"/images/{first['candidate']}.jpg")
    assert found[0]["item"]["image"].endswith(f"/images/{first['target']}.jpg")
    toptee = json.loads((shared / "data/fashioniq/captions/cap.toptee.train.json").read_text())
    assert found[5985]["item"]["image"].endswith(f"/{toptee[0]['target']}.jpg"), "dress, toptee"
    assert all(len(set(raw["query"]["texts"])) <= 4 == len(raw["query"]["texts"]) for raw in found)
    empty = [raw for raw in found if "" in raw["query"]["texts"]]
    val = training_set(Data("fashioniq", root=str(shared / "data/fashioniq"), split="val"))
    empty += [raw for raw in val if "" in raw["query"]["texts"]]
    assert len(empty) == 16, "captions that are empty after stripping stay"


# ---- CIRR ----


@pytest.mark.parametrize(
    ("split", "counts", "references", "pairs", "words", "letters"),
    [
        ("val", (4181, 2297), 2165, (12060, 38762), 47, 244),
        ("test1", (4148, 2315), 2178, (12063, 39059), 53, 302),
    ],
)
def test_counts_of_cirr(split, counts, references, pairs, words, letters, shared):
    root = shared / "data/cirr"
    found = named_benchmark(f"cirr:{root}/rc2/{split}")
    assert (len(found.queries), len(found.gallery)) == counts
    listed = json.loads((root / f"cirr/image_splits/split.rc2.{split}.json").read_text())
    assert found.ids == list(listed), "the order is that of the file"
    asked = list(found.queries)
    numbers = [int(query["id"]) for query in asked]
    assert (numbers[0], numbers[-1]) == pairs and numbers == sorted(numbers)
    assert len(set(found.exclude)) == references
    assert max(len(query["text"].split()) for query in asked) == words
    assert max(len(query["text"]) for query in asked) == letters
    groups = {frozenset([*rows, reference]) for rows, reference in zip(found.subset, found.exclude)}
    assert len(groups) == 503 and set(map(len, groups)) == {6}
    for query, reference, rows, right in zip(asked, found.exclude, found.subset, found.positives):
        assert query["image"] == found.gallery[reference]["image"]
        assert len(rows) == 5 and reference not in rows
        assert (not right) if split == "test1" else (len(right) == 1 and set(right) <= set(rows))
    assert found.metrics[:4] == ("recall@1", "recall@5", "recall@10", "recall@50")
    assert found.metrics[4:7] == ("subset_recall@1", "subset_recall@2", "subset_recall@3")
    assert found.metrics[7:] == ("mean(recall@5,subset_recall@1)",)


def test_pictures_of_cirr(shared):
    root = shared / "data/cirr"
    found = named_benchmark(f"cirr:{root}/rc2/val")
    assert found.gallery[0]["image"] == f"{root}/dev/{found.ids[0]}.png"
    train = published.read_json(root / "cirr/image_splits/split.rc2.train.json", {})
    assert len(train) == 16_939 and max(map(len, train)) == 18
    assert len({path.split("/")[2] for path in train.values()}) == 100


# ---- CIRCO ----


@pytest.fixture(scope="module")
def circo_root(shared, tmp_path_factory):
    """The real annotations, with a list of pictures that holds all that they name."""
    tmp_path, needed = tmp_path_factory.mktemp("circo"), {}
    (tmp_path / "annotations").mkdir()
    for split in ("val", "test"):
        text = (shared / f"data/circo/annotations/{split}.json").read_text()
        (tmp_path / f"annotations/{split}.json").write_text(text)
        for record in json.loads(text):
            for name in (record["reference_img_id"], *record.get("gt_img_ids", ())):
                needed[name] = None
    examples = json.loads(
        (shared / "data/circo/submission_examples/submission_val.json").read_text()
    )
    for names in examples.values():
        needed |= dict.fromkeys(names)
    more = (number for number in range(10**6, 2 * 10**6))
    ids = [*needed, *(next(more) for _ in range(circo.GALLERY - len(needed)))]
    images = [{"id": name, "file_name": f"{name:012}.jpg"} for name in ids]
    (tmp_path / circo.INFO).parent.mkdir(parents=True)
    (tmp_path / circo.INFO).write_text(json.dumps({"images": images}))
    return tmp_path


def test_counts_of_circo(circo_root):
    val = named_benchmark(f"circo:{circo_root}/coco/val")
    test = named_benchmark(f"circo:{circo_root}/coco/test")
    assert (len(val.queries), len(test.queries)) == (220, 800)
    assert len(val.gallery) == len(test.gallery) == 123_403
    assert [query["id"] for query in val.queries] == [str(row) for row in range(220)]
    answers = [len(rows) for rows in val.positives]
    assert (sum(answers), min(answers), max(answers)) == (916, 1, 14)
    assert sum(answers) / 220 == pytest.approx(4.164, abs=5e-4)
    assert len({query["image"] for query in val.queries}) == 220 and not any(test.positives)
    for query, rows in zip(val.queries, val.positives):
        assert list(rows.values()) == [2.0, *[1.0] * (len(rows) - 1)], "the target comes first"
        assert query["image"] not in {val.gallery[row]["image"] for row in rows}
    labels = Counter(label for labels in val.rules for label in labels)
    assert labels == {name: count for name, (count, _) in ASPECTS.items()}
    assert labels.total() == 711 and not test.rules


def test_the_official_example_scores_as_published(circo_root, shared):
    """fti4cir.md 6.3: the organisers' example submission on the validation annotations."""
    val = named_benchmark(f"circo:{circo_root}/coco/val")
    examples = json.loads(
        (shared / "data/circo/submission_examples/submission_val.json").read_text()
    )
    places = {name: row for row, name in enumerate(val.ids)}
    rows = np.array([[places[str(name)] for name in examples[str(q)]] for q in range(220)])
    found = {name: 100 * value for name, value in metrics.evaluate(rows, val).items()}
    assert found == pytest.approx(
        {
            "map@5": 0.4861,
            "map@10": 0.5178,
            "map@25": 0.5400,
            "map@50": 0.6020,
            "target_recall@5": 0.9091,
            "target_recall@10": 0.9091,
            "target_recall@25": 1.3636,
            "target_recall@50": 3.6364,
        },
        abs=5e-5,
    )
    table = metrics.by_rule(metrics.per_query(rows, val, ["map@10"]), val.rules)
    assert {name: 100 * row["map@10"] for name, row in table.items()} == pytest.approx(
        {name: value for name, (_, value) in ASPECTS.items()}, abs=5e-5
    )


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([101, 104, 9999], (0.3, 0.3, 0.3, 0.3)),
        ([100, 101, 102, 103, 104, 110, 120], (1.0, 0.714286, 0.839827, 0.839827)),
    ],
)
def test_average_precision_of_circo_by_the_specification(answers, expected):
    from cir_jax.data.benchmark import Benchmark

    one = Benchmark(
        name="one",
        variant="v",
        split="s",
        queries=[{}],
        gallery=range(10_000),
        ids=[str(row) for row in range(10_000)],
        positives=[dict.fromkeys(answers, 1.0)],
        metrics=circo.METRICS[:4],
    )
    found = metrics.evaluate(np.arange(100, 150)[None], one)
    assert tuple(found.values()) == pytest.approx(expected, abs=5e-7)
