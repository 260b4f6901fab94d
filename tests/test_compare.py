"""Two results side by side: what is paired, what differs by hand-made ranks, and what is refused."""

import json

import numpy as np
import pytest
from test_report import AFTER, BEFORE, Tree, both, entry, hits, made_benchmark

from cir_jax.evaluation import compare, metrics
from cir_jax.evaluation.compare import compared, difference, differences
from cir_jax.report.comparison import comparison_page


def stored(folder, results, **more):
    """A results.json with its files, as eval writes them."""
    folder.mkdir()
    rows = []
    for number, (row, arrays) in enumerate(results):
        ids = np.array([f"q{n}" for n in range(len(arrays["rank"]))])
        rules = {"rules": np.array(made_benchmark().rules)} if len(ids) == len(BEFORE) else {}
        np.savez(folder / f"{number}.npz", **{**arrays, "ids": ids, **rules, **more})
        rows.append({**row, "ranks": f"{number}.npz"})
    (folder / "results.json").write_text(json.dumps({"format": 1, "rows": rows}))
    return folder / "results.json"


def two(tmp_path, first=BEFORE, second=AFTER, **changes):
    benchmark = made_benchmark(**changes)
    paths = [
        stored(tmp_path / letter, [entry(benchmark, hits(ranks))])
        for letter, ranks in (("a", first), ("b", second))
    ]
    return benchmark, paths


def test_the_difference_of_each_metric(tmp_path):
    _, paths = two(tmp_path)
    (pair,) = compared(*paths)
    found = differences(pair)
    one = found["recall@1"]
    assert (one.queries, one.first, one.second) == (6, 1 / 6, 2 / 6)
    assert one.gap == pytest.approx(1 / 6)
    values = [np.array([0, 1, 0, 0, 0, 0.0]), np.array([1, 0, 0, 0, 0, 1.0])]
    assert one.p == metrics.paired_p(values[1], values[0])
    assert (one.low, one.high) == metrics.interval(values[1] - values[0])
    assert found["mrr"].gap == pytest.approx(
        pair.second.arrays["mrr"].mean() - pair.first.arrays["mrr"].mean()
    )
    rules = compare.by_rule(pair, "recall@1")
    assert {rule: (each.queries, each.gap) for rule, each in rules.items()} == {
        "colour": (4, 0.5),
        "size": (2, -0.5),
    }


def test_swapping_the_two_turns_the_sign_and_nothing_else(tmp_path):
    _, paths = two(tmp_path)
    ahead, back = (differences(compared(*order)[0])["mrr"] for order in (paths, paths[::-1]))
    assert back.gap == pytest.approx(-ahead.gap) and back.p == pytest.approx(ahead.p, abs=0.01)
    assert difference(np.ones(5), np.ones(5)).p == 1


def test_queries_in_another_order_are_matched_by_id(tmp_path):
    benchmark = made_benchmark()
    first = stored(tmp_path / "a", [entry(benchmark, hits(BEFORE))])
    second = stored(tmp_path / "b", [entry(benchmark, hits(BEFORE))])
    with np.load(tmp_path / "b/0.npz") as found:
        arrays = {name: each[::-1] for name, each in found.items()}
    np.savez(tmp_path / "b/0.npz", **arrays)
    (pair,) = compared(first, second)
    np.testing.assert_array_equal(pair.first.arrays["rank"], pair.second.arrays["rank"])
    np.testing.assert_array_equal(pair.first.arrays["rows"], pair.second.arrays["rows"])


def test_stages_are_paired_and_the_last_with_the_last(tmp_path):
    benchmark = made_benchmark()
    one = stored(tmp_path / "a", [entry(benchmark, hits(BEFORE))])
    staged = stored(tmp_path / "b", both(benchmark))
    stages = lambda pairs: [tuple(each.row["stage"] for each in pair) for pair in pairs]
    assert stages(compared(staged, staged)) == [(1, 1), (2, 2)]
    assert stages(compared(one, staged)) == [(1, 1), (1, 2)]
    assert stages(compared(staged, one)) == [(1, 1), (2, 1)]


def test_the_page_shows_numbers_and_pictures(tmp_path):
    benchmark, paths = two(tmp_path)
    comparison_page(tmp_path / "page.html", compared(*paths), lambda pair: benchmark)
    root = Tree((tmp_path / "page.html").read_text()).root
    assert [node.text for node in root.find("b", "big")] == ["16.7%", "33.3%"]
    assert "+16.7 points" in root.text and "B − A" in root.text
    gains = root.find("div", "gain")[0].find("article", "example")
    assert [node.attributes["data-query"] for node in gains] == ["0", "3", "5"]
    first, second = gains[0].find("div", "strip")
    assert first.text.startswith("Arank 7") and second.text.startswith("Brank 1")
    assert len(first.find("div", "tile")) == 8
    losses = root.find("div", "loss")[0].find("article", "example")
    assert [node.attributes["data-query"] for node in losses] == ["1", "4"]


def test_without_the_gallery_ids_stand_for_pictures(tmp_path):
    _, paths = two(tmp_path)
    comparison_page(tmp_path / "page.html", compared(*paths), compare.opened)
    text = Tree((tmp_path / "page.html").read_text()).root.text
    assert "The gallery is not here" in text and "q0: rank 7 → 1" in text


def test_the_command_prints_and_draws(tmp_path, capsys):
    from cir_jax.eval import main

    _, paths = two(tmp_path)
    main(["--compare", *map(str, paths), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "shapes/noto/test, 6 queries" in printed and "+16.67" in printed
    assert (tmp_path / "out/comparison.html").is_file()
    main(["--compare", str(paths[0].parent), str(paths[0]), "--output", str(tmp_path / "out")])
    assert "+0.00" in capsys.readouterr().out


# ---- bad pairs ----


def changed_file(tmp_path, change):
    _, paths = two(tmp_path)
    value = json.loads(paths[1].read_text())
    change(value)
    paths[1].write_text(json.dumps(value))
    return paths


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v["rows"][0].update(benchmark="forms"), "shapes/noto/test, .* has forms/noto/test"),
        (lambda v: v["rows"][0].update(split="val"), "nothing to compare"),
        (lambda v: v["rows"].clear(), "has no rows"),
        (lambda v: v["rows"][0].update(gallery=99), "12 items in .* and 99 in"),
        (lambda v: v["rows"][0].update(ranks="../a/0.npz"), "expected a file beside it"),
        (lambda v: v["rows"][0].update(ranks=3), "expected a file beside it"),
        (lambda v: v["rows"][0].pop("stage"), "has a row without"),
        (lambda v: v["rows"].append(3), "has a row without"),
        (lambda v: v.update(format=2), "no results.json of format 1"),
        (lambda v: v["rows"][0]["metrics"].update(other=1.0), "has no other for each of 6 queries"),
    ],
)  # fmt: skip
def test_bad_results_are_refused(change, told, tmp_path):
    paths = changed_file(tmp_path, change)
    with pytest.raises(ValueError, match=told):
        compared(*paths)


def test_other_queries_are_refused(tmp_path):
    benchmark = made_benchmark()
    first = stored(tmp_path / "a", [entry(benchmark, hits(BEFORE))])
    other = {"ids": np.array([f"x{n}" for n in range(6)])}
    for folder, more, told in (
        ("b", other, "6 queries, 6 of them alone"),
        ("c", {"ids": np.array(["q0"] * 6)}, "only evaluations of the same queries, each once"),
        ("d", {"rank": np.zeros(5, int)}, "has no rank for each of 6 queries"),
        ("e", {"mrr": np.array(["x"] * 6)}, "has no mrr for each"),
        ("n", {"mrr": np.full(6, np.nan)}, "has no mrr for each"),
        ("f", {"mrr": np.array([None] * 6)}, "no complete file of arrays"),
    ):
        second = stored(tmp_path / folder, [entry(benchmark, hits(AFTER))], **more)
        with pytest.raises(ValueError, match=told):
            compared(first, second)
    (tmp_path / "b/0.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"0\.npz is no complete file of arrays"):
        compared(first, tmp_path / "b")
    (tmp_path / "b/0.npz").unlink()
    with pytest.raises(FileNotFoundError):
        compared(first, tmp_path / "b")
