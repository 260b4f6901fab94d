"""Server files: what is accepted, what is refused and how that is said, and scores where labels are at hand."""

import json

import numpy as np
import pytest

from cir_jax.evaluation import submissions
from cir_jax.evaluation.submissions import Lists, check, read, read_labels, score, write

MEMBERS = [f"m{n}" for n in range(6)]


@pytest.fixture
def put(tmp_path):
    """Writes a file: text as it is, anything else as JSON."""

    def put(value, name="file.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return put


@pytest.fixture(autouse=True)
def small_predictions(monkeypatch):
    """FashionIQ's predictions of one query are taken for complete."""
    for names in (2, 3):
        monkeypatch.setitem(submissions.FASHIONIQ_SIZES, (1, names), "small")


def cirr_lists(queries=4148, names=50):
    lists = {
        str(12063 + query): [f"test1-{n}-0-img0" for n in range(names)] for query in range(queries)
    }
    return Lists("cirr recall" if names == 50 else "cirr subset", lists, "rc2")


def circo_lists(queries=800):
    return Lists("circo", {str(q): [str(n) for n in range(50)] for q in range(queries)})


RUN = "a Q0 x 1 2.5 mine\na Q0 y 2 2.5 mine\nb Q0 y 1 -1e-3 mine\n"
PREDICTIONS = [{"candidate": "B1", "captions": ["x", "y"], "ranking": ["B2", "B1"]}]


# ---- round trips ----


@pytest.mark.parametrize(
    "found", [cirr_lists(), cirr_lists(names=3), circo_lists(), circo_lists(220)]
)
def test_what_is_written_is_read_again(found, tmp_path):
    path = tmp_path / "out" / "file.json"
    path.parent.mkdir()
    write(path, found)
    assert read(path) == found
    assert sorted(each.name for each in path.parent.iterdir()) == ["file.json"]


def test_cirr_s_files_have_two_more_entries(tmp_path):
    for names, metric in ((50, "recall"), (3, "recall_subset")):
        write(tmp_path / "file.json", cirr_lists(names=names))
        value = json.loads((tmp_path / "file.json").read_text())
        assert len(value) == 4150
        assert (value["version"], value["metric"]) == ("rc2", metric)


def test_circo_s_file_holds_numbers(tmp_path):
    write(tmp_path / "file.json", circo_lists())
    value = json.loads((tmp_path / "file.json").read_text())
    assert list(value) == [str(n) for n in range(800)] and value["7"] == list(range(50))


def test_predictions_repeat_the_captions(put, tmp_path):
    found = read(put(PREDICTIONS))
    write(tmp_path / "again.json", found)
    assert json.loads((tmp_path / "again.json").read_text()) == PREDICTIONS


def test_runs_have_six_columns_and_ranks_from_one(put, tmp_path):
    found = read(put(RUN, "run.txt"))
    assert found.lists == {"a": ["x", "y"], "b": ["y"]} and found.about == "mine"
    write(tmp_path / "again.txt", found)
    assert (tmp_path / "again.txt").read_text() == RUN.replace("-1e-3", "-0.001")


# ---- refusals ----


def lists_of(found, **changed):
    return found._replace(lists={**found.lists, **changed})


def without(found, query):
    return found._replace(lists={k: v for k, v in found.lists.items() if k != query})


NAMES = [f"n{n}" for n in range(50)]


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (cirr_lists(4147), "4,147 queries, expected 4,148 of test1, 4,181 of val"),
        (lists_of(cirr_lists(), **{"12063": NAMES[:49]}), r"have not 50 names \(49 in the first\): 12063"),
        (lists_of(cirr_lists(), **{"12063": [*NAMES[:49], "n0"]}), "1 of 4148 queries name an item twice: 12063"),
        (cirr_lists(names=4), "have not 3 names"),
        (without(circo_lists(), "5"), "799 queries, expected 800 of test, 220 of val"),
        (lists_of(without(circo_lists(), "5"), **{"800": circo_lists().lists["0"]}), "not numbered from 0 to 799"),
        (Lists("trec", {"a": ["x", "y"]}, "t", {"a": [1.0, 2.0]}), "scores that rise"),
        (Lists("trec", {"a": ["x y"]}, "t", {"a": [1.0]}), "has spaces"),
        (Lists("trec", {"a": ["x"]}, "t", {"a": [float("nan")]}), "no numbers"),
        (Lists("trec", {"a": [f"{n}" for n in range(1001)]}, "t", {"a": [0.0] * 1001}), "more than 1000 items"),
    ],
)  # fmt: skip
def test_a_file_that_a_server_would_refuse_is_not_written(found, told, tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ValueError, match=told):
        write(path, found)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_all_faults_are_in_one_error():
    wrong = lists_of(cirr_lists(4100), **{"12063": ["a", "a"], "x": ["b"]})
    with pytest.raises(ValueError) as error:
        check(wrong, name="mine.json")
    told = str(error.value).splitlines()
    assert told[0] == "mine.json is no valid CIRR recall file:" and len(told) == 4


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"0": [1, 2', "is not complete JSON"),
        ('{"0": [NaN]}', "NaN is no JSON"),
        ('{"0": [1], "0": [2]}', "occurs twice"),
        ('{"0": [1], "00": [2]}', "a query twice"),
        ('{"0": [1.5]}', "expected lists of whole numbers"),
        ('{"0": [true]}', "expected lists of whole numbers"),
        ('{"0": [-1]}', "expected lists of whole numbers"),
        ('{"0": ["١"]}', "expected lists of whole numbers"),
        ('{"0": [1' + "0" * 5000 + "]}", "is not complete JSON"),
        ('{"0": 5}', "expected lists of whole numbers"),
        ("{}", "found empty"),
        ("[" * 100_000, "nested too deep|not complete JSON"),
        ("[]", "holds no 'ranking'"),
        ('[{"candidate": "a"}]', "entry 0 holds no 'ranking'"),
        ('{"version": "rc1", "metric": "recall", "1": ["a"]}', 'version "rc1"'),
        ('{"version": "rc2", "metric": "recal", "1": ["a"]}', 'metric "recal"'),
        ('{"version": "rc2", "metric": ["recall"], "1": ["a"]}', "metric"),
        ('{"version": "rc2", "metric": "recall", "1": [7]}', "expected lists of names"),
        ("a Q0 x 1 2.5\n", "line 1: .*expected six columns"),
        ("a Q0 x 1 nan t\n", "the score is"),
        ("a Q0 x 1 1e999 t\n", "the score is"),
        ("a Q0 x 1 1_0 t\n", "the score is"),
        ("a Q0 x 1 1 t\na Q0 y 2 0 u\n", "2 run tags"),
        ("a Q0 x 1 1 t\na Q0 x 2 0 t\n", "name an item twice: a"),
        ("", "0 run tags"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_their_name(content, told, put):
    path = put(content)
    with pytest.raises(ValueError, match=told) as error:
        read(path)
    assert str(error.value).startswith(str(path))


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"is no text .*CIRR recall file"):
        read(tmp_path / "x")


def test_files_are_not_read_beyond_a_bound(put, monkeypatch):
    monkeypatch.setattr(submissions, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read(put(RUN))
    monkeypatch.undo()
    monkeypatch.setattr(submissions, "MOST_CIRR", 100)
    value = {"version": "rc2", "metric": "recall", **cirr_lists().lists}
    with pytest.raises(ValueError, match="the server takes 100"):
        read(put(value))


# ---- labels ----


def cirr_labels(put, targets=True):
    """Two queries of one group of six."""
    asked = [
        {
            "pairid": 7 + n,
            "reference": f"m{n}",
            "caption": "c",
            "img_set": {"id": 0, "members": MEMBERS},
            **({"target_hard": f"m{n + 1}"} if targets else {}),
        }
        for n in range(2)
    ]
    pool = MEMBERS + [f"x{n}" for n in range(60)]
    put({name: f"./dev/{name}.png" for name in pool}, "image_splits/split.rc2.val.json")
    return read_labels(put(asked, "captions/cap.rc2.val.json"))


def test_cirr_is_scored_as_its_server_does(put):
    labels = cirr_labels(put)
    others = [f"x{n}" for n in range(50)]
    first, second = ["m1", *others[:49]], [*others[:6], "m2", *others[6:49]]
    found = Lists("cirr recall", {"7": first, "8": second}, "rc2")
    values, _ = score(found, labels)
    assert {name: value.tolist() for name, value in values.items()} == {
        "recall@1": [1, 0], "recall@5": [1, 0], "recall@10": [1, 1], "recall@50": [1, 1],
    }  # fmt: skip
    near = Lists("cirr subset", {"7": ["m2", "m1", "m3"], "8": ["m0", "m3", "m4"]}, "rc2")
    values, _ = score(near, labels)
    assert [value.tolist() for value in values.values()] == [[0, 0], [1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("lists", "told"),
    [
        ({"7": ["m0", "m1", "m2"], "8": ["m0", "m2", "m3"]}, "1 of 2 queries name their reference picture: 7"),
        ({"7": ["x1", "m1", "m2"], "8": ["m0", "m2", "m3"]}, "name pictures outside their group: 7"),
        ({"7": ["zz", "m1", "m2"], "8": ["m0", "m2", "m3"]}, "not in the gallery: 7"),
        ({"7": ["m1", "m2", "m3"]}, "1 of 2 queries are missing: 8"),
        ({"7": ["m1", "m2", "m3"], "9": ["m1", "m2", "m3"]}, "not among those of the labels: 9"),
    ],
)  # fmt: skip
def test_labels_find_what_a_file_alone_does_not_show(lists, told, put):
    with pytest.raises(ValueError, match=told):
        check(Lists("cirr subset", lists, "rc2"), cirr_labels(put))


def test_hidden_and_foreign_labels(put):
    near = {"7": ["m1", "m2", "m3"], "8": ["m0", "m2", "m3"]}
    with pytest.raises(ValueError, match="2 of 2 queries have no labels here; the server"):
        score(Lists("cirr subset", near, "rc2"), cirr_labels(put, targets=False))
    with pytest.raises(ValueError, match="CIRCO file, the labels are those of cirr"):
        check(circo_lists(), cirr_labels(put))
    for content in ({"a": 1}, [], [{"pairid": 1}], [{"x": 1}], "a 0 x\n", "a 0 x y\n"):
        with pytest.raises(ValueError, match=r"labels|annotation|qrels"):
            read_labels(put(content))


def test_fashioniq_is_scored_over_its_whole_ranking(put):
    put(["B1", "B2", "B3"], "image_splits/split.dress.val.json")
    captions = [{"candidate": "B1", "target": "B3", "captions": ["x", "y"]}]
    labels = read_labels(put(captions, "captions/cap.dress.val.json"))
    ranked = lambda *names: read(put([{**captions[0], "ranking": names}]))
    values, _ = score(ranked("B1", "B2", "B3"), labels)
    assert values["recall@10"].tolist() == [1]
    with pytest.raises(ValueError, match="do not rank all 3 items: 0"):
        score(ranked("B1", "B3"), labels)
    other = read(put([{"candidate": "B2", "captions": [], "ranking": ["B1", "B2", "B3"]}]))
    with pytest.raises(ValueError, match="another candidate than the captions: 0"):
        score(other, labels)


def test_runs_are_scored_as_by_trec_eval(put):
    labels = read_labels(put("a 0 x 1\na 0 z 1\nb 0 q 1\nc 0 x 0\n", "qrels"))
    assert list(labels.queries) == ["a", "b"]
    values, _ = score(read(put("a Q0 x 1 2.5 t\na Q0 y 2 2.5 t\n", "run")), labels)
    assert values["mrr@10"].tolist() == [
        0.5,
        0,
    ]  # y before x, which has the same score; b is absent
    assert values["trec_recall@10"].tolist() == [0.5, 0]
    assert values["recall@10"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="not among those of the labels: c"):
        check(read(put("c Q0 x 1 2.5 t\n", "run")), labels)


def test_the_sample_files_of_circo(shared):
    folder = shared / "data/circo"
    val = read(folder / "submission_examples/submission_val.json")
    values, aspects = score(val, read_labels(folder / "annotations/val.json"))
    expected = [0.4861, 0.5178, 0.5400, 0.6020, 0.9091, 0.9091, 1.3636, 3.6364]
    assert [100 * each.mean() for each in values.values()] == pytest.approx(expected, abs=5e-5)
    assert len(set().union(*aspects)) == 9
    test = read(folder / "submission_examples/submission_test.json")
    check(test, read_labels(folder / "annotations/test.json"))
    with pytest.raises(ValueError, match="800 of 800 queries have no labels here"):
        score(test, read_labels(folder / "annotations/test.json"))


def test_the_published_splits_of_cirr_and_fashioniq(shared, tmp_path):
    """Made-up answers to all real queries: the right ones at known places."""
    labels = read_labels(shared / "data/cirr/cirr/captions/cap.rc2.val.json")
    assert len(labels.queries) == 4181 and len(labels.pool) == 2297
    pool = sorted(labels.pool)
    lists = {}
    for number, (query, asked) in enumerate(labels.queries.items()):
        (target,) = asked.right
        others = [name for name in pool[: 50 + 2] if name not in (target, asked.reference)][:49]
        place = number % 50
        lists[query] = [*others[:place], target, *others[place:]]
    write(tmp_path / "cirr.json", Lists("cirr recall", lists, "rc2"), labels)
    values, _ = score(read(tmp_path / "cirr.json"), labels)
    expected = [np.mean(np.arange(4181) % 50 < k) for k in (1, 5, 10, 50)]
    assert [value.mean() for value in values.values()] == pytest.approx(expected)
    test = read_labels(shared / "data/cirr/cirr/captions/cap.rc2.test1.json")
    near = {query: list(asked.members[:3]) for query, asked in test.queries.items()}
    write(tmp_path / "subset.json", Lists("cirr subset", near, "rc2"), test)
    assert len(json.loads((tmp_path / "subset.json").read_text())) == 4150
    labels = read_labels(shared / "data/fashioniq/captions/cap.dress.val.json")
    assert len(labels.queries) == 2017 and len(labels.pool) == 3817


# ---- from an evaluation ----


def test_hits_become_the_files_of_their_server(monkeypatch, tmp_path):
    from cir_jax.data.benchmark import Benchmark

    ids = [f"n{row}" for row in range(60)]
    rows = np.array([np.roll(np.arange(60), -5 * query) for query in range(2)])
    members = np.array([[3, 0, 4, 2], [9, 5, 8, -1]])
    make = lambda name, ids, exclude: Benchmark(
        name, "v", "test1", [{"id": "7"}, {"id": "8"}], [{}] * 60, ids, [{}, {}], exclude
    )
    found = submissions.of_hits(make("cirr:here", ids, [0, 7]), rows, members)
    assert found["recall"].lists["7"] == ids[1:51]
    assert found["recall"].lists["8"] == [*ids[5:7], *ids[8:56]]
    assert found["recall_subset"].lists == {"7": ["n3", "n4", "n2"], "8": ["n9", "n5", "n8"]}
    monkeypatch.setitem(submissions.CIRR_QUERIES, "test1", 2)
    for word, lists in found.items():
        write(tmp_path / word, lists)
        assert read(tmp_path / word) == lists
    circo = submissions.of_hits(make("circo", [str(n) for n in range(60)], ()), rows)["circo"]
    assert circo.lists["8"] == [str(n) for n in range(5, 55)]
    assert submissions.of_hits(make("emoji-text", ids, ()), rows) == {}
    run = submissions.of_hits(make("emoji-text", ids, [0, 7]), rows, wanted=True, tag="my clip")
    write(tmp_path / "run.txt", run["run"])
    lines = (tmp_path / "run.txt").read_text().splitlines()
    assert len(lines) == 118 and lines[0] == "7 Q0 n1 1 59 my_clip"
    assert lines[59:62] == ["8 Q0 n5 1 59 my_clip", "8 Q0 n6 2 58 my_clip", "8 Q0 n8 3 57 my_clip"]
    assert read(tmp_path / "run.txt") == run["run"]


def test_predictions_repeat_the_captions_and_rank_everything(monkeypatch, tmp_path):
    from cir_jax.data.benchmark import Benchmark

    records = [{"candidate": f"n{row}", "captions": ["a", "b"]} for row in range(2)]
    asked = [{"id": f"q{row}", "text": "a and b", "record": records[row]} for row in range(2)]
    ids = [f"n{row}" for row in range(4)]
    make = lambda right: Benchmark("fashioniq:x", "dress", "v", asked, [{}] * 4, ids, right)
    rows = np.array([[3, 0, 1, 2], [1, 2, 3, 0]])
    hidden, known = make([{}, {}]), make([{1: 1.0}, {2: 1.0}])
    assert submissions.of_hits(known, rows) == {} and submissions.depth(known) == 0
    assert submissions.depth(known, True) == submissions.depth(hidden) == 4
    found = submissions.of_hits(hidden, rows)
    assert found == submissions.of_hits(known, rows, wanted=True)
    with pytest.raises(
        ValueError, match=r"2 queries with 4 names, expected all items: 2,017 x 3,817"
    ):
        write(tmp_path / "x.json", found["predictions"])
    monkeypatch.setitem(submissions.FASHIONIQ_SIZES, (2, 4), "small")
    write(tmp_path / "x.json", found["predictions"])
    assert json.loads((tmp_path / "x.json").read_text()) == [
        records[0] | {"ranking": ["n3", "n0", "n1", "n2"]},
        records[1] | {"ranking": ["n1", "n2", "n3", "n0"]},
    ]
    short = submissions.of_hits(hidden, rows[:, :3])["predictions"]
    with pytest.raises(ValueError, match="2 queries with 3 names"):
        write(tmp_path / "short.json", short)


# ---- the command ----


def test_the_command_judges_and_scores(put, capsys):
    from cir_jax.eval import main

    run = put(RUN, "run.txt")
    main(["--check", str(run)])
    assert "TREC run, 2 queries, 1 to 2 names each: valid" in capsys.readouterr().out
    main(["--check", str(run), "--labels", str(put("a 0 x 1\nb 0 y 2\n", "qrels"))])
    printed = capsys.readouterr().out
    assert "mrr@10              75.0000 %" in printed
    with pytest.raises(ValueError, match="has version"):
        main(["--check", str(run), str(put({"version": "rc1"}))])
    for wrong in ([], ["emoji", "--check", str(run)], ["emoji", "--labels", str(run)]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_the_command_takes_candidates(tmp_path, capsys):
    from cir_jax.eval import main
    from cir_jax.evaluation.candidates import Candidates, write_candidates

    names = np.array([["a", "b"], ["b", "a"]])
    targets = np.array(["a", "a"])
    write_candidates(tmp_path / "a.npz", Candidates(names, names[0], targets, split="val"))
    main(["--check", str(tmp_path / "a.npz")])
    printed = capsys.readouterr().out
    assert "candidates of val, 2 queries, the first 2 of 2" in printed
    assert "recall@1            50.0000 %" in printed
