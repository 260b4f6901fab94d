"""FTI4CIR against numbers of the released modules (weights by formula), and its prompts, selection and losses."""

import dataclasses
import functools

import golden_inversion as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from PIL import Image

from cir_jax import losses, sharding
from cir_jax.checkpoint import abstract_params
from cir_jax.conversion import inversion
from cir_jax.conversion.inversion import fti4cir_rules
from cir_jax.conversion.rules import Plan, convert, original
from cir_jax.data.emoji import VOCABULARY
from cir_jax.data.images import ImageSpec, crop
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec, tokenizer
from cir_jax.encoders.layers import unit
from cir_jax.encoders.pseudo_words import Mapper, read, vocabulary
from cir_jax.methods import fti4cir
from cir_jax.methods.fti4cir import Fti4cir, Fti4cirConfig, LocalAttributes, orthogonality
from cir_jax.methods.inversion import FROZEN
from cir_jax.training import optim

# Sum of the candidates of both pictures, and the first four numbers of the first, by the number of heads.
CANDIDATES = {
    1: (46.014970389, (0.465234437, 0.467606274, 0.530617427, 0.458764743)),
    2: (46.014702774, (0.465184996, 0.467613407, 0.530659963, 0.458716284)),
}
SHARES = (
    (0.170704983, 0.168157611, 0.161135761, 0.170513479, 0.168401730, 0.161086437),
    (0.166817945, 0.164535155, 0.168650896, 0.166897958, 0.164495578, 0.168602468),
)
INPUTS = Inputs(image=ImageSpec(size=32), text=TextSpec(vocab=str(VOCABULARY), length=16))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Many small programs run once each here: compiling them costs more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Parts(nnx.Module):
    """What FTI4CIR has besides CLIP, in the size of the golden values."""

    def __init__(self, heads, rngs):
        mapper = {"activation": "gelu", "dropout": 0.5, "rngs": rngs}
        self.attributes = LocalAttributes(6, 16, 8, 2, heads, rngs=rngs)
        self.subject_mapper = Mapper(8, 32, 8, **mapper)
        self.attribute_mapper = Mapper(8, 32, 8, **mapper)


def parts(dtype, heads=1):
    graph, state = nnx.split(nnx.eval_shape(lambda: Parts(heads, nnx.Rngs(0))))
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(state), sep="/")
    shapes = {name: x.shape for name, x in flat.items()}
    tensors = golden.filled(golden.fti4cir_shapes(16, 8, 6, 2, 32))
    assert len(tensors) == 39
    made, _ = convert(tensors, Plan(None, fti4cir_rules(), "golden"), shapes, dtype.__name__)
    made = {name: jnp.asarray(x) for name, x in made.items()}
    assert {x.dtype for x in made.values()} == {np.dtype(dtype)}
    return nnx.merge(graph, traverse_util.unflatten_dict(made, sep="/"))


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    """(type, tolerance): 1e-6 of the printed digits in x64 mode, the design's 1e-5 in float32."""
    with jax.enable_x64(request.param == "float64"):
        yield (np.float64, 1e-6) if request.param == "float64" else (np.float32, 1e-5)


def close(value, expected, tolerance):
    atol = tolerance * max(1, np.abs(expected).max())
    np.testing.assert_allclose(value, expected, rtol=0, atol=atol)


def golden_inputs(dtype):
    """(tokens [2, 5, 16], features [2, 8])"""
    return golden.sine((2, 5, 16), 0.37, 0.2).astype(dtype), 3 * golden.sine(
        (2, 8), 1.3, 0.5
    ).astype(dtype)


@functools.cache
def golden_outputs(dtype, heads):
    """The golden module, its candidates of the golden tokens, and the golden features."""
    (tokens, features), model = golden_inputs(dtype), parts(dtype, heads)
    return model, jax.jit(lambda model, x: model.attributes(x))(model, tokens), features


choose = functools.partial(jax.jit, static_argnums=(2, 3))(fti4cir.choose)
shares = jax.jit(fti4cir.attention_shares)


# ---- golden values ----


@pytest.mark.parametrize("heads", CANDIDATES)
def test_candidates(precision, heads):
    dtype, tolerance = precision
    _, candidates, features = golden_outputs(dtype, heads)
    total, first = CANDIDATES[heads]
    assert candidates.dtype == dtype
    close(np.asarray(candidates, np.float64).sum(), total, tolerance)
    close(candidates[0, 0, :4], first, tolerance)
    if heads == 1:
        close(shares(candidates, features), SHARES, tolerance)


def test_all_attributes_above_a_low_threshold(precision):
    dtype, tolerance = precision
    model, candidates, features = golden_outputs(dtype, 1)
    chosen = choose(candidates, features, 4, 0.15)
    assert chosen.counts.tolist() == [4, 4]
    assert chosen.rows.tolist() == [[0, 1, 3, 4], [0, 2, 3, 5]]
    close(np.asarray(chosen.features, np.float64).sum(), 22.598720130946, tolerance)
    close(chosen.features[0, 0, :3], (0.344505686, 0.346262029, 0.392921732), tolerance)
    subject, attributes, apart = jax.jit(
        lambda model, g, chosen: (
            model.subject_mapper(g),
            model.attribute_mapper(chosen),
            orthogonality(chosen),
        )
    )(model, features, chosen.features)
    close(apart, 0.748608109, tolerance)
    close(subject.sum(), -1.431494224, tolerance)
    close(subject[0, :3], (-0.041420316, -0.085813663, -0.149877376), tolerance)
    close(np.asarray(attributes, np.float64).sum(), 3.903996650, tolerance)


def test_some_attributes_above_a_high_threshold(precision):
    dtype, tolerance = precision
    _, candidates, features = golden_outputs(dtype, 1)
    chosen = choose(candidates, features, 4, 0.16862)
    assert chosen.counts.tolist() == [2, 1]
    assert chosen.rows.tolist() == [[0, 3, 4, 1], [2, 5, 3, 0]]
    close(chosen.features[0, 1, :3], (0.344693852, 0.346609258, 0.392224909), tolerance)
    close(chosen.features[1, 0, :3], (0.362400171, 0.356130695, 0.353651296), tolerance)
    weighted = np.asarray(chosen.features, np.float64) * np.arange(1, 5)[:, None]
    close(weighted.sum(), 56.490723209, tolerance)


def test_losses(precision):
    dtype, tolerance = precision
    sine = lambda *arguments: golden.sine(*arguments).astype(dtype)
    first, second = unit(sine((4, 8), 0.1, 0.3)), unit(sine((4, 8), 0.2, 1.0))
    value = jax.jit(losses.nt_xent)(first, second, 0.2)
    close(value, 6.006351092646, tolerance)
    value = jax.jit(losses.cosine)(sine((3, 5), 0.4, 0.1), sine((3, 5), 0.9, 0.2))
    close(value, 0.944838827375, tolerance)


# ---- names and sizes of the published file ----


@functools.cache
def paper_shapes():
    _, tree = abstract_params(Fti4cirConfig.paper())
    return {name: x.shape for name, x in traverse_util.flatten_dict(tree, sep="/").items()}


def test_the_table_holds_the_51_tensors_of_the_published_module():
    own = {name: shape for name, shape in paper_shapes().items() if not name.startswith("clip/")}
    expected = golden.fti4cir_shapes(1024, 768, 24, 3, 3072)
    found = {name: rule.source_shape(own) for rule in fti4cir_rules() for name in rule.names(own)}
    assert len(found) == 51
    assert found == expected
    assert sum(map(np.prod, found.values())) == 54_327_552
    targets = [name for rule in fti4cir_rules() for name in rule.targets]
    assert sorted(targets) == sorted(own)
    whole, _ = inversion.original(Fti4cirConfig.paper())
    assert sorted(name for rule in whole for name in rule.targets) == sorted(paper_shapes())


def test_a_state_dict_comes_back_as_it_was():
    tensors = golden.filled(golden.fti4cir_shapes(16, 8, 6, 2, 32))
    with jax.enable_x64(True):
        flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(parts(np.float64))), sep="/")
    back = {name: make() for name, _, make in original(flat, fti4cir_rules())}
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)


@pytest.mark.parametrize(
    "size, embed, width", [("L/14", 768, 1024), ("B/32", 512, 768), ("B/16", 512, 768)]
)
def test_presets_are_the_published_sizes(size, embed, width):
    config = Fti4cirConfig.paper(size)
    assert (config.embed, config.vision.width, config.vision.patch) == (embed, width, int(size[2:]))
    assert (config.attributes, config.kept, config.threshold) == (24, 12, 0.05)
    assert (config.temperature, config.regularisation, config.dropout) == (0.2, 1.4, 0.5)
    assert config.inputs.image.resize == "targetpad" and not config.inputs.image.convert_first
    assert Fti4cirConfig().inputs.image.convert_first


# ---- the choice of attributes ----


def plain_choice(candidates, feature, kept, threshold):
    """The rule in words, for one picture: (rows, count)."""
    scores = candidates @ feature
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    order = sorted(range(len(shares)), key=lambda k: (-shares[k], k))[:kept]
    count = min(max(sum(share > threshold for share in shares), 1), kept)
    return sorted(order[:count]) + order[count:], count


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.1, 1.0])
def test_choice_against_plain_loops(threshold):
    draw = np.random.default_rng(3)
    candidates = draw.uniform(size=(8, 24, 6)).astype(np.float32)
    candidates[0, 5] = candidates[0, 3]  # equal shares go by their number
    features = draw.normal(size=(8, 6)).astype(np.float32)
    chosen = choose(candidates, features, 12, threshold)
    for row in range(8):
        rows, count = plain_choice(candidates[row], features[row], 12, threshold)
        assert chosen.rows[row].tolist() == rows
        assert chosen.counts[row] == count
        unit = candidates[row, rows] / np.linalg.norm(candidates[row, rows], axis=1, keepdims=True)
        np.testing.assert_allclose(chosen.features[row], unit, atol=1e-6)


# ---- prompts ----


def abstract(config):
    """A method without numbers, whose prompts can be made."""
    return nnx.eval_shape(lambda: Fti4cir(config, nnx.Rngs(0)))


@functools.cache
def paper():
    return abstract(Fti4cirConfig.paper())


# The method is part of these functions: it has no numbers that a prompt would need.
def prompts(*arguments):
    return jax.jit(paper().prompt)(*arguments)


def ids_of(*texts):
    return tokenizer(TextSpec())(texts)[0]


def same_ids(prompt, *texts):
    """Prompts are what the tokenizer makes of the whole text."""
    length = prompt.ids.shape[1]
    expected = ids_of(*texts)
    np.testing.assert_array_equal(prompt.ids, expected[:, :length])
    assert not expected[:, length:].any()


def slots(prompt, row):
    """{position: pseudo-word} of a row."""
    return {int(i): int(prompt.slots[row, i]) for i in np.flatnonzero(prompt.slots[row] >= 0)}


def test_golden_prompts():
    made = prompts(np.array([3]), ids_of("is shiny and silver"))
    expected = [49406, 320, 1125, 539, 265, 593, 265, 265, 265, 767, 533, 12190, 537, 3467, 49407]
    assert made.ids[0, :15].tolist() == expected and not made.ids[0, 15:].any()
    assert slots(made, 0) == {4: 0, 6: 1, 7: 2, 8: 3}
    made = prompts(np.array([2]))
    assert made.ids[0, :9].tolist() == [49406, 320, 1125, 539, 265, 593, 265, 265, 49407]
    assert not made.ids[0, 9:].any()


def test_prompts_of_rows_with_different_counts():
    counts = np.arange(1, 13)
    texts = [f"is {'very ' * n}shiny, and has a * on it" for n in counts]
    whole = lambda r: f"a photo of * with {'* ' * r}"
    same_ids(prompts(counts), *map(whole, counts))
    made = prompts(counts, ids_of(*texts))
    same_ids(made, *(f"{whole(r)}but {text}" for r, text in zip(counts, texts)))
    for row, r in enumerate(counts):  # a star in the text of a person is a star
        assert slots(made, row) == {4: 0} | {6 + n: n + 1 for n in range(r)}


def test_a_long_text_is_cut_like_any():
    text = "red " * 90
    made = prompts(np.array([12]), ids_of(text))
    same_ids(made, f"a photo of * with {'* ' * 12}but {text}")
    assert made.ids.shape == (1, 77) and made.ids[0, -1] == 49407


def test_prompts_of_captions():
    captions = [("a brown dog", "laying on the grass"), ("two people", ""), ("the * dog", "by *")]
    rows = ids_of("a brown dog | laying on the grass", "two people", "the * dog | by *")
    counts = np.array([2, 1, 3])
    made = jax.jit(paper().caption_prompts)(counts, rows)
    stars = ["* " * r for r in counts]
    same_ids(made["subject"], *(f"a photo of * with {a}" for _, a in captions))
    same_ids(made["words"], *(f"a photo of {s} with {a}" for s, a in captions))
    same_ids(
        made["attributes"], *(f"a photo of {s} with {r}" for (s, _), r in zip(captions, stars))
    )
    assert [slots(made["subject"], row) for row in range(3)] == [{4: 0}] * 3
    assert not (made["words"].slots >= 0).any()
    assert slots(made["attributes"], 0) == {8: 1, 9: 2}
    assert slots(made["attributes"], 2) == {8: 1, 9: 2, 10: 3}


def test_no_star_no_prompt():
    with pytest.raises(ValueError, match="makes 2 ids of '\\* \\*'"):
        vocabulary(tokenizer(TextSpec()), "* *", ())


# ---- the whole method, tiny ----


@functools.cache
def tiny():
    config = dataclasses.replace(Fti4cirConfig.tiny(INPUTS), remat=False)
    graph, _ = abstract_params(config)
    state = jax.jit(lambda key: nnx.state(Fti4cir(config, nnx.Rngs(key))))(jax.random.key(1))
    params = nnx.to_pure_dict(state)
    # Larger words than CLIP begins with: else a prompt hardly depends on them.
    params["clip"]["text"]["embedding"] *= 20
    return config, graph, params


def batch():
    texts = ["a fox | on snow", "two red apples | in a bowl", "the sun", "a house | by a river"]
    ids, mask = tokenizer(INPUTS.text)(texts)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    return {"query": {"text": ids, "text_mask": mask}, "item": {"image": images}}


@functools.cache
def outputs():
    """What the tiny method makes of the batch."""
    _, graph, params = tiny()

    @jax.jit
    def compute(params, batch, change):
        method = nnx.merge(graph, params)
        images = batch["item"]["image"]
        made, dropped = method.invert(images), method.invert(images, jax.random.key(0))
        prompt, short = method.prompt(made.chosen.counts, change), method.prompt(made.chosen.counts)
        tower, table = method.clip.text, method.clip.text.embedding[...]
        beyond = jnp.arange(4) > made.chosen.counts[:, None]
        return {
            "made": made,
            "dropped": dropped.tokens,
            "feature": method.clip.image(images),
            "texts": method.caption_features(made, batch["query"]["text"]),
            "prompt": prompt,
            "changed": read(tower, prompt, made.tokens),
            "replaced": tower(prompt.ids, replaced(table, prompt, made)),
            "short": read(tower, short, made.tokens),
            "other": read(tower, short, jnp.where(beyond[..., None], 7.0, made.tokens)),
        }

    ids, _ = tokenizer(INPUTS.text)(["turn it red"] * 4)
    return jax.tree.map(np.asarray, compute(params, batch(), ids))


def replaced(table, prompt, made):
    """Embeddings of a prompt in which the places that the paper names are overwritten, row by row."""
    words = table[prompt.ids]
    (star,) = tokenizer(INPUTS.text).content(["*"])[0]
    for row in range(4):
        first = jnp.argmax(prompt.ids[row] == star)
        words = words.at[row, first].set(made.tokens[row, 0])
        for n in range(3):
            place = first + 2 + jnp.where(n < made.chosen.counts[row], n, 1000)
            words = words.at[row, place].set(made.tokens[row, 1 + n], mode="drop")
    return words


@pytest.mark.slow
def test_one_pass_gives_tokens_and_feature():
    made = outputs()["made"]
    np.testing.assert_allclose(made.feature, outputs()["feature"], atol=1e-5)
    assert made.tokens.shape == (4, 4, 32)
    assert len(set(made.chosen.counts.tolist())) > 1


@pytest.mark.slow
def test_pseudo_words_replace_the_embeddings_of_stars():
    found = outputs()
    np.testing.assert_allclose(found["changed"], found["replaced"], atol=1e-5)
    assert np.abs(found["changed"] - found["short"]).max() > 1e-2


def test_words_beyond_the_count_do_not_matter():
    np.testing.assert_allclose(outputs()["short"], outputs()["other"], atol=1e-6)


def test_dropout_needs_a_key():
    assert np.abs(outputs()["dropped"] - outputs()["made"].tokens).max() > 1e-3


def numpy_loss(features, texts, chosen, config):
    """The loss with loops over rows and pairs."""
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    joint = unit(np.concatenate([features, texts["whole"]]).astype(np.float64))
    total, count = 0, len(joint)
    for i in range(count):
        scores = {j: joint[i] @ joint[j] / config.temperature for j in range(count) if j != i}
        total -= scores[(i + count // 2) % count] - np.log(sum(map(np.exp, scores.values())))
    grams = [x @ x.T - np.eye(len(x)) for x in np.asarray(chosen.features, np.float64)]
    apart = [
        1 - (unit(texts[name]) * unit(texts["words"])).sum(axis=1).mean()
        for name in ("subject", "attributes", "whole")
    ]
    return total / count + np.mean(np.square(grams)) + config.regularisation * sum(apart)


@functools.cache
def wide():
    """In x64 mode: the parameters besides CLIP's, and a function of them with value, parts and gradient of the loss."""
    _, graph, params = tiny()
    both = {"params": params, "item": batch()["item"]}
    both = jax.tree.map(lambda x: jnp.asarray(x, np.float64), both)
    own, clip = optim.split_frozen(both["params"], FROZEN)
    data = {**batch(), "item": both["item"]}
    # Without a key there is no dropout, so that the loss is that of `outputs`.
    loss = lambda own: nnx.merge(graph, optim.join(own, clip)).loss(data, None)
    return own, jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_clip_is_what_does_not_train():
    own, frozen = optim.split_frozen(tiny()[2], FROZEN)
    assert set(frozen) == {"clip"}
    assert set(own) == {"attributes", "subject_mapper", "attribute_mapper"}


@pytest.mark.slow
def test_loss_against_plain_loops():
    found = outputs()
    expected = numpy_loss(found["made"].feature, found["texts"], found["made"].chosen, tiny()[0])
    with jax.enable_x64(True):
        own, loss = wide()
        (value, parts), _ = loss(own)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert parts.keys() == {"contrastive", "orthogonality", "regularisation", "attributes"}


@pytest.mark.slow
def test_gradient_against_differences():
    with jax.enable_x64(True):
        own, loss = wide()
        grads, draw = loss(own)[1], np.random.default_rng(0)
        for part in own:
            step = jax.tree.map(lambda x: draw.normal(size=x.shape) * 1e-6, own[part])
            above, below = (
                loss({**own, part: jax.tree.map(change, own[part], step)})[0][0]
                for change in (np.add, np.subtract)
            )
            along = sum(map(np.vdot, jax.tree.leaves(grads[part]), jax.tree.leaves(step)))
            assert abs(along) > 1e-9
            np.testing.assert_allclose(along, (above - below) / 2, rtol=1e-4)


def test_training_lowers_the_loss():
    with jax.enable_x64(True):
        own, loss = wide()
        values = []
        for _ in range(12):
            (value, _), grads = loss(own)
            own = jax.tree.map(lambda x, g: x - 0.03 * np.asarray(g), own, grads)
            values.append(float(value))
    assert values[-1] < 0.95 * values[0]


@pytest.mark.slow
def test_loss_of_four_devices_equals_one():
    _, graph, params = tiny()
    loss = jax.jit(lambda params, batch: nnx.merge(graph, params).loss(batch, None)[0])
    spread = loss(params, sharding.put_batch(batch(), sharding.make_mesh()))
    with jax.enable_x64(True):
        own, one = wide()
        expected = one(own)[0][0]
    np.testing.assert_allclose(spread, expected, rtol=1e-5)


def test_the_prompt_in_words_is_a_fixed_target():
    _, graph, params = tiny()
    made, text = outputs()["made"], batch()["query"]["text"]

    def features(table, name):
        method = nnx.merge(graph, params)
        method.clip.text.embedding[...] = table
        return method.caption_features(made, text)[name].sum()

    gradients = jax.jit(lambda x: [jax.grad(features)(x, name) for name in ("words", "subject")])
    words, subject = gradients(params["clip"]["text"]["embedding"])
    assert not np.any(words) and np.any(subject)


def test_layers_begin_as_in_pytorch():
    _, _, params = tiny()
    up = params["subject_mapper"]["up"]
    for x in (up["kernel"], up["bias"]):
        assert 0.8 * 16**-0.5 < np.abs(x).max() <= 16**-0.5
    assert set(params["attributes"]["blocks"]["attention"]["query"]) == {"kernel"}
    assert 0.7 < params["attributes"]["queries"].std() < 1.3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kept": 7}, "kept is 7 of 6 attributes"),
        ({"kept": 0}, "kept is 0"),
        ({"patches_kept": 0.5}, "patches_kept is 0.5"),
        ({"attribute_heads": 3}, "does not divide into 3 heads"),
    ],
)
def test_a_config_whose_parts_do_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        abstract(dataclasses.replace(Fti4cirConfig.tiny(INPUTS), **change))


def test_a_resnet_has_no_tokens_to_read():
    from cir_jax.encoders.resnet import ResnetConfig

    with pytest.raises(ValueError, match="vision transformer"):
        abstract(Fti4cirConfig(vision=ResnetConfig()))


# ---- targetpad ----

PADDED = {
    (1000, 400): (1000, 800),
    (300, 400): (320, 400),
    (640, 480): (640, 512),
    (500, 375): (500, 399),
    (480, 600): (480, 600),
    (500, 333): (500, 399),
    (427, 640): (511, 640),
}


def picture(size, mode="RGB"):
    pixels = np.random.default_rng(0).integers(1, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", PADDED)
@pytest.mark.parametrize("first", [True, False])
def test_targetpad_against_pillow(size, first):
    source, spec = picture(size), ImageSpec(resize="targetpad", convert_first=first)
    canvas = Image.new("RGB", PADDED[size])
    canvas.paste(source, [(wide - side) // 2 for wide, side in zip(canvas.size, size)])
    short = min(canvas.size)
    scaled = tuple(224 if side == short else int(224 * side / short) for side in canvas.size)
    if max(PADDED[size]) * 4 == min(PADDED[size]) * 5:
        assert sorted(scaled) == [224, 280]
    left, top = [round((side - 224) / 2) for side in scaled]
    expected = canvas.resize(scaled, Image.Resampling.BICUBIC)
    expected = expected.crop((left, top, left + 224, top + 224))
    found = crop(source, spec)
    np.testing.assert_array_equal(found, np.asarray(expected))
    np.testing.assert_array_equal(crop(found, spec), found)


def test_bars_of_other_modes_and_ratios():
    source = picture((40, 10), "P")
    spec = ImageSpec(size=8, resize="targetpad", target_ratio=1.0)
    later = dataclasses.replace(spec, convert_first=False)
    assert not crop(source, spec)[:2].any()
    # Under a palette the bars are its first colour, whatever that is.
    assert (crop(source, later)[0] == source.getpalette()[:3]).all()
    assert not crop(picture((40, 10), "L"), later)[:2].any()
    wide = dataclasses.replace(spec, target_ratio=4.5)
    short = ImageSpec(size=8)
    np.testing.assert_array_equal(crop(source, wide), crop(source, short))


def test_impossible_bars_are_refused():
    with pytest.raises(ValueError, match="target_ratio 0"):
        ImageSpec(target_ratio=0.5)
    long = np.zeros((1, 40_000, 3), np.uint8)
    with pytest.raises(ValueError, match="with bars of 40000 x 3"):
        crop(long, ImageSpec(resize="targetpad"))
