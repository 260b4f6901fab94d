"""CLIP's transformers against numbers computed with the original code (weights and inputs by formula)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import clip_params, clip_shapes, filled

from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.encoders.clip import TextConfig, VisionConfig
from cir_jax.encoders.layers import at_most
from cir_jax.methods.clip import Clip, ClipConfig

IMAGE = {  # norm, sum, first six
    0: (0.643558, 0.372491, (0.188621, 0.021416, 0.165744, 0.039741, -0.020768, 0.058067)),
    1: (0.658693, -0.144809, (0.241593, 0.061228, 0.131323, 0.078386, -0.170334, 0.095543)),
}
TEXT = {
    0: (1.355307, 1.194206, (-0.289130, -0.227751, 0.520623, -0.225583, 0.306533, -0.223415)),
    1: (1.461469, 1.976827, (-0.370081, -0.202313, 0.415276, -0.198060, 0.355591, -0.193807)),
}
LOGITS = ((-40.41316, -12.08200), (-53.82788, -39.50521))
LOGITS_GELU = ((-40.27287, -11.90296), (-53.74935, -39.37001))


def golden_clip(activation="quick_gelu", dtype=np.float64, **changes):
    config = ClipConfig(
        vision=VisionConfig(size=64, patch=16, width=128, layers=3, heads=changes.get("heads", 2)),
        text=TextConfig(width=64, layers=2, heads=1),
        embed=24,
        activation=activation,
        epsilon=changes.get("epsilon", 1e-5),
        dtype=changes.get("compute", "float32"),
        inputs=Inputs(image=ImageSpec(size=64)),
    )
    shapes = clip_shapes(24, 16, 4, 128, 3, 64, 2, 77, 49408)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), clip_params(filled(shapes, np.log(100))))
    graph, state = nnx.split(nnx.eval_shape(lambda: Clip(config, nnx.Rngs(0))))
    expected = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(state))
    assert jax.tree.map(lambda x: x.shape, params) == expected
    return nnx.merge(graph, params)


def pictures(dtype=np.float64):
    c, y, x = np.meshgrid(np.arange(3), np.arange(64), np.arange(64), indexing="ij")
    first = ((7 * c + 3 * y + 5 * x) % 11) / 11 - 0.5
    second = ((5 * c + 2 * y + 9 * x) % 13) / 13 - 0.5
    return np.stack([first, second]).transpose(0, 2, 3, 1).astype(dtype)


def texts(padding=0):
    rows = np.full((2, 77), padding, np.int32)
    rows[0, :5] = (49406, 320, 1125, 2368, 49407)
    rows[1, :7] = (49406, 320, 1125, 539, 320, 1929, 49407)
    return rows


def check(features, golden, tolerance):
    for row, (norm, total, first) in golden.items():
        np.testing.assert_allclose(np.linalg.norm(features[row]), norm, atol=tolerance)
        np.testing.assert_allclose(features[row].sum(), total, atol=tolerance)
        np.testing.assert_allclose(features[row][:6], first, atol=tolerance)


def test_image_features(precision):
    dtype, tolerance = precision
    check(np.asarray(golden_clip(dtype=dtype).image(pictures(dtype))), IMAGE, tolerance)


def test_text_features(precision):
    dtype, tolerance = precision
    check(np.asarray(golden_clip(dtype=dtype).text(texts())), TEXT, tolerance)


@pytest.mark.parametrize(
    "activation, expected", [("quick_gelu", LOGITS), ("gelu", LOGITS_GELU)], ids=["quick", "exact"]
)
def test_logits(precision, activation, expected):
    dtype, tolerance = precision
    model = golden_clip(activation, dtype)
    images, queries = model.item({"image": pictures(dtype)}), model.query({"text": texts()})
    logits = np.asarray(jnp.exp(model.logit_scale[...]) * images @ queries.T)
    # The printed digits end at 5e-6 and the values reach 54: the design's relative tolerance of float32 applies.
    np.testing.assert_allclose(logits, expected, atol=max(6e-6, tolerance * np.abs(expected).max()))


def test_wrong_head_count_and_epsilon_are_noticed():
    with jax.enable_x64(True):
        right = golden_clip().image(pictures())
        assert np.abs(golden_clip(heads=4).image(pictures()) - right).max() > 1e-4
        assert np.abs(golden_clip(epsilon=1e-6).image(pictures()) - right).max() > 2e-6


def test_padding_and_length_do_not_change_a_text():
    model = golden_clip(dtype=np.float32)
    full = model.text(texts())
    np.testing.assert_array_equal(full, model.text(texts(padding=49407)))
    np.testing.assert_allclose(full, model.text(texts()[:, :8]), atol=1e-6)


def test_every_product_of_bfloat16_returns_float32():
    graph, params = nnx.split(golden_clip(dtype=np.float32, compute="bfloat16"))
    total = lambda p, x: nnx.merge(graph, p).image(x).sum()
    forward, both = (
        list(products(jax.make_jaxpr(f)(params, pictures(np.float32)).jaxpr))
        for f in (total, jax.grad(total))
    )
    # Patches, eight of a block, the head; then two gradients of each.
    assert len(forward) == 10 and len(both) >= 3 * 10
    assert {*forward, *both} == {NARROW}


NARROW = ("bfloat16", "bfloat16", "float32")


def products(jaxpr):
    """Types of the operands and of the result of every product and convolution in a program, inside loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield tuple(str(x.aval.dtype) for x in (*equation.invars, *equation.outvars))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: x is None):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_a_scale_at_its_cap_can_fall():
    """The released models begin there; the cap only keeps the scale from rising."""
    slope = jax.grad(lambda x, sign: sign * at_most(x, 100.0))
    for x, sign, expected in ((99.0, -1.0, -1.0), (100.0, -1.0, 0.0), (100.0, 1.0, 1.0)):
        assert slope(x, sign) == expected
    assert at_most(101.0, 100.0) == 100
