import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from cir_jax import files, scann_index
from cir_jax import index as index_module
from cir_jax.commands import start
from cir_jax.index import ExactIndex, Hits, ScannIndex, main, make_index, open_index
from cir_jax.sharding import make_mesh
from cir_jax.vectors import VectorWriter

LABELS = {"gallery": {"folder": "p"}, "fingerprint": "abc"}


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(count, width=64, topics=120, seed=0):
    """Unit rows around topics, as embeddings are."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((topics, width))
    noise = draw.standard_normal((count, width))
    return unit(centres[draw.integers(topics, size=count)] + 0.7 * noise)


def held_out(rows, count=300, seed=1):
    draw = np.random.default_rng(seed)
    noise = unit(draw.standard_normal((count, rows.shape[1])))
    return unit(rows[draw.integers(len(rows), size=count)] + 0.8 * noise)


def integers(count, width=6, seed=0):
    """Rows of small integers: their products are exact, and many are equal."""
    return np.random.default_rng(seed).integers(-1, 2, (count, width)).astype(np.float32)


def ranked(queries, rows, k):
    """The plain answer: all scores, a stable sort."""
    scores = queries @ rows.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Hits(order, np.take_along_axis(scores, order, 1))


def share_found(hits, exact):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(hits.rows, exact.rows)])


def assert_same(one, other):
    assert np.array_equal(one.rows, other.rows)
    assert np.array_equal(one.scores, other.scores)


@pytest.fixture(scope="module")
def gallery():
    return clustered(2859)


@pytest.fixture(scope="module")
def scann(gallery):
    return ScannIndex(gallery, recall=0.95, **LABELS)


# Exact search


@pytest.mark.parametrize("count", [1, 3, 4, 5, 37, 200])
@pytest.mark.parametrize("k", [1, 3, 37])
def test_exact_equals_a_stable_sort_on_four_devices(count, k):
    assert jax.device_count() == 4
    rows, queries = integers(count), integers(11, seed=1)
    hits, expected = ExactIndex(rows).search(queries, k), ranked(queries, rows, k)
    found = min(k, count)
    assert np.array_equal(hits.rows[:, :found], expected.rows)
    assert np.array_equal(hits.scores[:, :found], expected.scores)
    assert (hits.rows[:, found:] == -1).all() and np.isneginf(hits.scores[:, found:]).all()
    assert hits.rows.shape == hits.scores.shape == (11, k)
    assert (hits.rows.dtype, hits.scores.dtype) == (np.int64, np.float32)


def test_exact_gives_equal_rows_in_order_across_devices():
    rows = np.tile(clustered(1), (9, 1))
    hits = ExactIndex(rows).search(rows[:1], 9)
    assert hits.rows.tolist() == [list(range(9))]


def test_exact_does_not_order_by_the_sign_of_zero():
    rows = np.array([[-0.0], [0.0], [-0.0], [0.0], [1.0]], np.float32)
    assert ExactIndex(rows).search([[1.0]], 5).rows.tolist() == [[4, 0, 1, 2, 3]]
    assert ExactIndex(rows).search([[0.0]], 5).rows.tolist() == [[0, 1, 2, 3, 4]]
    for query in (1.0, -1.0):
        for mesh in (make_mesh(), make_mesh(devices=jax.devices()[:1])):
            assert ExactIndex(rows[:4], mesh=mesh).search([[query]], 2).rows.tolist() == [[0, 1]]


@pytest.mark.parametrize("shape", [{}, {"fsdp": 2}, {"fsdp": 2, "tensor": 2}, {"tensor": 4}])
def test_exact_is_the_same_on_every_mesh(shape):
    rows, queries = clustered(101), clustered(9, seed=1)
    hits = ExactIndex(rows, mesh=make_mesh(**shape)).search(queries, 10)
    single = ExactIndex(rows, mesh=make_mesh(devices=jax.devices()[:1])).search(queries, 10)
    expected = ranked(queries, rows, 10)
    for one in (hits, single):
        assert np.array_equal(one.rows, expected.rows)
        np.testing.assert_allclose(one.scores, expected.scores, rtol=0, atol=1e-6)


def test_exact_scores_are_float32_products():
    rows, queries = clustered(500, width=512), clustered(40, width=512, seed=1)
    precise = queries.astype(np.float64) @ rows.T.astype(np.float64)
    hits = ExactIndex(rows).search(queries, 20)
    found = np.take_along_axis(precise, hits.rows, 1)
    np.testing.assert_allclose(hits.scores, found, rtol=0, atol=1e-6)


def test_exact_splits_large_batches():
    rows, queries = integers(50), integers(600, seed=1)
    assert_same(ExactIndex(rows).search(queries, 5), ranked(queries, rows, 5))


def test_exact_scores_have_the_same_bits_on_every_number_of_devices():
    rows, queries = clustered(1300), clustered(40, seed=1)
    search = lambda count: ExactIndex(rows, mesh=make_mesh(devices=jax.devices()[:count])).search
    one = search(1)(queries, 200)
    for count in (2, 3, 4):
        assert_same(search(count)(queries, 200), one)


def test_exact_lists_are_longer_than_a_block_and_rank_equals_by_row():
    rows, queries = integers(700), integers(9, seed=1)
    assert index_module._block_rows(len(rows)) == 128
    for mesh in (make_mesh(), make_mesh(devices=jax.devices()[:1])):
        assert_same(ExactIndex(rows, mesh=mesh).search(queries, 300), ranked(queries, rows, 300))


def test_exact_compiles_once_per_batch_size_and_k():
    index = ExactIndex(integers(60))
    rank = index_module._ranker(index.mesh)
    index.search(integers(8), 3)
    before = rank._cache_size()
    for count in range(1, 9):
        index.search(integers(count), 3)
    assert rank._cache_size() == before


@pytest.mark.parametrize(("queries", "size"), [(1, 8), (8, 8), (9, 32), (512, 512), (9999, 512)])
def test_queries_are_ranked_in_batches_of_few_sizes(queries, size):
    assert index_module._bucket(queries) == size


@pytest.mark.parametrize(
    ("rows", "block"), [(1, 128), (2000, 128), (2859, 256), (123_403, 8192), (10**8, 8192)]
)
def test_the_gallery_decides_alone_about_its_blocks(rows, block):
    assert index_module._block_rows(rows) == block


def test_an_empty_gallery_and_an_empty_batch():
    empty = ExactIndex(np.zeros((0, 6)))
    hits = empty.search(integers(2), 3)
    assert hits.rows.tolist() == [[-1] * 3] * 2 and np.isneginf(hits.scores).all()
    assert len(empty) == 0 and empty.ids == []
    assert ExactIndex(integers(5)).search(np.zeros((0, 6)), 3).rows.shape == (0, 3)


def test_an_index_knows_its_ids_and_labels():
    index = ExactIndex(integers(2), ids=["x", "y"], **LABELS)
    assert (index.ids, index.gallery, index.fingerprint) == (["x", "y"], {"folder": "p"}, "abc")
    assert ExactIndex(integers(3)).ids == ["0", "1", "2"]
    with pytest.raises(ValueError, match="3 vectors with 2 ids"):
        ExactIndex(integers(3), ids=["x", "y"])
    with pytest.raises(ValueError, match="does not know its pictures"):
        ExactIndex(integers(3)).items([0])


# What both kinds refuse and accept


@pytest.fixture(scope="module", params=["exact", "tree", "brute force"])
def any_index(request, gallery, scann):
    makers = {
        "exact": lambda: ExactIndex(gallery[:50]),
        "tree": lambda: scann,
        "brute force": lambda: ScannIndex(gallery[:50]),
    }
    return makers[request.param]()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_queries_that_are_not_finite_are_refused(any_index, gallery, bad):
    queries = gallery[:3].copy()
    queries[2, 5] = bad
    with pytest.raises(ValueError, match="queries: row 2 of 3 vectors has a NaN or infinite"):
        any_index.search(queries, 3)


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), ()])
def test_queries_of_another_rank_are_refused(any_index, shape):
    with pytest.raises(ValueError, match=r"queries: vectors have shape .* expected \[N, D\]"):
        any_index.search(np.zeros(shape), 3)


def test_queries_of_another_width_are_refused(any_index):
    with pytest.raises(ValueError, match="queries have width 63, the index has width 64"):
        any_index.search(np.zeros((2, 63)), 3)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(any_index, gallery, k):
    with pytest.raises(ValueError, match=f"k is {k}, expected at least 1"):
        any_index.search(gallery[:2], k)


def test_k_must_be_an_integer(any_index, gallery):
    with pytest.raises(TypeError):
        any_index.search(gallery[:2], 2.5)


def test_an_empty_batch_gives_empty_hits(any_index):
    hits = any_index.search(np.zeros((0, 64), np.float32), 7)
    assert hits.rows.shape == hits.scores.shape == (0, 7)
    assert (hits.rows.dtype, hits.scores.dtype) == (np.int64, np.float32)


def test_more_than_all_rows_are_padded(any_index, gallery):
    count = len(any_index)
    hits = any_index.search(gallery[:3], count + 5)
    assert hits.rows.shape == (3, count + 5)
    assert (hits.rows[:, count:] == -1).all() and np.isneginf(hits.scores[:, count:]).all()
    assert not np.isnan(hits.scores).any()
    assert (np.diff(hits.scores[:, :count], axis=1) <= 0).all()
    assert (hits.rows == -1).tolist() == np.isneginf(hits.scores).tolist()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in hits.rows)


@pytest.mark.parametrize("kind", ["float64", "float16", "int8"])
def test_queries_of_other_types_are_converted(any_index, gallery, kind):
    queries = np.round(gallery[:4] * 8).astype(kind)
    hits = any_index.search(queries, 5)
    assert_same(hits, any_index.search(queries.astype(np.float32), 5))
    assert_same(hits, any_index.search(jax.numpy.asarray(queries.astype(np.float32)), 5))
    assert_same(hits, any_index.search(queries.tolist(), 5))
    assert_same(hits, any_index.search(np.asfortranarray(queries), 5))


def test_a_zero_query_finds_something(any_index):
    hits = any_index.search(np.zeros((1, 64)), 4)
    assert (hits.scores == 0).all() and (hits.rows >= 0).all()


@pytest.mark.parametrize("kind", ["exact", "scann"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("count", [20, 400])
def test_rows_that_are_not_finite_are_refused(kind, bad, count):
    rows = clustered(count)
    rows[17, 0] = bad
    with pytest.raises(ValueError, match=f"row 17 of {count} vectors has a NaN or infinite"):
        make_index(kind, rows)


@pytest.mark.parametrize("kind", ["exact", "scann"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (5, 0)])
def test_galleries_of_other_shapes_are_refused(kind, shape):
    with pytest.raises(ValueError, match=r"expected \[N, D\] with D > 0"):
        make_index(kind, np.zeros(shape))


@pytest.mark.parametrize("kind", ["exact", "scann"])
@pytest.mark.parametrize("count", [20, 300])
def test_zero_rows_and_equal_rows_are_served(kind, count):
    zeros = np.zeros((count, 8), np.float32)
    assert make_index(kind, zeros).search(np.ones((1, 8)), 3).rows.tolist() == [[0, 1, 2]]
    ones = np.ones((count, 8), np.float32)
    hits = make_index(kind, ones).search(np.ones((1, 8)), 3)
    assert hits.rows.tolist() == [[0, 1, 2]] and hits.scores.tolist() == [[8, 8, 8]]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match='index kind is \'faiss\', expected "exact" or "scann"'):
        make_index("faiss", integers(3))


# ScaNN


def test_scann_uses_tree_hashing_and_reordering(scann):
    config = scann.config()
    assert "partitioning {" in config and "partitioning_type: SPHERICAL" in config
    assert f"num_children: {scann.settings.leaves}" in config
    assert "asymmetric_hash {" in config and "num_dims_per_block: 4" in config
    assert "noise_shaping_threshold: 0.2" in config
    assert "exact_reordering {" in config and "brute_force" not in config
    assert 3 * 2859**0.5 <= scann.settings.leaves <= 4 * 2859**0.5
    assert (len(scann), scann.kind, scann.settings.scorer) == (2859, "scann", "tree_ah")


def test_scann_reaches_its_target_on_new_queries(scann, gallery):
    queries = held_out(gallery, seed=7)
    exact = ExactIndex(gallery).search(queries, 10)
    assert scann.settings.recall >= 0.95 == scann.settings.recall_target
    assert scann.settings.leaves_to_search < scann.settings.leaves
    assert share_found(scann.search(queries, 10), exact) >= 0.93


def test_a_higher_target_finds_more(scann, gallery):
    queries = held_out(gallery, count=600, seed=7)
    fine = ScannIndex(gallery, recall=0.99, k=20, queries=queries[:300])
    assert (fine.settings.held_out, fine.settings.queries) == ("given queries", 300)
    assert fine.settings.recall >= 0.99 and fine.settings.k == 20
    exact = ExactIndex(gallery).search(queries[300:], 20)
    found = share_found(fine.search(queries[300:], 20), exact)
    assert found >= 0.98 and found > share_found(scann.search(queries[300:], 20), exact)


def test_scann_scores_are_the_inner_products(scann, gallery):
    queries = held_out(gallery, count=20)
    hits = scann.search(queries, 10)
    expected = np.einsum("qd,qkd->qk", queries, gallery[hits.rows])
    np.testing.assert_allclose(hits.scores, expected, rtol=0, atol=2e-6)


def test_many_queries_in_parallel_equal_few(scann, gallery):
    queries = held_out(gallery, count=scann_index.BATCH + 44)
    whole = scann.search(queries, 10)
    parts = [scann.search(part, 10) for part in np.array_split(queries, 7)]
    assert_same(whole, Hits(*map(np.concatenate, zip(*parts))))
    assert_same(scann.search(queries[:1], 10), Hits(whole.rows[:1], whole.scores[:1]))


def test_too_few_candidates_are_padded_not_row_zero(scann, gallery):
    narrow = scann_index.ScannSettings(**{**vars(scann.settings), "leaves_to_search": 1, "k": 500})
    index = ScannIndex(gallery, built=(scann._searcher, narrow))
    hits = index.search(gallery[:50], 500)
    assert hits.rows.shape == (50, 500)
    missing = hits.rows == -1
    assert missing[:, -1].all() and not missing[:, 0].any()
    assert np.array_equal(missing, np.isneginf(hits.scores))
    assert (hits.rows[:, 1:] == 0).sum() <= 50


def test_k_beyond_the_rescored_candidates_is_filled(scann, gallery):
    k = 3 * scann.settings.reorder
    hits = scann.search(gallery[:20], k)
    assert (hits.rows >= 0).mean() > 0.99
    assert share_found(hits, ExactIndex(gallery).search(gallery[:20], k)) > 0.8


@pytest.mark.parametrize("count", [1, 2, 15, 16, 199])
def test_few_rows_are_searched_by_brute_force(tmp_path, count):
    rows = clustered(count)
    index = ScannIndex(rows)
    assert (index.settings.scorer, index.settings.recall) == ("brute_force", 1.0)
    assert "brute_force" in index.config()
    queries = clustered(5, seed=3)
    assert np.array_equal(index.search(queries, 4).rows, ExactIndex(rows).search(queries, 4).rows)
    index.save(tmp_path / "i")
    manifest = json.loads((tmp_path / "i" / "manifest.json").read_text())
    assert manifest["settings"]["scorer"] == "brute_force"
    assert_same(open_index(tmp_path / "i").search(queries, 4), index.search(queries, 4))


@pytest.mark.parametrize(("count", "width"), [(200, 1), (200, 7), (300, 513), (1000, 30)])
def test_odd_sizes_have_a_tree(count, width):
    rows = clustered(count, width=width)
    index = ScannIndex(rows)
    assert index.settings.scorer == "tree_ah" and index.settings.leaves <= count
    queries = held_out(rows, count=50)
    floor = ExactIndex(rows).search(queries, 10).scores[:, -1:]
    assert (index.search(queries, 10).scores >= floor - 1e-5).mean() > 0.9


def test_one_index_always_answers_the_same(scann, gallery, saved):
    queries = held_out(gallery)
    first = scann.search(queries, 10)
    assert_same(scann.search(queries, 10), first)
    for _ in range(3):
        assert_same(open_index(saved / "scann").search(queries, 10), first)


def test_an_index_built_again_is_as_good(scann, gallery):
    # Not bit for bit: ScaNN's clustering depends on where its arrays lie in memory, even with one thread.
    queries = held_out(gallery)
    exact = ExactIndex(gallery).search(queries, 10)
    again = ScannIndex(gallery, recall=0.95)
    both = [share_found(index.search(queries, 10), exact) for index in (scann, again)]
    assert min(both) >= 0.93 and abs(both[0] - both[1]) <= 0.03
    assert again.settings.leaves == scann.settings.leaves


def test_the_gallery_may_change_after_the_build(gallery):
    rows = gallery[:400].copy()
    index = ScannIndex(rows)
    before = index.search(gallery[:5], 5)
    rows[:] = 0
    assert_same(index.search(gallery[:5], 5), before)


def test_a_scann_index_needs_rows_and_sound_arguments():
    with pytest.raises(ValueError, match="needs at least one row"):
        ScannIndex(np.zeros((0, 4)))
    for recall in (0, 1.5, -1, float("nan")):
        with pytest.raises(ValueError, match=r"recall is .* expected a share"):
            ScannIndex(clustered(20), recall=recall)
    with pytest.raises(ValueError, match="k is 0"):
        ScannIndex(clustered(20), k=0)
    with pytest.raises(ValueError, match="queries have width 3"):
        ScannIndex(clustered(20), queries=np.zeros((1, 3)))
    with pytest.raises(ValueError, match="queries is empty"):
        ScannIndex(clustered(20), queries=np.zeros((0, 64)))


def test_an_index_works_in_a_forked_child(scann, gallery):
    expected = scann.search(gallery[:300], 5)
    script = textwrap.dedent("""
        import os, sys
        import numpy as np
        from cir_jax import scann_index
        rows = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)
        searcher, settings = scann_index.make_searcher(rows, 0.9, 5)
        ask = lambda: scann_index.search(searcher, settings, 400, rows, 5)[0]
        before = ask()
        if os.fork() == 0:
            os._exit(0 if np.array_equal(ask(), before) else 1)
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
    """)
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
    assert_same(scann.search(gallery[:300], 5), expected)


def test_tensorflow_is_hidden_only_while_scann_is_imported():
    script = textwrap.dedent("""
        import sys, types
        fake = sys.modules["tensorflow"] = types.ModuleType("tensorflow")
        paths = list(sys.path)
        from cir_jax.scann_index import import_scann
        import_scann()
        assert sys.modules["tensorflow"] is fake and sys.path == paths
        assert "scann.scann_ops.py.scann_ops" not in sys.modules
    """)
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
    scann_index.import_scann()
    assert "tensorflow" not in sys.modules


def test_build_and_load_print_nothing(tmp_path, capfd):
    ScannIndex(clustered(250)).save(tmp_path / "i")
    open_index(tmp_path / "i")
    assert capfd.readouterr() == ("", "")


def test_a_failing_build_shows_what_scann_said(capfd):
    with pytest.raises(RuntimeError, match="boom"), scann_index.quiet():
        os.write(2, b"what it said\n")
        raise RuntimeError("boom")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "what it said\nafterwards\n"


# Tuning


def test_the_cheapest_setting_is_chosen():
    asked = []

    def measure(leaves, reorder):
        asked.append((leaves, reorder))
        return min(1.0, leaves / 40) * min(1.0, reorder / 30)

    leaves, reorder, recall = scann_index.cheapest(measure, 10_000, 100, 10, 0.9)
    options = [(a, b) for a in range(1, 101) for b in scann_index.ladder(10, 10_000)]
    price = lambda a, b: a * 100 / 16 + b
    best = min(price(a, b) for a, b in options if measure(a, b) >= 0.9)
    assert price(leaves, reorder) == best and recall == measure(leaves, reorder) >= 0.9
    assert len(asked) - len(options) < 100


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 8, 63, 64])
@pytest.mark.parametrize("limit", [1, 2, 7, 64])
def test_the_fewest_leaves_are_found(needed, limit):
    found = scann_index.fewest_leaves(lambda n: float(n >= needed), limit, 0.5)
    assert found == ((needed, 1.0) if needed <= limit else None)


def test_no_leaves_are_no_answer():
    assert scann_index.fewest_leaves(lambda n: 1.0, 0, 0.5) is None


def test_a_target_out_of_reach_gives_exact_search():
    assert scann_index.cheapest(lambda a, b: 0.4, 50, 7, 5, 0.9) == (7, 50, 0.4)


def test_recall_is_that_of_the_worse_half_and_any_equal_item_counts():
    floor = scann_index.floors(np.eye(3, dtype=np.float32), np.ones((2, 3), np.float32), 2)
    scores = np.array([[1, 1], [1, np.nan]], np.float32)
    assert scann_index.lower_half_recall(scores, floor) == 0.5
    assert scann_index.lower_half_recall(scores[:1], floor[:1]) == 1.0


def test_floors_are_the_kth_scores(gallery):
    queries = held_out(gallery, count=9)
    floor = scann_index.floors(gallery, queries, 10, block=100)
    expected = ranked(queries, gallery, 10).scores[:, -1:]
    np.testing.assert_allclose(floor, expected, rtol=0, atol=1e-5)
    assert (floor < expected).all()


def test_perturbed_rows_keep_their_length(gallery):
    rows = scann_index.perturbed(3 * gallery[:100])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 3, rtol=1e-5)
    assert 0.5 < (rows * gallery[:100] / 3).sum(1).mean() < 0.9
    assert len(scann_index.perturbed(gallery)) == scann_index.HELD_OUT
    assert (scann_index.perturbed(np.zeros((2, 3), np.float32)) == 0).all()


# Saved indexes


@pytest.fixture(scope="module")
def saved(tmp_path_factory, gallery, scann):
    folder = tmp_path_factory.mktemp("saved")
    ids = [f"line\n{row}" for row in range(300)]
    ExactIndex(gallery[:300], ids, **LABELS).save(folder / "exact")
    scann.save(folder / "scann")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the saved indexes in another place, to move or damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def test_an_exact_index_comes_back(copy, gallery):
    index = open_index(copy / "exact")
    assert isinstance(index, ExactIndex) and index.ids[299] == "line\n299"
    assert (index.gallery, index.fingerprint) == ({"folder": "p"}, "abc")
    assert_same(index.search(gallery[:9], 5), ExactIndex(gallery[:300]).search(gallery[:9], 5))


def test_a_scann_index_comes_back_after_moving(copy, gallery, scann):
    queries = held_out(gallery)
    index = open_index(copy / "scann")
    assert isinstance(index, ScannIndex) and index.settings == scann.settings
    assert index.ids == scann.ids and index.fingerprint == "abc"
    assert "asymmetric_hash {" in index.config() and "exact_reordering {" in index.config()
    assert np.array_equal(index.vectors, gallery)
    assert_same(index.search(queries, 10), scann.search(queries, 10))
    assert str(copy.parent) not in (copy / "scann" / "scann" / "scann_assets.pbtxt").read_text()
    index.save(copy / "again")
    assert_same(open_index(copy / "again").search(queries, 10), scann.search(queries, 10))


def test_the_manifest_tells_what_was_chosen(copy, scann):
    manifest = files.read_manifest(copy / "scann", "index")
    assert (manifest["index"], manifest["rows"], manifest["width"]) == ("scann", 2859, 64)
    assert manifest["settings"] == vars(scann.settings)
    assert manifest["settings"]["held_out"] == "perturbed rows"
    present = {p.relative_to(copy / "scann").as_posix() for p in (copy / "scann").rglob("*.*")}
    assert set(manifest["files"]) | {"manifest.json"} == present


def test_an_empty_index_comes_back(tmp_path):
    ExactIndex(np.zeros((0, 6))).save(tmp_path / "i")
    assert (open_index(tmp_path / "i").search(integers(2), 3).rows == -1).all()


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_every_cut_changed_or_missing_file_is_found(copy, kind):
    folder = copy / kind
    for name in files.read_manifest(folder, "index")["files"]:
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=f"is damaged: {name}: changed or cut"):
            open_index(folder)
        path.unlink()
        with pytest.raises(ValueError, match=f"{name}: missing"):
            open_index(folder)
        path.write_bytes(content)
    open_index(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "made by a newer cir_jax"),
        ({"kind": "vectors"}, "holds 'vectors', expected 'index'"),
        ({"index": "other"}, 'index is "other", expected exact or scann'),
        ({"files": {}}, r"files lacks scann/dataset\.npy; files lacks ids\.txt"),
        ({"rows": 5}, "settings.leaves is 187, expected 1 to 5"),
        ({"rows": 2860}, "has shape .2859, 64. of float32, expected .2860, 64."),
        ({"settings": {"leaves": 3}}, "lacks settings.scorer, settings.leaves_to_search"),
        ({"vectors": "../exact/vectors.npy"}, "expected a file inside the folder"),
    ],
)
def test_a_wrong_manifest_is_refused(copy, change, message):
    path = copy / "scann" / "manifest.json"
    files.write_json(path, files.read_json(path) | change)
    with pytest.raises(ValueError, match=message):
        open_index(copy / "scann")


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_is_written_or_loaded(copy):
    assert not list(copy.rglob("*.pkl"))
    trap = pickle.dumps(Trap(copy / "sprung"))
    (copy / "scann" / "scann" / scann_index.PICKLE).write_bytes(trap)
    with pytest.raises(ValueError, match="would unpickle; do not use this index"):
        open_index(copy / "scann")
    assert not (copy / "sprung").exists()


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_an_existing_destination_is_refused(tmp_path, kind):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there already exists"):
        make_index(kind, clustered(20)).save(tmp_path / "there")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


def test_a_missing_index_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index: made by python -m cir_jax.index"):
        open_index(tmp_path / "absent")


# Without ScaNN


@pytest.fixture
def without_scann(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "scann"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scann", None)
    index_module._say_once.cache_clear()


def test_without_scann_the_exact_index_serves_and_says_so_once(without_scann, capsys, gallery):
    first, second = (make_index("scann", gallery[:50], **LABELS) for _ in range(2))
    assert isinstance(first, ExactIndex) and second.kind == "exact"
    assert first.fingerprint == "abc"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "ScaNN cannot be imported" in said[0]
    assert said[0].endswith("The exact index serves instead.")
    with pytest.raises(RuntimeError, match=r'pip install scann.*use the index kind "exact"'):
        ScannIndex(gallery[:50])


def test_a_saved_scann_index_is_served_exactly_without_scann(without_scann, copy, gallery, capsys):
    index = open_index(copy / "scann")
    assert index.kind == "exact" and index.fingerprint == "abc"
    assert_same(index.search(gallery[:9], 5), ExactIndex(gallery).search(gallery[:9], 5))
    assert "The exact index serves instead" in capsys.readouterr().err


def test_an_empty_gallery_is_served_exactly(capsys):
    index_module._say_once.cache_clear()
    assert make_index("scann", np.zeros((0, 4))).kind == "exact"
    assert "empty gallery" in capsys.readouterr().err


# The command


@pytest.fixture
def vectors(tmp_path, gallery):
    made = VectorWriter(tmp_path / "v", **LABELS)
    made.add(gallery[:200], [f"a{row}" for row in range(200)])
    made.add(gallery[200:400], [f"b{row}" for row in range(200)])
    made.finish()
    return tmp_path / "v"


def test_the_command_builds_an_exact_index(vectors, tmp_path, capsys, gallery):
    main([str(vectors), str(tmp_path / "i")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'i'}: exact index, 400 rows x 64\n"
    index = open_index(tmp_path / "i")
    assert (index.ids[200], index.fingerprint) == ("b0", "abc")
    assert index.search(gallery[390:391], 1).rows.tolist() == [[390]]


def test_the_command_builds_a_scann_index(vectors, tmp_path, capsys):
    main([str(vectors), str(tmp_path / "i"), "--kind", "scann", "--recall", "0.9", "--k", "5"])
    line = capsys.readouterr().out
    chosen = open_index(tmp_path / "i").settings
    assert (chosen.k, chosen.recall_target) == (5, 0.9)
    assert (
        line.count("\n") == 1 and f"{tmp_path / 'i'}: scann index, 400 rows x 64, 70 leaves" in line
    )
    assert f"({chosen.leaves_to_search} searched), {chosen.reorder} rescored" in line
    assert f"recall@5 {chosen.recall:.3f} (target 0.9) on 400 perturbed rows" in line


def test_the_command_ends_with_one_line_on_errors(vectors, tmp_path, monkeypatch, capsys):
    def failure(*arguments):
        monkeypatch.setattr(sys, "argv", ["cir_jax.index", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            start("index")
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (1, "", 1)
        return err

    assert f"error: {vectors} already exists; choose another" in failure(tmp_path / "no", vectors)
    absent, dest = tmp_path / "absent", tmp_path / "i"
    assert f"error: {absent} is not a folder" in failure(absent, dest)
    assert not dest.exists()


def test_help_is_light():
    script = textwrap.dedent("""
        import sys
        from cir_jax.index import main
        try:
            main(["--help"])
        except SystemExit as end:
            assert end.code == 0
        assert not {"jax", "scann", "flax"} & set(sys.modules), sys.modules.keys()
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--kind {exact,scann}" in done.stdout and "VECTORS" in done.stdout


def test_the_module_runs_as_a_program(vectors, tmp_path):
    command = [sys.executable, "-m", "cir_jax.index", str(vectors), str(tmp_path / "i")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("wrote ") and (tmp_path / "i" / "manifest.json").is_file()
