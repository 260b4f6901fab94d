"""BEiT-3 and CFIR against numbers computed with the original code (cfir.md 2.4 and 2.5), and their conversion."""

import dataclasses
import json

import golden_beit3 as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import cir_jax
from cir_jax.checkpoint import abstract_params
from cir_jax.conversion import beit3 as table
from cir_jax.conversion import rules
from cir_jax.convert import convert, export
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec, tokenizer, train_sentencepiece
from cir_jax.encoders.beit3 import (
    BEIT3_BASE,
    BEIT3_LARGE,
    Adapter,
    AdapterConfig,
    Beit3Config,
    ImageTower,
    joint,
    resize_positions,
)
from cir_jax.methods.cfir import FROZEN, Cfir, CfirConfig, resized
from cir_jax.training import optim
from cir_jax.typed import from_json, to_json

BOTH = ("image", "text")
OPTIONS = {"dtype": "float32", "remat": True}
TINY = Beit3Config(size=32, vocabulary=40, length=14, width=16, layers=2, heads=4, hidden=32)
IDS = np.array([[0, 5, 6, 7, 2, 1], [0, 9, 2, 1, 1, 1]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool)

EMBEDDED = (-0.754350, -0.909346, 1.011762, -1.210200)
IMAGE_STATES = {
    (0, 0): (-0.428609, 0.302408, -0.091381, -0.372279, 0.578019, 1.195582, 0.447702, -0.405771),
    (1, 4): (-1.609875, 1.491840, 0.703667, -0.049728),
}
TEXT_STATES = {
    (0, 0): (0.125963, -0.932573, -0.183151, -1.504426, -0.545054, 0.455725, -0.208263, 0.644204),
    (1, 5): (1.607216, -0.589394, 0.351161, -0.455941),
}
JOINT_STATES = {
    (0, 0): (-0.471819, -0.835149, -1.779233, 1.732990),
    (0, 5): (-0.049240, -1.303935, 0.377776, -0.412770),
}
IMAGE = {
    0: (-0.039207, 0.025889, 0.169239, 0.364285, -0.488128, -0.015289, -0.215047, 0.067724),
    1: (0.280042, 0.210996, -0.161687, 0.248932),
}
TEXT = {
    0: (0.334714, 0.605598, 0.273039, -0.055171, 0.234821, 0.055215, 0.208682, 0.097367),
    1: (-0.061023, 0.499278, 0.121362, 0.211005),
}
COSINES = ((-0.280297, -0.181402), (0.182787, 0.027468))
LOSS = 1.548666
# The printed digits are those of a float32 run of the original. In it, sums over a patch (768
# products) and over the joint sequence are off by 2.2e-6 and 1.5e-6; all else agrees to 1e-6.
OF_FLOAT32 = 3e-6
# towers with adapters -> first values of picture 0 and text 0
ADAPTED = {
    BOTH: (
        (-0.037953, 0.003921, 0.161184, 0.380113),
        (0.302106, 0.598992, 0.301015, -0.027072),
    ),
    ("image",): ((-0.031879, 0.029002, 0.171228, 0.364366), TEXT[0]),
    ("text",): (IMAGE[0], (0.354005, 0.600046, 0.281824, -0.052151)),
}
ENHANCED = (
    (-0.120783, 0.586181, -0.062939, -0.118719),
    (0.431674, 0.278809, -0.040461, 0.255458),
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Many small programs run once each here: compiling them costs more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def count(tree) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(x.size for x in jax.tree.leaves(tree))


def config_of(encoder=TINY, **changes):
    inputs = Inputs(image=ImageSpec(size=encoder.size), text=TextSpec(length=12))
    return CfirConfig(encoder=encoder, inputs=inputs, **changes)


def with_tensors(config, tensors, dtype):
    graph, shapes = abstract_params(config)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), golden.params(tensors, config.encoder))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    return nnx.merge(graph, params)


def golden_cfir(dtype=np.float32, encoder=TINY, **changes):
    tensors = golden.filled(golden.shapes(encoder))
    if encoder.adapter.towers:
        tensors |= golden.filled_adapters(golden.adapter_shapes(encoder))
    if encoder.enhancer:
        tensors |= golden.filled_enhancer(golden.enhancer_shapes(encoder))
    return with_tensors(config_of(encoder, **changes), tensors, dtype)


def pictures(dtype=np.float32):
    values = np.random.RandomState(1000).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    return values.transpose(0, 2, 3, 1).astype(dtype)


def batch(dtype=np.float32):
    return {"query": {"text": IDS, "text_mask": MASK}, "item": {"image": pictures(dtype)}}


@jax.jit
def queried(model, query):
    return model.query(query)


@jax.jit
def itemed(model, item):
    return model.item(item)


def check(found, expected, tolerance):
    expected = np.asarray(expected)
    found = np.asarray(found)[..., : expected.shape[-1]] if expected.ndim else found
    scale = max(1, np.abs(expected).max()) if tolerance == 1e-5 else 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def test_patches(precision):
    dtype, tolerance = precision
    tolerance = max(tolerance, OF_FLOAT32)
    check(golden_cfir(dtype).image.embed(pictures(dtype))[0, 1], EMBEDDED, tolerance)


def test_image_states(precision):
    dtype, tolerance = precision
    states = golden_cfir(dtype).image.tokens(pictures(dtype))
    for place, expected in IMAGE_STATES.items():
        check(states[place], expected, tolerance)


def test_text_states_also_at_padding(precision):
    dtype, tolerance = precision
    states = golden_cfir(dtype).text.tokens(IDS, MASK)
    for place, expected in TEXT_STATES.items():
        check(states[place], expected, tolerance)


def test_joint_states(precision):
    dtype, tolerance = precision
    tolerance = max(tolerance, OF_FLOAT32)
    model = golden_cfir(dtype)
    states = joint(model.image, model.text, pictures(dtype), IDS, MASK)
    assert states.shape == (2, 5 + 6, 16)
    for place, expected in JOINT_STATES.items():
        check(states[place], expected, tolerance)


def test_features_cosines_and_loss(precision):
    dtype, tolerance = precision
    model, both = golden_cfir(dtype), batch(dtype)
    images, texts = itemed(model, both["item"]), queried(model, both["query"])
    for row in (0, 1):
        check(images[row], IMAGE[row], tolerance)
        check(texts[row], TEXT[row], tolerance)
    check(images @ texts.T, COSINES, tolerance)
    loss, metrics = jax.jit(lambda m, x: m.loss(x, jax.random.key(0)))(model, both)
    check(loss, LOSS, tolerance)
    check(metrics["scale"], np.exp(2.0), tolerance)


@pytest.mark.parametrize("towers", ADAPTED, ids="+".join)
def test_adapters(precision, towers):
    dtype, tolerance = precision
    adapter = AdapterConfig(towers, width=4)
    model = golden_cfir(dtype, dataclasses.replace(TINY, adapter=adapter))
    image, text = ADAPTED[towers]
    check(itemed(model, batch(dtype)["item"])[0], image, tolerance)
    check(queried(model, batch(dtype)["query"])[0], text, tolerance)


def test_enhancer(precision):
    dtype, tolerance = precision
    model = golden_cfir(dtype, dataclasses.replace(TINY, enhancer=128))
    image, text = ENHANCED
    check(itemed(model, batch(dtype)["item"])[0], image, tolerance)
    check(queried(model, batch(dtype)["query"])[0], text, tolerance)


def test_each_usual_mistake_is_noticed():
    with jax.enable_x64(True):
        right = queried(golden_cfir(np.float64), batch()["query"])
        wrong = {}
        model = golden_cfir(np.float64)
        positions = model.text.expert.positions
        positions[...] = jnp.roll(positions[...], 2, axis=0)
        wrong["positions from 0"] = queried(model, batch()["query"])
        blind = {"text": IDS, "text_mask": np.ones_like(MASK)}
        wrong["no mask"] = queried(golden_cfir(np.float64), blind)
        model = golden_cfir(np.float64)
        model.text.expert.blocks.mlp.ln.epsilon = 1e-6
        wrong["epsilon"] = queried(model, batch()["query"])
        apart = {name: float(np.abs(vectors - right).max()) for name, vectors in wrong.items()}
    assert apart["positions from 0"] > 0.5
    assert apart["no mask"] > 0.5
    assert apart["epsilon"] > 2e-6


def test_first_position_alone_equals_all_states():
    model = golden_cfir()
    np.testing.assert_allclose(
        model.image(pictures()), model.image.tokens(pictures())[:, 0], atol=1e-6
    )
    np.testing.assert_allclose(model.text(IDS, MASK), model.text.tokens(IDS, MASK)[:, 0], atol=1e-6)


def test_length_of_the_padding_does_not_change_a_text():
    model = golden_cfir()
    longer = {"text": np.pad(IDS, ((0, 0), (0, 4))), "text_mask": np.pad(MASK, ((0, 0), (0, 4)))}
    short = queried(model, batch()["query"])
    np.testing.assert_allclose(queried(model, longer), short, atol=1e-6)


def test_hidden_patches_become_the_mask_token():
    image = golden_cfir().image
    hidden = np.array([[0, 1, 0, 0], [0, 0, 0, 0]], bool)
    plain, masked = image.embed(pictures()), image.embed(pictures(), hidden)
    np.testing.assert_array_equal(masked[0, 2], image.mask_token[...])
    np.testing.assert_array_equal(np.delete(masked, 2, axis=1)[0], np.delete(plain, 2, axis=1)[0])
    np.testing.assert_array_equal(masked[1], plain[1])


@pytest.mark.parametrize(
    "encoder, keys, parameters",
    [(BEIT3_BASE, 494, 222_167_041), (BEIT3_LARGE, 974, 674_799_617)],
    ids=["base", "large"],
)
def test_size_of_the_published_models(encoder, keys, parameters):
    assert len(golden.shapes(encoder)) == keys
    config = CfirConfig(encoder=encoder, inputs=Inputs(image=ImageSpec(size=encoder.size)))
    assert count(abstract_params(config)[1]) == parameters


def test_size_with_adapters_and_enhancer():
    encoder = dataclasses.replace(BEIT3_BASE, adapter=AdapterConfig(BOTH), enhancer=128)
    tables = golden.shapes(encoder), golden.adapter_shapes(encoder), golden.enhancer_shapes(encoder)
    assert sum(map(len, tables)) == 734
    config = CfirConfig(encoder=encoder, inputs=Inputs(image=ImageSpec(size=encoder.size)))
    assert count(abstract_params(config)[1]) == 229_292_545


@pytest.mark.parametrize("norm, scale", [("in", None), ("none", 0.6), ("out", None)])
def test_every_option_of_an_adapter_starts_as_nothing_and_learns(norm, scale):
    config = AdapterConfig(width=4, norm=norm, scale=scale)
    adapter = Adapter(16, config, dtype="float32", rngs=nnx.Rngs(0))
    assert (adapter.scale is None) == (scale is not None)
    x = jax.random.normal(jax.random.key(0), (2, 3, 16))
    assert adapter(x).shape == x.shape
    np.testing.assert_array_equal(adapter(x), 0)
    adapter.up.kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), (4, 16))
    assert np.abs(adapter(x)).max() > 1e-3


def test_an_adapter_of_the_original_starts_as_noise():
    config = AdapterConfig(width=4, initial="noise")
    adapter = Adapter(16, config, dtype="float32", rngs=nnx.Rngs(0))
    for layer in (adapter.down, adapter.up):
        kernel = np.asarray(layer.kernel[...])
        assert 0.018 < np.abs(kernel).max() <= 0.02 and np.abs(kernel.std() - 0.0108) < 3e-3
        assert not np.any(layer.bias[...])


def test_initial_values():
    model = Cfir(config_of(), nnx.Rngs(0))
    kernel = np.asarray(model.text.expert.blocks.mlp.up.kernel[...])
    assert kernel.shape == (2, 16, 32)
    assert 0.019 < np.abs(kernel).max() <= 0.02
    assert np.abs(kernel.std() - 0.0108) < 5e-4
    assert np.abs(np.std(model.text.expert.positions[...]) - 1) < 0.1
    assert np.abs(model.image.patch_kernel[...]).max() <= 1 / np.sqrt(3 * 16 * 16)
    assert not np.any(model.image.class_token[...])
    assert float(model.scale()) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    "changes", [{"drop_path": 0.5}, {"adapter": AdapterConfig(BOTH, width=4, dropout=0.5)}], ids=str
)
def test_a_key_drops_at_random_and_none_does_not(changes):
    model = golden_cfir(encoder=dataclasses.replace(TINY, **changes))
    item = batch()["item"]
    dropped = jax.jit(lambda seed: model.item(item, jax.random.key(seed)))
    once, same, *others = map(dropped, (1, 1, 2, 3, 4, 5))
    np.testing.assert_array_equal(once, same)
    assert max(np.abs(once - other).max() for other in others) > 1e-3
    np.testing.assert_array_equal(model.item(item), model.item(item))


def test_a_key_without_rates_changes_nothing():
    model = golden_cfir()
    item = batch()["item"]
    np.testing.assert_array_equal(model.item(item, jax.random.key(1)), model.item(item))


def test_config_with_an_adapter_round_trips_through_json():
    encoder = dataclasses.replace(TINY, adapter=AdapterConfig(towers=("text",), scale=None))
    config = config_of(encoder)
    assert from_json(CfirConfig, json.loads(json.dumps(to_json(config)))) == config


def test_largest_scale():
    assert float(golden_cfir(largest_scale=3.0).scale()) == 3.0


def test_bfloat16_products_keep_the_direction():
    exact, rough = golden_cfir(), golden_cfir(dtype=np.float32)
    rough = nnx.merge(
        abstract_params(config_of(dtype="bfloat16"))[0], nnx.to_pure_dict(nnx.state(rough))
    )
    for part in ("query", "item"):
        run = {"query": queried, "item": itemed}[part]
        x, y = (run(model, batch()[part]) for model in (exact, rough))
        assert y.dtype == jnp.float32
        assert (x * y).sum(axis=1).min() > 0.999
        assert np.abs(x - y).max() > 0


def test_position_table_for_another_picture_size():
    table = np.zeros((3 + 16, 1), np.float32)
    table[:3, 0], table[3:, 0] = (7, 8, 9), np.arange(16)
    larger = np.asarray(resize_positions(table, 6))
    np.testing.assert_array_equal(larger[:3, 0], (7, 8, 9))
    square = larger[3:, 0].reshape(6, 6)
    expected = {
        0: (-0.43403, 0.05903, 0.86574, 1.43982, 2.24653, 2.73958),
        1: (1.53819, 2.03125, 2.83796, 3.41204, 4.21875, 4.71181),
        5: (12.26042, 12.75347, 13.56019, 14.13426, 14.94097, 15.43403),
    }
    for row, values in expected.items():
        # Printed with five digits, so half a unit of the last comes on top.
        np.testing.assert_allclose(square[row], values, rtol=1e-5, atol=6e-6)
    table[3:, 0] = np.random.RandomState(7).standard_normal((4, 4)).reshape(-1)
    smaller = np.asarray(resize_positions(table, 3))[3:, 0].reshape(3, 3)
    expected = [
        (1.04977, -0.34861, 0.07305),
        (0.01465, 0.14840, -0.95967),
        (0.50750, -0.19954, -1.11101),
    ]
    np.testing.assert_allclose(smaller, expected, rtol=1e-5, atol=6e-6)


def test_a_model_starts_from_one_of_another_picture_size():
    theirs = golden.params(golden.filled(golden.shapes(TINY)), TINY)
    encoder = dataclasses.replace(TINY, size=64)
    own = abstract_params(config_of(encoder))[1]
    table = {"positions": np.zeros(own["image"]["expert"]["positions"].shape)}
    found = resized({"image": {"expert": table}}, theirs)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, own)
    positions = theirs["image"]["expert"]["positions"]
    np.testing.assert_array_equal(
        found["image"]["expert"]["positions"], resize_positions(positions, 4)
    )
    assert resized(theirs, theirs) is theirs
    assert Cfir.starts == {CfirConfig: resized}


@pytest.mark.parametrize(
    ("preset", "trained", "still"),
    [
        ("adapters", ("image/expert/blocks/adapter", "text/expert/blocks/enhancer"), "logit_scale"),
        ("pictures", ("text/expert", "text_project", "logit_scale"), "image/"),
        (
            "text_by_name",
            ("text/embedding", "text/expert/blocks/mlp/ln", "image/expert/blocks/adapter"),
            "text/expert/blocks/attention",
        ),
    ],
)
def test_what_is_trained(preset, trained, still):
    encoder = dataclasses.replace(TINY, adapter=AdapterConfig(BOTH, width=4), enhancer=8)
    parts = optim.split_frozen(abstract_params(config_of(encoder))[1], FROZEN[preset])
    names = [list(traverse_util.flatten_dict(part, sep="/")) for part in parts]
    found = lambda part, start: any(name.startswith(start) for name in names[part])
    assert all(found(0, start) for start in trained)
    assert found(1, still) and not found(0, still)
    if preset == "text_by_name":
        assert not found(0, "text/expert/blocks/adapter") and not found(0, "text_project")


# ---- conversion ----


class Tensors(dict):
    """Arrays as `cir_jax.conversion.sources.Tensors`."""

    def shape(self, name):
        return self[name].shape

    def dtype(self, name):
        return self[name].dtype


def all_tensors(encoder):
    tensors = golden.filled(golden.shapes(encoder))
    tensors |= golden.filled_adapters(golden.adapter_shapes(encoder))
    if encoder.enhancer:
        tensors |= golden.filled_enhancer(golden.enhancer_shapes(encoder))
    return {name: np.asarray(x, np.float32) for name, x in tensors.items()}


def test_the_table_puts_golden_tensors_into_their_places():
    adapter = AdapterConfig(BOTH, width=4)
    encoder = dataclasses.replace(TINY, adapter=adapter, enhancer=128)
    tensors = all_tensors(encoder)
    expected = traverse_util.flatten_dict(golden.params(tensors, encoder), sep="/")
    plan = rules.Plan(None, table.rules(encoder), table.LAYOUT)
    found, _ = rules.convert(Tensors(tensors), plan, {k: x.shape for k, x in expected.items()})
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    back = {name: make() for name, _, make in rules.original(found, plan.rules)}
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], x, equal_nan=True) for name, x in tensors.items())
    assert all(back[name].shape == x.shape for name, x in tensors.items())


@pytest.mark.parametrize(
    ("encoder", "keys"),
    [
        (BEIT3_BASE, 494),
        (dataclasses.replace(BEIT3_BASE, size=384), 494),
        (BEIT3_LARGE, 974),
        (dataclasses.replace(BEIT3_BASE, adapter=AdapterConfig(BOTH), enhancer=128), 734),
    ],
    ids=["base", "base 384", "large", "base with adapters"],
)
def test_the_table_takes_every_tensor_of_the_published_models(encoder, keys):
    config = CfirConfig(encoder=encoder, inputs=Inputs(image=ImageSpec(size=encoder.size)))
    flat = traverse_util.flatten_dict(abstract_params(config)[1], sep="/")
    places = {name: x.shape for name, x in flat.items()}
    found = {n: r.source_shape(places) for r in table.rules(encoder) for n in r.names(places)}
    shapes = golden.shapes(encoder) | golden.adapter_shapes(encoder)
    shapes |= golden.enhancer_shapes(encoder) if encoder.enhancer else {}
    assert found == shapes and len(found) == keys


SMALL = dataclasses.replace(TINY, width=64, heads=1)
PLAIN = ("a cat sat on a mat", "the dog ran to the red house")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.spm"
    train_sentencepiece(PLAIN, 40, path)
    return path


def saved(folder, encoder, vocabulary, **extra):
    """(file, tensors) of a small checkpoint with what training adds."""
    from golden_convert import save

    words = tokenizer(TextSpec("sentencepiece", str(vocabulary))).size
    tensors = all_tensors(dataclasses.replace(encoder, vocabulary=words + 3))
    return save(folder / "beit3.safetensors", tensors | extra), tensors


def test_a_checkpoint_there_and_back(vocabulary, tmp_path):
    from safetensors.numpy import load_file

    encoder = dataclasses.replace(SMALL, adapter=AdapterConfig(("image",), width=4), enhancer=6)
    extra = {"mlm_head.weight": np.zeros((2, 2), np.float32), "pooler.bias": np.zeros(2, np.int64)}
    source, tensors = saved(tmp_path, encoder, vocabulary, **extra)
    options = {"tokenizer": vocabulary, "variant": "multiway-adapter"}
    done = convert(source, tmp_path / "model", "cfir", **options)
    assert done.ignored.keys() == extra.keys()
    assert "adapters of width 4 beside the image tower, with the factor 0.6" in done.notes[0]
    model = cir_jax.load(tmp_path / "model")
    adapter = AdapterConfig(("image",), width=4, scale=0.6)
    found = dataclasses.replace(
        encoder, adapter=adapter, vocabulary=model.config.encoder.vocabulary
    )
    assert model.config.encoder == found
    assert model.config.inputs.image == ImageSpec(32, "squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    expected = golden.params(tensors, found)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)
    export(tmp_path / "model", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], x) for name, x in tensors.items())


def test_learned_factors_and_norms_of_adapters(vocabulary, tmp_path):
    adapter = AdapterConfig(BOTH, width=4)
    encoder = dataclasses.replace(SMALL, adapter=adapter)
    extra = {}
    for layer in range(2):
        for name in golden.ADAPTERS.values():
            at = f"beit3.encoder.layers.{layer}.{name}"
            extra[f"{at}.scale"] = np.array([1.5], np.float32)
            for part in ("weight", "bias"):
                extra[f"{at}.adapter_layer_norm_before.{part}"] = np.ones(64, np.float32)
    source, _ = saved(tmp_path, encoder, vocabulary, **extra)
    with pytest.raises(ValueError, match=r"\+norm-in or \+norm-out"):
        convert(source, tmp_path / "model", "cfir", tokenizer=vocabulary)
    options = {"tokenizer": vocabulary, "variant": "cfir+norm-in"}
    convert(source, tmp_path / "model", "cfir", **options)
    model = cir_jax.load(tmp_path / "model")
    assert model.config.encoder.adapter == AdapterConfig(BOTH, 4, None, "in")
    for tower in BOTH:
        scale = model.params[tower]["expert"]["blocks"]["adapter"]["scale"]
        np.testing.assert_array_equal(scale, (1.5, 1.5))


HEADS = ("vision_head.weight", "language_head.weight", "logit_scale")


def keep_one_head(tensors):
    for name in HEADS[:2]:
        del tensors[name]


def test_a_pretrained_checkpoint_begins_with_new_heads(vocabulary, tmp_path):
    from golden_convert import save

    _, tensors = saved(tmp_path, SMALL, vocabulary)
    bare = {name: x for name, x in tensors.items() if name not in HEADS}
    bare["mlm_head.weight"] = np.zeros((2, 2), np.float32)
    source = save(tmp_path / "pretrained.safetensors", bare)
    done = convert(source, tmp_path / "model", "cfir", tokenizer=vocabulary)
    assert done.layout == "BEiT-3, pre-training" and done.tensors == len(tensors) - len(HEADS)
    assert all(name in done.notes[-1] for name in HEADS)
    model = cir_jax.load(tmp_path / "model")
    expected = golden.params(tensors, model.config.encoder)
    assert model.params["logit_scale"] == pytest.approx(2.659260, abs=1e-6)
    heads = [model.params[name]["kernel"] for name in ("image_project", "text_project")]
    assert all(0 < x.std() < 0.1 for x in heads) and not np.array_equal(*heads)
    for tower in ("image", "text"):
        jax.tree.map(np.testing.assert_array_equal, model.params[tower], expected[tower])
    again = convert(source, tmp_path / "again", "cfir", tokenizer=vocabulary)
    assert again.fingerprint == done.fingerprint
    assert model.encode("query", [PLAIN[0]]).shape == (1, 64)


def test_what_cfir_cannot_be_made_of(vocabulary, tmp_path):
    from golden_convert import save

    adapted = dataclasses.replace(SMALL, adapter=AdapterConfig(BOTH, width=4))
    source, _ = saved(tmp_path, adapted, vocabulary)
    with pytest.raises(ValueError, match="add --variant cfir"):
        convert(source, tmp_path / "model", "cfir", tokenizer=vocabulary)
    source, tensors = saved(tmp_path, SMALL, vocabulary)
    with pytest.raises(ValueError, match=r"give BEiT-3's beit3\.spm with --tokenizer"):
        convert(source, tmp_path / "model", "cfir")
    words = "beit3.text_embed.weight"
    table_a = "beit3.encoder.embed_positions.A.weight"
    for change, message in (
        (lambda t: t.pop("vision_head.weight"), "1 fault:\n  missing vision_head.weight"),
        (lambda t: t.pop("logit_scale"), "1 fault:\n  missing logit_scale"),
        (keep_one_head, "2 faults:\n  missing language_head.weight\n  missing vision_head.weight"),
        (lambda t: t.pop(words), "this is no BEiT-3"),
        (lambda t: t.update({words: t[words][:9]}), "9 rows, .* gives"),
        (lambda t: t.update({table_a: t[table_a][:6]}), "has 6 rows, expected 3 and a square"),
        (lambda t: t.update({"beit3.more": np.zeros(2, np.float32)}), "left over beit3.more"),
        (lambda t: t.pop("beit3.encoder.layer_norm.B.bias"), "missing beit3.encoder.layer_norm.B"),
    ):
        changed = dict(tensors)
        change(changed)
        wrong = save(tmp_path / "wrong.safetensors", changed)
        with pytest.raises(ValueError, match=message):
            convert(wrong, tmp_path / "model", "cfir", tokenizer=vocabulary)
        wrong.unlink()
    assert not (tmp_path / "model").exists()


def test_faults_are_named():
    with pytest.raises(ValueError, match=r"inputs\.image\.size is 64.*tower reads 32"):
        Cfir(CfirConfig(TINY, inputs=Inputs(image=ImageSpec(size=64))), nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"inputs\.text\.length is 77.*at most 14"):
        Cfir(CfirConfig(TINY, inputs=Inputs(image=ImageSpec(size=32))), nnx.Rngs(0))
    model = golden_cfir()
    with pytest.raises(ValueError, match=r"needs `text` or `image`; this one has \['document'\]"):
        model.query({"document": pictures()})
    with pytest.raises(ValueError, match="20 tokens do not fit 14 positions"):
        model.query({"text": np.ones((1, 20), np.int32), "text_mask": np.ones((1, 20), bool)})
    with pytest.raises(ValueError, match=r"pictures are \(16, 16, 3\)"):
        model.item({"image": np.zeros((1, 16, 16, 3), np.float32)})
    bare = ImageTower(dataclasses.replace(TINY, mask_token=False), **OPTIONS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no mask token"):
        bare.embed(pictures(), np.ones((2, 4), bool))
