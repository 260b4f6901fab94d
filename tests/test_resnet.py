"""CLIP with a modified ResNet, as a method: its config, its training, its types. Golden numbers: test_convert.py."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_clip import NARROW, products
from test_methods import INPUTS, made, training_batch

from cir_jax.checkpoint import abstract_params
from cir_jax.config import Optim
from cir_jax.encoders.clip import VisionConfig
from cir_jax.encoders.resnet import ResnetConfig, convolve, pooled
from cir_jax.methods.clip import Clip, ClipConfig
from cir_jax.training import optim
from cir_jax.typed import from_json, to_json


def tiny() -> ClipConfig:
    vision = ResnetConfig(size=INPUTS.image.size, width=8, layers=(2, 1, 2, 1), heads=4)
    return dataclasses.replace(ClipConfig.tiny(INPUTS), vision=vision)


@pytest.mark.parametrize(
    "vision", [VisionConfig(patch=16), ResnetConfig(), ResnetConfig(layers=(1, 2, 3, 4))]
)
def test_a_config_says_which_tower_it_means(vision):
    config = ClipConfig(vision=vision)
    assert from_json(ClipConfig, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 32}, r"vision\."),
        ({"layers": [1, 2, 3]}, "vision.layers is"),
        ({"heads": "many"}, 'vision.heads is "many", expected a whole number'),
    ],
)
def test_a_config_of_neither_tower_is_refused(changes, message):
    value = to_json(ClipConfig(vision=ResnetConfig()))
    value["vision"] |= changes
    with pytest.raises(ValueError, match=message):
        from_json(ClipConfig, json.loads(json.dumps(value)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(tiny(), patches_kept=0.5), "no patches to leave out"),
        (dataclasses.replace(tiny(), vision=ResnetConfig(size=40)), "inputs.image.size"),
        (
            dataclasses.replace(tiny(), vision=ResnetConfig(size=32, layers=(1, 0, 1, 1))),
            "at least one",
        ),
    ],
)
def test_sizes_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Clip(config, nnx.Rngs(0)))


@pytest.mark.slow
def test_batch_statistics_do_not_learn_and_do_not_decay():
    model, batch = made(tiny()), training_batch("clip")
    loss = lambda p: nnx.merge(model.graph, p).loss(batch, jax.random.key(0))[0]
    grads = jax.jit(jax.grad(loss))(model.params)
    flat = {jax.tree_util.keystr(path): g for path, g in jax.tree_util.tree_leaves_with_path(grads)}
    assert all(np.isfinite(g).all() for g in flat.values())
    held = {name for name, g in flat.items() if not np.abs(g).max() > 0}
    frozen = {name for name in flat if name.endswith(("['mean']", "['variance']"))}
    assert frozen <= held
    assert any("stage1" in name for name in flat.keys() - held)
    decays = optim.decays(model.params, Optim())["image"]["stage1"]["blocks"]["conv1"]
    assert decays["kernel"] and not decays["norm"]["mean"] and not decays["norm"]["variance"]


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32():
    model = made(tiny())
    config = dataclasses.replace(model.config, dtype="bfloat16")
    rough = dataclasses.replace(model, config=config, graph=abstract_params(config)[0])
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    call = lambda m: np.asarray(nnx.merge(m.graph, m.params).item({"image": images}))
    exact, near = call(model), call(rough)
    assert 0 < np.abs(exact - near).max() < 2e-2
    np.testing.assert_allclose(np.linalg.norm(near, axis=1), 1, atol=1e-5)


def test_pooling_cuts_what_is_left_over():
    x = jnp.arange(2 * 5 * 4, dtype=jnp.float32).reshape(2, 5, 4, 1)
    y = pooled(x, 2)
    assert y.shape == (2, 2, 2, 1)
    assert float(y[0, 0, 0, 0]) == (0 + 1 + 4 + 5) / 4
    assert pooled(x, 1) is x


@pytest.mark.parametrize("stride, side, groups", [(1, 3, 4), (2, 3, 4), (2, 3, 1), (2, 1, 1)])
def test_gradients_of_a_convolution_are_those_of_xla(stride, side, groups):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, 7, 8, 8)).astype(np.float32)
    kernel = draw.standard_normal((side, side, 8 // groups, 12)).astype(np.float32)
    weights = draw.standard_normal(convolve(x, kernel, stride, groups, "float32").shape)

    def xla(x, kernel):
        numbers, edges = ("NHWC", "HWIO", "NHWC"), ((side // 2,) * 2,) * 2
        options = {"dimension_numbers": numbers, "feature_group_count": groups}
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, edges, **options)

    def gradients(call):
        total = lambda x, kernel: (weights * call(x, kernel)).sum()
        return jax.jit(jax.grad(total, (0, 1)))(x, kernel)

    ours = lambda dtype: gradients(lambda x, kernel: convolve(x, kernel, stride, groups, dtype))
    for exact, rough, expected in zip(ours("float32"), ours("bfloat16"), gradients(xla)):
        np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-5)
        assert rough.dtype == jnp.float32 and 0.9999 < cosine(rough, expected) < 1


def test_every_convolution_of_bfloat16_returns_float32():
    config = dataclasses.replace(tiny(), dtype="bfloat16")
    graph, params = abstract_params(config)
    total = lambda p: nnx.merge(graph, p).image(jnp.ones((2, 32, 32, 3))).sum()
    assert {*products(jax.make_jaxpr(jax.grad(total))(params).jaxpr)} == {NARROW}


def cosine(x, y):
    """Of two arrays as vectors."""
    x, y = np.ravel(x).astype(float), np.ravel(y).astype(float)
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)
