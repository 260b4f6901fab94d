"""What every registered method must do; a new one is covered without its author writing a test."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cir_jax
from cir_jax import sharding
from cir_jax.checkpoint import abstract_params, save_model
from cir_jax.config import Data
from cir_jax.data import training_set
from cir_jax.data.emoji import VOCABULARY
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import LENGTHS, Inputs, prepare_batch, shorten
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.methods import METHODS, build, kinds, method_name
from cir_jax.model import Model
from cir_jax.typed import from_json, to_json

INPUTS = Inputs(image=ImageSpec(size=32), text=TextSpec(vocab=str(VOCABULARY), length=16))
METHODS_OF = {name: pair[1] for name, pair in METHODS.items()}
SHORT = LENGTHS[0]
RETRIEVERS = [name for name, method in METHODS_OF.items() if not hasattr(method, "score")]
# Training takes long: of most methods it is left to .ci/run.
TRAINED_EARLY = ("clip", "fti4cir", "lincir")
ALL = [
    pytest.param(name, marks=() if name in TRAINED_EARLY else pytest.mark.slow)
    for name in sorted(METHODS)
]
RERANKERS = [name for name, method in METHODS_OF.items() if hasattr(method, "score")]


@functools.cache
def tiny(name):
    """A randomly initialised model of a method, in its size for tests."""
    return made(METHODS[name][0].tiny(INPUTS))


def made(config, seed=0):
    graph, _ = abstract_params(config)
    init = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(build(config, nnx.Rngs(key)))))
    return Model(
        config, graph, jax.device_get(init(jax.random.key(seed))), name=method_name(config)
    )


def drawn(config, seed=0):
    """A model whose parameters numpy draws: other ones than its method would, but nothing is compiled."""
    draw, (graph, shapes) = np.random.default_rng(seed), abstract_params(config)

    def value(path, shape):
        if sharding.path_name(path).endswith(("scale", "variance")):
            return np.ones(shape, np.float32)
        return (0.18 * draw.standard_normal(shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(lambda path, x: value(path, x.shape), shapes)
    return Model(config, graph, params, name=method_name(config))


@functools.cache
def pairs(rows=8):
    """Training edits between different things: reference, text, target."""
    source = training_set(Data("emoji-composed", variant="noto"))
    return [source[i] for i in range(0, len(source), len(source) // rows)][:rows]


def raw_queries(name, n=8):
    """Queries of the first kind that a method names."""
    kind = METHODS_OF[name].query_kinds[0]
    return [{part: pair["query"][part] for part in kind} for pair in pairs()[:n]]


def raw_items(name, n=8):
    """Items of the first kind that a method names."""
    kind = kinds(METHODS[name][0].tiny(INPUTS), "item")[0]
    turned = lambda text: " ".join(reversed(text.split()))
    items = [{"text": turned(pair["query"]["text"]), **pair["item"]} for pair in pairs()[:n]]
    return [{part: item[part] for part in kind} for item in items]


def training_batch(name):
    """A batch as the pipeline would make it."""
    batch = {
        "query": prepare_batch(raw_queries(name), INPUTS),
        "item": prepare_batch(raw_items(name), INPUTS),
    }
    batch["item"]["group"] = np.arange(len(pairs()), dtype=np.int32)
    return batch


@functools.cache
def trained(name, steps=30):
    """The losses of a short training on one batch, and whether every gradient was finite."""
    model, key = tiny(name), jax.random.key(0)
    params, batch, tx = model.params, training_batch(name), optax.adam(3e-3)
    loss = lambda params: nnx.merge(model.graph, params).loss(batch, key)[0]
    opt = tx.init(params)

    @jax.jit
    def step(params, opt):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt)
        finite = jax.tree.reduce(
            jnp.logical_and, jax.tree.map(lambda g: jnp.isfinite(g).all(), grads)
        )
        return optax.apply_updates(params, updates), opt, value, finite

    values = []
    for _ in range(steps):
        params, opt, value, finite = step(params, opt)
        values.append((float(value), bool(finite)))
    losses, finite = zip(*values)
    return losses, all(finite)


def raw(part, name, n=8):
    return raw_queries(name, n) if part == "query" else raw_items(name, n)


@functools.cache
def encoded(name, part):
    """Vectors of eight examples."""
    return tiny(name).encode(part, raw(part, name))


def roughly(model):
    """The same model in bfloat16."""
    config = dataclasses.replace(model.config, dtype="bfloat16")
    return dataclasses.replace(model, config=config, graph=abstract_params(config)[0])


@functools.cache
def listed(name):
    """(features of two queries, features of eight items, `score` as a compiled function) of a re-ranker."""
    model = tiny(name)
    features = [model.features(part, raw(part, name)) for part in ("query", "item")]
    score = jax.jit(lambda p, *x: nnx.merge(model.graph, p).score(*x))
    return jax.tree.map(lambda x: x[:2], features[0]), features[1], score


LISTS = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])


def scores_of(name, rows):
    """Scores `[2, 4]` of two queries with the candidates that `rows` names."""
    queries, items, score = listed(name)
    lists = jax.tree.map(lambda x: x[rows], items)
    return np.asarray(score(tiny(name).params, queries, lists))


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


def test_registered_names_and_configs_belong_together(name):
    config = METHODS[name][0].tiny(INPUTS)
    assert method_name(config) == name
    assert config.inputs == INPUTS
    assert all(kind and kind <= {"image", "text"} for kind in METHODS_OF[name].query_kinds)


@pytest.mark.parametrize("part", ["query", "item"])
@pytest.mark.parametrize("name", RETRIEVERS)
def test_vectors_are_finite_and_of_unit_length(name, part):
    vectors = encoded(name, part)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4


@pytest.mark.parametrize("part", ["query", "item"])
@pytest.mark.parametrize("name", RETRIEVERS)
def test_neither_neighbours_nor_padding_change_a_row(name, part):
    """Rows among others and, of texts, cut to the length that holds the short ones."""
    examples = raw(part, name)
    batch = prepare_batch(examples, INPUTS)
    rows = np.arange(8)[::-1]
    if "text" in batch:
        rows = np.resize(np.flatnonzero(batch["text_mask"].sum(1) <= SHORT), 8)
        cut = shorten({k: x[rows] for k, x in batch.items() if k != "image"})
        assert cut["text"].shape[1] == SHORT < shorten(batch)["text"].shape[1]
    again = tiny(name).encode(part, [examples[row] for row in rows])
    np.testing.assert_allclose(again, encoded(name, part)[rows], atol=5e-6)


def test_a_batch_of_texts_is_cut_to_the_shortest_bucket_that_holds_it():
    batch = {"text": np.arange(3 * 77).reshape(3, 77), "image": np.zeros((3, 2, 2, 3))}
    for longest, bucket in ((1, 8), (8, 8), (9, 16), (40, 48), (65, 77), (77, 77)):
        lengths = np.array([[1], [longest], [longest]])
        cut = shorten(batch | {"text_mask": np.arange(77) < lengths})
        assert cut["text"].shape == cut["text_mask"].shape == (3, bucket)
        np.testing.assert_array_equal(cut["text"], batch["text"][:, :bucket])
        assert cut["image"] is batch["image"]


@pytest.mark.parametrize("name", RETRIEVERS)
def test_a_query_of_another_kind_is_refused(name):
    kinds = METHODS_OF[name].query_kinds
    for kind in ({"text"}, {"image"}, {"image", "text"}):
        query = {part: pairs()[0]["query"][part] for part in kind}
        if kind == kinds[0]:
            continue  # the tests above
        if kind in kinds:
            assert tiny(name).encode("query", [query]).shape[0] == 1
        else:
            with pytest.raises(ValueError, match=r"a query of .* consists of"):
                tiny(name).encode("query", [query])


@pytest.mark.slow
@pytest.mark.parametrize("name", RERANKERS)
def test_features_of_a_re_ranker_are_rows_on_the_host(name):
    model = tiny(name)
    for part in ("query", "item"):
        whole = model.features(part, raw(part, name))
        parts = model.features(part, raw(part, name), batch_size=5)
        for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
            assert isinstance(x, np.ndarray) and x.dtype in (np.float32, bool) and len(x) == 8
            width = min(x.shape[1], y.shape[1]) if x.ndim > 1 else None
            np.testing.assert_allclose(x[:, :width], y[:, :width], atol=1e-5)
    for kind in ({"text"}, {"image"}, {"image", "text"}):
        if kind not in METHODS_OF[name].query_kinds:
            query = {part: pairs()[0]["query"][part] for part in kind}
            with pytest.raises(ValueError, match=r"a query of .* consists of"):
                model.features("query", [query])


def test_batches_of_features_are_joined_whatever_their_shape():
    from cir_jax.model import _stacked

    assert _stacked([np.arange(2), np.arange(3)]).tolist() == [0, 1, 0, 1, 2]
    joined = _stacked([np.ones((1, 2, 3)), np.ones((2, 4, 3))])
    assert joined.shape == (3, 4, 3) and joined[0, 2:].sum() == 0 and joined.sum() == 6 + 24


@pytest.mark.parametrize("name", RERANKERS)
def test_scores_belong_to_the_candidate_not_to_its_place_or_neighbours(name):
    scores = scores_of(name, LISTS)
    assert scores.shape == (2, 4)
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) == 8
    np.testing.assert_allclose(scores_of(name, LISTS[:, ::-1])[:, ::-1], scores, atol=1e-5)
    others = np.concatenate([LISTS[:, :2], LISTS[::-1, 2:]], axis=1)
    np.testing.assert_allclose(scores_of(name, others)[:, :2], scores[:, :2], atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_finite_and_loss_falls(name):
    losses, finite = trained(name)
    assert finite
    assert min(losses[-3:]) < 0.7 * losses[0]


def test_a_saved_model_comes_back_whole(name, tmp_path):
    model = tiny(name)
    mark = save_model(tmp_path / "model", model.config, model.params)
    loaded = cir_jax.load(tmp_path / "model")
    assert loaded.fingerprint == mark
    assert to_json(loaded.config) | {"inputs": None} == to_json(model.config) | {"inputs": None}
    assert loaded.config.inputs.image == INPUTS.image
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    # The same module, parameters and arrays: it encodes the same, bit for bit.
    config = dataclasses.replace(loaded.config, inputs=INPUTS)
    assert abstract_params(config)[0] == model.graph
    for part in ("query", "item"):
        ours, theirs = (
            prepare_batch(raw(part, name), inputs) for inputs in (INPUTS, loaded.config.inputs)
        )
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_half_precision_on_disk_keeps_directions(tmp_path):
    model = tiny("clip")
    save_model(tmp_path / "half", model.config, model.params, dtype="float16")
    half = cir_jax.load(tmp_path / "half").encode("item", raw_items("clip"))
    assert (half * encoded("clip", "item")).sum(1).min() > 0.9999


def test_config_round_trips_through_json(name):
    config = METHODS[name][0].tiny(INPUTS)
    text = json.dumps(to_json(config))
    assert from_json(type(config), json.loads(text)) == config


# Their queries pass what one tower has rounded through another network: two roundings, one behind the other.
TWICE_ROUNDED = {"fti4cir", "pic2word", "searle", "lincir", "magiclens"}


def close(exact, near, looser=1):
    """The design's tolerance of bfloat16: 1e-2, and the directions of rows at 0.9999."""
    assert 0 < np.abs(exact - near).max() < looser * 1e-2
    norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(near, axis=1)
    assert ((exact * near).sum(1) / norms).min() > 1 - looser * 1e-4


@pytest.mark.parametrize("part", ["query", "item"])
@pytest.mark.parametrize("name", RETRIEVERS)
def test_bfloat16_stays_close_to_float32(name, part):
    looser = 3 if part == "query" and name in TWICE_ROUNDED else 1
    close(encoded(name, part), roughly(tiny(name)).encode(part, raw(part, name)), looser)


@pytest.mark.parametrize("name", RERANKERS)
def test_scores_in_bfloat16_stay_close_to_float32(name):
    queries, items, _ = listed(name)
    model = roughly(tiny(name))
    score = jax.jit(lambda p, *x: nnx.merge(model.graph, p).score(*x))
    lists = jax.tree.map(lambda x: x[LISTS], items)
    close(scores_of(name, LISTS), np.asarray(score(model.params, queries, lists)))


# The tiny maria has 0.99 and magiclens 0.997, before and since products of gradients take bfloat16, too.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "cfir"])
def test_gradients_in_bfloat16_point_where_those_of_float32_do(name):
    def direction(model):
        loss = lambda p: nnx.merge(model.graph, p).loss(training_batch(name), jax.random.key(0))[0]
        grads = jax.tree.leaves(jax.jit(jax.grad(loss))(model.params))
        flat = np.concatenate([np.ravel(g) for g in grads]).astype(float)
        return flat / np.linalg.norm(flat)

    exact, rough = direction(tiny(name)), direction(roughly(tiny(name)))
    assert 0.999 < exact @ rough < 1


@pytest.mark.slow
def test_own_vocabulary_travels_with_the_checkpoint(tmp_path):
    from cir_jax.data.text import train_bpe
    from cir_jax.methods.clip import ClipConfig

    path = tmp_path / "words.txt.gz"
    train_bpe(["a red house", "a blue house", "the red tree"], 540, path)
    spec = TextSpec(vocab=str(path), length=12)
    config = ClipConfig.tiny(Inputs(image=ImageSpec(size=32), text=spec))
    assert config.text.vocabulary == tokenizer(spec).size < 540
    model = drawn(config)
    save_model(tmp_path / "model", config, model.params)
    path.unlink()
    loaded = cir_jax.load(tmp_path / "model")
    assert loaded.config.inputs.text.vocab.startswith(str(tmp_path / "model"))
    assert loaded.encode("query", ["red house"]).shape == (1, 16)


def test_a_cut_checkpoint_is_refused(tmp_path):
    model = tiny("clip")
    save_model(tmp_path / "model", model.config, model.params)
    victim = max(
        (tmp_path / "model" / "params").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        cir_jax.load(tmp_path / "model")
