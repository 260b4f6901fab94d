"""Maria and Vokenization: losses against golden numbers and numpy, towers, heads, tokens that ask, conversion."""

import dataclasses
import json

import golden_maria as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from PIL import Image
from test_methods import INPUTS, drawn, raw_items, raw_queries, training_batch

import cir_jax
from cir_jax import losses
from cir_jax.checkpoint import abstract_params
from cir_jax.conversion import maria as table
from cir_jax.conversion import rules
from cir_jax.conversion.rules import Options
from cir_jax.convert import convert, export
from cir_jax.data.benchmark import Benchmark
from cir_jax.data.images import ImageSpec, crop, prepare
from cir_jax.encoders.bert import Bert, BertConfig
from cir_jax.encoders.resnext import RESNET_101, RESNEXT_50, RESNEXT_101, Resnext, ResnextConfig
from cir_jax.evaluation import metrics
from cir_jax.index import ExactIndex
from cir_jax.methods.maria import (
    FROZEN,
    FROZEN_IN_TUNING,
    Head,
    Maria,
    MariaConfig,
    legacy_batch_recall,
    maria,
    vokenization,
    words_of,
)
from cir_jax.retrieval import retrieve, score_by_vectors, score_candidates
from cir_jax.training import optim
from cir_jax.typed import from_json, to_json

DIAGONAL = (0.402768, 0.455924, 0.170044, 0.495673, 0.230536, 0.453009, 0.472253, 0.234649)
RANKS = (2, 3, 5, 3, 4, 3, 4, 5)
LOSSES = {0.5: 4.250786852676394, 0.2: 3.0507868526763944, 1.0: 6.669023807429367}
GRADIENTS = (2.003635396616807, 2.8284271247461903)  # norms, by text and by picture
LEGACY = {1: 0.125, 2: 0.5, 3: 0.75, 5: 1.0}
TRUE = {1: 0.0, 2: 0.125, 3: 0.5, 5: 1.0}
TOKEN_LOSS = 0.3712394080964038
TOKEN_LEGACY = {1: 0.5384616, 2: 0.7307692, 5: 1.0}
TOKEN_ACCURACY = 0.1923077
TINY_BERT = BertConfig(30, 16, width=16, layers=3, heads=2, hidden=32, dropout=0.0)
TINY_RESNEXT = ResnextConfig((1, 2, 3, 1), width=4, groups=4, group_width=2)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Many small programs run once each here: compiling them costs more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def built(make, seed=0):
    """A module that numpy fills, so that nothing is compiled."""
    draw, (graph, state) = np.random.default_rng(seed), nnx.split(nnx.eval_shape(make))
    fill = lambda x: (0.2 * draw.standard_normal(x.shape)).astype(np.float32)
    return nnx.merge(graph, jax.tree.map(fill, nnx.to_pure_dict(state)))


def unit_rows(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def formula(phase):
    i, j = np.meshgrid(np.arange(8.0), np.arange(6.0), indexing="ij")
    return unit_rows(np.sin(1.3 * i + 0.7 * j + phase) + 0.25 * np.cos(0.5 * i * j + phase))


def sentences():
    """(texts [8, 1, 6], pictures [8, 6], mask [8, 1]) of the golden numbers."""
    return formula(0.0)[:, None], formula(1.2), np.ones((8, 1), bool)


def tokens():
    """The same with texts `[8, 4, 6]` of several tokens."""
    i, k, j = np.meshgrid(np.arange(8.0), np.arange(4.0), np.arange(6.0), indexing="ij")
    texts = np.sin(1.3 * i + 0.7 * j + 0.9 * k) + 0.25 * np.cos(0.5 * i * j + 0.3 * k)
    lengths = np.array([4, 3, 4, 2, 4, 4, 3, 2])
    return unit_rows(texts), formula(1.2), np.arange(4) < lengths[:, None]


def check(found, expected, tolerance):
    scale = max(1, np.abs(expected).max()) if tolerance == 1e-5 else 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def cast(parts, dtype):
    texts, pictures, mask = parts
    return jnp.asarray(texts, dtype), jnp.asarray(pictures, dtype), jnp.asarray(mask)


# ---- golden numbers ----


@pytest.mark.parametrize("margin", LOSSES)
def test_loss_of_maria(precision, margin):
    dtype, tolerance = precision
    found = losses.paired_hinge(*cast(sentences(), dtype), margin, summed=True)
    check(found, LOSSES[margin], tolerance)


def test_gradients_of_maria(precision):
    dtype, tolerance = precision
    texts, pictures, mask = cast(sentences(), dtype)
    loss = lambda texts, pictures: losses.paired_hinge(texts, pictures, mask, 0.5, summed=True)
    found = jax.grad(loss, (0, 1))(texts, pictures)
    check([np.linalg.norm(x) for x in found], np.array(GRADIENTS), tolerance)


def test_loss_of_vokenization(precision):
    dtype, tolerance = precision
    parts = cast(tokens(), dtype)
    check(losses.paired_hinge(*parts, 0.5), TOKEN_LOSS, tolerance)
    check(losses.token_accuracy(*parts), TOKEN_ACCURACY, max(tolerance, 5e-8))


def test_recalls_as_the_original_prints_them(precision):
    dtype, _ = precision
    for parts, expected in ((sentences(), LEGACY), (tokens(), TOKEN_LEGACY)):
        found = {k: float(legacy_batch_recall(*cast(parts, dtype), k)) for k in expected}
        assert found == pytest.approx(expected, abs=1e-7)
    with pytest.raises(ValueError, match="k is 8; a batch of 8 allows 1 to 7"):
        legacy_batch_recall(*cast(sentences(), dtype), 8)


def test_true_recalls_of_the_golden_vectors():
    texts, pictures, _ = sentences()
    np.testing.assert_allclose((texts[:, 0] * pictures).sum(1), DIAGONAL, atol=6e-7)
    hits = ExactIndex(pictures.astype(np.float32)).search(texts[:, 0].astype(np.float32), 8)
    positives = [{row: 1.0} for row in range(8)]
    assert metrics.ranks(hits.rows, positives).tolist() == [rank - 1 for rank in RANKS]
    names = tuple(f"recall@{k}" for k in TRUE)
    rows = list(range(8))
    benchmark = Benchmark("golden", "", "test", rows, rows, list("abcdefgh"), positives)
    found = metrics.evaluate(hits.rows, benchmark, names)
    assert found == {f"recall@{k}": value for k, value in TRUE.items()}


# ---- losses against numpy ----


def by_hand(texts, pictures, mask, margin, groups, parts, summed):
    """`paired_hinge` and its gradients, pair by pair."""
    size, value = len(pictures) // parts, 0.0
    by_text, by_picture = np.zeros_like(texts), np.zeros_like(pictures)
    for part in range(parts):
        rows = range(part * size, (part + 1) * size)
        other = {row: part * size + (row - part * size + size // 2) % size for row in rows}
        kept = [
            (row, token)
            for row in rows
            for token in range(texts.shape[1])
            if mask[row, token] and groups[row] != groups[other[row]]
        ]
        weight = 1 / parts / (1 if summed else max(1, len(kept)))
        for row, token in kept:
            right, wrong = pictures[row], pictures[other[row]]
            hinge = margin - texts[row, token] @ right + texts[row, token] @ wrong
            if hinge > 0:
                value += weight * hinge
                by_text[row, token] += weight * (wrong - right)
                by_picture[row] -= weight * texts[row, token]
                by_picture[other[row]] += weight * texts[row, token]
    return value, by_text, by_picture


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_paired_hinge_equals_its_definition(shared, parts, summed):
    texts, pictures, mask = tokens()
    groups = np.array([0, 1, 2, 3, 0, 5, 0, 7]) if shared else np.arange(8)
    expected = by_hand(texts, pictures, mask, 0.5, groups, parts, summed)
    options = {"groups": groups, "parts": parts, "summed": summed}
    loss = lambda texts, pictures: losses.paired_hinge(texts, pictures, mask, 0.5, **options)
    with jax.enable_x64(True):
        value, found = jax.value_and_grad(loss, (0, 1))(texts, pictures)
    for x, y in zip((value, *found), expected):
        np.testing.assert_allclose(x, y, atol=1e-12)


def all_by_hand(texts, pictures, mask, margin, groups):
    """`batch_hinge` and its gradients, pair by pair."""
    weight, value = 1 / (mask.sum() * len(pictures)), 0.0
    by_text, by_picture = np.zeros_like(texts), np.zeros_like(pictures)
    for row, token, other in np.ndindex(len(texts), texts.shape[1], len(pictures)):
        if not mask[row, token] or groups[row] == groups[other]:
            continue
        wrong = texts[row, token] @ pictures[other]
        for owner in (row, other) if mask[other, token] else (row,):
            hinge = margin - texts[owner, token] @ pictures[owner] + wrong
            if hinge > 0:
                value += weight * hinge
                by_text[row, token] += weight * pictures[other]
                by_picture[other] += weight * texts[row, token]
                by_text[owner, token] -= weight * pictures[owner]
                by_picture[owner] -= weight * texts[owner, token]
    return value, by_text, by_picture


@pytest.mark.parametrize("groups", [np.arange(8), np.array([0, 1, 2, 3, 0, 5, 0, 7])], ids=str)
@pytest.mark.parametrize("parts", [sentences, tokens])
def test_batch_hinge_equals_its_definition(parts, groups):
    texts, pictures, mask = parts()
    loss = lambda texts, pictures: losses.batch_hinge(texts, pictures, mask, 0.5, groups)
    with jax.enable_x64(True):
        value, found = jax.value_and_grad(loss, (0, 1))(texts, pictures)
    for x, y in zip((value, *found), all_by_hand(texts, pictures, mask, 0.5, groups)):
        np.testing.assert_allclose(x, y, atol=1e-12)


def test_accuracy_counts_tokens_and_groups():
    texts, pictures, mask = tokens()
    best = (texts @ pictures.T).argmax(axis=2)
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    expected = (groups[best] == groups[:, None])[mask].mean()
    np.testing.assert_allclose(losses.token_accuracy(*tokens(), groups), expected, rtol=1e-6)


def test_a_batch_without_two_halves_is_refused():
    texts, pictures, mask = sentences()
    with pytest.raises(ValueError, match="7 rows does not divide into 1 parts of two halves"):
        losses.paired_hinge(texts[:7], pictures[:7], mask[:7], 0.5)
    with pytest.raises(ValueError, match="use a multiple of 6"):
        losses.paired_hinge(texts, pictures, mask, 0.5, parts=3)


@pytest.mark.parametrize("level", ["sentence", "token"])
@pytest.mark.parametrize("loss", ["paired_hinge", "batch_hinge", "contrastive"])
def test_the_method_hands_its_loss_the_right_things(loss, level):
    config = dataclasses.replace(
        MariaConfig.tiny(INPUTS), loss=loss, level=level, dropout=0.0, margin=0.3
    )
    model, batch = drawn(config), training_batch("maria")

    @jax.jit
    def computed(params, batch):
        method = nnx.merge(model.graph, params)
        loss = method.loss(batch, jax.random.key(0))
        return loss, method.texts(batch["query"]), method.item(batch["item"])

    (value, shown), texts, pictures = computed(model.params, batch)
    mask = batch["query"]["text_mask"][:, : texts.shape[1]]
    assert texts.shape[1] == (1 if level == "sentence" else INPUTS.text.length)
    if loss == "contrastive":
        mean = np.stack([np.asarray(x)[m].mean(axis=0) for x, m in zip(texts, mask)])
        expected = losses.contrastive(mean, pictures, config.scale)[0]
    else:
        expected = getattr(losses, loss)(texts, pictures, mask, 0.3)
    assert np.isfinite(value)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(shown["accuracy"], losses.token_accuracy(texts, pictures, mask))


# ---- towers and heads ----


def tower(config=TINY_RESNEXT, dtype="float32"):
    """A ResNeXt with random tensors of the original's names, and these."""
    sizes = {k: getattr(config, k) for k in ("layers", "width", "groups", "group_width")}
    tensors = golden.filled(golden.image_shapes(**sizes))
    make = lambda: Resnext(config, dtype=dtype, remat=True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(make))
    flat = traverse_util.flatten_dict({"resnext": nnx.to_pure_dict(state)}, sep="/")
    shapes = {name: x.shape for name, x in flat.items()}
    plan = rules.Plan(None, tuple(table.resnext_rules(config)), "torchvision's ResNeXt")
    params, _ = rules.convert(Tensors(tensors), plan, shapes)
    return graph, traverse_util.unflatten_dict(params, sep="/")["resnext"], tensors


class Tensors(dict):
    """Arrays as `cir_jax.conversion.sources.Tensors`."""

    def shape(self, name):
        return self[name].shape

    def dtype(self, name):
        return self[name].dtype


@pytest.mark.parametrize(
    ("config", "size"),
    [(TINY_RESNEXT, 45), (ResnextConfig((1, 1, 1, 1), 8, 1, 8), 32)],
    ids=["grouped-odd", "plain-even"],
)
def test_resnext_equals_its_definition(precision, config, size):
    dtype, tolerance = precision
    graph, params, tensors = tower(config)
    images = np.random.default_rng(1).standard_normal((2, 3, size, size)).astype(dtype)
    expected = golden.features(tensors, images.astype(np.float64), config.layers, config.groups)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    found = jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, images.transpose(0, 2, 3, 1))
    assert found.dtype == dtype and found.shape == (2, config.features)
    assert expected.std() > 0.1
    check(found, expected, tolerance)


def test_bfloat16_of_resnext_is_near_and_float32():
    graph, params, _ = tower()
    rough, _, _ = tower(dtype="bfloat16")
    images = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    run = lambda graph: jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, images)
    x, y = run(graph), run(rough)
    assert y.dtype == jnp.float32
    assert 0 < np.abs(x - y).max() < 0.05 * np.abs(x).max()


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("config", "numbers"),
    [(RESNEXT_101, 86_945_216), (RESNEXT_50, 23_048_128), (RESNET_101, 42_605_504)],
    ids=["resnext101_32x8d", "resnext50_32x4d", "resnet101"],
)
def test_sizes_of_torchvision(config, numbers):
    make = lambda: Resnext(config, dtype="float32", remat=True, rngs=nnx.Rngs(0))
    assert count(nnx.state(nnx.eval_shape(make))) == numbers
    sizes = {k: getattr(config, k) for k in ("layers", "width", "groups", "group_width")}
    assert sum(map(np.prod, golden.image_shapes(**sizes).values())) == numbers
    assert config.features == 2048


def test_states_of_the_last_layers_side_by_side():
    bert = built(lambda: Bert(TINY_BERT, dtype="float32", remat=True, rngs=nnx.Rngs(0)))
    ids = np.array([[1, 5, 6, 2], [1, 7, 2, 0]])

    @jax.jit
    def computed(bert):
        mask = ids > 0
        first = bert.last_states(ids, mask, 3, first=True)
        return bert.states(ids, mask), bert.last_states(ids, mask, 2), first

    states, found, first = computed(bert)
    np.testing.assert_allclose(found, np.concatenate(states[-2:], axis=-1), atol=1e-6)
    assert first.shape == (2, 1, 48)
    np.testing.assert_allclose(first[:, 0], np.concatenate(states[1:, :, 0], axis=-1), atol=1e-6)
    with pytest.raises(ValueError, match="last 4 layers are wanted; this BERT has 1 to 3"):
        bert.last_states(ids, ids > 0, 4)


def test_a_head_starts_as_pytorch_and_drops_with_a_key_only():
    head = Head((16, 64, 64, 8), 0.5, dtype="float32", rngs=nnx.Rngs(0))
    for layer, inputs in ((head.linear1, 16), (head.linear2, 64), (head.linear3, 64)):
        for x in (layer.kernel[...], layer.bias[...]):
            assert 0.7 * inputs**-0.5 < np.abs(x).max() <= inputs**-0.5
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    y = np.maximum(x @ head.linear1.kernel[...] + head.linear1.bias[...], 0)
    y = np.maximum(y @ head.linear2.kernel[...] + head.linear2.bias[...], 0)
    y = unit_rows(y @ head.linear3.kernel[...] + head.linear3.bias[...])
    np.testing.assert_allclose(head(x), y, atol=1e-5)
    dropped, again = head(x, jax.random.key(0)), head(x, jax.random.key(0))
    np.testing.assert_array_equal(dropped, again)
    assert np.abs(dropped - y).max() > 1e-2


@pytest.mark.parametrize("preset", [maria, vokenization])
def test_sizes_of_the_published_models(preset):
    config = preset("vocab.txt")
    assert from_json(MariaConfig, json.loads(json.dumps(to_json(config)))) == config
    assert (config.margin, config.loss, config.loss_parts) == (0.5, "paired_hinge", 1)
    _, params = abstract_params(config)
    trained, frozen = optim.split_frozen(params, FROZEN)
    heads = {name: count(part) for name, part in trained.items()}
    if preset is maria:
        assert heads == {"text_head": 4_721_152, "image_head": 3_672_576}
        assert config.summed and config.level == "sentence" and config.inputs.text.length == 75
    else:
        assert heads == {"text_head": 803_136, "image_head": 540_992}
        assert not config.summed and config.level == "token" and config.inputs.text.length == 20
    assert count(frozen["resnext"]) == 86_945_216
    pooler = 768 * 768 + 768
    assert count(frozen["bert"]) == 109_482_240 - pooler
    _, held = optim.split_frozen(params, FROZEN_IN_TUNING)
    names = traverse_util.flatten_dict(held["resnext"], sep="/")
    assert all(name.startswith(("stem/", "stage1/")) or "/norm/" in name for name in names)
    assert "stage4/blocks/conv3/norm/scale" in names and "stage2/first/conv1/kernel" not in names


def test_pictures_are_cut_from_a_larger_short_side():
    spec = maria("vocab.txt").inputs.image
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    expected = picture.resize((341, 256), Image.Resampling.BILINEAR).crop((58, 16, 282, 240))
    expected = np.asarray(expected)
    np.testing.assert_array_equal(crop(picture, spec), expected)
    np.testing.assert_array_equal(crop(expected, spec), expected)
    values = (expected / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(prepare(expected, spec), values, atol=1e-6)
    # A file of just that size is no cut picture.
    small = picture.crop((0, 0, 224, 224))
    assert np.abs(crop(small, spec).astype(int) - np.asarray(small)).max() > 0
    for wrong in ({"short": 100}, {"short": 256, "resize": "squash"}):
        with pytest.raises(ValueError, match="needs resize 'short' and at least `size`"):
            ImageSpec(224, **wrong)


def test_faults_are_named():
    config = MariaConfig.tiny(INPUTS)
    short = dataclasses.replace(config, bert=dataclasses.replace(config.bert, length=8))
    with pytest.raises(ValueError, match=r"inputs\.text\.length is 16, BERT has 8 positions"):
        Maria(short, nnx.Rngs(0))
    with pytest.raises(ValueError, match="text_layers is 3; BERT has 1 to 2 layers"):
        Maria(dataclasses.replace(config, text_layers=3), nnx.Rngs(0))
    with pytest.raises(ValueError, match="every stage needs at least one block"):
        Resnext(ResnextConfig((1, 0, 1, 1)), dtype="float32", remat=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"needs `text`; this one has \['image'\]"):
        built(lambda: Maria(config, nnx.Rngs(0))).query({"image": np.zeros((1, 32, 32, 3))})


# ---- tokens that ask ----


@pytest.fixture(scope="module")
def asking():
    return drawn(dataclasses.replace(MariaConfig.tiny(INPUTS), level="token"), seed=1)


def test_start_and_end_do_not_ask():
    mask = np.arange(6) < np.array([[6], [4], [3], [2]])
    found = np.asarray(words_of(mask)).astype(int).tolist()
    assert found == [[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]


def test_every_token_asks_and_the_best_counts(asking):
    queries = raw_queries("maria", 5)
    items = asking.encode("item", raw_items("maria"))
    vectors, mask = asking.encode("query", queries, batch_size=2)
    assert vectors.shape == (5, mask.shape[1], 16) and mask.dtype == bool
    np.testing.assert_allclose(np.linalg.norm(vectors[mask], axis=1), 1, atol=1e-5)
    scores = np.where(mask[:, :, None], vectors @ items.T, -np.inf).max(axis=1)
    hits = retrieve(ExactIndex(items), (vectors, mask), 3)
    order = np.argsort(-scores, axis=1)[:, :3]
    np.testing.assert_array_equal(hits.rows, order)
    np.testing.assert_allclose(hits.scores, np.take_along_axis(scores, order, 1), atol=1e-6)
    rows = np.tile(np.arange(len(items)), (5, 1))
    pictures = lambda rows: [raw_items("maria")[row] for row in rows]
    again = score_candidates(asking, queries, pictures, rows)
    np.testing.assert_allclose(again, scores, atol=1e-5)
    np.testing.assert_allclose(score_by_vectors(asking, queries, items, rows), scores, atol=1e-5)


def test_texts_of_a_query_ask_by_all_their_tokens(asking):
    texts = [query["text"] for query in raw_queries("maria", 3)]
    vectors, mask = asking.encode("query", [{"texts": texts[:2]}, {"texts": texts[2:]}])
    alone, words = asking.encode("query", [{"text": text} for text in texts])
    assert mask.sum(axis=1).tolist() == [words[:2].sum(), words[2:].sum()]
    np.testing.assert_allclose(vectors[mask], alone[words], atol=1e-5)


def test_search_with_tokens(asking):
    items = raw_items("maria")
    index = ExactIndex(asking.encode("item", items), [str(row) for row in range(len(items))])
    found = cir_jax.search(asking, index, text=raw_queries("maria")[0]["text"], k=3)
    assert len(found) == 3 and found[0].score >= found[1].score >= found[2].score


# ---- conversion ----


def test_names_and_numbers_of_the_checkpoint():
    shapes = golden.shapes()
    size = lambda prefix: sum(int(np.prod(s)) for n, s in shapes.items() if n.startswith(prefix))
    number = lambda prefix: sum(name.startswith(prefix) for name in shapes)
    assert (len(shapes), size("")) == (731, 204_821_184)
    assert (number(table.TEXT), size(table.TEXT)) == (199, 109_482_240)
    assert (number(table.IMAGE), size(table.IMAGE)) == (520, 86_945_216)
    assert len(shapes | {f"{table.TEXT}embeddings.position_ids": (1, 512)}) == 732


class Shapes(Tensors):
    """Names and shapes where nobody reads numbers."""

    def shape(self, name):
        return self[name]


def published(tmp_path, **changes):
    vocabulary = tmp_path / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{n}" for n in range(30522 - 5))]
    vocabulary.write_text("\n".join(words) + "\n")
    shapes = golden.shapes(**changes) | {f"{table.TEXT}embeddings.position_ids": (1, 512)}
    source = rules.Stripped(Shapes(shapes), "")
    found = table.plan({"": Source(source)}, Options(tokenizer=vocabulary))
    return found, shapes, vocabulary


@dataclasses.dataclass
class Source:
    tensors: object
    config: dict | None = None


@pytest.mark.parametrize("token", [False, True], ids=["maria", "vokenization"])
def test_the_table_takes_every_tensor_of_the_published_models(token, tmp_path):
    changes = {"hidden": (256,), "embed": 64, "token": True} if token else {}
    found, shapes, vocabulary = published(tmp_path, **changes)
    assert found.config == (vokenization if token else maria)(str(vocabulary))
    flat = traverse_util.flatten_dict(abstract_params(found.config)[1], sep="/")
    places = {name: x.shape for name, x in flat.items()}
    taken = {n: r.source_shape(places) for r in found.rules for n in r.names(places)}
    assert taken.items() <= shapes.items()
    left = shapes.keys() - taken.keys()
    assert left == {
        f"{table.TEXT}{name}"
        for name in ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
    }
    assert len(taken) == (729 - 2 * 2 if token else 729)


SMALL = {
    "text": {"width": 64 * 12, "layers": 2, "hidden": 32, "words": 15, "length": 80},
    "image": {"layers": (1, 2, 1, 1), "width": 8, "groups": 4, "group_width": 2},
}


def small_source(folder, prefix="", token=False, text_layers=2):
    from golden_convert import save

    sizes = {"hidden": (24,) if token else (24, 24), "embed": 16, "text_layers": text_layers}
    tensors = golden.filled(golden.shapes(**SMALL, **sizes, token=token))
    extra = {f"{table.IMAGE}bn1.num_batches_tracked": np.zeros((), np.int64)}
    extra |= {f"{table.TEXT}embeddings.position_ids": np.arange(80)[None]}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    named = {prefix + name: x for name, x in (tensors | extra).items()}
    return save(folder / "best.safetensors", named), tensors, folder / "vocab.txt"


@pytest.mark.parametrize("token", [False, True], ids=["maria", "vokenization"])
def test_a_checkpoint_there_and_back(token, tmp_path):
    from safetensors.numpy import load_file

    source, tensors, vocabulary = small_source(tmp_path, "module.", token)
    done = convert(source, tmp_path / "model", "maria", tokenizer=vocabulary)
    assert len(done.ignored) == 4 and set(done.modules) == {
        "bert",
        "resnext",
        "text_head",
        "image_head",
    }
    model = cir_jax.load(tmp_path / "model")
    assert model.config.level == ("token" if token else "sentence")
    assert model.config.text_layers == 2 and model.config.resnext.groups == 4
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64))
    behind = {name.removeprefix(table.IMAGE): x for name, x in tensors.items()}
    x = golden.features(behind, images, (1, 2, 1, 1), 4)
    names = ("mlp.0", "mlp.3") if token else [f"mlp.linears.{n}" for n in range(3)]
    for number, name in enumerate(names):
        x = x if number == 0 else np.maximum(x, 0)
        x = x @ tensors[f"visn_model.{name}.weight"].T + tensors[f"visn_model.{name}.bias"]
    method = nnx.merge(model.graph, model.params)
    found = method.item({"image": images.transpose(0, 2, 3, 1).astype(np.float32)})
    np.testing.assert_allclose(found, unit_rows(x), atol=1e-5)
    vectors = model.encode("query", ["a b", "c"])
    assert vectors[0].shape == ((2, 8, 16) if token else (16,))
    export(tmp_path / "model", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert {n for n in tensors if ".pooler." not in n} == set(back)
    assert all(np.array_equal(back[name], tensors[name]) for name in back)


def test_a_head_over_one_layer_asks_which(tmp_path):
    source, _, vocabulary = small_source(tmp_path, text_layers=1)
    with pytest.raises(ValueError, match=r"reads one layer of BERT.*add --variant last"):
        convert(source, tmp_path / "model", "maria", tokenizer=vocabulary)
    convert(source, tmp_path / "model", "maria", tokenizer=vocabulary, variant="last")
    assert cir_jax.load(tmp_path / "model").config.text_layers == 1


def test_what_maria_cannot_be_made_of(tmp_path):
    source, tensors, vocabulary = small_source(tmp_path)
    with pytest.raises(ValueError, match=r"give the vocab\.txt of bert-base-uncased"):
        convert(source, tmp_path / "model", "maria")
    (tmp_path / "other.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    with pytest.raises(ValueError, match=r"15 rows, .* gives 5 ids"):
        convert(source, tmp_path / "model", "maria", tokenizer=tmp_path / "other.txt")
    from golden_convert import save

    for change, message in (
        (lambda t: t.pop("lang_model.mlp.linears.0.weight"), "it has 0, expected one"),
        (lambda t: t.pop(f"{table.IMAGE}layer4.0.bn3.bias"), "missing .*layer4.0.bn3.bias"),
        (lambda t: t.pop(f"{table.IMAGE}conv1.weight"), "from which the sizes are read"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "left over extra"),
    ):
        changed = dict(tensors)
        change(changed)
        wrong = save(tmp_path / "wrong.safetensors", changed)
        with pytest.raises(ValueError, match=message):
            convert(wrong, tmp_path / "model", "maria", tokenizer=vocabulary)
        wrong.unlink()
    assert not (tmp_path / "model").exists()
