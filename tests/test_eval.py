"""Evaluation with a second stage: its rows, gains, files, means over styles, and what is computed only once."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from test_methods import INPUTS, drawn

import cir_jax
from cir_jax import eval as evaluation
from cir_jax.checkpoint import save_model
from cir_jax.config import Evaluation, Run
from cir_jax.data import BENCHMARKS, emoji
from cir_jax.data.benchmark import Benchmark
from cir_jax.data.documents import BUILTIN, document_query
from cir_jax.eval import evaluate, print_table, with_variants
from cir_jax.evaluation import metrics, runs
from cir_jax.evaluation.runs import measure, pooled
from cir_jax.files import read_json
from cir_jax.methods import METHODS
from cir_jax.model import Model
from cir_jax.report import evaluation as eval_report

QUERIES = 10
ITEMS = 30
SPLITS = {"val": 1, "test": 2}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Many small programs run once each here: compiling them costs more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def small_gallery(variant, split):
    rows = range(SPLITS[split], 2859, 2859 // ITEMS)[:ITEMS]
    items = emoji.gallery(variant.split("-")[0], rows)
    return {"gallery": items, "ids": [item["id"] for item in items]}


def edits(variant="noto", split="test", shown=("recall@1", "recall@5", "mrr")):
    """Ten edits of pictures in a gallery of thirty; what is right is made up."""
    parts = small_gallery(variant, split)
    return Benchmark(
        name="small-edits",
        variant=variant,
        split=split,
        queries=[
            {"image": parts["gallery"][row]["image"], "text": f"edit {row}", "id": f"q{row}"}
            for row in range(QUERIES)
        ],
        positives=[{row + 10: 1.0, row + 15: 1.0} for row in range(QUERIES)],
        exclude=list(range(QUERIES)),
        rules=["odd", "even"] * (QUERIES // 2),
        metrics=shown,
        **parts,
    )


def stories(variant="noto", split="test"):
    """The documents of four emoji."""
    parts = small_gallery(variant, split)
    texts = [emoji.documents()[key]["text"] for key in sorted(emoji.documents())[:4]]
    return Benchmark(
        name="small-stories",
        variant=variant,
        split=split,
        queries=[{"document": text, "text": text, "id": text[:9]} for text in texts],
        positives=[{row: 1.0} for row in range(4)],
        **parts,
    )


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The small benchmarks, and no page."""
    monkeypatch.setitem(BENCHMARKS, "small-edits", edits)
    monkeypatch.setitem(BENCHMARKS, "small-stories", stories)
    pages = []
    monkeypatch.setattr(eval_report, "evaluation_page", lambda *arguments: pages.append(arguments))
    yield pages


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models by method."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("clip", "blip_rerank", "cfir")):
        model = drawn(METHODS[name][0].tiny(INPUTS), seed)
        save_model(folder / name, model.config, model.params)
    return {name: str(folder / name) for name in ("clip", "blip_rerank", "cfir")}


@pytest.fixture
def pairs_scored(monkeypatch):
    """(query text, item id) of every pair that a re-ranker scores."""
    found, last, features, score = [], {}, Model.features, Model.score

    def count_features(self, part, examples, *arguments, **options):
        name = "id" if part == "item" else "text"
        last[part] = [examples[row].get(name) for row in range(len(examples))]
        return features(self, part, examples, *arguments, **options)

    def count_pairs(self, queries, items, rows, *arguments, **options):
        found.extend(
            (last["query"][query], last["item"][place])
            for query, places in enumerate(rows)
            for place in places[places >= 0]
        )
        return score(self, queries, items, rows, *arguments, **options)

    monkeypatch.setattr(Model, "features", count_features)
    monkeypatch.setattr(Model, "score", count_pairs)
    return found


def two_stages(models, variant="noto", **options):
    options = {"k": 6} | options
    name = f"small-edits/{variant}/test"
    return Run(name, models["clip"], reranker=models["blip_rerank"], **options)


def arrays_of(folder, row):
    with np.load(folder / row["ranks"]) as stored:
        return dict(stored)


def test_a_re_ranked_run_is_two_rows_that_agree_with_their_files(models, small, tmp_path, capsys):
    rows = evaluate(Evaluation((two_stages(models),)), tmp_path)
    assert [row["stage"] for row in rows] == [1, 2]
    assert read_json(tmp_path / "results.json")["rows"] == rows
    first, second = (arrays_of(tmp_path, row) for row in rows)
    benchmark, values = edits(), []
    for row, stored in zip(rows, (first, second)):
        values.append(metrics.per_query(stored["rows"], benchmark))
        assert row["metrics"] == {name: x.mean() for name, x in values[-1].items()}
        np.testing.assert_array_equal(stored["mrr"], values[-1]["mrr"])
        expected = metrics.ranks(stored["rows"], benchmark.positives, benchmark.exclude)
        np.testing.assert_array_equal(stored["rank"], expected)
        assert stored["ids"].tolist() == [query["id"] for query in benchmark.queries]
        assert stored["rows"].shape == stored["scores"].shape == (QUERIES, row["depth"])
        assert stored["scores"].dtype == np.float32
        assert set(row["rules"]) == {"odd", "even"}
    assert not {"gain", "p", "reranker"} & rows[0].keys()
    for name in benchmark.metrics:
        before, after = values[0][name], values[1][name]
        assert rows[1]["gain"][name] == pytest.approx((after - before).mean(), abs=1e-12)
        assert rows[1]["p"][name] == metrics.paired_p(after, before)
    assert any(gain for gain in rows[1]["gain"].values())
    assert (rows[1]["reranker"], rows[1]["k"], rows[1]["fusion"]) == (
        models["blip_rerank"],
        6,
        None,
    )
    assert [len(row["checkpoints"]) for row in rows] == [1, 2]
    for before, after in zip(first["rows"], second["rows"]):
        assert sorted(before[:6]) == sorted(after[:6])
        assert before[6:].tolist() == after[6:].tolist()
    times = rows[1]["milliseconds"]
    assert times.keys() == {"encode", "search", "rerank"} and min(times.values()) > 0
    assert rows[1]["milliseconds_per_query"] == pytest.approx(sum(times.values()))
    print_table(rows)
    assert f"{100 * rows[1]['gain']['recall@1']:+.1f}" in capsys.readouterr().out
    ((path, results, benchmark_of, *_),) = small
    assert path == tmp_path / "report.html"
    assert [row for row, _ in results] == rows
    assert benchmark_of(rows[0]).ids == benchmark.ids


def test_two_indexes_share_what_was_scored(models, pairs_scored, tmp_path):
    runs = [two_stages(models, index=index) for index in ("exact", "scann", "exact")]
    rows = evaluate(Evaluation(tuple(runs[:2])), tmp_path)
    exact, scann = (arrays_of(tmp_path, row) for row in rows[1::2])
    assert [row["index_asked"] for row in rows] == ["exact"] * 2 + ["scann"] * 2
    assert rows[2]["index_recall@10"] == 1  # so few rows are searched exactly
    np.testing.assert_array_equal(exact["rows"][:, :6], scann["rows"][:, :6])
    np.testing.assert_array_equal(exact["scores"][:, :6], scann["scores"][:, :6])
    assert max(Counter(pairs_scored).values()) == 1 and len(pairs_scored) == 6 * QUERIES
    assert rows[3]["milliseconds"]["rerank"] == pytest.approx(
        rows[1]["milliseconds"]["rerank"], rel=0.5
    )
    pairs_scored.clear()
    both = evaluate(Evaluation((runs[0], two_stages(models, k=9))), tmp_path)
    assert max(Counter(pairs_scored).values()) == 1 and len(pairs_scored) == 9 * QUERIES
    scores = arrays_of(tmp_path, both[3])["scores"]
    assert scores.dtype == np.float32 and np.isfinite(scores[:, : ITEMS - 1]).all()


def test_every_choice_of_a_run_has_its_own_file_and_mean(models, tmp_path):
    choices = [{"k": 4}, {"k": 8}, {"k": 8, "fusion": 0.5}]
    runs = [two_stages(models, v, **c) for v in ("noto", "twemoji") for c in choices]
    rows = evaluate(Evaluation(tuple(runs)), tmp_path)
    second = [row for row in rows if row["stage"] == 2 and "ranks" in row]
    assert len({row["ranks"] for row in second}) == len(second) == 6
    for row in second:
        found = metrics.evaluate(arrays_of(tmp_path, row)["rows"], edits(row["variant"]))
        assert found == row["metrics"]
    means = [row for row in rows if row["variant"] == "noto+twemoji"]
    assert [row["stage"] for row in means] == [1, 2, 2, 2]
    assert [(row["k"], row["fusion"]) for row in means[1:]] == [(4, None), (8, None), (8, 0.5)]
    for mean, pair in zip(means[1:], zip(second[:3], second[3:])):
        for name in mean["metrics"]:
            each = [arrays_of(tmp_path, row)[name] for row in pair]
            assert mean["metrics"][name] == pytest.approx(np.mean(each))
            assert mean["gain"][name] == pytest.approx(np.mean([row["gain"][name] for row in pair]))
        first = [row for row in rows if row["stage"] == 1 and "ranks" in row]
        by_style = {row["variant"]: arrays_of(tmp_path, row)["mrr"] for row in first}
        before = (by_style["noto"] + by_style["twemoji"]) / 2
        after = np.mean([arrays_of(tmp_path, row)["mrr"] for row in pair], axis=0)
        assert mean["p"]["mrr"] == metrics.paired_p(after, before)


def test_one_style_measured_twice_is_no_mean(models, tmp_path):
    plain = Run("small-edits/noto/test", models["clip"])
    rows = evaluate(Evaluation((plain, two_stages(models))), tmp_path)
    assert [(row["variant"], row["stage"]) for row in rows] == [("noto", s) for s in (1, 1, 2)]
    assert pooled([]) == []


def test_variants_replace_the_styles_of_all_runs(models):
    runs = (
        Run("emoji-text/noto/test", "a"),
        Run("emoji-text/twemoji/test", "a"),
        Run("emoji-text/noto-full/test", "a", index="scann"),
        Run("emoji-documents/noto-full-masked/val", "b", reranker="c", k=7, fusion=0.5),
    )
    asked = Evaluation(runs)
    assert with_variants(asked, ()) is asked
    both = with_variants(asked, ("twemoji",)).runs
    assert [run.benchmark for run in both] == [
        "emoji-text/twemoji/test",  # once, though two styles were asked for
        "emoji-text/twemoji-full/test",
        "emoji-documents/twemoji-full-masked/val",
    ]
    assert both[2] == dataclasses.replace(runs[3], benchmark=both[2].benchmark)
    assert len(with_variants(asked, ("noto", "twemoji")).runs) == 6


def test_the_command_measures_on_the_variants_asked_for(models, tmp_path, capsys):
    config = tmp_path / "two.py"
    config.write_text(
        "from cir_jax.config import Evaluation, Run\n"
        f"config = Evaluation((Run('small-edits/noto/test', {models['clip']!r}, "
        f"reranker={models['blip_rerank']!r}, k=5),))\n"
    )
    options = ["--output", str(tmp_path / "out"), "--variant", "noto", "twemoji"]
    evaluation.main([str(config), *options])
    printed = capsys.readouterr().out
    for variant in ("noto", "twemoji", "noto+twemoji"):
        assert printed.count(f"small-edits/{variant}/test ") == 2
    rows = read_json(tmp_path / "out" / "results.json")["rows"]
    assert [row["variant"] for row in rows[::2]] == ["noto", "twemoji", "noto+twemoji"]
    assert rows[5]["gain"] and "ranks" not in rows[5]


@pytest.mark.slow
def test_the_candidates_do_not_depend_on_the_metrics(models, monkeypatch, tmp_path):
    """recall@1 needs one hit, its second stage as many as were asked for."""
    short = lambda variant, split: edits(variant, split, shown=("recall@1",))
    monkeypatch.setitem(BENCHMARKS, "small-edits", short)
    monkeypatch.setattr(runs, "LISTED", 1)
    rows = evaluate(Evaluation((two_stages(models, k=8),)), tmp_path)
    assert [row["depth"] for row in rows] == [8, 8]
    loaded = [cir_jax.load(models[name]) for name in ("blip_rerank", "clip")]
    assert measure(loaded[0], "small-edits/noto/test", models["clip"], k=8) == rows[1]["metrics"]
    assert measure(loaded[1], "small-edits/noto/test") == rows[0]["metrics"]
    everything = evaluate(Evaluation((two_stages(models, k=99),)), tmp_path)
    assert everything[1]["depth"] == ITEMS


def test_documents_ask_by_their_entities_and_then_by_their_summary(models, monkeypatch, tmp_path):
    asked, features = [], Model.features

    def listen(self, part, examples, *arguments, **options):
        if part == "query":
            asked.append([example["text"] for example in map(dict, examples)])
        return features(self, part, examples, *arguments, **options)

    monkeypatch.setattr(Model, "features", listen)
    run = Run("small-stories/noto/test", models["cfir"], reranker=models["cfir"], k=5)
    rows = evaluate(Evaluation((run, dataclasses.replace(run, index="scann"))), tmp_path)
    assert [(row["stage"], row["index"]) for row in rows] == [
        (1, "exact"), (2, "exact"), (1, "scann"), (2, "scann"),
    ]  # fmt: skip
    queries = stories().queries
    entities = [t for query in queries for t in document_query(query, "entities", BUILTIN)["texts"]]
    summaries = [document_query(query, "summary", BUILTIN)["text"] for query in queries]
    assert len(entities) > len(queries)
    assert asked.count(entities) == 3  # to compile, timed, and to tune ScaNN
    assert asked.count(summaries) == 1
    model = cir_jax.load(models["cfir"])
    items = model.encode("item", stories().gallery)
    stored = [arrays_of(tmp_path, row) for row in rows]
    encode = lambda texts: model.encode("query", [{"text": text} for text in texts])
    vectors = encode(summaries)
    for query in range(4):
        texts = document_query(queries[query], "entities", BUILTIN)["texts"]
        best = (encode(texts) @ items.T).max(axis=0)
        np.testing.assert_allclose(stored[0]["scores"][query], np.sort(best)[::-1], atol=1e-5)
        chosen = stored[1]["rows"][query, :5]
        assert sorted(chosen) == sorted(np.argsort(-best)[:5])
        expected = vectors[query] @ items[chosen].T
        np.testing.assert_allclose(stored[1]["scores"][query, :5], expected, atol=1e-5)
        assert (np.diff(expected) <= 1e-6).all()


def test_a_re_ranker_in_the_place_of_the_retriever_is_refused(models, tmp_path):
    run = Run("small-edits/noto/test", models["blip_rerank"])
    with pytest.raises(ValueError, match="blip_rerank is a re-ranker"):
        evaluate(Evaluation((run,)), tmp_path)


def test_short_lists_change_no_number(models, monkeypatch, tmp_path):
    """Ranks beyond a list are counted, and members of a group are scored, found or not."""
    closed = [[row, row + 10, row + 12] for row in range(QUERIES)]
    shown = ("recall@1", "mrr", "subset_recall@1", "mean(recall@1,subset_recall@1)")
    near = lambda variant, split: dataclasses.replace(edits(variant, split, shown), subset=closed)
    monkeypatch.setitem(BENCHMARKS, "small-edits", near)
    whole = evaluate(Evaluation((two_stages(models),)), tmp_path / "whole")
    monkeypatch.setattr(runs, "LISTED", 1)
    short = evaluate(Evaluation((two_stages(models),)), tmp_path / "short")
    assert [row["depth"] for row in whole + short] == [ITEMS, ITEMS, 6, 6]
    for one, two in zip(whole, short):
        assert one["metrics"] == two["metrics"] and one["random"] == two["random"]
        assert one["median_rank"] == two["median_rank"] is not None
        ranks = [
            arrays_of(tmp_path / n, row)["rank"] for n, row in (("whole", one), ("short", two))
        ]
        np.testing.assert_array_equal(*ranks)
        assert ranks[0].max() >= 6
        parts = one["metrics"]["recall@1"], one["metrics"]["subset_recall@1"]
        assert one["metrics"][shown[3]] == pytest.approx(sum(parts) / 2)
    with_list = metrics.evaluate(
        arrays_of(tmp_path / "whole", whole[0])["rows"], near("noto", "test")
    )
    assert with_list == pytest.approx(whole[0]["metrics"])
    assert (
        whole[1]["candidate_recall"] == (arrays_of(tmp_path / "whole", whole[0])["rank"] < 6).mean()
    )


def test_a_split_without_labels_gives_the_files_of_its_server(models, monkeypatch, small, tmp_path):
    from cir_jax.evaluation import submissions

    closed = [[row, *range(row + 10, row + 15)] for row in range(QUERIES)]
    hidden = lambda variant, split: dataclasses.replace(
        edits(variant, split), name="cirr", positives=[{}] * QUERIES, subset=closed
    )
    monkeypatch.setitem(BENCHMARKS, "small-edits", hidden)
    monkeypatch.setitem(submissions.CIRR_QUERIES, "test1", QUERIES)
    kinds = submissions.KINDS
    monkeypatch.setitem(kinds, "cirr recall", kinds["cirr recall"]._replace(names=ITEMS - 1))
    rows = evaluate(Evaluation((two_stages(models),)), tmp_path)
    assert [len(row["files"]) for row in rows] == [2, 2]
    assert rows[0]["metrics"] == rows[1]["metrics"] == {} and small[0][1] == []
    print_table(rows)
    recall, near = (submissions.read(tmp_path / name) for name in rows[1]["files"])
    ids, stored = hidden("noto", "test").ids, arrays_of(tmp_path, rows[1])
    for query in range(QUERIES):
        expected = [ids[row] for row in stored["rows"][query] if row not in (-1, query)]
        assert recall.lists[f"q{query}"] == expected
        assert set(near.lists[f"q{query}"]) <= {ids[row] for row in closed[query][1:]}
        place = {name: number for number, name in enumerate(expected)}
        if set(closed[query][1:]) <= set(stored["rows"][query, :6].tolist()):
            assert sorted(near.lists[f"q{query}"], key=place.get) == near.lists[f"q{query}"]
    monkeypatch.setitem(submissions.CIRR_QUERIES, "test1", 4148)
    (row,) = evaluate(Evaluation((Run("small-edits/noto/test", models["clip"]),)), tmp_path)
    assert "files" not in row and "10 queries, expected 4,148" in row["no_files"][0]


def test_the_audit_asks_with_each_part_alone(models, small, pairs_scored, tmp_path, capsys):
    rows = evaluate(Evaluation((two_stages(models),)), tmp_path, audit=True)
    asked = [(row.get("asks", "all"), row["stage"]) for row in rows]
    assert asked == [(part, stage) for part in ("all", "text", "image") for stage in (1, 2)]
    assert len({row["ranks"] for row in rows}) == 6
    queries = [query["text"] for query in edits().queries]
    texts = [text for text, _ in pairs_scored]
    assert texts.count("") == 6 * QUERIES and texts.count(queries[0]) == 2 * 6
    model = cir_jax.load(models["clip"])
    items = model.encode("item", edits().gallery)
    for row, part in zip(rows[2::2], ("text", "image")):
        vectors = model.encode("query", [{part: query[part]} for query in edits().queries])
        rank = arrays_of(tmp_path, row)["rank"]
        scores = vectors @ items.T
        scores[np.arange(QUERIES), np.arange(QUERIES)] = -np.inf
        best = np.array([max(scores[q, q + 10], scores[q, q + 15]) for q in range(QUERIES)])
        np.testing.assert_array_equal(rank, (scores > best[:, None]).sum(axis=1))
    (found,) = read_json(tmp_path / "results.json")["audits"]
    assert found["stage"] == 2 and found["metrics"].keys() == {"recall@1", "recall@5"}
    values = [arrays_of(tmp_path, row)["recall@1"] for row in rows[1::2]]
    assert found["metrics"]["recall@1"]["either"] == np.maximum(*values[1:]).mean()
    assert small[0][4] == [found]


def test_one_part_alone_is_asked_of_composed_queries_only(models, tmp_path):
    run = Run("small-stories/noto/test", models["cfir"], asks="text")
    with pytest.raises(ValueError, match="asks with no picture and text together"):
        evaluate(Evaluation((run,)), tmp_path)


def test_categories_count_alike_however_large():
    def result(variant, values, stage=1, **more):
        row = {
            "benchmark": "fashioniq:here", "variant": variant, "split": "val", "run": "m", "index_asked": "exact",
            "stage": stage, "queries": len(values), "gallery": 9, "missing": {"pictures": 1}, "metrics": {"recall@10": np.mean(values)},
            "milliseconds_per_query": 1.0, "milliseconds": {"search": 1.0}, "random": {"recall@10": 0.1},
        } | more  # fmt: skip
        ids = np.array([f"{variant}{n}" for n in range(len(values))])
        return row, {"ids": ids, "recall@10": np.array(values, float)}

    first = [result("dress", [1, 0, 0, 0]), result("shirt", [1, 1])]
    more = {"reranker": "r", "k": 5, "fusion": None}
    second = [result("dress", [1, 1, 0, 0], 2, **more), result("shirt", [1, 0], 2, **more)]
    one, two = pooled([*first, *second, result("dress-union", [1, 1, 1, 1])])
    assert one["variant"] == "dress+shirt" and (one["queries"], one["gallery"]) == (6, 18)
    assert one["metrics"]["recall@10"] == pytest.approx((0.25 + 1) / 2)
    assert one["missing"] == {"pictures": 2}
    assert two["metrics"]["recall@10"] == pytest.approx((0.5 + 0.5) / 2)
    assert two["gain"]["recall@10"] == pytest.approx(0.5 - 0.625)
    low, high = one["interval"]["recall@10"]
    assert low == 0.5 and high <= 0.875
    other = [({**row, "benchmark": "cirr"}, arrays) for row, arrays in first]
    assert pooled(other) == []
