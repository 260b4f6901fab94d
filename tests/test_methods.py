"""What every registered method must do; a new one is covered without its author writing a test."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import cir_jax
from cir_jax import sharding
from cir_jax.checkpoint import abstract_params, save_model
from cir_jax.config import Data, from_json, to_json
from cir_jax.data import training_set
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs, prepare_batch
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.methods import METHODS, build, method_name
from cir_jax.model import Model

INPUTS = Inputs(image=ImageSpec(size=64), text=TextSpec(length=24))
PAIRS = {True: "emoji-composed", False: "emoji-text"}


def made(config, seed=0):
    """A randomly initialised model of a method's config."""
    graph, _ = abstract_params(config)
    params = nnx.to_pure_dict(nnx.state(build(config, nnx.Rngs(seed))))
    return Model(config, graph, jax.device_get(params), name=method_name(config))


def training_batch(composed=False, rows=8):
    """A batch of pairs of different concepts, as the pipeline would make it."""
    source = training_set(Data(PAIRS[composed], variant="noto"))
    pairs = [source[i] for i in range(0, len(source), len(source) // rows)][:rows]
    query = [
        {**p["query"], "text": p["query"].get("text") or p["query"]["texts"][0]} for p in pairs
    ]
    batch = {
        "query": prepare_batch(query, INPUTS),
        "item": prepare_batch([{"image": p["item"]["image"]} for p in pairs], INPUTS),
    }
    batch["item"]["group"] = np.array([p["group"] for p in pairs], np.int32)
    return batch


def raw_queries(n=5):
    return [{"text": pair["text"]} for pair in _named(n)]


def raw_items(n=5):
    return [{"image": pair["image"]} for pair in _named(n)]


def _named(n):
    from cir_jax.data.emoji import emoji_pairs

    return emoji_pairs("noto", "val")[: 7 * n : 7]


@pytest.fixture(params=sorted(METHODS))
def config(request):
    return METHODS[request.param][0].tiny(INPUTS)


@pytest.fixture
def model(config):
    return made(config)


@pytest.mark.parametrize("part, examples", [("query", raw_queries), ("item", raw_items)])
def test_vectors_are_finite_and_of_unit_length(model, part, examples):
    vectors = model.encode(part, examples())
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("part, examples", [("query", raw_queries), ("item", raw_items)])
def test_neighbours_in_a_batch_do_not_change_a_row(model, part, examples):
    together = model.encode(part, examples(5))
    alone = np.concatenate([model.encode(part, [example]) for example in examples(5)])
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_gradients_are_finite_and_loss_falls(config):
    module = build(config, nnx.Rngs(0))
    graph, state = nnx.split(module)
    batch, tx = training_batch(), optax.adam(3e-3)
    params = nnx.to_pure_dict(state)
    opt = tx.init(params)

    @jax.jit
    def step(params, opt):
        loss = lambda p: nnx.merge(graph, p).loss(batch, jax.random.key(0))[0]
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt, value, grads

    values = []
    for _ in range(12):
        params, opt, value, grads = step(params, opt)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


def test_every_parameter_of_a_retriever_learns(config):
    """A parameter without a gradient is a wiring fault."""
    graph, state = nnx.split(build(config, nnx.Rngs(0)))
    loss = lambda p: nnx.merge(graph, p).loss(training_batch(), jax.random.key(0))[0]
    grads = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(nnx.to_pure_dict(state)))
    # Softmax is blind to what is added to all of a row's logits, and so to the bias of the keys.
    idle = {sharding.path_name(path) for path, g in grads if not np.abs(g).max() > 1e-9}
    assert {name for name in idle if not name.endswith("key/bias")} == set()


def test_loss_of_four_devices_equals_one(config):
    graph, state = nnx.split(build(config, nnx.Rngs(0)))
    params, batch = nnx.to_pure_dict(state), training_batch()
    loss = jax.jit(lambda p, b: nnx.merge(graph, p).loss(b, jax.random.key(0))[0])
    spread = loss(params, sharding.put_batch(batch, sharding.make_mesh()))
    np.testing.assert_allclose(spread, loss(params, batch), rtol=1e-5)


def test_saved_and_loaded_model_encodes_the_same(model, tmp_path):
    mark = save_model(tmp_path / "model", model.config, model.params)
    loaded = cir_jax.load(tmp_path / "model")
    assert loaded.fingerprint == mark
    assert loaded.config == model.config
    np.testing.assert_array_equal(
        model.encode("item", raw_items()), loaded.encode("item", raw_items())
    )


def test_half_precision_on_disk_keeps_directions(model, tmp_path):
    save_model(tmp_path / "half", model.config, model.params, dtype="float16")
    half = cir_jax.load(tmp_path / "half").encode("item", raw_items())
    assert (half * model.encode("item", raw_items())).sum(1).min() > 0.9999


def test_config_round_trips_through_json(config):
    text = json.dumps(to_json(config))
    assert from_json(type(config), json.loads(text)) == config


def test_bfloat16_stays_close_to_float32(config, model):
    rough = Model(**{**vars(model), "config": dataclasses.replace(config, dtype="bfloat16")})
    rough = dataclasses.replace(rough, graph=abstract_params(rough.config)[0])
    exact, near = model.encode("item", raw_items()), rough.encode("item", raw_items())
    assert np.abs(exact - near).max() < 1e-2
    assert (exact * near).sum(1).min() > 0.9999
    assert np.abs(exact - near).max() > 0


def test_own_vocabulary_travels_with_the_checkpoint(tmp_path):
    from cir_jax.data.text import train_bpe
    from cir_jax.methods.clip import ClipConfig

    path = tmp_path / "words.txt.gz"
    train_bpe(["a red house", "a blue house", "the red tree"], 540, path)
    spec = TextSpec(vocab=str(path), length=12)
    config = ClipConfig.tiny(Inputs(image=ImageSpec(size=64), text=spec))
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, vocabulary=tokenizer(spec).size)
    )
    model = made(config)
    save_model(tmp_path / "model", config, model.params)
    path.unlink()
    loaded = cir_jax.load(tmp_path / "model")
    assert loaded.config.inputs.text.vocab.startswith(str(tmp_path / "model"))
    assert loaded.encode("query", ["red house"]).shape == (1, 16)


def test_a_tampered_or_cut_checkpoint_is_refused(model, tmp_path):
    save_model(tmp_path / "model", model.config, model.params)
    victim = max(
        (tmp_path / "model" / "params").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        cir_jax.load(tmp_path / "model")
