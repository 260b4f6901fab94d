"""How originals measure, on small folders in their layouts: given candidates, both directions, files, baselines."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from data_layouts import LAYOUTS
from test_methods import INPUTS, drawn
from torch_writer import Writer

import cir_jax
from cir_jax.checkpoint import save_model
from cir_jax.config import Evaluation, Run
from cir_jax.data import circo, named_benchmark
from cir_jax.eval import evaluate, main
from cir_jax.evaluation import metrics, submissions
from cir_jax.evaluation.candidates import read_candidates
from cir_jax.files import read_json
from cir_jax.methods import METHODS
from cir_jax.report import evaluation as eval_report

QUERIES, ITEMS = 2, 5  # of each small category of FashionIQ


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Many small programs run once each here: compiling them costs more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of small data sets and tiny models."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("fashioniq", "cirr", "circo", "coco", "flickr30k", "atomic"):
        LAYOUTS[name](folder / name)
    for seed, name in enumerate(("clip", "blip_rerank", "cfir")):
        model = drawn(METHODS[name][0].tiny(INPUTS), seed)
        save_model(folder / f"models/{name}", model.config, model.params)
    return folder


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.setenv("CIR_JAX_DATA", str(home))
    monkeypatch.setattr(circo, "GALLERY", 6)
    monkeypatch.setattr(eval_report, "evaluation_page", lambda *arguments: None)
    monkeypatch.setitem(submissions.FASHIONIQ_SIZES, (QUERIES, ITEMS), "small")


@pytest.fixture
def model(home):
    return lambda name: str(home / "models" / name)


def measured(folder, *runs):
    """(row, arrays) of each stage."""
    rows = evaluate(Evaluation(runs), folder)
    return [(row, dict(np.load(folder / row["ranks"])) if "ranks" in row else {}) for row in rows]


def top(path, benchmark, names, **changed):
    """A file as Candidate-Reranking's validate.py saves it."""
    writer, target = Writer(), lambda right: benchmark.ids[next(iter(right))]
    value = {
        "sorted_index_names": np.array(names),
        "target_names": [target(right) for right in benchmark.positives],
        "index_names": list(benchmark.ids),
        "split": benchmark.split,
    } | changed
    path.write_bytes(writer.zip(value))
    return str(path)


# ---- stage 2 ----


def test_given_candidates_are_re_ranked_as_by_candidate_reranking(model, tmp_path):
    """What is not in the file is a miss at every cut; members of a group are scored, found or not."""
    benchmark = named_benchmark("cirr/rc2/val")
    ids, right = benchmark.ids, [next(iter(each)) for each in benchmark.positives]
    others = [row for row in range(8) if row not in right and row not in benchmark.exclude][:2]
    lists = [[others[0], right[0], others[1]], [*others, right[0]]]  # the second misses
    assert right == [4, 5] and benchmark.exclude == [1, 2]
    file = top(tmp_path / "top.pt", benchmark, [[ids[row] for row in each] for each in lists])
    run = Run("cirr/rc2/val", candidates=file, reranker=model("blip_rerank"), k=2)
    (first, before), (second, after) = measured(tmp_path / "out", run)
    assert before["rows"].tolist() == [[*each, -1] for each in lists]
    assert before["rank"].tolist() == [1, -1] and first["index"] == "given"
    assert first["metrics"]["recall@1"] == 0 and first["metrics"]["recall@50"] == 0.5
    assert not any("subset" in name for name in first["metrics"])
    assert first["checkpoints"][0]["name"] == file and second["candidate_recall"] == 0.5
    reranker = cir_jax.load(model("blip_rerank"))
    sides = (
        reranker.features("query", benchmark.queries),
        reranker.features("item", benchmark.gallery),
    )
    scored = reranker.score(*sides, np.tile(np.arange(8), (2, 1)))
    for number in range(2):
        order = sorted(lists[number][:2], key=lambda row: -scored[number, row])
        assert after["rows"][number].tolist() == [*order, lists[number][2], -1]
        expected = sorted(benchmark.subset[number], key=lambda row: -scored[number, row])
        assert after["members"][number].tolist() == expected
    near = [after["members"][n].tolist().index(right[n]) for n in range(2)]
    assert second["metrics"]["subset_recall@2"] == np.mean(np.array(near) < 2)
    both = (second["metrics"]["recall@5"] + second["metrics"]["subset_recall@1"]) / 2
    assert second["metrics"]["mean(recall@5,subset_recall@1)"] == pytest.approx(both)
    assert second["gain"].keys() == first["metrics"].keys()


def test_restricted_lists_end_with_the_candidates(model, tmp_path):
    """CFIR: a summary orders the candidates of the entities, and what is not among them is a miss."""
    for name, queries in (("atomic/base/test", 2), ("atomic/base-rows/test", 3)):
        run = Run(name, model("cfir"), reranker=model("cfir"), k=2)
        runs = (run, dataclasses.replace(run, restricted=True))
        (first, _), (_, free), _, (cut, ended) = measured(tmp_path, *runs)
        assert first["queries"] == queries and cut["restricted"]
        assert ended["rows"].shape == (queries, 3) and (ended["rows"][:, 2] == -1).all()
        np.testing.assert_array_equal(ended["rows"][:, :2], free["rows"][:, :2])
        assert free["rows"].shape[1] == 9 and (free["recall@10"] == 1).all()
        np.testing.assert_array_equal(ended["recall@10"], free["rank"] < 2)
        assert cut["metrics"]["recall@10"] == cut["candidate_recall"] < 1
        found = named_benchmark(name).positives
        share = [np.isin(list(right), rows[:2]).mean() for right, rows in zip(found, ended["rows"])]
        assert cut["metrics"]["trec_recall@1000"] == pytest.approx(np.mean(share))


def test_candidates_that_were_written_give_the_same_numbers(model, tmp_path):
    runs = [Run(f"fashioniq/{c}/val", model("clip"), lists=True) for c in ("dress", "shirt")]
    found = measured(tmp_path / "a", *runs)
    for (row, _), category in zip(found[:2], ("dress", "shirt")):
        (tmp_path / "a" / row["candidates"]).rename(tmp_path / f"{category}.npz")
        made = read_candidates(tmp_path / f"{category}.npz")
        assert (made.category, made.split, made.model) == (
            category,
            "val",
            row["checkpoints"][0]["fingerprint"],
        )
        assert made.scored()["recall@1"].mean() == row["metrics"]["recall@1"]
    given = str(tmp_path / "{variant}.npz")
    runs = [Run(f"fashioniq/{c}/val", candidates=given) for c in ("dress", "shirt")]
    again = measured(tmp_path / "b", *runs)
    assert [row["metrics"] for row, _ in again] == [row["metrics"] for row, _ in found]
    assert [row["variant"] for row, _ in again] == ["dress", "shirt", "dress+shirt"]
    for (_, one), (_, two) in zip(found[:2], again):
        np.testing.assert_array_equal(one["rows"], two["rows"][:, :ITEMS])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"split": "test1"}, "the split 'test1', .* has 'val'"),
        ({"index_names": ["dev-1-0-img1", "dev-4-0-img1", "dev-5-0-img1"]}, "5 names are in one only"),
        ({"target_names": ["dev-5-0-img1", "dev-4-0-img1"]}, "for query 0 the target 'dev-5-0-img1'"),
        ({"sorted_index_names": np.array([["dev-1-0-img1"]]), "target_names": ["dev-4-0-img1"]}, "queries: 1"),
        ({"sorted_index_names": np.array([["dev-1-0-img1"]] * 2)}, "has 1 candidates a query, k is 2"),
    ],
)  # fmt: skip
def test_candidates_of_something_else_are_refused(changed, told, model, tmp_path):
    benchmark = named_benchmark("cirr/rc2/val")
    names = [["dev-1-0-img1", "dev-4-0-img1"], ["dev-5-0-img1", "dev-1-0-img1"]]
    file = top(tmp_path / "top.pt", benchmark, names, **changed)
    run = Run("cirr/rc2/val", candidates=file, reranker=model("blip_rerank"), k=2)
    with pytest.raises(ValueError, match=told):
        evaluate(Evaluation((run,)), tmp_path / "out")
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "needs one of both"),
        ({"retriever": "a", "candidates": "b"}, "needs one of both"),
        ({"candidates": "b", "index": "scann"}, "belong to a retriever"),
        ({"candidates": "b", "asks": "text"}, "belong to a retriever"),
        ({"retriever": "a", "restricted": True}, "without a reranker"),
    ],
)
def test_runs_that_contradict_themselves(options, told):
    with pytest.raises(ValueError, match=told):
        Run("cirr/rc2/val", **options)


def test_fusion_needs_scores(model, tmp_path):
    benchmark = named_benchmark("cirr/rc2/val")
    file = top(tmp_path / "top.pt", benchmark, [["dev-4-0-img1"], ["dev-5-0-img1"]])
    run = Run("cirr/rc2/val", candidates=file, reranker=model("blip_rerank"), k=1, fusion=0.5)
    with pytest.raises(ValueError, match="has no scores that fusion could weigh"):
        evaluate(Evaluation((run,)), tmp_path / "out")


# ---- files ----


def test_predictions_hold_the_captions_and_every_item(home, model, tmp_path):
    runs = [Run(f"fashioniq/toptee/{split}", model("clip")) for split in ("val", "test")]
    (val, _), (test, arrays) = measured(tmp_path / "a", *runs)
    assert "files" not in val and test["metrics"] == {}
    (name,) = test["files"]
    labels = home / "fashioniq/captions/cap.toptee.test.json"
    submissions.check(submissions.read(tmp_path / "a" / name), submissions.read_labels(labels))
    ids = named_benchmark("fashioniq/toptee/test").ids
    captions = json.loads(labels.read_text())
    for entry, caption, rows in zip(
        read_json(tmp_path / "a" / name, list), captions, arrays["rows"]
    ):
        assert entry == caption | {"ranking": [ids[row] for row in rows]}
    ((val, _),) = measured(tmp_path / "b", dataclasses.replace(runs[0], lists=True))
    file = tmp_path / "b" / val["files"][0]
    labels = submissions.read_labels(home / "fashioniq/captions/cap.toptee.val.json")
    scores, _ = submissions.score(submissions.read(file), labels)
    assert scores["recall@10"].mean() == val["metrics"]["recall@10"]
    union = Run("fashioniq/toptee-union/val", model("clip"), lists=True)
    ((row, _),) = measured(tmp_path / "c", union)
    assert "files" not in row and "2 queries with 3 names" in row["no_files"][0]


def test_a_run_for_trec_scores_as_here(home, model, tmp_path, capsys):
    config = tmp_path / "atomic.py"
    config.write_text(
        "from cir_jax.config import Evaluation, Run\n"
        f"config = Evaluation((Run('atomic/base/test', {model('cfir')!r}, reranker={model('cfir')!r}, k=3),))\n"
    )
    main([str(config), "--output", str(tmp_path / "out"), "--lists"])
    rows, printed = read_json(tmp_path / "out/results.json")["rows"], capsys.readouterr().out
    (tmp_path / "qrels").write_text(
        "projected-8 0 uuid-8 1\nprojected-6 0 uuid-6 1\nprojected-8 0 uuid-7 1\n"
    )
    labels = submissions.read_labels(tmp_path / "qrels")
    for row in rows:
        (name,) = row["files"]
        assert f"for the server: {tmp_path / 'out' / name}" in printed
        found = submissions.read(tmp_path / "out" / name)
        assert {len(names) for names in found.lists.values()} == {9}
        values, _ = submissions.score(found, labels)
        for metric in ("mrr@10", "trec_recall@10", "trec_recall@1000"):
            assert values[metric].mean() == pytest.approx(row["metrics"][metric])


# ---- both directions, baselines ----


@pytest.mark.parametrize(("name", "method"), [("coco", "clip"), ("flickr30k", "cfir")])
def test_pictures_ask_for_their_captions(name, method, model, tmp_path):
    texts, pictures = (named_benchmark(f"{name}/karpathy{flag}/test") for flag in ("-texts", ""))
    assert [item["text"] for item in texts.gallery] == [q["text"] for q in pictures.queries]
    assert list(texts.ids) == [query["id"] for query in pictures.queries]
    assert [query["id"] for query in texts.queries] == list(pictures.ids)
    for number, right in enumerate(texts.positives):
        assert all(pictures.positives[row] == {number: 1.0} for row in right)
    found = measured(
        tmp_path, *(Run(f"{name}/karpathy{flag}/test", model(method)) for flag in ("-texts", ""))
    )
    loaded = cir_jax.load(model(method))
    said = loaded.encode("query", [{"text": item["text"]} for item in texts.gallery])
    shown = loaded.encode("item", pictures.gallery)
    scores = shown @ said.T
    for (row, arrays), table, right in zip(
        found, (scores, scores.T), (texts.positives, pictures.positives)
    ):
        order = np.argsort(-table, axis=1, kind="stable")
        rank = np.array([np.isin(rows, list(each)).argmax() for rows, each in zip(order, right)])
        np.testing.assert_array_equal(arrays["rank"], rank)
        for k in (1, 5, 10):
            assert row["metrics"][f"recall@{k}"] == (rank < k).mean()
        assert row["median_rank"] == np.median(rank + 1)


def test_texts_that_are_looked_for_belong_to_no_training_set():
    from cir_jax.config import Data
    from cir_jax.data import training_set

    with pytest.raises(ValueError, match="no variant 'karpathy-texts'"):
        training_set(Data("coco", variant="karpathy-texts"))


def test_a_model_of_pictures_is_not_measured_on_texts(tmp_path):
    made = drawn(METHODS["pic2word"][0].tiny(INPUTS), 0)
    save_model(tmp_path / "pic2word", made.config, made.params)
    run = Run("coco/karpathy-texts/test", str(tmp_path / "pic2word"))
    with pytest.raises(ValueError, match=r"an? item of .*pic2word consists of image; .* has text"):
        evaluate(Evaluation((run,)), tmp_path / "out")


def test_baselines_of_composed_queries(model, tmp_path):
    """Text only, picture only and the sum of both unit vectors."""
    benchmark = named_benchmark("circo/coco/val")
    runs = [Run("circo/coco/val", model("clip"), asks=asks) for asks in ("text", "image", "all")]
    found, clip = measured(tmp_path, *runs), cir_jax.load(model("clip"))
    encode = lambda part: clip.encode("query", [{part: q[part]} for q in benchmark.queries])
    asked = [encode("text"), encode("image"), encode("text") + encode("image")]
    items = clip.encode("item", benchmark.gallery)
    for (row, arrays), queries in zip(found, asked):
        order = np.argsort(-queries @ items.T, axis=1, kind="stable")
        np.testing.assert_array_equal(arrays["rows"], order)
        expected = metrics.evaluate(order, benchmark)
        assert row["metrics"] == pytest.approx(expected)


def test_every_row_tells_what_it_depends_on(home, model, tmp_path):
    ((row, _),) = measured(tmp_path, Run("cirr/rc2/val", model("clip")))
    (checkpoint,) = row["checkpoints"]
    assert checkpoint["dtype"] == "float32" and len(checkpoint["fingerprint"]) == 16
    assert checkpoint["inputs"]["image"]["size"] == INPUTS.image.size
    assert row["missing"] == {"pictures": 0, "queries": 0}
    (home / "cirr/dev/dev-4-0-img1.png").rename(tmp_path / "away.png")
    try:
        ((row, _),) = measured(tmp_path, Run("cirr/rc2-available/val", model("clip")))
    finally:
        (tmp_path / "away.png").rename(home / "cirr/dev/dev-4-0-img1.png")
    assert row["missing"] == {"pictures": 1, "queries": 1} and row["queries"] == 1
    assert Path(tmp_path / "results.json").is_file()
