"""Search in two stages: every retriever, index and re-ranker together, against plain loops."""

import functools
from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx
from test_methods import INPUTS, METHODS_OF, RERANKERS, RETRIEVERS, drawn, pairs

import cir_jax
from cir_jax import retrieval
from cir_jax.data import emoji
from cir_jax.data.documents import BUILTIN, document_query
from cir_jax.data.inputs import prepare_batch
from cir_jax.index import ExactIndex, Hits, ScannIndex
from cir_jax.methods import METHODS, kinds
from cir_jax.model import Model
from cir_jax.retrieval import Queries, as_query, rerank, retrieve, score_candidates, united

ITEMS = 16
INDEXES = {"exact": ExactIndex, "scann": ScannIndex}
DOCUMENT = "A red fox lives in the forest. The fox hunts mice near the river at night."


def shared_kinds(retriever, reranker):
    """Kinds of query that both methods read, whose order in the tuples says which is the main one."""
    known = METHODS_OF[reranker].query_kinds
    return [kind for kind in METHODS_OF[retriever].query_kinds if kind in known]


# Every retriever before every re-ranker and before itself, which re-ranks too; the kinds of index take turns.
PAIRS = [(a, b) for a in RETRIEVERS for b in [*RERANKERS, a] if shared_kinds(a, b)]
TURNS = [(*pair, list(INDEXES)[number % len(INDEXES)]) for number, pair in enumerate(PAIRS)]


@functools.cache
def tiny(name):
    return drawn(METHODS[name][0].tiny(INPUTS))


def gallery():
    return emoji.gallery("noto", range(0, 40 * ITEMS, 40))


@functools.cache
def index_of(name, kind="exact"):
    """An index over the vectors of a tiny model, which knows its pictures."""
    ids, locator = [item["id"] for item in gallery()], {"kind": "emoji", "style": "noto"}
    return INDEXES[kind](tiny(name).encode("item", gallery()), ids, locator)


def query_of(kind, number=0):
    """A raw query with these parts."""
    return {part: pairs()[number]["query"][part] for part in kind}


@functools.cache
def alone(name):
    """`raw query, raw item -> score` of a method for one pair, without anything of `Model.score`."""
    model = tiny(name)
    part = lambda part: jax.jit(lambda p, x: getattr(nnx.merge(model.graph, p), part)(x))
    parts = {"query": part("query"), "item": part("item")}

    @jax.jit
    def together(params, query, item):
        method = nnx.merge(model.graph, params)
        if not hasattr(method, "score"):
            return (query * item).sum()
        return method.score(query, jax.tree.map(lambda x: x[:, None], item))[0, 0]

    def score(query, item):
        raw = {
            "query": query,
            "item": {part: item[part] for part in kinds(model.config, "item")[0]},
        }
        sides = {
            side: parts[side](model.params, prepare_batch([x], model.config.inputs))
            for side, x in raw.items()
        }
        return float(together(model.params, **sides))

    return score


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Many small programs run once each here: compiling them costs more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def scored(monkeypatch):
    """What models compute: `items` and `queries` whose features were made, `pairs` that were scored."""
    made = {"item": [], "query": [], "pairs": []}
    features, score = Model.features, Model.score
    last = {}

    def count_features(self, part, examples, *arguments, **options):
        last[part] = [name(part, examples[row]) for row in range(len(examples))]
        made[part] += last[part]
        return features(self, part, examples, *arguments, **options)

    def count_pairs(self, queries, items, rows, *arguments, **options):
        made["pairs"] += [
            (last["query"][query], last["item"][place])
            for query, places in enumerate(rows)
            for place in places
            if place >= 0
        ]
        return score(self, queries, items, rows, *arguments, **options)

    name = lambda part, x: x["id"] if part == "item" else x.get("text")
    monkeypatch.setattr(Model, "features", count_features)
    monkeypatch.setattr(Model, "score", count_pairs)
    return made


# ---- any retriever, any index, any re-ranker ----


def test_the_pairs_of_methods_are_covered():
    assert ("clip", "blip_rerank") in PAIRS and ("clip", "blip_itm") in PAIRS
    assert ("cfir", "cfir") in PAIRS and ("cfir", "blip_itm") in PAIRS
    assert {first for first, _ in PAIRS} == set(RETRIEVERS)
    assert {second for _, second in PAIRS} == set(METHODS_OF)


@pytest.mark.parametrize(("retriever", "reranker", "kind"), TURNS)
def test_any_two_methods_search_in_two_stages(retriever, reranker, kind):
    query = query_of(shared_kinds(retriever, reranker)[0])
    index, model = index_of(retriever, kind), tiny(retriever)
    first = cir_jax.search(model, index, **query, k=6)
    assert [result.stage for result in first] == [1] * 6
    options = {"k": 6, "candidates": 4, "reranker": tiny(reranker)}
    both = cir_jax.search(model, index, **query, **options)
    assert [result.stage for result in both] == [2] * 4 + [1] * 2
    assert both[4:] == first[4:]
    assert {result.row for result in both[:4]} == {result.row for result in first[:4]}
    assert all(result.id == gallery()[result.row]["id"] for result in both)
    scores = [result.score for result in both[:4]]
    assert scores == sorted(scores, reverse=True)
    expected = [alone(reranker)(query, gallery()[result.row]) for result in both[:4]]
    np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_clip_finds_and_blip_ranks(scored):
    """The pairing that the task names, without the machinery of the other tests."""
    model, second, query = tiny("clip"), tiny("blip_rerank"), pairs()[1]["query"]
    results = cir_jax.search(
        model,
        index_of("clip", "scann"),
        image=query["image"],
        text=query["text"],
        k=3,
        reranker=second,
        candidates=ITEMS,
    )
    every = {row: alone("blip_rerank")(query, item) for row, item in enumerate(gallery())}
    best = sorted(every, key=every.get, reverse=True)[:3]
    np.testing.assert_allclose([r.score for r in results], [every[r] for r in best], atol=2e-5)
    assert len(scored["pairs"]) == len(set(scored["pairs"])) == ITEMS


# ---- what is computed, and how often ----


def candidate_rows():
    """Candidates of six queries: shared items, an item twice over, missing ones, a query with none."""
    draw = np.random.default_rng(0)
    rows = np.stack([draw.permutation(ITEMS)[:4] for _ in range(6)])
    rows[1, 2:], rows[4] = -1, -1
    return rows


def raw_queries(name, count=6):
    return [query_of(METHODS_OF[name].query_kinds[0], number) for number in range(count)]


def pictures(rows):
    return [gallery()[row] for row in rows]


@pytest.mark.parametrize("name", [*RERANKERS, "clip"])
def test_everything_is_computed_once(name, scored):
    rows, done = candidate_rows(), []
    scores = score_candidates(tiny(name), raw_queries(name), pictures, rows, done.append)
    wanted = {
        (query["text"], gallery()[row]["id"])
        for query, found in zip(raw_queries(name), rows)
        for row in found[found >= 0]
    }
    assert Counter(scored["pairs"]) == dict.fromkeys(wanted, 1)
    assert Counter(scored["item"]) == dict.fromkeys({item for _, item in wanted}, 1)
    assert Counter(scored["query"]) == dict.fromkeys({query for query, _ in wanted}, 1)
    assert sum(done) == 5  # one of the six queries has no candidate
    assert scores.dtype == np.float32 and scores.shape == rows.shape
    assert (np.isneginf(scores) == (rows < 0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RERANKERS, "clip"])
def test_little_memory_gives_the_same_scores(name, scored, monkeypatch):
    rows, model = candidate_rows(), tiny(name)
    whole = score_candidates(model, raw_queries(name), pictures, rows)
    pairs_before = Counter(scored["pairs"])
    for many in (2, 0):  # so many queries, or so many items; 0: not even one
        for part in ("query", "item"):
            scored["pairs"].clear()
            done, room = [], 2 * many * model.feature_bytes(part)
            monkeypatch.setattr(retrieval, "FEATURE_BYTES", room)
            scores = score_candidates(model, raw_queries(name), pictures, rows, done.append)
            np.testing.assert_allclose(scores, whole, atol=1e-5)
            assert Counter(scored["pairs"]) == pairs_before
            assert sum(done) == 5 and (len(done) == (3 if many else 5) or part == "item")


def test_the_size_of_features_is_known_without_computing_them(scored):
    for name in sorted(METHODS_OF):
        model = tiny(name)
        for part in ("item", "query"):
            scored[part].clear()
            size = model.feature_bytes(part)
            assert not scored[part]
            raw = gallery()[:2] if part == "item" else raw_queries(name, 2)
            made = jax.tree.leaves(model.features(part, raw))
            assert sum(x.nbytes for x in made) <= 2 * size  # texts are cut to the longest
            if part == "item":
                assert sum(x.nbytes for x in made) == 2 * size


def test_no_candidates_need_no_model(scored):
    rows = np.full((2, 3), -1)
    scores = score_candidates(tiny("blip_itm"), raw_queries("blip_itm", 2), pictures, rows)
    assert np.isneginf(scores).all()
    assert not any(scored.values())


# ---- scores of a model ----


def brute(name, queries, rows):
    return np.array(
        [
            [alone(name)(query, gallery()[row]) if row >= 0 else -np.inf for row in found]
            for query, found in zip(queries, rows)
        ]
    )


@pytest.mark.parametrize("name", [*RERANKERS, "clip"])
def test_scores_equal_those_of_each_pair_alone(name, monkeypatch):
    """However many pairs at once, on however many devices, and with texts padded to any length."""
    model, rows, queries = tiny(name), candidate_rows(), raw_queries(name)
    lengths = (
        "a fox",
        "x",
        "the same with a longer beard and a red hat facing right",
        "old",
        "b",
        "c",
    )
    queries = [{**query, "text": text} for query, text in zip(queries, lengths)]
    expected = brute(name, queries, rows)
    items = model.features("item", gallery())
    asked = [model.features("query", queries, batch_size=size) for size in (2, 128)]
    for features in asked:
        for together in (1, 512):
            scores = model.score(features, items, rows, together)
            np.testing.assert_allclose(scores, expected, atol=2e-5)
            assert scores.dtype == np.float32
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    np.testing.assert_allclose(model.score(asked[0], items, rows), expected, atol=2e-5)


def test_one_query_is_not_scored_many_times_over(monkeypatch):
    from cir_jax import model as module

    sizes, score = [], module._score
    monkeypatch.setattr(module, "_score", lambda *x: sizes.append(x[-1].shape) or score(*x))
    model = tiny("clip")
    queries = model.features("query", raw_queries("clip", 1))
    model.score(queries, model.features("item", gallery()), np.arange(5)[None])
    assert sizes == [(8,)]  # five pairs, as many for each of four devices


# ---- the order behind two stages ----


def hits_of(*lists):
    rows = np.array([[row for row, _ in found] for found in lists])
    scores = np.array([[score for _, score in found] for found in lists], np.float32)
    return Hits(rows, scores)


FIRST = [(4, 0.9), (7, 0.8), (2, 0.7), (5, 0.6), (1, 0.5)]


def test_behind_the_candidates_stage_1_stays():
    hits = rerank(hits_of(FIRST), np.array([[0.1, 3.0, 2.0]], np.float32))
    assert hits.rows.tolist() == [[7, 2, 4, 5, 1]]
    np.testing.assert_array_equal(hits.scores, np.array([[3, 2, 0.1, 0.6, 0.5]], np.float32))
    assert hits.rows.dtype == np.int64 and hits.scores.dtype == np.float32


@pytest.mark.parametrize("fusion", [None, 0.0, 0.4, 1.0])
def test_ties_and_constant_scores_keep_stage_1(fusion):
    same = rerank(hits_of(FIRST), np.full((1, 4), 0.1, np.float32), fusion)
    assert same.rows.tolist() == [[4, 7, 2, 5, 1]]
    flat = hits_of([(row, 0.3) for row, _ in FIRST])
    assert rerank(flat, np.zeros((1, 5)), fusion).rows.tolist() == [[4, 7, 2, 5, 1]]
    if fusion in (None, 0.0):
        tied = rerank(hits_of(FIRST), np.array([[1.0, 2, 1, 2, 1]], np.float32), fusion)
        assert tied.rows.tolist() == [[7, 5, 4, 2, 1]]


@pytest.mark.parametrize("fusion", [None, 0.0, 0.4, 1.0])
def test_missing_candidates_stay_last(fusion):
    hits = hits_of([(3, 0.5), (6, 0.2), (-1, -np.inf), (-1, -np.inf)], [(-1, -np.inf)] * 4)
    scores = np.array([[-9, -8, -np.inf], [-np.inf] * 3], np.float32)
    ranked = rerank(hits, scores, fusion)
    best = [3, 6] if fusion == 1 else [6, 3]
    assert ranked.rows.tolist() == [[*best, -1, -1], [-1] * 4]
    assert (np.isneginf(ranked.scores) == (ranked.rows < 0)).all()
    assert not np.isnan(ranked.scores).any()


def test_fusion_is_the_mean_of_standardised_scores():
    draw = np.random.default_rng(0)
    first = -np.sort(-draw.standard_normal((4, 9)), axis=1).astype(np.float32)
    second = draw.standard_normal((4, 6)).astype(np.float32)
    hits = Hits(np.stack([draw.permutation(9) for _ in range(4)]), first)
    standard = lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    for weight in (0.0, 0.3, 0.8, 1.0):
        values = weight * standard(first[:, :6]) + (1 - weight) * standard(second)
        order = np.argsort(-values, axis=1)
        ranked = rerank(hits, second, weight)
        np.testing.assert_array_equal(
            ranked.rows[:, :6], np.take_along_axis(hits.rows[:, :6], order, 1)
        )
        np.testing.assert_allclose(
            ranked.scores[:, :6], np.take_along_axis(values, order, 1), atol=1e-5
        )
        np.testing.assert_array_equal(ranked.rows[:, 6:], hits.rows[:, 6:])
        np.testing.assert_array_equal(ranked.scores[:, 6:], first[:, 6:])
    np.testing.assert_array_equal(rerank(hits, second, 0.0).rows, rerank(hits, second).rows)
    np.testing.assert_array_equal(rerank(hits, second, 1.0).rows, hits.rows)


@pytest.mark.parametrize("fusion", [-0.1, 1.5, float("nan")])
def test_a_weight_outside_0_to_1_is_refused(fusion):
    with pytest.raises(ValueError, match="from 0 to 1"):
        rerank(hits_of(FIRST), np.zeros((1, 5)), fusion)


@pytest.mark.parametrize("kind", INDEXES)
def test_k_and_candidates_beyond_the_gallery_give_the_gallery(kind):
    query = query_of({"text"})
    options = {"k": 50, "reranker": tiny("blip_itm"), "candidates": 40}
    results = cir_jax.search(tiny("clip"), index_of("clip", kind), **query, **options)
    assert sorted(result.row for result in results) == list(range(ITEMS))
    assert {result.stage for result in results} == {2}
    few = cir_jax.search(tiny("clip"), index_of("clip", kind), **query, **options | {"k": 2})
    assert few == results[:2]


# ---- queries that ask several times ----


def test_each_text_of_a_query_is_a_vector_of_its_own():
    queries = [{"texts": ["red fox", "a", "old man"]}, {"texts": ["b"]}, {"texts": []}]
    vectors, mask = tiny("clip").encode("query", queries, batch_size=2)
    assert vectors.shape == (3, 3, 16) and vectors.dtype == np.float32
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    flat = tiny("clip").encode("query", ["red fox", "a", "old man", "b"])
    np.testing.assert_allclose(vectors[mask], flat, atol=5e-6)
    assert (vectors[~mask] == 0).all()


def united_by_hand(scores, mask, exclude, k):
    """Rows of the best k items by their best score over a query's texts, ties by row."""
    answers = []
    for query in range(len(mask)):
        best = scores[query][mask[query]].max(axis=0, initial=-np.inf)
        order = np.lexsort((np.arange(len(best)), -best))
        found = [(row, best[row]) for row in order if row != exclude[query] and best[row] > -np.inf]
        answers.append((found + [(-1, -np.inf)] * k)[:k])
    return hits_of(*answers)


@pytest.mark.parametrize("k", [1, 4, 11, 30])
@pytest.mark.parametrize("excluded", [False, True])
def test_several_questions_are_united_by_their_best_score(k, excluded):
    draw = np.random.default_rng(k)
    items = draw.integers(-1, 2, (11, 5)).astype(np.float32)  # small integers: many ties
    vectors = draw.integers(-1, 2, (7, 3, 5)).astype(np.float32)
    mask = np.arange(3) < np.array([1, 2, 3, 0, 3, 1, 2])[:, None]
    exclude = draw.integers(-1, 11, 7) if excluded else np.full(7, -1)
    hits = retrieve(ExactIndex(items), (vectors, mask), k, exclude if excluded else ())
    expected = united_by_hand(vectors @ items.T, mask, exclude, k)
    np.testing.assert_array_equal(hits.rows, expected.rows)
    np.testing.assert_array_equal(hits.scores, expected.scores)
    assert hits.rows.shape == (7, k)


@pytest.mark.parametrize("k", [1, 5, 11, 12, 40])
def test_the_excluded_row_never_comes_back(k):
    draw = np.random.default_rng(k)
    items, vectors = (draw.integers(-1, 2, (n, 5)).astype(np.float32) for n in (11, 6))
    exclude = [3, -1, 0, 10, -1, 7]
    hits = retrieve(ExactIndex(items), vectors, k, exclude)
    once = np.ones((6, 1), bool)
    expected = united_by_hand((vectors @ items.T)[:, None], once, exclude, k)
    np.testing.assert_array_equal(hits.rows, expected.rows)
    np.testing.assert_array_equal(hits.scores, expected.scores)


def test_uniting_nothing_is_nothing():
    nothing = united(Hits(np.zeros((0, 2), np.int64), np.zeros((0, 2))), np.zeros(0, int), 3)
    assert nothing.rows.tolist() == [[-1, -1]] * 3


# ---- documents ----


def test_a_document_asks_by_entities_and_then_by_its_summary():
    raw = {"document": DOCUMENT, "text": DOCUMENT, "id": "7"}
    assert as_query(raw, 1, BUILTIN) == document_query(raw, "entities", BUILTIN)
    assert len(as_query(raw, 1, BUILTIN)["texts"]) > 2
    assert as_query(raw, 2, BUILTIN) == document_query(raw, "summary", BUILTIN)
    plain = {"text": "fox", "image": None, "id": "7"}
    assert list(Queries([raw, plain], 1, BUILTIN))[1] == {"text": "fox"}


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("name", [n for n in RETRIEVERS if {"text"} in METHODS_OF[n].query_kinds])
def test_a_document_searches_and_the_same_model_ranks_again(name, kind):
    model, index = tiny(name), index_of(name, kind)
    raw, items = {"document": DOCUMENT}, model.encode("item", gallery())
    texts = document_query(raw, "entities")["texts"]
    best = (model.encode("query", texts) @ items.T).max(axis=0)
    order = np.argsort(-best)
    first = cir_jax.search(model, index, document=DOCUMENT, k=5)
    assert [result.row for result in first] == order[:5].tolist()
    np.testing.assert_allclose([result.score for result in first], best[order[:5]], atol=1e-5)
    summary = model.encode("query", [document_query(raw, "summary")["text"]])[0]
    again = cir_jax.search(model, index, document=DOCUMENT, k=5, reranker=model, candidates=4)
    assert sorted(result.row for result in again[:4]) == sorted(order[:4].tolist())
    scores = [float(summary @ items[result.row]) for result in again[:4]]
    np.testing.assert_allclose([result.score for result in again[:4]], scores, atol=1e-5)
    assert scores == sorted(scores, reverse=True)
    assert again[4] == first[4]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "a query needs a text, a picture, both, or a document"),
        ({"text": "  "}, "query text is empty"),
        ({"document": "\n "}, "query document is empty"),
        ({"document": "a fox", "text": "b"}, "a document asks alone"),
        ({"document": "a fox", "image": "b.png"}, "a document asks alone"),
        ({"text": "b", "k": 0}, "both must be at least 1"),
        ({"text": "b", "candidates": 0}, "both must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_mistakes_in_a_query_are_named(query, message):
    with pytest.raises(ValueError, match=message):
        cir_jax.search(tiny("clip"), index_of("clip"), **query)


@pytest.mark.parametrize("name", RERANKERS)
def test_a_re_ranker_does_not_retrieve(name):
    query = query_of(METHODS_OF[name].query_kinds[0])
    with pytest.raises(ValueError, match=f"{name} is a re-ranker: it scores pairs"):
        cir_jax.search(tiny(name), index_of("clip"), **query)
    with pytest.raises(ValueError, match="behind a retriever"):
        tiny(name).encode("item", gallery())


def test_models_that_do_not_read_the_query_are_refused_before_pictures_are_read():
    picture = query_of({"image"})
    with pytest.raises(ValueError, match="consists of text; this one has image"):
        cir_jax.search(tiny("maria"), index_of("maria"), **picture)
    blind = ExactIndex(index_of("clip").vectors)
    for options in ({"text": "a fox"}, {"document": DOCUMENT}):
        with pytest.raises(ValueError, match="consists of image and text; this one has text"):
            cir_jax.search(tiny("clip"), blind, reranker=tiny("blip_rerank"), **options)


def test_an_index_without_pictures_serves_one_stage_only():
    blind = ExactIndex(index_of("clip").vectors)
    assert len(cir_jax.search(tiny("clip"), blind, text="a fox", k=3)) == 3
    with pytest.raises(ValueError, match="does not know its pictures"):
        cir_jax.search(tiny("clip"), blind, text="a fox", reranker=tiny("blip_itm"))


def test_features_of_queries_that_ask_several_times_are_refused():
    with pytest.raises(ValueError, match="consists of"):
        tiny("clip").features("query", [{"texts": ["a", "b"]}])
    with pytest.raises(ValueError, match="expected 'query' or 'item'"):
        tiny("clip").features("image", [])


# ---- ranks beyond a list, and scores of chosen items ----


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_beyond_a_list_are_those_of_the_whole_one(seed, several):
    from cir_jax.evaluation import metrics
    from cir_jax.index import ExactIndex
    from cir_jax.retrieval import ranks_beyond

    rng = np.random.default_rng(seed)
    items = rng.integers(-2, 3, (40, 3)).astype(np.float32)  # many equal scores
    vectors = rng.integers(-2, 3, (12, 2, 3)).astype(np.float32)
    mask = np.array([[True, each] for each in rng.random(12) < 0.5])
    asked = (vectors, mask) if several else vectors[:, 0]
    positives = [{int(r): 1.0 for r in rng.choice(40, 2, replace=False)} for _ in range(12)]
    exclude = rng.integers(-1, 40, 12).tolist()
    positives = [{r: g for r, g in right.items() if r != x} for right, x in zip(positives, exclude)]
    whole = retrieve(ExactIndex(items), asked, 40, exclude)
    cut = retrieve(ExactIndex(items), asked, 5, exclude)
    expected = metrics.ranks(whole.rows, positives, exclude)
    found = metrics.ranks(cut.rows, positives, exclude)
    beyond = ranks_beyond(asked, items, cut, positives, exclude)
    assert (beyond[found >= 0] == -1).all() and (beyond >= 5).any()
    np.testing.assert_array_equal(np.where(found < 0, beyond, found), expected)


def test_scores_of_chosen_items():
    from cir_jax.retrieval import scores_of

    items = np.eye(3, dtype=np.float32)
    vectors = np.array([[1.0, 2, 3], [4, 5, 6]], np.float32)
    rows = np.array([[2, 0, -1], [1, 1, 0]])
    assert scores_of(vectors, items, rows).tolist() == [[3, 1, -np.inf], [5, 5, 4]]
    both = np.stack([vectors, vectors[::-1]], axis=1), np.array([[True, True], [True, False]])
    assert scores_of(both, items, rows).tolist() == [[6, 4, -np.inf], [5, 5, 4]]
