"""The page of an evaluation: what it says about hand-made hits, and that it stands alone."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from cir_jax.data.benchmark import Benchmark
from cir_jax.evaluation import metrics
from cir_jax.report import page
from cir_jax.report.evaluation import EXAMPLES, evaluation_page, examples
from cir_jax.report.pictures import SHORT, SHOWN
from cir_jax.report.plots import recall_curve

VOID = {"meta", "br", "img"}
SCRIPT = "<script>alert('x')</script>"
ITEMS = 12
# Ranks of the right answer of each query, which is the gallery row of the query's number; None: not listed.
BEFORE = [6, 0, 2, None, 4, 1]
AFTER = [0, 3, 2, 1, None, 0]


class Node(SimpleNamespace):
    """An element with its children; `text` is all text in it."""

    def find(self, tag=None, style=None) -> list["Node"]:
        found = [node for child in self.children for node in child.find(tag, style)]
        styles = self.attributes.get("class", "").split()
        return ([self] if tag in (None, self.tag) and style in (None, *styles) else []) + found

    @property
    def text(self):
        return "".join(self.words) + "".join(child.text for child in self.children)


class Tree(HTMLParser):
    """Elements of a page; every tag must be closed, in order."""

    def __init__(self, source):
        super().__init__()
        self.root = Node(tag="", attributes={}, children=[], words=[])
        self.open = [self.root]
        self.feed(source)
        self.close()
        assert len(self.open) == 1, f"not closed: {[node.tag for node in self.open[1:]]}"

    def handle_starttag(self, tag, attributes):
        node = Node(tag=tag, attributes=dict(attributes), children=[], words=[])
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].words.append(data)


def picture(number: int) -> np.ndarray:
    return np.full((6, 6, 3), 17 * number, np.uint8)


def made_benchmark(name="shapes", variant="noto", **changes) -> Benchmark:
    queries = len(BEFORE)
    parts = {
        "queries": [{"text": f"shape {q}", "id": f"q{q}"} for q in range(queries)],
        "gallery": [{"image": picture(row), "text": f"item {row}"} for row in range(ITEMS)],
        "ids": [f"i{row}" for row in range(ITEMS)],
        "positives": [{q: 1.0} for q in range(queries)],
        "rules": ["colour", "size", "colour", "colour", "size", "colour"],
        "metrics": ("recall@1", "recall@5", "mrr"),
    }
    return Benchmark(name=name, variant=variant, split="test", **{**parts, **changes})


def hits(ranks, depth=10) -> np.ndarray:
    """Lists in which query q has its own row at the given rank."""
    lists = []
    for query, rank in enumerate(ranks):
        others = [row for row in range(ITEMS) if row != query]
        order = others if rank is None else others[:rank] + [query] + others[rank:]
        lists.append(order[:depth])
    return np.array(lists)


def entry(benchmark, rows, stage=1, index="exact", **more):
    values = metrics.per_query(rows, benchmark)
    row = {
        "benchmark": benchmark.name,
        "variant": benchmark.variant,
        "split": benchmark.split,
        "run": "weights/first_model",
        "stage": stage,
        "index": index,
        "index_asked": index,
        "queries": len(benchmark.queries),
        "gallery": len(benchmark.gallery),
        "depth": rows.shape[1],
        "metrics": {name: float(value.mean()) for name, value in values.items()},
        "interval": {name: list(metrics.interval(value)) for name, value in values.items()},
        "random": metrics.random_level(benchmark, length=rows.shape[1]),
        "milliseconds_per_query": 1.5,
        "checkpoints": [{"name": "first_model", "fingerprint": "aaaa1111"}],
    }
    if benchmark.rules:
        row["rules"] = metrics.by_rule(values, benchmark.rules)
    rank = metrics.ranks(rows, benchmark.positives, benchmark.exclude)
    return {**row, **more}, {"rows": rows, "rank": rank, "ids": np.array(["q"]), **values}


def both(benchmark, before=None, after=None, p=0.0421, **more):
    """The entries of two stages."""
    first = entry(benchmark, hits(BEFORE) if before is None else before)
    second = entry(benchmark, hits(AFTER) if after is None else after, 2, reranker="second_model")
    gain = {name: second[0]["metrics"][name] - value for name, value in first[0]["metrics"].items()}
    second[0].update(k=10, gain=gain, p=dict.fromkeys(gain, p), **more)
    second[0]["checkpoints"] = [
        *first[0]["checkpoints"],
        {"name": "second_model", "fingerprint": "bbbb2222"},
    ]
    return [first, second]


def written(tmp_path, results, *benchmarks, **options) -> tuple[str, Node]:
    known = {(b.name, b.variant): b for b in benchmarks}
    path = tmp_path / "report.html"
    evaluation_page(path, results, lambda row: known[row["benchmark"], row["variant"]], **options)
    source = path.read_text(encoding="utf-8")
    return source, Tree(source).root


@pytest.fixture
def made(tmp_path):
    benchmark = made_benchmark()
    return written(tmp_path, both(benchmark), benchmark)


def example(root, query, kind) -> Node:
    (found,) = [
        node
        for group in root.find("div", kind)
        for node in group.find("article", "example")
        if node.attributes["data-query"] == str(query)
    ]
    return found


def marked(strip) -> list[int]:
    """Places of the outlined pictures in a strip."""
    return [
        place
        for place, tile in enumerate(strip.find("div", "tile"))
        if "right" in tile.attributes["class"].split()
    ]


def test_right_answers_are_marked_where_each_stage_has_them(made):
    first, second = example(made[1], 0, "gain").find("div", "strip")
    assert (marked(first), marked(second)) == ([6], [0])
    assert len(first.find("div", "tile")) == len(second.find("div", "tile")) == SHOWN
    assert first.text.startswith("stage 1rank 7") and second.text.startswith("stage 2rank 1")


def test_strips_show_the_pictures_of_the_hits(made):
    source, root = made
    stored = dict(re.findall(r"\.(p\d+)\{background-image:url\((data:[^)]*)\)", source))
    for strip, ranks in zip(example(root, 0, "gain").find("div", "strip"), (BEFORE, AFTER)):
        shown = [stored[t.attributes["class"].split()[-1]] for t in strip.find("div", "tile")]
        assert shown == [uri(row) for row in hits(ranks)[0][:SHOWN]]


def uri(row):
    from cir_jax.data.images import data_uri

    return data_uri(picture(row))


def test_rank_changes_are_told(made):
    pills = {0: "rank 7 → 1", 3: "rank beyond 10 → 2", 5: "rank 2 → 1"}
    for query, words in pills.items():
        (pill,) = example(made[1], query, "gain").find("span", "plus")
        assert pill.text == words
    for query, words in {1: "rank 1 → 4", 4: "rank 5 → beyond 10"}.items():
        (pill,) = example(made[1], query, "loss").find("span", "minus")
        assert pill.text == words


def test_gains_and_losses_are_the_largest_in_order_and_drawn_ones_repeat():
    before, after = np.array([9, 1, 0, 0, 5, 3]), np.array([0, 0, 1, 10, 5, 2])
    chosen = examples(before, after, 10, 2)
    assert chosen["gain"] == [0, 1]
    assert chosen["loss"] == [3, 2]
    assert chosen["drawn"] == examples(after, before, 10, 2)["drawn"]  # whatever happened
    assert len(set(chosen["drawn"])) == 2
    assert examples(before, before, 10, 2)["gain"] == []


def test_the_page_says_how_examples_were_chosen(made):
    gain, loss, drawn = (made[1].find("div", kind)[0].text for kind in ("gain", "loss", "drawn"))
    assert "Biggest gains" in gain and "all 3 queries whose right answer moved up" in gain
    assert "Biggest losses" in loss and "all 2 queries whose right answer moved down" in loss
    assert "Drawn at random" in drawn and "Not chosen: 4 of all 6 queries" in drawn


def test_best_and_worst_are_those_after_the_last_stage():
    before, after = np.array([0, 0, 0, 9, 9]), np.array([0, 10, 0, 0, 4])
    lead = np.array([0.1, 0.9, 0.5, 0.2, 0.8])
    chosen = examples(before, after, 10, 2, lead)
    assert chosen["best"] == [2, 3] and chosen["worst"] == [1, 4]
    assert examples(before, np.zeros(5, int), 10, 2)["worst"] == []


def test_ranks_are_counted_before_and_after(made):
    (card,) = [n for n in made[1].find("article", "card") if n.find("div", "histogram")]
    told = [node.attributes["aria-label"] for node in card.find("div", "histogram")[0].children]
    assert told == [
        "rank 1: 1 → 2 queries",
        "rank 2: 1 → 1 queries",
        "rank 3–5: 2 → 2 queries",
        "rank 6–10: 1 → 0 queries",
        "rank 11+: 1 → 1 queries",
    ]
    assert "median rank 4 → 2.5" in card.text
    heights = [i.attributes["style"] for i in card.find("div", "histogram")[0].find("i")]
    assert heights[:4] == ["height:50.0%", "height:100.0%", "height:50.0%", "height:50.0%"]


def test_wins_and_losses_are_counted(made):
    (key,) = [node for node in made[1].find("div", "key") if "moved up" in node.text]
    assert [node.text for node in key.find("b")] == ["3", "1", "2"]
    widths = [node.attributes["style"] for node in made[1].find("div", "moves")[0].find("span")]
    assert widths == ["flex:3", "flex:1", "flex:2"]
    (square,) = made[1].find("table", "square")
    # Rank 1 before: query 1, which loses it; queries 0 and 5 win it.
    assert [node.text for node in square.find("td")] == ["0", "1", "2", "3"]


def test_a_shorter_second_list_moves_nothing_that_lies_beyond_it(tmp_path):
    benchmark = made_benchmark()
    kept = hits([11, 11, 11, 11, 11, 0], 12)
    shorter = hits([None, None, None, None, None, 0], 10)
    _, root = written(tmp_path, both(benchmark, kept, shorter), benchmark)
    (key,) = [node for node in root.find("div", "key") if "moved up" in node.text]
    assert [node.text for node in key.find("b")] == ["0", "6", "0"]
    assert "No query whose right answer moved down" in root.text


def test_card_shows_values_intervals_gain_and_chance(tmp_path):
    benchmark = made_benchmark()
    results = both(benchmark)
    results[1][0]["gain"]["recall@1"] = 0.0934  # as stored, not worked out again
    _, root = written(tmp_path, results, benchmark)
    (card,) = root.find("section", "cards")[0].find("article")
    assert [node.text for node in card.find("b", "big")] == ["16.7%", "33.3%"]
    low, high = results[1][0]["interval"]["recall@1"]
    assert f"({100 * low:.1f}–{100 * high:.1f})" in card.text
    assert "+9.3 points" in card.text
    assert "unlikely to be chance: p = 0.042" in card.text
    assert "8.3" in card.find("dl")[0].text  # 1 of 12 at random


@pytest.mark.parametrize(
    ("p", "words"),
    [(0.0001, "hardly by chance: p < 0.001"), (0.05, "may well be chance: p = 0.05")],
)
def test_chance_is_put_in_words(tmp_path, p, words):
    benchmark = made_benchmark()
    _, root = written(tmp_path, both(benchmark, p=p), benchmark)
    assert words in root.find("p", "gain")[0].text


def test_a_loss_is_not_shown_as_a_gain(tmp_path):
    benchmark = made_benchmark()
    _, root = written(tmp_path, both(benchmark, hits(AFTER), hits(BEFORE)), benchmark)
    (shown,) = root.find("p", "gain")[0].find("b", "minus")
    assert shown.text == "−16.7 points"


def test_models_time_and_precision_are_named(tmp_path):
    benchmark = made_benchmark()
    environment = {"time": "2026-01-02T03:04:05+00:00", "precision": "float32, highest"}
    _, root = written(tmp_path, both(benchmark), benchmark, environment=environment)
    listed = [node.text for node in root.find("ul", "models")[0].find("li")]
    assert listed == ["first_modelaaaa1111", "second_modelbbbb2222"]
    about = root.find("p", "about")[0].text
    assert about == "1 benchmark, 6 queries · 2026-01-02 03:04:05 UTC · float32, highest"


def test_everything_from_data_is_escaped(tmp_path):
    queries = [{"text": SCRIPT, "document": SCRIPT * 20, "image": picture(2)} for _ in BEFORE]
    gallery = [{"image": picture(row), "text": SCRIPT + '" onload="x'} for row in range(ITEMS)]
    rules = [SCRIPT] * len(BEFORE)
    benchmark = made_benchmark(SCRIPT, SCRIPT, queries=queries, gallery=gallery, rules=rules)
    results = both(benchmark)
    for row, _ in results:
        row["run"] = row["checkpoints"][0]["name"] = row["checkpoints"][0]["fingerprint"] = SCRIPT
        row["index"] = SCRIPT
    results[1][0]["reranker"] = SCRIPT
    source, root = written(tmp_path, results, benchmark, environment={"precision": SCRIPT})
    assert not root.find("script")
    assert "<script" not in source
    assert not [node for node in root.find() if "onload" in node.attributes]
    assert SCRIPT in root.find("div", "words")[0].text


def test_the_page_stands_alone(made):
    source, root = made
    assert "http" not in source
    assert not [node for node in root.find() if {"src", "href", "srcset"} & node.attributes.keys()]
    links = [node.attributes.get("xlink:href", "#") for node in root.find()]
    assert all(link.startswith("#") for link in links)
    targets = {node.attributes.get("id") for node in root.find()}
    assert {link[1:] for link in links if link != "#"} <= targets
    assert all(address.startswith("data:") for address in re.findall(r"url\(([^)#]+)\)", source))


def test_a_picture_is_stored_once(made):
    assert made[0].count("data:image/") == len(set(re.findall(r"data:image/[^)]*", made[0])))
    assert len(made[1].find("div", "tile")) > 3 * made[0].count("data:image/")


def test_inner_names_of_the_plots_are_unique(tmp_path):
    benchmarks = [made_benchmark(), made_benchmark(variant="twemoji")]
    _, root = written(tmp_path, both(benchmarks[0]) + both(benchmarks[1]), *benchmarks)
    names = [node.attributes["id"] for node in root.find() if "id" in node.attributes]
    assert names and len(names) == len(set(names))
    assert len(root.find("svg")) == 2


def test_several_styles_each_have_their_card_and_examples(tmp_path):
    benchmarks = [made_benchmark(), made_benchmark(variant="twemoji")]
    results = both(benchmarks[0]) + both(benchmarks[1], hits(AFTER), hits(AFTER), p=1.0)
    _, root = written(tmp_path, results, *benchmarks)
    cards = root.find("section", "cards")[0].find("article")
    assert ["noto · test" in c.text for c in cards] == [True, False]
    assert ["twemoji · test" in c.text for c in cards] == [False, True]
    assert "±0.0 points" in cards[1].text
    assert len(root.find("div", "gain")) == 2
    assert "2 benchmarks, 12 queries" in root.text


def test_a_first_stage_alone_is_shown_without_a_comparison(tmp_path):
    benchmark = made_benchmark(rules=())
    _, root = written(tmp_path, [entry(benchmark, hits(BEFORE))], benchmark)
    (card,) = root.find("section", "cards")[0].find("article")
    assert [node.text for node in card.find("b", "big")] == ["16.7%"]
    assert "stage 1 only" in card.text
    assert not root.find("div", "gain") and not root.find("div", "moves")
    assert "rank 1" in example(root, 1, "best").text and "beyond" in example(root, 3, "worst").text
    assert len(root.find("div", "drawn")[0].find("article", "example")) == EXAMPLES
    assert root.find("svg") and len(root.find("table", "all")[0].find("tr")) == 2
    assert "second stage" not in root.text


def test_a_second_stage_alone_is_shown_too(tmp_path):
    benchmark = made_benchmark()
    _, root = written(tmp_path, both(benchmark)[1:], benchmark)
    assert "stage 2 only" in root.find("section", "cards")[0].text


def test_stages_meet_only_with_the_same_index(tmp_path):
    benchmark = made_benchmark()
    near = entry(benchmark, hits(BEFORE), index="scann", **{"index_recall@10": 0.987})
    results = [entry(benchmark, hits(BEFORE)), near, both(benchmark)[1]]
    results[2][0].update(index="scann", index_asked="scann")
    _, root = written(tmp_path, results, benchmark)
    (card,) = root.find("section", "cards")[0].find("article")
    assert "stage 1 only" in card.text  # the exact one has no partner
    lines = root.find("table", "all")[0].find("tr")
    assert len(lines) == 4 and "0.987" in lines[2].text


def test_second_stages_of_one_first_stage_are_told_apart(tmp_path):
    benchmark = made_benchmark()
    results = both(benchmark)
    for change in ({"reranker": "third_model"}, {"k": 20}, {"fusion": 0.5}):
        # Every run brings its first stage along.
        results += [results[0], ({**results[1][0], **change}, results[1][1])]
    _, root = written(tmp_path, results, benchmark)
    labels = [node.text for node in root.find("section", "cards")[0].find("header")]
    assert len(set(labels)) == len(labels) == 4
    parts = ["second_model, first 10", "third_model, first 10", "first 20", "fusion 0.5"]
    assert all(part in label for part, label in zip(parts, labels))
    assert len(root.find("table", "all")[0].find("tr")) == 1 + 1 + 4


def test_rules_have_a_line_each(made):
    (table,) = [t for t in made[1].find("table") if "colour" in t.text]
    cells = [[cell.text for cell in line.find("td")][:4] for line in table.find("tr")[1:]]
    # colour: queries 0, 2, 3, 5; size: 1, 4.
    assert cells == [["4", "0.0", "50.0", "+50.0"], ["2", "50.0", "0.0", "−50.0"]]
    widths = [node.attributes["style"] for node in table.find("i")]
    assert widths == ["width:0.0%", "width:50.0%", "width:50.0%", "width:0.0%"]


def test_recall_curve_counts_ranks():
    curve = recall_curve(np.array([0, 2, -1, 7]), 4)
    np.testing.assert_allclose(curve, [25, 25, 50, 50])


def test_the_plot_tells_its_ends(made):
    (plot,) = made[1].find("svg")
    label = plot.attributes["aria-label"]
    assert label == "recall at 1 to 10: 16.7 to 83.3 percent, 33.3 to 83.3 percent"
    assert "#0101" not in made[0]  # colours of the page, in light and dark


def test_the_reference_is_no_hit_and_missing_hits_are_left_out(tmp_path):
    benchmark = made_benchmark(exclude=[11] * len(BEFORE))
    rows = hits(BEFORE)
    rows[:, -1] = -1
    rows[:, 4] = 11
    rows[4] = [11, 4, *[-1] * 8]
    _, root = written(tmp_path, both(benchmark, hits(BEFORE), rows), benchmark)
    strip = example(root, 4, "gain").find("div", "strip")[1]
    assert len(strip.find("div", "tile")) == 1 and marked(strip) == [0]


def test_documents_are_shortened_and_open_whole(tmp_path):
    long = "A thing that is described at length. " * 20
    benchmark = made_benchmark(queries=[{"document": long, "text": long} for _ in BEFORE])
    _, root = written(tmp_path, both(benchmark), benchmark)
    words = root.find("div", "words")[0]
    assert len(words.find("p")[0].text) <= SHORT and words.find("p")[0].text.endswith(" …")
    assert long in words.find("details")[0].text
    assert words.text.count(long) == 1


def test_items_without_pictures_show_their_words(tmp_path):
    benchmark = made_benchmark(gallery=[{"text": f"item {row}"} for row in range(ITEMS)])
    source, root = written(tmp_path, both(benchmark), benchmark)
    assert "data:image" not in source
    assert root.find("div", "strip")[0].find("div", "tile")[0].text.startswith("item ")


def test_nothing_evaluated_is_a_page_too(tmp_path):
    _, root = written(tmp_path, [])
    assert "Nothing was evaluated." in root.text


def test_another_benchmark_is_refused(tmp_path):
    benchmark = made_benchmark()
    other = made_benchmark(queries=[{"text": "x"}], positives=[{0: 1.0}], rules=())
    with pytest.raises(ValueError, match="ranks of 6 queries, but the benchmark has 1"):
        written(tmp_path, both(benchmark), other)
    assert not (tmp_path / "report.html").exists()


def test_the_same_results_give_the_same_page(tmp_path, made):
    benchmark = made_benchmark()
    assert written(tmp_path, both(benchmark), benchmark)[0] == made[0]


def test_many_benchmarks_share_the_examples_of_a_page(tmp_path):
    benchmarks = [made_benchmark(variant=f"v{number}") for number in range(6)]
    results = [e for benchmark in benchmarks for e in both(benchmark)]
    _, root = written(tmp_path, results, *benchmarks)
    assert len(root.find("article", "example")) == 6 * 5 * 2


def test_the_page_of_a_search_is_whole(tmp_path):
    items = [{"image": picture(row), "text": SCRIPT} for row in range(3)]

    class Index:
        def __len__(self):
            return len(items)

        def items(self, rows):
            return [items[row] for row in rows]

    result = lambda row, stage: SimpleNamespace(row=row, id=f"i{row}", score=1.0 - row, stage=stage)
    found = [result(2, 2), result(0, 1)]
    page.search_page(tmp_path / "s.html", found, Index(), text=SCRIPT, image=picture(1))
    root = Tree((tmp_path / "s.html").read_text()).root
    second, first = root.find("section")
    assert len(second.find("figure")) == len(first.find("figure")) == 1  # two kinds of scores
    assert len(root.find("figure")) == 2 and not root.find("script")
    assert [node.attributes["src"] for node in root.find("img")] == [uri(row) for row in (1, 2, 0)]


def test_heavy_libraries_wait_until_they_are_needed():
    program = (
        "import sys, cir_jax.report.evaluation\n"
        "heavy = {'matplotlib', 'PIL', 'jax'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_audit_is_a_table_of_shares_and_its_rows_are_no_systems(tmp_path):
    benchmark = made_benchmark()
    interval = {name: [0.1, 0.9] for name in ("all", "text", "image", "either")}
    shares = {
        "all": 0.8,
        "text": 0.2,
        "image": 0.3,
        "either": 0.4,
        "rest": 0.75,
        "rest_interval": [0.5, 1.0],
    }
    audit = {
        "benchmark": SCRIPT, "variant": "noto", "split": "test", "run": "m", "stage": 1, "queries": 6,
        "metrics": {"recall@1": shares | {"interval": interval, "rest_queries": 4}},
    }  # fmt: skip
    alone = entry(benchmark, hits(AFTER), asks="text")
    results = [entry(benchmark, hits(BEFORE)), alone]
    source, root = written(tmp_path, results, benchmark, audits=[audit])
    assert SCRIPT not in source
    (table,) = root.find("table", "audit")
    assert [node.text for node in table.find("b")] == ["20.0", "30.0", "40.0", "80.0", "75.0"]
    assert "4 queries" in table.text
    parts = table.find("div", "moves")[0].find("span")
    assert [part.attributes["style"] for part in parts] == [
        "flex:0.4000",
        "flex:0.4500",
        "flex:0.1500",
    ]
    (cards,) = root.find("section", "cards")
    assert [node.text for node in cards.find("b", "big")] == ["16.7%"]  # of the whole query alone
    assert "text alone" in root.find("table", "all")[0].text
