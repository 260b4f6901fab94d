"""Pic2Word, SEARLE, LinCIR and MagicLens: prompts, losses against plain loops, words found by optimisation."""

import dataclasses
import functools

import golden_inversion as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from cir_jax.checkpoint import abstract_params
from cir_jax.conversion.inversion import original, phi_rules, pic2word_rules
from cir_jax.data.emoji import VOCABULARY
from cir_jax.data.images import ImageSpec, crop, prepare
from cir_jax.data.inputs import Inputs
from cir_jax.data.lincir import key_words, masked_caption
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.methods import METHODS, build
from cir_jax.methods.inversion import (
    Inversion,
    LinCirConfig,
    Pic2WordConfig,
    SearleConfig,
)
from cir_jax.methods.magiclens import Fusion, MagicLensConfig
from cir_jax.methods.oti import TEMPLATES, invert, phrases_of

INPUTS = Inputs(image=ImageSpec(size=32), text=TextSpec(vocab=str(VOCABULARY), length=16))
NAMES = ("pic2word", "searle", "lincir")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Many small programs run once each here: compiling them costs more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def shapes_of(config):
    _, tree = abstract_params(config)
    return {name: x.shape for name, x in traverse_util.flatten_dict(tree, sep="/").items()}


@functools.cache
def tiny(name):
    """(graph, parameters) of a method in its size for tests; numpy draws them."""
    config = dataclasses.replace(METHODS[name][0].tiny(INPUTS), remat=False)
    graph, tree = abstract_params(config)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.2 * draw.normal(size=x.shape)).astype(np.float32), tree)
    return graph, params


def images(rows=4):
    return np.random.default_rng(1).normal(size=(rows, 32, 32, 3)).astype(np.float32)


def ids(*texts):
    return tokenizer(INPUTS.text)(texts)[0]


def applied(name, function, *arguments):
    """A function of a tiny method and arrays, compiled; numpy arrays."""
    graph, params = tiny(name)
    call = jax.jit(lambda params, *x: function(nnx.merge(graph, params), *x))
    return jax.tree.map(np.asarray, call(params, *arguments))


def numpy_mapper(params, x, activation):
    for layer in ("up", "across"):
        x = activation(x @ params[layer]["kernel"] + params[layer]["bias"])
    return x @ params["down"]["kernel"] + params["down"]["bias"]


def numpy_unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---- sizes and names of the published files ----


@pytest.mark.parametrize("size, embed", [("L/14", 768), ("B/32", 512), ("B/16", 512)])
@pytest.mark.parametrize("config", [SearleConfig, LinCirConfig])
def test_phi_has_the_published_shapes(config, size, embed):
    shapes = shapes_of(config.paper(size))
    own = {name: shape for name, shape in shapes.items() if not name.startswith("clip/")}
    found = {rule.source: rule.source_shape(own) for rule in phi_rules()}
    assert found == golden.phi_shapes("", embed, 4 * embed, embed)
    whole, _ = original(config.paper(size))
    assert sorted(target for rule in whole for target in rule.targets) == sorted(shapes)


def test_im2text_has_the_published_shapes():
    shapes = shapes_of(Pic2WordConfig.paper())
    own = {name: shape for name, shape in shapes.items() if not name.startswith("clip/")}
    found = {rule.source: rule.source_shape(own) for rule in pic2word_rules()}
    assert found["layers.0.0.weight"] == (512, 768)
    assert found["layers.1.0.weight"] == (512, 512)
    assert found["fc_out.weight"] == (768, 512)
    assert sum(map(np.prod, found.values())) == 1_050_368
    assert sorted(t for rule in pic2word_rules() for t in rule.targets) == sorted(own)


@pytest.mark.parametrize(
    "size, whole, head", [("large", 465_417_665, 37_801_152), ("base", 166_433_025, 16_812_288)]
)
def test_magiclens_has_the_published_number_of_parameters(size, whole, head):
    shapes = shapes_of(MagicLensConfig.paper(size))
    count = lambda prefix: sum(np.prod(x) for name, x in shapes.items() if name.startswith(prefix))
    assert (count(""), count("fusion/")) == (whole, head)


# ---- prompts ----


def full(config):
    """A method with CLIP's vocabulary and no numbers."""
    return nnx.eval_shape(lambda: Inversion(config, nnx.Rngs(0)))


PROMPTS = [
    (Pic2WordConfig(), "a photo of *", "a photo of * , is red $ and is blue", [4]),
    (SearleConfig(), "a photo of $", "a photo of $ that is red $ and is blue", [4]),
    (LinCirConfig(), "a photo of $", "a photo of $ that is red $ and is blue", [4]),
    (LinCirConfig.paper(), "a photo of $", "a photo of $ that is red $ and is blue", [4, 8]),
]


@pytest.mark.parametrize("config, short, long, places", PROMPTS)
def test_prompts(config, short, long, places):
    method, tokenize = full(config), tokenizer(TextSpec())
    text = tokenize(["is red $ and is blue"])[0]
    for prompt, expected in ((method.prompt(), short), (method.prompt(text), long)):
        length = prompt.ids.shape[1]
        np.testing.assert_array_equal(prompt.ids, tokenize([expected])[0][:, :length])
    assert np.flatnonzero(np.asarray(prompt.slots[0]) >= 0).tolist() == places


def test_golden_prompt_of_pic2word():
    prompt = full(Pic2WordConfig()).prompt(tokenizer(TextSpec())(["is red and is blue"])[0])
    expected = [49406, 320, 1125, 539, 265, 267, 533, 736, 537, 533, 1746, 49407]
    assert prompt.ids[0, :12].tolist() == expected


def test_stars_of_training_phrases():
    text = tokenizer(TextSpec())(["$ and a big $", "no star"])[0]
    every = full(SearleConfig()).phrase(text).slots
    first = full(SearleConfig(first_star_only=True)).phrase(text).slots
    assert [np.flatnonzero(row == 0).tolist() for row in every] == [[1, 5], []]
    assert [np.flatnonzero(row == 0).tolist() for row in first] == [[1], []]


@pytest.mark.parametrize("name", NAMES)
def test_the_word_of_the_network_stands_in_the_prompt(name):
    def compute(method, images, text):
        features = method.clip.image(images)
        prompt = method.prompt(text)
        table = method.clip.text.embedding[...]
        words = table[prompt.ids]
        place = int(np.flatnonzero(prompt_ids == star)[0])
        words = words.at[:, place].set(method.tokens(features)[:, 0])
        expected = method.clip.text(prompt.ids, words)
        return (
            features,
            method.tokens(features)[:, 0],
            expected,
            method.query({"image": images, "text": text}),
        )

    text = ids(*["turn it red"] * 4)
    star = tokenizer(INPUTS.text).content([METHODS[name][0].star])[0][0]
    prompt_ids = ids(f"a photo of {METHODS[name][0].star}")[0]
    features, tokens, expected, queries = applied(name, compute, images(), text)
    relu = lambda x: np.maximum(x, 0)
    gelu = lambda x: np.asarray(jax.nn.gelu(x, approximate=False))
    mapper = numpy_mapper(tiny(name)[1]["mapper"], features, relu if name == "pic2word" else gelu)
    np.testing.assert_allclose(tokens, mapper, atol=1e-5)
    np.testing.assert_allclose(queries, numpy_unit(expected), atol=1e-5)


# ---- losses ----


def test_pic2word_loss_against_plain_loops():
    def compute(method, images):
        features = method.clip.image(images)
        prompts = method.read(method.prompt(), method.tokens(features))
        loss, _ = method.loss({"query": {"text": 0}, "item": {"image": images}}, None)
        return features, prompts, method.clip.scale(), loss

    features, prompts, scale, loss = applied("pic2word", compute, images())
    logits = scale * numpy_unit(prompts) @ numpy_unit(features).T
    rows = [np.log(np.exp(x - x.max()).sum()) + x.max() for x in (*logits, *logits.T)]
    np.testing.assert_allclose(loss, np.mean(rows) - np.diag(logits).mean(), rtol=1e-5)


def cosine_distance(x, y):
    return 1 - (numpy_unit(x) * numpy_unit(y)).sum(axis=1).mean()


def test_searle_loss_against_plain_loops():
    starry, plain = ids(*["the $ in a tree"] * 4), ids(*["the owl in a tree"] * 4)
    found = np.random.default_rng(2).normal(size=(4, 32)).astype(np.float32)
    batch = {
        "query": {"text": starry},
        "item": {"image": images(), "text": plain, "token": found},
    }

    def compute(method, batch):
        tokens = method.tokens(method.clip.image(batch["item"]["image"]))
        phrases = method.read(method.phrase(batch["query"]["text"]), tokens)
        return (
            tokens[:, 0],
            phrases,
            method.clip.text(batch["item"]["text"]),
            method.loss(batch, None),
        )

    tokens, phrases, texts, (loss, parts) = applied("searle", compute, batch)
    rows = numpy_unit(np.concatenate([found, tokens]))
    terms = []
    for i in range(8):
        scores = rows[i] @ rows.T / 0.25
        others = [scores[j] for j in range(8) if j != i]
        terms.append(np.log(np.exp(others).sum()) - scores[(i + 4) % 8])
    expected = np.mean(terms) + 0.75 * cosine_distance(phrases, texts)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert parts.keys() == {"distillation", "phrases"}


def test_lincir_loss_against_plain_loops():
    masked, plain = (
        ids("a $ on $", "two $", "$ $", "the $"),
        ids("a cat on ice", "two men", "ab c", "the x"),
    )
    batch = {"query": {"text": masked}, "item": {"text": plain}}

    def compute(method, batch, key):
        features = method.clip.text(batch["item"]["text"])
        restored = method.read(method.phrase(batch["query"]["text"]), method.tokens(features))
        return features, restored, method.loss(batch, None)[0], method.loss(batch, key)[0]

    features, restored, loss, noisy = applied("lincir", compute, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, np.mean((features - restored) ** 2), rtol=1e-5)
    assert abs(noisy - loss) > 1e-6


@pytest.mark.parametrize(
    "name, batch, message",
    [
        ("pic2word", {"query": {}, "item": {"text": 0}}, "reads `image` of each item.* has text"),
        ("searle", {"query": {}, "item": {"image": images()}}, "reads `token` of each item"),
        ("lincir", {"query": {}, "item": {"image": 0}}, "reads `text` of each item"),
    ],
)
def test_a_loss_names_what_it_misses(name, batch, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: nnx.merge(*tiny(name)).loss(batch, None))


@pytest.mark.parametrize("name", [*NAMES, "magiclens"])
def test_parts_of_pictures_are_not_read(name):
    config = dataclasses.replace(METHODS[name][0].tiny(INPUTS), patches_kept=0.5)
    with pytest.raises(ValueError, match=r"patches_kept is 0\.5"):
        nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))


# ---- LinCIR's training texts ----


def test_key_words_are_the_longest_runs():
    words, tags = (
        ["a", "big", "dog", "runs", "to", "the", "Park"],
        ["DET", "ADJ", "NOUN", "VERB", "ADP", "DET", "PROPN"],
    )
    assert key_words(words, tags) == ["a big dog", "the Park"]
    assert key_words([], []) == []


@pytest.mark.parametrize(
    "caption, keys, plain, masked",
    [
        ("A big dog", ["a big dog"], "a big dog", "$"),
        ("dogs chase a dog", ["dog"], "dogs chase a dog", "$ s chase a $"),
        ("<PERSON> at $ home", ["person", "home"], "person at home", "$ at $"),
        ("word", ["missing"], "word", "$"),
        ("", [], "", "a photo of $"),
    ],
)
def test_masked_captions(caption, keys, plain, masked):
    assert masked_caption(caption, keys, np.random.default_rng(0)) == (plain, masked)


def test_a_random_word_is_masked_where_no_key_word_is_found():
    rng = np.random.default_rng(0)
    found = {masked_caption("one two three", [], rng)[1] for _ in range(50)}
    assert found == {"$ two three", "one $ three", "one two $"}


# ---- words found by optimisation ----


def test_templates_are_those_of_the_original():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 24
    assert TEMPLATES[0] == "This is a photo of a {}"
    assert TEMPLATES[3:6] == (
        "This is an illustration of a {}",
        "This illustration contains a {}",
        "An illustrations of a {}",
    )
    assert TEMPLATES[12:15] == ("A {}", "We see a {}", "{}")
    assert TEMPLATES[15:17] == ("We see a {} in this photo", "We see a {} in this image")
    assert TEMPLATES[20:22] == ("We see a {} illustration", "{} photo")


@pytest.mark.slow
def test_found_words_resemble_their_pictures():
    graph, params = tiny("searle")
    method = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    features = jnp.asarray(np.random.default_rng(3).normal(size=(2, 16)), jnp.float32)
    phrases = [[("an owl sits", "owl"), ("the owl of owls", "owl")], [("a red hat", "hat")]]
    find = lambda **options: invert(
        method, features, jax.random.key(0), phrases, decay=0.5, lr=0.05, **options
    )
    score = jax.jit(lambda x: method.read(method.prompt(), x[:, None]))
    close = lambda tokens: 1 - cosine_distance(np.asarray(score(tokens)), np.asarray(features))
    before, after = find(steps=0), find(steps=60)
    assert before.shape == (2, 32) and 0.01 < before.std() < 0.03
    assert close(after) > close(before) + 0.05


def test_phrases_get_a_star_at_the_first_place_of_the_concept():
    method = nnx.merge(*tiny("searle"))
    made = phrases_of(method, [[("the owl of owls", "owl")], [("a hat", "hat"), ("hats", "hat")]])
    assert made.counts.tolist() == [1, 2]
    np.testing.assert_array_equal(made.starry[0, 0], ids("the $ of owls")[0])
    np.testing.assert_array_equal(made.plain[1], ids("a hat", "hats"))
    with pytest.raises(ValueError, match="'cat' is not in the phrase 'a dog' of picture 1"):
        phrases_of(method, [[("a cat", "cat")], [("a dog", "cat")]])
    with pytest.raises(ValueError, match="picture 0 has no phrases"):
        phrases_of(method, [[]])


# ---- MagicLens ----


def numpy_norm(p, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * (1 + p["scale"])
        + p["bias"]
    )


def numpy_linear(p, x):
    return x @ p["kernel"] + p["bias"]


def numpy_attention(p, x, kv, heads):
    """One query, key, head at a time."""
    q, k, v = (numpy_linear(p[n], y) for n, y in (("query", x), ("key", kv), ("value", kv)))
    width = q.shape[-1] // heads
    mixed = np.zeros((len(x), heads * width))
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scale = width**-0.5
        if "scale" in p:
            scale = scale * 1.442695041 * np.log(1 + np.exp(p["scale"]))
        for row in range(len(x)):
            logits = 50 * np.tanh((q[row, part] * scale) @ k[:, part].T / 50)
            weights = np.exp(logits) / np.exp(logits).sum()
            mixed[row, part] = weights @ v[:, part]
    return numpy_linear(p["out"], mixed)


def test_fusion_against_plain_loops():
    graph, state = nnx.split(nnx.eval_shape(lambda: Fusion(8, 2, 2, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    with jax.enable_x64(True):
        shapes = nnx.to_pure_dict(state)
        # Large numbers, so that the cap of the logits is felt.
        params = jax.tree.map(lambda x: 1.5 * draw.normal(size=x.shape), shapes)
        x = 3 * draw.normal(size=(3, 2, 8))
        found = jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, x)
    for row in range(3):
        tokens = x[row]
        for layer in range(2):
            p = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # noqa: B023
            normed = numpy_norm(p["ln1"], tokens)
            tokens = tokens + numpy_attention(p["attention"], normed, normed, 2)
            hidden = np.maximum(numpy_linear(p["mlp"]["up"], numpy_norm(p["ln2"], tokens)), 0)
            tokens = tokens + numpy_linear(p["mlp"]["down"], hidden)
        pooled = numpy_attention(params["pool"], params["pool_query"], tokens, 2)
        expected = numpy_unit(numpy_norm(params["ln_pool"], pooled)[0])
        np.testing.assert_allclose(found[row], expected, atol=1e-9)


def test_an_item_has_an_empty_text():
    def compute(method, images, text):
        query = method.query({"image": images, "text": text})
        return query, method.query({"image": images}), method.item({"image": images})

    empty, alone, item = applied("magiclens", compute, images(), ids(*[""] * 4))
    np.testing.assert_allclose(empty, item, atol=1e-6)
    np.testing.assert_array_equal(alone, item)
    other, *_ = applied("magiclens", compute, images(), ids(*["red"] * 4))
    assert np.abs(other - item).max() > 1e-3


def test_an_id_of_zero_may_be_hidden():
    """Within a text, too: what its word is then does not matter."""
    shown = np.insert(ids("red"), 2, 0, axis=1)[:, :16]
    assert 0 in shown[0, : shown[0].argmax()]

    def compute(method, shown):
        table = method.clip.text.embedding[...]
        words = table[shown], table.at[0].set(1.0)[shown]
        return [[method.clip.text(shown, x, hidden=n) for x in words] for n in (0, 1)]

    hidden, visible = applied("magiclens", compute, shown)
    np.testing.assert_array_equal(*hidden)
    assert np.abs(visible[0] - visible[1]).max() > 1e-3
    found = []
    for hide in (True, False):
        config = dataclasses.replace(MagicLensConfig.tiny(INPUTS), remat=False, hide_id_zero=hide)
        graph, _ = abstract_params(config)
        query = jax.jit(lambda params, x, graph=graph: nnx.merge(graph, params).query(x))
        found.append(query(tiny("magiclens")[1], {"image": images(1), "text": shown}))
    assert np.abs(found[0] - found[1]).max() > 1e-5


def test_pictures_scaled_by_their_brightest_value():
    dark = np.random.default_rng(0).integers(0, 100, (32, 32, 3), np.uint8)
    dark[0, 0] = 120
    spec = ImageSpec(size=32, scale_by_brightest=True, mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_allclose(prepare(dark, spec), dark / np.float32(120), rtol=1e-6)
    np.testing.assert_array_equal(crop(dark, spec), dark)
    assert not prepare(np.zeros_like(dark), spec).any()
    plain = dataclasses.replace(spec, scale_by_brightest=False)
    np.testing.assert_allclose(prepare(dark, plain), dark / np.float32(255), rtol=1e-6)
