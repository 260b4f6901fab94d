"""Chunks, rings and accumulation: less memory, and the losses and gradients that they promise."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_methods import INPUTS, drawn, training_batch

from cir_jax import large_batches, losses, sharding
from cir_jax.config import Data
from cir_jax.methods import METHODS
from cir_jax.methods.clip import ClipConfig
from cir_jax.training import dry_run
from cir_jax.training.checks import check_batch
from cir_jax.training.step import make_gradients, program

GROUPS = np.array([0, 1, 0, 2, 3, 3, 3, 4, 5, 6, 7, 5, 8, 9, 0, 10])
SCALE, BIAS = jnp.float32(7.0), jnp.float32(-2.0)


def rows(seed, n=16, d=6):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def sigmoid(queries, items, scale, groups):
    return losses.sigmoid(queries, items, scale, BIAS, groups)


LOSSES = {
    "softmax": losses.contrastive,
    "one way": functools.partial(losses.contrastive, one_way=True),
    "sigmoid": sigmoid,
}


def close(found, expected, tolerance=1e-6):
    """Equal trees, relative to the largest number of each array."""

    def check(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-30))

    jax.tree.map(check, found, expected)


ALONE = pytest.param(None, id="alone", marks=pytest.mark.slow)


@pytest.mark.parametrize("groups", [ALONE, pytest.param(GROUPS, id="groups")])
@pytest.mark.parametrize("name", LOSSES)
def test_in_a_ring_losses_and_gradients_are_the_same(name, groups):
    mesh = sharding.make_mesh(fsdp=2)

    def slopes(ring):
        def loss(queries, items, scale):
            with large_batches.computed(ring=ring, mesh=mesh):
                return LOSSES[name](queries, items, scale, groups)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    arguments = *sharding.put_batch((rows(0), rows(1)), mesh), SCALE
    found = slopes(True)(*arguments)
    assert found[1][0].sharding.is_equivalent_to(arguments[0].sharding, 2)
    close(found, slopes(False)(*arguments))


def test_a_ring_never_holds_all_scores():
    """64 rows on 4 devices: 16 x 16 at a time."""
    mesh = sharding.make_mesh(fsdp=2)

    def largest(ring):
        def loss(queries, items):
            with large_batches.computed(ring=ring, mesh=mesh):
                return losses.contrastive(queries, items, SCALE)[0]

        compiled = jax.jit(jax.grad(loss)).lower(*places).compile().as_text()
        return "[64,64]" in compiled or "[16,64]" in compiled, "all-gather" in compiled

    places = sharding.put_batch((rows(0, 64), rows(1, 64)), mesh)
    assert largest(True) == (False, False)
    assert largest(False) == (True, True)


def test_of_equal_items_the_first_is_the_best_in_a_ring_too():
    @jax.jit
    def accuracy(items, groups):
        with large_batches.computed(ring=True, mesh=sharding.make_mesh()):
            return losses.contrastive(items, items, SCALE, groups)[1]["accuracy"]

    items = np.ones((8, 2), np.float32)
    assert accuracy(items, np.array([0, 1, 1, 1, 1, 1, 1, 1])) == 1 / 8
    assert accuracy(items, np.zeros(8, int)) == 1


def test_sigmoid_equals_its_definition():
    queries, items = rows(0), rows(1)
    logits = float(SCALE) * queries.astype(float) @ items.T + float(BIAS)
    sign = np.where(GROUPS[:, None] == GROUPS, 1, -1)
    expected = np.log1p(np.exp(-sign * logits)).sum() / len(queries)
    value, metrics = sigmoid(queries, items, SCALE, GROUPS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    right = GROUPS[logits.argmax(axis=1)] == GROUPS
    np.testing.assert_allclose(metrics["accuracy"], right.mean(), rtol=1e-6)


@pytest.mark.slow
def test_clip_learns_with_the_sigmoid_loss():
    config = dataclasses.replace(ClipConfig.tiny(INPUTS), loss="sigmoid")
    model, batch = drawn(config), training_batch("clip")
    params = {**model.params, "logit_bias": np.float32(-3)}
    loss = lambda p: nnx.merge(model.graph, p).loss(batch, jax.random.key(0))[0]
    value, slopes = jax.jit(jax.value_and_grad(loss))(params)
    assert slopes["logit_bias"] != 0
    method = nnx.merge(model.graph, params)
    parts = method.query(batch["query"]), method.item(batch["item"])
    expected = losses.sigmoid(*parts, method.scale(), jnp.float32(-3))[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


# ---- chunks and accumulation ----


def quiet(name):
    """A tiny method without randomness in training."""
    config = METHODS[name][0].tiny(INPUTS)
    if name == "bert":
        return dataclasses.replace(config, bert=dataclasses.replace(config.bert, dropout=0.0))
    return dataclasses.replace(config, dropout=0.0) if hasattr(config, "dropout") else config


def gradients(name, model, batch, **options):
    """((loss, metrics), gradients) of a batch, compiled; `options` are those of `make_gradients`."""
    compute = make_gradients(model.graph, **options)
    key = jax.random.key(0) if name in ("clip", "bert", "blip_itm") else None
    return jax.jit(lambda params: compute(params, {}, batch, key))(model.params)


FAST = ("clip",)
# pic2word and searle are the network of lincir, and learn from composed queries by the same loss.
ALL = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in METHODS
    if name not in ("pic2word", "searle")
]


@pytest.mark.parametrize("name", ALL)
def test_chunks_change_neither_loss_nor_gradient(name):
    model, batch = drawn(quiet(name)), training_batch(name)
    whole, parts = (gradients(name, model, batch, chunks=chunks) for chunks in (1, 4))
    close(parts[0], whole[0], 1e-5)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(whole[1]))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * scale), *(parts[1], whole[1])
    )


def test_batches_that_cannot_be_cut_are_refused(tiny_experiment):
    mesh, train = sharding.make_mesh(), tiny_experiment.train
    check = lambda data=tiny_experiment.data, **changes: check_batch(
        dataclasses.replace(
            tiny_experiment, data=data, train=dataclasses.replace(train, **changes)
        ),
        mesh,
    )
    check(chunks=2), check(accumulate=2)
    with pytest.raises(ValueError, match=r"8 does not divide by 4 .* times chunks 4; use 16"):
        check(chunks=4)
    with pytest.raises(ValueError, match="rows of a block are to meet"):
        check(data=(Data("emoji-text", block=2),), accumulate=2)


@pytest.mark.parametrize("option", [{"ring": True}, {"chunks": 2}])
def test_what_would_have_no_effect_is_refused(option):
    with pytest.raises(ValueError, match="but this loss"), large_batches.computed(**option):
        losses.listwise(jnp.eye(4))


@pytest.mark.slow
def test_accumulation_is_the_mean_over_micro_batches():
    model, batch = drawn(quiet("clip")), training_batch("clip")
    parts = [jax.tree.map(lambda x, j=j: x[j::2], batch) for j in (0, 1)]
    each = [gradients("clip", model, part) for part in parts]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *each)
    close(gradients("clip", model, batch, accumulate=2), mean, 1e-5)


# ---- meshes ----


def on_eight_devices(*arguments, **variables) -> tuple[list[float], dict]:
    """The losses of one device, and for each mesh the losses and the shapes of the parameters that were gathered."""
    command = [sys.executable, str(Path(__file__).with_name("eight_devices.py")), *arguments]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one, _ = found.pop("alone")
    assert len(set(one)) == len(one) == 3
    return one, found


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_eight_devices_give_the_losses_of_one(name):
    """On every mesh; and where only rows are spread, no parameter is gathered, for each device has it."""
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling is most of it
    one, found = on_eight_devices(name, "{}", **quickly)
    assert set(found) == {"8x1x1", "1x8x1", "4x2x1", "2x2x2"}
    for mesh, (values, _) in found.items():
        np.testing.assert_allclose(values, one, rtol=2e-5, err_msg=mesh)
    assert not found["8x1x1"][1]
    assert found["1x8x1"][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("blip_rerank", {"chunks": 2}),
        ("fti4cir", {"accumulate": 2}),
        ("clip", {"ring": True, "chunks": 2}),
    ],
)
def test_beside_a_tensor_axis_parts_and_rings_give_the_losses_of_one_device(name, options):
    """Compiled as for a run, with all optimisations."""
    one, found = on_eight_devices(name, json.dumps(options), "2x2x2")
    np.testing.assert_allclose(found["2x2x2"][0], one, rtol=2e-5)


@pytest.mark.slow
def test_under_fsdp_no_layer_is_kept_whole_for_the_way_back(tiny_experiment):
    """Without remat activations are kept, and parameters gathered again."""
    method = dataclasses.replace(tiny_experiment.method, remat=False)
    config = dataclasses.replace(tiny_experiment, method=method, data=tiny_experiment.data[:1])
    mesh = sharding.make_mesh(fsdp=4)
    made = program(config, mesh)
    batch = dry_run.batch_shapes(config, dry_run.Kind(("text",), ("image",)), mesh)
    text = made.step.lower(made.state, batch, np.int32(0)).compile().as_text()
    kernel = made.state["params"]["image"]["blocks"]["mlp"]["up"]["kernel"]
    layers, inputs, outputs = kernel.shape
    assert f"f32[{layers},{inputs // 4},{outputs}]" in text
    assert f"f32[{layers},{inputs},{outputs}]" not in text


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 2])
def test_under_fsdp_rows_stay_where_they_are(tiny_experiment, chunks):
    """Parameters come to the rows: no product of activations with a part of a parameter is added up over devices."""
    config = dataclasses.replace(
        tiny_experiment,
        data=tiny_experiment.data[:1],
        train=dataclasses.replace(tiny_experiment.train, batch_size=16, chunks=chunks),
    )
    mesh = sharding.make_mesh(fsdp=4)
    made = program(config, mesh)
    batch = dry_run.batch_shapes(config, dry_run.Kind(("text",), ("image",)), mesh)
    text = made.step.lower(made.state, batch, np.int32(0)).compile().as_text()
    sent = " ".join(re.findall(r" = (.*?) (?:all-reduce|all-to-all|all-gather)\(", text))
    tokens = {(64 // 16) ** 2 + 1, 24}
    ranked = [json.loads(f"[{shape}]") for shape in re.findall(r"\[([\d,]*)\]", sent)]
    assert not [shape for shape in ranked if len(shape) > 2 and tokens & set(shape)]
