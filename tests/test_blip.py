"""BLIP's encoders and both stages of Candidate-Reranking against numbers computed with the original code."""

import dataclasses
import functools
import itertools

import golden_blip as golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_clip import NARROW, products

from cir_jax import losses, sharding
from cir_jax.data.images import ImageSpec
from cir_jax.data.inputs import Inputs
from cir_jax.data.text import TextSpec
from cir_jax.encoders import bert, blip, layers, vit
from cir_jax.methods import METHODS, build, method_name
from cir_jax.methods.blip_itm import hard_negatives
from cir_jax.methods.blip_rerank import start_from_stage1

COSINES = (
    (0.4445171, -0.01965881, 0.4491876, 0.6748818),
    (0.2336549, 0.4644381, 0.3691446, 0.2950259),
    (0.04513754, -0.2136576, 0.02099340, 0.2092398),
)
LOGITS = (
    (6.3502443, -0.2808402, 6.4169662),
    (3.3379271, 6.6348296, 5.2734941),
    (0.6448220, -3.0522512, 0.2999057),
)
SCORES = (
    (0.4806431, 1.4305310, -0.1074846, 1.4105112),
    (0.8841733, 0.7973479, 0.3017114, 1.2922118),
    (1.0943392, 0.0981480, -0.2181003, 1.0091782),
)
LOSS1, LOSS2 = 0.6265749890, 1.4067613359
TEXT_ROW = (
    -0.3346799,
    0.4900593,
    -0.1634376,
    -0.1433705,
    -0.07738858,
    -0.2037637,
    -0.2329168,
    -0.2877901,
) + (-0.3903941, -0.1327444, 0.07003554, -0.2437442, -0.1363612, 0.03450317, -0.2542438, -0.3117895)
IMAGE_ROW = (
    -0.4052769,
    0.3963477,
    0.1308209,
    -0.0223279,
    0.2514718,
    0.1102001,
    -0.637675,
    0.06493333,
) + (
    0.1871975,
    -0.2612592,
    -0.08406261,
    -0.1871561,
    0.07343211,
    -0.0482898,
    -0.1280926,
    -0.07275663,
)
# Query 1, candidate 2, position 0 behind each layer: norm and first three of the fused branch, then of the text's.
TRACE = (
    ((5.6277421, 1.872570, -0.6811880, -2.645473), (5.8187483, 1.098582, -0.8210166, -0.1814973)),
    ((5.8998590, 2.521166, -0.7213698, -1.410952), (5.8557177, 1.496796, -1.060851, 0.3900496)),
    ((5.8676017, 0.9968918, -0.9471476, -1.631202), (5.6707235, 1.401966, -0.1387882, -0.5749621)),
    (
        (5.7730682, 0.7751250, -0.3309038, -0.4383183),
        (5.5274911, -0.3845407, -0.9674085, 0.1683965),
    ),
    ((5.8009841, 1.422353, 0.04675949, 0.1468439), (5.8375804, -0.1633367, -0.04231528, 0.2214733)),
    ((5.7625169, 0.2375363, 1.881608, 1.230705), (5.8335824, -0.3965541, 0.9403749, 0.4121613)),
    (
        (5.8091851, -0.1056713, 0.5104979, -0.3851130),
        (5.7575765, -0.4387557, 0.01963066, -0.6461840),
    ),
    ((5.8114434, -2.137405, 0.1018399, 0.9147153), (5.7208731, 0.1825794, -0.05278028, 0.3209352)),
)
# Query 1, all candidates and positions: sums of both branches behind each layer.
SUMS = (
    (9.9904142, 17.6997181),
    (-13.6131003, -1.5073865),
    (-0.5751468, 1.4993764),
    (-1.2314472, 7.1595422),
    (-17.4033643, -19.1940425),
    (-9.2761184, -3.9280106),
    (-7.6880693, -2.0143589),
    (-15.5355393, -13.4752809),
)
# What both branches saw, merged: query 1, candidate 2, position 0, by layer.
MERGED = {
    0: (2.2406790, 0.8293972, 0.2343620, -0.4084026),
    6: (5.3442003, -0.9252815, -0.2099065, -1.419445),
    7: (3.5076104, -0.6472298, 0.04152147, -0.4654853),
}
SEEN = (
    (0.5118962, 0.1247003, -0.3506842),
    (1.146898, 0.3440236, -0.4661210),
)  # layer 0, not merged

# Stage II doubled from stage I.
DOUBLED_SCORES = (
    (-0.9893736, -0.7261709, -0.7970557, -0.2501581),
    (-1.0750273, 0.9137990, 0.9322334, -0.2321298),
    (-0.6981108, 0.8294732, -0.1816278, 0.0904283),
)
DOUBLED_LOSS = 1.1645326463
POSITIONS = (
    (0.0011086, -1.2696432, -0.8315126, -0.4757297, -1.1676118, -1.8081881, -1.0089754, -0.5328272)
    + (-0.0501239, -0.4352008, -0.8525449, -0.3248315, 0.1238523, 0.6358911, 0.4914084, 0.2641182)
    + (1.0680522, 1.2338921, 1.2639024, 0.6022825, 0.0559994, 2.0584595, 1.9993709, 1.6297861)
    + (0.4947884, -0.3523919)
)


@pytest.fixture(params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def precision(request):
    """The computing type; in float64 everything runs in JAX's x64 mode."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


# Compiling takes most of the time of these tests, and what is not optimised compiles in half of it.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def compiled(function):
    """Optimised as in use in float32, where rounding matters; quickly compiled in x64 mode."""
    return (quick if jax.config.jax_enable_x64 else jax.jit)(function)


def close(value, expected, tolerance=None, whole=()):
    """By default 1e-6 of the printed digits in float64, and the design's tolerance in float32.

    `whole` is the array that `value` is a part of; its largest number then sets the scale, as the design says.
    """
    tolerance = tolerance or (1e-6 if np.asarray(value).dtype == np.float64 else 1e-5)
    atol = tolerance * max(1, np.abs(expected).max(), np.abs(whole).max(initial=0))
    np.testing.assert_allclose(value, expected, rtol=0, atol=atol)


def close_whole(x, norm, total):
    """Frobenius norm and sum of an array. Added up in float64: the sums are checked, not the adding."""
    wide = np.asarray(x, np.float64)
    tolerance = {"float64": 1e-6, "float32": 1e-5}[str(x.dtype)]
    close(np.linalg.norm(wide), norm, tolerance)
    close(wide.sum(), total, tolerance)


@functools.cache
def first_stage(dtype):
    """What stage I computes on the golden inputs, as numpy arrays."""
    model, query = golden.stage1(dtype), golden.query(dtype)
    ids, mask = blip.with_encode_token(query["text"], model.config.text), query["text_mask"]

    @compiled
    def compute(model):
        references, candidates = model.image(query["image"]), model.image(golden.candidates(dtype))
        return {
            "references": references,
            "candidates": candidates,
            "embedded": model.text.embeddings(ids),
            "fused": model.text(ids, mask, references),
            "queries": model.query(query),
            "items": model.item({"image": golden.candidates(dtype)}),
        }

    return jax.tree.map(np.asarray, compute(model))


@functools.cache
def second_stage(dtype):
    """What stage II computes on the golden inputs and the state of stage I, layer by layer."""
    model, fused = golden.stage2(dtype), first_stage(dtype)["fused"]

    @compiled
    def compute(model):
        queries = stage2_queries(model, fused)
        items = model.item({"image": golden.candidates(dtype)})
        return {"queries": queries, "items": items, "scores": model.score_all(queries, items)}

    return jax.tree.map(np.asarray, compute(model))


def stage2_queries(model, fused, text=golden.IDS):
    """The queries of a re-ranker whose fused state is given: the golden one comes from another picture encoder."""
    ids = blip.with_encode_token(jnp.asarray(text), model.config.text)
    return {"fused": fused, "text": model.text.embeddings(ids), "mask": golden.IDS != 0}


def block(stack, layer):
    return jax.tree.map(lambda x: x[layer], stack)


def test_pictures(precision):
    out = first_stage(precision)
    close_whole(out["references"], 39.690748, 14.809196)
    close(out["references"][0, 0, :4], (-0.5569087, -0.04520307, -0.6735699, 0.9370132))
    close(out["references"][2, 16, :4], (1.662031, 0.4862251, -0.05868342, 0.7585796))
    close_whole(out["candidates"], 45.667768, 29.944016)
    close(out["candidates"][0, 0, :4], (-1.133289, -0.06733257, -0.7105597, 1.074809))
    close(out["candidates"][3, 0, :4], (-1.420842, 0.1458919, -0.4533212, 0.4501298))


def test_text_embeddings(precision):
    out = first_stage(precision)["embedded"]
    close_whole(out, 23.209338, -10.311734)
    close(out[0, 0, :4], (-1.192537, 2.285846, 0.7247538, -0.02500448))


def test_fused_state(precision):
    out = first_stage(precision)["fused"]
    close_whole(out, 24.103992, -2.5204977)
    close(out[0, 0, :4], (1.007234, 1.462472, 1.653897, 0.8611547))
    close(out[1, 0, :4], (0.2845454, -0.2066491, -2.305136, 1.247499))
    close(out[1, 5, :4], (1.091247, -0.6998972, -2.896911, -0.630408))
    close(np.linalg.norm(out[golden.IDS != 0]), 21.954268)


def test_vectors_of_stage1(precision):
    out = first_stage(precision)
    close_whole(out["queries"], 1.7320508, -3.6409132)
    close(out["queries"][0], TEXT_ROW)
    close_whole(out["items"], 2, -1.2931667)
    close(out["items"][0], IMAGE_ROW)
    close(out["queries"] @ out["items"].T, COSINES)
    close(out["queries"] @ out["items"][:3].T / np.asarray(0.07, precision), LOGITS)


def stage1_loss(dtype):
    """Loss and gradients of stage I."""
    graph, state = nnx.split(golden.stage1(dtype))
    batch = {"query": golden.query(dtype), "item": {"image": golden.candidates(dtype)[:3]}}
    loss = lambda params: nnx.merge(graph, params).loss(batch, None)[0]
    return compiled(jax.value_and_grad(loss))(nnx.to_pure_dict(state))


def test_loss_and_gradients_of_stage1(precision):
    value, grads = stage1_loss(precision)
    norm = lambda x: np.linalg.norm(np.asarray(x))
    close(value, LOSS1)
    close(grads["temperature"], 0.87060038)
    close(norm(grads["text_project"]["kernel"]), 5.2479449)
    close(norm(grads["text"]["blocks"]["branch"]["cross"]["key"]["kernel"][0]), 1.9034041)
    close(norm(grads["text"]["embeddings"]["embedding"]), 6.4887036)
    assert not np.any(grads["text"]["embeddings"]["embedding"][0])


def test_candidates_of_stage2(precision):
    out = second_stage(precision)["items"]["tokens"]
    close_whole(out, 46.966450, -18.562676)
    close(out[0, 0, :4], (0.1932977, -0.5223299, 0.2348922, -1.579715))


def test_two_branches_layer_by_layer(precision):
    model, out = golden.stage2(precision), second_stage(precision)
    repeat = lambda x: jnp.repeat(x[1:2], 4, axis=0)
    states = repeat(out["queries"]["fused"]), repeat(out["queries"]["text"])
    mask = repeat(out["queries"]["mask"])[:, None, None]
    blocks = model.text.blocks
    step = compiled(lambda block, states: block(states, mask, out["items"]["tokens"]))
    for layer, (expected, sums) in enumerate(zip(TRACE, SUMS)):
        kind = blocks.mean if layer < 6 else blocks.linear
        states = step(block(kind, layer % 6), states)
        for state, (norm, *entries), total in zip(states, expected, sums):
            close(np.linalg.norm(np.asarray(state[2, 0])), norm)
            close(state[2, 0, :3], entries, whole=state)
            close(np.asarray(state).sum(dtype=np.float64), total, float32_sum(precision, state))


def float32_sum(dtype, x):
    """Rounding of single entries is not cancelled in a sum of 768 of them; it grows with the root of their number."""
    return 1e-6 if dtype == "float64" else 1e-5 * np.sqrt(x.size) / 2


def test_what_both_branches_saw(precision):
    model, out = golden.stage2(precision), second_stage(precision)
    states = out["queries"]["fused"][1:2], out["queries"]["text"][1:2]
    mask, tokens = out["queries"]["mask"][1:2, None, None], out["items"]["tokens"][2:3]
    for layer in range(8):
        kind = model.text.blocks.mean if layer < 6 else model.text.blocks.linear
        current = block(kind, layer % 6)
        looks = [
            branch.look(branch.read(state, mask), tokens)
            for branch, state in zip((current.fused, current.text), states)
        ]
        if layer in MERGED:
            seen = current.merged(*looks)[0, 0]
            close(np.linalg.norm(np.asarray(seen)), MERGED[layer][0])
            close(seen[:3], MERGED[layer][1:])
        if layer == 0:
            close(np.stack(looks)[:, 0, 0, :3], SEEN)
        states = current(states, mask, tokens)


def test_scores_of_stage2(precision):
    model, out = golden.stage2(precision), second_stage(precision)
    close(out["scores"], SCORES)
    one = jax.tree.map(lambda x: x[1:2], out["queries"])
    alone = model.score(one, {"tokens": out["items"]["tokens"][None]})
    close(alone[0], SCORES[1])


def stage2_loss(dtype):
    """Loss and gradients of stage II, the fused state held constant."""
    graph, state = nnx.split(golden.stage2(dtype))
    fused, pictures = first_stage(dtype)["fused"], golden.candidates(dtype)[:3]

    def loss(params):
        model = nnx.merge(graph, params)
        scores = model.score_all(stage2_queries(model, fused), model.item({"image": pictures}))
        return losses.listwise(scores)[0]

    return compiled(jax.value_and_grad(loss))(nnx.to_pure_dict(state))


def test_loss_and_gradients_of_stage2(precision):
    value, grads = stage2_loss(precision)
    close(value, LOSS2)
    text, head = grads["text"], grads["head"]
    mean, linear = text["blocks"]["mean"], text["blocks"]["linear"]
    expected = (
        (
            mean["fused"]["attention"]["query"]["kernel"][0].T,
            0.13285812,
            (-0.003569584, 0.002500014, 0.01128938),
        ),
        (
            mean["text"]["attention"]["query"]["kernel"][0].T,
            1.6232192,
            (-0.01274805, -0.01976510, 0.004595782),
        ),
        (
            mean["fused"]["cross"]["value"]["kernel"][3].T,
            1.3266654,
            (0.05493454, 0.006458832, -0.03421790),
        ),
        (linear["merge"]["kernel"][0].T, 1.4577038, (-0.01254916, -0.02296383, -0.01562216)),
        (head["up"]["kernel"].T, 2.4462141, (-0.005774431, -0.001747223, 0.006177122)),
        (linear["mlp"]["down"]["kernel"][1].T, 1.5735379, (0.04649271, 0.02994988, 0.0002222185)),
        (linear["text"]["ln1"]["scale"][1], 0.3194277, (0.04152961, 0.00843107, -0.04780426)),
        (head["down"]["kernel"].T, 1.3041553, (0.3419432, 0.2592801, -0.08306757)),
    )
    for grad, norm, entries in expected:
        close(np.linalg.norm(np.asarray(grad)), norm)
        close(np.asarray(grad).reshape(-1)[:3], entries, whole=grad)
    words = np.asarray(text["embeddings"]["embedding"])
    close(np.linalg.norm(words), 5.2167495)
    close(words[59, :3], (-0.5331226, 0.8148828, -0.6301287), whole=words)
    assert not np.any(words[0])
    assert not np.any(head["down"]["kernel"][:, 1])


@pytest.mark.slow
def test_stage2_started_from_stage1(precision):
    """Both stages now have one picture encoder, as in use, so that the whole path from pictures to loss is checked."""
    params = golden.stage1_params(golden.stage1_tensors())
    model = golden.stage2(precision)
    before = nnx.to_pure_dict(nnx.state(model))
    model = golden.stage2(precision, start_from_stage1(before, params))
    query, items = golden.query(precision), {"image": golden.candidates(precision)}
    lists = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 3), tree)
    batch = {"query": query, "item": {"image": items["image"][:3]}}
    scores, loss = compiled(
        lambda m: (m.score(m.query(query), lists(m.item(items))), m.loss(batch, None)[0])
    )(model)
    close(scores, DOUBLED_SCORES)
    close(loss, DOUBLED_LOSS)


def test_only_merging_layers_and_head_have_no_start_in_stage1():
    before = golden.stage2_params(golden.stage2_tensors(), None)
    after = start_from_stage1(before, golden.stage1_params(golden.stage1_tensors()))
    same = lambda x, y: x.shape == y.shape and np.array_equal(x, y)
    kept = jax.tree_util.tree_map_with_path(
        lambda path, x, y: sharding.path_name(path) if same(x, y) else None,
        before,
        {**after, "fusion": None},
    )
    merge = {f"text/blocks/linear/merge/{leaf}" for leaf in ("kernel", "bias")}
    head = {f"head/{layer}/{leaf}" for layer in ("up", "down") for leaf in ("kernel", "bias")}
    assert set(jax.tree.leaves(kept)) == merge | head


def test_positions_for_another_grid(precision):
    table = np.float32(np.random.RandomState(9).standard_normal((1, 10, 2)))[0].astype(precision)
    out = np.asarray(vit.resize_positions(jnp.asarray(table), 5))
    close(out[:, 0], POSITIONS)
    close_whole(out, 6.3989579, 7.2592150)
    np.testing.assert_array_equal(vit.resize_positions(jnp.asarray(table), 3), table)


def test_a_position_table_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match="has 12"):
        vit.resize_positions(jnp.zeros((12, 2)), 5)


def test_numbering_of_the_golden_weights():
    one, two = sorted(golden.stage1_shapes()), sorted(golden.stage2_shapes())
    assert (len(one), one[0], one[213], one[258]) == (
        (259, "temp", "text_proj.bias", "visual_encoder.pos_embed")
    )
    assert (len(two), two[0], two[421]) == (422, "cls_head.0.bias", "visual_encoder.pos_embed")
    assert two[313] == "text_encoder.encoder.layer.6.crossattention.output.merge_layer.weight"
    count = lambda shapes: sum(int(np.prod(shape)) for shape in shapes.values())
    assert (count(golden.stage1_shapes()), count(golden.stage2_shapes())) == (151265, 225122)


# What a wrong implementation shows: largest change of picture tokens, fused state, logits and scores; both losses.
VALUE_MISTAKES = {
    "no mask": (0, 3.7, 3.0, 0.69, 0.4631441, 1.1708032),
    "class token kept": (0, 2.1, 2.2, 0.86, 0.6988340, 1.2525356),
    "branches exchanged": (0, 0, 0, 0.71, 0.6265750, 1.1395227),
    "fused state normed": (0, 0, 0, 0.064, 0.6265750, 1.3767108),
    "merge input reversed": (0, 0, 0, 1.3, 0.6265750, 1.2494257),
    "head input reversed": (0, 0, 0, 0.85, 0.6265750, 1.0231196),
}
CODE_MISTAKES = {
    "tanh gelu": (1.2e-3, 4.6e-3, 2.2e-3, 1.7e-3, 0.6262980, 1.4062846),
    "epsilon of pictures": (4.5e-4, 7.0e-4, 1.1e-3, 3.5e-4, 0.6265491, 1.4068510),
    "epsilon of text": (0, 4.0e-5, 3.1e-5, 2.6e-5, 0.6265709, 1.4067682),
    "no mask in the fused branch": (0, 0, 0, 0.14, 0.6265750, 1.3884768),
    "mean in all layers": (0, 0, 0, 1.8, 0.6265750, 1.4771289),
    "gelu before merging": (0, 0, 0, 0.57, 0.6265750, 1.6253223),
}


def runner():
    """Both stages as one function of models and inputs; a new one is compiled anew."""
    query, pictures = golden.query("float64"), golden.candidates("float64")

    @compiled
    def stage1(model, mask):
        asked = {**query, "text_mask": mask}
        ids = blip.with_encode_token(query["text"], model.config.text)
        batch = {"query": asked, "item": {"image": pictures[:3]}}
        references, items = model.image(query["image"]), model.item({"image": pictures[:3]})
        fused, logits = (
            model.text(ids, mask, references),
            model.query(asked) @ items.T * model.scale(),
        )
        return references, fused, logits, model.loss(batch, None)[0]

    @compiled
    def stage2(model, queries):
        scores = model.score_all(queries, model.item({"image": pictures}))
        return scores, losses.listwise(scores[:, :3])[0]

    def run(first, second, mask=golden.IDS != 0, edit=lambda queries, model: queries):
        references, fused, logits, loss1 = stage1(first, mask)
        queries = {**stage2_queries(second, fused), "mask": mask}
        scores, loss2 = stage2(second, edit(queries, second))
        return [np.asarray(x) for x in (references, fused, logits, scores, loss1, loss2)]

    return run


@functools.cache
def shared_runner():
    return runner()


@functools.cache
def without_mistake():
    return shared_runner()(golden.stage1("float64"), golden.stage2("float64"))


def check_mistake(found, expected):
    right = without_mistake()
    changes = [np.abs(x - y).max() for x, y in zip(found[:4], right[:4])]
    np.testing.assert_allclose(changes, expected[:4], rtol=0.05, atol=1e-12)
    np.testing.assert_allclose(found[4:], expected[4:], atol=1e-6)


def halves_exchanged(linear):
    first, second = jnp.split(linear.kernel[...], 2, axis=-2)
    linear.kernel[...] = jnp.concatenate([second, first], axis=-2)


@pytest.mark.parametrize("mistake", VALUE_MISTAKES)
def test_mistakes_in_wiring_are_noticed(mistake):
    with jax.enable_x64(True):
        first, second, options = golden.stage1("float64"), golden.stage2("float64"), {}
        if mistake == "no mask":
            options["mask"] = np.ones_like(golden.IDS, bool)
        if mistake == "class token kept":
            for model in (first, second):
                table = model.text.embeddings.embedding
                table[...] = table[...].at[59].set(table[...][2])
        if mistake == "branches exchanged":
            options["edit"] = lambda q, _: {**q, "fused": q["text"], "text": q["fused"]}
        if mistake == "fused state normed":
            options["edit"] = lambda q, model: {**q, "fused": model.text.embeddings.ln(q["fused"])}
        if mistake == "merge input reversed":
            halves_exchanged(second.text.blocks.linear.merge)
        if mistake == "head input reversed":
            halves_exchanged(second.head.up)
        check_mistake(shared_runner()(first, second, **options), VALUE_MISTAKES[mistake])


@pytest.mark.slow
@pytest.mark.parametrize("mistake", CODE_MISTAKES)
def test_mistakes_in_code_are_noticed(mistake, monkeypatch):
    with jax.enable_x64(True):
        without_mistake()
        first, second = golden.stage1("float64"), golden.stage2("float64")
        if mistake == "tanh gelu":
            monkeypatch.setitem(layers.ACTIVATIONS, "gelu", jax.nn.gelu)
        if mistake.startswith("epsilon"):
            right, wrong = (1e-6, 1e-5) if mistake.endswith("pictures") else (1e-12, 1e-6)
            for _, module in itertools.chain(nnx.iter_modules(first), nnx.iter_modules(second)):
                if getattr(module, "epsilon", None) == right:
                    module.epsilon = wrong
        if mistake == "no mask in the fused branch":
            read, fused = bert.Branch.read, itertools.cycle((True, False))
            blind = lambda self, x, mask, *rest: read(self, x, mask | next(fused), *rest)
            run_block = blip.TwoBranchBlock.__call__

            def blind_block(self, *args, **options):
                with monkeypatch.context() as patch:
                    patch.setattr(bert.Branch, "read", blind)
                    return run_block(self, *args, **options)

            monkeypatch.setattr(blip.TwoBranchBlock, "__call__", blind_block)
        if mistake == "mean in all layers":
            fusion = golden.stage1_params(golden.stage1_tensors())["text"]
            tensors = {k: v for k, v in golden.stage2_tensors().items() if "merge_layer" not in k}
            second = golden.stage2(
                "float64", golden.stage2_params(tensors, fusion, 8), merge_from=8
            )
        if mistake == "gelu before merging":
            merged = blip.TwoBranchBlock.merged
            act = lambda self, x: x if self.merge is None else layers.ACTIVATIONS["gelu"](x)
            acted = lambda self, x, y: merged(self, act(self, x), act(self, y))
            monkeypatch.setattr(blip.TwoBranchBlock, "merged", acted)
        check_mistake(runner()(first, second), CODE_MISTAKES[mistake])


# From here on: properties that no golden number covers, on models of random parameters.
INPUTS = Inputs(image=ImageSpec(size=32), text=TextSpec(length=12))
BLIP_METHODS = ("blip_cir", "blip_rerank", "blip_itm")


def tiny(name, **changes):
    """A method's tiny config with a small vocabulary; `dropout` is that of its text encoders."""
    config = METHODS[name][0].tiny(INPUTS)
    text = dataclasses.replace(config.text, vocabulary=401, dropout=changes.pop("dropout", 0.0))
    return dataclasses.replace(config, text=text, **changes)


def made(name, **changes):
    return build(tiny(name, **changes), nnx.Rngs(0))


def batch_for(name, rows=8):
    rng = np.random.default_rng(0)
    pictures = lambda: rng.normal(size=(rows, 32, 32, 3)).astype(np.float32)
    lengths = rng.integers(5, 13, (rows, 1))
    query = {
        "text": rng.integers(5, 400, (rows, 12)).astype(np.int32),
        "text_mask": np.arange(12) < lengths,
    }
    if name != "blip_itm":
        query["image"] = pictures()
    return {"query": query, "item": {"image": pictures()}}


def pure_loss(module):
    """The loss as a function of parameters and batch, and the parameters."""
    graph, state = nnx.split(module)
    loss = lambda params, batch: nnx.merge(graph, params).loss(batch, jax.random.key(1))[0]
    return loss, nnx.to_pure_dict(state)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLIP_METHODS)
def test_every_parameter_learns_and_the_loss_falls(name):
    loss, params = pure_loss(made(name))
    batch, tx = batch_for(name), optax.adam(3e-3)

    @quick
    def step(params, opt):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt, value, grads

    params, opt, first, grads = step(params, tx.init(params))
    # Softmax is blind to what is added to all of a row's logits, and so to the bias of the keys.
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    idle = [sharding.path_name(path) for path, g in leaves if not 1e-9 < np.abs(g).max() < np.inf]
    assert [name for name in idle if not name.endswith("key/bias")] == []
    for _ in range(20):
        params, opt, value, _ = step(params, opt)
    assert value < 0.7 * first


@pytest.mark.slow
@pytest.mark.parametrize("name", BLIP_METHODS)
def test_every_product_of_bfloat16_returns_float32(name):
    loss, params = pure_loss(made(name, dtype="bfloat16"))
    # Only the comparison of unit vectors in the contrastive loss stays in float32.
    compared = set() if name == "blip_rerank" else {("float32",) * 3}
    for program in (loss, jax.grad(loss)):
        found = products(jax.make_jaxpr(program)(params, batch_for(name)).jaxpr)
        assert {*found} == {NARROW} | compared


@pytest.mark.slow
@pytest.mark.parametrize("name", ("blip_rerank", "blip_itm"))
def test_scores_of_lists_and_of_all_pairs_agree(name):
    model, batch = made(name), batch_for(name, rows=4)
    rows = np.array([[3, 0, 3], [1, 1, 2], [0, 2, 3], [2, 3, 0]])

    @quick
    def scores(model, query, item):
        queries, items = model.query(query), model.item(item)
        lists = jax.tree.map(lambda x: x[rows], items)
        return model.score(queries, lists), model.score_all(queries, items)

    lists, every = scores(model, batch["query"], batch["item"])
    assert lists.shape == (4, 3)
    np.testing.assert_allclose(lists, np.take_along_axis(every, rows, 1), atol=1e-6)
    mask = batch["query"]["text_mask"] & (np.arange(12) < 6)
    padded = {**batch["query"], "text_mask": mask}
    short = {**padded, "text": batch["query"]["text"][:, :6], "text_mask": mask[:, :6]}
    expected = scores(model, padded, batch["item"])
    for x, y in zip(scores(model, short, batch["item"]), expected):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("merge_from, kind", [(0, "linear"), (9, "mean")])
def test_all_layers_may_merge_alike(merge_from, kind):
    model, rows = (
        made("blip_rerank", merge_from=merge_from),
        np.random.default_rng(0).normal(size=(3, 4, 5, 32)),
    )
    assert set(nnx.to_pure_dict(nnx.state(model.text.blocks))) == {kind}
    fused, text, tokens = rows.astype(np.float32)
    mask = np.arange(5) < np.array([[5], [2], [4], [1]])

    @quick
    def both(model):
        stack = getattr(model.text.blocks, kind)
        states = layers.run(stack, (fused, text), mask[:, None, None], tokens)
        return jnp.concatenate(states, -1)[:, 0], model.text.first(fused, text, mask, tokens)

    np.testing.assert_allclose(*both(model), atol=1e-6)


def test_stage1_reads_text_alone_and_pictures_alone_as_blip_does():
    model, batch = made("blip_cir"), batch_for("blip_cir", rows=3)
    text = {k: v for k, v in batch["query"].items() if k != "image"}

    @quick
    def compute(model):
        whole = model.text_project(model.text(text["text"], text["text_mask"])[:, 0])
        alone = model.query(text), model.query(batch["item"])
        return layers.unit(whole), model.query(batch["query"]), *alone, model.item(batch["item"])

    text_alone, fused, text_query, picture_query, item = compute(model)
    np.testing.assert_allclose(text_query, text_alone, atol=1e-6)
    assert np.abs(text_query - fused).max() > 1e-3
    np.testing.assert_allclose(picture_query, item, atol=1e-6)


@pytest.mark.parametrize(
    "name, query, missing",
    [
        ("blip_cir", {}, "needs `image`; this one has []"),
        ("blip_rerank", {"text": 0}, "needs `image` and `text`; this one has ['text']"),
        ("blip_itm", {"image": 0}, "needs `text`; this one has ['image']"),
    ],
)
def test_a_query_without_its_parts_is_refused(name, query, missing):
    with pytest.raises(ValueError) as error:
        made(name).query(query)
    assert missing in str(error.value)


@pytest.mark.parametrize("name", BLIP_METHODS)
def test_parts_that_do_not_fit_are_refused(name):
    config = tiny(name)
    assert method_name(config) == name
    other = Inputs(image=ImageSpec(size=64), text=INPUTS.text)
    with pytest.raises(ValueError, match="reads 32"):
        build(dataclasses.replace(config, inputs=other), nnx.Rngs(0))
    blind = dataclasses.replace(config.text, image_width=0)
    with pytest.raises(ValueError, match="set text"):
        build(dataclasses.replace(config, text=blind), nnx.Rngs(0))


@pytest.mark.parametrize("name", BLIP_METHODS)
def test_defaults_are_blip_base(name):
    config = METHODS[name][0]()
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))))
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(shapes["image"]) == 86_090_496
    texts = {"blip_cir": 137_258_496, "blip_rerank": 201_074_688, "blip_itm": 137_258_496}
    assert count(shapes["text"]) == texts[name]
    totals = {
        "blip_cir": 223_742_721,
        "blip_rerank": 288_347_138 + 137_258_496,  # with the text encoder of stage I
        "blip_itm": 223_742_721 + 2 * 769,  # with the matching head
    }
    assert count(shapes) == totals[name]


def test_temperature_stays_in_its_range():
    for bounds, scale in ((None, 0.5), ((0.001, 0.5), 2)):
        model = made("blip_cir", temperature_range=bounds, temperature=2.0)
        np.testing.assert_allclose(model.scale(), scale)


def test_equal_targets_are_right_answers_for_each_other():
    batch = batch_for("blip_cir", rows=4)
    groups = np.array([0, 1, 0, 2], np.int32)
    grouped = {**batch, "item": {**batch["item"], "group": groups}}

    @quick
    def compute(model):
        scores = model.scale() * model.query(batch["query"]) @ model.item(batch["item"]).T
        return jax.nn.log_softmax(scores), model.loss(batch, None)[0], model.loss(grouped, None)[0]

    logs, plain, alike = compute(made("blip_cir"))
    pairs = (logs[0, 0] + logs[0, 2] + logs[2, 0] + logs[2, 2]) / 2 + logs[1, 1] + logs[3, 3]
    np.testing.assert_allclose(plain, -np.diag(logs).mean(), rtol=1e-5)
    np.testing.assert_allclose(alike, -pairs / 4, rtol=1e-5)


def test_dropout_needs_a_key_and_keeps_the_mean():
    x, key = jnp.ones((400, 50)), jax.random.key(0)
    assert layers.dropout(x, 0.3, None) is x
    out = np.asarray(layers.dropout(x, 0.3, key))
    np.testing.assert_allclose(np.unique(out), (0, 1 / 0.7), rtol=1e-6)
    np.testing.assert_allclose(out.mean(), 1, atol=0.02)
    out = np.asarray(layers.drop_path(x, 0.3, key))
    assert (out == out[:, :1]).all()
    np.testing.assert_allclose(out.mean(), 1, atol=0.1)
    np.testing.assert_array_equal(layers.drop_path(x, jnp.float32(0), key), x)


@pytest.mark.parametrize(
    "noisy, changed",
    [
        (set(), set()),
        ({"dropout"}, {"text"}),
        ({"dropout", "fusion_dropout"}, {"text", "fused"}),
        ({"image"}, {"fused", "tokens"}),
    ],
)
def test_noise_in_training_comes_from_the_key_alone(noisy, changed):
    noise = {
        "dropout": 0.3,
        "image": dataclasses.replace(tiny("blip_rerank").image, drop_path=0.3),
        "fusion_dropout": True,
    }
    model, batch = (
        made("blip_rerank", **{k: noise[k] for k in noisy}),
        batch_for("blip_rerank", rows=3),
    )
    parts = quick(lambda m, key: {**m.query(batch["query"], key), **m.item(batch["item"], key)})
    keys = [jax.random.key(seed) for seed in (0, 0, 1)]
    quiet, (one, again, other) = parts(model, None), [parts(model, key) for key in keys]
    jax.tree.map(np.testing.assert_array_equal, one, again)
    differs = lambda x, y: {k for k in x if np.abs(1.0 * x[k] - 1.0 * y[k]).max() > 1e-3}
    assert differs(one, other) == differs(one, quiet) == changed


@pytest.mark.slow
def test_dropout_acts_inside_the_branches():
    model, rows = made("blip_rerank", dropout=0.3), jnp.ones((2, 5, 32))
    queries = {"fused": rows, "text": rows, "mask": jnp.ones((2, 5), bool)}
    score = quick(lambda m, key: m.score_all(queries, {"tokens": rows[:, :, ::-1]}, key))
    one, again, other = (score(model, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-4
    assert np.abs(one - score(model, None)).max() > 1e-4


def test_matching_score_is_the_log_odds():
    batch = batch_for("blip_itm", rows=2)

    @quick
    def compute(model):
        ids = blip.with_encode_token(batch["query"]["text"], model.config.text)
        items = model.item(batch["item"])
        read = model.text(ids, batch["query"]["text_mask"], items["tokens"])[:, 0]
        return model.match(read), model.score_all(model.query(batch["query"]), items)

    logits, scores = compute(made("blip_itm"))
    chances = jax.nn.softmax(logits)
    np.testing.assert_allclose(np.diag(scores), np.log(chances[:, 1] / chances[:, 0]), atol=1e-6)


def test_hard_negatives_are_of_another_group_and_mostly_the_similar_ones():
    similarity = jnp.asarray(
        [[9.0, 2.0, 1.0, 0.0], [0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0], [0.0] * 4]
    )
    groups = jnp.asarray([0, 1, 2, 2])
    draw = jax.vmap(lambda key: hard_negatives(similarity, groups, key))
    rows, alone = map(np.asarray, draw(jax.random.split(jax.random.key(0), 4000)))
    assert not alone.any()
    assert (np.asarray(groups)[rows] != np.asarray(groups)).all()
    weights = np.asarray(jax.nn.softmax(similarity[0]))[1:] + 1e-4
    share = np.bincount(rows[:, 0], minlength=4)[1:] / 4000
    np.testing.assert_allclose(share, weights / weights.sum(), atol=0.03)
    assert set(np.unique(rows[:, 3])) == {0, 1}


def test_matching_loss_by_hand():
    """With two rows each other's only negative, the drawn pairs are known: all four."""
    batch = batch_for("blip_itm", rows=2)

    @quick
    def compute(model, groups):
        scores = model.score_all(model.query(batch["query"]), model.item(batch["item"]))
        grouped = {**batch, "item": {**batch["item"], "group": groups}}
        return scores, *model.loss(grouped, jax.random.key(0))

    model = made("blip_itm")
    scores, value, metrics = compute(model, np.arange(2))
    signed = np.asarray([scores[0, 0], scores[1, 1], *[-scores[0, 1], -scores[1, 0]] * 2])
    np.testing.assert_allclose(metrics["matching"], np.log1p(np.exp(-signed)).mean(), rtol=1e-5)
    np.testing.assert_allclose(value, metrics["matching"] + metrics["contrast"], rtol=1e-6)
    _, _, metrics = compute(model, np.zeros(2, int))
    np.testing.assert_allclose(metrics["matching"], np.log1p(np.exp(-signed[:2])).mean(), rtol=1e-5)


def test_plain_bert_has_types_and_gives_every_state():
    config = bert.BertConfig(vocabulary=40, length=9, width=16, layers=3, heads=2, hidden=24)
    model = bert.Bert(config, dtype="float32", remat=True, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(1, 40, (2, 7)).astype(np.int32)
    mask = np.arange(7) < np.array([[7], [4]])
    every = lambda m: (m.states(ids, mask), m.embeddings(ids), m(ids, mask), m.first(ids, mask))
    compute = quick(every)
    states, embedded, last, first = compute(model)
    assert states.shape == (4, 2, 7, 16)
    for x, y in ((states[0], embedded), (states[-1], last), (states[-1, :, 0], first)):
        np.testing.assert_allclose(x, y, atol=1e-6)
    types = model.embeddings.types
    types[...] = types[...].at[1].add(1.0)
    np.testing.assert_array_equal(compute(model)[0], states)
    types[...] = types[...].at[0, 0].add(1.0)
    assert np.abs(compute(model)[0] - states).max() > 0.1
    with pytest.raises(ValueError, match="10 tokens does not fit 9"):
        model(np.ones((1, 10), np.int32), np.ones((1, 10), bool))
    with pytest.raises(ValueError, match="no cross-attention"):
        model(ids, mask, jnp.zeros((2, 5, 16)))
